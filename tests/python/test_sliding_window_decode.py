"""The window's decode against its definition and against the whole sequence at once."""

import pytest
import torch

import based_ops
from support import assert_close, randn
from test_sliding_window import definition, make, make_state, op

pytestmark = pytest.mark.ops("sliding_window_attention", "sliding_window_decode")

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("window", [1, 3, 32, 100])
@pytest.mark.parametrize("prefill", [0, 1, 20, 66])
def test_token_by_token_equals_full(prefill, window, device, dtype):
    tensors = make(2, 70, 3, 5, dtype, device)
    full, (*full_rings, _) = op(*tensors, window)
    out, (*rings, positions) = op(*(x[:, :prefill] for x in tensors), window)
    outs = [out]
    for t in range(prefill, 70):
        step = based_ops.sliding_window_decode(*(x[:, t] for x in tensors), *rings, positions)
        outs.append(step[:, None])
        positions += 1
    assert_close(torch.cat(outs, 1), full, dtype)
    assert all(torch.equal(a, b) for a, b in zip(rings, full_rings))


@pytest.mark.parametrize("window", [191, 192, 193, 1000])
def test_decode_of_a_large_ring(window, device):
    """One row with a full ring, one with a partly filled one."""
    *rings, positions = make_state([7 * window + 5, window - 7], window, 2, 8, F32, device)
    token = make(2, 1, 2, 8, F32, device)
    state = [x.cpu() for x in (*rings, positions)]
    expected, *after, _ = definition(*(x.cpu() for x in token), window, *state)
    out = based_ops.sliding_window_decode(*(x[:, 0] for x in token), *rings, positions)
    assert_close([out, *rings], [expected[:, 0], *after], F32)


@pytest.mark.parametrize("angles", [0, 1, 3, 5])
def test_decode_rotates_q_and_k(angles, device, dtype):
    """As if q and k had been rotated and rounded before the call."""
    wide = F64 if dtype == F64 else F32
    *rings, positions = make_state([9, 2, 4], 4, 2, 10, dtype, device)
    q, k, v = (x[:, 0] for x in make(3, 1, 2, 10, dtype, device))
    theta = randn(3, angles, dtype=wide, device=device)
    cos, sin = theta.cos(), theta.sin()

    def rotate(x):
        a, b, rest = x.to(wide).split((angles, angles, 10 - 2 * angles), -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s, rest), -1).to(dtype)

    expected_rings = [x.clone() for x in rings]
    expected = based_ops.sliding_window_decode(rotate(q), rotate(k), v, *expected_rings, positions)
    out = based_ops.sliding_window_decode(q, k, v, *rings, positions, rotary=(cos, sin))
    assert_close([out, *rings], [expected, *expected_rings], dtype)
