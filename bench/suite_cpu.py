"""What is run on a CPU: shapes, baselines, and how many times as fast as them ours has to be."""

from functools import partial

import torch
import torch.nn.functional as F

import baselines
import cases as build
from registry import Implementation, exchanged

# Names that targets refer to.
CHUNKED = "chunked eager, 273 rows"
DECODE = "eager, 153 rows"
SDPA = "SDPA causal"
CONV = "conv1d + silu + mul"


def cases():
    fp32 = {"dtype": torch.float32, "device": "cpu"}
    heads = {"batch": 1, "nheads": 16, **fp32}
    sdpa_other = exchanged(SDPA, baselines.attention_causal, same_function=False)
    quadratic = exchanged("quadratic eager", baselines.linear_quadratic)
    chunked = [
        exchanged(CHUNKED, baselines.linear_chunked(baselines.outer_map)),
        exchanged("chunked eager, 153 rows", baselines.linear_chunked(baselines.packed_map)),
        exchanged("chunk loop, 273 rows", baselines.linear_chunk_loop(baselines.outer_map)),
        exchanged("chunk loop, 153 rows", baselines.linear_chunk_loop(baselines.packed_map)),
    ]
    linear = partial(build.linear_attention, feature_dim=16, head_dim=64, **heads)
    steps = [
        build.in_place(DECODE, baselines.decode_public(baselines.packed_map), 3, 4),
        build.in_place("eager fused, 153 rows", baselines.decode_fused(baselines.packed_map), 3, 4),
        build.outer_in_place("eager, 273 rows", baselines.decode_public(baselines.outer_map)),
    ]
    decode = partial(
        build.linear_attention_decode,
        batch=16,
        nheads=16,
        feature_dim=16,
        head_dim=64,
        others=steps,
        targets={DECODE: 5},
        **fp32,
    )
    windows = [
        sdpa_other,
        exchanged("SDPA band mask", baselines.window_band(128)),
        exchanged("eager blocks", baselines.window_blocks(128, baselines.attention_eager)),
        exchanged("SDPA blocks", baselines.window_blocks(128, F.scaled_dot_product_attention)),
    ]
    window = partial(build.sliding_window_attention, head_dim=64, window=128, **heads)
    conv = partial(build.short_conv, batch=4, seqlen=4096, channels=1024, taps=3, **fp32)
    shifts = Implementation("shifted multiply-adds", baselines.conv_shifts)
    return [
        linear(seqlen=1024, others=[quadratic, *chunked, sdpa_other]),
        linear(seqlen=8192, others=[*chunked, sdpa_other], targets={CHUNKED: 6, SDPA: 10}),
        linear(seqlen=1024, others=[quadratic, *chunked, sdpa_other], work="forward+backward"),
        linear(
            seqlen=4096,
            others=[*chunked, sdpa_other],
            targets={CHUNKED: 4},
            work="forward+backward",
        ),
        # A state that the last call left in the cache, then states that come from memory.
        decode(input_sets=1),
        decode(),
        window(seqlen=8192, others=windows, targets={SDPA: 8}),
        window(seqlen=4096, others=windows, work="forward+backward"),
        build.sliding_window_decode(
            batch=16,
            nheads=16,
            head_dim=64,
            window=128,
            others=[build.in_place("ring write + SDPA", baselines.window_decode, 3, 4)],
            **fp32,
        ),
        conv(others=[exchanged(CONV, baselines.conv_in_place), shifts], targets={CONV: 2}),
        conv(others=[exchanged(CONV, baselines.conv), shifts], work="forward+backward"),
        build.short_conv_decode(
            batch=16,
            channels=1024,
            taps=3,
            others=[build.in_place("eager", baselines.conv_decode, 2)],
            **fp32,
        ),
        build.taylor_feature_map(
            batch=1,
            seqlen=8192,
            nheads=16,
            feature_dim=16,
            others=[Implementation("eager index form", baselines.packed_map)],
            **fp32,
        ),
    ]
