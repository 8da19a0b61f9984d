"""Data, training, checkpoints and sampling, on a corpus of a few small files."""

import json
import random

import numpy as np
import pytest
import torch

from based_model import PRESETS, Based, ModelConfig, train
from based_model.checkpoint import CheckpointError, find_checkpoint, load_model, save_checkpoint
from based_model.config import ConfigError
from based_model.data import (
    SEPARATOR,
    WindowSampler,
    compressed_bits_per_byte,
    load_corpus,
    stdlib_files,
    valid_batches,
)
from based_model.generate import GenerateConfig, Sampling, generate, sample, stream_text

TINY = ModelConfig(
    layers=("conv", "linear", "window"), d_model=32, mlp_dim=64, nheads=2, window=8, vocab_size=256
)


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny models are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    """Forty files of simple made-up source text."""
    rng = random.Random(0)
    for i in range(40):
        lines = (f"def f{rng.randrange(9)}(x):\n    return x + {j}\n" for j in range(40))
        (tmp_path / f"{i:02}.py").write_text(f"# file {i}\n" + "\n".join(lines))
    return tmp_path


@pytest.fixture
def small_train(folder, monkeypatch):
    """train() on the made-up files with the tiny model as a preset."""
    monkeypatch.setattr(train, "stdlib_files", lambda: stdlib_files(folder))
    monkeypatch.setitem(PRESETS, "tiny", TINY)

    def run(out, **changes):
        values = {
            "preset": "tiny",
            "steps": 30,
            "batch_size": 4,
            "seqlen": 32,
            "warmup_steps": 5,
            "lr": 1e-2,
            "valid_share": 0.2,
            "sample_bytes": 20,
            "threads": 1,
        }
        return train.train(train.TrainConfig(out=out, **{**values, **changes}))

    return run


def test_stdlib_is_found_in_a_fixed_order_without_its_tests():
    files = stdlib_files()
    assert len(files) > 200 and files == stdlib_files()
    assert not [f for f in files if {"site-packages", "test"} & set(f.parts)]


def test_split_keeps_held_out_files_apart(folder):
    files = stdlib_files(folder)
    (folder / "copy.py").write_bytes(files[3].read_bytes())
    corpus = load_corpus(stdlib_files(folder), 0.3)
    held_out = set(corpus.valid_files)
    assert held_out and not held_out & set(corpus.train_files)
    assert len(corpus.train_files) + len(corpus.valid_files) == 41
    assert (folder / "copy.py" in held_out) == (files[3] in held_out)
    for text, paths in ((corpus.train, corpus.train_files), (corpus.valid, corpus.valid_files)):
        assert text.tobytes() == b"".join(p.read_bytes() + bytes([SEPARATOR]) for p in paths)
    # Which side a file is on does not depend on the others.
    fewer = load_corpus(files[:20], 0.3)
    assert set(fewer.valid_files) == held_out & set(files[:20])


def test_a_split_without_held_out_files_is_an_error(folder):
    with pytest.raises(ConfigError, match="got no valid file among 40 files"):
        load_corpus(stdlib_files(folder), 1e-9)


def test_sampler_is_seeded_and_continues_from_its_state():
    tokens = np.arange(200, dtype=np.uint8)
    sampler, same = (WindowSampler(tokens, 3, 7, seed=5) for _ in range(2))
    inputs, targets = next(sampler)
    assert inputs.shape == targets.shape == (3, 7) and inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(next(same)[0], inputs)
    state = json.loads(json.dumps(sampler.state_dict()))
    other = WindowSampler(tokens, 3, 7, seed=6)
    other.load_state_dict(state)
    assert torch.equal(next(other)[0], next(sampler)[0])
    with pytest.raises(ConfigError, match="seqlen: expected fewer than the 200 tokens"):
        WindowSampler(tokens, 3, 200, seed=0)


@pytest.mark.parametrize("length", [2, 8, 9, 30, 57])
def test_evaluation_predicts_every_token_once(length):
    tokens = np.arange(length, dtype=np.uint8)
    batches = list(valid_batches(tokens, batch_size=2, seqlen=8))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets.tolist() == list(range(1, length))


def test_compressors_are_measured_per_byte():
    bits = compressed_bits_per_byte(b"ab" * 5000)
    assert 0 < bits["gzip"] < 0.2 and 0 < bits["xz"] < 0.2


def test_learning_rate_warms_up_and_ends_at_min_lr():
    config = train.TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_only_matrices_decay():
    model = Based(TINY)
    decaying, others = train.build_optimizer(model, train.TrainConfig()).param_groups
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decaying["params"])
    assert any(p is model.embedding.weight for p in others["params"])
    count = len(decaying["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


def test_training_lowers_the_loss_and_is_reproducible(small_train, tmp_path, capsys):
    untrained = small_train(tmp_path / "a", steps=1)["model"]
    first = small_train(tmp_path / "b")
    assert first["model"] < untrained - 2
    out = capsys.readouterr().out
    assert "held-out bits per byte: model" in out and "gzip" in out and "xz" in out

    assert small_train(tmp_path / "c") == first
    weights = [load_model(tmp_path / name).state_dict() for name in "bc"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert small_train(tmp_path / "d", seed=1) != first


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(small_train, tmp_path):
    with pytest.raises(FloatingPointError, match="loss is"):
        small_train(tmp_path / "run", lr=1e30, clip=1e30, warmup_steps=0)
    assert not (tmp_path / "run").exists()


def test_checkpoint_reloads_to_identical_logits(tmp_path):
    torch.manual_seed(0)
    model = Based(TINY)
    folder = save_checkpoint(tmp_path / "run", 7, model)
    save_checkpoint(tmp_path / "run", 7, model)  # over the first one
    assert find_checkpoint(tmp_path / "run") == folder
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000007"]
    loaded = load_model(tmp_path / "run")
    tokens = torch.randint(256, (2, 20))
    assert loaded.config == TINY and torch.equal(loaded(tokens), model(tokens))


def test_torn_foreign_and_missing_checkpoints_are_named_errors(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint or a run"):
        load_model(tmp_path)
    folder = save_checkpoint(tmp_path, 1, Based(TINY))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="step-00000001: not a readable checkpoint"):
        load_model(tmp_path)
    weights.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="unknown keys"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "gpt-5"}, "preset: expected one of .*based-cpu.*got 'gpt-5'"),
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"lr": -1.0}, "lr: expected > 0"),
        ({"lr": float("nan")}, "lr: expected > 0"),
        ({"min_lr": 1.0}, "min_lr: expected at most lr"),
        ({"beta2": 1.0}, "beta2: expected 0 <= beta2 < 1"),
        ({"valid_share": 1.0}, "valid_share"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
    ],
)
def test_bad_train_settings_are_named_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        train.TrainConfig(**changes)


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_bad_sampling_settings_are_named_errors(changes, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        GenerateConfig(checkpoint=tmp_path, **changes)


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(400, -1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        return set(sample(logits, Sampling(**settings), generator).tolist())

    assert drawn(temperature=0.0) == {1}
    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {1, 3}
    assert drawn(temperature=1.0, top_p=0.5) == {1}
    assert drawn(temperature=1.0, top_p=0.8) == {1, 2, 3}
    assert drawn(temperature=1.0, top_k=3, top_p=0.6) == {1, 3}


def test_greedy_generation_follows_the_full_forward_for_every_prompt():
    torch.manual_seed(0)
    model = Based(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    prompts = [torch.randint(256, (length,)) for length in (3, 1, 12)]
    steps = torch.stack(list(generate(model, prompts, 10, Sampling(temperature=0.0))), 1)
    for prompt, row in zip(prompts, steps):
        text = prompt
        for token in row:
            assert model(text[None])[0, -1].argmax() == token
            text = torch.cat([text, token[None]])
    with pytest.raises(ConfigError, match="at least one token"):
        list(generate(model, [torch.empty(0, dtype=torch.int64)], 1, Sampling()))


def test_streamed_text_is_seeded_and_ends_with_its_file():
    torch.manual_seed(0)
    model = Based(TINY)

    def text(seed, prompt="é"):
        return "".join(stream_text(model, prompt, 30, Sampling(), seed))

    assert text(1) == text(1) != text(2)
    assert text(1, prompt="")
    with torch.no_grad():  # a constant norm output that points at the separator's embedding
        model.embedding.weight[SEPARATOR] = 100.0
        model.embedding.weight[ord("a")] = 1.0
    assert "".join(stream_text(model, "a", 30, Sampling(temperature=0.0), 0)) == ""
