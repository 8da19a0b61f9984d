"""Generation: a packed prefill of the prompts, then one recurrent decode step per token.

    python -m based_model.generate --checkpoint RUN --prompt "def main("

The memory in use does not grow with the length of the output, attention layers aside.
"""

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from based_model.checkpoint import load_model, saved_tokenizer
from based_model.cli import Repeatable, run_cli
from based_model.config import ConfigError
from based_model.engine import Engine
from based_model.model import Based
from based_model.sampling import Draws, Sampling, sample
from based_model.state_file import Prefix, load_prefix, save_prefix
from based_model.text import ByteText, TokenizerText, text_of_model


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
    # Type of the weights and of what they compute; states of one are not those of the other.
    precision: Literal["fp32", "bf16"] = "fp32"

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
    model: Based, prefix: Prefix, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """The plain loop: yields the next token of every text, (N,) int64, max_new_tokens times.

    prefix moves on in place, one token behind: the newest is read when the next is asked for.
    """
    if prefix.logits.is_cuda and len(prefix) * model.config.nheads >= 2048:
        model.defer_writes(prefix.state)  # measured faster where the states fill the GPU
    draws = Draws.greedy(len(prefix), prefix.logits.device)
    for row, own in enumerate(seeds(seed, len(prefix))):
        draws.set(row, sampling, own)
    for i in range(max_new_tokens):
        tokens = sample(prefix.logits, draws, prefix.state.positions, sampling.restricted)
        yield tokens
        if i + 1 < max_new_tokens:
            prefix.logits = model.decode(tokens, prefix.state)


def seeds(seed: int, rows: int) -> list[int]:
    """One seed of its own for every row."""
    source = random.Random(seed)
    return [source.getrandbits(63) for _ in range(rows)]


def continue_tokens(
    model: Based,
    prefix: Prefix,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    end_token: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of every text, None behind its end_token, until all have ended.

    On a GPU by the Engine, which leaves prefix as it is; elsewhere by the plain loop.
    """
    if not max_new_tokens:
        return
    if prefix.logits.is_cuda:
        steps = _engine_steps(model, prefix, max_new_tokens, sampling, seed, end_token)
    else:
        plain = continue_prefix(model, prefix, max_new_tokens, sampling, seed)
        steps = (tokens.tolist() for tokens in plain)
    ended = [False] * len(prefix)
    for tokens in steps:
        yield [None if end else token for end, token in zip(ended, tokens, strict=True)]
        ended = [end or token == end_token for end, token in zip(ended, tokens, strict=True)]
        if all(ended):
            break


def _engine_steps(
    model: Based,
    prefix: Prefix,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    end_token: int | None,
) -> Iterator[list[int | None]]:
    context = int(prefix.state.positions.max()) + max_new_tokens
    engine = Engine(model, len(prefix), context=context)
    requests = [
        engine.add(row, max_new_tokens, sampling, seed=own, end_token=end_token)
        for row, own in zip(prefix.rows(), seeds(seed, len(prefix)), strict=True)
    ]
    for i in range(max_new_tokens):
        while any(len(r.tokens) <= i and not r.finished for r in requests):
            engine.step()
        yield [r.tokens[i] if i < len(r.tokens) else None for r in requests]


def generate(
    model: Based, prompts: list[Tensor], max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[list[int]]:
    """Yields the next token of every prompt, max_new_tokens times.

    prompts are (T_i,) int64 of any lengths >= 1; they are read in one packed prefill.
    """
    yield from continue_tokens(model, read_prompts(model, prompts), max_new_tokens, sampling, seed)


def continue_text(
    model: Based,
    text: ByteText | TokenizerText,
    prefix: Prefix,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[list[str]]:
    """continue_tokens() as text: pieces of whole characters, each text to its end token."""
    end_token = text.end_token
    decoders = [text.decoder() for _ in range(len(prefix))]
    for tokens in continue_tokens(model, prefix, max_new_tokens, sampling, seed, end_token):
        rows = zip(decoders, tokens, strict=True)
        yield ["" if token in (None, end_token) else decoder(token) for decoder, token in rows]
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
    if config.precision == "bf16":
        model.to(torch.bfloat16)
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
        read = prefix.state.positions.tolist()

        def size(tokens: int) -> int:
            """Bytes of state after so many; on a GPU the part in use of what the engine holds."""
            if prefix.logits.is_cuda:
                return sum(model.state_size(before + tokens) for before in read)
            return prefix.state.nbytes()

        steps = _with_reports(steps, size, config.report_every)
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


def _with_reports(
    steps: Iterator[list[str]], size: Callable[[int], int], every: int
) -> Iterator[list[str]]:
    """steps as they are, with the state's size and the time per token on standard error."""
    started = time.perf_counter()
    for i, pieces in enumerate(steps, 1):
        yield pieces
        if i % every == 0:
            now = time.perf_counter()
            ms = 1e3 * (now - started) / every
            held = f"{size(i):,} bytes of state"
            print(f"\n[{i} tokens: {held}, {ms:.2f} ms per token]", file=sys.stderr)
            started = now


def main():
    """The command line."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `generate | head` ends with head
    run_cli(GenerateConfig, run, prog="python -m based_model.generate", packages=("safetensors",))


if __name__ == "__main__":
    main()
