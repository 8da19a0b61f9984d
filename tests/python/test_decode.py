"""What the decode ops share: slots, skipped rows, in-place states, no autograd."""

import pytest
import torch

import based_ops
import oracle
from support import assert_close, devices_and_dtypes, fused, randn, state_dtype

SLOTS, HEADS, WIDTH, FEATURES, WINDOW, TAPS = 7, 2, 5, 3, 4, 3
OPS = (
    "linear_attention_decode",
    "linear_attention_decode_deferred",
    "sliding_window_decode",
    "short_conv_decode",
)


class Pool:
    """SLOTS slots of one op's state, and one token for each of them."""

    def __init__(self, op, device, dtype):
        self.function = getattr(based_ops, op)
        self.op, self.device, self.dtype = op, device, dtype
        options = {"dtype": dtype, "device": device}
        self.fixed, self.tokens = {}, {}
        if op.startswith("linear_attention"):
            history = randn(2, SLOTS, 6, HEADS, FEATURES)
            _, *state = oracle.linear_attention(*history, randn(SLOTS, 6, HEADS, WIDTH))
            state = [x.to(state_dtype(dtype)).to(device) for x in state]
            self.states = dict(zip(("kv_state", "k_state"), state))
            shapes = {"q": (HEADS, FEATURES), "k": (HEADS, FEATURES), "v": (HEADS, WIDTH)}
            if op.endswith("deferred"):
                self.states["pending_k"] = randn(SLOTS, WINDOW, HEADS, FEATURES, **options)
                self.states["pending_v"] = randn(SLOTS, WINDOW, HEADS, WIDTH, **options)
                self.tokens["fill"] = torch.tensor([3, 0, 2, 3, 1, 0, 2], device=device)
        elif op == "sliding_window_decode":
            rings = randn(2, SLOTS, WINDOW, HEADS, WIDTH, **options)
            self.states = dict(zip(("k_cache", "v_cache"), rings))
            shapes = {name: (HEADS, WIDTH) for name in "qkv"}
            self.tokens["positions"] = torch.tensor([3, 0, 9, 1, 4, 100, 2], device=device)
        else:
            self.states = {"conv_state": randn(SLOTS, WIDTH, TAPS - 1, **options)}
            shapes = {"x": (WIDTH,), "gate": (WIDTH,)}
            self.fixed["weight"] = randn(WIDTH, TAPS, **options)
            self.fixed["bias"] = randn(WIDTH, **options)
            self.fixed["activation"] = "silu"
        for name, shape in shapes.items():
            self.tokens[name] = randn(SLOTS, *shape, **options)

    def step(self, rows=slice(None), **changed):
        """One call on copies of the states: out and the states after it."""
        states = {name: x.clone() for name, x in self.states.items()}
        tokens = {name: x[rows] for name, x in self.tokens.items()}
        out = self.function(**self.fixed | tokens | states | changed)
        return out, {name: changed.get(name, x) for name, x in states.items()}

    def index(self, values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=self.device)


def pytest_generate_tests(metafunc):
    cases = [
        pytest.param((op, device, dtype), id=f"{op}-{device}-{str(dtype).removeprefix('torch.')}")
        for op in OPS
        for device, dtype in devices_and_dtypes(op)
    ]
    metafunc.parametrize("pool", cases, indirect=True)


@pytest.fixture
def pool(request):
    return Pool(*request.param)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_matches_definition(pool):
    """One token after the history that the state stands for."""
    out, states = pool.step()
    x, state = pool.tokens, pool.states
    if pool.op == "linear_attention_decode":
        sequence = [x[n][:, None].cpu() for n in "qkv"]
        initial = [s.cpu() for s in state.values()]
        expected, *after = oracle.linear_attention(*sequence, initial_state=initial)
    elif pool.op == "linear_attention_decode_deferred":
        expected, after = definition_with_pending(pool)
        fill = (x["fill"] + 1) % WINDOW
        based_ops.linear_attention_fold(*states.values(), fill)
        states = dict(list(states.items())[:2])
    elif pool.op == "sliding_window_decode":
        sequence = [x[n][:, None].cpu() for n in "qkv"]
        initial = [s.cpu() for s in (*state.values(), x["positions"])]
        expected, *after, _ = oracle.sliding_window_attention(
            *sequence, WINDOW, initial_state=initial
        )
        # The op leaves slots alone that no token was written to; the definition has 0 there.
        held = torch.arange(WINDOW) <= x["positions"].cpu()[:, None]
        states = {n: s.cpu() * held[..., None, None] for n, s in states.items()}
    else:
        arguments = {n: a.cpu() for n, a in pool.fixed.items() if n != "activation"}
        arguments |= {n: x[n][:, None].cpu() for n in ("x", "gate")}
        initial = state["conv_state"].cpu()
        expected, *after = oracle.short_conv(**arguments, activation="silu", initial_state=initial)
    assert out.dtype == pool.dtype
    assert_close([out, *states.values()], [expected[:, 0], *after], pool.dtype)


def definition_with_pending(pool):
    """out (SLOTS, 1, H, V) of one token after those that wait, and the states in the plain form."""
    x, state = ({n: y.cpu() for n, y in z.items()} for z in (pool.tokens, pool.states))
    results = []
    for row, fill in enumerate(x["fill"]):
        k, v = (torch.cat([state[f"pending_{n}"][row, :fill], x[n][row, None]])[None] for n in "kv")
        q = torch.zeros_like(k)
        q[0, -1] = x["q"][row]
        initial = [state[n][row, None] for n in ("kv_state", "k_state")]
        out, *after = oracle.linear_attention(q, k, v, initial_state=initial)
        results.append((out[:, -1:], *after))
    out, *after = (torch.cat(y) for y in zip(*results))
    return out, after


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_slots_in_any_order(pool, index_dtype):
    slots = [4, 0, 6, 2]
    expected, everything = pool.step(slots, **{n: s[slots].clone() for n, s in pool.states.items()})
    out, states = pool.step(slots, state_indices=pool.index(slots, index_dtype))
    assert torch.equal(out, expected)
    for name, state in states.items():
        assert torch.equal(state[slots], everything[name])
        untouched = [1, 3, 5]
        assert torch.equal(state[untouched], pool.states[name][untouched])


def test_minus_one_skips_the_row(pool):
    slots = [3, -1, 0, -1]
    rows = [3, 5, 0, 2]
    for x in (*pool.tokens.values(), *pool.states.values()):
        if x.is_floating_point():  # the tokens of skipped rows and the slots of nobody
            x[[5, 2]] = float("nan")
    out, states = pool.step(rows, state_indices=pool.index(slots))
    expected, after = pool.step([3, 0], state_indices=pool.index([3, 0]))
    assert torch.equal(out[[0, 2]], expected)
    assert out.isfinite().all() and not out[[1, 3]].any()
    for name in states:
        assert torch.equal(states[name][[0, 3]], after[name][[0, 3]])
        untouched = [1, 2, 4, 5, 6]
        a, b = states[name][untouched], pool.states[name][untouched]
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_all_rows_skipped_or_none_there(pool):
    out, states = pool.step(state_indices=pool.index([-1] * SLOTS))
    assert not out.any() and equal(states, pool.states)
    nobody = pool.index([])
    out, states = pool.step(slice(0), state_indices=nobody)
    assert out.shape[0] == 0 and equal(states, pool.states)


def test_nan_in_a_row_stays_in_its_row(pool):
    clean, clean_states = pool.step()
    for x in pool.tokens.values():
        if x.is_floating_point():
            x[3] = float("nan")
    dirty, dirty_states = pool.step()
    keep = [0, 1, 2, 4, 5, 6]
    assert torch.equal(clean[keep], dirty[keep]) and dirty[3].isnan().all()
    assert all(torch.equal(clean_states[n][keep], dirty_states[n][keep]) for n in clean_states)


def test_inference_mode(pool):
    expected, after = pool.step()
    with torch.inference_mode():
        out, states = pool.step()
    assert torch.equal(out, expected) and equal(states, after)


def test_two_runs_are_equal(pool):
    (first, first_states), (second, second_states) = pool.step(), pool.step()
    assert torch.equal(first, second) and equal(first_states, second_states)


def test_strided_views(pool):
    """Tokens that are slices of wider tensors, in a pool with other data between its slots."""
    expected, after = pool.step()
    tokens = {n: fused(x, x)[1] for n, x in pool.tokens.items() if x.is_floating_point()}
    wide = {n: torch.stack([s, torch.full_like(s, -7)], 1) for n, s in pool.states.items()}
    views = {n: x[:, 0] for n, x in wide.items()}
    out, states = pool.step(**tokens, **views)
    assert_close([out, *states.values()], [expected, *after.values()], pool.dtype)
    assert all((x[:, 1] == -7).all() for x in wide.values())


def test_only_the_state_changes(pool):
    before = {n: x.clone() for n, x in pool.tokens.items()}
    out, states = pool.step()
    after = {n: x.clone() for n, x in states.items()}
    assert not equal(states, pool.states) and equal(pool.tokens, before)
    out.fill_(float("nan"))
    assert equal(states, after) and equal(pool.tokens, before)


@pytest.mark.parametrize("slots", [[2, 2], [0, 5, 1, 5]])
def test_same_slot_twice_raises(pool, slots, request):
    before = based_ops.set_checks(True)  # on a GPU, indices are read only when asked to
    request.addfinalizer(lambda: based_ops.set_checks(before))
    states = {n: x.clone() for n, x in pool.states.items()}
    with pytest.raises(RuntimeError, match=f"^{pool.op}: state_indices: expected .*, got "):
        pool.step(range(len(slots)), state_indices=pool.index(slots), **states)
    assert equal(states, pool.states)


def test_raises_when_a_gradient_is_wanted(pool):
    floats = [n for n, x in pool.tokens.items() if x.is_floating_point()]
    for name in floats:
        leaf = pool.tokens[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{pool.op}: "):
            pool.step(**{name: leaf})
        with torch.no_grad():
            out, _ = pool.step(**{name: leaf})
        assert torch.equal(out, pool.step()[0]) and not out.requires_grad
