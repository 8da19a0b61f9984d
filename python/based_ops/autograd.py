"""Fakes and gradients of torch.ops.based_ops, for autograd, torch.compile and export.

A backward op has no gradient of its own: double backward raises.
"""

import torch
from torch.library import register_autograd, register_fake

from based_ops.dispatch import differentiable, without_graph

ops = torch.ops.based_ops


def expanded_dim(feature_dim: int) -> int:
    """Rows of the Taylor feature map: 1 + D + D (D + 1) / 2."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.new_empty(tensor.shape)


def _sequences(cu_seqlens: torch.Tensor | None, batch: int) -> int:
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _contiguous_last(grad: torch.Tensor | None) -> torch.Tensor | None:
    """Incoming gradients may be expanded or transposed; the ops want the last dimension dense."""
    return grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()


# ---- fakes -------------------------------------------------------------------------------------


@register_fake("based_ops::taylor_feature_map")
def _(x, scale):
    return x.new_empty(*x.shape[:-1], expanded_dim(x.shape[-1]))


@register_fake("based_ops::taylor_feature_map_backward")
def _(dout, x, scale):
    return _like(x)


@register_fake("based_ops::linear_attention")
def _(q, k, v, kv_state, k_state, cu_seqlens, scale, normalize, output_final_state):
    if not output_final_state:
        return _like(v), None, None
    batch, _, heads, feature_dim = q.shape
    n, expanded = _sequences(cu_seqlens, batch), expanded_dim(feature_dim)
    wide = _accumulator(q.dtype)
    return (
        _like(v),
        q.new_empty(n, heads, expanded, v.shape[-1], dtype=wide),
        q.new_empty(n, heads, expanded, dtype=wide),
    )


@register_fake("based_ops::linear_attention_backward")
def _(dout, dkv_state, dk_state, q, k, v, kv_state, k_state, cu_seqlens, scale, normalize):
    return _like(q), _like(k), _like(v), _like(kv_state), _like(k_state)


@register_fake("based_ops::linear_attention_decode")
def _(q, k, v, kv_state, k_state, state_indices, scale, normalize):
    return _like(v)


@register_fake("based_ops::linear_attention_decode_deferred")
def _(q, k, v, kv_state, k_state, pending_k, pending_v, fill, state_indices, scale, normalize):
    return _like(v)


@register_fake("based_ops::linear_attention_fold")
def _(kv_state, k_state, pending_k, pending_v, fill, state_indices, scale):
    return None


@register_fake("based_ops::sliding_window_attention")
def _(q, k, v, k_cache, v_cache, positions, cu_seqlens, window, scale, output_final_state):
    batch, seqlen, heads, head_dim = q.shape
    lse = q.new_empty(batch, seqlen, heads, dtype=_accumulator(q.dtype))
    if not output_final_state:
        return _like(q), lse, None, None, None
    n = _sequences(cu_seqlens, batch)
    cache = (n, window, heads, head_dim)
    dtype = torch.int64 if positions is None else positions.dtype
    return _like(q), lse, q.new_empty(cache), q.new_empty(cache), q.new_empty(n, dtype=dtype)


@register_fake("based_ops::sliding_window_attention_backward")
def _(
    dout,
    dk_cache,
    dv_cache,
    q,
    k,
    v,
    out,
    lse,
    k_cache,
    v_cache,
    positions,
    cu_seqlens,
    window,
    scale,
):
    return _like(q), _like(k), _like(v), _like(k_cache), _like(v_cache)


@register_fake("based_ops::sliding_window_decode")
def _(q, k, v, k_cache, v_cache, positions, state_indices, cos, sin, scale):
    return _like(q)


@register_fake("based_ops::short_conv")
def _(x, weight, bias, gate, initial_state, cu_seqlens, silu, output_final_state):
    if not output_final_state:
        return _like(x), None
    n = _sequences(cu_seqlens, x.shape[0])
    return _like(x), x.new_empty(n, x.shape[2], weight.shape[1] - 1)


@register_fake("based_ops::short_conv_backward")
def _(dout, dfinal_state, x, weight, bias, gate, initial_state, cu_seqlens, silu):
    return _like(x), _like(weight), _like(bias), _like(gate), _like(initial_state)


@register_fake("based_ops::short_conv_decode")
def _(x, weight, conv_state, bias, gate, state_indices, silu):
    return _like(x)


@register_fake("based_ops::skinny_linear")
def _(x, weight, bias, swiglu):
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if swiglu else 1))


@register_fake("based_ops::decode_block")
def _(
    mixed,
    x,
    out_weight,
    out_bias,
    norm_weight,
    fc1,
    fc2,
    next_norm_weight,
    next_weight,
    next_bias,
    counters,
    conv_weight,
    conv_state,
    state_indices,
    eps,
):
    columns = next_weight.shape[0] // (1 if conv_weight is None else 2)
    return _like(x), mixed.new_empty(x.shape[0], columns)


@register_fake("based_ops::decode_blocks")
def _(mixed, x, weights, biases, counters, conv_weights, conv_states, state_indices, eps):
    convolves = len(weights) == 6 * len(conv_weights)
    columns = weights[-1].shape[0] // (2 if convolves else 1)
    return _like(x), mixed.new_empty(x.shape[0], columns)


# ---- gradients ---------------------------------------------------------------------------------


def _taylor_setup(ctx, inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


def _taylor_backward(ctx, dout):
    (x,) = ctx.saved_tensors
    op = ops.taylor_feature_map_backward.default
    return without_graph(op, _contiguous_last(dout), x, ctx.scale), None


def _linear_setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx, dout, dkv_state=None, dk_state=None):
    grads = without_graph(
        ops.linear_attention_backward.default,
        _contiguous_last(dout), _contiguous_last(dkv_state), _contiguous_last(dk_state),
        *ctx.saved_tensors, ctx.scale, ctx.normalize,
    )  # fmt: skip
    return *grads, None, None, None, None


def _window_setup(ctx, inputs, output):
    q, k, v, k_cache, v_cache, positions, cu_seqlens, ctx.window, ctx.scale, _ = inputs
    out, lse, _, _, final_positions = output
    ctx.mark_non_differentiable(*(x for x in (lse, final_positions) if x is not None))
    ctx.save_for_backward(q, k, v, out, lse, k_cache, v_cache, positions, cu_seqlens)


def _window_backward(ctx, dout, dlse=None, dk_cache=None, dv_cache=None, dpositions=None):
    grads = without_graph(
        ops.sliding_window_attention_backward.default,
        _contiguous_last(dout), _contiguous_last(dk_cache), _contiguous_last(dv_cache),
        *ctx.saved_tensors, ctx.window, ctx.scale,
    )  # fmt: skip
    return *grads, None, None, None, None, None


def _conv_setup(ctx, inputs, output):
    *tensors, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx, dout, dfinal_state=None):
    grads = without_graph(
        ops.short_conv_backward.default,
        _contiguous_last(dout), _contiguous_last(dfinal_state), *ctx.saved_tensors, ctx.silu,
    )  # fmt: skip
    return *grads, None, None, None


def _no_double_backward(op: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"{op}: double backward is not supported")

    return backward


# What the public functions call. The ops of a decode step have no gradient.
calls = {
    op: getattr(ops, op).default
    for op in (
        "linear_attention_decode",
        "linear_attention_decode_deferred",
        "linear_attention_fold",
        "sliding_window_decode",
        "short_conv_decode",
        "skinny_linear",
        "decode_block",
        "decode_blocks",
    )
}
for _op, _backward, _setup in (
    ("taylor_feature_map", _taylor_backward, _taylor_setup),
    ("linear_attention", _linear_backward, _linear_setup),
    ("sliding_window_attention", _window_backward, _window_setup),
    ("short_conv", _conv_backward, _conv_setup),
):
    register_autograd(f"based_ops::{_op}", _backward, setup_context=_setup)
    register_autograd(f"based_ops::{_op}_backward", _no_double_backward(_op))
    calls[_op] = differentiable(getattr(ops, _op).default, _setup, _backward)
