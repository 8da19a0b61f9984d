"""What the model computes between the ops of based_ops: norms, SwiGLU, rotary, and in a decode step
the projections behind them.

Plain torch on the CPU. On a GPU the elementwise parts are compiled by torch.compile, and for a
single row, where reading the weights is all there is to do, they are parts of a kernel of our own
for the product behind them (gemv.py).
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling


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


@compiled_on_gpu
def swiglu(h: Tensor) -> Tensor:
    """value * silu(gate) of h = (value, gate): (N,2m) -> (N,m)."""
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
    if update is None:
        normed = rms_norm(x, norm.weight, norm.eps)
    else:
        x, normed = add_norm(x, update, norm.weight, norm.eps)
    return x, *(F.linear(normed, weight, bias) for weight in weights)


def join_memory(*weights: nn.Parameter):
    """Moves matrices of equal width to where they lie one behind the other, as one matrix."""
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


def swiglu_linear(h: Tensor, weight: Tensor) -> Tensor:
    """swiglu(h) times weight^T: (N,2m) -> (N,d)."""
    if _single_row(h, weight):
        from based_model.gemv import gemv

        return gemv(h, weight, swiglu=True)[1]
    return F.linear(swiglu(h), weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, for a single row too."""
    if _single_row(x, weight):
        from based_model.gemv import gemv

        return gemv(x, weight, bias)[1]
    return F.linear(x, weight, bias)


def _single_row(x: Tensor, weight: Tensor) -> bool:
    plain = x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
    return plain and len(x) == 1 and weight.dtype != torch.float64
