"""What to train on: byte tokens of text files or token memmaps, split, and cut into batches."""

import gzip
import hashlib
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from based_model.config import ConfigError

BYTE_VOCAB_SIZE = 256  # tokens of text are its bytes
SEPARATOR = 0  # stands after every file; NUL is no part of text
# Left out of the standard library: what is not part of it, and its tests, which are mostly data.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Token ids, (n,) of an unsigned type, of two texts that share no file: train and valid."""

    train: np.ndarray
    valid: np.ndarray
    vocab_size: int | None  # every id is below; None: not known, as for token memmaps
    train_files: tuple[Path, ...]
    valid_files: tuple[Path, ...]

    def __post_init__(self):
        if min(len(self.train), len(self.valid)) < 2:
            raise ConfigError(
                "data: expected text to train on and text to hold out, got "
                f"{len(self.train)} tokens of {len(self.train_files)} files and {len(self.valid)} "
                f"tokens of {len(self.valid_files)} files"
            )

    @property
    def is_bytes(self) -> bool:
        """Whether a token is a byte of text."""
        return self.vocab_size == BYTE_VOCAB_SIZE

    def fingerprint(self) -> str:
        """A hash of the sizes and of both ends of both texts, to tell another corpus from this."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.valid):
            digest.update(f"{len(tokens)} {tokens.dtype} ".encode())
            digest.update(tokens[: 1 << 20].tobytes() + tokens[-(1 << 20) :].tobytes())
        return digest.hexdigest()


def load_corpus(
    data: tuple[Path, ...] = (),
    valid_data: tuple[Path, ...] = (),
    valid_share: float = 0.05,
    token_dtype: str = "uint16",
) -> Corpus:
    """Reads text files and folders, or one .bin of raw token ids; nothing given: the stdlib.

    Held out is valid_data, or else valid_share of data: among text files those with the lowest
    hashes of their content, of a single file or .bin its tail. ConfigError on what cannot be read
    that way. A .bin is mapped, not loaded.
    """
    if any(path.suffix == ".bin" for path in (*data, *valid_data)):
        return _token_corpus(data, valid_data, valid_share, token_dtype)
    files = _text_files(data) if data else stdlib_files()
    if valid_data:
        held_out = _text_files(valid_data)
        train_files = [path for path in files if path not in set(held_out)]
        return _byte_corpus(train_files, held_out)
    if len(files) == 1:
        tokens = _read([files[0]])
        cut = round(len(tokens) * (1 - valid_share))
        names = (files[0],)
        return Corpus(tokens[:cut], tokens[cut:], BYTE_VOCAB_SIZE, names, names)
    held_out = {path for path in files if _hash_share(path) < valid_share}
    return _byte_corpus(
        [path for path in files if path not in held_out],
        [path for path in files if path in held_out],
    )


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The Python sources under root (default: this interpreter's standard library), sorted."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _text_files(paths: tuple[Path, ...]) -> list[Path]:
    """The named files, and the visible files without NUL bytes of the named folders, sorted."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.is_file())
            visible = [f for f in inside if not any(p[0] == "." for p in f.relative_to(path).parts)]
            files += [f for f in visible if SEPARATOR not in f.read_bytes()]
        elif not path.is_file():
            raise ConfigError(f"data: expected a file or folder, got {path}, which is neither")
        elif SEPARATOR in path.read_bytes():
            raise ConfigError(f"data: expected text, got {path}, which has NUL bytes in it")
        else:
            files.append(path)
    return list(dict.fromkeys(path.resolve() for path in files))


def _hash_share(path: Path) -> float:
    """A number in [0, 1) that the content of a file decides, so copies stay on one side."""
    return int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:6], "big") / 2**48


def _byte_corpus(train_files: list[Path], valid_files: list[Path]) -> Corpus:
    train, valid = _read(train_files), _read(valid_files)
    return Corpus(train, valid, BYTE_VOCAB_SIZE, tuple(train_files), tuple(valid_files))


def _read(files: list[Path]) -> np.ndarray:
    text = b"".join(path.read_bytes() + bytes([SEPARATOR]) for path in files)
    return np.frombuffer(text, np.uint8)


def _token_corpus(
    data: tuple[Path, ...], valid_data: tuple[Path, ...], valid_share: float, token_dtype: str
) -> Corpus:
    def mapped(path: Path) -> np.ndarray:
        size = np.dtype(token_dtype).itemsize
        if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % size:
            raise ConfigError(f"data: expected a file of whole {token_dtype} tokens, got {path}")
        return np.memmap(path, token_dtype, "r")

    paths = (*data, *valid_data)
    if len(data) != 1 or len(valid_data) > 1 or any(path.suffix != ".bin" for path in paths):
        names = " ".join(map(str, paths))
        raise ConfigError(f"data: expected one .bin, and at most one .bin held out, got {names}")
    tokens = mapped(data[0])
    if valid_data:
        return Corpus(tokens, mapped(valid_data[0]), None, data, valid_data)
    cut = round(len(tokens) * (1 - valid_share))
    return Corpus(tokens[:cut], tokens[cut:], None, data, data)


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

    def __iter__(self) -> "WindowSampler":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = self.rng.integers(len(self.tokens) - self.seqlen, size=self.batch_size)
        return _windows(self.tokens, starts, self.seqlen)

    def state_dict(self) -> dict:
        return self.rng.bit_generator.state

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = state


def valid_batches(
    tokens: np.ndarray, batch_size: int, seqlen: int
) -> Iterator[tuple[Tensor, Tensor]]:
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
