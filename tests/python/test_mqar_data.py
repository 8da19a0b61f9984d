"""The recall test's examples: what must hold of each, and how they are distributed."""

import numpy as np
import pytest
import torch

from based_model.config import ConfigError
from based_model.mqar_data import IGNORED, TASKS, Task, generate, generate_all

TASK = Task(seqlen=40, pairs=7, examples=3000)
VOCAB = 64


@pytest.fixture(scope="module")
def examples():
    return generate(TASK, VOCAB, seed=5)


def test_prefix_is_distinct_keys_and_values(examples):
    keys, values = examples.tokens[:, 0:14:2], examples.tokens[:, 1:14:2]
    assert keys.min() >= 1 and keys.max() < VOCAB // 2
    assert values.min() >= VOCAB // 2 and values.max() < VOCAB
    for part in (keys, values):
        assert (part.sort(1).values.diff(dim=1) > 0).all()
    # Every key and every value is as likely as any other: 3000 * 7 draws of 31 and of 32.
    for part, low, kinds in ((keys, 1, 31), (values, 32, 32)):
        counts = torch.bincount(part.flatten() - low, minlength=kinds).double()
        expected = counts.sum() / kinds
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_every_key_is_asked_for_once(examples):
    positions, answers = examples.positions, examples.answers
    assert (positions.sort(1).values.diff(dim=1) > 0).all()
    assert (positions >= 14).all() and (positions < 40).all() and (positions % 2 == 0).all()
    assert torch.equal(examples.tokens.gather(1, positions), examples.tokens[:, 0:14:2])
    assert torch.equal(answers, examples.tokens[:, 1:14:2])
    labels = examples.labels()
    assert torch.equal(labels.gather(1, positions), answers)
    assert ((labels != IGNORED).sum(1) == 7).all()


def test_the_rest_is_random_tokens(examples):
    rest = torch.ones_like(examples.tokens, dtype=torch.bool)
    rest[:, :14] = False
    rest.scatter_(1, examples.positions, False)
    counts = torch.bincount(examples.tokens[rest], minlength=VOCAB).double()
    assert len(counts) == VOCAB and counts.sum() == 3000 * (40 - 14 - 7)
    assert ((counts - counts.mean()).abs() < 5 * counts.mean().sqrt()).all()


def test_gaps_are_numpys_choice_without_replacement():
    """The gap of each pair, in order, and which gaps come together, against numpy's draws."""
    task = Task(seqlen=26, pairs=3, examples=40_000)
    space = (26 - 6) // 2
    gaps = (generate(task, VOCAB, seed=1).positions.numpy() - 6) // 2
    weights = np.arange(1, space + 1) ** -0.99
    rng = np.random.RandomState(0)
    expected = np.stack(
        [rng.choice(space, 3, replace=False, p=weights / weights.sum()) for _ in range(40_000)]
    )

    def shares(draws):
        columns = [np.bincount(draws[:, i], minlength=space) for i in range(3)]
        pairs = np.bincount(draws[:, 0] * space + draws[:, 2], minlength=space**2)
        return np.concatenate([*columns, pairs]) / len(draws)

    ours, theirs = shares(gaps), shares(expected)
    error = np.sqrt((ours + theirs) / 40_000)  # standard error of the difference, or above it
    assert (np.abs(ours - theirs) <= 4.5 * error + 1e-12).all()
    exact = weights / weights.sum()
    assert (np.abs(ours[:space] - exact) <= 4.5 * np.sqrt(exact / 40_000)).all()


def test_a_full_row_asks_everywhere():
    examples = generate(Task(seqlen=64, pairs=16, examples=50), 512, seed=0)
    expected = torch.arange(32, 64, 2).expand(50, -1)
    assert torch.equal(examples.positions.sort(1).values, expected)


def test_the_seed_decides():
    first, again, other = (generate(TASK, VOCAB, seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.tokens, other.tokens)
    train, test = generate_all(TASKS["cpu"], 0)
    assert [x.tokens.shape[1] for x in test] == [task.seqlen for task in TASKS["cpu"].test]
    assert not torch.equal(train[1].tokens[:500], test[0].tokens)


def test_the_papers_tasks():
    tasks = TASKS["paper"]
    assert tasks.vocab_size == 8192 and tasks.seqlen == 1024
    assert sum(task.examples for task in tasks.train) == 180_000
    assert [(t.seqlen, t.pairs) for t in tasks.test] == [
        (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)
    ]  # fmt: skip


def test_impossible_tasks_are_refused():
    with pytest.raises(ConfigError, match="pairs: expected 1 ... seqlen / 4 = 16, got 17"):
        Task(seqlen=64, pairs=17, examples=1)
    with pytest.raises(ConfigError, match="vocab_size: expected more than 15 for 7 keys"):
        generate(TASK, 14, seed=0)
