"""Between text and tokens: bytes, or a tokenizer.json of the tokenizers library."""

import codecs
from collections.abc import Callable
from pathlib import Path

import numpy as np

from based_model.config import ConfigError

BYTE_VOCAB_SIZE = 256  # tokens of text are its bytes
SEPARATOR = 0  # the byte after every text; NUL is no part of one


class ByteText:
    """Tokens are the bytes of UTF-8 text; end_token stands after every text and so before one."""

    end_token = SEPARATOR
    vocab_size = BYTE_VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(text.encode())

    def encode_all(self, texts: bytes) -> np.ndarray:
        """The token ids (n,) of many texts, each with SEPARATOR behind it."""
        return np.frombuffer(texts, np.uint8)

    def decoder(self) -> Callable[[int | None], str]:
        """A function from one token after the other to the text it completes; None flushes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: (
            decoder.decode(b"", final=True) if token is None else decoder.decode(bytes([token]))
        )


class TokenizerText:
    """The same for the tokens of a tokenizer.json; end_token is None if it has no such token."""

    def __init__(self, path: Path, end_token: str):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(f"tokenizer: {error}; pip install tokenizers") from error
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(
                f"tokenizer: expected a tokenizer.json, got {path}: {error}"
            ) from error
        self.end_token = self.tokenizer.token_to_id(end_token)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: bytes) -> np.ndarray:
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        *whole, rest = texts.split(bytes([SEPARATOR]))
        rows = [np.array([*self.encode(text.decode()), self.end_token], dtype) for text in whole]
        return np.concatenate([*rows, np.array(self.encode(rest.decode()), dtype)])

    def decode_all(self, tokens: np.ndarray) -> bytes:
        """The inverse of encode_all, as far as the tokenizer's decoder is its encoder's inverse."""
        texts = np.split(tokens, np.flatnonzero(tokens == self.end_token) + 1)
        decoded = []
        for row in texts:
            ends = int(row[-1:].tolist() == [self.end_token])
            text = self.tokenizer.decode(row[: len(row) - ends].tolist()).encode()
            decoded.append(text + bytes([SEPARATOR]) * ends)
        return b"".join(decoded)

    def decoder(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: "" if token is None else stream.step(self.tokenizer, token) or ""


def text_to_train_on(tokenizer: Path | None, end_token: str) -> ByteText | TokenizerText:
    """Bytes, or the tokens of a tokenizer.json, which must have the end token (ConfigError)."""
    if tokenizer is None:
        return ByteText()
    text = TokenizerText(tokenizer, end_token)
    if text.end_token is None:
        raise ConfigError(f"end_token: expected a token of {tokenizer}, got {end_token!r}")
    return text


def text_of_model(
    vocab_size: int, tokenizer: Path | None = None, end_token: str = "<|endoftext|>"
) -> ByteText | TokenizerText:
    """How a model of so many tokens reads and writes text; ConfigError if the two do not match."""
    if tokenizer is not None:
        text = TokenizerText(tokenizer, end_token)
        if text.vocab_size > vocab_size:
            raise ConfigError(
                f"tokenizer: expected at most the model's {vocab_size} tokens, "
                f"got {text.vocab_size}"
            )
        return text
    if vocab_size != BYTE_VOCAB_SIZE:
        raise ConfigError(
            f"checkpoint: expected a byte-level model (vocab_size {BYTE_VOCAB_SIZE}) where no "
            f"tokenizer is given, got {vocab_size} tokens"
        )
    return ByteText()
