"""Linear attention on a GPU: every size it has kernels for, segments, streams, graphs."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import based_ops
import oracle
from support import TOLERANCE, assert_close, error, expanded_dim, flatten, randn
from test_linear_attention import check_call, make, make_state, op

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 112, 128, 256])
@pytest.mark.parametrize("feature_dim", [8, 16, 24, 32])
def test_sizes(feature_dim, head_dim, dtype):
    state = make_state(1, 3, feature_dim, head_dim, dtype, "cuda")
    check_call(make(1, 200, 3, feature_dim, head_dim, dtype, "cuda"), dtype, state)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bounds", [None, [0, 2500, 2500, 2600, 5000]])
@pytest.mark.parametrize(
    "feature_dim, dtype", [(16, BF16), (16, F16), (16, F32), (8, F16), (32, BF16)]
)
def test_segments(feature_dim, dtype, bounds, normalize):
    """One head of 5,000 tokens: states and their gradients cross the cuts of its sequences."""
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, device="cuda")}
    rows = 1 if bounds is None else len(bounds) - 1
    state = make_state(rows, 1, feature_dim, 64, dtype, "cuda")
    tensors = make(1, 5000, 1, feature_dim, 64, dtype, "cuda")
    check_call(tensors, dtype, state, normalize=normalize, **options)


@pytest.mark.parametrize("feature_dim, dtype", [(16, BF16), (8, F16), (24, BF16)])
def test_long_sequences_among_short_ones(feature_dim, dtype):
    """Only sequences that are cut need room for states: 600 of these are not, three are."""
    lengths = torch.randint(0, 9, (600,))
    lengths[[0, 300, 599]] = torch.tensor([1500, 2000, 700])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to("cuda")
    tensors = make(1, int(bounds[-1]), 2, feature_dim, 64, dtype, "cuda")
    check_call(tensors, dtype, cu_seqlens=bounds)
    with torch.no_grad():
        based_ops.linear_attention(*tensors, cu_seqlens=bounds)  # whatever is allocated once
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = based_ops.linear_attention(*tensors, cu_seqlens=bounds)
    state = 4 * 2 * 65 * expanded_dim(feature_dim)  # of a sequence
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + 100 * state


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("batch, nheads", [(70000, 1), (1, 70000)])
def test_many_heads(batch, nheads, dtype):
    tensors = [x.requires_grad_() for x in make(batch, 3, nheads, 16, 16, dtype, "cuda")]
    out = based_ops.linear_attention(*tensors)
    some = (slice(None, None, 997), slice(None), slice(None, None, 997))
    exact = [x[some].detach().cpu().double().requires_grad_() for x in tensors]
    expected, *_ = flatten(oracle.linear_attention(*exact))
    assert error(out[some], expected) <= TOLERANCE[dtype][0]
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, dout)
    exact_grads = torch.autograd.grad(expected, exact, dout[some].cpu().double())
    assert_close([g[some] for g in grads], exact_grads, dtype, gradients=True)


def test_a_million_tokens():
    q, k = (randn(1, 1 << 20, 1, 16, dtype=BF16, device="cuda") for _ in range(2))
    v = randn(1, 1 << 20, 1, 64, dtype=BF16, device="cuda")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = based_ops.linear_attention(q, k, v)
    rows = [0, 1000, 500_000, *range((1 << 20) - 16, 1 << 20)]
    host = [x[0, :, 0].detach().cpu() for x in (q, k, v)]
    exact = oracle.linear_attention_rows(host[0][rows], *host[1:], rows)
    assert error(out[0, rows, 0], exact) <= TOLERANCE[BF16][0]
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("position", [1, 63, 64, 127, 128, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_future(bad, position):
    clean = make(1, 400, 2, 16, 64, BF16, "cuda")
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[:, position:] = bad
    dout = torch.randn_like(clean[2])
    results = []
    for tensors in (clean, dirty):
        leaves = [x.requires_grad_() for x in tensors]
        out = based_ops.linear_attention(*leaves)
        results.append((out[:, :position], torch.autograd.grad(out, leaves, dout)[0][:, :position]))
    for a, b in zip(*results):
        assert b.isfinite().all() and error(b, a) <= 2e-3  # summed in another order


def test_rows_anywhere_in_memory():
    """Rows that 16-byte loads cannot read are copied first."""
    tensors = make(2, 70, 3, 16, 24, BF16, "cuda")
    shifted = [torch.cat([x.new_zeros(*x.shape[:-1], 1), x], -1)[..., 1:] for x in tensors]
    assert_close(op(*shifted), op(*tensors), F32)
    leaves = [x.requires_grad_() for x in (*tensors, *shifted)]
    dout = torch.randn(2, 3, 70, 25, device="cuda", dtype=BF16)[..., 1:].transpose(1, 2)
    grads = [
        torch.autograd.grad(based_ops.linear_attention(*x), x, dout)
        for x in (leaves[:3], leaves[3:])
    ]
    assert_close(grads[1], grads[0], F32)


@pytest.mark.parametrize("bounds", [[3, 90, 80, 999], [0, -5, 200, 100], [200, 200, 0, 0]])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_bounds_that_make_no_sense_touch_no_other_memory(dtype, bounds):
    leaves = [x.requires_grad_() for x in make(1, 150, 2, 16, 64, dtype, "cuda")]
    out, state = op(*leaves, cu_seqlens=torch.tensor(bounds, device="cuda"))
    sum(x.float().sum() for x in (out, *state)).backward()
    torch.cuda.synchronize()


def sevens_in_free_memory(like):
    """New tensors show what is not written as 7, not as the NaN that the tests start from."""
    torch.use_deterministic_algorithms(False)
    _ = [torch.full_like(x, 7) for x in like for _ in range(4)]


@pytest.mark.parametrize("bounds", [[3, 140, 290], [0, 140, 290], [3, 140, 300], [7], [0, 0]])
@pytest.mark.parametrize("width, dtype", [(64, BF16), (112, BF16), (64, F16), (24, F32)])
def test_tokens_of_no_sequence_are_nan(width, dtype, bounds):
    """In out and the gradients; the sequences that there are come out as ever."""
    leaves = [x.requires_grad_() for x in make(1, 300, 2, 16, width, dtype, "cuda")]
    dout = torch.randn_like(leaves[2])

    def call(tokens, **options):
        some = [x[:, tokens] for x in leaves]
        out = based_ops.linear_attention(*some, **options)
        return [out, *torch.autograd.grad(out, some, dout[:, tokens])]

    sevens_in_free_memory(leaves)
    results = call(slice(0, 300), cu_seqlens=torch.tensor(bounds, device="cuda"))
    stray = torch.ones(300, dtype=torch.bool, device="cuda")
    for begin, end in itertools.pairwise(bounds):
        stray[begin:end] = False
        expected = call(slice(begin, end))
        assert_close([x[:, begin:end] for x in results], expected, dtype, gradients=True)
    assert all(x[:, stray].isnan().all() for x in results)


@pytest.mark.parametrize("width, dtype", [(64, BF16), (112, F16), (24, F32)])
def test_bounds_that_fall_leave_nothing_unwritten(width, dtype):
    leaves = [x.requires_grad_() for x in make(1, 300, 2, 16, width, dtype, "cuda")]
    sevens_in_free_memory(leaves)
    bounds = torch.tensor([0, 200, 100, 250], device="cuda")
    out = based_ops.linear_attention(*leaves, cu_seqlens=bounds)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all((x != 7).all() and x[:, 250:].isnan().all() for x in (out, *grads))


@pytest.mark.parametrize(
    "feature_dim, head_dim, expected", [(12, 16, "feature_dim"), (16, 12, "head_dim")]
)
def test_other_sizes_are_named(feature_dim, head_dim, expected):
    q, k = randn(2, 1, 5, 2, feature_dim, dtype=BF16, device="cuda")
    v = randn(1, 5, 2, head_dim, dtype=BF16, device="cuda")
    with pytest.raises(RuntimeError, match=f"linear_attention: .: expected {expected}"):
        based_ops.linear_attention(q, k, v)


def test_stream():
    tensors = make(2, 3000, 2, 16, 64, BF16, "cuda")
    expected = op(*tensors)
    late = [torch.zeros_like(x) for x in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of ms: another stream would read the zeros
        for x, y in zip(late, tensors):
            x.copy_(y)
        results = op(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(flatten(results), flatten(expected)))


def test_graph_replay_follows_its_inputs():
    leaves = [x.requires_grad_() for x in make(1, 3000, 2, 16, 64, BF16, "cuda")]
    dout = torch.randn_like(leaves[2])

    def step():
        out = based_ops.linear_attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for x in (*leaves, dout):
                x.copy_(torch.randn_like(x))
        for x in captured:
            x.detach().fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))
