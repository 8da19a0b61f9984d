"""What the model computes between the ops of based_ops: norms, SwiGLU, rotary, and in a decode step
the projections behind them, with the short convolution that follows some of these.

Plain torch on the CPU. On a GPU the elementwise parts are compiled by torch.compile. Where reading
the weights is all there is to do, the products are kernels of our own: on Hopper, for up to 128
rows in bf16, based_ops.decode_blocks, which is all that lies between two mixers that attend, or
between the last one and the logits; for what it leaves, with a single row gemv.py, which has the
elementwise parts in it, and on Hopper, for 2 to 64 rows, based_ops.skinny_linear behind norm.py.
For more rows, cuBLAS is as fast.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from based_ops import (
    DecodeBlock,
    build_info,
    decode_blocks,
    short_conv_decode,
    skinny_linear,
)

BLOCK_ROWS = range(1, 129)  # that decode_blocks is asked for
BLOCKS = 6  # that it takes at most
# Of x, and of a product before a convolution; it takes 1024 for every 8 SMs of one cluster.
BLOCK_COLUMNS = 12288
BLOCK_TAPS = range(2, 5)  # of a convolution that it takes along


def compiled_on_gpu(function: Callable) -> Callable:
    """function, compiled by torch.compile where its first argument is on a GPU and no graph for
    gradients is recorded."""
    compiled = torch.compile(function)

    @wraps(function)
    def call(x, *args):
        here = x.is_cuda and not torch.is_grad_enabled() and not is_compiling()
        return (compiled if here else function)(x, *args)

    return call


@compiled_on_gpu
def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight as the residual stream begins, in fp32 or wider: (...) -> (..., d_model)."""
    x = F.embedding(tokens, weight)
    return x.to(torch.promote_types(x.dtype, torch.float32))


@compiled_on_gpu
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in x's dtype, returned in weight's."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)


@compiled_on_gpu
def add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + update, rms_norm of that)."""
    x = x + update
    return x, F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)


def swiglu(h: Tensor) -> Tensor:
    """value * silu(gate) of h = (value, gate): (...,2m) -> (...,m)."""
    # As rows: of tensors of two ranks torch.compile takes no size as known, m neither, and its
    # kernel has half the speed.
    return _swiglu(h.flatten(0, -2)).unflatten(0, h.shape[:-1])


@compiled_on_gpu
def _swiglu(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, -1)
    return value * F.silu(gate)


@compiled_on_gpu
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., H, V) by cos and sin (..., 1, R): dim j is paired with j + R.

    Dims from 2R on stay as they are.
    """
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1).to(x.dtype)


@compiled_on_gpu
def rotary_angles(positions: Tensor, dim: int, base: float, dtype: torch.dtype):
    """cos and sin (*positions, 1, R) of position * base^(-2j/dim), R = ceil(dim/2)."""
    # Angles in fp64: in fp32 the angle of position 10^6 is off by up to 0.06.
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None, None] * base ** (exponents / -dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def norm_linear(
    x: Tensor, update: Tensor | None, norm: nn.Module, *weights: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(x + update, its RMSNorm times weights[0]^T + bias, times weights[1]^T + bias, ...).

    Weights that join_memory() has seen are multiplied at once.
    """
    joined = _joined(weights)
    if joined is not None:
        x, out = norm_linear(x, update, norm, joined, bias=bias)
        return x, *out.split([len(weight) for weight in weights], -1)
    if _single_row(x, weights[0]):
        from based_model.gemv import gemv

        first, *rest = weights
        x, out = gemv(x, first, bias, update=update, norm=norm)
        return x, out, *(gemv(x, weight, bias, norm=norm)[1] for weight in rest)
    x, normed = _norm(x, update, norm)
    return x, *(linear(normed, weight, bias) for weight in weights)


def norm_mlp(
    x: Tensor, update: Tensor | None, norm: nn.Module, fc1: Tensor, fc2: Tensor
) -> tuple[Tensor, Tensor]:
    """(x + update, swiglu(its RMSNorm times fc1^T) times fc2^T)."""
    if _single_row(x, fc1):
        from based_model.gemv import gemv

        x, h = gemv(x, fc1, update=update, norm=norm)
        return x, gemv(h, fc2, swiglu=True)[1]
    x, normed = _norm(x, update, norm)
    few = _few_rows(normed, fc1)
    h = skinny_linear(normed, fc1, swiglu=True) if few else swiglu(F.linear(normed, fc1))
    return x, linear(h, fc2)


def _norm(x: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(x + update, its RMSNorm), in a decode step."""
    if _few_rows(x, norm.weight):
        from based_model.norm import add_norm as early_add_norm

        return early_add_norm(x, update, norm)
    if update is None:
        return x, rms_norm(x, norm.weight, norm.eps)
    return add_norm(x, update, norm.weight, norm.eps)


class ShortConv(NamedTuple):
    """A short convolution with SiLU of a product's first half, gated by its second half.

    The arguments of based_ops.decode_block; the state is updated in place.
    """

    conv_weight: Tensor  # (C,K)
    conv_state: Tensor  # (S,C,K-1)
    state_indices: Tensor | None  # (N,)


class Projection(NamedTuple):
    """What a layer begins with in a decode step: products of the norm of the residual stream, and
    what a convolution makes of the one product."""

    norm: nn.Module
    weights: tuple[Tensor, ...]
    bias: Tensor | None = None
    conv: ShortConv | None = None


def project(x: Tensor, update: Tensor | None, projection: Projection) -> tuple[Tensor, ...]:
    """(x + update, what projection makes of it: the convolved product, or a tensor a weight)."""
    norm, weights, bias, conv = projection
    x, *products = norm_linear(x, update, norm, *weights, bias=bias)
    return x, *_convolved(products, conv)


def _convolved(products: Sequence[Tensor], conv: ShortConv | None) -> Sequence[Tensor]:
    if conv is None:
        return products
    u, gate = products[0].chunk(2, -1)
    weight, state, indices = conv
    weight = weight.to(u.dtype)
    options = {"activation": "silu", "gate": gate, "state_indices": indices}
    return (short_conv_decode(u, weight, state, **options),)


class Tail(NamedTuple):
    """What lies behind the mixer of a layer in a decode step, up to the next one."""

    out_proj: nn.Linear
    norm: nn.Module  # both norms have the same eps
    fc1: Tensor
    fc2: Tensor
    following: Projection


def block_tails(
    x: Tensor, mixed: Tensor, tails: Sequence[Tail], counters: Tensor
) -> tuple[Tensor, ...]:
    """From one mixer of a decode step to the next: (x, what the last projection makes of it, ...).

    For each of tails, x (N,d) += out_proj(mixed (N,K)); x += swiglu(its RMSNorm times fc1^T) times
    fc2^T; and then project(). All but the last end in a convolution, which is the next one's mixed.
    counters: see based_ops.decode_block.
    """
    while tails:
        blocks = _blocks(x, mixed, tails)
        out_proj, norm, fc1, fc2, following = tails[max(len(blocks), 1) - 1]
        if blocks:
            convolves = [block.conv_weight is not None for block in blocks]
            indices = tails[0].following.conv.state_indices if any(convolves) else None
            options = {"eps": norm.eps, "state_indices": indices}
            x, out = decode_blocks(mixed, x, blocks, counters, **options)
            if convolves[-1]:
                h = (out,)
            else:
                parts = out.split([len(weight) for weight in following.weights], -1)
                h = _convolved(parts, following.conv)
        else:
            update = linear(mixed, out_proj.weight, out_proj.bias)
            x, update = norm_mlp(x, update, norm, fc1, fc2)
            x, *h = project(x, update, following)
        mixed, tails = h[0], tails[max(len(blocks), 1) :]
    return x, *h


def _blocks(x: Tensor, mixed: Tensor, tails: Sequence[Tail]) -> list[DecodeBlock]:
    """As many of tails as decode_blocks takes at once."""
    blocks = []
    for out_proj, norm, fc1, fc2, (next_norm, weights, bias, conv) in tails[:BLOCKS]:
        joined = weights[0] if len(weights) == 1 else _joined(weights)
        if joined is None or not _one_kernel(x, mixed, out_proj.weight, fc1, fc2, joined):
            break
        taken = conv is not None and _in_block(conv)
        blocks.append(
            DecodeBlock(
                out_proj.weight,
                norm.weight,
                fc1,
                fc2,
                next_norm.weight,
                joined,
                out_proj.bias,
                bias,
                *(conv[:2] if taken else ()),
            )
        )
        if not taken:
            break
    return blocks


def _one_kernel(x: Tensor, *factors: Tensor) -> bool:
    """Whether decode_blocks takes the products of these: mixed and the weights."""
    return (
        _decodes(x)
        and len(x) in BLOCK_ROWS
        and x.dtype == torch.float32
        and x.shape[-1] <= BLOCK_COLUMNS
        and all(y.dtype == torch.bfloat16 and y.shape[-1] % 8 == 0 for y in factors)
        and _runs_wgmma(x.device)
    )


def _in_block(conv: ShortConv) -> bool:
    """Whether decode_blocks takes this convolution along with the product before it."""
    (channels, taps), state = conv.conv_weight.shape, conv.conv_state
    return (
        taps in BLOCK_TAPS
        and channels % 8 == 0
        and 2 * channels <= BLOCK_COLUMNS
        and conv.conv_weight.dtype == state.dtype == torch.bfloat16
        and state.is_contiguous()
        and state.data_ptr() % 16 == 0
    )


def join_memory(*weights: nn.Parameter):
    """Moves matrices of equal width to where they lie one behind the other, as one matrix.

    Those that lie so already stay: graphs may have been captured with them.
    """
    if _joined(weights) is not None:
        return
    parts = torch.cat([weight.detach() for weight in weights]).split([len(w) for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part


def _joined(weights: tuple[Tensor, ...]) -> Tensor | None:
    """Several weights as the one matrix that they are in memory, if they are."""
    first, rows, storage = weights[0], 0, weights[0].untyped_storage().data_ptr()
    for weight in weights:
        here = weight.is_contiguous() and weight.untyped_storage().data_ptr() == storage
        if (
            not here
            or weight.data_ptr() != first.data_ptr() + rows * first.stride(0) * first.itemsize
        ):
            return None
        rows += len(weight)
    return None if len(weights) == 1 else first.as_strided((rows, first.shape[1]), first.stride())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, for few rows too: (N,K) times (M,K)^T -> (N,M)."""
    if _single_row(x, weight):
        from based_model.gemv import gemv

        return gemv(x, weight, bias)[1]
    return (skinny_linear if _few_rows(x, weight) else F.linear)(x, weight, bias)


def _decodes(x: Tensor) -> bool:
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()


def _single_row(x: Tensor, weight: Tensor) -> bool:
    return _decodes(x) and len(x) == 1 and weight.dtype != torch.float64


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether skinny_linear takes the product."""
    return (
        _decodes(x)
        and 1 < len(x) <= 64
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[-1] % 8 == 0
        and _runs_wgmma(x.device)
    )


@cache
def _runs_wgmma(device: torch.device) -> bool:
    """Whether a GPU has kernels of skinny_linear and decode_blocks in this build."""
    capability = torch.cuda.get_device_capability(device)
    return capability == (9, 0) and "90a" in build_info()["cuda_architectures"]
