"""Continuous batching: whatever joins or leaves, a request gets the tokens it gets alone."""

import dataclasses
import random

import pytest
import torch

from based_model import Based, Engine, ModelConfig, Sampling
from based_model.config import ConfigError
from based_model.generate import continue_prefix, generate, read_prompts, seeds
from based_model.sampling import Draws, sample
from training import one_thread_fixture  # noqa: F401

pytestmark = pytest.mark.ops(
    *("linear_attention", "sliding_window_attention", "short_conv"),
    *("linear_attention_decode", "sliding_window_decode", "short_conv_decode"),
)

TINY = ModelConfig(
    layers=("conv", "linear", "window"),
    d_model=32,
    mlp_dim=48,
    nheads=2,
    feature_dim=8,
    window=5,
    vocab_size=61,
)
PATTERNS = [TINY.layers, ("attention", "attention"), ("window", "attention", "linear", "conv")]
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.7, top_p=0.6),
]
CONTEXT = 64


def tiny_model(device, layers=TINY.layers, dtype=torch.float32, **changes) -> Based:
    torch.manual_seed(0)
    model = Based(dataclasses.replace(TINY, layers=layers, **changes))
    for p in model.parameters():  # away from the small initial values, where all logits are alike
        torch.nn.init.normal_(p, std=0.3)
    return model.to(device, dtype).requires_grad_(False)


class Poisoned(Engine):
    """A slot that nobody is in holds NaN, in every state that floats, and stays so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for slot in range(self.slots):
            self.poison(slot)

    def poison(self, slot):
        for x in self._tensors():
            if x.is_floating_point():
                x[slot] = float("nan")

    def step(self):
        arrived = super().step()
        for slot in range(self.slots):
            if self.rows[slot] is None:
                for layer, mixer in zip(self.state.layers, self.model.config.layers):
                    for x in layer:  # rows without a text write to the last place of a cache
                        held = x[slot, :-1] if mixer == "attention" else x[slot]
                        assert held.isnan().all()
        return arrived

    def _leave(self, request):
        slot = request.slot
        super()._leave(request)
        if slot is not None:
            self.poison(slot)


def requests_of(count):
    """Arguments of add(): prompts and lengths of all sizes, every kind of sampling."""
    prompts = [torch.randint(TINY.vocab_size, (1 + 5 * i % 17,)) for i in range(count)]
    return [
        (prompt, 3 + 7 * i % 20, SAMPLINGS[i % len(SAMPLINGS)], 100 + i)
        for i, prompt in enumerate(prompts)
    ]


def plain(model, prompt, max_new_tokens, sampling, seed):
    """The tokens of the plain loop, one text at a time."""
    device = model.embedding.weight.device
    prefix, draws = read_prompts(model, [prompt.to(device)]), Draws.greedy(1, device)
    draws.set(0, sampling, seed)
    tokens = []
    for _ in range(max_new_tokens):
        new = sample(prefix.logits, draws, prefix.state.positions, sampling.restricted)
        tokens += new.tolist()
        prefix.logits = model.decode(new, prefix.state)
    return tokens


def served(engine, wanted, delays):
    """Tokens of every request, request i added before step delays[i]."""
    added, step = {}, 0
    while len(added) < len(wanted) or engine.busy:
        for i, (prompt, count, sampling, seed) in enumerate(wanted):
            if delays[i] == step:
                added[i] = engine.add(prompt, count, sampling, seed=seed)
        engine.step()
        step += 1
    assert engine.rows == [None] * engine.slots and all(r.finished for r in added.values())
    return [added[i].tokens for i in range(len(wanted))]


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
@pytest.mark.parametrize("slots, chunk", [(1, 100), (3, 4), (6, 2)])
def test_equals_the_plain_loop_in_fp32(device, layers, slots, chunk):
    model, wanted = tiny_model(device, layers), requests_of(8 if device == "cpu" else 4)
    sizes = None if device == "cpu" else [slots]  # on a GPU each is a graph to capture
    engine = Poisoned(model, slots, context=CONTEXT, chunk=chunk, batch_sizes=sizes)
    got = served(engine, wanted, delays=[0, 0, 1, 0, 5, 6, 20, 21])
    assert got == [plain(model, *request) for request in wanted]


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_any_order_of_joining_and_leaving_gives_the_same(device, layers):
    """At one batch size, and so in any slot: tokens that depend on the last bit of the logits."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, wanted = tiny_model(device, layers, dtype), requests_of(9)
    expected = None
    for trial in range(4 if device == "cpu" else 2):
        rng = random.Random(trial)
        delays = [rng.randrange(15) for _ in wanted]
        order = rng.sample(range(len(wanted)), len(wanted))
        engine = Poisoned(model, 5, context=CONTEXT, chunk=3, batch_sizes=[5])
        got = served(engine, [wanted[i] for i in order], delays)
        got = [tokens for _, tokens in sorted(zip(order, got))]
        expected = expected or got
        assert got == expected


@pytest.mark.parametrize("deferred", [False, True])
def test_a_slot_and_its_neighbours_make_no_difference_to_a_bit(device, deferred):
    """Not to a token's logits either: the states are made of what they were made of."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, states = tiny_model(device, dtype=dtype), []
    for before in (0, 1, 4):
        engine = Engine(model, 5, batch_sizes=[5])
        if deferred:
            model.defer_writes(engine.state, capacity=4)
        for i in range(before):
            engine.add([7 * i], 20 + i, Sampling(), seed=i)
            engine.step()
        request = engine.add(range(10), 100)
        while request.drawn < 12:
            engine.step()
        assert request.slot == before
        states.append(held(engine, request.slot))
    for other in states[1:]:
        assert all(torch.equal(x, y) for x, y in zip(states[0], other, strict=True))


def held(engine, slot):
    """All that a slot holds: of a ring, the tokens that wait in it."""
    state = engine.state
    waiting = None if state.fill is None else state.fill[slot]
    layers = [
        x[slot, :waiting] if i >= 2 else x[slot]
        for layer in state.layers
        for i, x in enumerate(layer)
    ]
    return [x.clone() for x in (*layers, state.positions[slot], engine.tokens[slot])]


def test_a_long_prompt_is_read_between_steps(device):
    model = tiny_model(device)
    engine = Engine(model, 4, chunk=4)
    first = engine.add([1, 2], 50)
    engine.step()
    prompt = torch.randint(TINY.vocab_size, (18,))
    second = engine.add(prompt, 5, GREEDY)
    drawn = []
    while not second.drawn:
        engine.step()
        drawn.append(first.drawn)
    assert drawn == [3, 4, 5, 6, 7]  # ceil(18 / 4) steps, a token in each
    for _ in engine.run():
        pass
    assert second.tokens == plain(model, prompt, 5, GREEDY, 0)
    assert first.tokens == plain(model, torch.tensor([1, 2]), 50, Sampling(), 0)


def test_texts_end_where_they_should(device):
    model = tiny_model(device)
    whole = plain(model, torch.tensor([3]), 30, Sampling(temperature=1.0), 5)
    end = whole[12]
    engine = Poisoned(model, 2)
    requests = [
        engine.add([3], count, Sampling(temperature=1.0), seed=5, end_token=end_token)
        for count, end_token in ((30, None), (30, end), (1, None), (2, None), (1, whole[0]))
    ]
    streamed = {request: [] for request in requests}
    for request, token in engine.run():
        streamed[request].append(token)
    stop = whole.index(end) + 1
    expected = [whole, whole[:stop], whole[:1], whole[:2], whole[:1]]
    assert [r.tokens for r in requests] == expected == list(streamed.values())
    assert not engine.busy and all(r.finished and r.slot is None for r in requests)


def test_cancelling_frees_the_slot_and_disturbs_nobody(device):
    model = tiny_model(device)
    engine = Poisoned(model, 2, chunk=4)
    first, second, reading, waiting, last = (
        engine.add(range(n), 25, Sampling(), seed=n) for n in (5, 1, 20, 3, 9)
    )
    for _ in range(5):
        engine.step()
    assert second.slot is not None and second.tokens
    engine.cancel(second)
    engine.step()
    assert engine.reading[0] is reading
    engine.cancel(reading)
    engine.cancel(waiting)
    kept = list(second.tokens)
    for request, _ in engine.run():
        assert request in (first, last)
    assert second.tokens == kept and not reading.tokens and not waiting.tokens
    for request, n in ((first, 5), (last, 9)):
        assert request.tokens == plain(model, torch.arange(n), 25, Sampling(), n)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_the_batch_shrinks_to_what_runs(device, layers):
    model = tiny_model(device, layers)
    engine = Poisoned(model, 4, context=CONTEXT)
    wanted = [([1], 3, Sampling(), 1), ([2], 3, Sampling(), 2), ([3], 3, Sampling(), 3)]
    for prompt, count, sampling, seed in wanted:
        engine.add(prompt, count, sampling, seed=seed)
    last = engine.add([4], 30, Sampling(), seed=4)
    engine.step()
    assert last.slot == 3
    for _ in range(4):
        engine.step()
    assert last.slot == 0
    for _ in engine.run():
        pass
    assert last.tokens == plain(model, torch.tensor([4]), 30, Sampling(), 4)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_a_prefix_continues_in_the_engine(device, layers):
    model = tiny_model(device, layers)
    prefix = read_prompts(model, [torch.arange(n, device=device) for n in (4, 9)])
    before = [x.clone() for x in sum(prefix.state.layers, (prefix.logits, prefix.state.positions))]
    engine, sampling = Engine(model, 2, context=CONTEXT), Sampling(temperature=1.0)
    rows = zip(prefix.rows(), seeds(3, 2))
    requests = [engine.add(row, 12, sampling, seed=seed) for row, seed in rows]
    for _ in engine.run():
        pass
    after = sum(prefix.state.layers, (prefix.logits, prefix.state.positions))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    expected = torch.stack(list(continue_prefix(model, prefix, 12, sampling, 3)), 1)
    assert [r.tokens for r in requests] == expected.tolist()


def test_generate_takes_the_engine_on_a_gpu(device):
    model = tiny_model(device)
    prompts = [torch.arange(n, device=device) for n in (4, 9, 1)]
    prefix = read_prompts(model, prompts)
    steps = list(generate(model, prompts, 12, Sampling(), seed=3))
    expected = torch.stack(list(continue_prefix(model, prefix, 12, Sampling(), 3)))
    assert steps == expected.tolist()


def test_errors_are_named():
    model = tiny_model("cpu")
    engine = Engine(model, 2)
    for prompt in ([], [61], [-1], [[1, 2]]):
        with pytest.raises(ConfigError, match=r"prompt: expected at least one token, each in 0"):
            engine.add(prompt, 5)
    with pytest.raises(ConfigError, match="max_new_tokens: expected >= 1, got 0"):
        engine.add([1], 0)
    with pytest.raises(ConfigError, match="prompt: expected a prefix of one text, got 2"):
        engine.add(read_prompts(model, [torch.arange(2)] * 2), 5)
    with pytest.raises(ConfigError, match=r"slots, chunk, batch_sizes: .* got 2, 1024, \[4\]"):
        Engine(model, 2, batch_sizes=[4])
    with pytest.raises(ConfigError, match="slots, chunk, batch_sizes"):
        Engine(model, 0)
    engine = Engine(tiny_model("cpu", ("attention",)), 1, context=10)
    with pytest.raises(ConfigError, match=r"context: expected room for 4 \+ 7 tokens, got 10"):
        engine.add(range(4), 8)
    assert not engine.busy
    request = engine.add(range(4), 7)
    assert len(list(engine.run())) == 7 == len(request.tokens)


def test_projections_are_joined_without_a_change_to_the_model(device):
    model = tiny_model(device)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    engine = Engine(model, 2)
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    mixer = model.layers[1].mixer
    assert len({w.untyped_storage().data_ptr() for w in mixer.state_dict().values()}) == 2
    expected = plain(tiny_model(device), torch.tensor([3]), 20, Sampling(), 0)
    request = engine.add([3], 20)
    for _ in engine.run():
        pass
    assert request.tokens == expected
    # What replaces the weights later is what counts.
    mixer.q_proj.weight = torch.nn.Parameter(mixer.q_proj.weight * -8, requires_grad=False)
    changed = plain(model, torch.tensor([3]), 20, Sampling(), 0)
    other = tiny_model(device)
    other.layers[1].mixer.q_proj.weight *= -8
    assert changed == plain(other, torch.tensor([3]), 20, Sampling(), 0) != expected


def test_a_second_engine_leaves_the_first_one_alone(device):
    """Graphs of the first have the places of the weights in them."""
    model, wanted = tiny_model(device), requests_of(4)
    first = Engine(model, 3, batch_sizes=[3])
    before = served(first, wanted, [0, 0, 1, 2])
    places = [p.data_ptr() for p in model.parameters()]
    Engine(model, 2)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert served(first, wanted, [0, 0, 1, 2]) == before
