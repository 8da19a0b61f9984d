"""What else one could run, in plain torch, each in the layout that suits it.

Attentions take (B, H, T, .), convolutions (B, C, T); decode steps (B, H, .). Scores are scaled by
D^-0.5. Two Taylor maps: the outer product of HazyResearch's public eager code keeps both x_i x_j
and x_j x_i (D=16: 273 rows), the packed one keeps each pair once (153 rows, in based_ops' order).
"""

from functools import cache

import torch
import torch.nn.functional as F


@cache
def rotation_pairs(dim, device):
    """Index tensors (i, j) of the packed map's products: all x_j^2, then x_j x_(j+r)."""
    pairs = [(j, j) for j in range(dim)]
    for r in range(1, dim // 2 + 1):
        pairs += [(j, (j + r) % dim) for j in range(dim // 2 if 2 * r == dim else dim)]
    return torch.tensor(pairs, device=device).unbind(1)


def packed_map(x):
    dim = x.shape[-1]
    i, j = rotation_pairs(dim, x.device)
    x = x * dim**-0.25
    products = x[..., i] * x[..., j]
    products[..., :dim] *= 2**-0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


def outer_map(x):
    dim = x.shape[-1]
    products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * (2 * dim) ** -0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, products], -1)


def outer_state(kv_state, k_state, dim):
    """The states of the packed map -> those of the outer map; `packed_state` goes back."""
    rows, weights = _outer_rows(dim, kv_state.device)
    return kv_state[:, :, rows] * weights[:, None], k_state[:, :, rows] * weights


def packed_state(kv_state, k_state, dim):
    rows, weights = _outer_rows(dim, kv_state.device)
    shape = (*k_state.shape[:2], 1 + dim + dim * (dim + 1) // 2)
    kv_packed, k_packed = kv_state.new_empty(*shape, kv_state.shape[-1]), k_state.new_empty(shape)
    kv_packed[:, :, rows] = kv_state / weights[:, None]
    k_packed[:, :, rows] = k_state / weights
    return kv_packed, k_packed


def _outer_rows(dim, device):
    """For each row of the outer map: the packed row with the same product, and its factor."""
    i, j = rotation_pairs(dim, device)
    row = torch.empty(dim, dim, dtype=torch.int64, device=device)
    row[i, j] = row[j, i] = 1 + dim + torch.arange(i.numel(), device=device)
    rows = torch.cat([torch.arange(1 + dim, device=device), row.flatten()])
    # x_i x_j once in the packed map, over sqrt(2) and twice in the outer one.
    weights = torch.where(row < 1 + 2 * dim, 1.0, 2**-0.5).flatten()
    return rows, torch.cat([weights.new_ones(1 + dim), weights])


def linear_quadratic(q, k, v):
    """All T x T weights at once."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    w = (1 + s + s * s / 2).tril()
    return w @ v / w.sum(-1, keepdim=True)


def linear_chunked(feature_map, chunk=128):
    """Whole-tensor operations over all chunks, as in fla's naive_chunk_based."""

    def run(q, k, v):
        q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, _with_ones(v)))  # (B, H, N, C, .)
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        w = (1 + s + s * s / 2).tril()
        increments = feature_map(k).transpose(-1, -2) @ v
        before = increments.cumsum(2) - increments
        return _normalized(w @ v + feature_map(q) @ before).flatten(2, 3)

    return run


def linear_chunk_loop(feature_map, chunk=128):
    """The same sums chunk by chunk: every intermediate stays in the cache."""

    def run(q, k, v):
        state, outs = 0, []
        chunks = (x.split(chunk, 2) for x in (q, k, _with_ones(v)))
        for qc, kc, vc in zip(*chunks, strict=True):
            s = qc @ kc.transpose(-1, -2) * q.shape[-1] ** -0.5
            w = (1 + s + s * s / 2).tril()
            out = w @ vc
            if outs:
                out = out + feature_map(qc) @ state
            state = state + feature_map(kc).transpose(-1, -2) @ vc
            outs.append(_normalized(out))
        return torch.cat(outs, 2)

    return run


def _with_ones(v):
    """The denominator as one more column of v."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _normalized(out):
    return out[..., :-1] / out[..., -1:]


def attention_causal(q, k, v):
    """Softmax attention. q and k are padded to v's width: torch's fused path needs equal ones."""
    padding = v.shape[-1] - q.shape[-1]
    scale = q.shape[-1] ** -0.5
    q, k = (F.pad(x, (0, padding)) if padding else x for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def decode_public(feature_map):
    """The recurrent step of HazyResearch's eager code: broadcast products, then sums."""

    def run(q, k, v, kv_state, k_state):
        q, k = feature_map(q), feature_map(k)
        kv_state += k[..., None] * v[..., None, :]
        k_state += k
        return (q[..., None] * kv_state).sum(-2) / (q * k_state).sum(-1, keepdim=True)

    return run


def decode_fused(feature_map):
    """The same step with the update in one pass and the readout as a matrix product."""

    def run(q, k, v, kv_state, k_state):
        q, k = feature_map(q), feature_map(k)
        kv_state.addcmul_(k[..., None], v[..., None, :])
        k_state += k
        return (q[..., None, :] @ kv_state)[..., 0, :] / (q * k_state).sum(-1, keepdim=True)

    return run


def window_band(window):
    """One call over the whole T x T square, a band of it visible."""

    @cache
    def band(seqlen, device):
        age = torch.arange(seqlen, device=device)[:, None] - torch.arange(seqlen, device=device)
        return (age >= 0) & (age < window)

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band(q.shape[2], q.device))

    return run


def window_blocks(window, attention):
    """Blocks of `window` queries against their own and the previous block of keys, all at once.

    attention(q, k, v, visible) takes (B H, N, W, V), (B H, N, 2W, V) twice and (N, W, 2W).
    """

    def run(q, k, v):
        blocks = q.unflatten(2, (-1, window)).flatten(0, 1)
        k, v = (_with_previous(x, window).flatten(0, 1) for x in (k, v))
        age = torch.arange(window, device=q.device)[:, None] + window
        age = age - torch.arange(2 * window, device=q.device)
        visible = ((age >= 0) & (age < window)).repeat(blocks.shape[1], 1, 1)
        visible[0, :, :window] = False  # nothing comes before the first block
        return attention(blocks, k, v, visible).unflatten(0, q.shape[:2]).flatten(2, 3)

    return run


def _with_previous(x, window):
    """(B, H, T, V) -> (B, H, N, 2W, V), blocks that overlap by half: a view of the padded x."""
    return F.pad(x, (0, 0, window, 0)).unfold(2, 2 * window, window).transpose(-1, -2)


def attention_eager(q, k, v, visible):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def window_decode(q, k, v, k_cache, v_cache, positions):
    """Write the ring slot, then SDPA over the ring: softmax does not mind the order of the keys.

    Every row has filled its ring.
    """
    rows = torch.arange(q.shape[0], device=q.device)
    slots = positions % k_cache.shape[1]
    k_cache[rows, slots], v_cache[rows, slots] = k, v
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]


def conv(x, weight, gate):
    """conv1d, SiLU and gate on (B, C, T)."""
    taps = weight.shape[1]
    out = F.conv1d(x, weight[:, None], padding=taps - 1, groups=x.shape[1])[..., : x.shape[2]]
    return F.silu(out) * gate


def conv_in_place(x, weight, gate):
    """The same without gradients in mind: SiLU and gate overwrite the convolution's output."""
    taps = weight.shape[1]
    out = F.conv1d(x, weight[:, None], padding=taps - 1, groups=x.shape[1])[..., : x.shape[2]]
    return F.silu(out, inplace=True).mul_(gate)


def conv_shifts(x, weight, gate):
    """On (B, T, C): one multiply-add per tap over the shifted input."""
    taps, seqlen = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    out = padded[:, :seqlen] * weight[:, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, padded[:, tap : tap + seqlen], weight[:, tap])
    return F.silu(out) * gate


def conv_decode(x, weight, conv_state, gate):
    """One token: x, gate (B, C), conv_state (B, C, K-1) in place."""
    window = torch.cat([conv_state, x[..., None]], -1)
    conv_state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1)) * gate


def linear_swiglu(x, weight):
    """value * silu(gate) of x weight^T = (value, gate): (N, K), (2M, K) -> (N, M)."""
    value, gate = F.linear(x, weight).chunk(2, -1)
    return value * F.silu(gate)


def decode_block(mixed, x, out_weight, norm, fc1, fc2, next_norm, next_weight, _counters):
    """What lies between two mixers: (x, out), as based_ops.decode_block without biases."""

    def normed(x, weight):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-5).to(weight.dtype)

    x = x + F.linear(mixed, out_weight)
    x = x + F.linear(linear_swiglu(normed(x, norm), fc1), fc2)
    return x, F.linear(normed(x, next_norm), next_weight)


def decode_block_conv(*args):
    """decode_block(), then conv_decode() of its product (u, gate): weight and state come last."""
    *block, weight, conv_state = args
    x, out = decode_block(*block)
    u, gate = out.chunk(2, -1)
    return x, conv_decode(u, weight, conv_state, gate)
