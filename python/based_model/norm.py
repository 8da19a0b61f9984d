"""x + update and its RMSNorm on a Hopper GPU, where the kernels around it overlap with it.

It starts while the kernel before still runs and waits for it, and lets the product behind it read
its weights in the meantime (programmatic dependent launch). Triton, which comes with torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _add_norm(
    x,  # (N, K)
    update,  # (N, K) added to x
    norm_weight,  # (K,)
    sum_out,  # (N, K) x + update
    out,  # (N, K)
    K,
    eps,
    HAS_UPDATE: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from K on
):
    column = tl.arange(0, COLUMNS)
    inside = column < K
    at = tl.program_id(0).to(tl.int64) * K + column
    gdc_launch_dependents()
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    gdc_wait()
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        row += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_out + at, row, mask=inside)
    row *= tl.rsqrt(tl.sum(row * row) / K + eps) * weight
    tl.store(out + at, row.to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(x + update, its RMSNorm): x (N,K) fp32, update (N,K); the norm has its weight's dtype.

    No kernel that runs directly before may write the norm's weight.
    """
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=norm.weight.dtype, device=x.device)
    summed = x if update is None else torch.empty_like(x)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        _add_norm[(rows,)](
            x,
            x if update is None else update.contiguous(),
            norm.weight,
            summed,
            out,
            width,
            norm.eps,
            HAS_UPDATE=update is not None,
            COLUMNS=triton.next_power_of_2(width),
            num_warps=4,
            launch_pdl=True,
        )
    return summed, out
