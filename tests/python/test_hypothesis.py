"""Random shapes, layouts, flags and dtypes of every op against the definitions, with gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import based_ops
import oracle
from support import (
    DTYPES,
    assert_close,
    check,
    every_other,
    fused,
    randn,
    sequence_first,
    state_dtype,
)

bounded = settings(deadline=None, max_examples=60, derandomize=True)
dtypes = st.sampled_from(DTYPES)
index_dtypes = st.sampled_from([torch.int32, torch.int64])
small = st.integers(1, 4)
seeds = st.integers(0, 9999)
scales = st.one_of(st.none(), st.floats(0.05, 1.5))
leading_shapes = st.lists(st.integers(0, 6), max_size=4)
LAYOUTS = {
    "contiguous": lambda x: x,
    "fused": lambda x: fused(x, torch.full_like(x, float("nan")))[0],
    "every_other": every_other,
    "sequence_first": sequence_first,
}
layouts = st.sampled_from(list(LAYOUTS))


@st.composite
def sequences(draw):
    """Rows, tokens per row, cu_seqlens (or None) and the number of sequences."""
    if not draw(st.booleans()):
        rows = draw(small)
        return rows, draw(st.integers(0, 140)), None, rows
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    dtype = draw(index_dtypes)
    cu_seqlens = torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)
    return 1, sum(lengths), cu_seqlens, len(lengths)


def check_drawn(data, op, definition, inputs, fixed, state, dtype, **options):
    """Checks a call whose inputs are laid out at random; fixed and state are not."""
    views = {n: LAYOUTS[data.draw(layouts, label=n)](x) for n, x in inputs.items()}
    cu_seqlens = options.pop("cu_seqlens")
    packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}

    def call(function, **arguments):
        parts = tuple(arguments.pop(n) for n in state)
        if parts:
            arguments["initial_state"] = parts if len(parts) > 1 else parts[0]
        return function(**arguments, **options)

    check(
        lambda **x: call(op, **x, output_final_state=True),
        lambda **x: call(definition, **x),
        views | fixed | state | packed,
        dtype,
    )


@bounded
@given(seeds, st.data(), sequences(), small, st.integers(1, 20), st.integers(1, 40), dtypes)
def test_linear_attention(seed, data, sequence, nheads, feature_dim, head_dim, dtype):
    torch.manual_seed(seed)
    rows, seqlen, cu_seqlens, n = sequence
    inputs = {x: randn(rows, seqlen, nheads, feature_dim, dtype=dtype) for x in "qk"}
    inputs["v"] = randn(rows, seqlen, nheads, head_dim, dtype=dtype)
    state = {}
    if data.draw(st.booleans(), label="initial state"):
        past = (randn(n, 5, nheads, width) for width in (feature_dim, feature_dim, head_dim))
        _, *sums = oracle.linear_attention(*past)
        state = dict(zip(("kv_state", "k_state"), (x.to(state_dtype(dtype)) for x in sums)))
    options = {
        "normalize": data.draw(st.booleans(), label="normalize"),
        "scale": data.draw(scales, label="scale"),
        "cu_seqlens": cu_seqlens,
    }
    functions = based_ops.linear_attention, oracle.linear_attention
    check_drawn(data, *functions, inputs, {}, state, dtype, **options)


@bounded
@given(seeds, st.data(), sequences(), small, st.integers(1, 40), st.integers(1, 80), dtypes)
def test_sliding_window_attention(seed, data, sequence, nheads, head_dim, window, dtype):
    torch.manual_seed(seed)
    rows, seqlen, cu_seqlens, n = sequence
    inputs = {x: randn(rows, seqlen, nheads, head_dim, dtype=dtype) for x in "qkv"}
    state = {}
    if data.draw(st.booleans(), label="initial state"):
        seen = data.draw(st.lists(st.integers(0, 200), min_size=n, max_size=n), label="positions")
        positions = torch.tensor(seen, dtype=data.draw(index_dtypes))
        written = torch.arange(window) < positions[:, None]
        rings = randn(2, n, window, nheads, head_dim, dtype=dtype) * written[..., None, None]
        state = dict(zip(("k_cache", "v_cache", "positions"), (*rings, positions)))
    scale = data.draw(scales, label="scale")
    options = {"window": window, "scale": scale, "cu_seqlens": cu_seqlens}
    functions = based_ops.sliding_window_attention, oracle.sliding_window_attention
    check_drawn(data, *functions, inputs, {}, state, dtype, **options)


@bounded
@given(seeds, st.data(), sequences(), st.integers(1, 70), st.integers(2, 8), dtypes)
def test_short_conv(seed, data, sequence, channels, taps, dtype):
    torch.manual_seed(seed)
    rows, seqlen, cu_seqlens, n = sequence
    inputs = {"x": randn(rows, seqlen, channels, dtype=dtype)}
    if data.draw(st.booleans(), label="gate"):
        inputs["gate"] = randn(rows, seqlen, channels, dtype=dtype)
    fixed = {"weight": randn(channels, taps, dtype=dtype)}
    if data.draw(st.booleans(), label="bias"):
        fixed["bias"] = randn(channels, dtype=dtype)
    state = {}
    if data.draw(st.booleans(), label="initial state"):
        state["conv_state"] = randn(n, channels, taps - 1, dtype=dtype)
    options = {
        "activation": data.draw(st.sampled_from([None, "silu"]), label="activation"),
        "cu_seqlens": cu_seqlens,
    }
    functions = based_ops.short_conv, oracle.short_conv
    check_drawn(data, *functions, inputs, fixed, state, dtype, **options)


@bounded
@given(
    seeds, st.data(), st.lists(st.integers(0, 6), max_size=4), st.integers(1, 40), scales, dtypes
)
def test_taylor_feature_map(seed, data, leading, dim, scale, dtype):
    torch.manual_seed(seed)
    x = randn(*leading, dim, dtype=dtype)
    if len(leading) >= 2:
        x = LAYOUTS[data.draw(layouts)](x)
    check(
        lambda x: based_ops.taylor_feature_map(x, scale=scale),
        lambda x: oracle.taylor_feature_map(x, scale=scale),
        {"x": x},
        dtype,
    )


SLOTS = 6


@st.composite
def slot_choices(draw):
    """state_indices of a call with some rows skipped, its other rows and their slots."""
    indices = draw(st.permutations(range(SLOTS)))[: draw(st.integers(0, SLOTS))]
    indices = [draw(st.sampled_from([slot, slot, -1])) for slot in indices]
    rows = [row for row, slot in enumerate(indices) if slot >= 0]
    dtype = draw(index_dtypes)
    return torch.tensor(indices, dtype=dtype), rows, [indices[row] for row in rows]


def check_step(step, definition, choice, pool, dtype):
    """step() runs the op on the pool in place; definition(rows, *states) is what it means."""
    _, rows, slots = choice
    before = [x.clone() for x in pool]
    out = step()
    if rows:
        expected, *after = definition(rows, *(x[slots] for x in before))
        assert_close([out[rows], *(x[slots] for x in pool)], [expected[:, 0], *after], dtype)
    others = [row for row in range(out.shape[0]) if row not in rows]
    assert not out[others].any()
    idle = [slot for slot in range(SLOTS) if slot not in slots]
    assert all(torch.equal(x[idle], y[idle]) for x, y in zip(pool, before))


@bounded
@given(seeds, slot_choices(), small, st.integers(1, 20), st.integers(1, 40), st.booleans(), dtypes)
def test_linear_attention_decode(seed, choice, nheads, feature_dim, head_dim, normalize, dtype):
    torch.manual_seed(seed)
    past = (randn(SLOTS, 5, nheads, n) for n in (feature_dim, feature_dim, head_dim))
    pool = [x.to(state_dtype(dtype)) for x in oracle.linear_attention(*past)[1:]]
    batch = choice[0].numel()
    token = *randn(2, batch, nheads, feature_dim, dtype=dtype), randn(batch, nheads, head_dim)
    token = [x.to(dtype) for x in token]

    def definition(rows, *state):
        new = (x[rows, None] for x in token)
        return oracle.linear_attention(*new, normalize=normalize, initial_state=state)

    def step():
        options = {"normalize": normalize, "state_indices": choice[0]}
        return based_ops.linear_attention_decode(*token, *pool, **options)

    check_step(step, definition, choice, pool, dtype)


@bounded
@given(seeds, st.data(), slot_choices(), small, st.integers(1, 12), st.integers(1, 20), dtypes)
def test_linear_attention_decode_deferred(seed, data, choice, nheads, head_dim, capacity, dtype):
    """One token, then the plain form of what it leaves, next to the definition on all tokens."""
    torch.manual_seed(seed)
    batch = choice[0].numel()
    past = (randn(SLOTS, 5, nheads, n) for n in (5, 5, head_dim))
    pool = [x.to(state_dtype(dtype)) for x in oracle.linear_attention(*past)[1:]]
    rings = [randn(SLOTS, capacity, nheads, n, dtype=dtype) for n in (5, head_dim)]
    fill = data.draw(st.lists(st.integers(0, capacity - 1), min_size=batch, max_size=batch))
    fill = torch.tensor(fill, dtype=torch.int64)
    token = [randn(batch, nheads, n, dtype=dtype) for n in (5, 5, head_dim)]
    waiting = [x.clone() for x in rings]

    def definition(rows, *state):
        results = []
        for i, (row, slot) in enumerate(zip(rows, choice[2])):
            k, v = (
                torch.cat([ring[slot, : fill[row]], x[row, None]])[None]
                for ring, x in zip(waiting, token[1:])
            )
            q = token[0][row].expand_as(k[0])[None]
            alone = [x[i : i + 1] for x in state]
            out, *after = oracle.linear_attention(q, k, v, initial_state=alone)
            results.append((out[:, -1:], *after))
        return [torch.cat(x) for x in zip(*results)]

    def step():
        options = {"state_indices": choice[0]}
        out = based_ops.linear_attention_decode_deferred(*token, *pool, *rings, fill, **options)
        based_ops.linear_attention_fold(*pool, *rings, (fill + 1) % capacity, **options)
        return out

    check_step(step, definition, choice, pool, dtype)


@bounded
@given(seeds, st.data(), slot_choices(), small, st.integers(1, 40), st.integers(1, 20), dtypes)
def test_sliding_window_decode(seed, data, choice, nheads, head_dim, window, dtype):
    torch.manual_seed(seed)
    batch = choice[0].numel()
    seen = data.draw(st.lists(st.integers(0, 50), min_size=batch, max_size=batch))
    seen = torch.tensor(seen, dtype=torch.int64)
    # What a row never wrote is 0, as in the definition.
    pool = [x.clone() for x in randn(2, SLOTS, window, nheads, head_dim, dtype=dtype)]
    for row, slot in zip(choice[1], choice[2]):
        for ring in pool:
            ring[slot, seen[row] :] = 0
    token = randn(3, batch, nheads, head_dim, dtype=dtype)

    def definition(rows, *rings):
        new = (x[rows, None] for x in token)
        state = (*rings, seen[rows])
        return oracle.sliding_window_attention(*new, window, initial_state=state)[:3]

    def step():
        return based_ops.sliding_window_decode(*token, *pool, seen, state_indices=choice[0])

    check_step(step, definition, choice, pool, dtype)


@bounded
@given(seeds, slot_choices(), st.integers(1, 70), st.integers(2, 8), st.booleans(), dtypes)
def test_short_conv_decode(seed, choice, channels, taps, silu, dtype):
    torch.manual_seed(seed)
    pool = [randn(SLOTS, channels, taps - 1, dtype=dtype)]
    x, gate = randn(2, choice[0].numel(), channels, dtype=dtype)
    weight, bias = randn(channels, taps, dtype=dtype), randn(channels, dtype=dtype)
    options = {"bias": bias, "activation": "silu" if silu else None}

    def definition(rows, state):
        new = {"x": x[rows, None], "gate": gate[rows, None]}
        return oracle.short_conv(**new, weight=weight, initial_state=state, **options)

    def step():
        options["state_indices"] = choice[0]
        out = based_ops.short_conv_decode(x, weight, *pool, gate=gate, **options)
        del options["state_indices"]
        return out

    check_step(step, definition, choice, pool, dtype)
