import pytest
import torch

import based_ops
import oracle
from support import TOLERANCE, check, error, expanded_dim, far_apart, fused, randn

pytestmark = pytest.mark.ops("taylor_feature_map")

DIMS = [1, 2, 3, 4, 7, 8, 16, 17, 24, 64]


@pytest.mark.parametrize("dim", DIMS)
def test_matches_definition(dim, device, dtype):
    inputs = {"x": randn(2, 5, 3, dim, dtype=dtype, device=device)}
    check(based_ops.taylor_feature_map, oracle.taylor_feature_map, inputs, dtype)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 2, 8), (257, 8), (2, 3, 8), (1, 1, 1, 1)])
def test_any_leading_shape(shape, device):
    x = randn(*shape, dtype=torch.float32, device=device)
    out = based_ops.taylor_feature_map(x)
    assert out.shape == (*shape[:-1], expanded_dim(shape[-1])) and out.dtype == x.dtype
    check(based_ops.taylor_feature_map, oracle.taylor_feature_map, {"x": x}, torch.float32)


def test_rotation_order():
    x = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    out = based_ops.taylor_feature_map(x, scale=1.0)
    half = 2**-0.5
    rows = [1, 1, 2, 3, 5, half, 4 * half, 9 * half, 25 * half]
    rows += [1 * 2, 2 * 3, 3 * 5, 5 * 1]  # r = 1
    rows += [1 * 3, 2 * 5]  # r = 2 = D/2: the other half would repeat the pairs
    assert error(out, torch.tensor(rows, dtype=torch.float64)) <= 1e-15


@pytest.mark.parametrize("scale", [None, 0.3, 2.0])
@pytest.mark.parametrize("dim", DIMS)
def test_inner_product_is_the_expansion(dim, scale):
    q, k = randn(2, 50, dim)
    s = (dim**-0.5 if scale is None else scale) * (q * k).sum(-1)
    q_map, k_map = (based_ops.taylor_feature_map(x, scale=scale) for x in (q, k))
    assert error((q_map * k_map).sum(-1), 1 + s + s * s / 2) <= 1e-12


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_gradcheck(dim, scale):
    x = randn(2, 3, dim).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: based_ops.taylor_feature_map(x, scale=scale), x)


def test_strided_views(device, dtype):
    x, other = randn(2, 2, 9, 3, 8, dtype=dtype, device=device)
    views = [
        fused(other, x)[1],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x.new_full(x.shape, float("nan"))], 2)[:, :, 0],
        x[:1].expand(2, -1, -1, -1),
    ]
    for view in views:
        expected = based_ops.taylor_feature_map(view.contiguous())
        assert torch.equal(based_ops.taylor_feature_map(view), expected)
        check(based_ops.taylor_feature_map, oracle.taylor_feature_map, {"x": view}, dtype)


def test_gradient_of_an_expanded_cotangent(device):
    x = randn(4, 8, dtype=torch.float32, device=device).requires_grad_()
    based_ops.taylor_feature_map(x).sum().backward()
    exact = x.detach().cpu().double().requires_grad_()
    oracle.taylor_feature_map(exact).sum().backward()
    assert error(x.grad, exact.grad) <= TOLERANCE[torch.float32][1]


def test_nan_stays_in_its_row(device, dtype):
    x = randn(6, 8, dtype=dtype, device=device)
    clean = based_ops.taylor_feature_map(x)
    x[3] = float("nan")
    out = based_ops.taylor_feature_map(x)
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(out[keep], clean[keep]) and out[3, 1:].isnan().all()


def test_two_runs_are_equal(device, dtype):
    x = randn(300, 16, dtype=dtype, device=device).requires_grad_()
    out = based_ops.taylor_feature_map(x)
    dout = torch.randn_like(out)
    (first,) = torch.autograd.grad(out, x, dout)
    again = based_ops.taylor_feature_map(x)
    (second,) = torch.autograd.grad(again, x, dout)
    assert torch.equal(out, again) and torch.equal(first, second)


def test_double_backward_raises(device):
    x = randn(4, 8, dtype=torch.float32, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(based_ops.taylor_feature_map(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


def test_offsets_beyond_32_bits(device):
    values = randn(2, 8, dtype=torch.bfloat16, device=device)
    out = based_ops.taylor_feature_map(far_apart(values))
    assert torch.equal(out, based_ops.taylor_feature_map(values))
