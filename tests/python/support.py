"""Inputs, tolerances and comparisons shared by the test modules."""

import ctypes
import math

import torch

import based_ops

# ||out - ref|| / ||ref|| allowed, inputs rounded to the dtype first: (outputs, gradients).
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (1e-3, 2.5e-3),
}
DTYPES = list(TOLERANCE)
SEQLENS = [0, 1, 2, 3, 7, 63, 64, 65, 257]


def devices(*ops):
    """The CPU, and CUDA where this build has kernels for all of the ops."""
    on_gpu = torch.cuda.is_available() and set(ops) <= set(based_ops.build_info()["cuda_ops"])
    return ["cpu", "cuda"] if on_gpu else ["cpu"]


def devices_and_dtypes(*ops):
    pairs = [(device, dtype) for device in devices(*ops) for dtype in DTYPES]
    return [pair for pair in pairs if pair != ("cuda", torch.float64)]


def set_malloc_perturb(byte):
    """glibc's M_PERTURB: malloc fills blocks with the complement of byte; 0 turns it off."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-6, byte)


def randn(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def expanded_dim(feature_dim):
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def flatten(result):
    """Nested tuples of results as one list: out, (a, (b, c)) -> [out, a, b, c]."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for part in result for leaf in flatten(part)]


def error(actual, expected, at_least=1e-300):
    """Relative error in the Frobenius norm; a NaN in either is infinitely wrong."""
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).norm().item()
    if difference == 0:
        return 0.0
    if math.isnan(difference):
        return float("inf")
    return difference / max(expected.norm().item(), at_least)


def assert_close(actual, expected, dtype, gradients=False, names=None):
    """Each of a list of tensors within the tolerance of the dtype.

    A tensor whose exact value vanishes (dq at T = 1, where out = v whatever q is) is measured
    against the largest one.
    """
    actual, expected = flatten(actual), flatten(expected)
    assert len(actual) == len(expected)
    tolerance = TOLERANCE[dtype][1 if gradients else 0]
    norms = [x.detach().double().norm().item() for x in expected]
    for i, (a, e) in enumerate(zip(actual, expected)):
        if not a.is_floating_point():
            assert torch.equal(a.cpu().long(), e.cpu().long())
            continue
        vanishes = norms[i] < 1e-9 * max(norms)
        err = error(a, e, at_least=max(norms) if vanishes else 1e-300)
        name = names[i] if names else f"result {i}"
        assert err <= tolerance, f"{name}: error {err:.3g} > {tolerance:.3g}"


def assert_same_gradients(actual, expected, leaves, dtype):
    """Two ways to the same results, for random cotangents."""
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(results, leaves, cotangents) for results in (actual, expected)]
    assert_close(*grads, dtype, gradients=True)


def check(op, definition, inputs, dtype, gradients=True):
    """op(**inputs) and its gradients against those of the fp64 definition.

    inputs maps argument names to tensors (all floating-point ones are differentiated). Every
    floating-point result gets a random cotangent, so gradients flow from final states too.
    """
    names = [n for n, x in inputs.items() if x.is_floating_point()]
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    exact = {n: inputs[n].detach().cpu().double().requires_grad_() for n in names}
    others = {n: x for n, x in inputs.items() if n not in leaves}

    results = flatten(op(**leaves, **others))
    expected = flatten(definition(**exact, **{n: x.cpu() for n, x in others.items()}))
    assert_close(results, expected, dtype)
    if not gradients:
        return
    results = [x for x in results if x.is_floating_point()]
    expected = [x for x in expected if x.is_floating_point()]
    cotangents = [torch.randn(x.shape).to(x.dtype).to(x.device) for x in results]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    total = sum((e * c.cpu().double()).sum() for e, c in zip(expected, cotangents))
    exact_grads = torch.autograd.grad(
        total, list(exact.values()), allow_unused=True, materialize_grads=True
    )
    for name, grad in zip(names, grads):
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape
    assert_close(grads, exact_grads, dtype, gradients=True, names=[f"d{n}" for n in names])


def fused(*tensors):
    """The same values as slices of one tensor that holds them side by side in the last dim."""
    return torch.cat(tensors, -1).split([x.shape[-1] for x in tensors], -1)


def transposed(x):
    """The same values laid out (B, H, T, .) for a (B, T, H, .) tensor."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(x):
    """The same values laid out (T, B, ...)."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x):
    """The same values as every second token of a tensor that holds NaN in between."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"))
    wide[:, ::2] = x
    return wide[:, ::2]


# Layouts of (B, T, H, .) tensors; the last dim is contiguous in all of them.
VIEWS = {
    "fused": fused,
    "transposed": lambda *tensors: [transposed(x) for x in tensors],
    "every_other": lambda *tensors: [every_other(x) for x in tensors],
    "sequence_first": lambda *tensors: [sequence_first(x) for x in tensors],
}


def far_apart(x):
    """The same values with more than 2^31 elements between x[0] and x[1]."""
    assert x.shape[0] == 2
    gap = 2**31 + 64
    set_malloc_perturb(0)  # nobody touches the gap: on the CPU it costs no memory
    storage = torch.empty(gap + x[0].numel(), dtype=x.dtype, device=x.device)
    view = storage.as_strided(x.shape, (gap, *x[0].contiguous().stride()))
    return view.copy_(x)
