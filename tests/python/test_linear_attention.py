import itertools

import pytest
import torch

import based_ops
import oracle
from support import (
    SEQLENS,
    TOLERANCE,
    VIEWS,
    assert_close,
    assert_same_gradients,
    check,
    error,
    expanded_dim,
    far_apart,
    flatten,
    fused,
    randn,
    state_dtype,
    transposed,
)

pytestmark = pytest.mark.ops("linear_attention")

F32, F64 = torch.float32, torch.float64


def fit(feature_dim, head_dim, device):
    """The nearest sizes that the kernels of a device have: any on the CPU."""
    if device == "cpu":
        return feature_dim, head_dim
    return min(-(-feature_dim // 8) * 8, 32), -(-head_dim // 8) * 8


def make(batch, seqlen, nheads, feature_dim, head_dim, dtype=F64, device="cpu"):
    feature_dim, head_dim = fit(feature_dim, head_dim, device)
    q, k = randn(2, batch, seqlen, nheads, feature_dim, dtype=dtype, device=device)
    v = randn(batch, seqlen, nheads, head_dim, dtype=dtype, device=device)
    return q, k, v


def make_state(rows, nheads, feature_dim, head_dim, dtype=F64, device="cpu"):
    """The state after 5 random tokens: k_state has to be one that makes denominators positive."""
    feature_dim, head_dim = fit(feature_dim, head_dim, device)
    _, *state = oracle.linear_attention(*make(rows, 5, nheads, feature_dim, head_dim))
    return tuple(x.to(state_dtype(dtype)).to(device) for x in state)


def op(q, k, v, kv_state=None, k_state=None, **options):
    state = None if kv_state is None else (kv_state, k_state)
    return based_ops.linear_attention(
        q, k, v, initial_state=state, output_final_state=True, **options
    )


def definition(q, k, v, kv_state=None, k_state=None, **options):
    state = None if kv_state is None else (kv_state, k_state)
    return oracle.linear_attention(q, k, v, initial_state=state, **options)


def check_call(tensors, dtype, state=None, gradients=True, **options):
    inputs = dict(zip("qkv", tensors))
    if state is not None:
        inputs |= {"kv_state": state[0], "k_state": state[1]}
    if "cu_seqlens" in options:
        inputs["cu_seqlens"] = options.pop("cu_seqlens")
    check(
        lambda **x: op(**x, **options),
        lambda **x: definition(**x, **options),
        inputs,
        dtype,
        gradients,
    )


# Every seqlen once, with feature and head dims that are multiples of nothing.
SHAPES = list(zip(SEQLENS, [3, 1, 2, 16, 8, 24, 3, 16, 5], [2, 7, 1, 64, 33, 5, 17, 19, 3]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("seqlen, feature_dim, head_dim", SHAPES)
def test_matches_definition(seqlen, feature_dim, head_dim, with_state, normalize, device, dtype):
    tensors = make(2, seqlen, 3, feature_dim, head_dim, dtype, device)
    state = make_state(2, 3, feature_dim, head_dim, dtype, device) if with_state else None
    check_call(tensors, dtype, state, normalize=normalize)


@pytest.mark.parametrize("feature_dim", [1, 2, 3, 8, 16, 24])
@pytest.mark.parametrize("head_dim", [1, 12, 65])
def test_any_dims(feature_dim, head_dim, device):
    state = make_state(1, 2, feature_dim, head_dim, F32, device)
    check_call(make(1, 67, 2, feature_dim, head_dim, F32, device), F32, state)


@pytest.mark.parametrize("feature_dim, head_dim", [(64, 9), (9, 300)])
def test_large_dims(feature_dim, head_dim, device):
    state = make_state(1, 1, feature_dim, head_dim, F32, device)
    check_call(make(1, 130, 1, feature_dim, head_dim, F32, device), F32, state)


@pytest.mark.parametrize("batch, nheads", [(0, 2), (3, 0), (1, 1), (5, 3)])
def test_any_batch_and_heads(batch, nheads, device):
    tensors = make(batch, 9, nheads, 4, 6, F32, device)
    out, (kv_state, k_state) = op(*tensors)
    expanded = expanded_dim(tensors[0].shape[-1])
    assert out.shape == tensors[2].shape
    assert kv_state.shape == (batch, nheads, expanded, out.shape[-1])
    assert k_state.shape == (batch, nheads, expanded)
    if batch * nheads:
        check_call(make(batch, 9, nheads, 4, 6, F32, device), F32)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(scale, device):
    check_call(make(2, 70, 2, 8, 8, F32, device), F32, scale=scale)


def test_result_follows_the_flags(device, dtype):
    q, k, v = make(2, 4, 2, 3, 5, dtype, device)
    for seqlen in (0, 4):
        tensors = q[:, :seqlen], k[:, :seqlen], v[:, :seqlen]
        out = based_ops.linear_attention(*tensors)
        with_state, (kv_state, k_state) = op(*tensors)
        assert torch.equal(out, with_state) and out.dtype == dtype
        assert kv_state.dtype == k_state.dtype == state_dtype(dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seqlen", [0, 1, 5])
def test_gradcheck(seqlen, normalize):
    inputs = [*make(2, seqlen, 2, 3, 2), *make_state(2, 2, 3, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(flatten(op(*x, normalize=normalize))), inputs, check_undefined_grad=True
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_packed(normalize):
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    inputs = [x.requires_grad_() for x in [*make(1, 5, 2, 2, 3), *make_state(3, 2, 2, 3)]]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(flatten(op(*x, normalize=normalize, cu_seqlens=cu_seqlens))), inputs
    )


def test_gradient_for_some_inputs_only(device):
    tensors = make(2, 20, 2, 4, 5, F32, device)
    state = make_state(2, 2, 4, 5, F32, device)
    leaves = [x.requires_grad_() for x in (*tensors, *state)]
    all_grads = torch.autograd.grad(op(*leaves)[0].square().sum(), leaves)
    for i, grad in enumerate(all_grads):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        op(*alone)[0].square().sum().backward()
        assert error(alone[i].grad, grad) <= 1e-6
        assert all(x.grad is None for j, x in enumerate(alone) if j != i)


@pytest.mark.parametrize("result", [1, 2])
def test_gradient_from_one_state_only(result, device):
    leaves = [x.requires_grad_() for x in make(2, 20, 2, 4, 5, F32, device)]
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    flatten(op(*leaves))[result].square().sum().backward()
    definition(*exact)[result].square().sum().backward()
    assert error(leaves[1].grad, exact[1].grad) <= TOLERANCE[F32][1]
    assert leaves[0].grad is None or not leaves[0].grad.any()


def split_at(position, tensors, state=None, **options):
    first = [x[:, :position] for x in tensors]
    second = [x[:, position:] for x in tensors]
    out, state = op(*first, *(state or ()), **options)
    rest, state = op(*second, *state, **options)
    return torch.cat([out, rest], 1), state


SPLITS = [(9, p) for p in range(10)] + [(193, p) for p in (1, 63, 64, 65, 127, 128, 129, 192)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seqlen, position", SPLITS)
def test_split_equals_full(seqlen, position, normalize, device):
    for dtype in (F64, F32) if device == "cpu" else (F32,):
        tensors = make(2, seqlen, 2, 5, 6, dtype, device)
        state = make_state(2, 2, 5, 6, dtype, device)
        leaves = [x.requires_grad_() for x in (*tensors, *state)]
        full = flatten(op(*leaves, normalize=normalize))
        split = flatten(split_at(position, leaves[:3], leaves[3:], normalize=normalize))
        assert_close(split, full, dtype)
        assert_same_gradients(split, full, leaves, dtype)


@pytest.mark.ops("linear_attention", "linear_attention_decode")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prefill", [0, 1, 20, 66])
def test_token_by_token_equals_full(prefill, normalize, device, dtype):
    tensors = make(2, 70, 3, 8, 5, dtype, device)
    full, full_state = op(*tensors, normalize=normalize)
    out, state = op(*(x[:, :prefill] for x in tensors), normalize=normalize)
    outs = [out]
    for t in range(prefill, 70):
        step = based_ops.linear_attention_decode(
            *(x[:, t] for x in tensors), *state, normalize=normalize
        )
        outs.append(step[:, None])
    assert_close([torch.cat(outs, 1), *state], [full, *full_state], dtype)


BOUNDS = [0, 0, 3, 3, 4, 69, 134, 134]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed(with_state, index_dtype, device, dtype):
    cu_seqlens = torch.tensor(BOUNDS, dtype=index_dtype, device=device)
    tensors = make(1, BOUNDS[-1], 2, 3, 5, dtype, device)
    state = make_state(len(BOUNDS) - 1, 2, 3, 5, dtype, device) if with_state else None
    check_call(tensors, dtype, state, cu_seqlens=cu_seqlens)

    # Separate calls give the same numbers.
    out, final = op(*tensors, *(state or ()), cu_seqlens=cu_seqlens)
    for i, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        alone = [s[i : i + 1] for s in state] if with_state else ()
        separate = op(*(x[:, start:end] for x in tensors), *alone)
        packed = (out[:, start:end], *(s[i : i + 1] for s in final))
        assert_close(packed, separate, dtype)


def test_no_sequences(device):
    cu_seqlens = torch.tensor([0], device=device)
    tensors = make(1, 0, 2, 3, 5, F32, device)
    out, (kv_state, k_state) = op(*tensors, cu_seqlens=cu_seqlens)
    expanded = expanded_dim(tensors[0].shape[-1])
    assert out.shape == tensors[2].shape and kv_state.shape == (0, 2, expanded, out.shape[-1])
    assert k_state.shape == (0, 2, expanded)


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, device, dtype):
    tensors = make(2, 67, 3, 4, 5, dtype, device)
    views = VIEWS[view](*tensors)
    assert_close(op(*views), op(*tensors), dtype)
    check_call(views, dtype)


def test_broadcast_views(device):
    tensors = [x[:, :, :1].expand(-1, -1, 3, -1) for x in make(2, 67, 1, 4, 5, F32, device)]
    state = [x.expand(2, -1, *x.shape[2:]) for x in make_state(1, 3, 4, 5, F32, device)]
    check_call(tensors, F32, state)


def test_strided_states(device):
    tensors = make(2, 9, 3, 4, 5, F32, device)
    kv_state, k_state = make_state(2, 3, 4, 5, F32, device)
    kv_view = fused(kv_state, kv_state)[1]
    k_view = transposed(k_state[..., None, :])[..., 0, :]
    assert_close(op(*tensors, kv_view, k_view), op(*tensors, kv_state, k_state), F32)


def test_expanded_cotangent(device):
    leaves = [x.requires_grad_() for x in make(2, 67, 2, 4, 5, F32, device)]
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    sum(x.sum() for x in flatten(op(*leaves, normalize=False))).backward()
    sum(x.sum() for x in definition(*exact, normalize=False)).backward()
    assert_close([x.grad for x in leaves], [x.grad for x in exact], F32, gradients=True)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_offsets_beyond_32_bits(which, device):
    tensors = list(make(2, 3, 2, 4, 5, torch.bfloat16, device))
    expected = op(*tensors)
    tensors[which] = far_apart(tensors[which])
    assert_close(op(*tensors), expected, F32)


@pytest.mark.parametrize("seqlen", [1, 64, 1000, 4096])
def test_ones_stay_ones(seqlen, device, dtype):
    q, k, v = make(1, seqlen, 2, 16, 5, dtype, device)
    deviation = (based_ops.linear_attention(q, k, torch.ones_like(v)) - 1).abs().max()
    # Numerator and denominator sum the same weights, so a 16-bit result rounds to 1 itself.
    assert deviation <= {F64: 1e-12, F32: 5e-6}.get(dtype, 0)


@pytest.mark.parametrize("position", [1, 63, 64, 100])
def test_nan_in_the_future_stays_there(position, device, dtype):
    clean = [x.requires_grad_() for x in make(2, 150, 2, 4, 5, dtype, device)]
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, position:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    outs = [based_ops.linear_attention(*x) for x in (clean, dirty)]
    dout = torch.randn_like(outs[0])
    dq = [torch.autograd.grad(out, x[0], dout)[0] for out, x in zip(outs, (clean, dirty))]
    for a, b in (outs, dq):
        if device == "cpu":
            assert torch.equal(a[:, :position], b[:, :position])
        else:  # a chunk with NaN in it is summed in another order
            assert_close(b[:, :position], a[:, :position], dtype)
    assert outs[1][:, position:].isnan().all()


def test_nan_in_neighbours_stays_there(device, dtype):
    cu_seqlens = torch.tensor([0, 70, 140, 200], device=device)
    clean = [x.requires_grad_() for x in make(1, 200, 2, 4, 5, dtype, device)]
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, 70:140] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    runs = []
    dout = torch.randn_like(clean[2])
    for x in (clean, dirty):
        out, state = op(*x, cu_seqlens=cu_seqlens)
        runs.append((out, *state, *torch.autograd.grad(out, x, dout)))
    for a, b in zip(*runs):
        if a.shape[0] == 3:  # a state
            assert torch.equal(a[::2], b[::2])
        else:
            assert torch.equal(a[:, :70], b[:, :70]) and torch.equal(a[:, 140:], b[:, 140:])


def test_nan_in_one_row_and_head_stays_there(device):
    q, k, v = make(3, 70, 2, 4, 5, F32, device)
    (clean, clean_state), nan = op(q, k, v), float("nan")
    q[1, :, 0], k[1, :, 0], v[1, :, 0] = nan, nan, nan
    dirty, dirty_state = op(q, k, v)
    pairs = zip((clean.transpose(1, 2), *clean_state), (dirty.transpose(1, 2), *dirty_state))
    for a, b in pairs:  # (B, H, ...)
        assert torch.equal(a[::2], b[::2]) and torch.equal(a[1, 1], b[1, 1])


def test_two_runs_are_equal(device, dtype):
    leaves = [x.requires_grad_() for x in make(2, 200, 4, 8, 16, dtype, device)]
    runs = []
    dout = torch.randn_like(leaves[2])
    for _ in range(2):
        out, state = op(*leaves)
        runs.append([out, *state, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("seqlen", [0, 1, 70])
def test_inputs_are_neither_changed_nor_aliased(seqlen, device):
    inputs = [*make(2, seqlen, 2, 4, 5, F32, device), *make_state(2, 2, 4, 5, F32, device)]
    copies = [x.clone() for x in inputs]
    results = flatten(op(*inputs))
    if seqlen == 0:
        assert torch.equal(results[1], inputs[3]) and torch.equal(results[2], inputs[4])
    for result in results:
        result.fill_(float("nan"))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


def test_double_backward_raises(device):
    leaves = [x.requires_grad_() for x in make(1, 5, 2, 3, 4, F32, device)]
    out = based_ops.linear_attention(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        grads[0].sum().backward()
