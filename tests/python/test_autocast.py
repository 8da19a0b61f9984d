"""Autocast casts q, k, v, x and gate, and leaves the states in the dtype that the op keeps."""

import pytest
import torch

import based_ops
from support import devices, flatten, randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
B, T, H, D, V, W, C, K = 2, 9, 2, 8, 8, 5, 6, 3  # D and V that CUDA has kernels for
OPS = ["linear_attention", "sliding_window_attention", "short_conv"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = [(op, device) for op in OPS for device in devices(op)]
        metafunc.parametrize("case", cases, ids="-".join)


def make(op, device):
    if op == "linear_attention":
        inputs = {"q": randn(B, T, H, D), "k": randn(B, T, H, D), "v": randn(B, T, H, V)}
        options = {"output_final_state": True}
    elif op == "sliding_window_attention":
        inputs = dict(zip("qkv", randn(3, B, T, H, V)))
        options = {"output_final_state": True, "window": W}
    else:
        inputs = {"x": randn(B, T, C), "gate": randn(B, T, C)}
        inputs |= {"weight": randn(C, K), "bias": randn(C)}
        options = {"output_final_state": True, "activation": "silu"}
    return {n: x.to(F32).to(device) for n, x in inputs.items()}, options


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_sequence_ops(case, dtype):
    """The same numbers and gradients as with inputs cast by hand."""
    op, device = case
    inputs, options = make(op, device)
    function = getattr(based_ops, op)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    with torch.autocast(device, dtype=dtype):
        results = flatten(function(**leaves, **options))
    expected = flatten(function(**{n: x.to(dtype) for n, x in leaves.items()}, **options))
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert results[0].dtype == dtype
    if op == "linear_attention":
        assert results[1].dtype == results[2].dtype == F32

    dout = torch.randn_like(results[0])
    grads = torch.autograd.grad(results[0], list(leaves.values()), dout)
    by_hand = torch.autograd.grad(expected[0], list(leaves.values()), dout)
    for a, b in zip(grads, by_hand):
        assert a.dtype == F32 and torch.equal(a, b)


def test_mixed_inputs(case):
    """Layers under autocast hand over some tensors in the low dtype and some in fp32."""
    op, device = case
    inputs, options = make(op, device)
    mixed = {n: x.bfloat16() if i % 2 else x for i, (n, x) in enumerate(inputs.items())}
    with torch.autocast(device, dtype=BF16):
        results = flatten(getattr(based_ops, op)(**mixed, **options))
    low = {n: x.bfloat16() for n, x in inputs.items()}
    expected = flatten(getattr(based_ops, op)(**low, **options))
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_float64_and_disabled_regions_are_left_alone(case):
    op, device = case
    inputs, options = make(op, device)
    function = getattr(based_ops, op)
    with torch.autocast(device, dtype=BF16):
        if device == "cpu":
            wide = {n: x.double() for n, x in inputs.items()}
            assert flatten(function(**wide, **options))[0].dtype == F64
        with torch.autocast(device, enabled=False):
            assert flatten(function(**inputs, **options))[0].dtype == F32


@pytest.mark.parametrize("op", OPS)
def test_prefill_then_decode(op):
    """States that prefill returns under autocast are those that decode takes under it."""
    for device in devices(op):
        inputs, options = make(op, device)
        in_time = [n for n in inputs if n not in ("weight", "bias")]
        with torch.autocast(device, dtype=BF16), torch.no_grad():
            full = getattr(based_ops, op)(**inputs, **options)[0]
            prefix = inputs | {n: inputs[n][:, :-1] for n in in_time}
            state = getattr(based_ops, op)(**prefix, **options)[1]
            token = inputs | {n: inputs[n][:, -1] for n in in_time}
            if op == "linear_attention":
                out = based_ops.linear_attention_decode(*token.values(), *state)
            elif op == "sliding_window_attention":
                out = based_ops.sliding_window_decode(*token.values(), *state)
            else:
                out = based_ops.short_conv_decode(**token, conv_state=state, activation="silu")
        assert out.dtype == BF16
        assert (out - full[:, -1]).norm() <= 4e-3 * full[:, -1].norm()


def test_taylor_feature_map_keeps_the_dtype_of_x():
    """It squares its argument: the caller says in which precision."""
    for device in devices("taylor_feature_map"):
        with torch.autocast(device, dtype=BF16):
            for dtype in (F32, BF16):
                x = randn(3, D, dtype=dtype, device=device)
                assert based_ops.taylor_feature_map(x).dtype == dtype
