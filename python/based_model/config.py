"""What a model is made of: one frozen dataclass, and the named presets.

The architecture and its parameter counts are those of the Based paper (arXiv 2402.18668) and the
released HazyResearch models; `layers` spells out the token mixer of every block.
"""

from dataclasses import asdict, dataclass, fields


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, what was expected, and what was got."""


MIXERS = ("linear", "window", "conv", "attention")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model. Every field is checked on construction (ConfigError)."""

    layers: tuple[str, ...]  # token mixer of each block, of MIXERS
    d_model: int  # width of the residual stream
    mlp_dim: int  # inner width of the SwiGLU MLP
    nheads: int  # heads of every mixer but conv, each d_model / nheads wide
    feature_dim: int = 16  # q/k width of a linear head before the Taylor feature map
    window: int = 129  # keys a window layer sees, the token's own position included
    conv_width: int = 3  # taps of the BaseConv convolution
    vocab_size: int = 50257  # token ids are 0 ... vocab_size-1
    vocab_multiple: int = 8  # the embedding table is padded to a multiple of this
    norm_eps: float = 1e-5
    rotary_base: float = 1e4
    attention_rotary: float = (
        0.5  # share of a head that attention layers rotate; window layers: all
    )

    def __post_init__(self):
        if not isinstance(self.layers, tuple) or not self.layers:
            raise ConfigError(f"layers: expected a non-empty tuple of mixers, got {self.layers!r}")
        for i, mixer in enumerate(self.layers):
            if mixer not in MIXERS:
                raise ConfigError(f"layers[{i}]: expected one of {MIXERS}, got {mixer!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name}: expected an integer >= 1, got {value!r}")
            if field.type is float and (type(value) not in (int, float) or not value > 0):
                raise ConfigError(f"{field.name}: expected a number > 0, got {value!r}")
        if self.d_model % self.nheads:
            raise ConfigError(
                f"d_model: expected a multiple of nheads ({self.nheads}), got {self.d_model}"
            )
        if "window" in self.layers and self.head_dim % 2:
            raise ConfigError(
                "nheads: expected an even d_model / nheads, which the rotary embedding of window "
                f"layers halves, got {self.d_model} / {self.nheads} = {self.head_dim}"
            )
        rotated = -(-self.attention_rotary_dim // 2) * 2
        if "attention" in self.layers and not (
            self.attention_rotary <= 1 and 2 <= rotated <= self.head_dim
        ):
            raise ConfigError(
                f"attention_rotary: expected a share <= 1 that rotates 2 ... {self.head_dim} dims "
                f"of a head, got {self.attention_rotary} of {self.head_dim}"
            )
        if not 2 <= self.conv_width <= 8:
            raise ConfigError(f"conv_width: expected 2 ... 8, got {self.conv_width}")

    @property
    def head_dim(self) -> int:
        """Value width of one head."""
        return self.d_model // self.nheads

    @property
    def attention_rotary_dim(self) -> int:
        """Dims that set the frequencies of an attention layer; if odd, one more is rotated."""
        return int(self.head_dim * self.attention_rotary)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table; no row from vocab_size on is ever a token."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def to_dict(self) -> dict:
        """A dict that json can write and from_dict reads back."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Builds a config from parsed JSON; an unknown or missing key is a ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(f"model config: expected a mapping, got {values!r}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"model config: unknown keys {unknown}, known are {sorted(known)}")
        if missing := sorted({"layers", "d_model", "mlp_dim", "nheads"} - set(values)):
            raise ConfigError(f"model config: missing keys {missing}")
        layers = values["layers"]
        if isinstance(layers, list):  # JSON has no tuples; a bare string stays an error
            layers = tuple(layers)
        return cls(**{**values, "layers": layers})


def _pattern(nlayers: int, linear: tuple[int, ...], window: tuple[int, ...]) -> tuple[str, ...]:
    """Linear and window mixers at the given depths (from 0), BaseConv everywhere else."""
    mixers = dict.fromkeys(range(nlayers), "conv")
    mixers |= dict.fromkeys(linear, "linear") | dict.fromkeys(window, "window")
    return tuple(mixers[i] for i in range(nlayers))


_LAYERS_360M = _pattern(27, (1, 6, 11, 16, 21), (2, 7, 12, 17, 22))
_LAYERS_1B = _pattern(36, (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34))

PRESETS = {
    # Bytes, for a few minutes on two CPU cores: the default of based_model.train.
    "based-cpu": ModelConfig(
        layers=("conv", "linear", "window", "conv", "linear", "window"),
        d_model=192,
        mlp_dim=384,
        nheads=4,
        window=64,
        vocab_size=256,
    ),
    "transformer-cpu": ModelConfig(
        layers=("attention",) * 6, d_model=192, mlp_dim=400, nheads=4, vocab_size=256
    ),
    "based-360m": ModelConfig(layers=_LAYERS_360M, d_model=1024, mlp_dim=2048, nheads=16),
    "based-1.4b": ModelConfig(layers=_LAYERS_1B, d_model=1792, mlp_dim=3584, nheads=16),
    "based-1.4b-28x64": ModelConfig(
        layers=_LAYERS_1B, d_model=1792, mlp_dim=3584, nheads=28, window=128
    ),
    "transformer-360m": ModelConfig(
        layers=("attention",) * 24, d_model=1024, mlp_dim=2816, nheads=16
    ),
    "transformer-1.3b": ModelConfig(
        layers=("attention",) * 36, d_model=1680, mlp_dim=4608, nheads=24
    ),
    # Heads of 64, the shape that attention kernels like best: the baseline of speed comparisons.
    "transformer-1.3b-26x64": ModelConfig(
        layers=("attention",) * 36, d_model=1664, mlp_dim=4608, nheads=26
    ),
}
