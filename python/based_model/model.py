"""The Based language model (Arora et al., arXiv 2402.18668) in plain torch on based_ops.

Pre-norm blocks, RMSNorm -> token mixer -> residual, RMSNorm -> SwiGLU MLP -> residual, with the
residual stream in fp32 (or wider) and tied embeddings. Every mixer has two forms that compute
the same function: forward() over sequences, which can take and give a state, and decode() for one
token, which updates its state in place.

Shapes: B batch, T seqlen, N state rows (B, or the number of packed sequences), H heads,
D feature_dim, F = 1 + D + D(D+1)/2, V head_dim, W window, K conv_width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from based_ops import (
    linear_attention,
    linear_attention_decode,
    short_conv,
    short_conv_decode,
    sliding_window_attention,
    sliding_window_decode,
)
from torch import Tensor, nn

from based_model.config import ModelConfig

LayerState = tuple[Tensor, ...]


@dataclass
class ModelState:
    """All that N sequences need in order to continue; its size does not depend on their length.

    layers[i] is, for a linear layer, kv_state (N,H,F,V) and k_state (N,H,F), fp32; for a window
    layer, the rings k_cache and v_cache (N,W,H,V); for a conv layer, conv_state
    (N,2*d_model,K-1). positions (N,) int64 counts the tokens each sequence has seen, for all.
    """

    layers: list[LayerState]
    positions: Tensor

    def clone(self) -> "ModelState":
        """A copy that shares no memory: continue one prefix in several ways."""
        layers = [tuple(x.clone() for x in layer) for layer in self.layers]
        return ModelState(layers, self.positions.clone())

    def nbytes(self) -> int:
        """Bytes of all tensors in the state."""
        return self.positions.nbytes + sum(x.nbytes for layer in self.layers for x in layer)


@dataclass
class Span:
    """What all layers of one call share."""

    positions: Tensor | None  # (N,) tokens seen before this call; None: a fresh start
    rotary: tuple[Tensor, Tensor] | None  # cos and sin, (B,T,1,V/2), or (B,1,V/2) in decode
    cu_seqlens: Tensor | None = None
    output_state: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, computed in x's dtype, returned in weight's."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return out.to(self.weight.dtype)


class LinearMixer(nn.Module):
    """Global causal linear attention under the Taylor feature map."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nheads = config.nheads
        d_model, d_feature = config.d_model, config.nheads * config.feature_dim
        self.q_proj = nn.Linear(d_model, d_feature, bias=False)
        self.k_proj = nn.Linear(d_model, d_feature, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [proj(x).unflatten(-1, (self.nheads, -1)) for proj in projections]

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        q, k, v = self._qkv(x)  # (B,T,H,D), (B,T,H,D), (B,T,H,V)
        out, state = _split(
            linear_attention(
                q,
                k,
                v,
                initial_state=state,
                output_final_state=span.output_state,
                cu_seqlens=span.cu_seqlens,
            ),
            span,
        )
        return self.out_proj(out.flatten(-2)), state

    def decode(self, x: Tensor, state: LayerState, span: Span) -> Tensor:
        out = linear_attention_decode(*self._qkv(x), *state)
        return self.out_proj(out.flatten(-2))


class WindowMixer(nn.Module):
    """Exact softmax attention over the last W tokens, with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nheads, self.window = config.nheads, config.window
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def _qkv(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.nheads, -1)).unbind(-3)
        return rotate(q, *span.rotary), rotate(k, *span.rotary), v

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        q, k, v = self._qkv(x, span)  # (B,T,H,V) each
        out, state = _split(
            sliding_window_attention(
                q,
                k,
                v,
                self.window,
                initial_state=state and (*state, span.positions),
                output_final_state=span.output_state,
                cu_seqlens=span.cu_seqlens,
            ),
            span,
        )
        return self.out_proj(out.flatten(-2)), state and state[:2]

    def decode(self, x: Tensor, state: LayerState, span: Span) -> Tensor:
        q, k, v = self._qkv(x, span)  # (B,H,V) each
        out = sliding_window_decode(q, k, v, *state, span.positions)
        return self.out_proj(out.flatten(-2))


class ConvMixer(nn.Module):
    """BaseConv: a short causal convolution gated by a projection of the same token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_inner, width = 2 * config.d_model, config.conv_width
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner)
        self.conv_weight = nn.Parameter(torch.empty(d_inner, width))
        self.out_proj = nn.Linear(d_inner, config.d_model)

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        u, gate = self.in_proj(x).chunk(2, -1)  # (B,T,2*d_model) each
        out, conv_state = _split(
            short_conv(
                u,
                self.conv_weight.to(u.dtype),
                activation="silu",
                gate=gate,
                initial_state=None if state is None else state[0],
                output_final_state=span.output_state,
                cu_seqlens=span.cu_seqlens,
            ),
            span,
        )
        return self.out_proj(out), (conv_state,)

    def decode(self, x: Tensor, state: LayerState, span: Span) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, -1)
        weight = self.conv_weight.to(u.dtype)
        out = short_conv_decode(u, weight, *state, activation="silu", gate=gate)
        return self.out_proj(out)


class MLP(nn.Module):
    """SwiGLU: fc2(h[:m] * silu(h[m:])) with h = fc1(x), m = mlp_dim."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, 2 * config.mlp_dim, bias=False)
        self.fc2 = nn.Linear(config.mlp_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    """One layer: a token mixer and an MLP, each behind an RMSNorm and added to the residual."""

    MIXERS = {"linear": LinearMixer, "window": WindowMixer, "conv": ConvMixer}

    def __init__(self, config: ModelConfig, mixer: str):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = self.MIXERS[mixer](config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        mixed, state = self.mixer(self.norm1(x), state, span)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), state

    def decode(self, x: Tensor, state: LayerState, span: Span) -> Tensor:
        x = x + self.mixer.decode(self.norm1(x), state, span)
        return x + self.mlp(self.norm2(x))


class Based(nn.Module):
    """The whole model: embedding, blocks, final norm, and the embedding again as output layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self):
        """N(0, 0.02), divided by sqrt(2 * layers) where a projection writes to the residual."""
        residual_std = 0.02 / math.sqrt(2 * len(self.layers))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("conv_weight"):  # torch's default for a depthwise convolution
                nn.init.uniform_(p, -(p.shape[1] ** -0.5), p.shape[1] ** -0.5)
            elif p.ndim == 2:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=residual_std if residual else 0.02)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Logits of every next token: tokens (B,T) -> (B,T,vocab_size), any T >= 0.

        state continues earlier calls and is left as it is; with output_state the result is
        (logits, new state). cu_seqlens (N+1,) splits a single row (B = 1) of tokens into N
        packed sequences, and states then carry N rows.
        """
        x, state = self.hidden(tokens, state, output_state, cu_seqlens)
        return (self.logits(x), state) if output_state else self.logits(x)

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """forward() without the output layer: ((B,T,d_model), new state or None)."""
        seqlen = tokens.shape[1]
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        start = tokens.new_zeros(rows, dtype=torch.int64) if state is None else state.positions
        offsets = torch.arange(seqlen, device=tokens.device)
        if cu_seqlens is None:
            lengths = seqlen
            positions = start[:, None] + offsets
        else:
            lengths = cu_seqlens.diff()
            # Sequence of each token: how many have ended by then. Empty ones count as ended.
            sequence = torch.searchsorted(cu_seqlens[1:], offsets, right=True)
            positions = (start[sequence] + offsets - cu_seqlens[sequence])[None]
        span = Span(
            None if state is None else state.positions,
            self._rotary(positions),
            cu_seqlens,
            output_state,
        )

        x = self._embed(tokens)
        layer_states = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state.layers[i], span)
            layer_states.append(layer_state)
        return x, ModelState(layer_states, start + lengths) if output_state else None

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and tied output layer: (..., d_model) -> (..., vocab_size)."""
        logits = F.linear(self.norm(x), self.embedding.weight)
        return logits[..., : self.config.vocab_size]  # no token has a padding row's id

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Reads whole prompts: logits after each one's last token, (N,vocab_size), and the state.

        Every prompt needs at least one token.
        """
        x, state = self.hidden(tokens, state, True, cu_seqlens)
        last = x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1]
        return self.logits(last), state

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: ModelState) -> Tensor:
        """One token per row: tokens (N,) -> logits (N,vocab_size), state moves on in place."""
        span = Span(state.positions, self._rotary(state.positions))
        x = self._embed(tokens)
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x = layer.decode(x, layer_state, span)
        state.positions += 1
        return self.logits(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (*positions, 1, V/2) of position * rotary_base^(-2j/V), for all layers."""
        if "window" not in self.config.layers:
            return None
        head_dim = self.config.head_dim
        # Angles in fp64: in fp32 the angle of position 10^6 is off by up to 0.06.
        exponents = (
            torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / -head_dim
        )
        angles = positions[..., None, None] * self.config.rotary_base**exponents
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over the whole last dim, its first half paired with its second."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)


def _split(result, span: Span):
    """(out, final state) of a sequence op, which returns out alone unless asked for the state."""
    return result if span.output_state else (result, None)
