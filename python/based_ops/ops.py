"""The public functions. Each fills in defaults, follows autocast and calls its torch op.

B batch, T seqlen, H heads, D feature_dim, F = 1 + D + D (D + 1) / 2 expanded_dim, V head_dim,
W window, C channels, K taps, N sequences: B, or the packed ones with `cu_seqlens`. Index tensors
are int32 or int64. `cu_seqlens` (N+1,) packs sequences along T of a batch of 1: sequence i is the
tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1; empty ones are allowed. `state_indices` (B,) is the
slot of each row in a pool of states; -1 skips the row (output 0, state untouched).

The formulas are those of BASED (Arora et al., ICML 2024, arXiv 2402.18668).
"""

from torch import Tensor

from based_ops.arguments import autocast, default_scale, forbid_grad, is_silu, state_tensors
from based_ops.autograd import calls


def taylor_feature_map(x: Tensor, *, scale: float | None = None) -> Tensor:
    """2nd-order Taylor feature map: <phi(q), phi(k)> = 1 + s + s^2/2 with s = scale <q, k>.

    Args:
        x: (..., D), any floating dtype.
        scale: > 0, default D ** -0.5.

    Returns:
        (..., F) in x's dtype, rows in rotation order: 1; x_j; x_j^2 / sqrt(2); then
        x_j x_{(j + r) mod D} for r = 1 ... D // 2 (for even D the last r keeps j < D / 2), where x
        carries sqrt(scale).

    Raises:
        RuntimeError: on a 0-dimensional x, an unsupported dtype, a strided last dimension, scale
            <= 0.
    """
    scale = default_scale(x) if scale is None else scale
    if x.ndim <= 4:
        return calls["taylor_feature_map"](x, scale)
    return calls["taylor_feature_map"](x.flatten(0, -2), scale).unflatten(0, x.shape[:-1])


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal linear attention with the Taylor feature map, in time and memory linear in T.

    out_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts, w_ts = 1 + s + s^2/2, s = scale <q_t, k_s>.

    Args:
        q, k: (B, T, H, D); v: (B, T, H, V). Same dtype; float16, bfloat16 or float32 are
            accumulated in float32, float64 in float64.
        scale: > 0, default D ** -0.5.
        normalize: False drops the denominator.
        initial_state: (kv_state (N, H, F, V), k_state (N, H, F)), float32 (float64 for float64 q):
            the sums of phi(k)^T v and phi(k) over the tokens before this call, rows in the order of
            `taylor_feature_map`. With it a denominator near zero is the caller's: only a state
            made by this op keeps it >= 1/2 a token.
        output_final_state: also return the state after the last token.
        cu_seqlens: (N+1,) packed sequences, B = 1.

    Returns:
        out (B, T, H, V) in v's dtype, or (out, (kv_state, k_state)). Differentiable in q, k, v and
        the initial state, through out and the final state.

    Raises:
        RuntimeError: "linear_attention: <argument>: expected ..., got ..." on any mismatch of
            shape, dtype, device or stride, scale <= 0, or bad cu_seqlens.
    """
    op = "linear_attention"
    kv_state, k_state = state_tensors(op, initial_state, 2, "(kv_state, k_state)")
    q, k, v = autocast(q, k, v)
    scale = default_scale(q) if scale is None else scale
    result = calls[op](q, k, v, kv_state, k_state, cu_seqlens, scale, normalize, output_final_state)
    return (result[0], result[1:]) if output_final_state else result


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_state: Tensor,
    k_state: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `linear_attention` per row: adds it to the state in place, then reads the state.

    Args:
        q, k: (B, H, D); v: (B, H, V).
        kv_state: (slots, H, F, V) and k_state: (slots, H, F), float32 (float64 for float64 q),
            updated in place. slots = B without `state_indices`.
        scale: > 0, default D ** -0.5.
        normalize: False drops the denominator.
        state_indices: (B,) slot of each row, -1 skips it.

    Returns:
        out (B, H, V) in v's dtype.

    Raises:
        RuntimeError: on mismatched arguments, a slot out of range or used twice, or when grad is
            enabled and an input requires it.
    """
    op = "linear_attention_decode"
    forbid_grad(op, q=q, k=k, v=v, kv_state=kv_state, k_state=k_state)
    q, k, v = autocast(q, k, v)
    scale = default_scale(q) if scale is None else scale
    return calls[op](q, k, v, kv_state, k_state, state_indices, scale, normalize)


def linear_attention_decode_deferred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_state: Tensor,
    k_state: Tensor,
    pending_k: Tensor,
    pending_v: Tensor,
    fill: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`linear_attention_decode` that writes the state in every C-th step only.

    A row's last tokens wait in its ring; the state and the ring together are what the plain form
    keeps in the state. A step reads both. With fill + 1 < C it writes the token at place fill of
    the ring; with fill + 1 = C it adds all C tokens to the state in place, and the ring is empty.
    The caller then advances: fill = (fill + 1) % C. A new state has fill 0 and any ring.

    Args:
        q, k: (B, H, D); v: (B, H, V).
        kv_state, k_state: as in `linear_attention_decode`, updated in place.
        pending_k: (slots, C, H, D) and pending_v: (slots, C, H, V) in q's dtype, C >= 1 (16 reads
            and writes least; at most 64 on CUDA), updated in place. slots = B without
            `state_indices`.
        fill: (B,) int32 or int64, tokens that wait in each row's ring before this one, 0 ... C-1.
            Rows may differ. It is read, not advanced: the layers of a model share it.
        scale: > 0, default D ** -0.5; the same in every step.
        normalize: False drops the denominator.
        state_indices: (B,) slot of each row, -1 skips it.

    Returns:
        out (B, H, V) in v's dtype.

    Raises:
        RuntimeError: on mismatched arguments, a slot out of range or used twice, fill outside
            0 ... C-1, a ring that does not fit a block's shared memory (on CUDA, C V above some
            45,000 float32 values), or when grad is enabled and an input requires it.
    """
    op = "linear_attention_decode_deferred"
    forbid_grad(op, q=q, k=k, v=v, kv_state=kv_state, k_state=k_state)
    forbid_grad(op, pending_k=pending_k, pending_v=pending_v)
    q, k, v = autocast(q, k, v)
    scale = default_scale(q) if scale is None else scale
    return calls[op](
        q, k, v, kv_state, k_state, pending_k, pending_v, fill, state_indices, scale, normalize
    )


def linear_attention_fold(
    kv_state: Tensor,
    k_state: Tensor,
    pending_k: Tensor,
    pending_v: Tensor,
    fill: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> None:
    """Adds the tokens that wait in the rings to the states, which are then those of the plain form.

    The caller sets fill to 0 afterwards.

    Args:
        kv_state, k_state, pending_k, pending_v, fill, state_indices: as in
            `linear_attention_decode_deferred`; the states are updated in place.
        scale: the one the tokens were decoded with, default D ** -0.5.

    Raises:
        RuntimeError: on mismatched arguments, a slot out of range or used twice, fill outside
            0 ... C-1, or when grad is enabled and an input requires it.
    """
    op = "linear_attention_fold"
    forbid_grad(op, kv_state=kv_state, k_state=k_state, pending_k=pending_k, pending_v=pending_v)
    scale = default_scale(pending_k) if scale is None else scale
    calls[op](kv_state, k_state, pending_k, pending_v, fill, state_indices, scale)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Softmax attention over the last `window` keys, the query's own included.

    out_t = sum_s softmax_s(scale <q_t, k_s>) v_s over the s with 0 <= t - s < window.

    Args:
        q, k, v: (B, T, H, V), same dtype.
        window: W >= 1 keys, counting the query's own position (a "left window" of n keys is W = n
            + 1).
        scale: > 0, default V ** -0.5.
        initial_state: (k_cache, v_cache, positions): rings (N, W, H, V) in k's dtype that hold the
            key and value of absolute position p in slot p mod W, and the number of tokens seen
            before this call (N,), int32 or int64.
        output_final_state: also return the ring after the last token (fresh tensors, unused slots
            0; positions in the dtype of the given ones, else int64).
        cu_seqlens: (N+1,) packed sequences, B = 1.

    Returns:
        out (B, T, H, V) in q's dtype, or (out, (k_cache, v_cache, positions)). Differentiable in
        q, k, v and the initial caches, through out and the final caches.

    Raises:
        RuntimeError: "sliding_window_attention: <argument>: expected ..., got ..." on mismatched
            arguments, window < 1, negative positions or bad cu_seqlens.
    """
    op = "sliding_window_attention"
    k_cache, v_cache, positions = state_tensors(
        op, initial_state, 3, "(k_cache, v_cache, positions)"
    )
    q, k, v = autocast(q, k, v)
    scale = default_scale(q) if scale is None else scale
    result = calls[op](
        q, k, v, k_cache, v_cache, positions, cu_seqlens, window, scale, output_final_state
    )
    return (result[0], result[2:]) if output_final_state else result


def sliding_window_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One token of `sliding_window_attention` per row: writes k and v into the ring, then attends.

    Args:
        q, k, v: (B, H, V).
        k_cache, v_cache: (slots, W, H, V) in k's dtype, updated in place at slot positions mod W.
            slots = B without `state_indices`.
        positions: (B,) int32 or int64, tokens each row has seen before this one. It is read, not
            advanced: the layers of a model share it, and the caller adds 1 after the step.
        scale: > 0, default V ** -0.5.
        state_indices: (B,) slot of each row, -1 skips it.
        rotary: (cos, sin), each (B, R) with 2 R <= V, float32 (float64 for float64 q): q and k are
            rotated by these angles first, dim j < R together with dim j + R, and rounded to their
            dtype. What goes into the ring is the rotated key.

    Returns:
        out (B, H, V) in q's dtype.

    Raises:
        RuntimeError: on mismatched arguments, a slot out of range or used twice, negative
            positions, or when grad is enabled and an input requires it.
    """
    op = "sliding_window_decode"
    forbid_grad(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    q, k, v = autocast(q, k, v)
    scale = default_scale(q) if scale is None else scale
    cos, sin = (None, None) if rotary is None else rotary
    return calls[op](q, k, v, k_cache, v_cache, positions, state_indices, cos, sin, scale)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, fused with bias, SiLU and gate.

    out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t, channel by channel.

    Args:
        x: (B, T, C).
        weight: (C, K), K = 2 ... 8; the last tap meets the current token. bias: (C,). gate: (B, T,
            C). All in x's dtype; sums are float32 (float64 for float64 x).
        activation: None or "silu".
        initial_state: (N, C, K-1), the inputs before this call, oldest first; zeros without it.
        output_final_state: also return the last K-1 inputs after this call.
        cu_seqlens: (N+1,) packed sequences, B = 1.

    Returns:
        out (B, T, C) in x's dtype, or (out, conv_state (N, C, K-1)). Differentiable in x, weight,
        bias, gate and the initial state, through out and the final state.

    Raises:
        RuntimeError: "short_conv: <argument>: expected ..., got ..." on mismatched arguments, K
            outside 2 ... 8, another activation, or bad cu_seqlens.
    """
    silu = is_silu("short_conv", activation)
    x, weight, bias, gate = autocast(x, weight, bias, gate)
    return calls["short_conv"](
        x, weight, bias, gate, initial_state, cu_seqlens, silu, output_final_state
    )


def short_conv_decode(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `short_conv` per row: convolves the state and x, then shifts x into the state.

    Args:
        x: (B, C). weight: (C, K), bias: (C,), gate: (B, C), all in x's dtype.
        conv_state: (slots, C, K-1) in x's dtype, oldest first, updated in place. slots = B without
            `state_indices`.
        activation: None or "silu".
        state_indices: (B,) slot of each row, -1 skips it.

    Returns:
        out (B, C) in x's dtype.

    Raises:
        RuntimeError: on mismatched arguments, a slot out of range or used twice, or when grad is
            enabled and an input requires it.
    """
    op = "short_conv_decode"
    silu = is_silu(op, activation)
    forbid_grad(op, x=x, weight=weight, conv_state=conv_state, bias=bias, gate=gate)
    x, weight, bias, gate = autocast(x, weight, bias, gate)
    return calls[op](x, weight, conv_state, bias, gate, state_indices, silu)
