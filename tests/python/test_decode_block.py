"""decode_block where there is no kernel for it: what it refuses, what torch.compile sees, and what
the model asks it for."""

import dataclasses
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import based_ops
import oracle
from based_model import Based, ModelConfig, fused
from based_ops.autograd import calls
from support import error

BF16, F32 = torch.bfloat16, torch.float32
N, K, D, MLP, M = 3, 24, 16, 40, 5
SHAPES = {
    "mixed": (N, K),
    "x": (N, D),
    "out_weight": (D, K),
    "norm_weight": (D,),
    "fc1": (2 * MLP, D),
    "fc2": (D, MLP),
    "next_norm_weight": (D,),
    "next_weight": (M, D),
    "counters": (8,),
    "out_bias": (D,),
    "next_bias": (M,),
}
DTYPES = {"x": F32, "counters": torch.int32, "state_indices": torch.int64}
C, TAPS, SLOTS = 24, 3, 7
CONVOLUTION = {
    "next_weight": (2 * C, D),
    "next_bias": (2 * C,),
    "conv_weight": (C, TAPS),
    "conv_state": (SLOTS, C, TAPS - 1),
    "state_indices": (N,),
}


def arguments(shapes=SHAPES):
    return {n: torch.zeros(*s, dtype=DTYPES.get(n, BF16)) for n, s in shapes.items()}


def zeros(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype)


BAD = [
    ({}, "mixed", "a tensor on a GPU", "cpu"),
    ({"mixed": zeros(N, K, dtype=torch.float16)}, "mixed", "bfloat16", "float16"),
    ({"mixed": zeros(K)}, "mixed", "shape (N, K)", "(24,)"),
    ({"mixed": zeros(129, K)}, "mixed", "at most 128 rows", "129"),
    ({"mixed": zeros(N, 0), "out_weight": zeros(D, 0)}, "mixed", "K >= 1", "0"),
    ({"mixed": zeros(N, K + 1)[:, :K]}, "mixed", "multiples of 16 bytes", "others"),
    ({"mixed": zeros(100)[4:].as_strided((N, K), (K, 1))}, "mixed", "multiples of 16", "others"),
    ({"mixed": zeros(1, K).expand(N, K)}, "mixed", "do not overlap", "others"),
    ({"mixed": zeros(K, N).T}, "mixed", "a contiguous last dimension", "stride 3"),
    ({"x": zeros(N, D)}, "x", "dtype float32", "bfloat16"),
    ({"x": zeros(N + 1, D, dtype=F32)}, "x", "shape (N, d) = (3, *)", "(4, 16)"),
    ({"x": zeros(N, 12, dtype=F32)}, "x", "d a multiple of 8, at least 8", "12"),
    ({"x": zeros(N, 0, dtype=F32)}, "x", "d a multiple of 8, at least 8", "0"),
    ({"x": zeros(1, D, dtype=F32).expand(N, D)}, "x", "rows that do not overlap", "0"),
    ({"out_weight": zeros(D, K + 8)}, "out_weight", "shape (d, K) = (16, 24)", "(16, 32)"),
    ({"out_weight": zeros(D, K, dtype=F32)}, "out_weight", "dtype bfloat16", "float32"),
    ({"out_weight": zeros(D, K + 4)[:, :K]}, "out_weight", "multiples of 16 bytes", "others"),
    ({"out_bias": zeros(D + 1)}, "out_bias", "shape (d,) = (16,)", "(17,)"),
    ({"out_bias": zeros(D, 2)[:, 0]}, "out_bias", "a contiguous last dimension", "stride 2"),
    ({"norm_weight": zeros(D, dtype=F32)}, "norm_weight", "dtype bfloat16", "float32"),
    ({"fc1": zeros(2 * MLP + 1, D)}, "fc1", "shape (2m, d) = (80, 16)", "(81, 16)"),
    ({"fc1": zeros(2 * MLP, D + 8)}, "fc1", "shape (2m, d) = (80, 16)", "(80, 24)"),
    ({"fc1": zeros(24, D), "fc2": zeros(D, 12)}, "fc1", "m a multiple of 8, at least 8", "12"),
    ({"fc1": zeros(2 * MLP, D + 4)[:, :D]}, "fc1", "multiples of 16 bytes", "others"),
    ({"fc1": zeros(D)}, "fc1", "shape (2m, d)", "(16,)"),
    ({"fc2": zeros(D, 2 * MLP)}, "fc2", "shape (d, m) = (16, 40)", "(16, 80)"),
    ({"fc2": zeros(D, MLP + 4)[:, :MLP]}, "fc2", "multiples of 16 bytes", "others"),
    ({"next_norm_weight": zeros(8)}, "next_norm_weight", "shape (d,) = (16,)", "(8,)"),
    ({"next_weight": zeros(M, K)}, "next_weight", "shape (M, d) = (5, 16)", "(5, 24)"),
    ({"next_weight": zeros(0, D), "next_bias": None}, "next_weight", "M >= 1", "0"),
    ({"next_weight": zeros(M, D + 4)[:, :D]}, "next_weight", "multiples of 16 bytes", "others"),
    ({"next_bias": zeros(M + 1)}, "next_bias", "shape (M,) = (5,)", "(6,)"),
    ({"counters": zeros(4, dtype=torch.int32)}, "counters", "shape (8,) = (8,)", "(4,)"),
    ({"counters": zeros(8, dtype=torch.int64)}, "counters", "int32", "int64"),
    ({"eps": -1.0}, "eps", "a number >= 0", "-1"),
    ({"eps": float("nan")}, "eps", "a number >= 0", "nan"),
]


@pytest.mark.parametrize("changes, argument, want, got", BAD)
def test_bad_argument(changes, argument, want, got):
    pattern = f"^decode_block: {argument}: expected .*{re.escape(want)}.*, got {re.escape(got)}"
    with pytest.raises(RuntimeError, match=pattern):
        based_ops.decode_block(**arguments() | changes)


def state(*shape, slots=SLOTS):
    return {"conv_state": zeros(slots, *shape)}


WITHOUT = {name: None for name in ("conv_weight", "conv_state", "state_indices")}
BAD_CONVOLUTION = [
    ({}, "mixed", "a tensor on a GPU", "cpu"),
    ({"state_indices": None} | state(C, TAPS - 1, slots=N), "mixed", "a tensor on a GPU", "cpu"),
    ({"next_bias": None} | WITHOUT, "mixed", "a tensor on a GPU", "cpu"),
    ({"conv_weight": None}, "conv_weight", "(C, taps) with conv_state", "no tensor"),
    (WITHOUT | {"state_indices": zeros(N)}, "conv_weight", "with state_indices", "no tensor"),
    ({"conv_state": None}, "conv_state", "(slots, C, taps-1)", "no tensor"),
    ({"conv_state": None, "state_indices": None}, "conv_state", "(slots, C, taps-1)", "no tensor"),
    ({"next_weight": zeros(2 * C + 1, D), "next_bias": None}, "next_weight", "M = 2 C", "49"),
    ({"next_weight": zeros(2 * C + 8, D), "next_bias": None}, "next_weight", "of 8", "56"),
    ({"conv_weight": zeros(2 * C, TAPS)}, "conv_weight", "(C, taps) = (24, *)", "(48, 3)"),
    ({"conv_weight": zeros(C)}, "conv_weight", "shape (C, taps)", "(24,)"),
    ({"conv_weight": zeros(C, 1)}, "conv_weight", "2..4 taps", "1"),
    ({"conv_weight": zeros(C, 5)}, "conv_weight", "2..4 taps", "5"),
    ({"conv_weight": zeros(C, TAPS, dtype=F32)}, "conv_weight", "dtype bfloat16", "float32"),
    ({"conv_weight": zeros(TAPS, C).T}, "conv_weight", "a contiguous last dimension", "stride 24"),
    (state(C, TAPS), "conv_state", "(slots, C, taps-1) = (*, 24, 2)", "(7, 24, 3)"),
    (state(C + 8, TAPS - 1), "conv_state", "(slots, C, taps-1) = (*, 24, 2)", "(7, 32, 2)"),
    (state(C), "conv_state", "shape (slots, C, taps-1)", "(7, 24)"),
    ({"state_indices": None}, "conv_state", "= (3, 24, 2)", "(7, 24, 2)"),
    ({"conv_state": zeros(SLOTS, C, 2, dtype=F32)}, "conv_state", "dtype bfloat16", "float32"),
    ({"conv_state": zeros(SLOTS, 2, C).mT}, "conv_state", "contiguous last dimension", "stride 24"),
    ({"conv_state": zeros(SLOTS, C, 4)[..., :2]}, "conv_state", "contiguous slots", "4"),
    ({"conv_state": zeros(SLOTS, C + 2, 2)[:, :C]}, "conv_state", "of 16 bytes", "others"),
    ({"conv_state": zeros(SLOTS, C + 8, 2)[:, 1 : C + 1]}, "conv_state", "of 16 bytes", "others"),
    ({"conv_state": zeros(1, C, 2).expand(SLOTS, C, 2)}, "conv_state", "not overlap", "others"),
    ({"state_indices": zeros(N)}, "state_indices", "int32 or int64", "bfloat16"),
    ({"state_indices": zeros(4, dtype=torch.int32)}, "state_indices", "(N,) = (3,)", "(4,)"),
    (
        {"state_indices": zeros(2 * N, dtype=torch.int64)[::2]},
        "state_indices",
        "contig",
        "stride 2",
    ),
]


@pytest.mark.parametrize("changes, argument, want, got", BAD_CONVOLUTION)
def test_bad_convolution(changes, argument, want, got):
    pattern = f"^decode_block: {argument}: expected .*{re.escape(want)}.*, got {re.escape(got)}"
    with pytest.raises(RuntimeError, match=pattern):
        based_ops.decode_block(**arguments(SHAPES | CONVOLUTION) | changes)


@pytest.mark.parametrize("name", [n for n in SHAPES | CONVOLUTION if DTYPES.get(n, F32) == F32])
def test_gradients_are_refused(name):
    tensors = arguments(SHAPES | CONVOLUTION)
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^decode_block: {name}: expected .*requires_grad=True"):
        based_ops.decode_block(**tensors)


def test_shapes_of_the_fake():
    with FakeTensorMode():
        x, out = based_ops.decode_block(**arguments())
    assert x.shape == (N, D) and x.dtype == F32
    assert out.shape == (N, M) and out.dtype == BF16
    with FakeTensorMode():
        x, out = based_ops.decode_block(**arguments(SHAPES | CONVOLUTION))
    assert x.shape == (N, D) and out.shape == (N, C)


@pytest.mark.parametrize("convolution", [{}, CONVOLUTION], ids=["alone", "convolution"])
def test_export_knows_what_is_written(convolution):
    """One op, of any number of rows, that changes counters and conv_state and nothing else."""

    class Step(torch.nn.Module):
        def forward(self, inputs):
            return based_ops.decode_block(**inputs)

    given = arguments(SHAPES | convolution)
    rows = torch.export.Dim("rows", min=2, max=128)
    of_rows = ("mixed", "x", "state_indices")
    shapes = {name: {0: rows} if name in of_rows else {} for name in given}
    program = torch.export.export(Step(), (given,), dynamic_shapes={"inputs": shapes})
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.based_ops.decode_block.default in ops
    written = [a.name for a in ops[0]._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["counters", "conv_state"]


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("convolution", [{}, CONVOLUTION], ids=["alone", "convolution"])
def test_opcheck_and_compile(convolution):
    """With the formula in place of the kernel: what torch is told of the op is true, and the
    compiled call writes the state that it was given."""
    op = torch.ops.based_ops.decode_block.default

    def kernel(*args):
        names = [argument.name for argument in op._schema.arguments]
        x, out = oracle.decode_block(**dict(zip(names, args)))
        return x.float(), out.to(BF16)

    def fresh():
        given = {n: y.normal_() if y.is_floating_point() else y for n, y in template.items()}
        return given | ({"state_indices": torch.tensor([4, -1, 0])} if convolution else {})

    template = arguments(SHAPES | convolution)
    with torch.library._scoped_library("based_ops", "IMPL") as library:
        library.impl("decode_block", kernel, "CPU", allow_override=True)
        given = fresh()
        positional = [given.get(a.name) for a in op._schema.arguments[:-1]]
        torch.library.opcheck(op, (*positional, 1e-5))
        compiled = torch.compile(lambda given: based_ops.decode_block(**given), fullgraph=True)
        for _ in range(2):
            given = fresh()
            expected = {n: y.clone() for n, y in given.items()}
            for ours, theirs in zip(compiled(given), based_ops.decode_block(**expected)):
                assert torch.equal(ours, theirs)
            for name, y in given.items():
                assert torch.equal(y, expected[name]), name


def test_autocast_casts_mixed_alone(monkeypatch):
    """A weight that was cast would be written right before the op, which reads it early."""
    seen = []
    monkeypatch.setitem(calls, "decode_block", lambda *args: seen.append(args))
    wide = {n: x.to(F32) if x.is_floating_point() else x for n, x in arguments().items()}
    with torch.autocast("cpu", BF16):
        based_ops.decode_block(**wide)
    dtypes = [x.dtype for x in seen[0] if isinstance(x, torch.Tensor)]
    assert dtypes == [BF16, *[F32] * 9, torch.int32]


TINY = ModelConfig(
    layers=("conv", "linear", "window", "conv", "attention", "linear"),
    d_model=32,
    mlp_dim=48,
    nheads=2,
    feature_dim=8,
    window=5,
    vocab_size=61,
    norm_eps=0.03,
)


@pytest.mark.parametrize("taken", [True, False], ids=["with conv", "without"])
@pytest.mark.parametrize("joined", [True, False])
def test_what_the_model_asks_for(joined, taken, monkeypatch):
    """The formula in its place: the same logits and states, of every layer whose products are of
    one matrix, the output layer too; with the convolution of the layer that has one and is not the
    first."""
    torch.manual_seed(0)
    model = Based(TINY).double()
    for p in model.parameters():  # biases and norms too
        torch.nn.init.normal_(p, std=0.3)
    if joined:
        for i in (1, 5):
            model.layers[i].mixer.join_projections()
    model.eval().requires_grad_(False)
    tokens = torch.randint(TINY.vocab_size, (3, 12))
    logits, state = model.prefill(tokens[:, :4])
    copy, asked, along = state.clone(), [], []
    plain = [model.decode(tokens[:, t], state) for t in range(4, 12)]

    def spy(mixed, x, blocks, counters, **options):
        asked.append(counters)
        along.extend(block.conv_weight is not None for block in blocks)
        return oracle.decode_blocks(mixed, x, blocks, counters, **options)

    monkeypatch.setattr(fused, "decode_blocks", spy)
    monkeypatch.setattr(fused, "_one_kernel", lambda x, *factors: True)
    monkeypatch.setattr(fused, "_in_block", lambda conv: taken)
    for t in range(4, 12):
        assert error(model.decode(tokens[:, t], copy), plain[t - 4]) <= 1e-12
    assert len(along) == 8 * (6 if joined else 4) and sum(along) == (8 if taken else 0)
    assert len(asked) == len(along) - sum(along) and all(x is copy.counters for x in asked)
    for ours, theirs in zip(sum(copy.layers, ()), sum(state.layers, ()), strict=True):
        assert error(ours, theirs) <= 1e-12


def test_counters_belong_to_one_state():
    """They are no part of what a state says, and no two states share them."""
    model = Based(dataclasses.replace(TINY, layers=("conv", "linear")))
    states = [model.new_state(2), model.prefill(torch.zeros(1, 2, dtype=torch.int64))[1]]
    states += [state.clone() for state in states]
    assert all(x.counters.tolist() == [0] * 8 for x in states)
    assert len({x.counters.data_ptr() for x in states}) == 4
    state = states[0]
    sizes = [x.nbytes for x in (state.positions, *sum(state.layers, ()))]
    assert state.nbytes() == sum(sizes)


def test_when_the_model_asks(monkeypatch):
    """Of BLOCK_ROWS in bf16, d up to BLOCK_COLUMNS; on the CPU, and with gradients, never."""

    def asks(rows=N, dtype=BF16, width=D, columns=M):
        shapes = (width, K), (2 * MLP, width), (width, MLP), (columns, width)
        weights = [zeros(*shape, dtype=dtype) for shape in shapes]
        return fused._one_kernel(zeros(rows, width, dtype=F32), *weights)

    monkeypatch.setattr(fused, "_runs_wgmma", lambda device: True)
    with torch.no_grad():
        assert not asks()
    monkeypatch.setattr(fused, "_decodes", lambda x: True)
    monkeypatch.setattr(fused, "BLOCK_ROWS", range(3, 11))
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 90)
    assert asks(rows=3) and asks(rows=10) and asks(columns=91) and asks(width=88)
    assert not asks(rows=2) and not asks(rows=11) and not asks(width=96)
    assert not asks(dtype=torch.float16) and not asks(dtype=F32) and not asks(width=12)


def test_which_convolutions_the_model_hands_over(monkeypatch):
    """Of BLOCK_TAPS in bf16, behind BLOCK_COLUMNS at most, whose state lies as the op wants it, at
    any place in a pool."""

    def takes(taps=TAPS, channels=C, dtype=BF16, state=None):
        weight = zeros(channels, taps, dtype=dtype)
        state = zeros(SLOTS, channels, taps - 1, dtype=dtype) if state is None else state
        return fused._in_block(fused.ShortConv(weight, state, None))

    assert [taps for taps in range(2, 9) if takes(taps)] == [2, 3, 4]
    assert takes(channels=8) and not takes(channels=12)
    assert not takes(dtype=F32) and not takes(dtype=torch.float16)
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 90)
    assert takes(channels=40) and not takes(channels=48)
    assert takes(state=zeros(SLOTS, C, TAPS - 1)[2:5])
    for wide in (zeros(SLOTS, 2, C, 2)[:, 0], zeros(SLOTS, C, 3)[..., :2], zeros(SLOTS, 2, C).mT):
        assert not takes(state=wide)
    odd = zeros(1 + SLOTS * C * 2)[1:].view(SLOTS, C, 2)
    assert odd.is_contiguous() and not takes(state=odd)


def test_the_first_layer_and_the_indices_of_a_convolution():
    """Where no block lies before it, too; rows of -1 leave their states as they are."""
    model = Based(dataclasses.replace(TINY, layers=("conv", "conv")))
    tokens = torch.randint(TINY.vocab_size, (3, 8))
    _, state = model.prefill(tokens[:, :4])
    other = state.clone()
    for t in range(4, 8):
        logits = model.decode(tokens[:, t], state, indices=torch.tensor([0, -1, 2]))
        expected = model.decode(tokens[:, t], other)
        assert torch.equal(logits[[0, 2]], expected[[0, 2]])
    _, before = model.prefill(tokens[:, :4])
    for (ours,), (theirs,), (old,) in zip(state.layers, other.layers, before.layers):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and torch.equal(ours[1], old[1])
        assert not torch.equal(ours[0], old[0])
