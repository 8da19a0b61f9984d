"""Every op of based_ops in plain torch: the same names, signatures and states.

Any device, differentiable. Written to be read and to be compared against, not to be fast:
attention is quadratic in the sequence length. Inputs below fp32 are computed in fp32 (fp64 stays
fp64) and each result is rounded once. Arguments are not checked, and future tokens are masked by a
zero weight, so NaN in them does spread here (not in the ops). The decode functions are not
differentiable, as in the ops.

Shapes: B batch, T tokens, H heads, D feature dim, F = 1 + D + D(D+1)/2, V head dim, W window,
C channels, K taps, N sequences (B, or the number of packed ones).
Source: Arora et al., "Simple linear attention language models balance the recall-throughput
tradeoff", ICML 2024, arXiv 2402.18668.
"""

import torch
import torch.nn.functional as F


def taylor_feature_map(x, *, scale=None):
    """Map (..., D) to (..., F) so that <map(q), map(k)> = 1 + s + s^2/2, s = scale <q, k>.

    scale defaults to D^-0.5. Rotation order: 1; x_j; x_j^2/sqrt(2); x_j x_(j+r mod D) for r >= 1.
    """
    return _taylor(_widen(x), scale).to(x.dtype)


def linear_attention(
    q,
    k,
    v,
    *,
    scale=None,
    normalize=True,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """Causal attention out_t = sum w v_s / sum w with w = 1 + s + s^2/2, s = scale <q_t, k_s>.

    q, k (B, T, H, D), v (B, T, H, V) -> out (B, T, H, V), or (out, (kv_state, k_state)).
    kv_state (N, H, F, V) = sum map(k)^T v and k_state (N, H, F) = sum map(k), fp32 (fp64 for fp64
    inputs). normalize=False leaves out the denominator. scale defaults to D^-0.5.
    """

    def one_sequence(q, k, v, kv_state, k_state):
        seqlen, feature_dim = q.shape[1], q.shape[-1]
        q_map, k_map = _taylor(q, scale), _taylor(k, scale)
        s = torch.einsum("nthd,nshd->nhts", q, k) * _scale(scale, feature_dim)
        causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).tril()
        w = torch.where(causal, 1 + s + s.square() / 2, 0)

        out = torch.einsum("nhts,nshv->nthv", w, v) + torch.einsum(
            "nthf,nhfv->nthv", q_map, kv_state
        )
        if normalize:
            denominator = w.sum(-1).transpose(1, 2) + torch.einsum("nthf,nhf->nth", q_map, k_state)
            out = out / denominator[..., None]
        kv_state = kv_state + torch.einsum("nthf,nthv->nhfv", k_map, v)
        k_state = k_state + k_map.sum(1)
        return out, (kv_state, k_state)

    if initial_state is None:
        n, (nheads, feature_dim) = _num_sequences(q, cu_seqlens), q.shape[2:]
        expanded_dim = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        zeros = _widen(q).new_zeros
        initial_state = (
            zeros(n, nheads, expanded_dim, v.shape[-1]),
            zeros(n, nheads, expanded_dim),
        )
    out, state = _each_sequence(one_sequence, (q, k, v), initial_state, cu_seqlens)
    out = out.to(v.dtype)
    return (out, state) if output_final_state else out


@torch.no_grad()
def linear_attention_decode(
    q, k, v, kv_state, k_state, *, scale=None, normalize=True, state_indices=None
):
    """One token of linear_attention; the states are updated in place.

    q, k (B, H, D), v (B, H, V) -> out (B, H, V). kv_state (slots, H, F, V), k_state (slots, H, F).
    state_indices (B,): slot of each row; -1 skips the row (state untouched, output 0). Default:
    row b uses slot b.
    """
    rows, slots = _active(q, state_indices)
    out, (new_kv, new_k) = linear_attention(
        q[rows, None],
        k[rows, None],
        v[rows, None],
        scale=scale,
        normalize=normalize,
        initial_state=(kv_state[slots], k_state[slots]),
        output_final_state=True,
    )
    kv_state[slots] = new_kv
    k_state[slots] = new_k
    return _scatter_rows(v, rows, out)


@torch.no_grad()
def linear_attention_decode_deferred(
    q,
    k,
    v,
    kv_state,
    k_state,
    pending_k,
    pending_v,
    fill,
    *,
    scale=None,
    normalize=True,
    state_indices=None,
):
    """linear_attention_decode whose state takes in its tokens C at a time.

    pending_k (slots, C, H, D), pending_v (slots, C, H, V): the tokens that wait, fill (B,) of them
    in each row before this one. Rings or states are updated in place, fill is not.
    """
    rows, slots = _active(q, state_indices)
    place = fill[rows].long()
    state = [x.clone() for x in (kv_state, k_state)]  # the plain form before this token
    linear_attention_fold(
        *state, pending_k, pending_v, fill, scale=scale, state_indices=state_indices
    )
    out = linear_attention_decode(
        q, k, v, *state, scale=scale, normalize=normalize, state_indices=state_indices
    )
    full = place + 1 == pending_k.shape[1]
    kv_state[slots[full]] = state[0][slots[full]]
    k_state[slots[full]] = state[1][slots[full]]
    pending_k[slots[~full], place[~full]] = k[rows[~full]]
    pending_v[slots[~full], place[~full]] = v[rows[~full]]
    return out


@torch.no_grad()
def linear_attention_fold(
    kv_state, k_state, pending_k, pending_v, fill, *, scale=None, state_indices=None
):
    """Adds the first fill[b] tokens of each row's ring to its state, in place."""
    rows, slots = _active(fill, state_indices)
    waits = torch.arange(pending_k.shape[1], device=fill.device) < fill[rows, None]
    k_map = _taylor(_widen(pending_k[slots]), scale)
    k_map, values = (
        torch.where(waits[..., None, None], x, 0) for x in (k_map, _widen(pending_v[slots]))
    )
    kv_state[slots] += torch.einsum("nchf,nchv->nhfv", k_map, values)
    k_state[slots] += k_map.sum(1)


def sliding_window_attention(
    q,
    k,
    v,
    window,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """Softmax attention in which query t sees the keys s with 0 <= t - s < window.

    q, k, v (B, T, H, V) -> out (B, T, H, V), or (out, (k_cache, v_cache, positions)). scale
    defaults to V^-0.5. The caches (N, W, H, V) are rings: the key of absolute
    position p is in slot p mod W, slots never written are 0. positions (N,): tokens seen so far.
    """

    def one_sequence(q, k, v, k_cache, v_cache, positions):
        seqlen = q.shape[1]
        ring = torch.arange(window, device=q.device)
        past = positions[:, None] - window + ring  # absolute positions of the last W keys, (N, W)
        written = past >= 0
        keys = torch.cat([_take(k_cache, past % window, written), k], 1)  # (N, W + T, H, V)
        values = torch.cat([_take(v_cache, past % window, written), v], 1)

        query = torch.arange(seqlen, device=q.device)[:, None] + window
        key = torch.arange(window + seqlen, device=q.device)
        exists = F.pad(written, (0, seqlen), value=True)
        visible = (key <= query) & (query - key < window) & exists[:, None, None, :]
        scores = torch.einsum("nthv,nshv->nhts", q, keys) * _scale(scale, q.shape[-1])
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out = torch.einsum("nhts,nshv->nthv", weights, values)

        positions = positions + seqlen
        newest = (
            seqlen + (ring - positions[:, None]) % window
        )  # index of the key that slot r ends with
        written = F.pad(written, (0, seqlen), value=True).gather(1, newest)
        return out, (_take(keys, newest, written), _take(values, newest, written), positions)

    if initial_state is None:
        n = _num_sequences(q, cu_seqlens)
        cache = q.new_zeros(n, window, *q.shape[2:])
        initial_state = (cache, cache, torch.zeros(n, dtype=torch.int64, device=q.device))
    positions_dtype = initial_state[2].dtype
    out, (k_cache, v_cache, positions) = _each_sequence(
        one_sequence, (q, k, v), initial_state, cu_seqlens
    )
    out = out.to(q.dtype)
    state = (k_cache.to(k.dtype), v_cache.to(v.dtype), positions.to(positions_dtype))
    return (out, state) if output_final_state else out


@torch.no_grad()
def sliding_window_decode(
    q, k, v, k_cache, v_cache, positions, *, scale=None, state_indices=None, rotary=None
):
    """One token of sliding_window_attention; the rings are updated in place, positions is not.

    q, k, v (B, H, V) -> out (B, H, V). k_cache, v_cache (slots, W, H, V). positions (B,): tokens
    each row has seen before this one. state_indices as in linear_attention_decode. rotary: (cos,
    sin), each (B, R): q and k are rotated first, dim j < R together with dim j + R.
    """
    if rotary is not None:
        q, k = (_rotate(x, *rotary) for x in (q, k))
    rows, slots = _active(q, state_indices)
    out, (new_k, new_v, _) = sliding_window_attention(
        q[rows, None],
        k[rows, None],
        v[rows, None],
        k_cache.shape[1],
        scale=scale,
        initial_state=(k_cache[slots], v_cache[slots], positions[rows]),
        output_final_state=True,
    )
    written = positions[rows] % k_cache.shape[1]
    each = torch.arange(rows.numel(), device=rows.device)
    k_cache[slots, written] = new_k[each, written]
    v_cache[slots, written] = new_v[each, written]
    return _scatter_rows(v, rows, out)


def short_conv(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    gate=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """Causal depthwise convolution: out = act(conv(x) + bias) * gate, act None or "silu".

    x, gate (B, T, C), weight (C, K), bias (C,) -> out (B, T, C), or (out, conv_state). The last tap
    meets the current token. conv_state (N, C, K-1), x's dtype: the last K-1 inputs, oldest first.
    """

    def one_sequence(x, gate, conv_state):
        seqlen, taps = x.shape[1], weight.shape[1]
        inputs = torch.cat([conv_state.transpose(1, 2), x], 1)  # (N, K-1 + T, C)
        out = sum(_widen(weight)[:, i] * inputs[:, i : i + seqlen] for i in range(taps))
        if bias is not None:
            out = out + _widen(bias)
        if activation == "silu":
            out = F.silu(out)
        return out * gate, (inputs[:, seqlen:].transpose(1, 2).contiguous(),)

    if initial_state is None:
        n = _num_sequences(x, cu_seqlens)
        initial_state = x.new_zeros(n, x.shape[2], weight.shape[1] - 1)
    gate = torch.ones_like(x) if gate is None else gate
    out, (state,) = _each_sequence(one_sequence, (x, gate), (initial_state,), cu_seqlens)
    out = out.to(x.dtype)
    return (out, state.to(x.dtype)) if output_final_state else out


@torch.no_grad()
def short_conv_decode(
    x, weight, conv_state, bias=None, *, activation=None, gate=None, state_indices=None
):
    """One token of short_conv; conv_state (slots, C, K-1) is updated in place.

    x, gate (B, C) -> out (B, C). state_indices as in linear_attention_decode.
    """
    rows, slots = _active(x, state_indices)
    out, new_state = short_conv(
        x[rows, None],
        weight,
        bias,
        activation=activation,
        gate=None if gate is None else gate[rows, None],
        initial_state=conv_state[slots],
        output_final_state=True,
    )
    conv_state[slots] = new_state
    return _scatter_rows(x, rows, out)


def _widen(x):
    """The dtype computed in: fp64 and integers as they are, every other one as fp32."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.float()


def _scale(scale, dim):
    return dim**-0.5 if scale is None else scale


def _rotate(x, cos, sin):
    """x (B, H, V) by cos and sin (B, R): dim j < R together with dim j + R."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    x1, x2, rest = _widen(x).split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1).to(x.dtype)


def _taylor(x, scale):
    dim = x.shape[-1]
    x = x * _scale(scale, dim) ** 0.5
    # Rotation r pairs j with (j + r) mod D; for even D the last one would meet every pair twice.
    pairs = [
        (j, (j + r) % dim)
        for r in range(1, dim // 2 + 1)
        for j in range(dim // 2 if 2 * r == dim else dim)
    ]
    left, right = torch.tensor(pairs, dtype=torch.int64, device=x.device).reshape(-1, 2).unbind(1)
    return torch.cat(
        [torch.ones_like(x[..., :1]), x, x * x / 2**0.5, x[..., left] * x[..., right]], -1
    )


def _num_sequences(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _each_sequence(fn, tensors, state, cu_seqlens):
    """fn(*tensors, *state) -> (out, state), on the batch or on each packed sequence."""
    tensors, state = [_widen(x) for x in tensors], [_widen(x) for x in state]
    if cu_seqlens is None:
        return fn(*tensors, *state)
    bounds = cu_seqlens.tolist()
    results = [
        fn(*(x[:, start:end] for x in tensors), *(s[i : i + 1] for s in state))
        for i, (start, end) in enumerate(zip(bounds, bounds[1:]))
    ]
    outs, states = zip(*results)
    return torch.cat(outs, 1), tuple(torch.cat(s) for s in zip(*states))


def _take(x, index, keep):
    """x (N, S, ...) at index (N, M) of its second dim, zero where keep (N, M) is false."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.where(keep[..., None, None], x[rows, index], 0)


def _active(x, state_indices):
    """The rows of a decode call that are not skipped, and the state slot of each."""
    if state_indices is None:
        state_indices = torch.arange(x.shape[0], device=x.device)
    rows = (state_indices >= 0).nonzero()[:, 0]
    return rows, state_indices[rows].long()


def _scatter_rows(like, rows, out):
    result = torch.zeros_like(like)
    result[rows] = out[:, 0].to(like.dtype)
    return result
