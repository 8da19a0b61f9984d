"""The settings of a training run, which are also the command line of based_model.train."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from based_model.config import PRESETS, ConfigError, ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a model; the same settings give the same run."""

    # Folder of the run, for checkpoints and logs; default runs/<date and time>.
    out: Path | None = None
    # Continue the run in this folder, or one checkpoint of it, with its own settings except those
    # given anew. Into another folder with --out.
    resume: Path | None = None

    # Text files, folders of text, or one .bin of token ids; default: Python's standard library.
    data: tuple[Path, ...] = ()
    # The same for the held-out text; default: a share of the data.
    valid_data: tuple[Path, ...] = ()
    # Share of the files that is held out, chosen by their hash (of a single file: its tail).
    valid_share: float = 0.05
    # Type of the token ids in a .bin.
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    # A tokenizer.json that makes tokens of text, or that made those of a .bin; default: text is
    # read as bytes.
    tokenizer: Path | None = None
    # The tokenizer's token that ends a text.
    end_token: str = "<|endoftext|>"

    # Name of a model preset (based_model.config.PRESETS).
    preset: str = "based-cpu"
    # Width of q and k before the feature map: recall against state size. Default: the preset's.
    feature_dim: int | None = None
    # Keys that a sliding-window layer sees: recall against state size. Default: the preset's.
    window: int | None = None
    # Number of different tokens; default: those of the text (256 of bytes), else the preset's.
    vocab_size: int | None = None

    # Optimizer steps, those before a resume included.
    steps: int = 700
    # Windows of text per step, over all processes.
    batch_size: int = 8
    # Tokens per window.
    seqlen: int = 256
    # Parts that a batch is run in, one after the other, to need less memory.
    accumulate: int = 1
    # Highest learning rate, reached after the warm-up.
    lr: float = 3e-3
    # Lowest learning rate, reached at the last step along a cosine.
    min_lr: float = 1e-4
    # Steps of linear warm-up.
    warmup_steps: int = 40
    # AdamW's weight decay, for matrices other than the embedding.
    weight_decay: float = 0.1
    # AdamW's decay rate of the mean gradient.
    beta1: float = 0.9
    # AdamW's decay rate of the mean squared gradient.
    beta2: float = 0.95
    # Largest norm of the gradient; a longer one is scaled down to it.
    clip: float = 1.0

    # bf16 runs the matrix products in bfloat16 (autocast); weights and optimizer stay fp32.
    precision: Literal["fp32", "bf16"] = "fp32"
    # Where to train: cpu, cuda, cuda:1 ...
    device: str = "cpu"
    # How the processes that torchrun starts share the work: ddp gives each the whole model, fsdp
    # spreads weights and optimizer over them. A single process does all, whatever stands here.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # Run every block's forward again in the backward instead of keeping what it computed.
    checkpoint_activations: bool = False
    # Compile the model and the loss with torch.compile, which needs a C++ compiler or a GPU.
    compile: bool = False
    # CPU threads of a process; default: as many as torch finds cores.
    threads: int | None = None
    # Seed of the weights, the batches and the sample.
    seed: int = 0

    # Steps between two looks at a part of the held-out text.
    eval_every: int = 100
    # Bytes of the held-out text (of a .bin: tokens) to read at most.
    max_valid: int = 2_000_000
    # Steps between two checkpoints; there is always one at the end.
    save_every: int = 250
    # Newest checkpoints to keep; older ones are deleted.
    keep: int = 2
    # What the sample at the end starts from.
    sample_prompt: str = "import os\n\ndef "
    # Tokens to generate then.
    sample_tokens: int = 400

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {self.preset!r}")
        at_least_one = "steps batch_size seqlen accumulate threads eval_every save_every keep"
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected >= 1, got {value}")
        for name in ("warmup_steps", "weight_decay", "seed", "min_lr", "sample_tokens"):
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
        if self.max_valid < 2:
            raise ConfigError(f"max_valid: expected >= 2, got {self.max_valid}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size: expected a multiple of accumulate ({self.accumulate}), "
                f"got {self.batch_size}"
            )
        self.model_config()  # raises what the model has to say about the overrides

    def model_config(self, corpus_vocab_size: int | None = None) -> ModelConfig:
        """The preset with this run's overrides, and as many tokens as the corpus has."""
        overrides = {
            "feature_dim": self.feature_dim,
            "window": self.window,
            "vocab_size": corpus_vocab_size if self.vocab_size is None else self.vocab_size,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(PRESETS[self.preset], **overrides)

    def to_dict(self) -> dict:
        """A dict that json can write and from_dict reads back."""

        def plain(value):
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return str(value.absolute()) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Builds the settings from parsed JSON; an unknown key is a ConfigError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"training settings: unknown keys {unknown}")
        values = dict(values)
        for name in ("out", "resume", "tokenizer"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        for name in ("data", "valid_data"):
            values[name] = tuple(Path(path) for path in values.get(name, ()))
        return cls(**values)
