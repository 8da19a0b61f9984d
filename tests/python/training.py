"""What the tests of the trainer share: a tiny model, a few files of text, quick settings."""

import random

import pytest
import torch

from based_model import PRESETS, ModelConfig
from based_model.checkpoint import load_model
from based_model.log import read_log
from based_model.settings import TrainConfig

TINY = ModelConfig(
    layers=("conv", "linear", "window"), d_model=32, mlp_dim=64, nheads=2, window=8, vocab_size=256
)
PRESETS["tiny"] = TINY


@pytest.fixture(name="one_thread", autouse=True)
def one_thread_fixture():
    """Tiny models are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_text(folder):
    """Forty files of simple made-up source text."""
    folder.mkdir()
    rng = random.Random(0)
    for i in range(40):
        lines = (f"def f{rng.randrange(9)}(x):\n    return x + {j}\n" for j in range(40))
        (folder / f"{i:02}.py").write_text(f"# file {i}\n" + "\n".join(lines))
    return folder


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    return make_text(tmp_path / "text")


def tiny_settings(text, out, **changes):
    values = {
        "data": (text,),
        "valid_share": 0.2,
        "preset": "tiny",
        "steps": 12,
        "batch_size": 4,
        "seqlen": 32,
        "warmup_steps": 5,
        "lr": 1e-2,
        "max_valid": 3000,
        "sample_tokens": 5,
        "threads": 1,
    }
    return TrainConfig(out=out, **{**values, **changes})


@pytest.fixture(name="settings")
def settings_fixture(folder):
    """Makes TrainConfigs of the made-up files: settings(out, **changes)."""
    return lambda out, **changes: tiny_settings(folder, out, **changes)


def losses(run):
    return {r["step"]: r["loss"] for r in read_log(run) if "loss" in r}


def weights(run):
    return load_model(run).state_dict()


def assert_equal_weights(run, other):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
