"""The recall test's rivals, where flash-linear-attention is installed and a GPU is visible."""

import math

import pytest
import torch

from based_model import mqar_data
from based_model.mqar_data import Task, TaskSet
from based_model.mqar_rivals import RIVALS
from based_model.mqar_run import Run, RunConfig

pytest.importorskip("fla.layers", reason="the [rivals] extra is not installed")
if not torch.cuda.is_available():
    pytest.skip("fla's kernels are Triton's and need a GPU", allow_module_level=True)

TINY = TaskSet(64, (Task(16, 2, 512), Task(64, 4, 512)), (Task(16, 2, 64), Task(80, 6, 64)))


@pytest.mark.parametrize("name, tolerance", (("mamba", 1e-5), ("mamba2", 5e-3)))  # TF32 products
def test_the_mambas_are_those_that_go_token_by_token(name, tolerance):
    mixer = RIVALS[name].mixers(64, 16)[0].cuda()
    with torch.no_grad():
        for p in mixer.parameters():
            if p.ndim == 2:
                p.mul_(3)
    plain = {"mamba": "slow_forward", "mamba2": "torch_forward"}[name]
    x = torch.randn(2, 77, 64, device="cuda", requires_grad=True)
    out = mixer(x, lambda y: y[:, ::2])
    expected = getattr(mixer.layer, plain)(x)
    expected = (expected[0] if isinstance(expected, tuple) else expected)[:, ::2]
    inputs = [x, *mixer.parameters()]
    dout = torch.randn_like(out)
    pairs = zip(
        (out, *torch.autograd.grad(out, inputs, dout)),
        (expected, *torch.autograd.grad(expected, inputs, dout)),
        strict=True,
    )
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_learns(name, monkeypatch):
    monkeypatch.setitem(mqar_data.TASKS, "tiny", TINY)
    config = RunConfig(mixer=name, tasks="tiny", batch_size=64, epochs=4, precision="bf16")
    train, test = ([x.to("cuda") for x in part] for part in mqar_data.generate_all(TINY, 0))
    run = Run(config, train, test, "cuda")
    losses = []
    try:
        for _ in run.work():
            losses.append(run.loss)
    except RuntimeError as error:
        if "produces incorrect results" in str(error):  # fla's word on some of Triton's versions
            pytest.skip(f"fla refuses: {error}")
        raise
    assert run.epoch == 4 and run.loss < math.log(TINY.vocab_size) - 0.3, losses[::8]
    assert run.record()["by_task"][1][:2] == [80, 6]
