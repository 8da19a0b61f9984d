"""Every op on a GPU at sizes that are small but cross the kernels' tiles, for compute-sanitizer:

compute-sanitizer --tool memcheck python3 tests/python/small_cases.py [OP ...]

Nothing is compared here; the tests do that.
"""

import itertools
import sys

import torch

import based_ops

F32, BF16 = torch.float32, torch.bfloat16
# Packed sequences of 150 tokens: an empty one, short ones, and bounds that lie outside.
PACKED = [None, [0, 70, 70, 73, 150], [3, 90, 80, 999]]


def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def backward(results):
    flat = torch.utils._pytree.tree_leaves(results)
    sum(x.float().square().sum() for x in flat if x.requires_grad).backward()


def sequences(bounds, rows=2):
    """Options of a call, its batch and its number of sequences."""
    if bounds is None:
        return {}, rows, rows
    return {"cu_seqlens": torch.tensor(bounds, device="cuda")}, 1, len(bounds) - 1


def linear_attention():
    sizes = ((BF16, 16, 64), (BF16, 32, 112), (BF16, 8, 24), (F32, 16, 64))
    for (dtype, dim, width), bounds in itertools.product(sizes, PACKED):
        options, batch, n = sequences(bounds)
        q, k = (draw(batch, 150, 2, dim, dtype=dtype) for _ in range(2))
        v, expanded = draw(batch, 150, 2, width, dtype=dtype), 1 + dim + dim * (dim + 1) // 2
        state = draw(n, 2, expanded, width, dtype=F32), draw(n, 2, expanded, dtype=F32)
        options["initial_state"] = state if width == 64 else None
        backward(based_ops.linear_attention(q, k, v, output_final_state=True, **options))


def sliding_window_attention():
    sizes = ((BF16, 64, 128), (BF16, 112, 17), (BF16, 128, 129), (F32, 64, 17))
    for (dtype, width, window), bounds in itertools.product(sizes, PACKED):
        options, batch, n = sequences(bounds)
        q, k, v = (draw(batch, 150, 2, width, dtype=dtype) for _ in range(3))
        rings = [draw(n, window, 2, width, dtype=dtype) for _ in range(2)]
        state = *rings, torch.arange(n, device="cuda") * 50
        options["initial_state"] = state if width == 64 else None
        backward(
            based_ops.sliding_window_attention(q, k, v, window, output_final_state=True, **options)
        )


def short_conv():
    sizes = ((F32, 5, 4), (BF16, 5, 2), (BF16, 64, 3), (BF16, 264, 8), (F32, 64, 3))
    for (dtype, channels, taps), bounds in itertools.product(sizes, PACKED):
        options, batch, n = sequences(bounds)
        x, gate = draw(batch, 150, 2 * channels, dtype=dtype).chunk(2, -1)
        weight, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype)
        options |= {"initial_state": draw(n, channels, taps - 1, dtype=dtype), "gate": gate}
        backward(
            based_ops.short_conv(
                x, weight, bias, activation="silu", output_final_state=True, **options
            )
        )


def taylor_feature_map():
    for dtype, dim in itertools.product((BF16, F32), (3, 16)):
        backward(based_ops.taylor_feature_map(draw(37, 5, dim, dtype=dtype)))


SLOTS = [None, [2, 0, -1, 99]]  # of a pool of four


@torch.no_grad()
def linear_attention_decode():
    for dtype, (dim, width), slots in itertools.product(
        (BF16, F32), ((16, 64), (16, 112), (8, 24)), SLOTS
    ):
        q, k = (draw(4, 2, dim, dtype=dtype) for _ in range(2))
        v, expanded = draw(4, 2, width, dtype=dtype), 1 + dim + dim * (dim + 1) // 2
        state = draw(4, 2, expanded, width, dtype=F32), draw(4, 2, expanded, dtype=F32)
        options = {"state_indices": None if slots is None else torch.tensor(slots, device="cuda")}
        based_ops.linear_attention_decode(q, k, v, *state, **options)
        rings = draw(4, 3, 2, dim, dtype=dtype), draw(4, 3, 2, width, dtype=dtype)
        fill = torch.tensor([0, 2, 1, 7], device="cuda")
        based_ops.linear_attention_decode_deferred(q, k, v, *state, *rings, fill, **options)
        based_ops.linear_attention_fold(*state, *rings, fill, **options)


@torch.no_grad()
def sliding_window_decode():
    for dtype, width, slots in itertools.product((BF16, F32), (64, 112), SLOTS):
        q, k, v = (draw(4, 2, width, dtype=dtype) for _ in range(3))
        rings = [draw(4, 129, 2, width, dtype=dtype) for _ in range(2)]
        positions = torch.tensor([0, 5, 128, 10**6], device="cuda")
        indices = None if slots is None else torch.tensor(slots, device="cuda")
        based_ops.sliding_window_decode(q, k, v, *rings, positions, state_indices=indices)


@torch.no_grad()
def short_conv_decode():
    for dtype, taps, slots in itertools.product((BF16, F32), (2, 8), SLOTS):
        x, gate = draw(4, 2 * 70, dtype=dtype).chunk(2, -1)
        weight, state = draw(70, taps, dtype=dtype), draw(4, 70, taps - 1, dtype=dtype)
        indices = None if slots is None else torch.tensor(slots, device="cuda")
        based_ops.short_conv_decode(x, weight, state, gate=gate, state_indices=indices)


@torch.no_grad()
def skinny_linear():
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dtype, rows in itertools.product((BF16, torch.float16), (3, 9, 32, 64)):
        x, weight, bias = (
            draw(*shape, dtype=dtype) for shape in ((rows, 1000), (300, 1000), (300,))
        )
        based_ops.skinny_linear(x, weight, bias)
        based_ops.skinny_linear(x, weight, swiglu=True)


@torch.no_grad()
def decode_block():
    if torch.cuda.get_device_capability() != (9, 0):
        return
    counters = torch.zeros(8, dtype=torch.int32, device="cuda")
    # All blocks of weights of a CTA fit its ring here. Under racecheck no warp leaves a cluster's
    # barrier before all have come to wait at it, and the one that fills the ring comes last.
    for rows, d, width, m, columns in (
        (1, 8, 8, 8, 1),
        (3, 136, 200, 200, 333),
        (9, 200, 72, 8, 2),
        (33, 72, 144, 264, 130),
        (128, 264, 136, 328, 520),
        (9, 8, 8, 8, 16393),  # more columns than the CTAs take at once
    ):
        mixed, out_weight, fc1, fc2, next_weight = (
            draw(*shape, dtype=BF16)
            for shape in ((rows, width), (d, width), (2 * m, d), (d, m), (columns, d))
        )
        x, norm, bias = draw(rows, d, dtype=F32), draw(d, dtype=BF16), draw(d, dtype=BF16)
        weights = out_weight, norm, fc1, fc2, norm, next_weight
        based_ops.decode_block(mixed, x, *weights, counters)
        options = {"out_bias": bias, "next_bias": draw(columns, dtype=BF16)}
        based_ops.decode_block(mixed, x, *weights, counters, **options)
        channels, taps = 8 * (1 + columns % 1000 // 16), 2 + rows % 3
        weights = *weights[:-1], draw(2 * channels, d, dtype=BF16)
        state = draw(rows + 2, channels, taps - 1, dtype=BF16)
        options = {"out_bias": bias, "conv_weight": draw(channels, taps, dtype=BF16)}
        options["conv_state"] = state[:rows]
        based_ops.decode_block(mixed, x, *weights, counters, **options)
        options["conv_state"] = state
        options["state_indices"] = indices = torch.arange(1, rows + 1, device="cuda")
        based_ops.decode_block(mixed, x, *weights, counters, **options)
        indices[rows // 2], indices[-1] = -1, 10**9
        based_ops.decode_block(mixed, x, *weights, counters, **options)
    for rows, d, taps in ((1, 8, 2), (9, 64, 4), (33, 16, 3)):
        state = draw(2, rows, 2 * d, taps - 1, dtype=BF16)
        blocks = [
            based_ops.DecodeBlock(
                *(draw(*shape, dtype=BF16) for shape in ((d, k), (d,), (32, d), (d, 16), (d,))),
                next_weight=draw(4 * d, d, dtype=BF16),
                conv_weight=draw(2 * d, taps, dtype=BF16),
                conv_state=state[i],
            )
            for i, k in enumerate((8, 2 * d))
        ]
        mixed, x = draw(rows, 8, dtype=BF16), draw(rows, d, dtype=F32)
        based_ops.decode_blocks(mixed, x, blocks, counters)


CASES = [
    decode_block,
    linear_attention,
    linear_attention_decode,
    sliding_window_attention,
    sliding_window_decode,
    short_conv,
    short_conv_decode,
    skinny_linear,
    taylor_feature_map,
]

if __name__ == "__main__":
    for case in CASES:
        if case.__name__ in based_ops.build_info()["cuda_ops"]:
            if not sys.argv[1:] or case.__name__ in sys.argv[1:]:
                case()
                torch.cuda.synchronize()
                print(case.__name__, "done", flush=True)
