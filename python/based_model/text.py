"""Between text and tokens: bytes, or a tokenizer.json of the tokenizers library."""

import codecs
from collections.abc import Callable
from pathlib import Path

from based_model.config import ConfigError
from based_model.data import BYTE_VOCAB_SIZE, SEPARATOR


class ByteText:
    """Tokens are the bytes of UTF-8 text; end_token stands after every text and so before one."""

    end_token = SEPARATOR

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(text.encode())

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

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decoder(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: "" if token is None else stream.step(self.tokenizer, token) or ""


def text_of_model(
    vocab_size: int, tokenizer: Path | None = None, end_token: str = "<|endoftext|>"
) -> ByteText | TokenizerText:
    """How a model of so many tokens reads and writes text; ConfigError if the two do not match."""
    if tokenizer is not None:
        text = TokenizerText(tokenizer, end_token)
        if (size := text.tokenizer.get_vocab_size()) > vocab_size:
            raise ConfigError(
                f"tokenizer: expected at most the model's {vocab_size} tokens, got {size}"
            )
        return text
    if vocab_size != BYTE_VOCAB_SIZE:
        raise ConfigError(
            f"checkpoint: expected a byte-level model (vocab_size {BYTE_VOCAB_SIZE}) where no "
            f"tokenizer is given, got {vocab_size} tokens"
        )
    return ByteText()
