"""Cases of the products of a decode step, as cases.py has those of the other ops."""

from functools import partial

import torch
import torch.nn.functional as F

import based_ops
import baselines
import oracle
from cases import in_place, normal
from registry import OURS, Case, Implementation


def skinny_linear(rows, width, columns, dtype, device, others, swiglu=False, **targets):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        return draw(rows, width), draw(columns, width) / width**0.5

    features = columns // 2 if swiglu else columns
    return Case(
        "skinny_linear",
        "decode",
        f"B{rows} {width} to {columns}" + (" swiglu" if swiglu else ""),
        dtype,
        inputs,
        oracle.plain(baselines.linear_swiglu if swiglu else F.linear),
        [Implementation(OURS, partial(based_ops.skinny_linear, swiglu=swiglu)), *others],
        bytes=(rows * (width + features) + columns * width) * dtype.itemsize,
        flops=rows * 2 * width * columns,
        **targets,
    )


def decode_block(
    rows, mixed_width, width, inner, columns, dtype, device, others, taps=None, **targets
):
    """width: of the residual stream; inner: of the MLP; columns: of the next projection; taps: of
    the convolution that follows it, whose weight and state are then the last two arguments."""
    channels = columns // 2 if taps else columns
    conv_shapes = ((channels, taps), (rows, channels, taps - 1)) if taps else ()
    shapes = (width, mixed_width), (2 * inner, width), (width, inner), (columns, width)

    def inputs(generator):
        draw = normal(generator, dtype, device)
        out, fc1, fc2, after = (draw(*shape) / shape[1] ** 0.5 for shape in shapes)
        x = normal(generator, torch.float32, device)(rows, width)
        counters = torch.zeros(8, dtype=torch.int32, device=device)
        norms = draw(width), draw(width)
        block = x, out, norms[0], fc1, fc2, norms[1], after, counters
        return draw(rows, mixed_width), *block, *(draw(*shape) for shape in conv_shapes)

    run = baselines.decode_block_conv if taps else baselines.decode_block
    states = (10,) if taps else ()
    weights = sum(a * b for a, b in shapes)
    activations = rows * ((mixed_width + channels) * dtype.itemsize + 2 * width * 4)
    if taps:
        activations += channels * (taps + rows * 2 * (taps - 1)) * dtype.itemsize
    return Case(
        "decode_block",
        "decode",
        f"B{rows} {mixed_width}, {width}, {inner}, {columns}" + (f" K{taps}" if taps else ""),
        dtype,
        inputs,
        oracle.in_place(run, *states),
        [in_place(OURS, with_conv, *states), *others],
        bytes=weights * dtype.itemsize + activations,
        flops=rows * 2 * weights,
        **targets,
    )


def decode_blocks(rows, count, width, inner, taps, dtype, device, others, **targets):
    """As many blocks between convolutions of 2 width channels. Their tensors follow mixed, x and
    the counters, eight of each: six weights, then weight and state of the convolution."""
    channels = 2 * width
    matrices = (width, channels), (2 * inner, width), (width, inner), (2 * channels, width)

    def inputs(generator):
        draw = normal(generator, dtype, device)
        blocks = []
        for _ in range(count):
            out, fc1, fc2, after = (draw(*shape) / shape[1] ** 0.5 for shape in matrices)
            blocks += [out, draw(width), fc1, fc2, draw(width), after]
            blocks += [draw(channels, taps), draw(rows, channels, taps - 1)]
        x = normal(generator, torch.float32, device)(rows, width)
        return draw(rows, channels), x, torch.zeros(8, dtype=torch.int32, device=device), *blocks

    def ours(mixed, x, counters, *blocks):
        blocks = [
            based_ops.DecodeBlock(*weights, conv_weight=weight, conv_state=state)
            for *weights, weight, state in zip(*[iter(blocks)] * 8)
        ]
        return based_ops.decode_blocks(mixed, x, blocks, counters)

    states = range(10, 3 + 8 * count, 8)
    weights = count * sum(a * b for a, b in matrices)
    kept = count * channels * (taps + rows * 2 * (taps - 1))
    return Case(
        "decode_blocks",
        "decode",
        f"B{rows} {count} of {channels}, {width}, {inner}, {2 * channels} K{taps}",
        dtype,
        inputs,
        oracle.in_place(one_by_one(baselines.decode_block_conv), *states),
        [
            in_place(OURS, ours, *states),
            *(in_place(name, one_by_one(block), *states) for name, block in others),
        ],
        bytes=(weights + kept + rows * 2 * channels) * dtype.itemsize + rows * 2 * width * 4,
        flops=rows * 2 * weights,
        links=count,
        **targets,
    )


def one_by_one(block):
    """A chain of blocks, as decode_blocks() gives their tensors."""

    def run(mixed, x, counters, *blocks):
        for *weights, weight, state in zip(*[iter(blocks)] * 8):
            x, mixed = block(mixed, x, *weights, counters, weight, state)
        return x, mixed

    return run


def with_conv(*args):
    """decode_block, with weight and state of a convolution if they follow its arguments."""
    weight, state = args[9:] or (None, None)
    return based_ops.decode_block(*args[:9], conv_weight=weight, conv_state=state)


def block_then_conv(*args):
    """decode_block with a convolution as two ops."""
    *block, weight, state = args
    x, out = based_ops.decode_block(*block)
    u, gate = out.chunk(2, -1)
    return x, based_ops.short_conv_decode(u, weight, state, activation="silu", gate=gate)
