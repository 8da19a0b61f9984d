"""The ops straight from their definitions, in fp64: a weight per pair of tokens, a sum per tap.

Shares no code and no algorithm with based_ops. Plain torch, so that autograd gives the gradients of
the definitions; linear_attention_long gives them in closed form for one long head.
"""

import itertools

import torch


def taylor_feature_map(x, *, scale=None):
    dim = x.shape[-1]
    x = x.double() * (dim**-0.5 if scale is None else scale) ** 0.5
    x = x.unbind(-1)
    rows = [torch.ones_like(x[0]), *x, *(a * a / 2**0.5 for a in x)]
    met = set()
    for r in range(1, dim // 2 + 1):
        for j in range(dim):
            pair = frozenset((j, (j + r) % dim))
            if pair not in met:
                met.add(pair)
                rows.append(x[j] * x[(j + r) % dim])
    return torch.stack(rows, -1)


def linear_attention(q, k, v, *, scale=None, normalize=True, initial_state=None, cu_seqlens=None):
    """out (B, T, H, V), kv_state (N, H, F, V), k_state (N, H, F)."""
    feature_dim = q.shape[-1]
    scale = feature_dim**-0.5 if scale is None else scale

    def one(q, k, v, *state):  # (T, H, .)
        s = scale * torch.einsum("thd,uhd->htu", q, k)
        w = torch.tril((1 + (1 + s) ** 2) / 2)
        numerator = torch.einsum("htu,uhv->thv", w, v)
        denominator = w.sum(2).T
        k_map = taylor_feature_map(k, scale=scale)
        kv_state = torch.einsum("thf,thv->hfv", k_map, v)
        k_state = k_map.sum(0)
        if state:
            q_map = taylor_feature_map(q, scale=scale)
            numerator = numerator + torch.einsum("thf,hfv->thv", q_map, state[0])
            denominator = denominator + torch.einsum("thf,hf->th", q_map, state[1])
            kv_state, k_state = kv_state + state[0], k_state + state[1]
        out = numerator / denominator[..., None] if normalize else numerator
        return out, kv_state, k_state

    return _each_sequence(one, (q, k, v), initial_state, cu_seqlens)


def sliding_window_attention(q, k, v, window, *, scale=None, initial_state=None, cu_seqlens=None):
    """out (B, T, H, V), k_cache and v_cache (N, W, H, V), positions (N,)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(q, k, v, *state):  # (T, H, V)
        past, held = 0, 0  # tokens seen, and how many of them the ring still holds
        if state:
            k_cache, v_cache, past = state[0], state[1], int(state[2])
            held = min(past, window)
            slots = [p % window for p in range(past - held, past)]
            k, v = torch.cat([k_cache[slots], k]), torch.cat([v_cache[slots], v])

        total = past + q.shape[0]
        distance = torch.arange(past, total)[:, None] - torch.arange(past - held, total)
        s = scale * torch.einsum("thd,uhd->htu", q, k)
        s = s.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        out = torch.einsum("htu,uhv->thv", torch.softmax(s, -1), v)

        first = past - held
        nothing = q.new_zeros(q.shape[1:])
        last = {p % window: p - first for p in range(max(0, total - window), total)}
        rings = (
            torch.stack([x[last[slot]] if slot in last else nothing for slot in range(window)])
            for x in (k, v)
        )
        return out, *rings, torch.tensor(total)

    return _each_sequence(one, (q, k, v), initial_state, cu_seqlens)


def short_conv(
    x, weight, bias=None, *, activation=None, gate=None, initial_state=None, cu_seqlens=None
):
    """out (B, T, C), conv_state (N, C, K-1)."""
    channels, taps = weight.shape
    weight = weight.double()

    def one(x, gate, *state):  # (T, C)
        past = state[0] if state else x.new_zeros(channels, taps - 1)
        inputs = torch.cat([past, x.T], 1)
        out = torch.zeros_like(x)
        if x.shape[0] > 0:
            out = torch.einsum("ctk,ck->tc", inputs.unfold(1, taps, 1), weight)
        if bias is not None:
            out = out + bias.double()
        if activation == "silu":
            out = out * torch.sigmoid(out)
        return out * gate, inputs[:, x.shape[0] :]

    gate = torch.ones_like(x) if gate is None else gate
    state = None if initial_state is None else (initial_state,)
    return _each_sequence(one, (x, gate), state, cu_seqlens)


def decode_block(
    mixed,
    x,
    out_weight,
    norm_weight,
    fc1,
    fc2,
    next_norm_weight,
    next_weight,
    counters,
    *,
    out_bias=None,
    next_bias=None,
    eps=1e-5,
    conv_weight=None,
    conv_state=None,
    state_indices=None,
):
    """x (N, d), out (N, M), or with a convolution (N, C); conv_state in place."""

    def product(a, weight, bias=None):
        return a @ weight.double().T + (0 if bias is None else bias.double())

    def normed(a, weight):
        return a * (a.square().mean(-1, True) + eps).rsqrt() * weight.double()

    x = x.double() + product(mixed.double(), out_weight, out_bias)
    value, gate = product(normed(x, norm_weight), fc1).chunk(2, -1)
    x = x + product(value * gate * gate.sigmoid(), fc2)
    out = product(normed(x, next_norm_weight), next_weight, next_bias)
    if conv_weight is None:
        return x, out
    u, gate = out.chunk(2, -1)
    slots = torch.arange(len(x)) if state_indices is None else state_indices
    out = torch.zeros_like(u)
    for row, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(conv_state):
            out[row] = 0 if slot == -1 else float("nan")
            continue
        inputs = torch.cat([conv_state[slot].double(), u[row][:, None]], 1)
        y = (inputs * conv_weight.double()).sum(1)
        out[row] = y * y.sigmoid() * gate[row]
        conv_state[slot] = inputs[:, 1:]
    return x, out


def decode_blocks(mixed, x, blocks, counters, *, eps=1e-5, state_indices=None):
    """One after the other."""
    for block in blocks:
        indices = None if block.conv_weight is None else state_indices
        options = block._asdict() | {"counters": counters, "eps": eps, "state_indices": indices}
        x, mixed = decode_block(mixed, x, **options)
    return x, mixed


def linear_attention_rows(q, k, v, rows):
    """out (R, V) of one head at R of its tokens: q (R, D) of these, k (T, D), v (T, V) of all."""
    q, k, v = q.double(), k.double(), v.double()
    outs = []
    for i, t in enumerate(rows):
        s = (k[: t + 1] @ q[i]) * q.shape[-1] ** -0.5
        w = 1 + s + s * s / 2
        outs.append(w @ v[: t + 1] / w.sum())
    return torch.stack(outs)


def linear_attention_long(q, k, v, dout, block=512):
    """out, dq, dk, dv of one head, (T, .), pair by pair in blocks of queries."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    out, dq, dk, dv = (torch.zeros_like(x) for x in (v, q, k, v))
    for start in range(0, q.shape[0], block):
        rows = slice(start, min(start + block, q.shape[0]))
        s = scale * (q[rows] @ k[: rows.stop].T)
        w = (s * s).mul_(0.5).add_(s).add_(1).tril_(start)
        denominator = w.sum(1, keepdim=True)
        p = w.div_(denominator)
        out[rows] = p @ v[: rows.stop]
        # d out / d w_ts = (v_s - out_t) / denominator_t and dw / ds = 1 + s.
        delta = (dout[rows] * out[rows]).sum(1, keepdim=True)
        dw = (dout[rows] @ v[: rows.stop].T).sub_(delta).div_(denominator)
        ds = dw.mul_(s.add_(1)).tril_(start)
        dq[rows] = scale * (ds @ k[: rows.stop])
        dk[: rows.stop] += scale * (ds.T @ q[rows])
        dv[: rows.stop] += p.T @ dout[rows]
    return out, dq, dk, dv


def _each_sequence(one, tensors, initial_state, cu_seqlens):
    """one(*tensors (T, ...), *state) per row of the batch, or per packed sequence of row 0."""
    tensors = [x.double() for x in tensors]
    if cu_seqlens is None:
        sequences = list(zip(*tensors))
    else:
        bounds = [int(i) for i in cu_seqlens]
        sequences = [
            tuple(x[0, start:end] for x in tensors) for start, end in itertools.pairwise(bounds)
        ]
    states = [()] * len(sequences)
    if initial_state is not None:
        states = list(zip(*(x.double() if x.is_floating_point() else x for x in initial_state)))
    outs, *finals = zip(*(one(*x, *state) for x, state in zip(sequences, states)))
    out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]
    return out, *(torch.stack(final) for final in finals)
