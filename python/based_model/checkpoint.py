"""Models on disk: one folder per checkpoint, complete or not there at all.

RUN/step-00000400/model.safetensors   the weights, tied embedding stored once
RUN/step-00000400/config.json         the ModelConfig
"""

import json
import os
import shutil
from pathlib import Path

import torch

from based_model.config import ModelConfig
from based_model.model import Based

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, torn, or not one of ours."""


def save_checkpoint(run: Path, step: int, model: Based) -> Path:
    """Writes RUN/step-N under a temporary name, syncs it to disk, then renames it."""
    from safetensors.torch import save_file

    final = run / f"step-{step:08d}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, partial / WEIGHTS)
    (partial / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    if final.exists():  # a rename cannot replace a folder with files in it
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(run)
    return final


def find_checkpoint(path: Path) -> Path:
    """path itself if it is a checkpoint, else the newest checkpoint of the run in path."""
    if (path / CONFIG).exists():
        return path
    steps = sorted(path.glob("step-*"))
    if not steps:
        raise CheckpointError(f"{path}: expected a checkpoint or a run with step-* folders in it")
    return steps[-1]


def load_model(path: Path, device: torch.device | str = "cpu") -> Based:
    """The model of a checkpoint (or of a run's newest one), in eval mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_checkpoint(Path(path))
    try:
        config = ModelConfig.from_dict(json.loads((path / CONFIG).read_text()))
        weights = load_file(path / WEIGHTS, device=str(device))
        with torch.device("meta"):
            model = Based(config)
        model.load_state_dict(weights, assign=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    return model.eval()


def _fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
