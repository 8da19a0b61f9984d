"""Matrix products of a decode step: public functions as in ops.py, on Hopper GPUs only.

N rows, K and d widths, M columns of the product, m width of the MLP.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from based_ops.arguments import autocast, forbid_grad
from based_ops.autograd import calls


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, swiglu: bool = False
) -> Tensor:
    """A linear layer for the few rows of a decode step, where reading the weights takes the time.

    It begins to read weight and bias while the kernels before it still run: none that runs directly
    before may write them. So autocast casts x alone.

    Args:
        x: (N, K), bfloat16 or float16, N <= 64.
        weight: (M, K) and bias (M,) in x's dtype. Rows of x and weight start at multiples of 16
            bytes.
        swiglu: the product's columns are (value, gate), and value * silu(gate) is returned; without
            a bias.

    Returns:
        x weight^T + bias, (N, M), or with swiglu (N, M / 2), in x's dtype. Sums are float32 and
        rounded once, value and gate not at all. A row depends on no other row, and is bitwise the
        same for every N of one of the ranges up to 8, 16, 32 and 64.

    Raises:
        RuntimeError: on mismatched arguments, more rows, another dtype, rows that start elsewhere,
            a GPU whose compute capability is not 9.0 (there is no kernel for others, and none for
            CPUs), or when grad is enabled and an input requires it.
    """
    op = "skinny_linear"
    forbid_grad(op, x=x, weight=weight, bias=bias)
    (x,) = autocast(x)
    return calls[op](x, weight, bias, swiglu)


def decode_block(
    mixed: Tensor,
    x: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    next_norm_weight: Tensor,
    next_weight: Tensor,
    counters: Tensor,
    *,
    out_bias: Tensor | None = None,
    next_bias: Tensor | None = None,
    eps: float = 1e-5,
    conv_weight: Tensor | None = None,
    conv_state: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What lies between the token mixers of two layers, for the few rows of a decode step.

    x   += mixed out_weight^T + out_bias
    x   += (value * silu(gate)) fc2^T, (value, gate) = rms_norm(x, norm_weight) fc1^T
    out  = rms_norm(x, next_norm_weight) next_weight^T + next_bias

    with rms_norm(x, w) = x / sqrt(mean(x^2) + eps) * w. With conv_weight and conv_state, that last
    product is (u, gate), and what `short_conv_decode` makes of it is returned in its place:

    out  = silu(sum_j conv_weight_j u_{t-taps+1+j}) * gate

    One kernel on the whole GPU, where reading the weights takes the time. It may begin to read them
    while the kernels before it still run: none that runs directly before may write them. So
    autocast casts mixed alone.

    Args:
        mixed: (N, K), bfloat16, N <= 128: what the token mixer gave.
        x: (N, d), float32: the residual stream. d is a multiple of 8.
        out_weight: (d, K), out_bias: (d,).
        norm_weight: (d,). fc1: (2 m, d), the rows of the values before those of the gates, m a
            multiple of 8. fc2: (d, m).
        next_norm_weight: (d,). next_weight: (M, d), next_bias: (M,). Weights and biases are
            bfloat16, and rows of mixed and of the four matrices start at multiples of 16 bytes.
        counters: (8,) int32, zeros. The parts of the kernel meet by them; they are zero again
            afterwards. Calls that may overlap in time need their own.
        eps: >= 0.
        conv_weight: (C, taps), 2 to 4 taps, M = 2 C: the rows of next_weight are those of u, then
            those of the gates. C is a multiple of 8.
        conv_state: (slots, C, taps-1) bfloat16, oldest first, updated in place. slots = N without
            state_indices. Every slot is contiguous and starts at a multiple of 16 bytes.
        state_indices: (N,) int32 or int64, slot of each row. -1 skips the convolution of a row: its
            out is 0, and no state changes.

    Returns:
        (x (N, d) float32, out (N, M) bfloat16, with conv_weight (N, C)), fresh tensors. Sums are
        float32; the norms' results and value * silu(gate) are rounded to bfloat16, and u where the
        state keeps it, not where it meets the last tap; gates are not. A row depends on no other
        row, and is bitwise the same for every N of one of the ranges up to 8, 16, 32, 64 and 128.

    Raises:
        RuntimeError: on mismatched arguments, more rows, another dtype, rows that start elsewhere,
            some of the convolution's arguments without the others, a d, or with a convolution an M,
            of more than 1024 for every 8 SMs that can form a cluster (16384 on a whole H100), a GPU
            whose compute capability is not 9.0 (there is no kernel for others, and none for CPUs),
            when grad is enabled and an input requires it, or under `set_checks` on a slot out of
            range or used twice. Without these checks a row whose slot is out of range gets NaN.
    """
    op = "decode_block"
    forbid_grad(
        op,
        mixed=mixed,
        x=x,
        out_weight=out_weight,
        norm_weight=norm_weight,
        fc1=fc1,
        fc2=fc2,
        next_norm_weight=next_norm_weight,
        next_weight=next_weight,
        out_bias=out_bias,
        next_bias=next_bias,
        conv_weight=conv_weight,
        conv_state=conv_state,
    )
    (mixed,) = autocast(mixed)
    return calls[op](
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
    )


class DecodeBlock(NamedTuple):
    """One of `decode_blocks`: arguments of `decode_block`, and shaped like these."""

    out_weight: Tensor  # (d, K)
    norm_weight: Tensor  # (d,)
    fc1: Tensor  # (2 m, d)
    fc2: Tensor  # (d, m)
    next_norm_weight: Tensor  # (d,)
    next_weight: Tensor  # (M, d)
    out_bias: Tensor | None = None  # (d,)
    next_bias: Tensor | None = None  # (M,)
    conv_weight: Tensor | None = None  # (C, taps)
    conv_state: Tensor | None = None  # (slots, C, taps-1)


def decode_blocks(
    mixed: Tensor,
    x: Tensor,
    blocks: Sequence[DecodeBlock],
    counters: Tensor,
    *,
    eps: float = 1e-5,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layers between which there is nothing but a short convolution, for the few rows of a decode
    step: `decode_block` for one after the other, bit for bit, as one kernel.

    Each but the last has a convolution, and what that gives is the next one's mixed. So weights
    stream on from block to block.

    Args:
        mixed: (N, K), bfloat16, N <= 128: what the first token mixer gave.
        x: (N, d), float32: the residual stream.
        blocks: 1 to 6 of them. m, K, C and taps can be another's in each; d is x's.
        counters, eps: as in `decode_block`.
        state_indices: (N,), slot of each row, for all convolutions. A row of -1 has zeros for mixed
            behind the first one.

    Returns:
        (x (N, d) float32, out of the last block), fresh tensors.

    Raises:
        RuntimeError: as `decode_block`, or on another number of blocks or a block that ends without
            a convolution and is not the last.
    """
    op = "decode_blocks"
    for i, block in enumerate(blocks):
        forbid_grad(op, **{f"blocks[{i}].{name}": y for name, y in block._asdict().items()})
    forbid_grad(op, mixed=mixed, x=x)
    (mixed,) = autocast(mixed)
    for i, block in enumerate(blocks):
        given = [y is not None for y in (block.conv_weight, block.conv_state)]
        if not all(given) and (any(given) or i + 1 < len(blocks)):
            raise RuntimeError(
                f"{op}: blocks[{i}]: expected conv_weight and conv_state, or neither in the last "
                f"block, got {sum(given)} of them"
            )
    convolving = [block for block in blocks if block.conv_weight is not None]
    return calls[op](
        mixed,
        x,
        [weight for block in blocks for weight in block[:6]],
        [bias for block in blocks for bias in block[6:8]],
        counters,
        [block.conv_weight for block in convolving],
        [block.conv_state for block in convolving],
        state_indices,
        eps,
    )
