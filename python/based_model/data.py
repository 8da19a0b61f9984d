"""What to train on: text files as tokens, or token memmaps, split, and cut into batches."""

import gzip
import hashlib
import lzma
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from based_model.config import ConfigError
from based_model.text import SEPARATOR, ByteText, TokenizerText

# Left out of the standard library: what is not part of it, and its tests, which are mostly data.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Token ids, (n,) of an unsigned type, of two texts that share no file: train and valid."""

    train: np.ndarray
    valid: np.ndarray
    vocab_size: int | None  # every id is below; None: not known, as of a .bin alone
    train_files: tuple[Path, ...]
    valid_files: tuple[Path, ...]
    valid_text: bytes | None = None  # what valid stands for; None: not known

    def __post_init__(self):
        if min(len(self.train), len(self.valid)) < 2:
            raise ConfigError(
                "data: expected text to train on and text to hold out, got "
                f"{len(self.train)} tokens of {len(self.train_files)} files and {len(self.valid)} "
                f"tokens of {len(self.valid_files)} files"
            )

    def bits_per_byte(self, loss: float) -> float:
        """The nats per token of valid as bits per byte of valid_text."""
        return loss / math.log(2) * len(self.valid) / len(self.valid_text)

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
    text: ByteText | TokenizerText | None = None,
    max_valid: int | None = None,
) -> Corpus:
    """Reads text files and folders, or one .bin of raw token ids; nothing given: the stdlib.

    Held out is valid_data, or else valid_share of data: among text files those with the lowest
    hashes of their content, of a single file or .bin its tail. Of that the first max_valid bytes,
    or tokens of a .bin, are kept. text makes tokens of text (default: bytes). ConfigError on what
    cannot be read that way. A .bin is mapped, not loaded.
    """
    text = text or ByteText()
    if any(path.suffix == ".bin" for path in (*data, *valid_data)):
        return _bin_corpus(data, valid_data, valid_share, token_dtype, text, max_valid)
    files = _text_files(data) if data else stdlib_files()
    if valid_data:
        valid_files = _text_files(valid_data)
        train_files = [path for path in files if path not in set(valid_files)]
    elif len(files) == 1:
        train_files = valid_files = files
    else:
        held_out = {path for path in files if _hash_share(path) < valid_share}
        train_files = [path for path in files if path not in held_out]
        valid_files = [path for path in files if path in held_out]
    train, valid = _read(train_files, text), _read(valid_files, text)
    if train_files is valid_files:
        train, valid = _cut(train, round(len(train) * (1 - valid_share)))
    valid = valid if max_valid is None else _cut(valid, max_valid)[0]
    return Corpus(
        text.encode_all(train),
        text.encode_all(valid),
        text.vocab_size,
        tuple(train_files),
        tuple(valid_files),
        valid,
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


def _read(files: list[Path], text: ByteText | TokenizerText) -> bytes:
    """All files, SEPARATOR after each."""
    contents = [path.read_bytes() for path in files]
    if isinstance(text, TokenizerText):
        for path, content in zip(files, contents, strict=True):
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(f"data: expected UTF-8 text, got {path}: {error}") from error
    return b"".join(content + bytes([SEPARATOR]) for content in contents)


def _cut(text: bytes, size: int) -> tuple[bytes, bytes]:
    """Two parts, the first of about so many bytes: no character of UTF-8 is cut in two."""
    while size < len(text) and text[size] & 0xC0 == 0x80:
        size += 1
    return text[:size], text[size:]


def _bin_corpus(
    data: tuple[Path, ...],
    valid_data: tuple[Path, ...],
    valid_share: float,
    token_dtype: str,
    text: ByteText | TokenizerText,
    max_valid: int | None,
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
    train = mapped(data[0])
    if valid_data:
        valid = mapped(valid_data[0])
    else:
        cut = round(len(train) * (1 - valid_share))
        train, valid = train[:cut], train[cut:]
    valid, files = valid[:max_valid], (data, valid_data or data)
    if isinstance(text, TokenizerText):
        return Corpus(train, valid, text.vocab_size, *files, text.decode_all(valid))
    return Corpus(train, valid, None, *files)


class WindowSampler:
    """Endless batches of random windows: next() gives inputs and targets, (B,T) int64 each.

    targets are inputs one token later. The order depends on the seed alone; state_dict() is
    plain JSON data with which another sampler over the same tokens continues exactly.

    Of every batch of batch_size windows this one gives the share of one rank of several, which
    all draw the same batch: so any number of ranks that divides it can go on from a state.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        seqlen: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        if len(tokens) <= seqlen:
            raise ConfigError(
                f"seqlen: expected fewer than the {len(tokens)} tokens to train on, got {seqlen}"
            )
        self.tokens, self.batch_size, self.seqlen = tokens, batch_size, seqlen
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.share = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)

    def __iter__(self) -> "WindowSampler":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = self.rng.integers(len(self.tokens) - self.seqlen, size=self.batch_size)
        return _windows(self.tokens, starts[self.share], self.seqlen)

    def state_dict(self) -> dict:
        return self.rng.bit_generator.state

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = state


def valid_batches(
    tokens: np.ndarray, batch_size: int, seqlen: int, every: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walks tokens once in windows side by side, so that every token but the first is a target.

    Yields (inputs, targets), (B,T) int64; the last window is one of its own if it is shorter. Of
    the whole windows only one in `every` is taken, and then not that last one.
    """
    whole = (len(tokens) - 1) // seqlen
    starts = np.arange(0, whole, every) * seqlen
    for i in range(0, len(starts), batch_size):
        yield _windows(tokens, starts[i : i + batch_size], seqlen)
    if (rest := (len(tokens) - 1) % seqlen) and (every == 1 or not whole):
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
