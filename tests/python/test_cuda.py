"""What only a GPU has: its current stream, graphs, its errors. Runs wherever a GPU is visible."""

import pytest
import torch

import based_ops
import oracle
from support import TOLERANCE, error, randn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


def test_the_build_has_cuda_kernels():
    assert based_ops.build_info()["cuda"], "a GPU is visible but based_ops was built without CUDA"


def test_runs_on_the_current_stream():
    x = randn(1 << 14, 16, dtype=torch.float32, device="cuda")
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of ms: another stream would read the zeros
        late.copy_(x)
        out = based_ops.taylor_feature_map(late)
    stream.synchronize()
    assert torch.equal(out, based_ops.taylor_feature_map(x))


def test_graph_replay_follows_its_inputs():
    x = randn(1000, 16, dtype=torch.bfloat16, device="cuda").requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        based_ops.taylor_feature_map(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = based_ops.taylor_feature_map(x)
        (dx,) = torch.autograd.grad(out.sum(), x)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        out.fill_(float("nan")), dx.fill_(float("nan"))
        graph.replay()
        exact = x.detach().cpu().double().requires_grad_()
        expected = oracle.taylor_feature_map(exact)
        (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
        assert error(out, expected) <= TOLERANCE[torch.bfloat16][0]
        assert error(dx, expected_dx) <= TOLERANCE[torch.bfloat16][1]


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="taylor_feature_map: x: expected float32, bfloat16"):
        based_ops.taylor_feature_map(torch.zeros(3, 4, dtype=torch.float64, device="cuda"))
