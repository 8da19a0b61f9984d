"""A matrix times one vector on a GPU, with what comes before it in the same kernel.

Bound by reading the matrix. A program takes a few whole rows; every program computes the vector
(a norm, a SwiGLU) for itself, which costs less than a kernel more. On Hopper the programs start
while the kernel before still runs, and wait for it only when their part of the matrix is on its way
(programmatic dependent launch). Triton, which comes with torch.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ELEMENTS, WARPS = 16384, 4  # elements of the matrix and warps of a program; measured


@triton.jit
def _gemv(
    x,  # (K,), or (2K,) value and gate of a SwiGLU
    update,  # (K,) added to x
    norm_weight,  # (K,)
    weight,  # (N, K)
    bias,  # (N,)
    out,  # (N,)
    sum_out,  # (K,) x + update
    N,
    K,
    eps,
    HAS_UPDATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    EARLY: tl.constexpr,  # starts before the kernel before has ended
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from K on
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < K
    if EARLY:
        gdc_launch_dependents()
    # What no kernel before writes.
    matrix = tl.load(
        weight + row[:, None].to(tl.int64) * K + column,
        mask=(row < N)[:, None] & inside,
        other=0.0,
    )
    if EARLY:
        gdc_wait()
    vector = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        vector += tl.load(update + column, mask=inside, other=0.0).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(sum_out + column, vector, mask=inside)
    if HAS_NORM:
        vector *= tl.rsqrt(tl.sum(vector * vector) / K + eps)
        vector *= tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        gate = tl.load(x + K + column, mask=inside, other=0.0).to(tl.float32)
        vector *= gate * tl.sigmoid(gate)
    vector = vector.to(matrix.dtype).to(tl.float32)  # as it would come from memory
    result = tl.sum(matrix.to(tl.float32) * vector[None, :], 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < N)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    update: Tensor | None = None,
    norm: nn.Module | None = None,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x + update, weight f(x + update) + bias), f an RMSNorm, a SwiGLU, or nothing.

    x (1,K) of any dtype, with swiglu (1,2K); update (1,K); weight (N,K) contiguous; bias (N,).
    Sums are fp32; the result (1,N) has the dtype of weight, x + update that of x.
    """
    rows, width = weight.shape
    out = torch.empty(1, rows, dtype=weight.dtype, device=x.device)
    summed = x if update is None else torch.empty_like(x)
    columns = triton.next_power_of_2(width)
    per_program = max(1, ELEMENTS // columns)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        _gemv[(triton.cdiv(rows, per_program),)](
            x,
            x if update is None else update,
            x if norm is None else norm.weight,
            weight,
            weight if bias is None else bias,
            out,
            summed,
            rows,
            width,
            0.0 if norm is None else norm.eps,
            HAS_UPDATE=update is not None,
            HAS_NORM=norm is not None,
            HAS_BIAS=bias is not None,
            SWIGLU=swiglu,
            EARLY=_has_early_launch(x.device),
            ROWS=per_program,
            COLUMNS=columns,
            num_warps=WARPS,
            launch_pdl=_has_early_launch(x.device),
        )
    return summed, out


@cache
def _has_early_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
