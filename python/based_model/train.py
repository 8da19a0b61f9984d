"""Trains a byte-level Based model on the Python standard library's own sources.

    python -m based_model.train

The recipe is the paper's (AdamW, warm-up, cosine, clipping) at a size that two CPU cores finish
in minutes. At the end it prints bits per byte on held-out files, and a generated sample.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from based_model.checkpoint import save_checkpoint
from based_model.cli import run_cli
from based_model.config import PRESETS, ConfigError, ModelConfig
from based_model.data import (
    VOCAB_SIZE,
    WindowSampler,
    compressed_bits_per_byte,
    load_corpus,
    stdlib_files,
    valid_batches,
)
from based_model.generate import Sampling, stream_text
from based_model.model import Based


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; the same values give the same run."""

    # Folder of the run, for checkpoints; default runs/<date and time>.
    out: Path | None = None
    # Name of a model preset (based_model.config.PRESETS).
    preset: str = "based-cpu"
    # Width of q and k before the feature map: more recall for a larger state. Default: preset's.
    feature_dim: int | None = None
    # Keys that a sliding-window layer sees: more recall for a larger state. Default: preset's.
    window: int | None = None

    # Optimizer steps.
    steps: int = 400
    # Windows of text per step.
    batch_size: int = 16
    # Tokens per window.
    seqlen: int = 256
    # Highest learning rate, reached after the warm-up.
    lr: float = 3e-3
    # Lowest learning rate, reached at the last step along a cosine.
    min_lr: float = 1e-4
    # Steps of linear warm-up.
    warmup_steps: int = 40
    # AdamW's, on every matrix but the embedding.
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    # Largest norm of the gradient; a longer one is scaled down to it.
    clip: float = 1.0

    # Seed of the weights, the batches and the sample.
    seed: int = 0
    # CPU threads; default: all that torch sees.
    threads: int | None = None
    # Share of the files that is held out, chosen by their hash.
    valid_share: float = 0.05
    # Steps between two looks at a part of the held-out text.
    eval_every: int = 100
    # Bytes of text to generate at the end.
    sample_bytes: int = 400
    # What the sample starts from.
    sample_prompt: str = "import os\n\ndef "

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {self.preset!r}")
        for name in ("steps", "batch_size", "seqlen", "eval_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected >= 1, got {value}")
        for name in ("warmup_steps", "weight_decay", "seed", "min_lr", "sample_bytes"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected >= 0, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected > 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not 0 < self.valid_share < 1:
            raise ConfigError(f"valid_share: expected 0 < share < 1, got {self.valid_share}")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr: expected at most lr ({self.lr}), got {self.min_lr}")
        self.model_config()  # raises what the model has to say about the overrides

    def model_config(self) -> ModelConfig:
        """The preset with this run's overrides."""
        overrides = {"feature_dim": self.feature_dim, "window": self.window}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(PRESETS[self.preset], vocab_size=VOCAB_SIZE, **overrides)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up from 0 to lr, then a cosine to min_lr at the last step. step counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step + 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(model: Based, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms and the embedding."""
    groups = {config.weight_decay: [], 0.0: []}
    for name, p in model.named_parameters():
        decays = p.ndim > 1 and name != "embedding.weight"
        groups[config.weight_decay if decays else 0.0].append(p)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=True,
    )


def next_token_loss(model: Based, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token; inputs and targets (B,T)."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: Based, tokens: np.ndarray, batch_size: int, seqlen: int) -> float:
    """Bits per byte of a text, each window of seqlen bytes predicted from its own start."""
    nats = 0.0
    for inputs, targets in valid_batches(tokens, batch_size, seqlen):
        nats += next_token_loss(model, inputs, targets).item() * targets.numel()
    return nats / math.log(2) / (len(tokens) - 1)


def train(config: TrainConfig) -> dict[str, float]:
    """Runs one training and returns its held-out bits per byte beside those of gzip and xz."""
    from tqdm import tqdm

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    run = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    corpus = load_corpus(stdlib_files(), config.valid_share)
    model = Based(config.model_config())
    optimizer = build_optimizer(model, config)
    batches = WindowSampler(corpus.train, config.batch_size, config.seqlen, config.seed)
    print(
        f"{config.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{torch.get_num_threads()} threads, layers {' '.join(model.config.layers)}\n"
        f"text: {len(corpus.train):,} bytes in {len(corpus.train_files)} files to train on, "
        f"{len(corpus.valid):,} in {len(corpus.valid_files)} held out"
    )

    bar = tqdm(total=config.steps * config.batch_size * config.seqlen, unit="tok", unit_scale=True)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = next_token_loss(model, *next(batches))
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: loss is {loss.item()}; nothing was saved")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        bar.update(config.batch_size * config.seqlen)
        bar.set_postfix_str(f"step {step + 1}, {loss.item() / math.log(2):.3f} bits/byte")
        if (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            part = corpus.valid[: 32 * config.seqlen + 1]
            bits = evaluate(model, part, config.batch_size, config.seqlen)
            bar.write(f"step {step + 1}: {bits:.3f} bits per byte on a part of the held-out text")
    bar.close()

    checkpoint = save_checkpoint(run, config.steps, model)
    bits = {"model": evaluate(model, corpus.valid, config.batch_size, config.seqlen)}
    bits |= compressed_bits_per_byte(corpus.valid.tobytes())
    report(model, config, checkpoint, bits)
    return bits


def report(model: Based, config: TrainConfig, checkpoint: Path, bits: dict[str, float]):
    """What the run has come to, on the screen."""
    sampling = Sampling()
    pieces = stream_text(
        model, config.sample_prompt, config.sample_bytes, sampling, seed=config.seed
    )
    print(f"\nsample (prefill, then recurrent decode, temperature {sampling.temperature}):\n")
    print(config.sample_prompt + "".join(pieces))
    print("\nheld-out bits per byte: " + ", ".join(f"{k} {v:.3f}" for k, v in bits.items()))
    print(f"checkpoint: {checkpoint}")
    print(f"more text: python -m based_model.generate --checkpoint {checkpoint} --prompt 'class '")


if __name__ == "__main__":
    run_cli(TrainConfig, train)
