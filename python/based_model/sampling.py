"""How the next token is drawn from logits, the same on every device and in every batch.

The noise of a draw is a hash of the request's seed, the position in its text and the token, so it
depends neither on the row of a batch nor on what was drawn before or beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from based_model.config import ConfigError
from based_model.fused import compiled_on_gpu


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. ConfigError on values that make no distribution."""

    # 0 takes the likeliest token, below 1 sharpens, above 1 flattens.
    temperature: float = 0.8
    # Keep only this many of the likeliest tokens (and those equally likely as the last); 0 keeps
    # all.
    top_k: int = 0
    # Keep the smallest set of tokens with at least this probability in total; 1 keeps all.
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")

    @property
    def restricted(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass
class Draws:
    """Sampling and seed of N rows, as tensors (N,)."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32
    seed: Tensor  # int64

    @classmethod
    def greedy(cls, rows: int, device: torch.device) -> "Draws":
        """Rows that take the likeliest token."""
        temperature, top_p = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        top_k, seed = torch.zeros(2, rows, dtype=torch.int64, device=device)
        return cls(temperature, top_k, top_p, seed)

    def __getitem__(self, rows: slice) -> "Draws":
        return Draws(*(x[rows] for x in self.tensors()))

    def tensors(self) -> list[Tensor]:
        return [self.temperature, self.top_k, self.top_p, self.seed]

    def set(self, row: int, sampling: Sampling, seed: int):
        """Writes one row; on a GPU nothing waits."""
        values = sampling.temperature, sampling.top_k, sampling.top_p, seed
        for x, value in zip(self.tensors(), values, strict=True):
            x[row].fill_(value)  # to assign the number would wait


def sample(logits: Tensor, draws: Draws, positions: Tensor, restricted: bool) -> Tensor:
    """Draws one token per row: logits (N,vocab_size) -> (N,) int64.

    positions (N,) int64 counts the tokens before the one to draw. restricted says whether any row
    has a top_k or top_p to follow; to other rows it makes no difference.
    """
    draw, least = _draw, _least
    if logits.is_cuda and logits.dtype != torch.float64:
        from based_model.draw import draw, least
    likely = None  # (probs, p): the tokens that are at least as likely as p
    if restricted:
        probs = _probs(logits, draws.temperature)
        likely = probs, least(probs, draws.top_k[:, None], draws.top_p[:, None])
    return draw(logits, draws.temperature, draws.seed, positions, likely)


def _draw(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
    likely: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Of all tokens, or given (probs, p) of those that are at least as likely as p: (N,)."""
    # The largest of logits / temperature + Gumbel noise is a draw from their softmax; times
    # temperature that is the likeliest token at temperature 0.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    noise = _gumbel(seed[:, None], positions[:, None], logits.shape[-1])
    scores = logits + temperature[:, None] * noise
    if likely is not None:
        probs, p = likely
        scores = scores.masked_fill(probs < p, -torch.inf)
    return scores.argmax(-1)


@compiled_on_gpu
def _probs(logits: Tensor, temperature: Tensor) -> Tensor:
    return (logits.float() / temperature[:, None].clamp(min=1e-6)).softmax(-1)


def _least(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(N,1): how likely a token is at least that top_k leaves, and top_p of these."""
    everything = torch.full_like(top_p, torch.inf)
    all_tokens = torch.full_like(top_k, probs.shape[-1])
    of_k = _smallest(probs, torch.where(top_k > 0, top_k, all_tokens), everything)
    # A token stays if those ahead of it have not yet reached top_p; the first always stays.
    share = top_p * probs.masked_fill(probs < of_k, 0).sum(-1, keepdim=True)
    return of_k.maximum(_smallest(probs, all_tokens, torch.where(top_p < 1, share, everything)))


def _smallest(probs: Tensor, tokens: Tensor, share: Tensor) -> Tensor:
    """(N,1): the smallest float32 above which there are fewer tokens than `tokens`, and those have
    less probability than `share`.

    Bisects the 30 bits of floats in [0, 1], which are ordered as the floats are: exact, and far
    less work on a GPU than to sort.
    """
    low = torch.full_like(probs[:, :1], -1, dtype=torch.int32)
    high = torch.full_like(low, 0x3F800000)
    for _ in range(30):
        middle = (low + high + 1) >> 1
        above = probs > middle.view(torch.float32)
        fewer = above.sum(-1, keepdim=True) < tokens
        fewer &= probs.masked_fill(~above, 0).sum(-1, keepdim=True) < share
        low, high = torch.where(fewer, low, middle), torch.where(fewer, middle, high)
    return high.view(torch.float32)


def _gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise (N,vocab_size) of seed and position (N,1) int64."""
    words = seed & _WORD, seed >> 32 & _WORD, position & _WORD
    key = other = torch.zeros_like(seed)
    for word in words:
        key, other = _mix(key ^ word), _mix(other + word + 1 & _WORD)
    tokens = torch.arange(vocab_size, device=seed.device)
    bits = _mix(_mix(key ^ tokens) ^ other)
    # Fine steps near 0, where the largest noise comes from; never 1, whose noise is infinite.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-(-uniform).log1p()).log()


_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) that leaves no pattern: lowbias32 of C. Wellons."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16
