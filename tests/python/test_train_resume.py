"""Checkpoints: what they bring back, what stops a run, and what is no checkpoint."""

import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from based_model import Based, train
from based_model.checkpoint import CheckpointError, find_checkpoint, load_model, save_checkpoint
from based_model.config import ConfigError
from training import (
    TINY,
    assert_equal_weights,
    folder_fixture,  # noqa: F401
    losses,
    one_thread_fixture,  # noqa: F401
    settings_fixture,  # noqa: F401
)


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


def test_resume_takes_an_older_checkpoint_only_when_asked(settings, tmp_path, capsys):
    run = tmp_path / "run"
    train.train(settings(run, save_every=6))
    weights_file = run / "step-00000012" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    before = "step-00000012: not a readable checkpoint.*; the one before is .*step-00000006"
    with pytest.raises(CheckpointError, match=before):
        train.train(settings(None, resume=run))
    train.train(settings(None, resume=run / "step-00000006"))
    assert "abandoned-step-00000012" in capsys.readouterr().out
    assert load_model(run).config == TINY and (run / "abandoned-step-00000012").exists()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "training.json", "config.json"])
@pytest.mark.parametrize("harm", ["torn", "foreign", "missing"])
def test_a_harmed_checkpoint_is_a_named_error(settings, tmp_path, name, harm):
    run = tmp_path / "run"
    train.train(settings(run, steps=1))
    file = run / "step-00000001" / name
    if harm == "torn":
        file.write_bytes(file.read_bytes()[:-10])
    elif harm == "foreign" and name == "optimizer.safetensors":
        save_file({"exp_avg": torch.zeros(3)}, file)
    elif harm == "foreign":
        file.write_text('{"model_type": "gpt2", "step": 1}')
    else:
        file.unlink()
    with pytest.raises((CheckpointError, ConfigError), match="step-00000001|expected a checkpoint"):
        train.train(settings(None, resume=run))


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
    assert names == [
        "log.jsonl",
        "loss.png",
        "step-00000008",
        "step-00000010",
        "step-00000012",
        "tensorboard",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(settings, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    straight, run = tmp_path / "straight", tmp_path / "run"
    train.train(settings(straight, save_every=4, keep=3))
    step = train.Trainer.training_step

    def interrupted_step(self):
        record = step(self)
        if self.step == 7:
            os.kill(os.getpid(), number)
        return record

    argv = ["train", "--resume", str(straight / "step-00000004"), "--out", str(run)]
    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "training_step", interrupted_step)
        patched.setattr(sys, "argv", argv)
        train.main()  # no SystemExit: the exit code is 0
    assert f"{number.name} after step 7" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert find_checkpoint(run).name == "step-00000007"
    train.train(settings(None, resume=run))
    assert losses(run) == {step: x for step, x in losses(straight).items() if step > 4}
    assert_equal_weights(run, straight)


def test_resumed_run_equals_the_straight_one_bit_for_bit(settings, tmp_path):
    train.train(settings(tmp_path / "straight", steps=20, save_every=10))
    shutil.copytree(tmp_path / "straight", tmp_path / "crashed")
    shutil.rmtree(tmp_path / "crashed" / "step-00000020")  # and the log is ahead of the weights
    resumed = train._resumed_settings(["--resume", str(tmp_path / "crashed")])
    assert resumed.steps == 20 and resumed.out is None
    train.train(resumed)
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")
    assert_equal_weights(tmp_path / "crashed", tmp_path / "straight")
