"""A case of each op from its shape and baselines: inputs, expected outputs, bytes and flops.

Which shapes and baselines are run is in suite_<device>.py.
"""

from dataclasses import replace
from functools import partial

import torch

import based_ops
import baselines
import oracle
from based_ops import reference
from registry import OURS, Case, Implementation, as_tuple, with_backward


def linear_attention(
    batch,
    nheads,
    seqlen,
    feature_dim,
    head_dim,
    dtype,
    device,
    others,
    work="forward",
    queries=None,
    **targets,
):
    """queries: the tokens whose output is checked, in a forward too long to check all of it."""

    def inputs(generator):
        draw = normal(generator, dtype, device)
        q, k = (draw(batch, seqlen, nheads, feature_dim) for _ in range(2))
        count = 1 if work == "forward" else 2  # v, then dout
        return q, k, *(draw(batch, seqlen, nheads, head_dim) for _ in range(count))

    # F x (V+1) products per token and head: update the state and read it. Backward reads it again
    # for dq and holds the state's gradient, which is updated, and read for dk and for dv.
    products = {"forward": 2, "backward": 4, "forward+backward": 6}[work]
    tokens = batch * seqlen * nheads
    expected = partial(oracle.attention, oracle.taylor_weights, queries=queries)
    return Case(
        "linear_attention",
        work,
        f"B{batch} T{seqlen} H{nheads} D{feature_dim} V{head_dim}",
        dtype,
        inputs,
        _on_corner_heads(expected, device),
        _implementations(work, Implementation(OURS, based_ops.linear_attention), others),
        bytes=_bytes(tokens * (2 * feature_dim + head_dim), tokens * head_dim, dtype, work),
        flops=tokens * products * 2 * _expanded(feature_dim) * (head_dim + 1),
        sample=_corner_heads(device, queries),
        **targets,
    )


def linear_attention_decode(
    batch, nheads, feature_dim, head_dim, dtype, device, others, input_sets=None, **targets
):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        q, k = (draw(batch, nheads, feature_dim) for _ in range(2))
        # A state that 64 tokens left behind: random numbers would not make a denominator.
        past = reference.taylor_feature_map(draw(batch, 64, nheads, feature_dim).float())
        values = draw(batch, 64, nheads, head_dim).float()
        kv_state = torch.einsum("bthf,bthv->bhfv", past, values).contiguous()
        return q, k, draw(batch, nheads, head_dim), kv_state, past.sum(1)

    rows, state = batch * nheads, _expanded(feature_dim) * (head_dim + 1)
    return Case(
        "linear_attention_decode",
        "decode",
        f"B{batch} H{nheads} D{feature_dim} V{head_dim}" + (" cached" if input_sets == 1 else ""),
        dtype,
        inputs,
        oracle.in_place(reference.linear_attention_decode, 3, 4),
        [in_place(OURS, based_ops.linear_attention_decode, 3, 4), *others],
        bytes=rows * 2 * (state * 4 + (feature_dim + head_dim) * dtype.itemsize),
        flops=rows * 4 * state,
        input_sets=input_sets,
        **targets,
    )


def linear_attention_decode_deferred(
    batch, nheads, feature_dim, head_dim, pending, dtype, device, **targets
):
    """`pending` steps of all rows in phase, the last of which writes the state; next to the plain
    form, which writes it in every step."""

    def inputs(generator):
        draw = normal(generator, dtype, device)
        plain = linear_attention_decode(batch, nheads, feature_dim, head_dim, dtype, device, [])
        state = plain.inputs(generator)[3:]
        q, k = (draw(pending, batch, nheads, feature_dim) for _ in range(2))
        rings = (draw(batch, pending, nheads, width) for width in (feature_dim, head_dim))
        fill = torch.arange(pending, device=device)[:, None].repeat(1, batch)
        return q, k, draw(pending, batch, nheads, head_dim), *state, *rings, fill

    def deferred(q, k, v, kv_state, k_state, pending_k, pending_v, fill):
        for token in zip(q, k, v, fill, strict=True):
            out = based_ops.linear_attention_decode_deferred(
                *token[:3], kv_state, k_state, pending_k, pending_v, token[3]
            )
        return out

    def plain(module, q, k, v, kv_state, k_state, *_):
        for token in zip(q, k, v, strict=True):
            out = module.linear_attention_decode(*token, kv_state, k_state)
        return out

    def results(args, out):
        return out, *args[3:5]

    rows, state = batch * nheads, _expanded(feature_dim) * (head_dim + 1)
    ring = pending / 2 * (feature_dim + head_dim)  # read, on average; one token of it written
    token = 2 * (feature_dim + head_dim)
    return Case(
        "linear_attention_decode_deferred",
        "decode",
        f"B{batch} H{nheads} D{feature_dim} V{head_dim} C{pending}",
        dtype,
        inputs,
        oracle.in_place(partial(plain, reference), 3, 4),
        [
            replace(in_place(OURS, deferred, 3, 4, 5, 6), outputs=results),
            replace(in_place("plain form", partial(plain, based_ops), 3, 4), outputs=results),
        ],
        bytes=int(rows * (state * 4 * (1 + 1 / pending) + (ring + token) * dtype.itemsize)),
        flops=rows * 4 * state,
        steps=pending,
        **targets,
    )


def sliding_window_attention(
    batch, nheads, seqlen, head_dim, window, dtype, device, others, work="forward", **targets
):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        count = 3 if work == "forward" else 4
        return tuple(draw(batch, seqlen, nheads, head_dim) for _ in range(count))

    def ours(q, k, v):
        return based_ops.sliding_window_attention(q, k, v, window)

    rows = batch * nheads
    pairs = rows * (seqlen * window - window * (window - 1) // 2)
    # Scores and output; then dv, dw, dq and dk.
    products = {"forward": 2, "backward": 4, "forward+backward": 6}[work]
    expected = partial(oracle.attention, oracle.softmax_weights, window=window)
    return Case(
        "sliding_window_attention",
        work,
        f"B{batch} T{seqlen} H{nheads} V{head_dim} W{window}",
        dtype,
        inputs,
        _on_corner_heads(expected, device),
        _implementations(work, Implementation(OURS, ours), others),
        bytes=_bytes(3 * rows * seqlen * head_dim, rows * seqlen * head_dim, dtype, work),
        flops=pairs * products * 2 * head_dim,
        sample=_corner_heads(device),
        **targets,
    )


def sliding_window_decode(batch, nheads, head_dim, window, dtype, device, others, **targets):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        q, k, v = (draw(batch, nheads, head_dim) for _ in range(3))
        k_cache, v_cache = (draw(batch, window, nheads, head_dim) for _ in range(2))
        positions = torch.arange(batch, device=device) * 7 + window  # every ring is full
        return q, k, v, k_cache, v_cache, positions

    rows = batch * nheads
    return Case(
        "sliding_window_decode",
        "decode",
        f"B{batch} H{nheads} V{head_dim} W{window}",
        dtype,
        inputs,
        oracle.in_place(reference.sliding_window_decode, 3, 4),
        [in_place(OURS, based_ops.sliding_window_decode, 3, 4), *others],
        bytes=rows * head_dim * (2 * window + 4) * dtype.itemsize,
        flops=rows * 4 * window * head_dim,
        **targets,
    )


def short_conv(
    batch, seqlen, channels, taps, dtype, device, others, halves=False, work="forward", **targets
):
    """halves: x and gate are those of one tensor, as a projection in a model gives them."""

    def inputs(generator):
        draw = normal(generator, dtype, device)
        x, gate, dout = (draw(batch, seqlen, channels) for _ in range(3))
        if halves:
            x, gate = torch.cat([x, gate], -1).chunk(2, -1)
        weight = draw(channels, taps)
        return (x, weight, gate) if work == "forward" else (x, weight, gate, dout)

    def run(module, x, weight, gate):
        return module.short_conv(x, weight, activation="silu", gate=gate)

    elements = batch * seqlen * channels
    return Case(
        "short_conv",
        work,
        f"B{batch} T{seqlen} C{channels} K{taps} silu gate" + (" halves" if halves else ""),
        dtype,
        inputs,
        oracle.plain(partial(run, reference), work != "forward"),
        _implementations(work, Implementation(OURS, partial(run, based_ops)), others),
        bytes=_bytes(2 * elements, elements, dtype, work),
        flops=elements * 2 * taps * {"forward": 1, "backward": 2, "forward+backward": 3}[work],
        **targets,
    )


def short_conv_decode(batch, channels, taps, dtype, device, others, **targets):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        state = draw(batch, channels, taps - 1)
        return draw(batch, channels), draw(channels, taps), state, draw(batch, channels)

    def run(module, x, weight, state, gate):
        return module.short_conv_decode(x, weight, state, activation="silu", gate=gate)

    return Case(
        "short_conv_decode",
        "decode",
        f"B{batch} C{channels} K{taps} silu gate",
        dtype,
        inputs,
        oracle.in_place(partial(run, reference), 2),
        [in_place(OURS, partial(run, based_ops), 2), *others],
        bytes=batch * channels * (3 + 2 * (taps - 1)) * dtype.itemsize,
        flops=batch * channels * 2 * taps,
        **targets,
    )


def taylor_feature_map(
    batch, seqlen, nheads, feature_dim, dtype, device, others, work="forward", **targets
):
    def inputs(generator):
        draw = normal(generator, dtype, device)
        x = draw(batch, seqlen, nheads, feature_dim)
        return (x,) if work == "forward" else (x, draw(*x.shape[:3], _expanded(feature_dim)))

    rows = batch * seqlen * nheads
    return Case(
        "taylor_feature_map",
        work,
        f"B{batch} T{seqlen} H{nheads} D{feature_dim}",
        dtype,
        inputs,
        oracle.plain(reference.taylor_feature_map, work != "forward"),
        _implementations(work, Implementation(OURS, based_ops.taylor_feature_map), others),
        bytes=_bytes(rows * feature_dim, rows * _expanded(feature_dim), dtype, work),
        **targets,
    )


def in_place(name, run, *states):
    """A decode step: every implementation updates its own copies of these arguments, its states."""
    return Implementation(
        name,
        run,
        prepare=lambda *inputs: tuple(
            x.clone() if i in states else x for i, x in enumerate(inputs)
        ),
        outputs=lambda args, out: (*as_tuple(out), *(args[i] for i in states)),
    )


def outer_in_place(name, run):
    """A linear attention step whose states have the rows of the outer-product map."""

    def prepare(q, k, v, kv_state, k_state):
        return q, k, v, *baselines.outer_state(kv_state, k_state, q.shape[-1])

    def outputs(args, out):
        return out, *baselines.packed_state(*args[3:], args[0].shape[-1])

    return Implementation(name, run, prepare, outputs)


def _implementations(work, ours, others):
    return [i if work == "forward" else with_backward(i) for i in (ours, *others)]


def _bytes(inputs, outputs, dtype, work):
    """Read the inputs, write the output; backward reads inputs and dout and writes gradients."""
    elements = {"forward": inputs + outputs, "backward": 2 * inputs + outputs}
    elements["forward+backward"] = sum(elements.values())
    return elements[work] * dtype.itemsize


def _on_corner_heads(expected, device):
    """On a GPU, whose cases have many and long heads, two of them are checked."""
    if device == "cpu":
        return expected
    return lambda *inputs: expected(*map(oracle.corner_heads, inputs))


def _corner_heads(device, queries=None):
    if device == "cpu":
        return lambda x: x
    return lambda x: oracle.corner_heads(x if queries is None else x[:, queries])


def _expanded(feature_dim):
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def normal(generator, dtype, device):
    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return draw
