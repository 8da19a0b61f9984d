"""Data, training, checkpoints and sampling, on a corpus of a few small files."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from based_model import PRESETS, Based, ModelConfig, optim, train
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
from based_model.log import RunLog, read_log
from based_model.settings import TrainConfig

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
    text = tmp_path / "text"
    text.mkdir()
    rng = random.Random(0)
    for i in range(40):
        lines = (f"def f{rng.randrange(9)}(x):\n    return x + {j}\n" for j in range(40))
        (text / f"{i:02}.py").write_text(f"# file {i}\n" + "\n".join(lines))
    return text


@pytest.fixture
def settings(folder, monkeypatch):
    """TrainConfigs of the made-up files and of a tiny model, which becomes a preset."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)

    def make(out, **changes):
        values = {
            "data": (folder,),
            "valid_share": 0.2,
            "preset": "tiny",
            "steps": 12,
            "batch_size": 4,
            "seqlen": 32,
            "warmup_steps": 5,
            "lr": 1e-2,
            "sample_bytes": 5,
            "threads": 1,
        }
        return TrainConfig(out=out, **{**values, **changes})

    return make


def losses(run):
    return {r["step"]: r["loss"] for r in read_log(run / "log.jsonl") if "lr" in r}


def weights(run):
    return load_model(run).state_dict()


def assert_equal_weights(run, other):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stdlib_is_found_in_a_fixed_order_without_its_tests():
    files = stdlib_files()
    assert len(files) > 200 and files == stdlib_files()
    assert not [f for f in files if {"site-packages", "test"} & set(f.parts)]


def test_split_keeps_held_out_files_apart(folder):
    names = sorted(folder.iterdir())
    (folder / "copy.py").write_bytes(names[3].read_bytes())
    corpus = load_corpus((folder,), valid_share=0.3)
    held_out = set(corpus.valid_files)
    assert held_out and not held_out & set(corpus.train_files)
    assert len(corpus.train_files) + len(corpus.valid_files) == 41
    assert (folder / "copy.py" in held_out) == (names[3] in held_out)
    for text, paths in ((corpus.train, corpus.train_files), (corpus.valid, corpus.valid_files)):
        assert text.tobytes() == b"".join(p.read_bytes() + bytes([SEPARATOR]) for p in paths)
    # Which side a file is on does not depend on the others.
    fewer = load_corpus(tuple(names[:20]), valid_share=0.3)
    assert set(fewer.valid_files) == held_out & set(names[:20])


def test_given_held_out_files_are_not_trained_on(folder):
    corpus = load_corpus((folder,), (folder / "07.py",))
    assert corpus.valid_files == (folder / "07.py",)
    assert len(corpus.train_files) == 39 and folder / "07.py" not in corpus.train_files


def test_a_single_file_gives_its_tail(folder):
    corpus = load_corpus((folder / "00.py",), valid_share=0.25)
    whole = (folder / "00.py").read_bytes() + bytes([SEPARATOR])
    assert corpus.train.tobytes() + corpus.valid.tobytes() == whole
    assert len(corpus.valid) == pytest.approx(len(whole) / 4, abs=1)


def test_folders_give_their_visible_text_files(folder):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.py").write_text("secret")
    (folder / "binary").write_bytes(b"a\0b")
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("text")
    corpus = load_corpus((folder,), valid_share=0.3)
    names = {path.name for path in (*corpus.train_files, *corpus.valid_files)}
    assert names == {f"{i:02}.py" for i in range(40)} | {"notes.txt"}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_memmaps(tmp_path, dtype):
    tokens = np.arange(1000, 1100, dtype=dtype)
    tokens.tofile(tmp_path / "train.bin")
    tokens[:7].tofile(tmp_path / "valid.bin")
    corpus = load_corpus((tmp_path / "train.bin",), valid_share=0.1, token_dtype=dtype)
    assert isinstance(corpus.train, np.memmap) and not corpus.is_bytes
    assert corpus.train.tolist() + corpus.valid.tolist() == tokens.tolist()
    assert len(corpus.valid) == 10
    corpus = load_corpus((tmp_path / "train.bin",), (tmp_path / "valid.bin",), token_dtype=dtype)
    assert len(corpus.train) == 100 and corpus.valid.tolist() == tokens[:7].tolist()


def test_unusable_data_is_a_named_error(folder):
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "nul.txt").write_bytes(b"a\0")
    with pytest.raises(ConfigError, match="expected a file or folder, got .*nowhere"):
        load_corpus((folder / "nowhere",))
    with pytest.raises(ConfigError, match="NUL bytes"):
        load_corpus((folder / "nul.txt",))
    with pytest.raises(ConfigError, match="whole uint16 tokens, got .*odd.bin"):
        load_corpus((folder / "odd.bin",))
    with pytest.raises(ConfigError, match="at most one .bin held out"):
        load_corpus((folder / "odd.bin", folder / "00.py"))
    with pytest.raises(ConfigError, match="and 0 tokens of 0 files"):
        load_corpus((folder,), valid_share=1e-9)


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
    rates = [optim.learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_only_matrices_decay():
    model = Based(TINY)
    decaying, others = optim.build_optimizer(model, 0.1, (0.9, 0.95)).param_groups
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decaying["params"])
    assert any(p is model.embedding.weight for p in others["params"])
    count = len(decaying["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


def test_training_lowers_the_loss_and_is_reproducible(settings, tmp_path, capsys):
    results = train.train(settings(tmp_path / "a", eval_every=5))
    out = capsys.readouterr().out
    assert "held-out bits per byte: model" in out and "gzip" in out and "xz" in out
    assert "step 10: loss" in out
    curve = losses(tmp_path / "a")
    assert list(curve) == list(range(1, 13))
    assert curve[1] == pytest.approx(np.log(256), abs=0.1) and curve[12] < curve[1] - 1
    assert results["bits_per_byte"] == pytest.approx(results["loss"] / np.log(2))
    assert read_log(tmp_path / "a" / "log.jsonl")[-1] == {"step": 12, **results}

    assert train.train(settings(tmp_path / "b")) == results
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    train.train(settings(tmp_path / "c", seed=1))
    assert losses(tmp_path / "c") != curve


def test_resumed_run_equals_the_straight_one_bit_for_bit(settings, tmp_path):
    train.train(settings(tmp_path / "straight", steps=20, save_every=10))
    shutil.copytree(tmp_path / "straight", tmp_path / "crashed")
    shutil.rmtree(tmp_path / "crashed" / "step-00000020")  # and the log is ahead of the weights
    resumed = train._resumed_settings(["--resume", str(tmp_path / "crashed")])
    assert resumed.steps == 20 and resumed.out is None
    train.train(resumed)
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")
    assert_equal_weights(tmp_path / "crashed", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(settings, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    straight, run = tmp_path / "straight", tmp_path / "run"
    train.train(settings(straight))
    step = train.Trainer.training_step

    def interrupted_step(self):
        record = step(self)
        if self.step == 7:
            os.kill(os.getpid(), number)
        return record

    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "training_step", interrupted_step)
        assert train.train(settings(run)) == {}
    assert f"{number.name} after step 7" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert find_checkpoint(run).name == "step-00000007"
    train.train(settings(None, resume=run))
    assert losses(run) == losses(straight)
    assert_equal_weights(run, straight)


def test_resume_takes_an_older_checkpoint_only_when_asked(settings, tmp_path, capsys):
    run = tmp_path / "run"
    train.train(settings(run, save_every=6))
    weights_file = run / "step-00000012" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-00000012: not a readable checkpoint"):
        train.train(settings(None, resume=run))
    train.train(settings(None, resume=run / "step-00000006"))
    assert "abandoned-step-00000012" in capsys.readouterr().out
    assert load_model(run).config == TINY and (run / "abandoned-step-00000012").exists()


def test_resume_checks_what_it_continues(settings, folder, tmp_path):
    run = tmp_path / "run"
    train.train(settings(run, steps=2))
    with pytest.raises(ConfigError, match="holds a run already"):
        train.train(settings(run))
    with pytest.raises(ConfigError, match="resume: expected the model of"):
        train.train(settings(None, resume=run, window=5))
    with pytest.raises(ConfigError, match="steps: expected at least the 2 done, got 1"):
        train.train(settings(None, resume=run, steps=1))
    with pytest.raises(ConfigError, match="data: expected the text that"):
        train.train(settings(None, resume=run, data=(folder / "00.py",)))


def test_only_the_newest_checkpoints_are_kept(settings, tmp_path):
    train.train(settings(tmp_path / "run", save_every=2, keep=3))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["log.jsonl", "step-00000008", "step-00000010", "step-00000012"]


def test_accumulated_parts_add_up_to_the_batch(settings, tmp_path):
    train.train(settings(tmp_path / "whole"))
    train.train(settings(tmp_path / "parts", accumulate=4))
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [parts[s] for s in parts] == pytest.approx([whole[s] for s in whole], abs=1e-4)


def test_bf16_training_is_near_fp32(settings, tmp_path):
    train.train(settings(tmp_path / "fp32"))
    train.train(settings(tmp_path / "bf16", precision="bf16"))
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert bf16 != fp32 and bf16[12] == pytest.approx(fp32[12], abs=0.05)
    assert all(x.dtype == torch.float32 for x in weights(tmp_path / "bf16").values())


def test_token_ids_outside_the_vocabulary_are_a_named_error(settings, tmp_path):
    np.full(500, 300, np.uint16).tofile(tmp_path / "tokens.bin")
    with pytest.raises(ConfigError, match="expected token ids below 256, got 300"):
        train.train(settings(tmp_path / "run", data=(tmp_path / "tokens.bin",)))
    results = train.train(
        settings(tmp_path / "wider", data=(tmp_path / "tokens.bin",), vocab_size=301, steps=1)
    )
    assert set(results) == {"loss"}
    assert load_model(tmp_path / "wider").config.vocab_size == 301


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(settings, tmp_path):
    with pytest.raises(FloatingPointError, match="loss .* nothing was saved"):
        train.train(settings(tmp_path / "run", lr=1e30, clip=1e30, warmup_steps=0))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_log_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    RunLog(path, 1).write({"step": 2, "again": True})
    assert read_log(path) == [{"step": 1}, {"step": 2, "again": True}]


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
        ({"batch_size": 10, "accumulate": 4}, r"batch_size: expected a multiple of accumulate"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
    ],
)
def test_bad_train_settings_are_named_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_settings_survive_json(tmp_path):
    config = TrainConfig(out=tmp_path, data=(tmp_path / "a", tmp_path / "b"), threads=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"unknown keys \['momentum'\]"):
        TrainConfig.from_dict({"momentum": 0.9})


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
    for prompt, row in zip(prompts, steps, strict=True):
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
