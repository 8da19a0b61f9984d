"""skinny_linear where there is no kernel for it: what it refuses, and what torch.compile sees."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import based_ops
from based_ops.autograd import calls

BF16 = torch.bfloat16


def empty(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    "changes, argument, expected, got",
    [
        ({}, "x", "a tensor on a GPU", "cpu"),
        ({"x": empty(2, 8, dtype=torch.float32)}, "x", "bfloat16 or float16", "float32"),
        ({"x": empty(8)}, "x", "shape (N, K)", "(8,)"),
    ],
)
def test_bad_argument(changes, argument, expected, got):
    good = {"x": empty(2, 8), "weight": empty(6, 8), "bias": empty(6)}
    pattern = (
        f"^skinny_linear: {argument}: expected .*{re.escape(expected)}.*, got {re.escape(got)}"
    )
    with pytest.raises(RuntimeError, match=pattern):
        based_ops.skinny_linear(**good | changes)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_gradients_are_refused(name):
    tensors = {"x": empty(2, 8), "weight": empty(6, 8), "bias": empty(6)}
    tensors[name].requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"^skinny_linear: {name}: expected .*requires_grad=True"
    ):
        based_ops.skinny_linear(**tensors)


@pytest.mark.parametrize("swiglu, columns", [(False, 6), (True, 3)])
def test_shape_of_the_fake(swiglu, columns):
    with FakeTensorMode():
        out = based_ops.skinny_linear(empty(2, 8), empty(6, 8), swiglu=swiglu)
    assert out.shape == (2, columns) and out.dtype == BF16


def test_autocast_casts_x_alone(monkeypatch):
    """A weight that was cast would be written right before the op, which reads it early."""
    seen = []
    monkeypatch.setitem(calls, "skinny_linear", lambda *args: seen.append(args))
    wide = {"dtype": torch.float32}
    with torch.autocast("cpu", BF16):
        based_ops.skinny_linear(empty(2, 8, **wide), empty(6, 8, **wide), empty(6, **wide))
    assert [x.dtype for x in seen[0][:3]] == [BF16, torch.float32, torch.float32]
