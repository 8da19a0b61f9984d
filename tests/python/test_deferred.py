"""linear_attention_decode_deferred: the state together with the waiting tokens is the state."""

import pytest
import torch

import based_ops
import oracle
from support import TOLERANCE, assert_close, error, randn, state_dtype

pytestmark = pytest.mark.ops(
    "linear_attention_decode", "linear_attention_decode_deferred", "linear_attention_fold"
)

F32, F64 = torch.float32, torch.float64
# Converting to the plain form changes the order of the sums, nothing else.
PLAIN = {F64: 1e-12, F32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def tokens(steps, batch, nheads, feature_dim, head_dim, dtype, device="cpu"):
    widths = (feature_dim, feature_dim, head_dim)
    return [randn(steps, batch, nheads, n, dtype=dtype, device=device) for n in widths]


def history(batch, nheads, feature_dim, head_dim, dtype, device="cpu"):
    """The state after some tokens."""
    past = (randn(batch, 5, nheads, n) for n in (feature_dim, feature_dim, head_dim))
    _, *state = oracle.linear_attention(*past)
    return [x.to(state_dtype(dtype)).to(device) for x in state]


def rings(batch, capacity, nheads, feature_dim, head_dim, dtype, device="cpu"):
    """Rings nobody has written to."""
    shapes = ((batch, capacity, nheads, n) for n in (feature_dim, head_dim))
    return [torch.full(s, float("nan"), dtype=dtype, device=device) for s in shapes]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("capacity, sizes", [(1, (2, 3, 5)), (4, (3, 8, 16)), (17, (2, 16, 40))])
def test_equals_the_plain_form(capacity, sizes, normalize, device, dtype):
    """Every output, and at every step the state that linear_attention_fold makes of it."""
    batch, steps = 3, 2 * capacity + 3
    plain = history(batch, *sizes, dtype, device)
    deferred = [x.clone() for x in plain]
    ring = rings(batch, capacity, *sizes, dtype, device)
    fill = torch.zeros(batch, dtype=torch.int32, device=device)
    for token in zip(*tokens(steps, batch, *sizes, dtype, device)):
        expected = based_ops.linear_attention_decode(*token, *plain, normalize=normalize)
        out = based_ops.linear_attention_decode_deferred(
            *token, *deferred, *ring, fill, normalize=normalize
        )
        assert_close(out, expected, dtype)
        fill = (fill + 1) % capacity
        converted = [x.clone() for x in deferred]
        based_ops.linear_attention_fold(*converted, *ring, fill)
        for a, b in zip(converted, plain):
            assert error(a, b) <= PLAIN[dtype]
    if capacity > 1:
        assert error(deferred[0], plain[0]) > 0.01  # some tokens did wait


def test_matches_definition(device, dtype):
    steps, batch, sizes, capacity = 21, 2, (2, 8, 24), 8
    state = [x.zero_() for x in history(batch, *sizes, dtype, device)]
    ring = rings(batch, capacity, *sizes, dtype, device)
    sequence = tokens(steps, batch, *sizes, dtype, device)
    outs = []
    for t, token in enumerate(zip(*sequence)):
        fill = torch.full((batch,), t % capacity, device=device)
        outs.append(based_ops.linear_attention_decode_deferred(*token, *state, *ring, fill))
    fill = torch.full((batch,), steps % capacity, device=device)
    based_ops.linear_attention_fold(*state, *ring, fill)
    expected = oracle.linear_attention(*(x.transpose(0, 1).cpu() for x in sequence))
    assert_close([torch.stack(outs, 1), *state], expected, dtype)


def test_rows_at_different_fill_levels(device):
    """Each row as if it were alone."""
    capacity, sizes = 5, (2, 4, 8)
    state = history(capacity, *sizes, F32, device)
    ring = [torch.randn_like(x) for x in rings(capacity, capacity, *sizes, F32, device)]
    token = [x[0] for x in tokens(1, capacity, *sizes, F32, device)]
    fill = torch.arange(capacity, device=device)
    alone = []
    for b in range(capacity):
        row = [x[b : b + 1].clone() for x in (*token, *state, *ring, fill)]
        alone.append([based_ops.linear_attention_decode_deferred(*row), *row[3:7]])
    out = based_ops.linear_attention_decode_deferred(*token, *state, *ring, fill)
    for together, separate in zip((out, *state, *ring), zip(*alone)):
        assert torch.equal(together, torch.cat(separate))


def test_the_state_is_written_in_every_cth_step_only(device):
    capacity, sizes = 3, (2, 4, 8)
    state = history(2, *sizes, F32, device)
    ring = rings(2, capacity, *sizes, F32, device)
    for t, token in enumerate(zip(*tokens(7, 2, *sizes, F32, device))):
        before = [x.clone() for x in (*state, *ring)]
        fill = torch.full((2,), t % capacity, device=device)
        based_ops.linear_attention_decode_deferred(*token, *state, *ring, fill)
        same = [torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, state + ring)]
        assert same == ([False, False, True, True] if t % 3 == 2 else [True, True, False, False])


def test_fold_follows_slots_and_skips(device, dtype):
    capacity, sizes, slots = 4, (2, 3, 5), 5
    state = history(slots, *sizes, dtype, device)
    ring = [torch.randn_like(x) for x in rings(slots, capacity, *sizes, dtype, device)]
    before = [x.clone() for x in state]
    indices = torch.tensor([3, -1, 0], device=device)
    fill = torch.tensor([2, 3, 0], device=device)
    based_ops.linear_attention_fold(*state, *ring, fill, state_indices=indices)
    k, v = (x[3:4, :2].cpu() for x in ring)
    _, *expected = oracle.linear_attention(k, k, v, initial_state=[x[3:4].cpu() for x in before])
    assert_close([x[3:4] for x in state], expected, dtype)
    others = [0, 1, 2, 4]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(state, before))


def test_no_accuracy_is_lost_over_many_tokens(device):
    """fp32 against fp64, next to the plain form."""
    steps, sizes, capacity = 600, (1, 8, 16), 16
    sequence = tokens(steps, 1, *sizes, F32, device)
    plain = [x.zero_() for x in history(1, *sizes, F32, device)]
    state, ring = [x.clone() for x in plain], rings(1, capacity, *sizes, F32, device)
    for t, token in enumerate(zip(*sequence)):
        fill = torch.full((1,), t % capacity, device=device)
        based_ops.linear_attention_decode(*token, *plain)
        out = based_ops.linear_attention_decode_deferred(*token, *state, *ring, fill)
    fill = torch.full((1,), steps % capacity, device=device)
    based_ops.linear_attention_fold(*state, *ring, fill)
    expected, *exact = oracle.linear_attention(*(x.transpose(0, 1).cpu() for x in sequence))
    assert error(out, expected[:, -1]) <= TOLERANCE[F32][0]
    assert error(state[0], exact[0]) <= max(2 * error(plain[0], exact[0]), 1e-6)
