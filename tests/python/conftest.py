"""Devices, dtypes, seeds and poisoned memory for every test.

A test that takes `device` runs on the CPU, and on CUDA when the build has kernels for the ops that
its module (or the test itself) names with pytest.mark.ops. test_errors.py asserts that the ops
without a CUDA kernel say so.
"""

import zlib

import pytest
import torch

from support import devices, devices_and_dtypes, set_malloc_perturb


def pytest_configure(config):
    config.addinivalue_line("markers", "ops(*names): the ops a test needs on its device")


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    ops = metafunc.definition.get_closest_marker("ops").args
    if "dtype" in metafunc.fixturenames:
        cases = [
            pytest.param(device, dtype, id=f"{device}-{str(dtype).removeprefix('torch.')}")
            for device, dtype in devices_and_dtypes(*ops)
        ]
        metafunc.parametrize("device, dtype", cases)
    else:
        metafunc.parametrize("device", devices(*ops))


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Put garbage into memory that is not written yet, so that an output an op forgets shows.

    glibc fills what it hands out with 0x7f: NaN in float16, above 1e38 in the other dtypes. Its
    lists of small blocks (up to 1032 bytes) it hands out as they are, so these get NaN here. On a
    GPU torch fills new tensors with NaN itself when it is asked to be deterministic.
    """
    torch.use_deterministic_algorithms("cuda" in request.node.nodeid, warn_only=True)
    set_malloc_perturb(0x80)
    blocks = [torch.full((4 * i,), float("nan")) for i in range(1, 65) for _ in range(7)]
    del blocks
    yield
    set_malloc_perturb(0)
    torch.use_deterministic_algorithms(False)
