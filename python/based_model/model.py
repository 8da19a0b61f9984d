"""The Based language model (Arora et al., arXiv 2402.18668) in plain torch on based_ops.

Pre-norm blocks, RMSNorm -> token mixer -> residual, RMSNorm -> SwiGLU MLP -> residual, with the
residual stream in fp32 (or wider) and tied embeddings. forward() runs over sequences and can take
and give a state, decode() takes one token; both compute the same function.

Shapes: B batch, T seqlen, N state rows (B, or the number of packed sequences).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from based_model.config import ModelConfig
from based_model.fused import (
    Projection,
    Tail,
    add_norm,
    block_tails,
    embed,
    project,
    rms_norm,
    rotary_angles,
    swiglu,
)
from based_model.mixers import MIXERS, LayerState, LinearMixer, Span
from based_ops import linear_attention_fold


@dataclass
class ModelState:
    """All that N sequences need in order to continue.

    layers[i] is the state of layer i, as its mixer describes it. positions (N,) int64 counts the
    tokens each sequence has seen, for all layers. Only attention layers' states grow with it.

    After Based.defer_writes(), the last fill (N,) of these tokens wait in the rings of the linear
    layers, which hold `capacity`. All but decode() and clone() makes the state plain again first.

    counters are decode()'s, those of based_ops.decode_block; they say nothing about the sequences.
    """

    layers: list[LayerState]
    positions: Tensor
    fill: Tensor | None = None
    capacity: int = 0
    counters: Tensor | None = None  # (8,) int32; new ones by default

    def __post_init__(self):
        if self.counters is None:
            self.counters = torch.zeros(8, dtype=torch.int32, device=self.positions.device)

    def clone(self) -> "ModelState":
        """A copy that shares no memory: continue one prefix in several ways."""
        layers = [tuple(x.clone() for x in layer) for layer in self.layers]
        fill = None if self.fill is None else self.fill.clone()
        return ModelState(layers, self.positions.clone(), fill, self.capacity)

    @torch.no_grad()
    def fold(self):
        """The plain form, in place: no token waits in a ring."""
        if self.fill is None:
            return
        for i, layer in enumerate(self.layers):
            if len(layer) == 4:
                linear_attention_fold(*layer, self.fill)
                self.layers[i] = layer[:2]
        self.fill = None

    def nbytes(self) -> int:
        """Bytes of layers and positions."""
        return self.positions.nbytes + sum(x.nbytes for layer in self.layers for x in layer)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, computed in x's dtype, returned in weight's."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + update, the norm of that), in one kernel when compiled; None adds nothing."""
        return (x, self(x)) if update is None else add_norm(x, update, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: fc2(h[:m] * silu(h[m:])) with h = fc1(x), m = mlp_dim."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, 2 * config.mlp_dim, bias=False)
        self.fc2 = nn.Linear(config.mlp_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x)))


class Block(nn.Module):
    """One layer: a token mixer and an MLP, each behind an RMSNorm and added to the residual."""

    def __init__(self, config: ModelConfig, mixer: str):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[mixer](config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, update: Tensor | None, state: LayerState | None, span: Span):
        """Residual stream and what the last block has yet to add to it: the same, and the state."""
        x, h = self.norm1.after(x, update)
        mixed, state = self.mixer(h, state, span)
        x, h = self.norm2.after(x, mixed)
        return x, self.mlp(h), state

    def tail(self, following: Projection) -> Tail:
        """What comes behind mixer.decode(), and what the next layer begins with."""
        mlp = self.mlp
        return Tail(self.mixer.out_proj, self.norm2, mlp.fc1.weight, mlp.fc2.weight, following)


class Based(nn.Module):
    """The whole model: embedding, blocks, final norm, and the embedding again as output layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # in training: run blocks again in the backward
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
        targets: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Logits of every next token: tokens (B,T) -> (B,T,vocab_size), any T >= 0.

        state continues earlier calls and is left as it is; with output_state the result is
        (logits, new state). cu_seqlens (N+1,) splits a single row (B = 1) of tokens into N
        packed sequences, and states then carry N rows. With targets (B,T), the tokens that do
        come next, loss() of them takes the place of the logits.
        """
        x, state = self.hidden(tokens, state, output_state, cu_seqlens)
        out = self.logits(x) if targets is None else self.loss(x, targets)
        return (out, state) if output_state else out

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """forward() without the output layer: ((B,T,d_model), new state or None)."""
        if state is not None:
            state.fold()
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        start = tokens.new_zeros(rows, dtype=torch.int64) if state is None else state.positions
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is None:
            lengths, sequence = tokens.shape[1], None
            positions = start[:, None] + offsets
        else:
            # Sequence of each token: how many have ended by then. Empty ones count as ended.
            lengths, sequence = (
                cu_seqlens.diff(),
                torch.searchsorted(cu_seqlens[1:], offsets, right=True),
            )
            positions = (start[sequence] + offsets - cu_seqlens[sequence])[None]
        end = start + lengths
        slots = 0 if state is None and cu_seqlens is None else self._slots(end)
        rotary = self._rotary(positions)
        span = Span(start, positions, rotary, cu_seqlens, sequence, slots, output_state)

        x, update = self._embed(tokens), None
        layer_states = []
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            # The other kind of checkpoint lets an op look at what it saved only once.
            run = partial(checkpoint, layer, use_reentrant=True) if again else layer
            layer_state = None if state is None else state.layers[i]
            x, update, layer_state = run(x, update, layer_state, span)
            if output_state:
                layer_states.append(layer_state)
        return x + update, ModelState(layer_states, end) if output_state else None

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and tied output layer: (..., d_model) -> (..., vocab_size)."""
        logits = F.linear(self.norm(x), self.embedding.weight)
        return logits[..., : self.config.vocab_size]  # no token has a padding row's id

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, computed in fp32, of what hidden() gave: scalar."""
        logits = F.linear(self.norm(x), self.embedding.weight).flatten(0, -2).float()
        # The padding's logits are masked, not cut off: compiled, whole rows take less time.
        padding = torch.arange(logits.shape[-1], device=x.device) >= self.config.vocab_size
        return F.cross_entropy(logits.masked_fill(padding, -torch.inf), targets.flatten())

    def compile_training(self):
        """Has torch.compile make the blocks, the output layer and the loss, for each shape anew."""
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False)
        self.loss = torch.compile(self.loss, fullgraph=True, dynamic=False)

    def state_size(self, seqlen: int) -> int:
        """Bytes of one sequence's state after seqlen tokens, in the dtype of the weights."""
        return 8 + sum(layer.mixer.state_size(seqlen) for layer in self.layers)

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

    def new_state(self, rows: int, capacity: int = 0) -> ModelState:
        """Of so many texts without a token; of attention, with room for capacity of them."""
        weight = self.embedding.weight
        positions = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        layers = [layer.mixer.new_state(rows, capacity) for layer in self.layers]
        return ModelState(layers, positions)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        state: ModelState,
        indices: Tensor | None = None,
        slots: int | None = None,
    ) -> Tensor:
        """One token per row: tokens (N,) -> logits (N,vocab_size), state moves on in place.

        indices (N,) is i or -1 for row i: rows of -1 leave the layers' states as they are, and
        their logits mean nothing. slots says how many tokens attention has to look at, at least
        those of the longest row; without it they are counted, which a GPU waits for.
        """
        positions = state.positions
        slots = self._slots(positions + 1) if slots is None else slots
        rotary = self._rotary(positions)
        span = Span(positions, positions, rotary, slots=slots, fill=state.fill, indices=indices)
        first, *following = self._projections(state.layers, indices)
        x, *h = project(self._embed(tokens), None, first)
        tails = []
        for i, layer in enumerate(self.layers):
            if not tails:
                mixed, state.layers[i] = layer.mixer.decode(h, state.layers[i], span)
            tails.append(layer.tail(following[i]))
            if following[i].conv is None:  # which would be all of the next mixer
                x, *h = block_tails(x, mixed, tails, state.counters)
                tails = []
        state.positions += 1
        if state.fill is not None:
            state.fill.add_(1).remainder_(state.capacity)
        (logits,) = h
        return logits[..., : self.config.vocab_size]

    def defer_writes(self, state: ModelState, capacity: int = 16):
        """From here on, decode() writes linear layers' states every capacity-th token only."""
        if state.fill is not None:
            return
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, LinearMixer):
                state.layers[i] += layer.mixer.rings(state.layers[i], capacity)
        state.fill, state.capacity = torch.zeros_like(state.positions), capacity

    def _projections(self, states: list[LayerState], indices: Tensor | None) -> list[Projection]:
        """What decode() begins every layer with, and the output layer."""
        projections = [
            layer.mixer.projection(layer.norm1, state, indices)
            for layer, state in zip(self.layers, states, strict=True)
        ]
        return [*projections, Projection(self.norm, (self.embedding.weight,))]

    def _embed(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self.embedding.weight)

    def _slots(self, ends: Tensor) -> int:
        """Tokens in the longest sequence, where a key-value cache has to know: GPUs wait for it."""
        return ends.max().item() if "attention" in self.config.layers and len(ends) else 0

    def _rotary(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin (*positions, 1, R) of position * rotary_base^(-2j/dim), for each mixer."""
        config, tables = self.config, {}
        for mixer, dim in (
            ("window", config.head_dim),
            ("attention", config.attention_rotary_dim),
        ):
            if mixer in config.layers:
                dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
                tables[mixer] = rotary_angles(positions, dim, config.rotary_base, dtype)
        return tables
