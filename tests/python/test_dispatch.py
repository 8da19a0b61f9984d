"""The short ways of the public functions to their ops give what the registered ops give."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import based_ops
from based_ops.autograd import calls
from support import flatten, randn

F32 = torch.float32


def inputs_of(op, final):
    """Positional inputs of the torch op, the tensors first."""
    n = 2
    if op == "taylor_feature_map":
        return [randn(3, 4, dtype=F32)], [0.5]
    if op == "linear_attention":
        q, k = randn(2, n, 7, 2, 4, dtype=F32)
        state = randn(n, 2, 15, 6, dtype=F32), randn(n, 2, 15, dtype=F32) ** 2 + 50
        return [q, k, randn(n, 7, 2, 6, dtype=F32), *state], [None, 0.5, True, final]
    if op == "sliding_window_attention":
        q, k, v = randn(3, n, 7, 2, 4, dtype=F32)
        rings = randn(2, n, 3, 2, 4, dtype=F32)
        return [q, k, v, *rings], [torch.tensor([2, 9]), None, 3, 0.5, final]
    x, gate = randn(2, n, 7, 5, dtype=F32)
    tensors = [x, randn(5, 3, dtype=F32), randn(5, dtype=F32), gate, randn(n, 5, 2, dtype=F32)]
    return tensors, [None, True, final]


DIFFERENTIABLE = [op for op in calls if hasattr(torch.ops.based_ops, f"{op}_backward")]
CASES = [(op, final) for op in DIFFERENTIABLE for final in (False, True)]


@pytest.mark.parametrize("op, final", CASES)
def test_same_as_the_registered_op(op, final):
    tensors, rest = inputs_of(op, final)
    runs = []
    for function in (getattr(torch.ops.based_ops, op), calls[op]):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves, *rest)
        out = flatten([out] if isinstance(out, torch.Tensor) else [x for x in out if x is not None])
        if op != "taylor_feature_map" and not final:
            out = out[:1]
        wanted = [x for x in out if x.requires_grad]
        torch.manual_seed(0)
        grads = torch.autograd.grad(wanted, leaves, [torch.randn_like(x) for x in wanted])
        runs.append([*out, *grads])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad


@pytest.mark.parametrize("op, final", CASES)
def test_no_graph_without_a_reason(op, final):
    tensors, rest = inputs_of(op, final)
    expected = flatten(calls[op](*tensors, *rest))
    assert not any(x.requires_grad for x in expected)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        results = flatten(calls[op](*leaves, *rest))
    assert not any(x.requires_grad for x in results)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_final_state_alone_has_gradients():
    """out then comes without a cotangent."""
    q, k = (x.requires_grad_() for x in randn(2, 2, 7, 2, 4, dtype=F32).unbind())
    v = randn(2, 7, 2, 6, dtype=F32).requires_grad_()
    _, (kv_state, _) = based_ops.linear_attention(q, k, v, output_final_state=True)
    dq, dk, dv = torch.autograd.grad(kv_state.square().sum(), (q, k, v))
    assert not dq.any() and dk.any() and dv.any()


def test_checkpoint():
    x, weight = randn(2, 9, 5, dtype=F32), randn(5, 3, dtype=F32)
    grads = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        run(based_ops.short_conv, *leaves).square().sum().backward()
        grads.append([y.grad for y in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_fake_tensors():
    with FakeTensorMode():
        q = torch.randn(1, 9, 2, 4, requires_grad=True)
        out = based_ops.linear_attention(q, q, torch.randn(1, 9, 2, 6))
        (dq,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == (1, 9, 2, 6) and dq.shape == q.shape
