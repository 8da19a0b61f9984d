"""The decode kernels on a GPU: every supported width, bad indices, graphs, alignment, far slots."""

import pytest
import torch

import based_ops
import oracle
from support import DTYPES, assert_close, expanded_dim, far_apart, randn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

F32, BF16 = torch.float32, torch.bfloat16
GPU_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float64]
CAPACITY = 4


def linear_state(slots, nheads, feature_dim, head_dim):
    past = [randn(slots, 4, nheads, n) for n in (feature_dim, feature_dim, head_dim)]
    _, *state = oracle.linear_attention(*past)
    return [x.float().cuda() for x in state]


def linear_token(batch, nheads, feature_dim, head_dim, dtype=F32):
    widths = (feature_dim, feature_dim, head_dim)
    return [randn(batch, nheads, n, dtype=dtype, device="cuda") for n in widths]


def pending(slots, nheads, feature_dim, head_dim, dtype=F32):
    shapes = ((slots, CAPACITY, nheads, n) for n in (feature_dim, head_dim))
    return [randn(*shape, dtype=dtype, device="cuda") for shape in shapes]


def window_state(slots, window, nheads, head_dim, dtype=F32):
    return list(randn(2, slots, window, nheads, head_dim, dtype=dtype, device="cuda"))


def indices(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device="cuda")


def unaligned(x):
    """The same values one element past an aligned address."""
    storage = x.new_empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


# ---- every width -------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 8, 16, 20, 64, 112, 128, 200, 255, 300, 1024])
@pytest.mark.parametrize("feature_dim", [1, 8, 16, 24, 32, 64])
def test_linear_widths(feature_dim, head_dim):
    for dtype in GPU_DTYPES:
        state = linear_state(3, 2, feature_dim, head_dim)
        token = linear_token(3, 2, feature_dim, head_dim, dtype)
        initial = [x.cpu() for x in state]
        expected = oracle.linear_attention(
            *(x[:, None].cpu() for x in token), initial_state=initial
        )
        out = based_ops.linear_attention_decode(*token, *state)
        assert_close([out[:, None], *state], expected, dtype)


@pytest.mark.parametrize("head_dim", [1, 8, 16, 20, 64, 112, 128, 200, 256])
@pytest.mark.parametrize("window", [1, 7, 64, 128, 129, 256, 513])
def test_window_widths(window, head_dim):
    """Rows that have seen nothing, less than the window, just the window, and more."""
    seen = [0, 3, window - 1, window, 5 * window + 2]
    for dtype in GPU_DTYPES:
        rings = window_state(len(seen), window, 2, head_dim, dtype)
        held = torch.arange(window, device="cuda") < indices(*seen)[:, None]
        for ring in rings:
            ring[~held] = float("nan")  # what nobody wrote is not read
        token = randn(3, len(seen), 2, head_dim, dtype=dtype, device="cuda")
        past = [x.nan_to_num().cpu() for x in rings]
        expected, *after, _ = oracle.sliding_window_attention(
            *(x[:, None].cpu() for x in token), window, initial_state=(*past, torch.tensor(seen))
        )
        out = based_ops.sliding_window_decode(*token, *rings, indices(*seen))
        assert_close([out[:, None], *(x.nan_to_num() for x in rings)], [expected, *after], dtype)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_unaligned_pointers(dtype):
    """Scalar loads in place of vectors; a dimension of the state may also have an odd stride."""
    state, token = linear_state(3, 2, 8, 16), linear_token(3, 2, 8, 16, dtype)
    copies = [unaligned(x) for x in state]
    expected = based_ops.linear_attention_decode(*token, *state)
    out = based_ops.linear_attention_decode(*map(unaligned, token), *copies)
    assert_close([out, *copies], [expected, *state], F32 if dtype == F32 else dtype)
    rings, token = window_state(3, 9, 2, 16, dtype), randn(3, 3, 2, 16, dtype=dtype, device="cuda")
    copies = [unaligned(x) for x in rings]
    positions = indices(3, 8, 20)
    expected = based_ops.sliding_window_decode(*token, *rings, positions)
    out = based_ops.sliding_window_decode(*map(unaligned, token), *copies, positions)
    assert_close([out, *copies], [expected, *rings], dtype)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_rows_of_the_state_with_gaps(head_dim, deferred):
    """A state that is part of a wider one: no copy takes more than a row at a time."""
    tensors = [*linear_token(3, 2, 16, head_dim), *linear_state(3, 2, 16, head_dim)]
    function = based_ops.linear_attention_decode
    if deferred:
        function = based_ops.linear_attention_decode_deferred
        tensors += [*pending(3, 2, 16, head_dim), indices(3, 0, 2)]
    wide = torch.full((*tensors[3].shape[:-1], head_dim + 8), 7.0, device="cuda")
    views = list(tensors)
    views[3] = wide[..., 4:-4].copy_(tensors[3])
    views[4:] = [x.clone() for x in tensors[4:]]
    assert torch.equal(function(*tensors), function(*views))
    assert all(torch.equal(a, b) for a, b in zip(tensors, views))
    assert (wide[..., :4] == 7).all() and (wide[..., -4:] == 7).all()


@pytest.mark.parametrize("op", ["linear", "deferred", "window"])
def test_a_row_does_not_depend_on_its_batch(op):
    if op == "window":
        tensors = [*randn(3, 5, 2, 64, device="cuda").bfloat16(), *window_state(5, 40, 2, 64, BF16)]
        function, tensors = based_ops.sliding_window_decode, [*tensors, indices(3, 0, 77, 39, 40)]
    else:
        tensors = [*linear_token(5, 2, 16, 64, BF16), *linear_state(5, 2, 16, 64)]
        function = based_ops.linear_attention_decode
        if op == "deferred":
            tensors += [*pending(5, 2, 16, 64, BF16), indices(3, 0, 2, 1, 3)]
            function = based_ops.linear_attention_decode_deferred
    alone = [[x[b : b + 1].clone() for x in tensors] for b in range(5)]
    out = function(*tensors)
    assert torch.equal(out, torch.cat([function(*row) for row in alone]))
    assert all(torch.equal(x, torch.cat(y)) for x, y in zip(tensors, zip(*alone)))


# ---- bad indices -------------------------------------------------------------------------------


def call(op, batch, slots):
    """A decode function of one op as f(**options), and its states of that many slots."""
    if op == "window":
        token = randn(3, batch, 2, 16, dtype=F32, device="cuda")
        states = window_state(slots, 5, 2, 16)

        def function(positions=None, **options):
            positions = indices(*range(batch)) if positions is None else positions
            return based_ops.sliding_window_decode(*token, *states, positions, **options)

        return function, states
    token, states = linear_token(batch, 2, 8, 16), linear_state(slots, 2, 8, 16)
    if op == "linear":
        return lambda **options: based_ops.linear_attention_decode(
            *token, *states, **options
        ), states
    states += pending(slots, 2, 8, 16)

    def function(fill=None, **options):
        fill = indices(*(b % CAPACITY for b in range(batch))) if fill is None else fill
        return based_ops.linear_attention_decode_deferred(*token, *states, fill, **options)

    return function, states


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", ["linear", "deferred", "window"])
def test_bad_slots(op, index_dtype):
    """A bad row is NaN and touches nothing; the others are what they would be without it."""
    function, states = call(op, 5, 4)
    before = [x.clone() for x in states]
    good = function(state_indices=indices(1, -1, -1, 3, -1))
    expected = [x.clone() for x in states]
    for x, copy in zip(states, before):
        x.copy_(copy)
    far = 2**31 - 1 if index_dtype == torch.int32 else 2**60
    out = function(state_indices=indices(1, 4, -2, 3, far, dtype=index_dtype))
    assert torch.equal(out[[0, 3]], good[[0, 3]])
    assert out[[1, 2, 4]].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(states, expected))


@pytest.mark.parametrize(
    "op, name, bad", [("deferred", "fill", CAPACITY), ("window", "positions", -1)]
)
def test_bad_counts(op, name, bad):
    function, states = call(op, 3, 3)
    before = [x.clone() for x in states]
    out = function(**{name: indices(1, bad, -(2**40))})
    assert out[0].isfinite().all() and out[1:].isnan().all()
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(states, before))


def test_fold_of_bad_rows_touches_nothing():
    states = [*linear_state(3, 2, 8, 16), *pending(3, 2, 8, 16)]
    before = [x.clone() for x in states]
    slots, fill = indices(3, -2, 0, 1), indices(1, 1, CAPACITY, -1)
    based_ops.linear_attention_fold(*states, fill, state_indices=slots)
    assert all(torch.equal(a, b) for a, b in zip(states, before))


def test_limits_are_named():
    token, state = linear_token(1, 1, 65, 8), linear_state(1, 1, 65, 8)
    with pytest.raises(RuntimeError, match="^linear_attention_decode: q: .*feature_dim <= 64"):
        based_ops.linear_attention_decode(*token, *state)
    token, state = linear_token(1, 1, 8, 258), linear_state(1, 1, 8, 258)
    with pytest.raises(
        RuntimeError, match="^linear_attention_decode: v: .*multiple of 4 up to 1024"
    ):
        based_ops.linear_attention_decode(*token, *state)
    token = randn(3, 1, 1, 264, dtype=F32, device="cuda")
    with pytest.raises(RuntimeError, match="^sliding_window_decode: q: .*head_dim <= 256"):
        based_ops.sliding_window_decode(*token, *window_state(1, 4, 1, 264), indices(0))
    ring = [randn(1, 65, 1, 8, dtype=F32, device="cuda") for _ in range(2)]
    with pytest.raises(
        RuntimeError, match="^linear_attention_decode_deferred: pending_k: .*C <= 64"
    ):
        based_ops.linear_attention_decode_deferred(
            *linear_token(1, 1, 8, 8), *linear_state(1, 1, 8, 8), *ring, indices(0)
        )


# ---- graphs, streams, far apart ----------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear", "deferred", "window"])
def test_graph_replay_follows_its_slots(op):
    """Capture changes no state, and neither does a warm-up whose rows are all skipped."""
    function, states = call(op, 3, 6)
    slots = indices(-1, -1, -1)
    before = [x.clone() for x in states]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(state_indices=slots)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    counts = {"deferred": "fill", "window": "positions"}
    options = {counts[op]: indices(1, 2, 3)} if op in counts else {}
    with torch.cuda.graph(graph):
        out = function(state_indices=slots, **options)
    assert all(torch.equal(a, b) for a, b in zip(states, before))
    for new_slots in ((0, 1, 2), (5, -1, 3), (2, 6, 0)):
        start = [x.clone() for x in states]
        slots.copy_(indices(*new_slots))
        out.fill_(-1)
        graph.replay()
        got = [out.clone(), *(x.clone() for x in states)]
        for x, copy in zip(states, start):
            x.copy_(copy)
        expected = [function(state_indices=slots, **options), *states]
        for a, b in zip(got, expected):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("op", ["linear", "deferred", "window"])
def test_concurrent_streams(op):
    calls = [call(op, 4, 4) for _ in range(4)]
    before = [[x.clone() for x in states] for _, states in calls]
    expected = [[function(), *(x.clone() for x in states)] for function, states in calls]
    for (_, states), copies in zip(calls, before):
        for x, copy in zip(states, copies):
            x.copy_(copy)
    torch.cuda.synchronize()
    outs = []
    for function, _ in calls:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs.append(function())
    torch.cuda.synchronize()
    for out, (_, states), want in zip(outs, calls, expected):
        assert all(torch.equal(a, b) for a, b in zip((out, *states), want))


def test_slots_more_than_2_31_elements_apart():
    state, token = linear_state(2, 2, 8, 16), linear_token(2, 2, 8, 16)
    far = [far_apart(state[0]), state[1].clone()]
    expected = based_ops.linear_attention_decode(*token, *state)
    assert torch.equal(based_ops.linear_attention_decode(*token, *far), expected)
    assert torch.equal(far[0], state[0])
    del far
    rings, token = window_state(2, 5, 2, 16, BF16), randn(3, 2, 2, 16, dtype=BF16, device="cuda")
    far = [far_apart(x) for x in rings]
    expected = based_ops.sliding_window_decode(*token, *rings, indices(3, 9))
    assert torch.equal(based_ops.sliding_window_decode(*token, *far, indices(3, 9)), expected)
    assert all(torch.equal(a, b) for a, b in zip(far, rings))


def test_many_heads_and_rows():
    """More blocks than any dimension of a grid but the first may have."""
    batch, nheads = 70_000, 1
    token = [torch.randn(batch, nheads, n, device="cuda") for n in (2, 2, 8)]
    state = [torch.zeros(batch, nheads, expanded_dim(2), *w, device="cuda") for w in ((8,), ())]
    out = based_ops.linear_attention_decode(*token, *state)
    assert (out - token[2]).abs().max() < 1e-5  # the first token of every row sees itself alone


@pytest.mark.parametrize("deferred", [False, True])
def test_every_row_of_a_full_gpu(deferred):
    """States far larger than the caches, rows that begin one step after the other: every output
    against its own sum over all tokens."""
    batch, nheads, feature_dim, head_dim, steps = 128, 28, 16, 64, 40
    shape = batch, nheads
    widths = (head_dim,), ()
    state = [torch.zeros(*shape, expanded_dim(feature_dim), *w, device="cuda") for w in widths]
    history = [
        torch.randn(steps, *shape, n, device="cuda").to(BF16)
        for n in (feature_dim, feature_dim, head_dim)
    ]
    rings = [
        torch.full((batch, 16, nheads, n), float("nan"), dtype=BF16, device="cuda")
        for n in (feature_dim, head_dim)
    ]
    rows = torch.arange(batch, device="cuda")
    begin, fill = rows % 19, torch.zeros_like(rows)
    for step in range(steps):
        runs = begin <= step
        slots = torch.where(runs, rows, -1)
        token = [x[step] for x in history]
        if deferred:
            out = based_ops.linear_attention_decode_deferred(
                *token, *state, *rings, fill, state_indices=slots
            )
        else:
            out = based_ops.linear_attention_decode(*token, *state, state_indices=slots)
        fill = torch.where(runs, (fill + 1) % 16, fill)
        q, k, v = token[0].double(), *(x[: step + 1].double() for x in history[1:])
        s = torch.einsum("bhd,tbhd->tbh", q, k) * feature_dim**-0.5
        seen = torch.arange(step + 1, device="cuda")[:, None] >= begin
        w = (1 + s + s * s / 2) * seen[..., None]
        exact = torch.einsum("tbh,tbhv->bhv", w, v) / w.sum(0)[..., None]
        error = (out.double() - exact)[runs].norm(dim=-1) / exact[runs].norm(dim=-1)
        assert error.max() < 1e-2, (step, error.max())
        assert not out[~runs].any()
