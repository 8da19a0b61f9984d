"""Other recurrent mixers for the recall test: layers of flash-linear-attention, where installed.

Sizes are those of Zoology's experiments: two heads (RWKV-7: heads of 64), and a BaseConv layer
before them; the Mambas come twice, without one. Their states count the short convolutions that
are part of the layer. Everything but the weights' own layers runs in fp32 or under autocast.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from based_model.config import ConfigError
from based_model.mqar_models import BaseConv, Select
from based_ops import short_conv


class Rival(nn.Module):
    """A layer of fla as a mixer."""

    def __init__(self, layer: nn.Module, state_size: int):
        super().__init__()
        self.layer, self.state_size = layer, state_size

    def forward(self, x: Tensor, select: Select) -> Tensor:
        return select(self.layer(x)[0])


class MambaRival(Rival):
    """fla's Mamba, its scan by fla's HGRN kernels; its own needs mamba-ssm or takes L steps."""

    def forward(self, x: Tensor, select: Select) -> Tensor:
        from fla.ops.hgrn import fused_recurrent_hgrn

        m, dtype = self.layer, x.dtype
        widths = (m.dt_rank, m.ssm_state_size, m.ssm_state_size)
        u, gate = m.in_proj(x).chunk(2, -1)
        u = short_conv(u, m.conv1d.weight[:, 0], m.conv1d.bias, activation="silu")
        dt, b, c = m.x_proj(u).split(widths, -1)
        dt = F.softplus(m.dt_proj(dt).float())[..., None]
        log_decay = dt * -m.A_log.exp()  # (B, L, C, N), as are the states
        inputs = dt * u[..., None] * b[:, :, None]
        states, _ = fused_recurrent_hgrn(inputs.flatten(2), log_decay.flatten(2))
        out = (states.view_as(inputs) * c[:, :, None]).sum(-1) + m.D * u
        return m.out_proj(select(out * F.silu(gate)).to(dtype))


class Mamba2Rival(Rival):
    """fla's Mamba-2, its scan by fla's recurrent kernels for one decay a head; its own needs
    mamba-ssm, and fla refuses the chunked ones on a Hopper GPU with Triton 3.4 ... 3.7.0."""

    def forward(self, x: Tensor, select: Select) -> Tensor:
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        m, heads = self.layer, (self.layer.num_heads, self.layer.head_dim)
        widths = (m.intermediate_size, m.ssm_state_size, m.ssm_state_size)
        gate, u, dt = m.in_proj(x).split((widths[0], sum(widths), m.num_heads), -1)
        u = short_conv(u, m.conv1d.weight[:, 0], m.conv1d.bias, activation="silu")
        u, b, c = u.split(widths, -1)
        b, c = (y[:, :, None].expand(-1, -1, m.num_heads, -1).contiguous() for y in (b, c))
        u = u.unflatten(-1, heads)
        dt = F.softplus(dt.float() + m.dt_bias)
        v = (u * dt[..., None]).to(u.dtype)
        out, _ = fused_recurrent_simple_gla(c, b, v, dt * -m.A_log.exp(), scale=1.0)
        out = (out + m.D[:, None] * u).flatten(2).to(u.dtype)
        return m.out_proj(m.norm(select(out), select(gate)))


@dataclass(frozen=True)
class RivalKind:
    """How to make a mixer: the class, its arguments and its state from d_model and state_dim."""

    layer: str
    arguments: Callable[[int, int], dict]
    state_size: Callable[[int, int], int]
    sizes: tuple[str, ...] = ()  # the settings beside d_model that make a difference
    twice: bool = False
    mixer: type[Rival] = Rival

    def mixers(self, d_model: int, state_dim: int) -> list[nn.Module]:
        """The mixers of a model; ConfigError where fla is missing or does not take the size."""
        try:
            layer_class = getattr(importlib.import_module("fla.layers"), self.layer)
        except ImportError as error:
            raise ConfigError(
                f"mixer: {self.layer} is a layer of flash-linear-attention, which did not load "
                f"({error}); install the [rivals] extra"
            ) from error

        def make(index: int) -> Rival:
            try:
                layer = layer_class(layer_idx=index, **self.arguments(d_model, state_dim))
            except AssertionError as error:
                raise ConfigError(
                    f"d_model: {self.layer} does not take {d_model}: {error}"
                ) from error
            return self.mixer(layer, self.state_size(d_model, state_dim))

        return [make(0), make(1)] if self.twice else [BaseConv(d_model), make(0)]


RIVALS = {
    "mamba": RivalKind(
        "Mamba",
        lambda d, n: {"hidden_size": d, "intermediate_size": 2 * d, "state_size": n},
        lambda d, n: 2 * d * n + 3 * 2 * d,
        sizes=("state_dim",),
        twice=True,
        mixer=MambaRival,
    ),
    "mamba2": RivalKind(
        "Mamba2",
        lambda d, n: {"hidden_size": d, "num_heads": 2 * d // 64, "state_size": n},
        lambda d, n: 2 * d * n + 3 * (2 * d + 2 * n),
        sizes=("state_dim",),
        twice=True,
        mixer=Mamba2Rival,
    ),
    "rwkv7": RivalKind(
        "RWKV7Attention",
        lambda d, _: {"hidden_size": d, "head_dim": 64, "num_hidden_layers": 2},
        lambda d, _: 64 * d + d,
    ),
    "gla": RivalKind(
        "GatedLinearAttention",
        lambda d, _: {"hidden_size": d, "num_heads": 2},
        lambda d, _: d * d // 4,
    ),
    "deltanet": RivalKind(
        "DeltaNet",
        lambda d, _: {"hidden_size": d, "num_heads": 2},
        lambda d, _: d * d // 2 + 3 * 3 * d,
    ),
    "gated-deltanet": RivalKind(
        "GatedDeltaNet",
        lambda d, _: {"hidden_size": d, "head_dim": d // 2, "num_heads": 2, "use_gate": False},
        lambda d, _: d * d + 3 * 4 * d,
    ),
}
