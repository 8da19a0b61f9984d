"""Short convolution on a GPU: streams, graphs, sizes, compiled code."""

import pytest
import torch

import based_ops
import oracle
from support import TOLERANCE, assert_close, devices, error, randn

pytestmark = pytest.mark.skipif("cuda" not in devices("short_conv"), reason="no GPU or no kernels")

BF16, F32 = torch.bfloat16, torch.float32


def inputs(rows, seqlen, channels, taps, dtype=F32):
    tensors = {"x": (rows, seqlen, channels), "gate": (rows, seqlen, channels)}
    tensors |= {"weight": (channels, taps), "bias": (channels,)}
    return {n: randn(*shape, dtype=dtype, device="cuda") for n, shape in tensors.items()}


def forward_backward(x, **others):
    out = based_ops.short_conv(x, **others, activation="silu")
    leaves = [y for y in (x, *others.values()) if y.requires_grad]
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)


def test_runs_on_the_current_stream():
    arguments = inputs(2, 500, 64, 3)
    expected = based_ops.short_conv(**arguments)
    late = torch.zeros_like(arguments["x"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of ms: another stream would read the zeros
        late.copy_(arguments["x"])
        out = based_ops.short_conv(**arguments | {"x": late})
    stream.synchronize()
    assert torch.equal(out, expected)


def test_graph_replay():
    leaves = {n: y.requires_grad_() for n, y in inputs(2, 100, 64, 3, BF16).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(**leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_backward(**leaves)
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.copy_(torch.randn_like(leaf))
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, forward_backward(**leaves)))


@torch.no_grad()
def test_graph_replay_of_decode_with_other_slots():
    arguments = inputs(3, 1, 40, 4)
    x, gate = (arguments.pop(n)[:, 0] for n in ("x", "gate"))
    pool = randn(5, 40, 3, dtype=F32, device="cuda")
    slots = torch.full((3,), -1, device="cuda")

    def step(state):
        return based_ops.short_conv_decode(
            x, conv_state=state, gate=gate, **arguments, state_indices=slots
        )

    before = pool.clone()
    graph = torch.cuda.CUDAGraph()
    step(pool)
    with torch.cuda.graph(graph):
        out = step(pool)
    assert torch.equal(pool, before)  # the warm-up skipped every row
    for choice in ([4, 0, 2], [1, -1, 4]):
        slots.copy_(torch.tensor(choice))
        expected_pool = pool.clone()
        expected = step(expected_pool)
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(pool, expected_pool)


def shifted(x):
    """The same values, each row of the last dim one element behind a multiple of 16 bytes."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 16), float("nan"))
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("taps", [2, 3, 8])
def test_decode_is_the_same_from_any_layout(taps, dtype):
    """Where memory allows it several channels are read at once: equal to the last bit."""
    arguments = inputs(5, 1, 136, taps, dtype)
    arguments |= {n: arguments[n][:, 0] for n in ("x", "gate")}
    arguments["conv_state"] = randn(7, 136, taps - 1, dtype=dtype, device="cuda")
    slots = torch.tensor([6, -1, 0, 7, 3], device="cuda")

    def step(moved=None):
        values = arguments | {"conv_state": arguments["conv_state"].clone()}
        if moved is not None:
            values[moved] = shifted(values[moved])
        out = based_ops.short_conv_decode(**values, activation="silu", state_indices=slots)
        return out, values["conv_state"]

    (expected, after), run = step(), [0, 1, 2, 4]
    assert expected[run].isfinite().all() and not expected[1].any() and expected[3].isnan().all()
    for name in arguments:
        out, state = step(name)
        assert torch.equal(out[run], expected[run]) and out[3].isnan().all()
        assert torch.equal(state, after)


@pytest.mark.parametrize("rows, seqlen, channels", [(70000, 1, 8), (1, 300_000, 8), (3, 5, 70_000)])
def test_no_grid_limit(rows, seqlen, channels):
    arguments = {n: y.requires_grad_() for n, y in inputs(rows, seqlen, channels, 2).items()}
    exact = {n: y.detach().double().requires_grad_() for n, y in arguments.items()}
    out, *grads = forward_backward(**arguments)
    expected = oracle.short_conv(**exact, activation="silu")[0] if rows < 10 else None
    if expected is None:  # the definition goes row by row
        window = torch.nn.functional.pad(exact["x"], (0, 0, 1, 0)).unfold(1, 2, 1)
        total = (window * exact["weight"]).sum(-1) + exact["bias"]
        expected = torch.nn.functional.silu(total) * exact["gate"]
    exact_grads = torch.autograd.grad(expected.square().sum(), list(exact.values()))
    assert_close(out, expected, F32)
    by_name = dict(zip(arguments, grads))
    for (name, grad), exact_grad in zip(by_name.items(), exact_grads):
        assert error(grad, exact_grad) <= TOLERANCE[F32][1], name


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    seqlen, channels = 1 << 20, 2056
    weight = randn(channels, 3, dtype=BF16, device="cuda")
    x = torch.empty(1, seqlen, channels, dtype=BF16, device="cuda").normal_()
    out = based_ops.short_conv(x, weight, activation="silu")
    for t in (0, 1 << 19, seqlen - 64):  # around the 2^31st element, and at the end
        first = max(t - 2, 0)
        state = torch.zeros(1, channels, 2, dtype=BF16, device="cuda")
        if t > 0:
            state = x[:, first:t].transpose(1, 2).contiguous()
        part = based_ops.short_conv(
            x[:, t : t + 64].clone(), weight, activation="silu", initial_state=state
        )
        assert torch.equal(out[:, t : t + 64], part)


def test_compiled():
    arguments = {n: y.requires_grad_() for n, y in inputs(2, 50, 64, 3).items()}
    compiled = torch.compile(forward_backward, fullgraph=False)
    assert_close(compiled(**arguments), forward_backward(**arguments), F32, gradients=True)


def test_two_runs_are_equal_over_many_tiles():
    arguments = {n: y.requires_grad_() for n, y in inputs(4, 1000, 520, 4, BF16).items()}
    first, second = forward_backward(**arguments), forward_backward(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
