"""The token mixers of a block: linear, window and conv of Based, attention of a Transformer.

Each has two forms that compute the same function: forward() over sequences, which can take and
give a state, and returns (output, state); and decode() for one token, without what a decode step
has together with the block: out_proj, and what projection() says, which decode() takes. It returns
(what out_proj takes, state). Only the state of attention grows with the text; the others' states
are updated in place.

Shapes: B batch, T seqlen, N state rows (B, or the number of packed sequences), H heads,
D feature_dim, F = 1 + D + D(D+1)/2, V head_dim, W window, K conv_width, S slots of a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from based_model.config import ModelConfig
from based_model.fused import Projection, ShortConv, join_memory, rotate
from based_ops import (
    linear_attention,
    linear_attention_decode,
    linear_attention_decode_deferred,
    short_conv,
    sliding_window_attention,
    sliding_window_decode,
)

LayerState = tuple[Tensor, ...]


@dataclass
class Span:
    """What all layers of one call share."""

    start: Tensor  # (N,) tokens seen before this call
    positions: Tensor  # position in its sequence of every token: (B,T), or (N,) in decode
    rotary: dict[str, tuple[Tensor, Tensor]]  # by mixer: cos and sin, (*positions, 1, V/2)
    cu_seqlens: Tensor | None = None  # (N+1,) int: the bounds of packed sequences
    sequence: Tensor | None = None  # (T,) the packed sequence of every token
    slots: int = 0  # tokens in the longest sequence after this call; counted for attention only
    output_state: bool = False
    # In decode, (N,) each:
    fill: Tensor | None = None  # tokens that wait in the rings of linear layers
    indices: Tensor | None = None  # row of the state of each token, -1 for none; by default i of i

    def run(self, op: Callable, *args, initial_state, **kwargs):
        """(out, final state or None) of a sequence op of based_ops."""
        result = op(
            *args,
            initial_state=initial_state,
            output_final_state=self.output_state,
            cu_seqlens=self.cu_seqlens,
            **kwargs,
        )
        return result if self.output_state else (result, None)


class LinearMixer(nn.Module):
    """Global causal linear attention under the Taylor feature map.

    State: kv_state (N,H,F,V) and k_state (N,H,F), fp32 or wider. In decode there may also be
    rings of tokens that these do not hold yet, pending_k (N,C,H,D) and pending_v (N,C,H,V).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nheads = config.nheads
        d_model, d_feature = config.d_model, config.nheads * config.feature_dim
        self.q_proj = nn.Linear(d_model, d_feature, bias=False)
        self.k_proj = nn.Linear(d_model, d_feature, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def join_projections(self):
        """Lets decode() compute q, k and v in one product; the weights stay what they are."""
        join_memory(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)

    def state_size(self, seqlen: int) -> int:
        """Bytes of one row of the state; the same at every seqlen."""
        d_model, d_feature = self.v_proj.out_features, self.q_proj.out_features
        feature_dim = d_feature // self.nheads
        expanded_dim = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        itemsize = max(4, self.v_proj.weight.itemsize)
        return itemsize * expanded_dim * (d_model + self.nheads)

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        qkv = [proj(x).unflatten(-1, (self.nheads, -1)) for proj in projections]
        out, state = span.run(linear_attention, *qkv, initial_state=state)
        return self.out_proj(out.flatten(-2)), state

    def rings(self, state: LayerState, capacity: int) -> tuple[Tensor, Tensor]:
        """Rings of so many tokens to go with a state, none of them there yet."""
        weight, (rows, _, _, head_dim) = self.q_proj.weight, state[0].shape
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        widths = (weight.shape[0] // self.nheads, head_dim)
        return tuple(
            torch.empty(rows, capacity, self.nheads, n, dtype=dtype, device=weight.device)
            for n in widths
        )

    def new_state(self, rows: int, capacity: int) -> LayerState:
        """Of texts that have no token yet."""
        weight, head_dim = self.v_proj.weight, self.v_proj.out_features // self.nheads
        feature_dim = self.q_proj.out_features // self.nheads
        expanded_dim = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (rows, self.nheads, expanded_dim)
        return tuple(weight.new_zeros(*shape, *n, dtype=dtype) for n in ((head_dim,), ()))

    def projection(self, norm: nn.Module, state: LayerState, indices: Tensor | None) -> Projection:
        """What decode() takes."""
        return Projection(norm, (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))

    def decode(self, h: list[Tensor], state: LayerState, span: Span):
        qkv = [y.unflatten(-1, (self.nheads, -1)) for y in h]
        if span.fill is None:
            out = linear_attention_decode(*qkv, *state, state_indices=span.indices)
        else:
            out = linear_attention_decode_deferred(
                *qkv, *state, span.fill, state_indices=span.indices
            )
        return out.flatten(-2), state


class WindowMixer(nn.Module):
    """Exact softmax attention over the last W tokens, with rotary positions.

    State: the rings k_cache and v_cache (N,W,H,V), position p in slot p mod W.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nheads, self.window = config.nheads, config.window
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def state_size(self, seqlen: int) -> int:
        """Bytes of one row of the state; the same at every seqlen."""
        return 2 * self.window * self.out_proj.in_features * self.out_proj.weight.itemsize

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.nheads, -1)).unbind(-3)  # (B,T,H,V) each
        out, state = span.run(
            sliding_window_attention,
            rotate(q, *span.rotary["window"]),
            rotate(k, *span.rotary["window"]),
            v,
            self.window,
            initial_state=None if state is None else (*state, span.start),
        )
        return self.out_proj(out.flatten(-2)), None if state is None else state[:2]

    def new_state(self, rows: int, capacity: int) -> LayerState:
        """Of texts that have no token yet."""
        weight, head_dim = self.out_proj.weight, self.out_proj.in_features // self.nheads
        shape = (rows, self.window, self.nheads, head_dim)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def projection(self, norm: nn.Module, state: LayerState, indices: Tensor | None) -> Projection:
        """What decode() takes."""
        return Projection(norm, (self.qkv_proj.weight,))

    def decode(self, h: list[Tensor], state: LayerState, span: Span):
        q, k, v = h[0].unflatten(-1, (3, self.nheads, -1)).unbind(-3)
        rotary = tuple(angles[:, 0] for angles in span.rotary["window"])
        out = sliding_window_decode(
            q, k, v, *state, span.start, rotary=rotary, state_indices=span.indices
        )
        return out.flatten(-2), state


class ConvMixer(nn.Module):
    """BaseConv: a short causal convolution gated by a projection of the same token.

    State: conv_state (N,2*d_model,K-1), the last inputs of the convolution.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_inner = 2 * config.d_model
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner)
        self.conv_weight = nn.Parameter(torch.empty(d_inner, config.conv_width))
        self.out_proj = nn.Linear(d_inner, config.d_model)

    def state_size(self, seqlen: int) -> int:
        """Bytes of one row of the state; the same at every seqlen."""
        d_inner, width = self.conv_weight.shape
        return d_inner * (width - 1) * self.conv_weight.itemsize

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        if is_compiling():  # for training: the gradients of one product's halves would be copied
            halves = zip(self.in_proj.weight.chunk(2), self.in_proj.bias.chunk(2), strict=True)
            u, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        else:
            u, gate = self.in_proj(x).chunk(2, -1)  # (B,T,2*d_model) each
        out, conv_state = span.run(
            short_conv,
            u,
            self.conv_weight.to(u.dtype),
            activation="silu",
            gate=gate,
            initial_state=None if state is None else state[0],
        )
        return self.out_proj(out), (conv_state,)

    def new_state(self, rows: int, capacity: int) -> LayerState:
        """Of texts that have no token yet."""
        d_inner, width = self.conv_weight.shape
        return (self.conv_weight.new_zeros(rows, d_inner, width - 1),)

    def projection(self, norm: nn.Module, state: LayerState, indices: Tensor | None) -> Projection:
        """What decode() takes. The convolution belongs to it, and updates the state."""
        conv = ShortConv(self.conv_weight, *state, indices)
        return Projection(norm, (self.in_proj.weight,), self.in_proj.bias, conv)

    def decode(self, h: list[Tensor], state: LayerState, span: Span):
        return h[0], state


class AttentionMixer(nn.Module):
    """Full causal softmax attention with rotary positions, the Transformer++ baseline.

    State: k_cache and v_cache (N,S,H,V), position p in slot p. Slots that hold no token yet are
    zero; decode() fills them, and makes half as many new ones when there are none left. With
    span.indices it makes none: tokens without a state go to the last slot, which is not read.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nheads = config.nheads
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def _qkv(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        return self._rotated(self.qkv_proj(x), span)

    def _rotated(self, qkv: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.nheads, -1)).unbind(-3)
        return rotate(q, *span.rotary["attention"]), rotate(k, *span.rotary["attention"]), v

    def state_size(self, seqlen: int) -> int:
        """Bytes of one row of the state once it has read seqlen tokens in one call."""
        return seqlen * 2 * self.out_proj.in_features * self.out_proj.weight.itemsize

    def forward(self, x: Tensor, state: LayerState | None, span: Span):
        q, k, v = self._qkv(x, span)  # (B,T,H,V) each
        if state is None and span.cu_seqlens is None:
            out = _attend(q, k, v, is_causal=True)
            return self.out_proj(out.flatten(-2)), (k, v)

        rows, offsets = span.sequence, span.positions
        if span.cu_seqlens is None:
            rows = torch.arange(len(x), device=x.device)[:, None]
        else:  # queries in one padded row for every packed sequence
            q, k, v, offsets = q[0], k[0], v[0], offsets[0]
            place = (rows, offsets - span.start[rows])
            longest = span.cu_seqlens.diff().max().item()
            q = q.new_zeros(len(span.start), longest, *q.shape[1:]).index_put(place, q)
        k_cache, v_cache = state or (k.new_zeros(len(span.start), 0, *k.shape[-2:]),) * 2
        k_cache = _grown(k_cache, span.slots).index_put((rows, offsets), k)
        v_cache = _grown(v_cache, span.slots).index_put((rows, offsets), v)
        # Slots ahead of a row's last token are seen by the queries of its padding alone.
        slots = torch.arange(span.slots, device=x.device)
        ends = span.start[:, None] + torch.arange(q.shape[1], device=x.device)
        mask = slots <= ends[:, None, :, None]  # (N,1,T,S)
        out = _attend(q, k_cache[:, : span.slots], v_cache[:, : span.slots], attn_mask=mask)
        if span.cu_seqlens is not None:
            out = out[place][None]
        return self.out_proj(out.flatten(-2)), (k_cache, v_cache)

    def new_state(self, rows: int, capacity: int) -> LayerState:
        """Of texts that have no token yet, with room for so many and one slot that is not read."""
        weight, head_dim = self.out_proj.weight, self.out_proj.in_features // self.nheads
        shape = (rows, capacity + 1, self.nheads, head_dim)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def projection(self, norm: nn.Module, state: LayerState, indices: Tensor | None) -> Projection:
        """What decode() takes."""
        return Projection(norm, (self.qkv_proj.weight,))

    def decode(self, h: list[Tensor], state: LayerState, span: Span):
        q, k, v = self._rotated(h[0], span)  # (N,H,V) each
        size, slots = state[0].shape[1], span.start
        if span.indices is not None:
            slots = torch.where(span.indices < 0, size - 1, slots)
        elif span.slots > size:
            state = tuple(_grown(cache, max(64, size + size // 2)) for cache in state)
        k_cache, v_cache = state
        rows = torch.arange(len(q), device=q.device)
        k_cache[rows, slots] = k
        v_cache[rows, slots] = v
        mask = torch.arange(span.slots, device=q.device) <= span.start[:, None, None, None]
        out = _attend(
            q[:, None], k_cache[:, : span.slots], v_cache[:, : span.slots], attn_mask=mask
        )
        return out[:, 0].flatten(-2), state


MIXERS = {
    "linear": LinearMixer,
    "window": WindowMixer,
    "conv": ConvMixer,
    "attention": AttentionMixer,
}


def _attend(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """Softmax attention, q (B,T,H,V), k and v (B,S,H,V) -> (B,T,H,V)."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2)


def _grown(cache: Tensor, slots: int) -> Tensor:
    """A copy of a cache (N,S,H,V) with at least so many slots, the new ones zero."""
    new = cache.new_zeros(cache.shape[0], max(0, slots - cache.shape[1]), *cache.shape[2:])
    return torch.cat((cache, new), 1)
