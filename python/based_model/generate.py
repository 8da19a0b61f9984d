"""Sampling: a packed prefill of the prompts, then one recurrent decode step per token.

    python -m based_model.generate --checkpoint RUN --prompt "def main("

The memory in use does not grow with the length of the output, attention layers aside.
"""

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from based_model.checkpoint import load_model, saved_tokenizer
from based_model.cli import Repeatable, run_cli
from based_model.config import ConfigError
from based_model.model import Based
from based_model.state_file import Prefix, load_prefix, save_prefix
from based_model.text import ByteText, TokenizerText, text_of_model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. ConfigError on values that make no distribution."""

    # 0 takes the likeliest token, below 1 sharpens, above 1 flattens.
    temperature: float = 0.8
    # Keep only this many of the likeliest tokens; 0 keeps all.
    top_k: int = 0
    # Keep the smallest set of tokens with at least this probability in total; 1 keeps all.
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Continues prompts with a trained model; the text of a single one appears as it is made."""

    # A checkpoint, or a run folder, of which the newest checkpoint is taken.
    checkpoint: Path
    # Text to continue, - for standard input; may be repeated. Empty or none starts a new file.
    prompt: Annotated[tuple[str, ...], Repeatable] = ()
    # A file with one more prompt in every line, - for standard input; empty lines are skipped.
    prompts_file: Path | None = None
    # Continuations of every prompt, which is read once.
    samples: int = 1
    # Tokens to generate at most.
    max_new_tokens: int = 500
    # Same seed, same text.
    seed: int = 0
    # Tokens between two lines on standard error about the size of the state and the time per
    # token; 0 prints none.
    report_every: int = 0
    # Where to write the state after the prompts, to continue from another time.
    save_state: Path | None = None
    # A state to start from instead of an empty one; the prompts follow what it has read.
    load_state: Path | None = None
    # The tokenizer.json of a model whose tokens are not bytes; default: its checkpoint's own.
    tokenizer: Path | None = None
    # The tokenizer's token that ends a text.
    end_token: str = "<|endoftext|>"
    # Where to run: cpu, cuda, cuda:1 ...
    device: str = "cpu"

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens: expected >= 0, got {self.max_new_tokens}")
        if self.report_every < 0:
            raise ConfigError(f"report_every: expected >= 0, got {self.report_every}")
        if self.samples < 1:
            raise ConfigError(f"samples: expected >= 1, got {self.samples}")

    def prompts(self) -> list[str]:
        """All prompts as given; what is no UTF-8 becomes U+FFFD."""
        prompts = [_read_text(Path("-")) if prompt == "-" else prompt for prompt in self.prompt]
        if self.prompts_file is not None:
            prompts += [line for line in _read_text(self.prompts_file).split("\n") if line]
        # Bytes of the command line that are no text come as lone surrogates.
        return [p.encode(errors="surrogateescape").decode(errors="replace") for p in prompts]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token per row: logits (N,vocab_size) -> (N,) int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, tokens = (logits.float() / sampling.temperature).sort(-1, descending=True)
    probs = logits.softmax(-1)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
    # A token stays if those ahead of it have not yet reached top_p; the first always stays.
    ahead = probs.cumsum(-1) - probs
    probs[ahead >= sampling.top_p * probs.sum(-1, keepdim=True)] = 0
    return tokens.gather(-1, probs.multinomial(1, generator=generator))[:, 0]


def read_prompts(model: Based, prompts: list[Tensor], prefix: Prefix | None = None) -> Prefix:
    """Reads prompts, (T_i,) int64 of any lengths, in one packed prefill.

    prefix is what came before them, one text for all or one for each, and is left as it is; only
    after it may a prompt be empty. ConfigError on other lengths.
    """
    lengths = [len(prompt) for prompt in prompts]
    if prefix is None:
        if not lengths or min(lengths) < 1:
            raise ConfigError(f"prompts: expected at least one token in each, got {lengths} tokens")
    elif len(prefix) not in (1, len(lengths)):
        raise ConfigError(
            f"prompts: expected one for each of the {len(prefix)} texts of the state, or none, "
            f"got {len(lengths)}"
        )
    else:
        prefix = prefix.fork(len(lengths) // len(prefix))
        if not any(lengths):
            return prefix
    packed = torch.cat(prompts)[None]
    ends = torch.tensor([0, *lengths], device=packed.device).cumsum(0)
    logits, state = model.prefill(packed, None if prefix is None else prefix.state, ends)
    if prefix is not None:
        logits = torch.where((ends.diff() > 0)[:, None], logits, prefix.logits)
    return Prefix(state, logits)


def continue_prefix(
    model: Based,
    prefix: Prefix,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every text, (N,) int64, max_new_tokens times.

    prefix moves on in place, one token behind: the newest is read when the next is asked for.
    """
    if prefix.logits.is_cuda and len(prefix) * model.config.nheads >= 2048:
        model.defer_writes(prefix.state)  # measured faster where the states fill the GPU
    for i in range(max_new_tokens):
        tokens = sample(prefix.logits, sampling, generator)
        yield tokens
        if i + 1 < max_new_tokens:
            prefix.logits = model.decode(tokens, prefix.state)


def generate(
    model: Based,
    prompts: list[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, (N,) int64, max_new_tokens times.

    prompts are (T_i,) int64 of any lengths >= 1; they are read in one packed prefill.
    """
    prefix = read_prompts(model, prompts)
    yield from continue_prefix(model, prefix, max_new_tokens, sampling, generator)


def continue_text(
    model: Based,
    text: ByteText | TokenizerText,
    prefix: Prefix,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[list[str]]:
    """continue_prefix() as text: pieces of whole characters, each text to its end token."""
    generator = torch.Generator(prefix.logits.device).manual_seed(seed)
    decoders = [text.decoder() for _ in range(len(prefix))]
    ended = [False] * len(prefix)
    for tokens in continue_prefix(model, prefix, max_new_tokens, sampling, generator):
        tokens = tokens.tolist()
        ended = [e or t == text.end_token for e, t in zip(ended, tokens, strict=True)]
        if all(ended):
            break
        rows = zip(ended, decoders, tokens, strict=True)
        yield ["" if done else decoder(token) for done, decoder, token in rows]
    yield [decoder(None) for decoder in decoders]


def stream_text(
    model: Based,
    text: ByteText | TokenizerText,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Continues one text token by token, in pieces of whole characters, to its end."""
    prefix = read_prompts(model, _encode(model, text, [prompt], after_end=True))
    for (piece,) in continue_text(model, text, prefix, max_new_tokens, sampling, seed):
        yield piece


def _encode(
    model: Based, text: ByteText | TokenizerText, prompts: list[str], after_end: bool
) -> list[Tensor]:
    """The prompts as tokens; where no state precedes, an empty one becomes the end of another."""
    empty = [text.end_token] if after_end and text.end_token is not None else []
    device = model.embedding.weight.device
    rows = [text.encode(prompt) or empty for prompt in prompts]
    return [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]


def _read_text(path: Path) -> str:
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    return data.decode(errors="replace")


def run(config: GenerateConfig):
    prompts = config.prompts()
    model = load_model(config.checkpoint, config.device)
    tokenizer = config.tokenizer or saved_tokenizer(config.checkpoint)
    text = text_of_model(model.config.vocab_size, tokenizer, config.end_token)
    prefix = None if config.load_state is None else load_prefix(config.load_state, model)
    prompts = prompts or [""] * (1 if prefix is None else len(prefix))
    tokens = _encode(model, text, prompts, after_end=prefix is None)
    prefix = read_prompts(model, tokens, prefix)
    if config.save_state is not None:
        save_prefix(config.save_state, prefix, model)
        size = config.save_state.stat().st_size
        print(f"{config.save_state}: {size:,} bytes of state", file=sys.stderr)
    if config.max_new_tokens:
        _print_texts(config, model, text, prompts, prefix.fork(config.samples))


def _print_texts(
    config: GenerateConfig,
    model: Based,
    text: ByteText | TokenizerText,
    prompts: list[str],
    prefix: Prefix,
):
    steps = continue_text(model, text, prefix, config.max_new_tokens, config, config.seed)
    if config.report_every:
        steps = _with_reports(steps, prefix, config.report_every)
    if len(prefix) == 1:
        print(prompts[0], end="", flush=True)
        for (piece,) in steps:
            print(piece, end="", flush=True)
        print()
        return
    texts = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    for i, continuation in enumerate(texts):
        prompt, copy = divmod(i, config.samples)
        if copy == 0:
            print(f"===== prompt {prompt + 1}\n{prompts[prompt]}")
        print(f"----- continuation {copy + 1}\n{continuation}")


def _with_reports(steps: Iterator[list[str]], prefix: Prefix, every: int) -> Iterator[list[str]]:
    """steps as they are, with the state's size and the time per token on standard error."""
    started = time.perf_counter()
    for i, pieces in enumerate(steps, 1):
        yield pieces
        if i % every == 0:
            now = time.perf_counter()
            ms = 1e3 * (now - started) / every
            size = f"{prefix.state.nbytes():,} bytes of state"
            print(f"\n[{i} tokens: {size}, {ms:.2f} ms per token]", file=sys.stderr)
            started = now


def main():
    """The command line."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `generate | head` ends with head
    run_cli(GenerateConfig, run, prog="python -m based_model.generate", packages=("safetensors",))


if __name__ == "__main__":
    main()
