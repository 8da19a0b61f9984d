"""The plain torch reference against the definitions, and against the public signatures."""

import inspect

import pytest
import torch

import based_ops
import oracle
from based_ops import reference
from support import DTYPES, assert_close, check, flatten, randn, state_dtype

OPS = [
    "taylor_feature_map",
    "linear_attention",
    "linear_attention_decode",
    "linear_attention_decode_deferred",
    "linear_attention_fold",
    "sliding_window_attention",
    "sliding_window_decode",
    "short_conv",
    "short_conv_decode",
]
BOUNDS = [0, 3, 3, 9]


@pytest.mark.parametrize("op", OPS)
def test_same_signature(op):
    ours, theirs = (inspect.signature(getattr(m, op)) for m in (based_ops, reference))
    strip = inspect.Parameter.empty
    for a, b in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert a.replace(annotation=strip) == b.replace(annotation=strip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_taylor_feature_map(dim, dtype):
    x = randn(2, 3, dim, dtype=dtype)
    check(reference.taylor_feature_map, oracle.taylor_feature_map, {"x": x}, dtype)


def initial_state(op, rows, dtype):
    if op == "linear_attention":
        past = (randn(rows, 5, 2, n) for n in (3, 3, 4))
        _, *state = oracle.linear_attention(*past)
        names, state = ("kv_state", "k_state"), [x.to(state_dtype(dtype)) for x in state]
    elif op == "sliding_window_attention":
        positions = torch.tensor([2, 0, 11])[:rows]
        written = (torch.arange(4) < positions[:, None])[..., None, None]
        names = ("k_cache", "v_cache", "positions")
        state = [*(randn(2, rows, 4, 2, 4, dtype=dtype) * written), positions]
    else:
        names, state = ("conv_state",), [randn(rows, 6, 2, dtype=dtype)]
    return dict(zip(names, state))


def sequence(op, batch, seqlen, dtype):
    if op == "short_conv":
        shapes = {
            "x": (batch, seqlen, 6),
            "weight": (6, 3),
            "bias": (6,),
            "gate": (batch, seqlen, 6),
        }
    else:
        width = 3 if op == "linear_attention" else 4
        shapes = {n: (batch, seqlen, 2, width) for n in "qk"} | {"v": (batch, seqlen, 2, 4)}
    return {n: randn(*shape, dtype=dtype) for n, shape in shapes.items()}


def with_state(function, names, **options):
    """A function of plain tensors: those called `names` make up its initial_state."""

    def call(**inputs):
        state = tuple(inputs.pop(n) for n in names)
        if state:
            inputs["initial_state"] = state[0] if names == ("conv_state",) else state
        return function(**inputs, **options)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "state", "packed"])
@pytest.mark.parametrize("seqlen", [0, 1, 9])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("op", ["linear_attention", "sliding_window_attention", "short_conv"])
def test_sequence_ops(op, flag, seqlen, kind, dtype):
    options = {
        "linear_attention": {"normalize": flag, "scale": None if flag else 0.4},
        "sliding_window_attention": {"window": 4, "scale": None if flag else 0.4},
        "short_conv": {"activation": "silu" if flag else None},
    }[op]
    packed = kind == "packed"
    inputs = sequence(op, 1 if packed else 3, seqlen, dtype)
    state = {} if kind == "plain" else initial_state(op, 3, dtype)
    if packed:
        inputs["cu_seqlens"] = torch.tensor([min(b, seqlen) for b in BOUNDS])
    check(
        with_state(getattr(reference, op), tuple(state), output_final_state=True, **options),
        with_state(getattr(oracle, op), tuple(state), **options),
        inputs | state,
        dtype,
    )


DECODE = {
    "linear_attention": (reference.linear_attention_decode, ("kv_state", "k_state")),
    "sliding_window_attention": (reference.sliding_window_decode, ("k_cache", "v_cache")),
    "short_conv": (reference.short_conv_decode, ("conv_state",)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", DECODE)
def test_decode_is_the_sequence_op_token_by_token(op, dtype):
    """On slots 4 and 1 of a pool, with a skipped row between them."""
    inputs = sequence(op, 3, 9, dtype)
    options = {"sliding_window_attention": {"window": 4}, "short_conv": {"activation": "silu"}}
    full, final = getattr(reference, op)(**inputs, **options.get(op, {}), output_final_state=True)

    decode, names = DECODE[op]
    pool = [torch.zeros(5, *x.shape[1:], dtype=x.dtype) for x in flatten(final) if x.dim() > 1]
    fixed = {n: inputs.pop(n) for n in ("weight", "bias") if n in inputs}
    if op == "short_conv":
        fixed["activation"] = "silu"
    outs = []
    for t in range(9):
        token = {n: x[:, t] for n, x in inputs.items()}
        if op == "sliding_window_attention":
            token["positions"] = torch.tensor([t, t, t])
        states = dict(zip(names, pool))
        outs.append(decode(**token, **states, **fixed, state_indices=torch.tensor([4, -1, 1])))
    out = torch.stack(outs, 1)
    assert_close(out[::2], full[::2], dtype)
    assert not out[1].any()
    for state, expected in zip(pool, flatten(final)):
        assert_close(state[[4, 1]], expected[::2], dtype)
        assert not state[[0, 2, 3]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deferred_decode_is_the_op(dtype):
    """Outputs, states and rings after every step, and the plain form at the end."""
    state = list(initial_state("linear_attention", 3, dtype).values())
    ring = [randn(3, 4, 2, n, dtype=dtype) for n in (3, 4)]
    ours, theirs = ([x.clone() for x in (*state, *ring)] for _ in range(2))
    fill = torch.tensor([0, 3, 2])
    slots = {"state_indices": torch.tensor([2, 0, -1])}
    for _ in range(5):
        token = [randn(3, 2, n, dtype=dtype) for n in (3, 3, 4)]
        out = based_ops.linear_attention_decode_deferred(*token, *ours, fill, **slots)
        expected = reference.linear_attention_decode_deferred(*token, *theirs, fill, **slots)
        assert_close([out, *ours], [expected, *theirs], dtype)
        fill = (fill + 1) % 4
    based_ops.linear_attention_fold(*ours, fill, **slots)
    reference.linear_attention_fold(*theirs, fill, **slots)
    assert_close(ours, theirs, dtype)
