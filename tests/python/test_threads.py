"""torch.set_num_threads rules, and no result depends on it."""

import subprocess
import sys

import pytest
import torch

import based_ops
from support import flatten, randn

F32 = torch.float32


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def linear_attention():
    q, k = randn(2, 2, 300, 3, 8, dtype=F32)
    return based_ops.linear_attention, (q, k, randn(2, 300, 3, 20, dtype=F32)), {}


def sliding_window_attention():
    return based_ops.sliding_window_attention, randn(3, 2, 300, 3, 16, dtype=F32), {"window": 70}


def short_conv():
    x, gate = randn(2, 2, 700, 100, dtype=F32)
    inputs = x, randn(100, 4, dtype=F32), randn(100, dtype=F32)
    return based_ops.short_conv, inputs, {"gate": gate, "activation": "silu"}


def taylor_feature_map():
    return based_ops.taylor_feature_map, (randn(3000, 16, dtype=F32),), {}


CASES = [linear_attention, sliding_window_attention, short_conv, taylor_feature_map]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_same_result_for_any_number_of_threads(case, restored_threads):
    function, inputs, options = case()
    if function is not based_ops.taylor_feature_map:
        options["output_final_state"] = True
    leaves = [x.requires_grad_() for x in inputs]
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = flatten(function(*leaves, **options))
        torch.manual_seed(0)
        wanted = [x for x in results if x.requires_grad]
        cotangents = [torch.randn_like(x) for x in wanted]
        runs.append([*results, *torch.autograd.grad(wanted, leaves, cotangents)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


MEASURE = """
import os, time, torch, based_ops
torch.set_num_threads(1)
q, k, v = (torch.randn(2, 4096, 8, n, requires_grad=True) for n in (16, 16, 32))
w = torch.randn(256, 3)
def work():
    out = based_ops.linear_attention(q, k, v) + based_ops.sliding_window_attention(v, v, v, 64)
    out = based_ops.short_conv(out.flatten(2), w, activation="silu")
    based_ops.taylor_feature_map(out.unflatten(-1, (16, 16))).sum().backward()
torch.zeros(1, requires_grad=True).sum().backward()  # autograd's own threads
before = len(os.listdir("/proc/self/task"))
cpu, wall = time.process_time(), time.perf_counter()
work()
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print(len(os.listdir("/proc/self/task")) - before, cpu / wall)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_one_thread_means_one_thread():
    """With one thread no thread is started, and CPU time cannot exceed wall time."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    started, cores = run.stdout.split()
    assert int(started) == 0
    assert float(cores) <= 1.1
