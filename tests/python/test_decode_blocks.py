"""decode_blocks where there is no kernel for it: what it refuses, what torch.compile sees, and what
the model asks it for."""

import dataclasses
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import based_ops
import oracle
from based_model import Based, fused
from based_ops import DecodeBlock
from support import error
from test_decode_block import BF16, F32, TINY, zeros

N, D, MIXED, SLOTS = 3, 16, 24, 5
WIDTHS = [(40, 32, 3), (8, 48, 2), (24, 8, 4)]  # (m, C, taps) of each block


def blocks(count=3, last_convolves=True, dtype=BF16):
    given, k = [], MIXED
    for i, (m, channels, taps) in enumerate(WIDTHS[:count]):
        convolves = last_convolves or i + 1 < count
        columns = 2 * channels if convolves else 7
        matrices = (D, k), (D,), (2 * m, D), (D, m), (D,), (columns, D), (D,), (columns,)
        weights = [torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5 for shape in matrices]
        if convolves:
            weights += [torch.randn(channels, taps, dtype=dtype)]
            weights += [torch.randn(SLOTS, channels, taps - 1, dtype=dtype)]
        given.append(DecodeBlock(*weights))
        k = channels
    return given


def arguments(count=3, last_convolves=True):
    return {
        "mixed": torch.randn(N, MIXED).to(BF16),
        "x": torch.randn(N, D),
        "blocks": blocks(count, last_convolves),
        "counters": torch.zeros(8, dtype=torch.int32),
        "state_indices": torch.tensor([4, -1, 0]),
    }


def with_block(i, **changes):
    given = blocks()
    given[i] = given[i]._replace(**changes)
    return {"blocks": given}


BAD = [
    ({}, "mixed", "a tensor on a GPU", "cpu"),
    ({"blocks": []}, "blocks", "1 to 6 of them", "0"),
    ({"blocks": blocks()[:1] + blocks()[1:2] * 6}, "blocks", "1 to 6 of them", "7"),
    ({"mixed": zeros(129, MIXED)}, "mixed", "at most 128 rows", "129"),
    ({"mixed": zeros(N, 32)}, "blocks[0].out_weight", "(d, K) = (16, 32)", "(16, 24)"),
    (with_block(1, out_weight=zeros(D, 48)), "blocks[1].out_weight", "= (16, 32)", "(16, 48)"),
    (with_block(2, fc1=zeros(32, D)), "blocks[2].fc2", "(d, m) = (16, 16)", "(16, 24)"),
    (with_block(1, fc1=zeros(16, D, dtype=F32)), "blocks[1].fc1", "dtype bfloat16", "float32"),
    (with_block(2, conv_state=zeros(5, 8, 4)), "blocks[2].conv_state", "(*, 8, 3)", "(5, 8, 4)"),
    (with_block(1, conv_weight=zeros(48, 5)), "blocks[1].conv_weight", "2..4 taps", "5"),
    (with_block(0, conv_state=None), "blocks[0]", "conv_weight and conv_state", "1 of them"),
    (with_block(2, conv_weight=None), "blocks[2]", "or neither in the last block", "1 of them"),
    (with_block(1, conv_weight=None, conv_state=None), "blocks[1]", "neither in the last", "0"),
    ({"state_indices": zeros(4, dtype=torch.int32)}, "state_indices", "(N,) = (3,)", "(4,)"),
    ({"counters": zeros(4, dtype=torch.int32)}, "counters", "shape (8,) = (8,)", "(4,)"),
]


@pytest.mark.parametrize("changes, argument, want, got", BAD)
def test_bad_argument(changes, argument, want, got):
    pattern = f"^decode_blocks: {re.escape(argument)}: expected .*{re.escape(want)}.*, got "
    with pytest.raises(RuntimeError, match=pattern + re.escape(got)):
        based_ops.decode_blocks(**arguments() | changes)


def test_gradients_are_refused():
    given = arguments()
    given["blocks"][1].fc2.requires_grad_()
    expected = r"^decode_blocks: blocks\[1\].fc2: expected .*requires_grad=True"
    with pytest.raises(RuntimeError, match=expected):
        based_ops.decode_blocks(**given)


@pytest.mark.parametrize("last_convolves", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shapes_of_the_fake(count, last_convolves):
    with FakeTensorMode():
        given = arguments(count, last_convolves)
        if count == 1 and not last_convolves:
            del given["state_indices"]
        x, out = based_ops.decode_blocks(**given)
    assert x.shape == (N, D) and x.dtype == F32 and out.dtype == BF16
    assert out.shape == (N, WIDTHS[count - 1][1] if last_convolves else 7)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("last_convolves", [True, False])
def test_opcheck_and_compile(last_convolves):
    """With the formula in place of the kernel: what torch is told of the op is true, and the
    compiled call writes the states that it was given."""
    op = torch.ops.based_ops.decode_blocks.default

    def kernel(mixed, x, weights, biases, counters, conv_weights, conv_states, indices, eps):
        conv = [*zip(conv_weights, conv_states), (None, None)]
        given = [
            DecodeBlock(*weights[6 * i : 6 * i + 6], *biases[2 * i : 2 * i + 2], *conv[i])
            for i in range(len(weights) // 6)
        ]
        x, out = oracle.decode_blocks(mixed, x, given, counters, eps=eps, state_indices=indices)
        return x.float(), out.to(BF16)

    def states(given):
        return [block.conv_state for block in given["blocks"] if block.conv_state is not None]

    with torch.library._scoped_library("based_ops", "IMPL") as library:
        library.impl("decode_blocks", kernel, "CPU", allow_override=True)
        given = arguments(last_convolves=last_convolves)
        flat = (
            [w for block in given["blocks"] for w in block[:6]],
            [b for block in given["blocks"] for b in block[6:8]],
            given["counters"],
            [block.conv_weight for block in given["blocks"] if block.conv_weight is not None],
            states(given),
        )
        rest = (given["state_indices"], 1e-5)
        torch.library.opcheck(op, (given["mixed"], given["x"], *flat, *rest))
        compiled = torch.compile(lambda given: based_ops.decode_blocks(**given), fullgraph=True)
        for _ in range(2):
            given = arguments(last_convolves=last_convolves)
            copy = given | {
                "blocks": [
                    DecodeBlock(*[None if y is None else y.clone() for y in block])
                    for block in given["blocks"]
                ]
            }
            for ours, theirs in zip(compiled(given), based_ops.decode_blocks(**copy)):
                assert torch.equal(ours, theirs)
            for ours, theirs in zip(states(given), states(copy), strict=True):
                assert torch.equal(ours, theirs)


CHAINS = dataclasses.replace(TINY, layers=("conv", "linear", *("conv",) * 8, "window", "conv"))


@pytest.mark.parametrize("taken", [6, 3, 1, 0])
def test_the_model_hands_over_chains_of_convolutions(taken, monkeypatch):
    """Of any number of layers, as many at once as the op takes, and none where its kernel is not:
    the same logits and states as layer by layer."""
    torch.manual_seed(0)
    model = Based(CHAINS).double()
    for p in model.parameters():  # biases and norms too
        torch.nn.init.normal_(p, std=0.3)
    model.layers[1].mixer.join_projections()
    model.eval().requires_grad_(False)
    tokens = torch.randint(CHAINS.vocab_size, (3, 12))
    _, state = model.prefill(tokens[:, :4])
    copy, indices, asked = state.clone(), torch.tensor([0, -1, 2]), []
    plain = [model.decode(tokens[:, t], state, indices) for t in range(4, 12)]

    def spy(mixed, x, blocks, counters, **options):
        asked.append(len(blocks))
        return oracle.decode_blocks(mixed, x, blocks, counters, **options)

    monkeypatch.setattr(fused, "decode_blocks", spy)
    monkeypatch.setattr(fused, "BLOCKS", taken)
    monkeypatch.setattr(fused, "_one_kernel", lambda x, *factors: True)
    monkeypatch.setattr(fused, "_in_block", lambda conv: True)
    for t in range(4, 12):
        ours = model.decode(tokens[:, t], copy, indices)
        assert error(ours[[0, 2]], plain[t - 4][[0, 2]]) <= 1e-12
    chains = {6: [1, 6, 3, 2], 3: [1, 3, 3, 3, 2], 1: [1] * 12, 0: []}[taken]
    assert asked == 8 * chains
    for ours, theirs in zip(sum(copy.layers, ()), sum(state.layers, ()), strict=True):
        assert error(ours, theirs) <= 1e-12
