"""The draw of sampling.py on a GPU, in Triton, which comes with torch.

draw() is one pass over the logits with the noise in registers, bound by arithmetic: a hash and two
logarithms a token, which rows of temperature 0 do without. least() has one program a row, whose
probabilities stay in the first cache over all steps of the bisection. Of sampling's own lines
torch.compile makes kernels that write the noise of all tokens to memory and read it again, and one
for every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK, WARPS = 1024, 4  # tokens and warps of a program of draw()
ROW_BLOCK, ROW_WARPS = 4096, 32  # tokens at a time and warps of a program of least()


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


@triton.jit
def _above(probs, level, vocab_size, BLOCK: tl.constexpr):
    """How many probs (vocab_size,) are above a level, and their sum."""
    count, total = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        p = tl.load(probs + token, mask=token < vocab_size, other=-1.0)
        count += (p > level).to(tl.int32)
        total += tl.where(p > level, p, 0.0)
    return tl.sum(count, 0), tl.sum(total, 0)


@triton.jit
def _smallest(probs, tokens, share, vocab_size, BLOCK: tl.constexpr):
    """sampling._smallest of one row."""
    low = tl.full((), -1, tl.int32)
    high = tl.full((), 0x3F800000, tl.int32)
    for _ in range(30):
        middle = (low + high + 1) >> 1
        count, total = _above(probs, middle.to(tl.float32, bitcast=True), vocab_size, BLOCK)
        fewer = (count < tokens) & (total < share)
        low, high = tl.where(fewer, low, middle), tl.where(fewer, middle, high)
    return high.to(tl.float32, bitcast=True)


@triton.jit
def _least(probs, top_k, top_p, out, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    probs += row * vocab_size
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    level, everything = tl.full((), 0.0, tl.float32), float("inf")
    if k > 0:
        level = _smallest(probs, k, everything, vocab_size, BLOCK)
    if p < 1:
        # The sum of those that are at least as likely, so above the float before.
        before = (level.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        _, total = _above(probs, tl.where(level > 0, before, -1.0), vocab_size, BLOCK)
        level = tl.maximum(level, _smallest(probs, vocab_size, p * total, vocab_size, BLOCK))
    tl.store(out + row, level)


def least(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """probs (N,vocab_size), the others (N,1) -> (N,1), as sampling._least.

    0 where all tokens stay.
    """
    rows, vocab_size = probs.shape
    out = torch.empty(rows, 1, device=probs.device)
    with torch.cuda.device(probs.device):
        _least[(rows,)](
            probs.contiguous(), top_k, top_p, out, vocab_size, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS
        )
    return out


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
