"""Two processes (gloo, CPU) against one with the same global batch, and from each to the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from based_model import train
from based_model.checkpoint import CheckpointError
from training import (
    assert_equal_weights,
    losses,
    make_text,
    one_thread_fixture,  # noqa: F401
    tiny_settings,
    weights,
)

STEPS, HALF = 12, 6
RUNS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "save_every": HALF},
    "ddp-accumulate": {"parallel": "ddp", "accumulate": 2},
    "fsdp-accumulate": {"parallel": "fsdp", "accumulate": 2, "checkpoint_activations": True},
    # Halves of one process, of ddp and of fsdp, gone on with by other means.
    "one-to-ddp": {"parallel": "ddp", "resume": "one"},
    "one-to-fsdp": {"parallel": "fsdp", "resume": "one"},
    "fsdp-to-ddp": {"parallel": "ddp", "resume": "fsdp"},
    "fsdp-to-fsdp": {"parallel": "fsdp", "resume": "fsdp"},
    "signal": {"parallel": "fsdp", "signal_at": HALF},
    "after-signal": {"parallel": "fsdp", "resume": "signal"},
}


def torchrun(*args, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += ["--nproc-per-node", "2", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("two") / "text")


@pytest.fixture(scope="module")
def runs(text):
    """The folder of all RUNS, and of "one", a single process's."""
    root = text.parent
    train.train(tiny_settings(text, root / "one", save_every=HALF))
    settings = []
    for name, changes in RUNS.items():
        changes, extra = dict(changes), {}
        if "signal_at" in changes:
            extra["signal_at"] = changes.pop("signal_at")
        if "resume" in changes:
            changes["resume"] = root / changes["resume"] / f"step-{HALF:08d}"
        settings.append({**tiny_settings(text, root / name, **changes).to_dict(), **extra})
    (root / "runs.json").write_text(json.dumps(settings))
    done = torchrun(Path(__file__).with_name("two_processes.py"), root / "runs.json", timeout=300)
    assert done.returncode == 0, done.stderr
    return root


def assert_near(run, other, first=1, last=STEPS):
    expected = {step: loss for step, loss in losses(other).items() if first <= step <= last}
    assert losses(run) == pytest.approx(expected, abs=1e-5, rel=0) and expected


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(runs, name):
    first = HALF + 1 if "resume" in RUNS[name] else 1
    last = HALF if name == "signal" else STEPS
    assert_near(runs / name, runs / "one", first, last)
    if last == STEPS:
        for key, x in weights(runs / name).items():
            torch.testing.assert_close(x, weights(runs / "one")[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fsdp-to-fsdp", "after-signal"])
def test_two_processes_resume_bit_for_bit(runs, name):
    tail = {step: loss for step, loss in losses(runs / "fsdp").items() if step > HALF}
    assert losses(runs / name) == tail
    assert_equal_weights(runs / name, runs / "fsdp")


def test_one_process_goes_on_from_two(runs, text):
    half = runs / "fsdp" / f"step-{HALF:08d}"
    assert len(list((half / "optimizer").glob("*.distcp"))) == 2
    train.train(tiny_settings(text, runs / "fsdp-to-one", resume=half))
    assert_near(runs / "fsdp-to-one", runs / "one", HALF + 1)

    part = next((half / "optimizer").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"step-{HALF:08d}: not a readable checkpoint"):
        train.train(tiny_settings(text, runs / "torn", resume=half))
