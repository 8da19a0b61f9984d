"""Multi-query associative recall (MQAR): sequences of key-value pairs, then keys to be answered.

The distribution is that of Zoology (Arora et al., arXiv 2312.04927), drawn for all examples at
once. Of a vocabulary of V tokens, 1 ... V/2-1 are keys and V/2 ... V-1 values. An example of L
tokens starts with k1 v1 ... kK vK, distinct keys and distinct values. Every key is asked for once:
with space = (L - 2K) // 2, the K gaps are drawn without replacement from 0 ... space-1, gap g with
weight (g + 1)^-0.99, in the order of the pairs, and the key stands at 2K + 2 gap. Its value is the
answer at that position; the text never holds it. All other tokens are random ones of the V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from based_model.config import ConfigError

POWER = 0.99
IGNORED = -100  # label of a position that asks nothing


@dataclass(frozen=True)
class Task:
    """Examples of one shape: seqlen L tokens with K pairs each."""

    seqlen: int
    pairs: int
    examples: int

    def __post_init__(self):
        if self.pairs < 1 or self.pairs > (self.seqlen - 2 * self.pairs) // 2:
            raise ConfigError(
                f"pairs: expected 1 ... seqlen / 4 = {self.seqlen // 4}, got {self.pairs}"
            )


@dataclass(frozen=True)
class TaskSet:
    """What a model is trained and tested on."""

    vocab_size: int
    train: tuple[Task, ...]
    test: tuple[Task, ...]

    @property
    def seqlen(self) -> int:
        """Tokens of the longest test example, after which states are measured."""
        return max(task.seqlen for task in self.test)


TASKS = {
    # For two CPU cores.
    "cpu": TaskSet(
        vocab_size=512,
        train=(Task(64, 4, 10_000), Task(64, 8, 10_000), Task(128, 16, 10_000)),
        test=(Task(64, 8, 500), Task(128, 16, 500)),
    ),
    # Figure 2 of the Based paper.
    "paper": TaskSet(
        vocab_size=8192,
        train=(
            Task(64, 4, 100_000),
            Task(128, 8, 20_000),
            Task(256, 16, 20_000),
            Task(256, 32, 20_000),
            Task(256, 64, 20_000),
        ),
        test=(
            Task(64, 4, 1_000),
            Task(64, 8, 1_000),
            Task(64, 16, 1_000),
            Task(128, 32, 1_000),
            Task(256, 64, 1_000),
            Task(512, 128, 1_000),
            Task(1024, 256, 1_000),
        ),
    ),
}


@dataclass(frozen=True)
class Examples:
    """N examples: tokens (N, L), positions (N, K) that ask, and what they ask for, answers (N, K).

    All int64. Column j is about pair j.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: str) -> "Examples":
        return Examples(*(x.to(device) for x in (self.tokens, self.positions, self.answers)))

    def rows(self, index: Tensor | slice) -> "Examples":
        return Examples(self.tokens[index], self.positions[index], self.answers[index])

    def labels(self) -> Tensor:
        """(N, L) int64: the answer where one is asked for, IGNORED elsewhere."""
        return torch.full_like(self.tokens, IGNORED).scatter_(1, self.positions, self.answers)


def generate(task: Task, vocab_size: int, seed: int) -> Examples:
    """The examples of a task. Equal arguments give equal examples.

    Raises ConfigError when the vocabulary has too few keys or values.
    """
    n, k, seqlen = task.examples, task.pairs, task.seqlen
    half = vocab_size // 2
    if k > half - 1:
        raise ConfigError(f"vocab_size: expected more than {2 * k + 1} for {k} keys")
    rng = torch.Generator().manual_seed(seed)
    keys = _distinct(n, k, 1, half, rng)
    values = _distinct(n, k, half, vocab_size, rng)
    space = (seqlen - 2 * k) // 2
    # Of independent clocks with these rates, the first k to ring, in order, are k draws without
    # replacement with these weights.
    weights = torch.arange(1, space + 1, dtype=torch.float64) ** -POWER
    clocks = torch.empty(n, space, dtype=torch.float64).exponential_(generator=rng) / weights
    positions = 2 * k + 2 * clocks.topk(k, largest=False).indices
    tokens = torch.randint(vocab_size, (n, seqlen), generator=rng)
    tokens[:, 0 : 2 * k : 2] = keys
    tokens[:, 1 : 2 * k : 2] = values
    tokens.scatter_(1, positions, keys)
    return Examples(tokens, positions, values)


def generate_all(tasks: TaskSet, seed: int) -> tuple[list[Examples], list[Examples]]:
    """Training and test examples, one entry for each task."""
    train, test = (
        [generate(task, tasks.vocab_size, 1000 * seed + first + i) for i, task in enumerate(part)]
        for first, part in ((0, tasks.train), (500, tasks.test))
    )
    return train, test


def _distinct(n: int, k: int, low: int, high: int, rng: torch.Generator) -> Tensor:
    """(n, k) int64 from low ... high-1, uniform over the rows without a repeat.

    A repeat of an earlier draw of its row is drawn again. No value is treated unlike another, so
    all rows without a repeat stay equally likely.
    """
    draws = torch.randint(low, high, (n, k), generator=rng)
    while True:
        ordered, order = draws.sort(dim=1, stable=True)
        repeats = torch.zeros_like(draws, dtype=torch.bool)
        repeats.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        count = int(repeats.sum())
        if not count:
            return draws
        draws[repeats] = torch.randint(low, high, (count,), generator=rng)
