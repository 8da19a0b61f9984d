"""The recall test: its models against plain formulas in fp64, its runs, its results file."""

import gc
import json
import math

import pytest
import torch
import torch.nn.functional as F

from based_model import mqar, mqar_data, mqar_plot
from based_model.config import ConfigError
from based_model.mqar_data import Task, TaskSet, generate
from based_model.mqar_models import H3, Attention, BaseConv, Linear
from based_model.mqar_run import Run, RunConfig, build_model
from based_model.signals import StopSignal
from training import one_thread_fixture  # noqa: F401

pytestmark = pytest.mark.ops("linear_attention", "sliding_window_attention", "short_conv")

TINY = TaskSet(64, (Task(16, 2, 512), Task(32, 4, 256)), (Task(16, 2, 64), Task(32, 6, 64)))
MIXERS = ("based", "based-window", "attention", "window", "conv", "h3")


@pytest.fixture(autouse=True)
def tiny_tasks(monkeypatch):
    monkeypatch.setitem(mqar_data.TASKS, "tiny", TINY)


def settings(mixer="based", **changes):
    values = {"d_model": 16, "feature_dim": 8, "window": 5, "state_dim": 8, "tasks": "tiny"}
    return RunConfig(mixer=mixer, **{**values, "batch_size": 32, "epochs": 2, **changes})


# ---- the models --------------------------------------------------------------------------------


def attend(x, mixer):
    """Causal weights from the token's own distance, one query after the other."""
    rows = []
    if isinstance(mixer, Linear):
        q, k, v = mixer.qkv_proj(x).split(mixer.widths, -1)
    else:
        q, k, v = mixer.qkv_proj(x).chunk(3, -1)
    for t in range(x.shape[1]):
        first = 0 if getattr(mixer, "window", None) is None else max(0, t + 1 - mixer.window)
        s = (k[:, first : t + 1] @ q[:, t, :, None])[..., 0] / math.sqrt(q.shape[-1])
        w = 1 + s + s**2 / 2 if isinstance(mixer, Linear) else s.exp()
        rows.append((w[..., None] * v[:, first : t + 1]).sum(1) / w.sum(1, keepdim=True))
    return torch.stack(rows, 1)


def h3(x, m):
    """The two state-space models token by token."""
    q, k, v = m.qkv_proj(x).chunk(3, -1)
    nheads, modes = m.log_decay.shape
    dt = m.log_dt.exp()[:, None]
    a = (-m.log_decay.exp() + 1j * m.frequency) * dt
    decay = (1 + a / 2) / (1 - a / 2)
    gain = torch.view_as_complex(m.input) * dt / (1 - a / 2)
    read = torch.view_as_complex(m.output)
    taps = x.new_zeros(len(x), *m.shift.shape)  # newest first
    state = torch.zeros(len(x), 2, 2, nheads, modes, dtype=torch.complex128, device=x.device)
    rows = []
    for t in range(x.shape[1]):
        taps = torch.cat((k[:, t, :, None], taps[..., :-1]), -1)
        shifted = (taps * m.shift).sum(-1) + m.shift_skip * k[:, t]
        kv = shifted.view(-1, 2, 1, nheads) * v[:, t].view(-1, 1, 2, nheads)
        state = decay * state + gain * kv[..., None]
        y = 2 * (read * state).sum(-1).real + m.diagonal_skip * kv
        rows.append((q[:, t].view(-1, 2, 1, nheads) * y).sum(1).flatten(1))
    return m.output_linear(torch.stack(rows, 1))


def mixed(x, mixer):
    if isinstance(mixer, BaseConv):
        padded = F.pad(x.mT, (mixer.conv_weight.shape[1] - 1, 0))
        weight = mixer.conv_weight[:, None]
        conv = F.conv1d(padded, weight, mixer.conv_bias, groups=x.shape[-1]).mT
        return conv * mixer.proj(x) + x
    if isinstance(mixer, H3):
        return h3(x, mixer)
    out = attend(x, mixer)
    return mixer.out_proj(out) if isinstance(mixer, Attention) else mixer.o_proj(out)


def normed(x, norm):
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, 1e-5)


def reference_logits(model, tokens):
    """Logits everywhere, (B, L, V)."""
    x = model.embedding.weight[tokens]
    for norm, mlp_norm, mixer in zip(model.norms, model.mlp_norms, model.mixers, strict=True):
        x = x + mixed(normed(x, norm), mixer)
        x = x + normed(x, mlp_norm)
    return normed(x, model.norm) @ model.embedding.weight.T


def lively(config):
    """A model whose weights are large enough for every part to show."""
    model = build_model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model


@pytest.mark.parametrize("mixer", MIXERS)
def test_loss_and_gradients_are_those_of_the_labels(mixer, device):
    config = settings(mixer)
    examples = generate(Task(28, 3, 6), TINY.vocab_size, seed=7)
    reference = lively(config).double()
    labels = examples.labels()
    logits = reference_logits(reference, examples.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(expected, list(reference.parameters()))

    model = lively(config).to(device)
    batch = examples.to(device)
    loss = model.loss(batch.tokens, batch.positions, batch.answers)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), ours, gradients, strict=True):
        # A bias of keys moves no softmax: its gradient is zero up to rounding.
        error, scale = (a.cpu().double() - b).norm(), b.norm() + 1e-3
        assert error <= 2e-4 * scale, (name, error.item(), scale.item())
    predicted = model.predict(batch.tokens, batch.positions, rows=5).cpu()
    assert torch.equal(predicted, logits.argmax(-1).gather(1, examples.positions))


def test_state_bytes_are_the_published_ones():
    def log2(mixer, **sizes):
        model = build_model(RunConfig(mixer=mixer, tasks="paper", **sizes))
        return math.log2(4 * model.state_size())

    for (d_model, feature_dim), published in zip(
        ((32, 8), (64, 8), (128, 8), (64, 16), (128, 16), (64, 24), (256, 16)),
        (12.54, 13.52, 14.51, 15.29, 16.28, 16.37, 17.27),
    ):
        ours = log2("based", d_model=d_model, feature_dim=feature_dim)
        assert ours == pytest.approx(published, abs=0.02)
    for window, published in ((8, 13), (64, 16), (1024, 20)):
        assert log2("window", d_model=128, window=window) == published
    assert log2("attention", d_model=128) == 20
    for d_model, published in ((64, 13), (128, 15), (256, 17)):
        assert log2("h3", d_model=d_model, state_dim=d_model // 4) == published


# ---- runs --------------------------------------------------------------------------------------


def data(device):
    return [[part.to(device) for part in half] for half in mqar_data.generate_all(TINY, 0)]


def finished(config, device="cpu"):
    run = Run(config, *data(device), device)
    for _ in run.work():
        pass
    return run.record()


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("mixer", ("based", "window", "h3"))
def test_steps_are_adamw_on_the_loss(mixer, precision, device):
    """Captured or not, in one vector or not: the same weights as torch's own optimizer leaves."""
    config = settings(mixer, dropout=0.0, precision=precision, lr=1e-2)
    train, test = data(device)
    run = Run(config, train, test, device)
    model = build_model(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=config.weight_decay)
    order = torch.Generator().manual_seed(1)
    for step in range(6):
        task = step % 2
        rows = torch.randperm(len(train[task]), generator=order)[:32]
        with run._on_stream():
            run.steps[task](rows.to(device))
        batch = train[task].rows(rows.to(device)).to("cpu")
        optimizer.zero_grad()
        loss = model.loss(batch.tokens, batch.positions, batch.answers)
        loss.backward()
        optimizer.step()
    if device != "cpu":
        torch.cuda.synchronize()
    ours = run.master.detach().cpu().double()
    theirs = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in build_model(config).parameters()]).double()
    # Adam takes steps of full size where gradients are rounding noise: compare what has moved.
    cosine = F.cosine_similarity(ours - start, theirs - start, dim=0)
    assert cosine > (0.999 if precision == "fp32" else 0.97)


def test_the_accuracy_is_of_the_weights_of_now(device):
    """The first evaluation, and later ones, which a GPU replays."""
    run = Run(settings(d_model=32, dropout=0.0, lr=3e-2), *data(device), device)
    rows = torch.arange(32, device=device)
    seen = []
    with run._on_stream(), torch.no_grad():
        for _ in range(4):
            accuracies = torch.stack(run.evaluate())
            predictions = [run.model.predict(test.tokens, test.positions) for test in run.test]
            right = [(p == t.answers).double().mean() for p, t in zip(predictions, run.test)]
            torch.testing.assert_close(accuracies.double(), torch.stack(right), rtol=0, atol=1e-6)
            seen.append(accuracies.tolist())
            with torch.enable_grad():
                for _ in range(20):
                    run.steps[0](rows)
    assert len({tuple(row) for row in seen}) > 1


def test_a_run_that_is_over_may_be_freed_while_another_is_captured(device):
    rows = torch.arange(32, device=device)
    over, run = (Run(settings(), *data(device), device) for _ in range(2))
    for _ in range(3):
        with over._on_stream():
            over.steps[0](rows)
    with run._on_stream():
        run.steps[0](rows)
    loss = run.model.loss

    def loss_with_a_collection(*batch):
        if gc.isenabled():  # then it could come at any time
            gc.collect()
        return loss(*batch)

    run.model.loss = loss_with_a_collection
    del over
    with run._on_stream():
        for _ in range(3):
            run.steps[0](rows)
        assert math.isfinite(run.loss_sum.item()) and gc.isenabled()


def test_training_learns_and_is_reproducible():
    config = settings(d_model=32, epochs=30, lr=1e-2, dropout=0.0)
    record = finished(config)
    assert record["accuracy"] > 0.5  # a guess has 1/32
    assert record["run"] == config.settings() and "window" not in record["run"]
    assert [row[:2] for row in record["by_task"]] == [[16, 2], [32, 6]]
    by_task = [row[2] for row in record["by_task"]]
    assert record["accuracy"] == pytest.approx(sum(by_task) / 2, abs=1e-4)
    assert len(record["curve"]) == record["epochs"]
    assert record["curve"][-1] == pytest.approx(record["accuracy"], abs=1e-4)
    again = finished(config)
    assert again["by_task"] == record["by_task"] and again["loss"] == record["loss"]


def test_enough_stops_a_run():
    assert finished(settings(enough=0.0, epochs=9))["epochs"] < 9


# ---- results, sweeps and the command line ------------------------------------------------------


def asked(tmp_path, **changes):
    values = {"d_model": 16, "feature_dim": 8, "tasks": "tiny", "batch_size": 64, "epochs": 1}
    values |= {"mixer": "based", "lr": (1e-2, 1e-3), "out": tmp_path / "results.jsonl"}
    return mqar.MqarConfig(**{**values, **changes})


def test_runs_side_by_side_are_added_once(tmp_path, capsys):
    config = asked(tmp_path, parallel=2)
    assert len(mqar.mqar(config)) == 2
    lines = config.out.read_text().splitlines()
    assert len(lines) == 2 and (tmp_path / "results.png").stat().st_size > 1000
    # A crash in the middle of a line: that run is done again, the other is not.
    config.out.write_text(lines[0] + "\n" + lines[1][:50])
    mqar.mqar(config)
    again = [json.loads(line) for line in config.out.read_text().splitlines()]
    assert again[0] == json.loads(lines[0]) and again[1]["run"] == json.loads(lines[1])["run"]
    assert again[1]["by_task"] == json.loads(lines[1])["by_task"]
    mqar.mqar(config)
    assert len(config.out.read_text().splitlines()) == 2
    assert "all runs done" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_runs(tmp_path):
    lrs = (1e-2, 3e-3, 1e-3, 3e-4)
    config = asked(tmp_path, device=("cuda:0", "cuda:1"), parallel=2, lr=lrs, dropout=0.0)
    records = mqar.mqar(config)
    assert sorted(r["run"]["lr"] for r in records) == sorted(lrs)
    assert {r["device"] for r in records} == {torch.cuda.get_device_name(0)}
    alone = mqar.mqar(asked(tmp_path / "alone", device=("cuda:1",), lr=lrs[:1], dropout=0.0))[0]
    shared = next(r for r in records if r["run"] == alone["run"])
    assert alone["loss"] == pytest.approx(shared["loss"], rel=0.05)


def test_time_limit_keeps_what_is_finished(tmp_path, capsys):
    mqar.mqar(asked(tmp_path, epochs=10_000, time_limit=0.5, lr=(1e-2,)))
    assert "stopped" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


def test_first_enough_leaves_out_the_other_learning_rates(tmp_path):
    records = mqar.mqar(asked(tmp_path, enough=0.0, first_enough=True, lr=(1e-2, 1e-3, 1e-4)))
    assert len(records) == 1


def test_a_run_far_behind_is_given_up(tmp_path):
    config = asked(tmp_path, epochs=8, give_up_behind=0.1)
    rivalry = mqar.Rivalry(config, mqar.Results(config.out))
    first, second = config.runs()
    assert not rivalry.hopeless(first, 2, 0.5)
    assert not rivalry.hopeless(second, 2, 0.45) and rivalry.hopeless(second, 2, 0.35)
    # What the results file knows counts as well.
    results = mqar.Results(config.out)
    results.append({"run": first.settings(), "curve": [0.1, 0.6]})
    rivalry = mqar.Rivalry(config, results)
    assert rivalry.hopeless(second, 2, 0.45) and not rivalry.hopeless(second, 2, 0.55)


def test_sweep_files(tmp_path):
    file = tmp_path / "sweep.json"
    shared = {"tasks": "tiny", "lr": [1e-3, 1e-2]}
    grids = [{"mixer": "based", "d_model": [32, 64]}, {"mixer": "window", "window": 8}]
    file.write_text(json.dumps({"shared": shared, "grids": grids}))
    runs = mqar.read_sweep(file)
    assert len(set(runs)) == 6
    assert runs[:3] == [
        RunConfig(mixer="based", d_model=d_model, tasks="tiny", lr=lr)
        for d_model, lr in ((32, 1e-3), (32, 1e-2), (64, 1e-3))
    ]
    for text, message in (
        ("{", "not a sweep"),
        ('{"grids": [{"mixer": "based", "depth": 3}]}', "depth"),
        ('{"grids": [{"mixer": "lstm"}]}', "mixer: expected one of"),
        ('{"grids": [], "shard": {}}', "shard"),
        ('{"shared": {}}', "grids"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            mqar.read_sweep(file)


def test_settings_that_cannot_work():
    for changes, message in (
        ({"lr": 0.0}, "lr: expected > 0"),
        ({"d_model": 0}, "d_model: expected an integer >= 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"precision": "fp16"}, "precision: expected one of"),
        ({"mixer": "h3", "d_model": 31}, "d_model: expected an even number, got 31"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(**changes)
    with pytest.raises(ConfigError, match="parallel: expected >= 1"):
        mqar.MqarConfig(parallel=0)
    with pytest.raises(ConfigError, match="device: expected one that torch has, got cuda:99"):
        mqar.mqar(mqar.MqarConfig(device=("cuda:99",)))


def test_without_fla_its_mixers_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fla.layers", None)
    with pytest.raises(ConfigError, match=r"flash-linear-attention.*\[rivals\]"):
        build_model(settings("gla"))


def test_best_learning_rate_counts(tmp_path):
    def record(lr, accuracy, **changes):
        run = settings(lr=lr, **changes).settings()
        return {"run": run, "accuracy": accuracy, "state_bytes": 100}

    records = [record(1e-3, 0.5), record(1e-2, 0.7), record(1e-3, 0.6, d_model=32)]
    best = mqar_plot.best_of_models(records)
    assert sorted(r["accuracy"] for r in best) == [0.6, 0.7]


def test_published_points_belong_to_the_papers_tasks():
    def record(mixer, state_bytes, tasks="paper"):
        return {"run": {"mixer": mixer, "tasks": tasks}, "state_bytes": state_bytes}

    published = mqar_plot.published_accuracy
    assert published(record("based", 4 * 65 * 45)) == 0.710
    assert published(record("window", 2**16)) == 0.513
    assert published(record("window", 2**16, "cpu")) is None
    assert published(record("based", 2**14)) is None and published(record("conv", 2**13)) is None


def test_fewer_epochs_are_told_from_the_papers():
    def run(tasks, epochs):
        return {"run": {"tasks": tasks, "epochs": epochs}}

    assert mqar_plot.shortened(run("paper", 8))
    assert not mqar_plot.shortened(run("paper", 32)) and not mqar_plot.shortened(run("cpu", 8))


def test_a_stop_signal_ends_the_runs(tmp_path):
    config = asked(tmp_path)
    with StopSignal() as stop:
        stop.number = 15
        assert not mqar.run_all(config, mqar.Results(config.out), stop)
