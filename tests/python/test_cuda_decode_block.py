"""decode_block on a GPU: fp64 at odd sizes, strides, bits, graphs, streams; in the whole model.

Fresh tensors hold NaN here (see conftest.py), the op's outputs and workspace too.
"""

import copy
import re

import pytest
import torch

import based_ops
import oracle
from based_model import PRESETS, Based, ModelConfig, fused
from support import TOLERANCE, error

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
on_hopper = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")

BF16, F32 = torch.bfloat16, torch.float32
ROWS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128]
MEDIUM = 264, 400, 328, 520  # (d, K, m, M)
WIDE = 264, 400, 9000, 20000  # more than the CTAs take at once


def draw(*shape, dtype=BF16):
    return torch.randn(*shape, dtype=dtype, device="cuda")


def new_counters():
    return torch.zeros(8, dtype=torch.int32, device="cuda")


def inputs(rows, width):
    d, k, _, _ = width
    return {"mixed": draw(rows, k), "x": draw(rows, d, dtype=F32)}


def weights(width, biases=True):
    """Of such sizes that every product is about 1."""
    d, k, m, columns = width
    given = {
        "out_weight": draw(d, k) / k**0.5,
        "norm_weight": draw(d),
        "fc1": draw(2 * m, d) / d**0.5,
        "fc2": draw(d, m) / m**0.5,
        "next_norm_weight": draw(d),
        "next_weight": draw(columns, d) / d**0.5,
        "counters": new_counters(),
    }
    return given | ({"out_bias": draw(d), "next_bias": draw(columns)} if biases else {})


def run(given):
    """Results of the op, in the form that it promises."""
    x, out = based_ops.decode_block(**given)
    assert x.dtype == F32 and x.shape == given["x"].shape and x.is_contiguous()
    columns = len(given["next_weight"]) // (2 if "conv_weight" in given else 1)
    assert out.dtype == BF16 and out.shape == (len(x), columns)
    assert out.is_contiguous() and not given["counters"].any()
    return x, out


def assert_right(calls):
    """The results of all these arguments together: of a few numbers the error is anything.

    Three roundings to bf16 lie between the inputs and out, none of them larger than its own: the
    norms' results and the activations. Two of them reach x, through an update that is as large.
    """
    got = zip(*[run(given) for given in calls])
    wanted = zip(*[oracle.decode_block(**given) for given in calls])
    for ours, exact in zip(got, wanted):
        ours, exact = (torch.cat([y.flatten() for y in part]) for part in (ours, exact))
        assert error(ours, exact) <= TOLERANCE[BF16][0]


SIZES = [
    *((8, 8, 8, 1), (8, 200, 200, 2), (72, 8, 8, 333), (72, 3, 200, 64), (136, 200, 8, 2)),
    *((200, 72, 200, 333), MEDIUM, (1000, 520, 136, 1)),
]


@on_hopper
@pytest.mark.parametrize("width", SIZES, ids=str)
def test_odd_sizes(width):
    d, k, _, columns = width
    for rows in ROWS:
        calls = []
        for i in range(1 + 400 // (rows * min(d, columns))):
            given = inputs(rows, width) | weights(width, biases=i % 2 == 0)
            for name in ("mixed", "out_weight"):  # rows at multiples of 16 bytes
                given[name] = torch.nn.functional.pad(given[name], (0, -k % 8))[:, :k]
            calls.append(given | {"eps": 10.0 ** (i % 3 - 3)})
        assert_right(calls)


def sizes_of_presets():
    """(d, K, m, M) of every two layers that follow each other."""
    found = {}
    for config in PRESETS.values():
        with torch.device("meta"):
            model = Based(config)
            projections = model._projections(model.new_state(1).layers, None)
        for layer, following in zip(model.layers, projections[1:-1]):
            columns = sum(len(weight) for weight in following.weights)
            size = config.d_model, layer.mixer.out_proj.in_features, config.mlp_dim, columns
            found[size] = None
    return list(found)


@on_hopper
@pytest.mark.parametrize("width", sizes_of_presets(), ids=str)
def test_sizes_of_the_models(width):
    given = weights(width)
    for rows in (1, 2, 8, 16, 32, 33, 64, 128):
        assert_right([given | inputs(rows, width)])


@on_hopper
@pytest.mark.parametrize(
    "width",
    [
        *((264, 400, 9000, 16385), (72, 8, 8, 16393), (264, 72, 8200, 8), WIDE),
        *((136, 200, 20008, 33000), (1792, 1792, 3584, 50264)),
    ],
    ids=str,
)
def test_more_columns_than_at_once(width):
    given = weights(width)
    for rows in ROWS:
        assert_right([given | inputs(rows, width)])


@on_hopper
def test_strided_rows():
    """Matrices that are parts of larger ones, which hold NaN besides; x too, at any stride."""

    def part(x, before, behind):
        wide = x.new_full((len(x), before + x.shape[1] + behind), float("nan"))
        wide[:, before:-behind] = x
        return wide[:, before:-behind]

    for rows in (1, 3, 50, 128):
        given = inputs(rows, MEDIUM) | weights(MEDIUM)
        for name in ("mixed", "out_weight", "fc1", "fc2", "next_weight"):
            given[name] = part(given[name], 8, 16)
        given["x"] = part(given["x"], 5, 2)
        for name in ("norm_weight", "next_norm_weight", "out_bias", "next_bias"):
            given[name] = part(given[name][None], 3, 4)[0]
        assert_right([given])


@on_hopper
def test_no_rows():
    run(inputs(0, MEDIUM) | weights(MEDIUM))


@on_hopper
@pytest.mark.parametrize("width", [MEDIUM, WIDE], ids=str)
@pytest.mark.parametrize("rows", [2, 8, 16, 32, 64, 128])
def test_a_row_depends_on_no_other(rows, width):
    """The same bits in every place, with NaN in all other rows, and for fewer rows of the same
    kernel; and one row of NaN leaves all others as they are."""
    given, row = weights(width), inputs(1, width)
    first = run(given | {n: y.repeat(rows, 1) for n, y in row.items()})
    fewer = run(given | {n: y.repeat(rows // 2 + 1, 1) for n, y in row.items()})
    for name, ours, theirs in zip(("x", "out"), first, fewer):
        assert torch.equal(theirs, ours[: rows // 2 + 1]), name
        assert torch.equal(ours, ours[:1].expand_as(ours)), name
    mixture = inputs(rows, width)
    whole = run(given | mixture)
    for place in {0, 1, rows // 2, rows - 1}:
        others = torch.arange(rows, device="cuda") != place
        lone = {n: torch.full_like(y, float("nan")) for n, y in mixture.items()}
        for name, y in row.items():
            lone[name][place] = y[0]
        for ours, alone in zip(run(given | lone), first):
            assert torch.equal(ours[place], alone[0]) and ours[others].isnan().all()
        for name in ("mixed", "x"):
            spoilt = {n: y.clone() for n, y in mixture.items()}
            spoilt[name][place] = float("nan")
            for ours, clean in zip(run(given | spoilt), whole):
                assert ours[place].isnan().all() and torch.equal(ours[others], clean[others])


@on_hopper
@pytest.mark.parametrize(
    "width, columns", [(MEDIUM, [0, 77, 519]), (WIDE, [0, 16383, 16384, 19999])]
)
def test_weights_of_one_column_stay_there(width, columns):
    """NaN in a row of the last product's weights is NaN in its column alone."""
    given = inputs(20, width) | weights(width)
    given["next_weight"][columns] = float("nan")
    x, out = run(given)
    assert x.isfinite().all()
    assert out.isnan().sum(0).nonzero().flatten().tolist() == columns


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@on_hopper
@pytest.mark.parametrize(
    "rows, width",
    [(3, MEDIUM), (50, (1792, 3584, 3584, 2688)), (128, MEDIUM), (1, WIDE), (33, WIDE)],
)
def test_the_same_bits_every_time(rows, width):
    """200 launches one right behind the other, and as a graph that runs 50 times."""
    given = inputs(rows, width) | weights(width)
    assert_right([given])
    expected = run(given)
    many = [based_ops.decode_block(**given) for _ in range(200)]
    for results in many:
        assert_equal(results, expected)
    graph, many = captured(lambda: [based_ops.decode_block(**given) for _ in range(200)])
    for _ in range(50):
        for results in many[:: max(1, len(many) - 1)]:  # the first and the last one
            for y in results:
                y.fill_(float("nan"))
        graph.replay()
    for results in many:
        assert_equal(results, expected)
    assert not given["counters"].any()


@on_hopper
@pytest.mark.parametrize("rows", [5, 50, 128])
def test_chain_in_a_graph(rows):
    """Blocks one behind the other, what one gives being what the next one takes."""
    width = 1024, 1024, 2048, 1024
    start, counters = inputs(rows, width), new_counters()
    layers = [weights(width) | {"counters": counters} for _ in range(6)]

    def chain(block=based_ops.decode_block):
        x, h = start["x"], start["mixed"]
        for layer in layers:
            x, h = block(h, x, **layer)
        return x, h

    eager = chain()
    # Each block's roundings make the next one's input: of six, at most six times the error.
    for ours, exact in zip(eager, chain(oracle.decode_block)):
        assert error(ours, exact) <= 6 * TOLERANCE[BF16][0]
    graph, results = captured(chain)
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        assert_equal(results, eager)
    for name, y in inputs(rows, width).items():
        start[name].copy_(y)
    graph.replay()
    assert_equal(results, chain())
    assert not torch.equal(results[0], eager[0]) and not counters.any()


@on_hopper
@pytest.mark.parametrize("rows", [(4, 4), (9, 128)])
def test_two_streams(rows):
    """At the same time, with counters of their own: both end, and both are right."""
    width = 1792, 1792, 3584, 2688
    both = [inputs(n, width) | weights(width) for n in rows]
    expected = [run(given) for given in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(200):
        for stream, given, mine in zip(streams, both, results):
            with torch.cuda.stream(stream):
                mine.append(based_ops.decode_block(**given))
    torch.cuda.synchronize()
    for mine, right, given in zip(results, expected, both):
        for y in mine:
            assert_equal(y, right)
        assert not given["counters"].any()


@on_hopper
@pytest.mark.parametrize(
    "changes, argument, want, got",
    [
        ({"mixed": (129, 400)}, "mixed", "at most 128 rows", "129"),
        ({"x": (2, 272)}, "x", "dtype float32", "bfloat16"),
        ({"fc2": (264, 336)}, "fc2", "shape (d, m) = (264, 328)", "(264, 336)"),
        ({"next_bias": (521,)}, "next_bias", "shape (M,) = (520,)", "(521,)"),
        ({"counters": torch.zeros(8, dtype=torch.int32)}, "counters", "device cuda:0", "cpu"),
        ({"out_weight": torch.zeros(264, 400, dtype=BF16)}, "out_weight", "device cuda:0", "cpu"),
    ],
)
def test_bad_argument(changes, argument, want, got):
    """More of them, without a GPU, in test_decode_block.py."""
    changes = {n: draw(*v) if isinstance(v, tuple) else v for n, v in changes.items()}
    pattern = f"^decode_block: {argument}: expected .*{re.escape(want)}.*, got {re.escape(got)}"
    with pytest.raises(RuntimeError, match=pattern):
        based_ops.decode_block(**inputs(2, MEDIUM) | weights(MEDIUM) | changes)


@on_hopper
def test_the_widest_residual_stream():
    width = 20000, 8, 8, 8
    with pytest.raises(RuntimeError, match="^decode_block: out_weight: expected at most .*20000"):
        based_ops.decode_block(**inputs(2, width) | weights(width))


@pytest.mark.skipif(HOPPER, reason="this GPU has a kernel")
def test_other_gpus_are_refused():
    with pytest.raises(RuntimeError, match="^decode_block: device: expected .*9.0"):
        based_ops.decode_block(**inputs(2, MEDIUM) | weights(MEDIUM))


SMALL = ModelConfig(
    layers=("conv", "linear", "window", "conv"),
    d_model=200,
    mlp_dim=328,
    nheads=5,
    feature_dim=16,
    window=17,
    vocab_size=33333,
)


@on_hopper
@torch.no_grad()
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 40, 100, 128])
def test_the_whole_model_decodes_with_it(rows, joined, monkeypatch):
    """With the op where it can be asked for and without it: as near to the fp32 model, with which
    all take the same tokens."""
    model = Based(SMALL).cuda().bfloat16().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    if joined:
        model.layers[1].mixer.join_projections()
    exact_model = copy.deepcopy(model).float()
    tokens = torch.randint(SMALL.vocab_size, (rows, 30), device="cuda")
    taken = []

    def spy(mixed, x, blocks, counters, **options):
        taken.extend([counters] * len(blocks))
        return based_ops.decode_blocks(mixed, x, blocks, counters, **options)

    def decoded(model):
        _, state = model.prefill(tokens[:, :6])
        logits = [model.decode(tokens[:, t], state) for t in range(6, 30)]
        assert not state.counters.any()
        return torch.stack(logits), state

    monkeypatch.setattr(fused, "decode_blocks", spy)
    monkeypatch.setattr(fused, "BLOCK_ROWS", range(1, 129))
    exact, _ = decoded(exact_model)
    assert not taken
    ours, state = decoded(model)
    assert len(taken) == 24 * (4 if joined else 3)
    assert all(counters is state.counters for counters in taken)
    monkeypatch.setattr(fused, "BLOCK_ROWS", range(0))
    without, _ = decoded(model)
    assert len(taken) == 24 * (4 if joined else 3)
    assert error(ours, exact) <= 2e-2 and error(ours, exact) <= 1.2 * error(without, exact)


@on_hopper
@torch.no_grad()
def test_a_step_in_a_graph(monkeypatch):
    """The whole model, captured once: the same bits as eagerly, step by step."""
    model = Based(SMALL).cuda().bfloat16().requires_grad_(False)
    model.layers[1].mixer.join_projections()
    monkeypatch.setattr(fused, "BLOCK_ROWS", range(1, 129))
    tokens = torch.randint(SMALL.vocab_size, (24, 20), device="cuda")
    token, states = tokens[:, 0].clone(), [model.new_state(24) for _ in range(2)]
    model.decode(token, model.new_state(24))  # compiles what there is to compile
    before = states[1].clone()
    graph, logits = captured(lambda: model.decode(token, states[1]))
    for ours, theirs in zip(sum(states[1].layers, ()), sum(before.layers, ()), strict=True):
        assert torch.equal(ours, theirs)  # nothing ran yet
    for t in range(20):
        token.copy_(tokens[:, t])
        graph.replay()
        assert torch.equal(logits, model.decode(tokens[:, t], states[0])), t
    assert not states[1].counters.any()
