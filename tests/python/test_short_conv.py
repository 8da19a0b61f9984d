import itertools

import pytest
import torch

import based_ops
import oracle
from support import (
    SEQLENS,
    assert_close,
    assert_same_gradients,
    check,
    devices,
    error,
    every_other,
    far_apart,
    flatten,
    fused,
    randn,
    sequence_first,
)

pytestmark = pytest.mark.ops("short_conv")

F32, F64 = torch.float32, torch.float64


def make(rows, seqlen, channels, taps, dtype=F64, device="cpu", parts="bgs", sequences=None):
    """Arguments of a call; parts names the optional ones: bias, gate, (initial) state."""
    shapes = {"x": (rows, seqlen, channels), "weight": (channels, taps)}
    if "b" in parts:
        shapes["bias"] = (channels,)
    if "g" in parts:
        shapes["gate"] = (rows, seqlen, channels)
    if "s" in parts:
        shapes["initial_state"] = (sequences or rows, channels, taps - 1)
    return {name: randn(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def op(**arguments):
    return based_ops.short_conv(**arguments, output_final_state=True)


def check_call(arguments, dtype, activation=None, gradients=True):
    check(
        lambda **x: op(**x, activation=activation),
        lambda **x: oracle.short_conv(**x, activation=activation),
        arguments,
        dtype,
        gradients,
    )


PARTS = ["", "b", "g", "s", "bg", "bs", "gs", "bgs"]
# Every seqlen once, with channel counts that are multiples of nothing.
SHAPES = list(zip(SEQLENS, [3, 2, 4, 8, 3, 5, 3, 4, 2], [5, 1, 17, 33, 64, 7, 100, 6, 3]))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("parts", ["", "bgs"])
@pytest.mark.parametrize("seqlen, taps, channels", SHAPES)
def test_matches_definition(seqlen, taps, channels, parts, activation, device, dtype):
    check_call(make(2, seqlen, channels, taps, dtype, device, parts), dtype, activation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("taps", [2, 3, 4, 5, 6, 7, 8])
def test_any_taps_and_parts(taps, parts, activation, device):
    for seqlen in (taps - 2, taps + 4):
        check_call(make(2, seqlen, 19, taps, F32, device, parts), F32, activation)


@pytest.mark.parametrize("batch, channels", [(0, 3), (2, 0), (1, 1), (2, 2100)])
def test_any_batch_and_channels(batch, channels, device):
    arguments = make(batch, 9, channels, 4, F32, device)
    out, state = op(**arguments)
    assert out.shape == (batch, 9, channels) and state.shape == (batch, channels, 3)
    if batch * channels:
        check_call(arguments, F32, "silu")


@pytest.mark.parametrize("taps", [3, 8])
@pytest.mark.parametrize("channels", [8, 40, 264, 520])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_wide_accesses(offset, channels, taps, device, dtype):
    """Channels that kernels may take several at a time: halves of one tensor, as a model splits
    them, at addresses that are and are not aligned."""
    arguments = make(2, 75, channels, taps, dtype, device, "bg")
    wide = arguments["x"].new_full((2, 75, 2 * channels + 8), float("nan"))
    views = wide.narrow(-1, offset, 2 * channels).chunk(2, -1)
    arguments["x"], arguments["gate"] = (
        view.copy_(arguments[n]) for n, view in zip(("x", "gate"), views)
    )
    check_call(arguments, dtype, "silu")


@pytest.mark.parametrize("bounds", [[0, 40, 40, 41, 150], [0, 16, 32, 33, 150]])
def test_packed_wide_accesses(bounds, device, dtype):
    arguments = make(1, bounds[-1], 64, 3, dtype, device, sequences=len(bounds) - 1)
    check_call(arguments | {"cu_seqlens": torch.tensor(bounds, device=device)}, dtype, "silu")


@pytest.mark.parametrize("taps", [2, 8])
@pytest.mark.parametrize("seqlen", [125, 126, 129, 134, 253, 256, 259, 263, 510, 513, 519])
def test_around_powers_of_two(seqlen, taps, device):
    """Kernels cut sequences there: taps, state and their gradients have to reach across."""
    check_call(make(1, seqlen, 6, taps, F32, device), F32, "silu")
    cu_seqlens = torch.tensor([0, 4, seqlen - 3, seqlen], device=device)
    packed = make(1, seqlen, 6, taps, F32, device, sequences=3) | {"cu_seqlens": cu_seqlens}
    check_call(packed, F32)


@pytest.mark.parametrize("bounds", [None, [0, 1500, 1502, 4000]])
def test_long_sequence(bounds, device):
    """dweight and dbias sum over many blocks of tokens."""
    rows, n = (2, 2) if bounds is None else (1, 3)
    arguments = make(rows, 4000, 70, 4, F32, device, sequences=n)
    if bounds is not None:
        arguments["cu_seqlens"] = torch.tensor(bounds, device=device)
    check_call(arguments, F32, "silu")


def test_result_follows_the_flags(device, dtype):
    for seqlen in (0, 6):
        arguments = make(2, seqlen, 5, 3, dtype, device)
        out, state = op(**arguments)
        assert torch.equal(out, based_ops.short_conv(**arguments))
        assert out.dtype == state.dtype == dtype


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("parts", ["", "bgs"])
@pytest.mark.parametrize("seqlen, taps", [(0, 3), (1, 4), (5, 2), (5, 8)])
def test_gradcheck(seqlen, taps, parts, activation):
    arguments = make(2, seqlen, 3, taps, parts=parts)
    inputs = [x.requires_grad_() for x in arguments.values()]

    def call(*x):
        return op(**dict(zip(arguments, x)), activation=activation)

    assert torch.autograd.gradcheck(call, inputs, check_undefined_grad=True)


def test_gradcheck_packed():
    cu_seqlens = torch.tensor([0, 2, 2, 6])
    arguments = make(1, 6, 3, 4, sequences=3)
    inputs = [x.requires_grad_() for x in arguments.values()]

    def call(*x):
        return op(**dict(zip(arguments, x)), activation="silu", cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_for_some_inputs_only(device):
    arguments = make(2, 20, 6, 4, F32, device)
    leaves = [x.requires_grad_() for x in arguments.values()]
    all_grads = torch.autograd.grad(op(**arguments, activation="silu")[0].square().sum(), leaves)
    for name, grad in zip(arguments, all_grads):
        alone = {n: x.detach().requires_grad_(n == name) for n, x in arguments.items()}
        op(**alone, activation="silu")[0].square().sum().backward()
        assert error(alone[name].grad, grad) <= 1e-6
        assert all(x.grad is None for n, x in alone.items() if n != name)


@pytest.mark.parametrize("taps", [2, 3, 8])
@pytest.mark.parametrize("position", range(13))
def test_split_equals_full(position, taps, device):
    for dtype in (F64, F32) if device == "cpu" else (F32,):
        arguments = make(2, 12, 5, taps, dtype, device)
        leaves = [x.requires_grad_() for x in arguments.values()]
        full = op(**arguments, activation="silu")
        in_time = {n: arguments.pop(n) for n in ("x", "gate")}
        state = arguments.pop("initial_state")
        outs = []
        for part in (slice(0, position), slice(position, None)):
            x = {n: value[:, part] for n, value in in_time.items()}
            out, state = op(**x, **arguments, initial_state=state, activation="silu")
            outs.append(out)
        split = [torch.cat(outs, 1), state]
        assert_close(split, full, dtype)
        assert torch.equal(split[1], full[1])
        assert_same_gradients(split, full, leaves, dtype)


@pytest.mark.ops("short_conv", "short_conv_decode")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("parts", ["", "bg"])
@pytest.mark.parametrize("taps", [2, 3, 8])
@pytest.mark.parametrize("prefill", [0, 1, 5, 19])
def test_token_by_token_equals_full(prefill, taps, parts, activation, device, dtype):
    arguments = make(2, 20, 5, taps, dtype, device, parts)
    full, full_state = op(**arguments, activation=activation)
    in_time = {n: arguments.pop(n) for n in ("x", "gate") if n in arguments}
    out, state = op(
        **{n: x[:, :prefill] for n, x in in_time.items()}, **arguments, activation=activation
    )
    outs = [out]
    for t in range(prefill, 20):
        step = based_ops.short_conv_decode(
            **{n: x[:, t] for n, x in in_time.items()},
            **arguments,
            conv_state=state,
            activation=activation,
        )
        outs.append(step[:, None])
    assert_close(torch.cat(outs, 1), full, dtype)
    assert torch.equal(state, full_state)


BOUNDS = [0, 0, 3, 3, 4, 41, 90, 90]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("parts", ["bg", "bgs"])
def test_packed(parts, index_dtype, device, dtype):
    cu_seqlens = torch.tensor(BOUNDS, dtype=index_dtype, device=device)
    arguments = make(1, BOUNDS[-1], 6, 4, dtype, device, parts, sequences=len(BOUNDS) - 1)
    check_call(arguments | {"cu_seqlens": cu_seqlens}, dtype, "silu")

    # Separate calls give the same numbers.
    out, final = op(**arguments, activation="silu", cu_seqlens=cu_seqlens)
    for i, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        alone = arguments | {n: arguments[n][:, start:end] for n in ("x", "gate")}
        if "s" in parts:
            alone["initial_state"] = arguments["initial_state"][i : i + 1]
        separate = op(**alone, activation="silu")
        assert_close((out[:, start:end], final[i : i + 1]), separate, dtype)


def test_no_sequences(device):
    cu_seqlens = torch.tensor([0], device=device)
    out, state = op(**make(1, 0, 5, 3, F32, device, "bg"), cu_seqlens=cu_seqlens)
    assert out.shape == (1, 0, 5) and state.shape == (0, 5, 2)


VIEWS = {
    "fused": fused,
    "every_other": lambda *x: [every_other(y) for y in x],
    "sequence_first": lambda *x: [sequence_first(y) for y in x],
    "broadcast": lambda *x: [y[:1].expand(2, -1, -1) for y in x],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, device, dtype):
    arguments = make(2, 37, 5, 4, dtype, device)
    arguments["x"], arguments["gate"] = VIEWS[view](arguments["x"], arguments["gate"])
    state = arguments["initial_state"]
    arguments["initial_state"] = fused(state, state)[1]
    arguments["weight"] = fused(arguments["weight"], arguments["weight"])[0]
    contiguous = {n: x.contiguous() for n, x in arguments.items()}
    assert_close(op(**arguments), op(**contiguous), dtype)
    check_call(arguments, dtype, "silu")


def test_expanded_cotangent(device):
    arguments = make(2, 37, 5, 4, F32, device)
    leaves = [x.requires_grad_() for x in arguments.values()]
    exact = {n: x.detach().cpu().double().requires_grad_() for n, x in arguments.items()}
    sum(x.sum() for x in op(**arguments, activation="silu")).backward()
    sum(x.sum() for x in oracle.short_conv(**exact, activation="silu")).backward()
    exact_grads = [x.grad for x in exact.values()]
    assert_close([x.grad for x in leaves], exact_grads, F32, gradients=True)


@pytest.mark.parametrize("name", ["x", "gate"])
def test_offsets_beyond_32_bits(name, device):
    arguments = make(2, 9, 5, 4, torch.bfloat16, device)
    expected = op(**arguments)
    arguments[name] = far_apart(arguments[name])
    assert all(torch.equal(a, b) for a, b in zip(op(**arguments), expected))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("position", [0, 1, 20, 36])
def test_nan_reaches_its_taps_only(position, activation, device, dtype):
    arguments = make(2, 37, 5, 4, dtype, device)
    clean, _ = op(**arguments, activation=activation)
    arguments["x"][:, position, 2] = float("nan")
    dirty, _ = op(**arguments, activation=activation)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[:, position : position + 4, 2] = True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])


def test_nan_in_neighbours_stays_there(device, dtype):
    cu_seqlens = torch.tensor([0, 11, 22, 37], device=device)
    runs = []
    arguments = make(1, 37, 5, 4, dtype, device, sequences=3)
    dout = torch.randn_like(arguments["x"])
    for poison in (0.0, float("nan")):
        for name in ("x", "gate"):
            arguments[name] = arguments[name].detach().clone()
            arguments[name][:, 11:22] += poison
        arguments["initial_state"][1] += poison
        x, gate = (arguments[n].requires_grad_() for n in ("x", "gate"))
        out, state = op(**arguments, activation="silu", cu_seqlens=cu_seqlens)
        runs.append((out, *torch.autograd.grad(out, (x, gate), dout)))
        runs[-1] += (state.detach(),)
    (*clean, clean_state), (*dirty, dirty_state) = runs
    for a, b in zip(clean, dirty):
        assert torch.equal(a[:, :11], b[:, :11]) and torch.equal(a[:, 22:], b[:, 22:])
    assert torch.equal(clean_state[::2], dirty_state[::2])


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_silu_of_large_values(value, device, dtype):
    """exp(200) overflows fp32: silu has to reach its limits 0 and x there."""
    x = torch.full((1, 4, 3), value, dtype=dtype, device=device)
    weight = torch.tensor([[0.0, 1.0]] * 3, dtype=dtype, device=device)
    check_call({"x": x, "weight": weight}, dtype, "silu", gradients=value > 0)
    x.requires_grad_()
    out = based_ops.short_conv(x, weight, activation="silu")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all() and dx.isfinite().all()


def test_two_runs_are_equal(device, dtype):
    arguments = make(3, 200, 40, 4, dtype, device)
    leaves = [x.requires_grad_() for x in arguments.values()]
    runs = []
    dout = torch.randn_like(arguments["x"])
    for _ in range(2):
        out, state = op(**arguments, activation="silu")
        runs.append([out, state, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("seqlen", [0, 1, 70])
def test_inputs_are_neither_changed_nor_aliased(seqlen, device):
    arguments = make(2, seqlen, 5, 4, F32, device)
    copies = {n: x.clone() for n, x in arguments.items()}
    results = flatten(op(**arguments))
    if seqlen == 0:
        assert torch.equal(results[1], arguments["initial_state"])
    for result in results:
        result.fill_(float("nan"))
    assert all(torch.equal(arguments[n], copies[n]) for n in arguments)


def test_double_backward_raises(device):
    arguments = make(1, 5, 3, 4, F32, device)
    leaves = [x.requires_grad_() for x in arguments.values()]
    out = based_ops.short_conv(**arguments)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        grads[0].sum().backward()


@pytest.mark.skipif("cuda" not in devices("short_conv"), reason="needs a GPU")
@pytest.mark.parametrize("bounds", [[0, 3, 8, 15], [2, 5, 20], [-7, 3, 20], [0, 9, 6, 20], [0, 99]])
def test_bad_cu_seqlens_on_a_gpu(bounds):
    """They are not read back: no memory is touched out of bounds, tokens of no sequence are NaN."""
    arguments = make(1, 20, 16, 4, F32, "cuda", sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, device="cuda")
    x = arguments["x"].requires_grad_()
    out, state = op(**arguments, cu_seqlens=cu_seqlens)
    (dx,) = torch.autograd.grad(out.sum(), x)
    outside = torch.ones(20, dtype=torch.bool)
    for start, end in itertools.pairwise(bounds):
        outside[max(start, 0) : max(end, 0)] = False
    assert out[:, outside].isnan().all() and dx[:, outside].isnan().all()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        assert bool(state[i].isnan().all()) == (not 0 <= start <= end <= 20)


@pytest.mark.ops("short_conv_decode")
@pytest.mark.parametrize("taps", [2, 3, 5, 8])
@pytest.mark.parametrize("batch, channels", [(1, 1), (3, 300), (130, 64)])
def test_decode_of_many_rows(batch, channels, taps, device, dtype):
    arguments = make(batch, 1, channels, taps, dtype, device)
    expected, after = oracle.short_conv(**{n: x.cpu() for n, x in arguments.items()})
    x, gate = (arguments.pop(n)[:, 0] for n in ("x", "gate"))
    state = arguments.pop("initial_state")
    out = based_ops.short_conv_decode(x, gate=gate, conv_state=state, **arguments)
    assert_close([out, state], [expected[:, 0], after], dtype)


@pytest.mark.skipif("cuda" not in devices("short_conv_decode"), reason="needs a GPU")
def test_bad_slots_on_a_gpu():
    arguments = make(4, 1, 16, 3, F32, "cuda")
    x, gate = (arguments.pop(n)[:, 0] for n in ("x", "gate"))
    state = arguments.pop("initial_state")
    before = state.clone()
    slots = torch.tensor([4, -2, -1, 2**40], device="cuda")
    out = based_ops.short_conv_decode(
        x, gate=gate, conv_state=state, **arguments, state_indices=slots
    )
    assert out[[0, 1, 3]].isnan().all() and not out[2].any() and torch.equal(state, before)
