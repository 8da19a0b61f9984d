import itertools

import pytest
import torch

import based_ops
import oracle
from support import SEQLENS, VIEWS, assert_close, check, error, far_apart, flatten, fused, randn

pytestmark = pytest.mark.ops("sliding_window_attention")

F32, F64 = torch.float32, torch.float64


def make(batch, seqlen, nheads, head_dim, dtype=F64, device="cpu"):
    return tuple(randn(3, batch, seqlen, nheads, head_dim, dtype=dtype, device=device))


def make_state(positions, window, nheads, head_dim, dtype=F64, device="cpu"):
    """A ring that rows with these positions could have; what they never wrote is 0."""
    positions = torch.tensor(positions, device=device)
    rings = randn(2, len(positions), window, nheads, head_dim, dtype=dtype, device=device)
    written = torch.arange(window, device=device) < positions[:, None]
    return *torch.where(written[..., None, None], rings, 0), positions


def op(q, k, v, window, k_cache=None, v_cache=None, positions=None, **options):
    state = None if k_cache is None else (k_cache, v_cache, positions)
    return based_ops.sliding_window_attention(
        q, k, v, window, initial_state=state, output_final_state=True, **options
    )


def definition(q, k, v, window, k_cache=None, v_cache=None, positions=None, **options):
    state = None if k_cache is None else (k_cache, v_cache, positions)
    return oracle.sliding_window_attention(q, k, v, window, initial_state=state, **options)


def check_call(tensors, window, dtype, state=None, gradients=True, **options):
    inputs = dict(zip("qkv", tensors))
    if state is not None:
        inputs |= dict(zip(("k_cache", "v_cache", "positions"), state))
    if "cu_seqlens" in options:
        inputs["cu_seqlens"] = options.pop("cu_seqlens")
    check(
        lambda **x: op(**x, window=window, **options),
        lambda **x: definition(**x, window=window, **options),
        inputs,
        dtype,
        gradients,
    )


# Every seqlen once, with windows below, at and above it.
SHAPES = list(zip(SEQLENS, [4, 1, 2, 5, 3, 64, 64, 17, 100], [2, 7, 1, 3, 64, 33, 8, 5, 16]))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("seqlen, window, head_dim", SHAPES)
def test_matches_definition(seqlen, window, head_dim, with_state, device, dtype):
    # One row with an empty ring, one partly filled, one that has gone round.
    positions = [0, (window + 1) // 2, 2 * window + 3]
    state = make_state(positions, window, 2, head_dim, dtype, device) if with_state else None
    check_call(make(3, seqlen, 2, head_dim, dtype, device), window, dtype, state)


@pytest.mark.parametrize("window", [1, 2, 3, 8, 9, 10, 30])
@pytest.mark.parametrize("head_dim", [1, 12, 65, 256, 300])
def test_any_window(window, head_dim, device):
    if device == "cuda" and head_dim > 256:
        with pytest.raises(RuntimeError, match="q: expected head_dim <= 256 on CUDA, got 300"):
            op(*make(2, 9, 3, head_dim, F32, device), window)
        return
    state = make_state([4, 100], window, 3, head_dim, F32, device)
    check_call(make(2, 9, 3, head_dim, F32, device), window, F32, state)


def test_positions_beyond_32_bits(device):
    """Only position mod W and how far the ring is filled matter."""
    tensors = make(2, 9, 2, 5, F32, device)
    k_cache, v_cache, positions = make_state([40, 45], 7, 2, 5, F32, device)
    far = positions + 7 * 2**40
    out, (*rings, moved) = op(*tensors, 7, k_cache, v_cache, far)
    expected, (*expected_rings, _) = op(*tensors, 7, k_cache, v_cache, positions)
    assert torch.equal(out, expected) and torch.equal(moved, far + 9)
    assert all(torch.equal(a, b) for a, b in zip(rings, expected_rings))


@pytest.mark.parametrize("batch, nheads", [(0, 2), (3, 0), (1, 1), (5, 3)])
def test_any_batch_and_heads(batch, nheads, device):
    tensors = make(batch, 9, nheads, 6, F32, device)
    out, (k_cache, v_cache, positions) = op(*tensors, 4)
    assert out.shape == (batch, 9, nheads, 6)
    assert k_cache.shape == v_cache.shape == (batch, 4, nheads, 6)
    assert positions.tolist() == [9] * batch
    if batch * nheads:
        check_call(tensors, 4, F32)


def test_scores_of_any_size(device):
    """Scores beyond the range of exp in fp32: the softmax has to subtract the largest."""
    q, k, v = make(1, 40, 2, 8, F32, device)
    check_call((q * 64, k, v), 16, F32, gradients=False, scale=8.0)
    assert based_ops.sliding_window_attention(q * 1e3, k * 1e3, v, 16).isfinite().all()


@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64, None])
def test_result_follows_the_flags(positions_dtype, device, dtype):
    q, k, v = make(2, 5, 2, 3, dtype, device)
    state = ()
    if positions_dtype is not None:
        *rings, positions = make_state([2, 9], 4, 2, 3, dtype, device)
        state = (*rings, positions.to(positions_dtype))
    for seqlen in (0, 5):
        tensors = q[:, :seqlen], k[:, :seqlen], v[:, :seqlen]
        out, (k_cache, v_cache, positions) = op(*tensors, 4, *state)
        alone = based_ops.sliding_window_attention(*tensors, 4, initial_state=state or None)
        assert torch.equal(out, alone) and out.dtype == dtype
        assert k_cache.dtype == v_cache.dtype == dtype
        assert positions.dtype == (positions_dtype or torch.int64)


@pytest.mark.parametrize("seqlen, window", [(0, 2), (1, 1), (2, 4), (5, 3)])
def test_gradcheck(seqlen, window):
    *rings, positions = make_state([1, 7], window, 2, 2)
    inputs = [x.requires_grad_() for x in (*make(2, seqlen, 2, 2), *rings)]

    def call(*x):
        out, (k_cache, v_cache, _) = op(*x[:3], window, *x[3:], positions)
        return out, k_cache, v_cache

    assert torch.autograd.gradcheck(call, inputs, check_undefined_grad=True)


def test_gradcheck_packed():
    cu_seqlens = torch.tensor([0, 2, 2, 6])
    *rings, positions = make_state([1, 7, 2], 3, 2, 2)
    inputs = [x.requires_grad_() for x in (*make(1, 6, 2, 2), *rings)]

    def call(*x):
        out, (k_cache, v_cache, _) = op(*x[:3], 3, *x[3:], positions, cu_seqlens=cu_seqlens)
        return out, k_cache, v_cache

    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_for_some_inputs_only(device):
    *rings, positions = make_state([3, 9], 6, 2, 5, F32, device)
    leaves = [x.requires_grad_() for x in (*make(2, 20, 2, 5, F32, device), *rings)]
    all_grads = torch.autograd.grad(
        op(*leaves[:3], 6, *leaves[3:], positions)[0].square().sum(), leaves
    )
    for i, grad in enumerate(all_grads):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        op(*alone[:3], 6, *alone[3:], positions)[0].square().sum().backward()
        assert error(alone[i].grad, grad) <= 1e-6
        assert all(x.grad is None for j, x in enumerate(alone) if j != i)


SPLITS = [(9, p) for p in range(10)] + [(150, p) for p in (1, 63, 64, 65, 127, 128, 129, 149)]


@pytest.mark.parametrize("window", [1, 4, 64])
@pytest.mark.parametrize("seqlen, position", SPLITS)
def test_split_equals_full(seqlen, position, window, device):
    for dtype in (F64, F32) if device == "cpu" else (F32,):
        *rings, positions = make_state([3, 201], window, 2, 6, dtype, device)
        tensors = make(2, seqlen, 2, 6, dtype, device)
        leaves = [x.requires_grad_() for x in (*tensors, *rings)]
        full = flatten(op(*leaves[:3], window, *leaves[3:], positions))
        first = [x[:, :position] for x in leaves[:3]]
        second = [x[:, position:] for x in leaves[:3]]
        out, state = op(*first, window, *leaves[3:], positions)
        rest, state = op(*second, window, *state)
        split = [torch.cat([out, rest], 1), *state]
        assert_close(split, full, dtype)
        assert torch.equal(split[1], full[1]) and torch.equal(split[2], full[2])
        cotangents = [torch.randn_like(x) for x in full[:3]]
        assert_close(
            torch.autograd.grad(split[:3], leaves, cotangents),
            torch.autograd.grad(full[:3], leaves, cotangents),
            dtype,
            gradients=True,
        )


BOUNDS = [0, 0, 3, 3, 4, 41, 90, 90]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed(with_state, index_dtype, device, dtype):
    cu_seqlens = torch.tensor(BOUNDS, dtype=index_dtype, device=device)
    tensors = make(1, BOUNDS[-1], 2, 5, dtype, device)
    state = make_state([0, 2, 50, 7, 16, 15, 33], 16, 2, 5, dtype, device) if with_state else None
    check_call(tensors, 16, dtype, state, cu_seqlens=cu_seqlens)

    # Separate calls give the same numbers.
    out, final = op(*tensors, 16, *(state or ()), cu_seqlens=cu_seqlens)
    for i, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        alone = [s[i : i + 1] for s in state] if with_state else ()
        separate = op(*(x[:, start:end] for x in tensors), 16, *alone)
        assert_close((out[:, start:end], *(s[i : i + 1] for s in final)), separate, dtype)


def test_no_sequences(device):
    cu_seqlens = torch.tensor([0], device=device)
    out, (k_cache, v_cache, positions) = op(
        *make(1, 0, 2, 5, F32, device), 3, cu_seqlens=cu_seqlens
    )
    assert out.shape == (1, 0, 2, 5) and positions.shape == (0,)
    assert k_cache.shape == v_cache.shape == (0, 3, 2, 5)


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, device, dtype):
    tensors = make(2, 37, 3, 5, dtype, device)
    views = VIEWS[view](*tensors)
    assert_close(op(*views, 16), op(*tensors, 16), dtype)
    check_call(views, 16, dtype)


def test_broadcast_views(device):
    tensors = [x[:, :, :1].expand(-1, -1, 3, -1) for x in make(2, 37, 1, 5, F32, device)]
    *rings, positions = make_state([9], 8, 3, 5, F32, device)
    state = [*(x.expand(2, *x.shape[1:]) for x in rings), positions.repeat(2)]
    check_call(tensors, 8, F32, state)


def test_strided_states(device):
    tensors = make(2, 9, 3, 5, F32, device)
    *rings, positions = make_state([3, 9], 6, 3, 5, F32, device)
    expected = op(*tensors, 6, *rings, positions)
    assert_close(op(*tensors, 6, *fused(*rings), positions), expected, F32)


def test_expanded_cotangent(device):
    leaves = [x.requires_grad_() for x in make(2, 37, 2, 5, F32, device)]
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    for call, x in ((op, leaves), (definition, exact)):
        out, k_cache, v_cache, _ = flatten(call(*x, 8))
        (out[..., :2].sum() + k_cache.sum() + v_cache.sum()).backward()
    assert_close([x.grad for x in leaves], [x.grad for x in exact], F32, gradients=True)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_offsets_beyond_32_bits(which, device):
    tensors = list(make(2, 3, 2, 5, torch.bfloat16, device))
    expected = op(*tensors, 2)
    tensors[which] = far_apart(tensors[which])
    assert_close(op(*tensors, 2), expected, F32)


@pytest.mark.parametrize("window", [1, 16, 300])
def test_ones_stay_ones(window, device, dtype):
    q, k, v = make(1, 200, 2, 8, dtype, device)
    out = based_ops.sliding_window_attention(q, k, torch.ones_like(v), window)
    assert (out - 1).abs().max() <= {F64: 1e-14, F32: 1e-6}.get(dtype, 0)


def test_window_of_one_returns_v(device, dtype):
    q, k, v = make(2, 70, 2, 8, dtype, device)
    assert torch.equal(based_ops.sliding_window_attention(q, k, v, 1), v)


@pytest.mark.parametrize("window, head_dim", [(1, 5), (5, 5), (64, 5), (5, 64), (100, 112)])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 80])
def test_nan_reaches_its_window_only(position, window, head_dim, device, dtype):
    clean = [x.requires_grad_() for x in make(2, 150, 2, head_dim, dtype, device)]
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, position] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    outs = [based_ops.sliding_window_attention(*x, window) for x in (clean, dirty)]
    dout = torch.randn_like(outs[0])
    dq = [torch.autograd.grad(out, x[0], dout)[0] for out, x in zip(outs, (clean, dirty))]
    for a, b in (outs, dq):
        assert torch.equal(a[:, :position], b[:, :position])
        assert torch.equal(a[:, position + window :], b[:, position + window :])
        assert b[:, position : position + window].isnan().all()


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("which", range(4))
def test_no_product_spreads_what_is_not_finite(which, value, device, dtype):
    """q, k, v or dout of one token: gradients of tokens that it does not meet stay as they are."""
    position, window = 70, 20
    clean = [*make(1, 150, 1, 64, dtype, device), make(1, 150, 1, 64, dtype, device)[0]]
    dirty = [x.clone() for x in clean]
    dirty[which][:, position, :, 3] = float(value)
    results = []
    for *x, dout in (clean, dirty):
        x = [y.requires_grad_() for y in x]
        out = based_ops.sliding_window_attention(*x, window)
        results.append([out, *torch.autograd.grad(out, x, dout)])
    reach = 2 * window  # a key meets queries that meet other keys
    for a, b in zip(*results):
        near = slice(position - reach, position + reach)
        assert torch.equal(a[:, : near.start], b[:, : near.start])
        assert torch.equal(a[:, near.stop :], b[:, near.stop :])
    out, dq, dk, dv = results[1]
    seen = slice(position, position + window)  # queries of the key at position
    sees = slice(position - window + 1, position + 1)  # keys of the query at position
    changed = {0: (dk, sees), 1: (dq, seen), 2: (dq, seen), 3: (dv, sees)}[which]
    assert not changed[0][:, changed[1]].isfinite().all(-1).any()


def test_nan_in_neighbours_stays_there(device, dtype):
    cu_seqlens = torch.tensor([0, 40, 80, 120], device=device)
    clean = [x.requires_grad_() for x in make(1, 120, 2, 5, dtype, device)]
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, 40:80] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    runs = []
    dout = torch.randn_like(clean[2])
    for x in (clean, dirty):
        out, (k_cache, v_cache, _) = op(*x, 32, cu_seqlens=cu_seqlens)
        runs.append((out, k_cache, v_cache, *torch.autograd.grad(out, x, dout)))
    for a, b in zip(*runs):
        if a.shape[0] == 3:  # a cache
            assert torch.equal(a[::2], b[::2])
        else:
            assert torch.equal(a[:, :40], b[:, :40]) and torch.equal(a[:, 80:], b[:, 80:])


def test_nan_in_unused_slots_stays_there(device, dtype):
    """What a row has not written yet is neither seen nor handed on."""
    tensors = make(3, 4, 2, 5, dtype, device)
    *rings, positions = make_state([0, 3, 40], 16, 2, 5, dtype, device)
    unused = torch.arange(16, device=device) >= positions[:, None]
    garbage = [x.masked_fill(unused[..., None, None], float("nan")) for x in rings]
    leaves = [x.requires_grad_() for x in (*tensors, *garbage)]
    results = op(*leaves[:3], 16, *leaves[3:], positions)
    for a, b in zip(flatten(results), flatten(op(*tensors, 16, *rings, positions))):
        assert torch.equal(a, b)
    grads = torch.autograd.grad(results[0].square().sum(), leaves)
    assert all(x.isfinite().all() for x in grads)


def test_nan_in_one_row_and_head_stays_there(device):
    q, k, v = make(3, 30, 2, 5, F32, device)
    (clean, (*clean_rings, _)), nan = op(q, k, v, 8), float("nan")
    q[1, :, 0], k[1, :, 0], v[1, :, 0] = nan, nan, nan
    dirty, (*dirty_rings, _) = op(q, k, v, 8)
    for a, b in zip((clean, *clean_rings), (dirty, *dirty_rings)):  # (B, ., H, V)
        assert torch.equal(a[::2], b[::2]) and torch.equal(a[1, :, 1], b[1, :, 1])


def test_two_runs_are_equal(device, dtype):
    leaves = [x.requires_grad_() for x in make(2, 200, 4, 16, dtype, device)]
    runs = []
    dout = torch.randn_like(leaves[2])
    for _ in range(2):
        out, state = op(*leaves, 50)
        runs.append([out, *state, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("seqlen", [0, 1, 70])
def test_inputs_are_neither_changed_nor_aliased(seqlen, device):
    inputs = [*make(2, seqlen, 2, 5, F32, device), *make_state([3, 9], 6, 2, 5, F32, device)]
    copies = [x.clone() for x in inputs]
    results = flatten(op(*inputs[:3], 6, *inputs[3:]))
    if seqlen == 0:
        assert all(torch.equal(a, b) for a, b in zip(results[1:], inputs[3:]))
    for result in results:
        result.fill_(-1)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


@pytest.mark.parametrize("window", [128, 129, 200, 700, 1600])
def test_long_sequence(window, device):
    state = make_state([3 * window + 50], window, 1, 16, F32, device)
    check_call(make(1, 1500, 1, 16, F32, device), window, F32, state)


@pytest.mark.parametrize("window", [2, 3, 8])
def test_gradients_of_large_values(window, device, dtype):
    """Values far from zero: dq and dk are small differences of <dout, v> and <dout, out>."""
    q, k, v = make(2, 64, 2, 3, F64)
    check_call([x.to(dtype).to(device) for x in (q, k, v + 4)], window, dtype)


def test_double_backward_raises(device):
    leaves = [x.requires_grad_() for x in make(1, 5, 2, 4, F32, device)]
    out = based_ops.sliding_window_attention(*leaves, 3)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        grads[0].sum().backward()
