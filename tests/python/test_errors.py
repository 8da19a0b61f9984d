"""Every bad argument raises "<op>: <argument>: expected <...>, got <...>" and changes nothing."""

import os
import re
import subprocess
import sys

import pytest
import torch

import based_ops
from bad_arguments import CASES, arguments, changed
from support import devices, randn


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors(value)


@pytest.mark.parametrize("op", CASES)
def test_the_unchanged_arguments_are_valid(op):
    getattr(based_ops, op)(**arguments(op))


@pytest.mark.parametrize(
    "op, changes, argument, expected, got",
    [
        pytest.param(op, *case, id=f"{op}-{i}-{case[1]}")
        for op, cases in CASES.items()
        for i, case in enumerate(cases)
    ],
)
def test_bad_argument(op, changes, argument, expected, got):
    bad = changed(op, changes)
    before = [x.clone() for x in tensors(bad.values())]
    parts = f"{op}: {argument}: expected ", expected, ", got ", got
    pattern = "^" + ".*".join(map(re.escape, parts))
    with pytest.raises(RuntimeError, match=pattern):
        getattr(based_ops, op)(**bad)
    for x, copy in zip(tensors(bad.values()), before):
        assert torch.equal(x, copy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("op", CASES)
def test_mix_of_cpu_and_cuda_tensors(op):
    valid = arguments(op)
    names = [n for n, x in valid.items() if isinstance(x, torch.Tensor)]
    names.remove("pending_k" if op == "linear_attention_fold" else names[0])  # fixes the device
    for name in names:
        with pytest.raises(RuntimeError, match=f"^{op}: {name}: expected .*cpu.*, got cuda"):
            getattr(based_ops, op)(**valid | {name: valid[name].cuda()})


def to_cuda(value):
    if isinstance(value, tuple):
        return tuple(map(to_cuda, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


def run_on_gpu(op, values):
    """Some kernels do not cover the sizes here; they say so."""
    try:
        getattr(based_ops, op)(**values)
    except RuntimeError as error:
        assert re.match(f"{op}: .*: expected .* on CUDA, got ", str(error))
    torch.cuda.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA tensors")
@pytest.mark.parametrize("op", CASES)
def test_cuda_tensors_without_a_kernel(op):
    on_gpu = {n: to_cuda(x) for n, x in arguments(op).items()}
    if "cuda" in devices(op):
        run_on_gpu(op, on_gpu)
    else:
        with pytest.raises(RuntimeError, match=f"^{op}: expected CPU tensors"):
            getattr(based_ops, op)(**on_gpu)


# The values of index tensors: read on the CPU always, on a GPU when asked to.
VALUES = [
    pytest.param(op, *case, id=f"{op}-{i}-{case[1]}")
    for op, cases in CASES.items()
    for i, case in enumerate(cases)
    if "at index" in case[3] or case[2] == ""
]


@pytest.mark.parametrize("op, changes, argument, expected, got", VALUES)
def test_checks_on_a_gpu(op, changes, argument, expected, got):
    if "cuda" not in devices(op):
        pytest.skip("no GPU, or no kernel for this op")
    bad = {n: to_cuda(x) for n, x in changed(op, changes).items()}
    before = [x.clone() for x in tensors(bad.values())]
    parts = f"{op}: {argument}: expected ", expected, ", got ", got
    assert based_ops.set_checks(True) is False
    try:
        with pytest.raises(RuntimeError, match="^" + ".*".join(map(re.escape, parts))):
            getattr(based_ops, op)(**bad)
        run_on_gpu(op, {n: to_cuda(x) for n, x in arguments(op).items()})
    finally:
        assert based_ops.set_checks(False) is True
    for x, copy in zip(tensors(bad.values()), before):
        assert torch.equal(x, copy)
    run_on_gpu(op, bad)  # not checked: bad rows are NaN, nothing else happens


def test_checks_can_be_asked_for_by_the_environment():
    code = "import based_ops; assert based_ops.set_checks(False) is {}"
    for value, expected in (("1", True), ("0", False)):
        run = [sys.executable, "-c", code.format(expected)]
        subprocess.run(run, check=True, env=os.environ | {"BASED_CHECKS": value})


def test_errors_of_a_backward_reach_the_caller():
    """A gradient of the wrong kind cannot come from autograd; the op itself says what is wrong."""
    x = randn(2, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="^taylor_feature_map_backward: dout: expected .*, got "):
        torch.ops.based_ops.taylor_feature_map_backward(x, x, 1.0)


def test_import_prints_nothing():
    run = subprocess.run(
        [sys.executable, "-c", "import based_ops"], capture_output=True, text=True, check=True
    )
    assert run.stdout == run.stderr == ""
