"""Sampling: a packed prefill of the prompts, then one recurrent decode step per token.

    python -m based_model.generate --checkpoint RUN --prompt "def main("

The memory in use does not grow with the length of the output.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from based_model.checkpoint import load_model
from based_model.cli import run_cli
from based_model.config import ConfigError
from based_model.data import BYTE_VOCAB_SIZE, SEPARATOR
from based_model.model import Based


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
    """Continues a prompt with a trained model and streams the text."""

    # A checkpoint, or a run folder, of which the newest checkpoint is taken.
    checkpoint: Path
    # Text to continue; empty starts a new file.
    prompt: str = ""
    # Tokens to generate at most.
    max_new_tokens: int = 500
    # Same seed, same text.
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens: expected >= 0, got {self.max_new_tokens}")


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
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"prompts: expected at least one token in each, got lengths {lengths}")
    packed = torch.cat(prompts)[None]
    cu_seqlens = torch.tensor([0, *lengths], device=packed.device).cumsum(0)
    logits, state = model.prefill(packed, cu_seqlens=cu_seqlens)
    for i in range(max_new_tokens):
        tokens = sample(logits, sampling, generator)
        yield tokens
        if i + 1 < max_new_tokens:
            logits = model.decode(tokens, state)


def stream_text(
    model: Based, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[str]:
    """Continues a text byte by byte, in pieces of whole characters, to the end of its file."""
    if model.config.vocab_size != BYTE_VOCAB_SIZE:
        raise ConfigError(
            f"checkpoint: expected a byte-level model (vocab_size {BYTE_VOCAB_SIZE}), got "
            f"{model.config.vocab_size} tokens"
        )
    device = model.embedding.weight.device
    prompt_bytes = prompt.encode() or bytes([SEPARATOR])
    tokens = torch.tensor(list(prompt_bytes), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model, [tokens], max_new_tokens, sampling, generator):
        if token.item() == SEPARATOR:
            break
        yield decoder.decode(bytes([token.item()]))
    yield decoder.decode(b"", final=True)


def run(config: GenerateConfig):
    model = load_model(config.checkpoint)
    print(config.prompt, end="", flush=True)
    for piece in stream_text(model, config.prompt, config.max_new_tokens, config, config.seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_cli(GenerateConfig, run, prog="python -m based_model.generate")
