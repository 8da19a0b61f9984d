"""The draw of sampling.py on a GPU: one pass over the logits, with the noise in registers.

Bound by arithmetic: a hash and two logarithms a token, which rows of temperature 0 do without.
Triton, which comes with torch; of the same lines torch.compile makes kernels that write the noise
of all tokens to memory and read it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK, WARPS = 1024, 4  # tokens and warps of a program


@triton.jit
def _mix(x):
    """sampling._mix of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mixed_in(key, other, word):
    return _mix(key ^ word), _mix(other + word + 1)


@triton.jit
def _gumbel(seed, position, token):
    """sampling._gumbel of int64 numbers and a vector of tokens."""
    zero = tl.full((), 0, tl.uint32)
    key, other = _mixed_in(zero, zero, seed.to(tl.uint32))
    key, other = _mixed_in(key, other, (seed >> 32).to(tl.uint32))
    key, other = _mixed_in(key, other, position.to(tl.uint32))
    bits = _mix(_mix(key ^ token.to(tl.uint32)) ^ other)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -libdevice.fast_logf(-libdevice.log1p(-uniform))


@triton.jit
def _best_of_blocks(
    logits,  # (N, vocab_size) by strides
    temperature,  # (N,)
    seed,  # (N,)
    position,  # (N,)
    probs,  # (N, vocab_size): tokens below least are never drawn
    least,  # (N, 1)
    best,  # (N, blocks) the best score of a block
    token,  # (N, blocks) and whose it is
    vocab_size,
    row_stride,
    column_stride,
    RESTRICTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab_size
    place = logits + row * row_stride + column * column_stride
    score = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    scale = tl.load(temperature + row)
    if scale != 0:
        score += scale * _gumbel(tl.load(seed + row), tl.load(position + row), column)
    if RESTRICTED:
        likely = tl.load(probs + row * vocab_size + column, mask=inside, other=0.0)
        score = tl.where(likely < tl.load(least + row), -float("inf"), score)
    highest = tl.max(score, 0)
    # Of equal ones the first; of NaN some token that there is.
    first = tl.min(tl.where(score == highest, column, vocab_size - 1), 0)
    out = row * tl.num_programs(1) + block
    tl.store(best + out, highest)
    tl.store(token + out, first)


@triton.jit
def _best_block(best, token, out, vocab_size, blocks, BLOCKS: tl.constexpr):
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    inside = block < blocks
    score = tl.load(best + row * blocks + block, mask=inside, other=-float("inf"))
    first = tl.load(token + row * blocks + block, mask=inside, other=vocab_size - 1)
    tl.store(out + row, tl.min(tl.where(score == tl.max(score, 0), first, vocab_size - 1), 0))


def draw(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
    likely: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Logits (N,vocab_size), the others (N,) -> tokens (N,) int64, as sampling._draw."""
    rows, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, BLOCK)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    probs, least = (best, best) if likely is None else (likely[0].contiguous(), likely[1])
    with torch.cuda.device(logits.device):  # Triton launches on the current one
        _best_of_blocks[(rows, blocks)](
            logits,
            temperature,
            seed,
            positions,
            probs,
            least,
            best,
            token,
            vocab_size,
            *logits.stride(),
            RESTRICTED=likely is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        _best_block[(rows,)](
            best, token, out, vocab_size, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1
        )
    return out
