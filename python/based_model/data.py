"""Text to train on: byte tokens, a held-out split by file, and random windows as batches."""

import gzip
import hashlib
import lzma
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from based_model.config import ConfigError

VOCAB_SIZE = 256  # tokens are bytes
SEPARATOR = 0  # stands after every file; NUL is no part of text
# Left out of the standard library: what is not part of it, and its tests, which are mostly data.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Token ids of two texts that share no file: train and valid, each (n,) uint8."""

    train: np.ndarray
    valid: np.ndarray
    train_files: tuple[Path, ...]
    valid_files: tuple[Path, ...]


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The Python sources under root (default: this interpreter's standard library), sorted."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def load_corpus(files: list[Path], valid_share: float = 0.05) -> Corpus:
    """Reads files in the given order, each followed by SEPARATOR, into a train and a valid text.

    A file is held out when the hash of its content falls into the lowest valid_share of hashes:
    the choice depends on nothing else, and copies of one file stay on one side. ConfigError if
    either side ends up empty.
    """
    texts = {"train": [], "valid": []}
    paths = {"train": [], "valid": []}
    for path in files:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        held_out = int.from_bytes(digest[:8], "big") < valid_share * 2**64
        side = "valid" if held_out else "train"
        texts[side].append(content + bytes([SEPARATOR]))
        paths[side].append(path)
    for side, contents in texts.items():
        if not contents:
            raise ConfigError(
                f"corpus: expected files on both sides of the split, got no {side} file among "
                f"{len(files)} files with valid_share {valid_share}"
            )
    train, valid = (np.frombuffer(b"".join(texts[side]), np.uint8) for side in texts)
    return Corpus(train, valid, tuple(paths["train"]), tuple(paths["valid"]))


class WindowSampler:
    """Endless batches of random windows: next() gives inputs and targets, (B,T) int64 each.

    targets are inputs one token later. The order depends on the seed alone; state_dict() is
    plain JSON data with which another sampler over the same tokens continues exactly.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seqlen: int, seed: int):
        if len(tokens) <= seqlen:
            raise ConfigError(
                f"seqlen: expected fewer than the {len(tokens)} tokens to train on, got {seqlen}"
            )
        self.tokens, self.batch_size, self.seqlen = tokens, batch_size, seqlen
        self.rng = np.random.Generator(np.random.PCG64(seed))

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = self.rng.integers(len(self.tokens) - self.seqlen, size=self.batch_size)
        return _windows(self.tokens, starts, self.seqlen)

    def state_dict(self) -> dict:
        return self.rng.bit_generator.state

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = state


def valid_batches(tokens: np.ndarray, batch_size: int, seqlen: int):
    """Walks tokens once in windows side by side, so that every token but the first is a target.

    Yields (inputs, targets), (B,T) int64; the last window is one of its own if it is shorter.
    """
    whole = (len(tokens) - 1) // seqlen
    starts = np.arange(whole) * seqlen
    for i in range(0, whole, batch_size):
        yield _windows(tokens, starts[i : i + batch_size], seqlen)
    if rest := (len(tokens) - 1) % seqlen:
        yield _windows(tokens, np.array([whole * seqlen]), rest)


def _windows(tokens: np.ndarray, starts: np.ndarray, seqlen: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[start : start + seqlen + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors make of the same text: {'gzip': ..., 'xz': ...} at their best."""
    sizes = {
        "gzip": len(gzip.compress(text, compresslevel=9)),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
