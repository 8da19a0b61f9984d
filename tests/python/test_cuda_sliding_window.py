"""Sliding-window attention on a GPU: every size it has kernels for, walks over many blocks."""

import pytest
import torch

import based_ops
import oracle
from support import TOLERANCE, error, flatten
from test_sliding_window import check_call, make, make_state, op

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, F16, F32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim, window",
    [(8, 64), (64, 128), (64, 129), (72, 17), (112, 128), (112, 256), (128, 128), (128, 50)]
    + [(200, 65), (256, 100)],
)
def test_sizes(head_dim, window, dtype):
    """More tokens than a tile has rows, in every width that kernels are made for."""
    state = make_state([0, window - 5, 2 * window + 3], window, 2, head_dim, dtype, "cuda")
    check_call(make(3, 290, 2, head_dim, dtype, "cuda"), window, dtype, state)
    bounds = [0, 130, 130, 137, 290]
    cu_seqlens = torch.tensor(bounds, device="cuda")
    check_call(make(1, 290, 2, head_dim, dtype, "cuda"), window, dtype, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_views(offset, dtype):
    """Rows that start anywhere: 16-byte accesses are not to be taken for granted."""
    tensors = make(2, 140, 2, 64, dtype, "cuda")
    padded = [torch.cat([x[..., :offset], x], -1)[..., offset:] for x in tensors]
    assert all(x.stride(2) == 64 + offset for x in padded)
    check_call(padded, 70, dtype)
    # Aligned or not, a row is the same row.
    assert all(
        torch.equal(a, b) for a, b in zip(flatten(op(*padded, 70)), flatten(op(*tensors, 70)))
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64, 112, 128])
@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 128, 129, 130, 257, 700])
def test_windows(window, head_dim, dtype):
    """Blocks at every distance, packed and not; the final ring hands gradients back."""
    check_call(make(1, 700, 2, head_dim, dtype, "cuda"), window, dtype)
    cu_seqlens = torch.tensor([0, 1, 64, 64, 300, 700], device="cuda")
    tensors = make(1, 700, 1, head_dim, dtype, "cuda")
    check_call(tensors, window, dtype, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("nheads, seqlen", [(1, 40_000), (150, 500)])
def test_walks(nheads, seqlen, head_dim):
    """A CTA walks over many blocks, up to those of the next: parts against their surroundings."""
    window = 128
    leaves = [x.requires_grad_() for x in make(1, seqlen, nheads, head_dim, BF16, "cuda")]
    out = based_ops.sliding_window_attention(*leaves, window)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    assert all(x.isfinite().all() for x in grads)
    for at in range(0, seqlen - 300, max(1, seqlen // 7)):
        heads = [0, nheads // 2, nheads - 1]
        first = max(0, at - 2 * window)
        near = slice(first, at + 300 + 2 * window)
        exact = [x[:, near, heads].detach().cpu().double().requires_grad_() for x in leaves]
        expected, *_ = flatten(oracle.sliding_window_attention(*exact, window))
        rows = slice(at - first, at - first + 300)
        exact_grads = torch.autograd.grad(expected, exact, dout[:, near, heads].cpu().double())
        assert error(out[:, near, heads][:, rows], expected[:, rows]) <= TOLERANCE[BF16][0]
        for a, b in zip(grads, exact_grads):
            assert error(a[:, near, heads][:, rows], b[:, rows]) <= TOLERANCE[BF16][1]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_bounds_that_make_no_sense(dtype):
    """Their sequences get NaN; the others get what they would have got."""
    tensors = [x.requires_grad_() for x in make(1, 900, 2, 64, dtype, "cuda")]
    dout = torch.randn_like(tensors[2])
    results = []
    for bounds in ([0, 300, 500, 900], [0, 300, 5000, 900]):
        cu_seqlens = torch.tensor(bounds, device="cuda")
        out = based_ops.sliding_window_attention(*tensors, 128, cu_seqlens=cu_seqlens)
        results.append([out, *torch.autograd.grad(out, tensors, dout)])
    for good, bad in zip(*results):
        assert torch.equal(good[:, :300], bad[:, :300])
        assert bad[:, 300:].isnan().all()
