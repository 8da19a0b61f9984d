"""decode_blocks on a GPU: bit for bit what decode_block gives block by block, and near to fp64."""

import pytest
import torch

import based_ops
import oracle
from based_ops import DecodeBlock
from support import TOLERANCE, error
from test_cuda_decode_block import BF16, HOPPER, captured, draw, new_counters, weights
from test_cuda_decode_block_conv import KINDS, convolution, same_bits

pytestmark = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0 is visible")

# (d, K of the first, (m, C, taps) of each block); None for C: the last one has a plain projection.
SMALL = (8, 24, ((8, 16, 2), (16, 8, 4), (8, 40, 3)))
ODD = (264, 400, ((328, 328, 3), (72, 648, 2), (136, None, 3)))
LONG = (136, 64, ((64, 72, 3),) * 6)
WIDE = (1024, 1024, ((2048, 2048, 3),) * 3 + ((2048, None, 3),))
MODEL = (1792, 1792, ((3584, 3584, 3),) * 4 + ((3584, None, 3),))


def chain(rows, sizes, kind="pool"):
    """mixed, x, blocks and the slots of all convolutions."""
    d, k, widths = sizes
    blocks, pool, mixed = [], None, draw(rows, k)
    for m, channels, taps in widths:
        columns = 300 if channels is None else 2 * channels
        given = weights((d, k, m, columns))
        given.pop("counters", None)
        if channels is not None:
            conv = convolution(rows, (d, k, m, columns), taps, kind)
            slots = conv.pop("state_indices", None)
            if pool is None:
                pool = slots
            else:  # the same slots in every block
                state = torch.full_like(conv["conv_state"], float("nan"))
                used = pool[(pool >= 0) & (pool < len(state))]
                state[used] = draw(len(used), channels, taps - 1)
                conv["conv_state"] = state
            given |= conv
        blocks.append(DecodeBlock(**given))
        k = channels
    return mixed, draw(rows, d).float(), blocks, pool


def copied(blocks):
    return [block._replace(conv_state=_clone(block.conv_state)) for block in blocks]


def _clone(state):
    return None if state is None else state.clone()


def one_by_one(mixed, x, blocks, slots):
    counters = new_counters()
    for block in blocks:
        indices = None if block.conv_weight is None else slots
        given = block._asdict() | {"counters": counters, "state_indices": indices}
        x, mixed = based_ops.decode_block(mixed, x, **given)
    return x, mixed


@pytest.mark.parametrize("sizes", [SMALL, ODD, LONG, WIDE, MODEL], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_block_by_block(sizes, kind):
    for rows in (1, 3, 8, 16, 21, 32, 50, 64, 100, 128):
        mixed, x, blocks, slots = chain(rows, sizes, kind)
        expected_blocks = copied(blocks)
        expected_x, expected = one_by_one(mixed, x, expected_blocks, slots)
        counters, inputs = new_counters(), (mixed.clone(), x.clone())
        ours_x, ours = based_ops.decode_blocks(mixed, x, blocks, counters, state_indices=slots)
        assert torch.equal(ours_x.view(torch.int32), expected_x.view(torch.int32)), rows
        assert same_bits(ours, expected), rows
        for block, other in zip(blocks, expected_blocks):
            if block.conv_state is not None:
                assert same_bits(block.conv_state, other.conv_state), rows
        assert not counters.any()
        assert torch.equal(mixed, inputs[0]) and torch.equal(x, inputs[1])


@pytest.mark.parametrize("sizes", [ODD, WIDE], ids=str)
def test_near_to_fp64(sizes):
    for rows in (1, 16, 70):
        mixed, x, blocks, slots = chain(rows, sizes)
        exact_blocks = [
            block._replace(conv_state=None if (s := block.conv_state) is None else s.double())
            for block in blocks
        ]
        ours_x, ours = based_ops.decode_blocks(
            mixed, x, blocks, new_counters(), state_indices=slots
        )
        exact_x, exact = oracle.decode_blocks(mixed, x, exact_blocks, None, state_indices=slots)
        # Each block rounds what the next one reads.
        tolerance = len(blocks) * TOLERANCE[BF16][0]
        assert error(ours_x, exact_x) <= tolerance and error(ours, exact) <= tolerance


def test_in_a_graph():
    """The same bits as eagerly, again and again, with states that move on."""
    mixed, x, blocks, slots = chain(40, ODD)
    eager, counters = copied(blocks), new_counters()
    based_ops.decode_blocks(mixed, x, copied(blocks), counters, state_indices=slots)
    graph, results = captured(
        lambda: based_ops.decode_blocks(mixed, x, blocks, counters, state_indices=slots)
    )
    for _ in range(30):
        mixed.copy_(draw(*mixed.shape))
        graph.replay()
        expected = based_ops.decode_blocks(mixed, x, eager, new_counters(), state_indices=slots)
        for ours, theirs in zip(results, expected):
            assert torch.equal(ours, theirs)
    for block, other in zip(blocks, eager):
        if block.conv_state is not None:
            assert same_bits(block.conv_state, other.conv_state)
    assert not counters.any()


def test_no_rows():
    mixed, x, blocks, slots = chain(0, SMALL)
    x, out = based_ops.decode_blocks(mixed, x, blocks, new_counters(), state_indices=slots)
    assert x.shape == (0, 8) and out.shape == (0, 40)


def test_checked_slots():
    """With checks on, a slot that one of the pools does not have is named."""
    mixed, x, blocks, slots = chain(4, SMALL)
    blocks[1] = blocks[1]._replace(conv_state=blocks[1].conv_state[:5])
    slots = torch.tensor([0, 1, 5, 2], device="cuda")
    before = based_ops.set_checks(True)
    try:
        with pytest.raises(
            RuntimeError, match=r"^decode_blocks: state_indices: expected .*, got 5"
        ):
            based_ops.decode_blocks(mixed, x, blocks, new_counters(), state_indices=slots)
    finally:
        based_ops.set_checks(before)
