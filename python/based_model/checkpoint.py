"""Models and runs on disk: one folder per checkpoint, complete or not there at all.

    RUN/step-00000400/model.safetensors      the weights, tied embedding stored once
    RUN/step-00000400/config.json            the ModelConfig
    RUN/step-00000400/optimizer.safetensors  moments by parameter name, random generator
    RUN/step-00000400/training.json          step, settings, state of the data

The last two are what it takes to continue a run; to generate text the first two are enough.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from based_model.config import ModelConfig
from based_model.model import Based

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, torn, or not one of ours."""


@dataclass
class TrainingState:
    """What a run needs beside the weights: plain JSON values, and tensors by name."""

    values: dict
    tensors: dict[str, Tensor]


def save_checkpoint(
    run: Path, step: int, model: Based, training: TrainingState | None = None
) -> Path:
    """Writes RUN/step-N under a temporary name, syncs it to disk, then renames it."""
    from safetensors.torch import save_file

    final = run / f"step-{step:08d}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), partial / WEIGHTS)
    _write_json(partial / CONFIG, model.config.to_dict())
    if training is not None:
        save_file(_contiguous(training.tensors), partial / OPTIMIZER)
        _write_json(partial / TRAINING, training.values)
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    replaced = run / f".{final.name}.replaced"
    if final.exists():  # a rename cannot replace a folder with files in it
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _fsync(run)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def find_checkpoint(path: Path) -> Path:
    """path itself if it is a checkpoint, else the newest checkpoint of the run in path."""
    path = Path(path)
    if (path / CONFIG).exists():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"{path}: expected a checkpoint or a run with step-* folders in it")
    return checkpoints[-1]


def load_model(path: Path, device: torch.device | str = "cpu") -> Based:
    """The model of a checkpoint (or of a run's newest one), in eval mode."""
    path = find_checkpoint(path)

    def load():
        config = ModelConfig.from_dict(json.loads((path / CONFIG).read_text()))
        with torch.device("meta"):
            model = Based(config)
        model.load_state_dict(_load_tensors(path / WEIGHTS, device), assign=True)
        return model.eval()

    return _named_errors(path, load)


def load_training_values(path: Path) -> dict:
    """The JSON part of a checkpoint's TrainingState: step, settings, state of the data."""
    return _named_errors(path, lambda: json.loads((path / TRAINING).read_text()))


def load_training_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint's TrainingState."""
    return _named_errors(path, lambda: _load_tensors(path / OPTIMIZER, device))


def keep_newest(run: Path, count: int):
    """Deletes all checkpoints of a run but the newest ones."""
    for path in list_checkpoints(run)[:-count]:
        shutil.rmtree(path)


def set_aside_newer(checkpoint: Path) -> list[Path]:
    """Renames the checkpoints of a run that are newer than one to abandoned-*, and names them."""
    newer = [path for path in list_checkpoints(checkpoint.parent) if path.name > checkpoint.name]
    renamed = []
    for path in newer:
        target = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        renamed.append(path.rename(target))
    return renamed


def _named_errors(path: Path, load: Callable):
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error


def _load_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=str(device))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().contiguous() for name, x in tensors.items()}


def _write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=2) + "\n")


def _fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
