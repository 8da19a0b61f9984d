"""Every instruction set of the CPU kernels that this machine runs, not only the best one."""

import os
import subprocess
import sys

import pytest

# Odd sizes, so that the tails of every vector loop run.
SCRIPT = """
import torch
import based_ops
from based_ops import reference

torch.manual_seed(0)
q, k = torch.randn(2, 2, 83, 3, 13)
v = torch.randn(2, 83, 3, 21)
x, gate, weight, bias = (torch.randn(*s) for s in ((2, 83, 45), (2, 83, 45), (45, 4), (45,)))
calls = {
    "taylor_feature_map": ((q,), {}),
    "linear_attention": ((q, k, v), {"output_final_state": True}),
    "sliding_window_attention": ((v, v.flip(1), v, 20), {"output_final_state": True}),
    "short_conv": ((x, weight, bias), {"gate": gate, "activation": "silu"}),
}


def flatten(result):
    return [result] if isinstance(result, torch.Tensor) else [y for x in result for y in flatten(x)]


def outputs_and_gradients(function, inputs, options, dtype):
    inputs = [x.to(dtype, copy=True) if isinstance(x, torch.Tensor) else x for x in inputs]
    options = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor)]
    outs = [x for x in flatten(function(*inputs, **options)) if x.requires_grad]
    return [*outs, *torch.autograd.grad(sum(x.double().square().sum() for x in outs), leaves)]


for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)):
    for name, (inputs, options) in calls.items():
        results = outputs_and_gradients(getattr(based_ops, name), inputs, options, dtype)
        exact = outputs_and_gradients(getattr(reference, name), inputs, options, dtype)
        for a, b in zip(results, exact, strict=True):
            error = ((a - b).double().norm() / b.double().norm()).item()
            assert error <= tolerance, (name, dtype, error)

states = torch.rand(2, 3, 105, 21), torch.rand(2, 3, 105)
copies = [s.clone() for s in states]
token = q[:, 0], k[:, 0], v[:, 0]
out = based_ops.linear_attention_decode(*token, *states)
assert torch.allclose(out, reference.linear_attention_decode(*token, *copies), rtol=1e-4)
print(based_ops.build_info()["cpu_instruction_set"])
"""


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_instruction_set(name):
    environment = os.environ | {"BASED_CPU_ISA": name}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != name:
        pytest.skip(f"this machine has no {name}; it ran {run.stdout.strip()}")
