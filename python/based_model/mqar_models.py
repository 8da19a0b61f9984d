"""Small models for the recall test: an embedding, two or three token mixers, the embedding again.

The model is the one of Zoology's experiments (HazyResearch/zoology, arXiv 2312.04927): residual
stream with LayerNorms, one head, no positions, and an MLP that is the identity, which leaves
x + norm(x) of it. Answers are predicted only where one is asked for.

Shapes: B batch, L seqlen, K pairs, d d_model, D feature_dim, F = 1 + D + D(D+1)/2, W window,
S state_dim. States are counted in elements of one sequence.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from based_ops import linear_attention, short_conv, sliding_window_attention

Select = Callable[[Tensor], Tensor]  # the rows of (B, L, ...) that are wanted: (B, K, ...)


class Embed(torch.autograd.Function):
    """weight[tokens]; the gradient is summed in fp32, in as few kernels as there can be."""

    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, dout):
        (tokens,) = ctx.saved_tensors
        dweight = dout.new_zeros(ctx.rows, dout.shape[-1], dtype=torch.float32)
        dweight.index_add_(0, tokens.flatten(), dout.flatten(0, -2).float())
        return dweight.to(dout.dtype), None


def compiled_for_rows(function: Callable) -> Callable:
    """function of tensors (N, ...); on a GPU by torch.compile, once for all N."""
    compiled = torch.compile(function, fullgraph=True)

    @wraps(function)
    def call(*args):
        if not args[0].is_cuda:
            return function(*args)
        for x in args:
            if isinstance(x, Tensor):
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_static(x, list(range(1, x.ndim)))
        with torch._dynamo.config.patch(recompile_limit=64):  # widths, dtypes, training or not
            return compiled(*args)

    return call


Affine = tuple[Tensor, Tensor]  # a LayerNorm's weight and bias, (d,) each


@compiled_for_rows
def normalize(x: Tensor, norm: Affine) -> Tensor:
    """LayerNorm of x (N, d)."""
    return F.layer_norm(x, norm[0].shape, *norm)


@compiled_for_rows
def join(x: Tensor, update: Tensor, mlp: Affine | None, norm: Affine) -> tuple[Tensor, Tensor]:
    """The residual stream (N, d) after a mixer's update and the identity MLP, if there is one, and
    its LayerNorm for the next mixer."""
    x = x + update
    if mlp is not None:
        x = x + F.layer_norm(x, mlp[0].shape, *mlp)
    return x, F.layer_norm(x, norm[0].shape, *norm)


@compiled_for_rows
def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, V), in fp32."""
    return F.cross_entropy(logits.float(), answers)


class Linear(nn.Module):
    """Based's linear attention: F (d + 1) elements."""

    def __init__(self, d_model: int, feature_dim: int):
        super().__init__()
        self.widths = (feature_dim, feature_dim, d_model)
        self.state_size = (d_model + 1) * (1 + feature_dim + feature_dim * (feature_dim + 1) // 2)
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, select: Select) -> Tensor:
        q, k, v = self.qkv_proj(x)[:, :, None].split(self.widths, -1)
        return self.o_proj(select(linear_attention(q, k, v)[:, :, 0]))


class Attention(nn.Module):
    """Softmax attention over all tokens, or over the last W: 2 d min(L, W) elements."""

    def __init__(self, d_model: int, seqlen: int, window: int | None = None):
        super().__init__()
        self.window = window
        self.state_size = 2 * d_model * min(seqlen, window or seqlen)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, select: Select) -> Tensor:
        q, k, v = self.qkv_proj(x)[:, :, None].chunk(3, -1)
        if self.window is None or self.window >= x.shape[1]:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        else:
            out = sliding_window_attention(q, k, v, self.window)[:, :, 0]
        return self.out_proj(select(out))


class BaseConv(nn.Module):
    """(short convolution of x) * (W x + b) + x.

    Beside another mixer its 2 d elements are not counted, as in the paper.
    """

    def __init__(self, d_model: int, width: int = 3):
        super().__init__()
        self.state_size = (width - 1) * d_model
        bound = width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(d_model, width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(d_model).uniform_(-bound, bound))
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, select: Select) -> Tensor:
        conv = short_conv(x, self.conv_weight, self.conv_bias, gate=self.proj(x))
        return select(conv + x)


class H3(nn.Module):
    """H3 (Fu et al., arXiv 2212.14052): q * diagonal SSM(shift SSM(k) v), d S elements.

    The shift SSM is a convolution with S taps. The diagonal one (S4D-Lin, bilinear) has S/2 complex
    modes; both come with a skip. Heads are 2 wide: every head's k and v meet in a 2 x 2 product.
    Runs in fp32.
    """

    head_dim = 2

    def __init__(self, d_model: int, state_dim: int):
        super().__init__()
        nheads, modes = d_model // self.head_dim, state_dim // 2
        self.state_size = d_model * state_dim
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        bound = state_dim**-0.5
        self.shift = nn.Parameter(torch.empty(d_model, state_dim).uniform_(-bound, bound))
        self.shift_skip = nn.Parameter(torch.randn(d_model))
        self.diagonal_skip = nn.Parameter(torch.randn(nheads))
        low, high = math.log(0.001), math.log(0.1)
        self.log_dt = nn.Parameter(torch.rand(nheads) * (high - low) + low)
        self.log_decay = nn.Parameter(torch.full((nheads, modes), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(modes).repeat(nheads, 1))
        self.input = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(nheads, modes, 1))
        self.output = nn.Parameter(torch.randn(nheads, modes, 2) * 0.5**0.5)

    def diagonal_kernel(self, seqlen: int) -> Tensor:
        """The diagonal SSM as a convolution: (H, L) fp32."""
        dt = self.log_dt.exp()[:, None]
        dt_a = torch.complex(-self.log_decay.exp(), self.frequency) * dt
        scale = torch.view_as_complex(self.input) * torch.view_as_complex(self.output)
        scale = scale * dt / (1 - dt_a / 2)
        log_a = ((1 + dt_a / 2) / (1 - dt_a / 2)).log()
        powers = (log_a[..., None] * torch.arange(seqlen, device=dt.device)).exp()
        return 2 * torch.einsum("hs,hsl->hl", scale, powers).real

    def forward(self, x: Tensor, select: Select) -> Tensor:
        seqlen = x.shape[1]
        q, k, v = self.qkv_proj(x).float().mT.chunk(3, 1)  # (B, d, L) each
        k = causal_convolution(k, self.shift[:, :seqlen]) + self.shift_skip[:, None] * k
        k, v, q = (y.unflatten(1, (self.head_dim, -1)) for y in (k, v, q))  # (B, 2, H, L)
        kv = k[:, :, None] * v[:, None]  # (B, 2, 2, H, L)
        kv = causal_convolution(kv, self.diagonal_kernel(seqlen)) + self.diagonal_skip[:, None] * kv
        out = (q[:, :, None] * kv).sum(1).flatten(1, 2).mT  # (B, L, d)
        return self.output_linear(select(out).to(x.dtype))


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """x (..., C, L) with kernel (C, M), M <= L taps from the newest to the oldest, by FFT."""
    seqlen = x.shape[-1]
    product = torch.fft.rfft(x, n=2 * seqlen) * torch.fft.rfft(kernel, n=2 * seqlen)
    return torch.fft.irfft(product, n=2 * seqlen)[..., :seqlen]


class RecallModel(nn.Module):
    """tokens (B, L) and the positions that ask (B, K) -> predictions there.

    mixers in their order; identity_mlp False leaves out x + norm(x).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        mixers: list[nn.Module],
        dropout: float,
        identity_mlp: bool = True,
    ):
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in mixers)
        self.mlp_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in mixers if identity_mlp)
        self.norm = nn.LayerNorm(d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for mixer in mixers:
            # Linear layers of the mixers above; those of others, deeper down, know their own.
            for name, module in mixer.named_children():
                if isinstance(module, nn.Linear):
                    std = 0.02 / math.sqrt(2 * len(mixers)) if name == "out_proj" else 0.02
                    nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def state_size(self) -> int:
        """Elements that a sequence's state has; a BaseConv counts only where all layers are."""
        sizes = [m.state_size for m in self.mixers if not isinstance(m, BaseConv)]
        return sum(sizes or [m.state_size for m in self.mixers])

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the output layer sees: (B, K, d)."""

        def asked(x: Tensor) -> Tensor:
            return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))

        def affine(norm: nn.LayerNorm) -> Affine:
            return norm.weight, norm.bias

        x = F.dropout(Embed.apply(self.embedding.weight, tokens), self.dropout, self.training)
        normed = normalize(x.flatten(0, 1), affine(self.norms[0])).view_as(x)
        last = len(self.mixers) - 1
        for i, mixer in enumerate(self.mixers):
            # After the last mixer only the asked positions are of use.
            select = asked if i == last else lambda y: y
            x, update = select(x), mixer(normed, select)
            mlp = affine(self.mlp_norms[i]) if len(self.mlp_norms) else None
            norm = affine(self.norm if i == last else self.norms[i + 1])
            rows = join(x.flatten(0, 1), update.flatten(0, 1), mlp, norm)
            x, normed = (y.view(update.shape) for y in rows)
        return normed

    def loss(self, tokens: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy of the answers, in nats; fp32."""
        x, weight = self.hidden(tokens, positions).flatten(0, 1), self.embedding.weight
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x, weight = (y.to(torch.get_autocast_dtype(device)) for y in (x, weight))
        with torch.autocast(device, enabled=False):
            return answer_loss(x @ weight.T, answers.flatten())

    def predict(self, tokens: Tensor, positions: Tensor, rows: int = 16384) -> Tensor:
        """The likeliest token at each position, (B, K) int64; rows bounds the logits in memory."""
        x = self.hidden(tokens, positions).flatten(0, 1)
        parts = [(part @ self.embedding.weight.T).argmax(-1) for part in x.split(rows)]
        return torch.cat(parts).view_as(positions)

    def low_precision(self) -> bool:
        """Whether every weight may be bfloat16; state-space parameters may not."""
        return all(isinstance(m, Linear | Attention | BaseConv) for m in self.mixers)
