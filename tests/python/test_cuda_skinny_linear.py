"""skinny_linear on a GPU: fp64 at odd sizes, strides, graphs, bits; when the model asks for it."""

import re

import pytest
import torch
import torch.nn.functional as F

import based_ops
from based_model import fused
from support import TOLERANCE, error, randn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

BF16, F16 = torch.bfloat16, torch.float16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")


def draw(*shape, dtype=BF16):
    return randn(*shape, dtype=dtype, device="cuda")


def expected(x, weight, bias=None, swiglu=False):
    out = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if swiglu:
        value, gate = out.chunk(2, -1)
        out = value * F.silu(gate)
    return out


def check(x, weight, bias=None, swiglu=False):
    out = based_ops.skinny_linear(x, weight, bias, swiglu=swiglu)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert error(out, expected(x, weight, bias, swiglu)) <= TOLERANCE[x.dtype][0]
    return out


ROWS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64]


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "columns, width",
    [(1, 8), (2, 64), (70, 72), (128, 64), (130, 1000), (333, 200), (1792, 3584), (2688, 1792)],
)
def test_odd_sizes(columns, width, dtype):
    weight, bias = draw(columns, width, dtype=dtype), draw(columns, dtype=dtype)
    for rows in ROWS:
        x = draw(rows, width, dtype=dtype)
        check(x, weight)
        check(x, weight, bias)
        if columns % 2 == 0:
            check(x, weight / width**0.5, swiglu=True)


@on_hopper
@pytest.mark.parametrize("rows", [5, 20, 64])
def test_sizes_of_the_models(rows):
    for columns, width in ((7168, 1792), (5376, 1792), (1792, 1792), (9216, 1664), (50264, 1024)):
        x, weight = draw(rows, width), draw(columns, width) / width**0.5
        check(x, weight)
        check(x, weight, swiglu=True)


@on_hopper
def test_strided_rows():
    for rows in (3, 50):
        check(draw(rows, 400)[:, 96:296], draw(200, 256)[:, 8:208])
        check(draw(2 * rows, 72)[::2], draw(300, 72)[::3])
        check(draw(1, 72).as_strided((1, 72), (5, 1)), draw(1, 72).as_strided((1, 72), (1, 1)))


@on_hopper
def test_no_rows_no_columns():
    assert based_ops.skinny_linear(draw(0, 16), draw(5, 16)).shape == (0, 5)
    assert based_ops.skinny_linear(draw(3, 16), draw(0, 16)).shape == (3, 0)


@on_hopper
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows", [2, 8, 16, 32, 64])
def test_a_row_depends_on_no_other(rows, swiglu):
    """The same bits in every row, with NaN in all others, and for fewer rows of the same kernel."""
    weight, row = draw(896, 1792) / 40, draw(1, 1792)
    first = based_ops.skinny_linear(row.repeat(rows, 1), weight, swiglu=swiglu)
    assert error(first[:1], expected(row, weight, swiglu=swiglu)) <= TOLERANCE[BF16][0]
    for place in {0, 1, rows // 2, rows - 1}:
        x = torch.full((rows, 1792), float("nan"), dtype=BF16, device="cuda")
        x[place] = row
        out = based_ops.skinny_linear(x, weight, swiglu=swiglu)
        assert torch.equal(out[place], first[0]) and torch.equal(first[place], first[0])
        others = torch.arange(rows, device="cuda") != place
        assert out[others].isnan().all()
    fewer = based_ops.skinny_linear(row.repeat(rows // 2 + 1, 1), weight, swiglu=swiglu)
    assert torch.equal(fewer, first[: rows // 2 + 1])


@on_hopper
def test_weights_of_one_column_stay_there():
    """NaN in a row of the weights is NaN in its column alone."""
    weight, x = draw(200, 320), draw(20, 320)
    weight[[0, 77, 199]] = float("nan")
    out = based_ops.skinny_linear(x, weight)
    assert out.isnan().sum(0).nonzero().flatten().tolist() == [0, 77, 199]
    gated = based_ops.skinny_linear(x, weight, swiglu=True)
    assert gated.isnan().sum(0).nonzero().flatten().tolist() == [0, 77, 99]


@on_hopper
def test_chain_in_a_graph():
    """Each product starts before the one before it has ended, and sees its result all the same."""
    x, bias = draw(50, 1792), draw(1792)
    pairs = [(draw(7168, 1792) / 42, draw(1792, 3584) / 30) for _ in range(6)]

    def chain():
        y = x
        for up, down in pairs:
            y = based_ops.skinny_linear(based_ops.skinny_linear(y, up, swiglu=True), down, bias)
        return y

    eager = chain()
    y = x
    for up, down in pairs:
        y = expected(expected(y, up, swiglu=True).to(BF16), down, bias).to(BF16)
    assert error(eager, y) <= 2e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
    x.copy_(draw(50, 1792))
    graph.replay()
    assert torch.equal(out, chain()) and not torch.equal(out, eager)


@on_hopper
@pytest.mark.parametrize(
    "changes, argument, want, got",
    [
        ({"x": (65, 8)}, "x", "at most 64 rows", "65"),
        ({"weight": (6, 16)}, "weight", "shape (M, K)", "(6, 16)"),
        ({"x": (2, 9), "weight": (6, 9)}, "x", "rows that start at multiples of 16", "others"),
        ({"bias": (5,)}, "bias", "shape (M,)", "(5,)"),
        ({"swiglu": True}, "bias", "none with swiglu", "1"),
        ({"swiglu": True, "weight": (5, 8), "bias": None}, "weight", "an even M", "5"),
    ],
)
def test_bad_argument(changes, argument, want, got):
    given = {"x": (2, 8), "weight": (6, 8), "bias": (6,), "swiglu": False} | changes
    given = {n: draw(*v) if isinstance(v, tuple) else v for n, v in given.items()}
    pattern = f"^skinny_linear: {argument}: expected .*{re.escape(want)}.*, got {re.escape(got)}"
    with pytest.raises(RuntimeError, match=pattern):
        based_ops.skinny_linear(**given)


@on_hopper
@pytest.mark.parametrize("strides", [(0, 1), (4, 1), (12, 1)])
def test_rows_that_overlap_or_start_elsewhere(strides):
    bad, good = draw(100).as_strided((2, 8), strides), draw(2, 8)
    for name, tensors in (("x", (bad, good)), ("weight", (good, bad))):
        with pytest.raises(RuntimeError, match=f"^skinny_linear: {name}: expected rows that start"):
            based_ops.skinny_linear(*tensors)


@on_hopper
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_the_model_asks_for_it_where_it_can(rows, monkeypatch):
    """Products behind norms on either path, and which one was taken; not of 65 rows, or in fp32."""
    calls = []

    def spy(*args, **options):
        calls.append(args)
        return based_ops.skinny_linear(*args, **options)

    monkeypatch.setattr(fused, "skinny_linear", spy)
    norm = torch.nn.RMSNorm(128, eps=1e-5, device="cuda", dtype=BF16).requires_grad_(False)
    norm.weight.copy_(draw(128))
    x, update, fc1, fc2 = draw(rows, 128).float(), draw(rows, 128), draw(512, 128), draw(128, 256)
    with torch.no_grad():
        summed, out = fused.norm_mlp(x, update, norm, fc1 / 11, fc2 / 16)
        _, direct = fused.norm_linear(x, None, norm, fc1)
        assert not fused._few_rows(draw(65, 128), fc1) and not fused._few_rows(x, fc1.float())
    assert len(calls) == (0 if rows == 1 else 3)
    total = x.double() + update.double()
    assert error(summed, total) <= 1e-7
    normed = total * (total.square().mean(-1, True) + 1e-5).rsqrt() * norm.weight.double()
    h = expected(normed.to(BF16), fc1 / 11, swiglu=True)
    assert error(out, expected(h, fc2 / 16)) <= 1e-2
    normed = x.double() * (x.double().square().mean(-1, True) + 1e-5).rsqrt() * norm.weight.double()
    assert error(direct, expected(normed.to(BF16), fc1)) <= TOLERANCE[BF16][0]


@pytest.mark.skipif(HOPPER, reason="this GPU has a kernel")
def test_other_gpus_are_refused():
    with pytest.raises(RuntimeError, match="^skinny_linear: device: expected .*9.0"):
        based_ops.skinny_linear(draw(2, 8), draw(6, 8))
