"""What a model made of the texts it has read, in memory and as one safetensors file.

The file holds a ModelState and the logits of the next token, and names the model that wrote it. It
is written under a temporary name, synced, then renamed: it is complete or not there at all.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from based_model.checkpoint import CheckpointError
from based_model.config import ConfigError, ModelConfig
from based_model.model import Based, ModelState

FORMAT = "based_model state 2"


@dataclass
class Prefix:
    """N texts that were read: the model's state, and the logits (N,vocab_size) of what follows."""

    state: ModelState
    logits: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def fork(self, copies: int) -> "Prefix":
        """Every text `copies` times, one copy after the other, sharing no memory with this."""

        def repeat(x: Tensor) -> Tensor:
            return x.repeat_interleave(copies, 0)

        self.state.fold()
        layers = [tuple(repeat(x) for x in layer) for layer in self.state.layers]
        return Prefix(ModelState(layers, repeat(self.state.positions)), repeat(self.logits))

    def rows(self) -> list["Prefix"]:
        """Every text as a Prefix of its own, which shares memory with this."""
        self.state.fold()
        return [
            Prefix(
                ModelState(
                    [tuple(x[i : i + 1] for x in layer) for layer in self.state.layers],
                    self.state.positions[i : i + 1],
                ),
                self.logits[i : i + 1],
            )
            for i in range(len(self))
        ]


def save_prefix(path: Path, prefix: Prefix, model: Based):
    """Writes a Prefix of this model, replacing what is at path."""
    from safetensors.torch import save

    prefix.state.fold()
    tensors = {"logits": prefix.logits, "positions": prefix.state.positions}
    for i, layer in enumerate(prefix.state.layers):
        tensors |= {f"layers.{i}.{j}": x for j, x in enumerate(layer)}
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(save(tensors, _identity(model)))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_prefix(path: Path, model: Based) -> Prefix:
    """Reads what save_prefix wrote, to the model's device.

    CheckpointError if the file is missing, torn, or something else; ConfigError if another model
    wrote it, be it of another shape, of another dtype or with other weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(model.embedding.weight.device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: expected a file of format {FORMAT!r}, got {metadata.get('format')!r}"
                )
            _check_identity(path, metadata, model)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable state: {error}") from error
    layers = []
    for i in range(len(model.layers)):
        names = [name for name in tensors if name.startswith(f"layers.{i}.")]
        layers.append(tuple(tensors[f"layers.{i}.{j}"] for j in range(len(names))))
    return Prefix(ModelState(layers, tensors["positions"]), tensors["logits"])


def _identity(model: Based) -> dict[str, str]:
    """What the states of two models share only if one can continue the other's."""
    # Every training step moves the final norm and the embedding; a few rows tell weights apart.
    digest = hashlib.sha256()
    for weight in (model.norm.weight, model.embedding.weight[:16]):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "format": FORMAT,
        "config": json.dumps(model.config.to_dict()),
        "dtype": str(model.embedding.weight.dtype),
        "weights": digest.hexdigest(),
    }


def _check_identity(path: Path, metadata: dict[str, str], model: Based):
    def settings(identity: dict[str, str]) -> dict:
        config = ModelConfig.from_dict(json.loads(identity["config"]))
        return {**config.to_dict(), "dtype": identity["dtype"], "weights": identity["weights"]}

    theirs = settings(metadata)
    for name, expected in settings(_identity(model)).items():
        if theirs[name] != expected:
            raise ConfigError(
                f"{path}: {name}: expected a state of this model ({expected}), got {theirs[name]}"
            )
