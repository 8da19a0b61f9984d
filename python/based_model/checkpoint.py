"""Models and runs on disk: one folder per checkpoint, complete or not there at all.

    RUN/step-00000400/model.safetensors      the weights, tied embedding stored once
    RUN/step-00000400/config.json            the ModelConfig
    RUN/step-00000400/tokenizer.json         of a model whose tokens are not bytes
    RUN/step-00000400/optimizer.safetensors  moments by parameter name, random generator
    RUN/step-00000400/training.json          step, settings, state of the data

The last two are what it takes to continue a run; to generate text the others are enough. Where the
optimizer is spread over several processes, each writes its part into a folder `optimizer` instead
(torch.distributed.checkpoint). Any number of processes can continue from either.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from based_model.config import ModelConfig
from based_model.model import Based
from based_model.parallel import current_ranks, spread_like, whole

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
OPTIMIZER, OPTIMIZER_PARTS, TRAINING = "optimizer.safetensors", "optimizer", "training.json"
TRAINING_KEYS = {"step", "settings", "batches", "text"}


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, torn, or not one of ours."""


@dataclass
class TrainingState:
    """What a run needs beside the weights: plain JSON values, and tensors by name."""

    values: dict
    tensors: dict[str, Tensor]


def save_checkpoint(
    run: Path,
    step: int,
    model: Based,
    training: TrainingState | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Writes RUN/step-N under a temporary name, syncs it to disk, then renames it.

    All ranks of a run call this together; they need to see the same disk.
    """
    from safetensors.torch import save_file

    ranks = current_ranks()
    final = run / f"step-{step:08d}"
    partial = run / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    tensors = {} if training is None else training.tensors
    in_parts = any(isinstance(x, DTensor) for x in tensors.values())
    if in_parts:
        dcp.save(tensors, checkpoint_id=partial / OPTIMIZER_PARTS)
    weights = {}
    for name, x in model.state_dict().items():
        x = whole(x)
        if ranks.is_main:
            weights[name] = x.detach().cpu().contiguous()
    if ranks.is_main:
        save_file(weights, partial / WEIGHTS)
        _write_json(partial / CONFIG, model.config.to_dict())
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER)
        if training is not None:
            _write_json(partial / TRAINING, training.values)
            if not in_parts:
                save_file(_contiguous(tensors), partial / OPTIMIZER)
        for path in (*partial.rglob("*"), partial):
            _fsync(path)
        _replace_folder(partial, final)
    ranks.wait()
    return final


def _replace_folder(new: Path, final: Path):
    """Renames new to final; a rename alone cannot replace a folder with files in it."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    new.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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


def saved_tokenizer(path: Path) -> Path | None:
    """The tokenizer.json of a checkpoint (or of a run's newest one), if it has one."""
    file = find_checkpoint(path) / TOKENIZER
    return file if file.exists() else None


def load_config(path: Path) -> ModelConfig:
    """The shape of a checkpoint's model."""
    return _named_errors(
        path, lambda: ModelConfig.from_dict(json.loads((path / CONFIG).read_text()))
    )


def load_model(path: Path, device: torch.device | str = "cpu") -> Based:
    """The model of a checkpoint (or of a run's newest one), in eval mode."""
    path = find_checkpoint(path)

    with torch.device("meta"):
        model = Based(load_config(path))

    def load():
        model.load_state_dict(_load_tensors(path / WEIGHTS, device), assign=True)
        return model.eval()

    return _named_errors(path, load)


def load_training_values(path: Path) -> dict:
    """The JSON part of a checkpoint's TrainingState: step, settings, state of the data."""

    def load():
        values = json.loads((path / TRAINING).read_text())
        if not isinstance(values, dict) or values.keys() != TRAINING_KEYS:
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"{TRAINING}: expected the keys {sorted(TRAINING_KEYS)}, got {got}")
        return values

    return _named_errors(path, load)


def load_training_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's TrainingState, spread over the ranks as those of like are.

    The tensors of like may be overwritten. CheckpointError if one has no counterpart on disk.
    """

    def load():
        if (path / OPTIMIZER_PARTS).is_dir():
            with warnings.catch_warnings():  # a single process is no reason for one
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(like, checkpoint_id=path / OPTIMIZER_PARTS)
            return like
        saved = _load_tensors(path / OPTIMIZER, "cpu")
        for name, x in like.items():
            if (shape := saved[name].shape) != x.shape:
                raise ValueError(f"{name}: expected {tuple(x.shape)}, got {tuple(shape)}")
        return {name: spread_like(saved[name].to(x.device), x) for name, x in like.items()}

    return _named_errors(path, load)


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
    from torch.distributed.checkpoint.api import CheckpointException

    readable = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException)
    try:
        return load()
    except readable as error:
        older = [p for p in list_checkpoints(path.parent) if p.name < path.name]
        hint = f"; the one before is {older[-1]}" if older else ""
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}{hint}") from error


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
