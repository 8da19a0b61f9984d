"""Training on a corpus of a few small files."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from based_model import PRESETS, Based, optim, train
from based_model.checkpoint import load_model
from based_model.compare import CompareConfig, compare
from based_model.config import ConfigError
from based_model.log import RunLog, read_log
from based_model.settings import TrainConfig
from training import (
    TINY,
    assert_equal_weights,
    folder_fixture,  # noqa: F401
    losses,
    one_thread_fixture,  # noqa: F401
    settings_fixture,  # noqa: F401
    weights,
)


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
    assert "step 10: held out, " in out and " nats per token, " in out
    curve = losses(tmp_path / "a")
    assert list(curve) == list(range(1, 13))
    assert curve[1] == pytest.approx(np.log(256), abs=0.1) and curve[12] < curve[1] - 1
    assert results["valid_bits_per_byte"] == pytest.approx(results["valid_loss"] / np.log(2))
    assert read_log(tmp_path / "a")[-1] == {"step": 12, **results}

    assert train.train(settings(tmp_path / "b")) == results
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    train.train(settings(tmp_path / "c", seed=1))
    assert losses(tmp_path / "c") != curve


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
    assert set(results) == {"valid_loss"}
    assert load_model(tmp_path / "wider").config.vocab_size == 301


def test_a_loss_that_is_not_finite_stops_with_a_report(settings, tmp_path):
    run, broken = tmp_path / "run", {"lr": 1e30, "clip": 1e30, "warmup_steps": 0}
    with pytest.raises(FloatingPointError, match="nothing was saved; there is no checkpoint yet"):
        train.train(settings(run, **broken))
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "tensorboard"]

    train.train(settings(run, steps=3))
    before = weights(run)
    with pytest.raises(FloatingPointError) as error:
        train.train(settings(None, resume=run, **broken))
    report = str(error.value)
    assert "expected a finite loss, got loss nan, gradient norm nan at learning rate" in report
    assert "gradients, first embedding.weight" in report
    assert f"the newest checkpoint is {run / 'step-00000003'}" in report
    assert all(torch.equal(x, before[name]) for name, x in weights(run).items())


def test_log_survives_a_line_cut_short(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    RunLog(tmp_path, 1).write({"step": 2, "again": True})
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2, "again": True}]


def test_tensorboard_and_the_curve_show_what_the_log_says(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train.train(settings(run, save_every=6, eval_every=4))
    train.train(settings(None, resume=run / "step-00000006"))  # drops what came after it
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    curve = {event.step: event.value for event in shown.Scalars("loss")}
    assert list(curve) == list(range(1, 13)) and curve == pytest.approx(losses(run))
    assert [event.step for event in shown.Scalars("valid_bits_per_byte")] == [4, 12]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_compare_shows_runs_of_equal_size_on_the_same_text(settings, tmp_path, capsys):
    runs, png = (tmp_path / "a", tmp_path / "b"), tmp_path / "compare.png"
    train.train(settings(runs[0]))
    train.train(settings(runs[1], window=3))
    first, second = compare(CompareConfig(runs=runs, out=png))
    out = capsys.readouterr().out
    difference = second["valid_bits_per_byte"] - first["valid_bits_per_byte"]
    assert f"{difference:+.4f}" in out and f"{first['parameters']:,}" in out
    assert first["parameters"] == sum(x.numel() for x in weights(runs[0]).values())
    assert png.read_bytes().startswith(b"\x89PNG")

    train.train(settings(tmp_path / "other", seqlen=16))
    with pytest.raises(ConfigError, match="seqlen: expected that of .*a, 32, got 16"):
        compare(CompareConfig(runs=(runs[0], tmp_path / "other"), out=png))
    with pytest.raises(ConfigError, match="at least two folders, got 1"):
        CompareConfig(runs=runs[:1])


def test_checkpointed_activations_take_less_memory_and_change_nothing(settings, tmp_path):
    train.train(settings(tmp_path / "kept", steps=3))
    train.train(settings(tmp_path / "again", steps=3, checkpoint_activations=True))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    assert_equal_weights(tmp_path / "again", tmp_path / "kept")

    def saved_bytes(checkpoint_activations):
        model, saved = Based(TINY), []
        model.checkpoint_activations = checkpoint_activations
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            model(torch.zeros(2, 50, dtype=torch.int64)).sum()
        return sum(x.nbytes for x in saved)

    assert saved_bytes(True) < saved_bytes(False) / 3


def test_compiled_training_is_near_the_plain_one(settings, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setitem(PRESETS, "linear", dataclasses.replace(TINY, layers=("linear",) * 3))
    torch.compiler.reset()
    counters.clear()
    common = {"preset": "linear", "steps": 4, "eval_every": 2}
    train.train(settings(tmp_path / "plain", **common))
    train.train(settings(tmp_path / "compiled", compile=True, **common))
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert compiled == pytest.approx(plain, abs=1e-4)
    # Graphs of the first layer, of all others, and of the loss; none for the evaluation's shapes.
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_bf16_training_on_cuda_is_near_the_plain_one(settings, tmp_path):
    common = {"device": "cuda", "precision": "bf16", "steps": 4, "sample_tokens": 0}
    train.train(settings(tmp_path / "plain", **common))
    torch.compiler.reset()
    train.train(settings(tmp_path / "compiled", compile=True, **common))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=2e-2)


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
