"""decode_block with the short convolution behind its last product, on a GPU: results and states in
fp64, pools and their slots, bits, graphs, torch.compile; in the whole model.

Fresh tensors hold NaN here (see conftest.py), the op's outputs and workspace too.
"""

import copy
import dataclasses

import pytest
import torch

import based_ops
import oracle
from based_model import Based, ModelConfig, fused
from support import TOLERANCE, error
from test_cuda_decode_block import BF16, HOPPER, ROWS, captured, draw, inputs, run, weights

pytestmark = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0 is visible")

MEDIUM = 264, 400, 328, 656  # (d, K, m, 2 C)
NAN = float("nan")
KINDS = ["rows", "pool", "strays"]


def convolution(rows, width, taps, kind="rows", dtype=torch.int64):
    """Its arguments. kind: state i is row i's; a pool of more, in any order, NaN in all others; or
    such a pool and some rows that have no slot, or one that is not there."""
    channels = width[3] // 2
    slots = rows + (0 if kind == "rows" else 5)
    indices = torch.randperm(slots, device="cuda")[:rows]
    if kind == "rows":
        indices = torch.arange(rows, device="cuda")
    if kind == "strays":
        strays = [-1, slots, -2, -1, 2**31 - 1, -(2**31)]
        if dtype == torch.int64:
            strays += [2**32, -(2**32), 2**32 - 1]
        for row in range(torch.randint(2, ()).item(), rows, 2):
            indices[row] = strays[row // 2 % len(strays)]
    used = indices[(indices >= 0) & (indices < slots)]
    state = torch.full((slots, channels, taps - 1), NAN, dtype=BF16, device="cuda")
    state[used] = draw(len(used), channels, taps - 1)
    given = {"conv_weight": draw(channels, taps) / taps**0.5, "conv_state": state}
    return given | ({} if kind == "rows" else {"state_indices": indices.to(dtype)})


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def checked(given):
    """One call whose every bit that is exact is looked at: pairs (ours, in fp64) of what is not."""
    state, indices = given["conv_state"], given.get("state_indices")
    before, exact_state = state.clone(), state.double()
    x, out = run(given)
    exact_x, exact_out = oracle.decode_block(**given | {"conv_state": exact_state})
    slots = torch.arange(len(x), device="cuda") if indices is None else indices.long()
    here = (slots >= 0) & (slots < len(state))
    assert not out[slots == -1].any() and out[~here & (slots != -1)].isnan().all()
    used = slots[here]
    idle = torch.ones(len(state), dtype=torch.bool, device="cuda").index_fill(0, used, False)
    assert same_bits(state[idle], before[idle])
    assert same_bits(state[used][..., :-1], before[used][..., 1:])
    new, exact_new = state[used][..., -1], exact_state[used][..., -1]
    return (x, exact_x), (out[here], exact_out[here]), (new, exact_new)


def assert_right(calls):
    """The results of all these arguments together: what a product of three numbers is in norm,
    its few largest decide. And every one of them, against its row: none is another's.

    u and the gates are as near to fp64 as in test_cuda_decode_block.assert_right(), and the one
    rounding behind them is that of out, or of the state.
    """
    for name, pairs in zip(("x", "out", "state"), zip(*[checked(given) for given in calls])):
        for ours, exact in pairs:
            scale = exact.abs() + exact.square().mean(-1, True).sqrt()
            assert ((ours.double() - exact).abs() <= 0.1 * scale).all(), name
        ours, exact = (torch.cat([y.flatten() for y in part]) for part in zip(*pairs))
        assert error(ours, exact) <= TOLERANCE[BF16][0], name


SIZES = [
    *((8, 8, 8, 16), (72, 8, 8, 48), (136, 200, 8, 144), (8, 3, 200, 656), MEDIUM),
    (1000, 520, 136, 272),
]


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("width", SIZES, ids=str)
def test_odd_sizes(width, taps):
    (d, k, _, columns), calls = width, []
    for rows in ROWS:
        for i in range(3 + 400 // (rows * min(d, columns // 2))):
            given = inputs(rows, width) | weights(width, biases=i % 2 == 0)
            for name in ("mixed", "out_weight"):  # rows at multiples of 16 bytes
                given[name] = torch.nn.functional.pad(given[name], (0, -k % 8))[:, :k]
            dtype = (torch.int32, torch.int64)[(i // 3 + rows) % 2]
            calls.append(given | convolution(rows, width, taps, KINDS[i % 3], dtype))
    assert_right(calls)


@pytest.mark.parametrize("width", [(1792, 3584, 3584, 7168), (1024, 1024, 2048, 4096)], ids=str)
def test_sizes_of_the_models(width):
    given = weights(width)
    for rows in (1, 2, 8, 16, 32, 33, 64, 128):
        for kind in KINDS:
            assert_right([given | inputs(rows, width) | convolution(rows, width, 3, kind)])


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_parts_of_larger_tensors(taps):
    """A state and a weight amid NaN, which stay there: slots and rows at any distance."""
    channels, calls, pools = MEDIUM[3] // 2, [], []
    for rows, kind, gap in (
        (1, "rows", 8),
        (3, "pool", 24),
        (50, "strays", 8),
        (128, "rows", 4096),
    ):
        given = inputs(rows, MEDIUM) | weights(MEDIUM) | convolution(rows, MEDIUM, taps, kind)
        inner = channels * (taps - 1)
        wide = torch.full((len(given["conv_state"]), inner + gap), NAN, dtype=BF16, device="cuda")
        state = wide[:, 8 : 8 + inner].unflatten(1, (channels, taps - 1))
        state.copy_(given["conv_state"])
        weight = torch.full((channels, taps + 3), NAN, dtype=BF16, device="cuda")
        weight[:, 1 : taps + 1] = given["conv_weight"]
        calls.append(given | {"conv_state": state, "conv_weight": weight[:, 1 : taps + 1]})
        pools.append(wide)
    assert_right(calls)
    for wide in pools:
        assert wide[:, :8].isnan().all() and wide[:, 8 + inner :].isnan().all()


def test_no_rows():
    for kind in ("rows", "pool"):
        checked(inputs(0, MEDIUM) | weights(MEDIUM) | convolution(0, MEDIUM, 3, kind))


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("rows", [2, 8, 16, 32, 64, 128])
def test_a_row_depends_on_no_other(rows, taps):
    """The same bits in every place and of every slot, with NaN in all other rows, states and slots;
    and one row's NaN, in its inputs or its state, leaves all others as they are."""
    given, row = weights(MEDIUM), inputs(1, MEDIUM)
    given["conv_weight"] = convolution(1, MEDIUM, taps)["conv_weight"]
    of_row = draw(1, MEDIUM[3] // 2, taps - 1)

    def results(mixed, x, state, indices=None):
        state = state.clone()
        return *run(given | dict(zip(NAMES, (mixed, x, state, indices)))), state

    NAMES = "mixed", "x", "conv_state", "state_indices"
    alike = [y.repeat(rows, *[1] * (y.ndim - 1)) for y in (*row.values(), of_row)]
    first = results(*alike)
    fewer = results(*[y[: rows // 2 + 1] for y in alike])
    for ours, theirs in zip(first, fewer):
        assert torch.equal(theirs, ours[: rows // 2 + 1])
        assert torch.equal(ours, ours[:1].expand_as(ours))

    mixture = *inputs(rows, MEDIUM).values(), draw(rows, MEDIUM[3] // 2, taps - 1)
    whole = results(*mixture)
    for place in {0, 1, rows // 2, rows - 1}:
        others = torch.arange(rows, device="cuda") != place
        lone = [torch.full_like(y, NAN) for y in mixture]
        for y, own in zip(lone, (*row.values(), of_row)):
            y[place] = own[0]
        for ours, alone in zip(results(*lone), first):
            assert torch.equal(ours[place], alone[0])
        slots = torch.randperm(rows, device="cuda")
        spread = torch.empty_like(lone[2]).index_copy(0, slots, lone[2])
        *ours, state = results(*lone[:2], spread, slots)
        for mine, alone in zip((*ours, state[slots]), first):
            assert torch.equal(mine[place], alone[0])
        for i in range(3):
            spoilt = [y.clone() for y in mixture]
            spoilt[i][place] = NAN
            x, out, state = results(*spoilt)
            assert out[place].isnan().all()
            for ours, clean in zip((x, out, state), whole):
                assert torch.equal(ours[others], clean[others])


def test_channels_stay_apart():
    """NaN in the weights of one channel, of u, of a gate or of the convolution, is NaN in it."""
    for name, row in (("next_weight", 77), ("next_weight", 328 + 77), ("conv_weight", 77)):
        given = inputs(20, MEDIUM) | weights(MEDIUM) | convolution(20, MEDIUM, 3)
        given[name][row] = NAN
        x, out = run(given)
        assert x.isfinite().all() and out.isnan().all(0).nonzero().flatten().tolist() == [77]
        assert out.isnan().any(0).sum() == 1
        spoilt = given["conv_state"].isnan()
        assert spoilt.sum() == (20 if (name, row) == ("next_weight", 77) else 0)
        assert spoilt[:, 77, -1].sum() == spoilt.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, taps", [(1, 3), (7, 4), (50, 2), (128, 3)])
def test_step_by_step(rows, taps, kind):
    """The states that one step leaves are those that the next one finds."""
    given = weights(MEDIUM) | convolution(rows, MEDIUM, taps, kind)
    exact = given | {"conv_state": given["conv_state"].double()}
    results = []
    for _ in range(2 * taps + 2):
        token = inputs(rows, MEDIUM)
        results.append((run(given | token)[1], oracle.decode_block(**exact | token)[1]))
    ours, theirs = map(torch.stack, zip(*results))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert error(ours.nan_to_num(), theirs.nan_to_num()) <= TOLERANCE[BF16][0]
    state, exact_state = given["conv_state"], exact["conv_state"]
    assert torch.equal(state.isnan(), exact_state.isnan())
    assert error(state.nan_to_num(), exact_state.nan_to_num()) <= TOLERANCE[BF16][0]


@pytest.mark.parametrize("rows", [1, 5, 50, 128])
def test_a_hundred_launches_in_a_graph(rows):
    """Steps of six layers, each with its own states, one right behind the other: the same bits as
    eagerly, at every replay; slots are looked up anew."""
    width = 512, 512, 1024, 1024
    start, counters = inputs(rows, width), torch.zeros(8, dtype=torch.int32, device="cuda")
    indices = torch.arange(rows, device="cuda")
    layers = [weights(width) | {"counters": counters} for _ in range(6)]
    for layer in layers:
        layer |= convolution(rows, width, 3, "rows") | {"state_indices": indices}
    states = [layer["conv_state"] for layer in layers]
    first = [y.clone() for y in states]

    def steps():
        found = []
        for _ in range(17):
            x, h = start["x"], start["mixed"]
            for layer in layers:
                x, h = based_ops.decode_block(h, x, **layer)
            found += [x, h]
        return found

    eager = [y.clone() for y in steps()], [y.clone() for y in states]
    graph, results = captured(steps)
    assert not torch.equal(eager[0][1], eager[0][3])  # the states move on
    for _ in range(10):
        for y, old in zip(states, first):
            y.copy_(old)
        for y in results:
            y.fill_(NAN)
        graph.replay()
        for ours, theirs in zip(results + states, eager[0] + eager[1], strict=True):
            assert torch.equal(ours, theirs)
    assert not counters.any()
    for y, old in zip(states, first):
        y.copy_(old)
    indices.copy_(indices.flip(0)), indices[:1].fill_(-1)
    graph.replay()
    for y, old in zip(states, first):
        assert torch.equal(y[-1], old[-1])
    assert not results[1][0].any() and not counters.any()


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_with_the_op_of_its_own(rows):
    """As near to fp64 as decode_block and short_conv_decode one behind the other."""
    given = weights(MEDIUM) | inputs(rows, MEDIUM)
    conv = convolution(rows, MEDIUM, 3, "strays")
    weight, state, indices = conv.values()
    exact = oracle.decode_block(**given | conv | {"conv_state": state.double()})[1]
    u, gate = based_ops.decode_block(**given)[1].chunk(2, -1)
    options = {"activation": "silu", "gate": gate, "state_indices": indices}
    two = based_ops.short_conv_decode(u, weight, state.clone(), **options)
    one = run(given | conv)[1]
    bad = exact.isnan()
    assert torch.equal(one.isnan(), bad) and torch.equal(two.isnan(), bad)
    assert (
        error(one[~bad], exact[~bad]) <= error(two[~bad], exact[~bad]) <= 1.5 * TOLERANCE[BF16][0]
    )


def test_checks_of_the_slots():
    given = inputs(3, MEDIUM) | weights(MEDIUM) | convolution(3, MEDIUM, 3, "pool")
    before = given["conv_state"].clone()
    checks = based_ops.set_checks(True)
    try:
        for entries, message in (
            ([0, 8, 1], r"entries in \[-1, slots\) \(slots = 8\), got 8 at index 1"),
            ([0, 1, -2], r"entries in \[-1, slots\) \(slots = 8\), got -2 at index 2"),
            ([4, -1, 4], r"every slot at most once \(slots = 8\), got 4 at index 2"),
        ):
            given["state_indices"] = torch.tensor(entries, device="cuda")
            pattern = f"^decode_block: state_indices: expected {message}"
            with pytest.raises(RuntimeError, match=pattern):
                based_ops.decode_block(**given)
            assert same_bits(given["conv_state"], before)
        given["state_indices"] = torch.tensor([4, -1, 0], device="cuda", dtype=torch.int32)
        based_ops.decode_block(**given)
        based_ops.decode_block(**inputs(3, MEDIUM) | weights(MEDIUM))
    finally:
        based_ops.set_checks(checks)


def test_the_widest_convolution():
    width = 264, 400, 328, 20000
    given = inputs(2, width) | weights(width) | convolution(2, width, 3)
    before = given["conv_state"].clone()
    with pytest.raises(RuntimeError, match="^decode_block: next_weight: expected at most .*20000"):
        based_ops.decode_block(**given)
    assert torch.equal(given["conv_state"], before)


def test_torch_compile_and_opcheck():
    given = inputs(3, MEDIUM) | weights(MEDIUM) | convolution(3, MEDIUM, 3, "pool")
    given["conv_state"].normal_()
    op = torch.ops.based_ops.decode_block.default
    positional = [given.get(argument.name) for argument in op._schema.arguments[:-1]]
    torch.library.opcheck(op, (*positional, 1e-5))
    other = {n: y.clone() for n, y in given.items()}
    step = torch.compile(lambda given: based_ops.decode_block(**given), fullgraph=True)
    for _ in range(3):
        for ours, theirs in zip(step(given), based_ops.decode_block(**other)):
            assert torch.equal(ours, theirs)
        assert torch.equal(given["conv_state"], other["conv_state"])


SMALL = ModelConfig(
    layers=("conv", "conv", "linear", "conv", "window", "conv", "conv"),
    d_model=200,
    mlp_dim=328,
    nheads=5,
    feature_dim=16,
    window=17,
    vocab_size=333,
)


@torch.no_grad()
@pytest.mark.parametrize("rows, width", [(1, 3), (2, 2), (9, 5), (40, 4), (128, 3)])
def test_the_whole_model_decodes_with_it(rows, width, monkeypatch):
    """With the convolution in the op and behind it: as near to the fp32 model, with which all take
    the same tokens. Rows of -1 keep their states."""
    model = Based(dataclasses.replace(SMALL, conv_width=width))
    model = model.cuda().bfloat16().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.layers[2].mixer.join_projections()
    exact_model = copy.deepcopy(model).float()
    tokens = torch.randint(SMALL.vocab_size, (rows, 24), device="cuda")
    indices = torch.arange(rows, device="cuda")
    indices[1::3] = -1
    live, along = indices >= 0, []

    def spy(mixed, x, blocks, counters, **options):
        along.extend(block.conv_weight is not None for block in blocks)
        return based_ops.decode_blocks(mixed, x, blocks, counters, **options)

    def decoded(model):
        _, state = model.prefill(tokens[:, :6])
        before = state.clone()
        logits = [model.decode(tokens[:, t], state, indices) for t in range(6, 24)]
        for ours, theirs in zip(sum(state.layers, ()), sum(before.layers, ()), strict=True):
            assert torch.equal(ours[~live], theirs[~live])
        assert not state.counters.any()
        return torch.stack(logits)[:, live]

    monkeypatch.setattr(fused, "decode_blocks", spy)
    exact = decoded(exact_model)
    assert not along
    ours = decoded(model)
    assert len(along) == 18 * 7 and sum(along) == (18 * 4 if width <= 4 else 0)
    monkeypatch.setattr(fused, "BLOCK_TAPS", range(0))
    without = decoded(model)
    assert len(along) == 2 * 18 * 7 and sum(along) == (18 * 4 if width <= 4 else 0)
    assert error(ours, exact) <= 2e-2 and error(ours, exact) <= 1.2 * error(without, exact)


@torch.no_grad()
def test_a_step_in_a_graph():
    """The whole model, captured once: the same bits as eagerly, step by step."""
    model = Based(SMALL).cuda().bfloat16().requires_grad_(False)
    model.layers[2].mixer.join_projections()
    tokens = torch.randint(SMALL.vocab_size, (24, 20), device="cuda")
    token, states = tokens[:, 0].clone(), [model.new_state(24) for _ in range(2)]
    model.decode(token, model.new_state(24))  # compiles what there is to compile
    graph, logits = captured(lambda: model.decode(token, states[1]))
    for t in range(20):
        token.copy_(tokens[:, t])
        graph.replay()
        assert torch.equal(logits, model.decode(tokens[:, t], states[0])), t
    for ours, theirs in zip(sum(states[1].layers, ()), sum(states[0].layers, ()), strict=True):
        assert torch.equal(ours, theirs)
