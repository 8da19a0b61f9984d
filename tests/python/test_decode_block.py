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
DTYPES = {"x": F32, "counters": torch.int32}


def arguments():
    return {n: torch.zeros(*s, dtype=DTYPES.get(n, BF16)) for n, s in SHAPES.items()}


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


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "counters"])
def test_gradients_are_refused(name):
    tensors = arguments()
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^decode_block: {name}: expected .*requires_grad=True"):
        based_ops.decode_block(**tensors)


def test_shapes_of_the_fake():
    with FakeTensorMode():
        x, out = based_ops.decode_block(**arguments())
    assert x.shape == (N, D) and x.dtype == F32
    assert out.shape == (N, M) and out.dtype == BF16


def test_export_knows_what_is_written():
    """One op, of any number of rows, that changes counters and nothing else."""

    class Step(torch.nn.Module):
        def forward(self, inputs):
            return based_ops.decode_block(**inputs)

    rows = torch.export.Dim("rows", min=2, max=128)
    shapes = {name: {0: rows} if name in ("mixed", "x") else {} for name in SHAPES}
    program = torch.export.export(Step(), (arguments(),), dynamic_shapes={"inputs": shapes})
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.based_ops.decode_block.default in ops
    written = [a.name for a in ops[0]._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["counters"]


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


@pytest.mark.parametrize("joined", [True, False])
def test_what_the_model_asks_for(joined, monkeypatch):
    """The formula in its place: the same logits and states, of every layer whose products are of
    one matrix, the output layer too."""
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
    copy, asked = state.clone(), []
    plain = [model.decode(tokens[:, t], state) for t in range(4, 12)]

    def spy(*args, **options):
        asked.append(args[8])
        return oracle.decode_block(*args, **options)

    monkeypatch.setattr(fused, "decode_block", spy)
    monkeypatch.setattr(fused, "_one_kernel", lambda x, *factors: True)
    for t in range(4, 12):
        assert error(model.decode(tokens[:, t], copy), plain[t - 4]) <= 1e-12
    assert len(asked) == 8 * (6 if joined else 4) and all(x is copy.counters for x in asked)
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
    """Of BLOCK_ROWS in bf16, up to BLOCK_COLUMNS; on the CPU, and with gradients, never."""

    def asks(rows=N, dtype=BF16, width=D, columns=M, hidden=2 * MLP):
        shapes = (D, K), (hidden, width), (columns, width)
        weights = [zeros(*shape, dtype=dtype) for shape in shapes]
        return fused._one_kernel(zeros(rows, D, dtype=F32), *weights)

    monkeypatch.setattr(fused, "_runs_wgmma", lambda device: True)
    with torch.no_grad():
        assert not asks()
    monkeypatch.setattr(fused, "_decodes", lambda x: True)
    monkeypatch.setattr(fused, "BLOCK_ROWS", range(3, 11))
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 90)
    assert asks(rows=3) and asks(rows=10) and asks(columns=90)
    assert not asks(rows=2) and not asks(rows=11)
    assert not asks(columns=91) and not asks(hidden=92)
    assert not asks(dtype=torch.float16) and not asks(dtype=F32) and not asks(width=12)
