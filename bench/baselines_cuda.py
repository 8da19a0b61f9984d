"""What else one could run on a GPU: libraries' kernels, and eager code under torch.compile."""

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import baselines
from registry import Implementation, exchange

torch._dynamo.config.recompile_limit = 64  # one per shape, with and without gradients
BLOCK = 128  # queries and keys of a block of FlexAttention's mask


def compiled(run):
    return torch.compile(run, dynamic=False)


def sdpa(name, backend):
    """Causal softmax attention by one of torch's backends; q and k are padded to v's width before
    the clock starts, because they want equal ones."""

    def run(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def prepare(q, k, v, *rest):
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
        return exchange(q, k, v, *rest)

    return Implementation(name, run, prepare, same_function=False)


def softmax_attentions():
    return [
        sdpa("SDPA FlashAttention-2", SDPBackend.FLASH_ATTENTION),
        sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ]


def fla_based():
    """fla's two kernels of the same function; nothing where fla-core is not installed."""
    try:
        from fla.ops.based import fused_chunk_based, parallel_based
    except ImportError as error:
        print(f"fla is left out: {error}")
        return []
    return [
        Implementation("fla parallel_based", parallel_based),
        Implementation("fla fused_chunk_based", fused_chunk_based),
    ]


def fla_decode():
    """One step of fla's recurrence over the 273 rows of the outer map, the map not included; it
    returns a new state."""
    try:
        from fla.ops.linear_attn import fused_recurrent_linear_attn
    except ImportError:
        return []

    def prepare(q, k, v, kv_state, k_state):
        q, k = (baselines.outer_map(x)[:, None] for x in (q, k))
        return q, k, v[:, None], baselines.outer_state(kv_state, k_state, 16)[0]

    def run(q, k, v, kv_state):
        return fused_recurrent_linear_attn(
            q, k, v, scale=1.0, initial_state=kv_state, output_final_state=True, normalize=False
        )

    name = "fla fused_recurrent, 273 rows, no map"
    return [Implementation(name, run, prepare, same_function=False)]


@cache
def window_mask(window, seqlen):
    """The blocks that a query block sees: its own and those before it that the window reaches."""
    blocks, behind = -(-seqlen // BLOCK), -(-(window - 1) // BLOCK)
    first = torch.arange(blocks, device="cuda", dtype=torch.int32)[:, None] - behind
    indices = first.clamp(min=0) + torch.arange(blocks, device="cuda", dtype=torch.int32)
    counts = torch.arange(1, blocks + 1, device="cuda", dtype=torch.int32).clamp(max=behind + 1)
    return BlockMask.from_kv_blocks(
        counts[None, None],
        indices.clamp(max=blocks - 1)[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q, k: (q >= k) & (q - k < window),
        seq_lengths=(seqlen, seqlen),
    )


def window_flex(window):
    attention = compiled(flex_attention)

    def run(q, k, v):
        return attention(q, k, v, block_mask=window_mask(window, q.shape[2]))

    return run


def window_flash(window):
    """FlashAttention-2 with a left window, the aten op that torch ships."""

    def run(q, k, v):
        seqlen = q.shape[1]
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, seqlen, seqlen, 0.0, True, False,
            scale=q.shape[-1] ** -0.5, window_size_left=window - 1, window_size_right=0,
        )[0]  # fmt: skip

    return run
