"""What is run on a GPU: shapes, baselines, and how fast ours has to be (ms on an H200)."""

from functools import partial

import torch
import torch.nn.functional as F

import baselines
import baselines_cuda as gpu
import cases as build
import cases_products as products
from registry import Implementation, exchanged


def cases():
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    return [
        *linear_attention(bf16),
        *linear_attention_decode(bf16),
        *sliding_window(bf16),
        *short_conv(bf16),
        *skinny_linear(bf16),
        *decode_block(bf16),
        *decode_blocks(bf16),
        *taylor_feature_map(bf16),
    ]


def linear_attention(bf16):
    others = [*gpu.fla_based(), *gpu.softmax_attentions()]
    for batch, nheads, seqlen, head_dim, forward_ms, backward_ms in (
        (4, 28, 8192, 64, 0.16, 0.80),
        (16, 16, 2048, 64, 0.085, 0.40),
        (1, 16, 4096, 64, 0.035, 0.12),
        (1, 16, 32768, 64, 0.13, 0.55),
        (4, 16, 8192, 112, 0.17, 0.80),
    ):
        case = partial(
            build.linear_attention, batch, nheads, seqlen, 16, head_dim, others=others, **bf16
        )
        yield case(target_ms=forward_ms)
        yield case(target_ms=backward_ms, work="backward")
    for seqlen in (1 << 17, 1 << 20):  # the cost of a token does not depend on their number
        queries = [0, 1, 1000, seqlen // 2, seqlen - 1]
        yield build.linear_attention(1, 16, seqlen, 16, 64, others=[], queries=queries, **bf16)


def linear_attention_decode(bf16):
    others = [
        build.outer_in_place("eager, 273 rows", baselines.decode_public(baselines.outer_map)),
        build.outer_in_place(
            "torch.compile, 273 rows", gpu.compiled(baselines.decode_public(baselines.outer_map))
        ),
        build.in_place(
            "torch.compile, 153 rows",
            gpu.compiled(baselines.decode_public(baselines.packed_map)),
            *(3, 4),
        ),
        *gpu.fla_decode(),
    ]
    for batch, nheads, head_dim, ms, share in (
        (1, 16, 64, 0.004, None),
        (128, 16, 64, 0.044, 0.85),
        (128, 28, 64, 0.077, 0.85),
        (512, 16, 112, 0.31, 0.85),
    ):
        yield build.linear_attention_decode(
            batch, nheads, 16, head_dim, others=others, target_ms=ms, target_floor=share, **bf16
        )
    for batch, nheads, ms in ((128, 16, None), (128, 28, 0.046)):
        yield build.linear_attention_decode_deferred(
            batch, nheads, 16, 64, pending=16, target_ms=ms, **bf16
        )


def sliding_window(bf16):
    window = 128
    others = [
        exchanged("FlexAttention compiled", gpu.window_flex(window)),
        Implementation("FlashAttention-2 windowed", gpu.window_flash(window)),
    ]
    for batch, seqlen, head_dim, forward_ms, backward_ms in (
        (4, 8192, 64, 0.10, 0.30),
        (4, 8192, 128, 0.18, 0.45),
        (4, 8192, 112, 0.16, 0.42),
        (1, 65536, 64, 0.19, 0.60),
    ):
        case = partial(
            build.sliding_window_attention,
            *(batch, 16, seqlen, head_dim, window),
            others=others,
            **bf16,
        )
        yield case(target_ms=forward_ms)
        yield case(target_ms=backward_ms, work="backward")
    decode = baselines.window_decode
    steps = [
        build.in_place("ring write + SDPA", decode, 3, 4),
        build.in_place("torch.compile of it", gpu.compiled(decode), 3, 4),
    ]
    for batch in (1, 128):
        yield build.sliding_window_decode(
            *(batch, 16, 64, window),
            others=steps,
            target_floor=0.8 if batch == 128 else None,
            **bf16,
        )


def short_conv(bf16):
    others = [
        exchanged("conv1d + silu + mul", baselines.conv),
        Implementation("torch.compile, shifts", gpu.compiled(baselines.conv_shifts)),
    ]
    case = partial(build.short_conv, 4, 4096, 3584, 3, halves=True, others=others, **bf16)
    yield case(target_floor=0.8)
    yield case(work="backward")
    steps = [
        build.in_place("eager", baselines.conv_decode, 2),
        build.in_place("torch.compile", gpu.compiled(baselines.conv_decode), 2),
    ]
    yield build.short_conv_decode(128, 3584, 3, others=steps, **bf16)


def skinny_linear(bf16):
    """The products of an MLP; a graph is a chain of them, each with weights of its own."""
    cublas = Implementation("cuBLAS", F.linear)
    swiglu = Implementation("cuBLAS, compiled SwiGLU", gpu.compiled(baselines.linear_swiglu))
    for rows in (8, 32, 64):
        case = partial(products.skinny_linear, rows, **bf16)
        yield case(1792, 7168, others=[swiglu], swiglu=True)
        yield case(3584, 1792, others=[cublas])


def decode_block(bf16):
    """Behind a convolution and before one, in based-1.4b: without that one, and with it."""
    others = [Implementation("torch.compile, cuBLAS", gpu.compiled(baselines.decode_block))]
    with_conv = [
        build.in_place("torch.compile, cuBLAS", gpu.compiled(baselines.decode_block_conv), 10),
        build.in_place("decode_block, short_conv_decode", products.block_then_conv, 10),
    ]
    for rows in (1, 8, 32, 64, 128):
        case = partial(products.decode_block, rows, 3584, 1792, 3584, 7168, **bf16)
        yield case(others=others)
        yield case(others=with_conv, taps=3)


def decode_blocks(bf16):
    """The four between an attending layer of based-1.4b and the next one."""
    others = [
        ("torch.compile, cuBLAS", gpu.compiled(baselines.decode_block_conv)),
        ("decode_block, one by one", products.with_conv),
    ]
    for rows in (1, 8, 32, 64, 128):
        yield products.decode_blocks(rows, 4, 1792, 3584, 3, others=others, **bf16)


def taylor_feature_map(bf16):
    others = [
        Implementation("eager index form", baselines.packed_map),
        Implementation("torch.compile of it", gpu.compiled(baselines.packed_map)),
    ]
    case = partial(build.taylor_feature_map, 4, 8192, 16, 16, others=others, **bf16)
    yield case()
    yield case(work="backward")
