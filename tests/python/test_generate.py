"""States on disk, forks, packed prompts, sampling, and the texts that come of them."""

import dataclasses
import json

import pytest
import torch

from based_model import Based, ModelConfig, generate
from based_model.checkpoint import CheckpointError, save_checkpoint
from based_model.cli import run_cli
from based_model.config import ConfigError
from based_model.generate import continue_prefix, read_prompts
from based_model.sampling import Draws, Sampling, sample
from based_model.state_file import Prefix, load_prefix, save_prefix
from based_model.text import SEPARATOR, ByteText
from training import one_thread_fixture  # noqa: F401

pytestmark = pytest.mark.ops(
    *("linear_attention", "sliding_window_attention", "short_conv"),
    *("linear_attention_decode", "sliding_window_decode", "short_conv_decode"),
)

TINY = ModelConfig(
    layers=("conv", "linear", "window"),
    d_model=16,
    mlp_dim=24,
    nheads=2,
    feature_dim=8,
    window=5,
    vocab_size=256,
)
PATTERNS = [
    ("linear",),
    ("window",),
    ("conv",),
    ("attention",),
    TINY.layers,
    ("window", "attention", "linear", "conv"),
]
BASED_PATTERNS = [layers for layers in PATTERNS if "attention" not in layers]
GREEDY = Sampling(temperature=0.0)


def tiny_model(layers=TINY.layers, dtype=torch.float32, device="cpu", **changes) -> Based:
    torch.manual_seed(0)
    model = Based(dataclasses.replace(TINY, layers=layers, **changes))
    for p in model.parameters():  # away from the small initial values, where all logits are alike
        torch.nn.init.normal_(p, std=0.3)
    return model.to(device, dtype).requires_grad_(False)


def prompts_of(*lengths, device="cpu"):
    return [torch.randint(1, TINY.vocab_size, (length,)).to(device) for length in lengths]


def continued(model, prefix, count, sampling=GREEDY, seed=0):
    """The next tokens (N,count); prefix stays as it is."""
    steps = continue_prefix(model, prefix.fork(1), count, sampling, seed)
    return torch.stack(list(steps), 1)


def tensors_of(prefix: Prefix):
    return [prefix.logits, prefix.state.positions, *sum(prefix.state.layers, ())]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
@pytest.mark.parametrize("lengths", [(7,), (1,), (3, 1, 9)], ids=str)
def test_a_loaded_state_continues_exactly(tmp_path, layers, weights, lengths, device):
    model = tiny_model(layers, weights, device)
    prefix = read_prompts(model, prompts_of(*lengths, device=device))
    save_prefix(tmp_path / "state", prefix, model)
    loaded = load_prefix(tmp_path / "state", model)
    for x, y in zip(tensors_of(loaded), tensors_of(prefix), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    sampling = Sampling(temperature=1.0)
    assert torch.equal(
        continued(model, loaded, 20, sampling), continued(model, prefix, 20, sampling)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_stopping_at_any_token_changes_nothing(tmp_path, layers, device):
    model = tiny_model(layers, device=device)
    prefix = read_prompts(model, prompts_of(4, 6, device=device))
    expected = continued(model, prefix, 12)
    for stop in range(1, 12, 5):
        moving = prefix.fork(1)
        # One more than is kept, because the newest token is not part of the state.
        steps = list(continue_prefix(model, moving, stop + 1, GREEDY, 0))
        assert torch.equal(torch.stack(steps, 1), expected[:, : stop + 1])
        save_prefix(tmp_path / "state", moving, model)
        rest = continued(model, load_prefix(tmp_path / "state", model), 12 - stop)
        assert torch.equal(rest, expected[:, stop:])


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_forks_are_equal_and_independent(layers, device):
    model = tiny_model(layers, device=device)
    prefix = read_prompts(model, prompts_of(4, 9, device=device))
    before = [x.clone() for x in tensors_of(prefix)]
    forks = prefix.fork(3)
    expected = continued(model, prefix, 10).repeat_interleave(3, 0)
    assert torch.equal(continued(model, forks, 10), expected)

    # Different tokens into every row: none touches another row or the original.
    first = torch.arange(1, 7, device=device)
    logits = model.decode(first, forks.state)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(prefix), before, strict=True))
    for row, token in enumerate(first):
        alone = prefix.fork(1)
        expected = model.decode(token.expand(2), alone.state)[row // 3]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_packed_prompts_equal_separate_ones(layers):
    model = tiny_model(layers, torch.float64)
    prompts, more = prompts_of(3, 1, 12), prompts_of(2, 0, 7)
    for start in (None, read_prompts(model, prompts_of(6))):
        packed = read_prompts(model, more, read_prompts(model, prompts, start))
        tokens = continued(model, packed, 10)
        for i, (prompt, appended) in enumerate(zip(prompts, more, strict=True)):
            alone = read_prompts(model, [appended], read_prompts(model, [prompt], start))
            torch.testing.assert_close(packed.logits[i : i + 1], alone.logits)
            assert torch.equal(tokens[i : i + 1], continued(model, alone, 10))


def test_prompts_must_fit_the_state():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"at least one token in each, got \[2, 0\]"):
        read_prompts(model, prompts_of(2, 0))
    with pytest.raises(ConfigError, match="for each of the 2 texts of the state, or none, got 3"):
        read_prompts(model, prompts_of(1, 1, 1), read_prompts(model, prompts_of(2, 3)))


@pytest.mark.parametrize("layers", BASED_PATTERNS, ids="-".join)
def test_state_does_not_grow_with_the_output(tmp_path, layers):
    model, sizes = tiny_model(layers), set()
    prefix = read_prompts(model, prompts_of(3))
    for i, _ in enumerate(continue_prefix(model, prefix, 200, GREEDY, 0)):
        if i % 50 == 0:
            save_prefix(tmp_path / "state", prefix, model)
            sizes.add((prefix.state.nbytes(), (tmp_path / "state").stat().st_size))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 6}, "window: expected a state of this model .5., got 6"),
        ({"layers": ("conv", "linear")}, "layers: expected"),
        ({"dtype": torch.float64}, "dtype: expected .*float32.*float64"),
    ],
)
def test_state_of_another_model_is_a_named_error(tmp_path, changes, message):
    other, file = tiny_model(**changes), tmp_path / "state"
    save_prefix(file, read_prompts(other, prompts_of(3)), other)
    with pytest.raises(ConfigError, match=message):
        load_prefix(file, tiny_model())


def test_state_of_other_weights_is_a_named_error(tmp_path):
    model, file = tiny_model(), tmp_path / "state"
    save_prefix(file, read_prompts(model, prompts_of(3)), model)
    model.norm.weight[3] += 1e-3
    with pytest.raises(ConfigError, match="weights: expected a state of this model"):
        load_prefix(file, model)


def test_torn_or_foreign_state_is_a_named_error(tmp_path):
    from safetensors.torch import save_file

    model, file = tiny_model(), tmp_path / "state"
    with pytest.raises(CheckpointError, match="not a readable state"):
        load_prefix(file, model)
    save_prefix(file, read_prompts(model, prompts_of(3)), model)
    whole = file.read_bytes()
    for size in (0, 5, 300, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable state"):
            load_prefix(file, model)
    save_file({"logits": torch.zeros(1, 256)}, file)
    with pytest.raises(CheckpointError, match="expected a file of format 'based_model state 2'"):
        load_prefix(file, model)


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    model, file = tiny_model(), tmp_path / "state"
    prefix = read_prompts(model, prompts_of(3))
    save_prefix(file, prefix, model)
    before = file.read_bytes()

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_prefix(file, read_prompts(model, prompts_of(5)), model)
    assert file.read_bytes() == before


@torch.no_grad()
def drawn(logits, rows=1, position=5, **settings):
    """One token for each of so many seeds."""
    draws = Draws.greedy(rows, logits.device)
    for row in range(rows):
        draws.set(row, Sampling(**settings), row)
    restricted = Sampling(**settings).restricted
    return sample(logits, draws, torch.full_like(draws.seed, position), restricted)


def test_sampling_restricts_the_support(device):
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25], device=device)
    logits = probs.log().expand(4000, 4)

    def shares(**settings):
        return (drawn(logits, 4000, **settings).bincount(minlength=4) / 4000).tolist()

    def about(*expected):
        return pytest.approx(expected, abs=0.04)

    assert shares(temperature=0.0) == [0, 1, 0, 0]
    assert shares(temperature=1.0) == about(*probs.tolist())
    assert shares(temperature=0.5) == about(*(probs**2 / (probs**2).sum()).tolist())
    assert shares(temperature=1.0, top_k=2) == about(0, 2 / 3, 0, 1 / 3)
    assert shares(temperature=1.0, top_k=9) == about(*probs.tolist())
    assert shares(temperature=1.0, top_p=0.7) == about(0, 2 / 3, 0, 1 / 3)
    assert shares(temperature=1.0, top_p=0.01) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_k=3, top_p=0.85) == about(
        0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9
    )
    assert shares(temperature=1.0, top_k=3, top_p=0.8) == about(0, 2 / 3, 0, 1 / 3)


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (1, 1.0), (7, 1.0), (100, 0.9), (3, 0.3)])
@torch.no_grad()
def test_the_support_is_the_one_that_sorting_gives(top_k, top_p, device):
    if device == "cpu":
        from based_model.sampling import _least as least
    else:
        from based_model.draw import least
    logits, row = 3 * torch.randn(20, 257, device=device), torch.ones(20, 1, device=device)
    probs = logits.softmax(-1)
    kept = probs >= least(probs, top_k * row.long(), top_p * row)
    probs, order = logits.double().softmax(-1).sort(-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
    ahead = (probs.cumsum(-1) - probs) / probs.sum(-1, keepdim=True)
    expected = torch.zeros_like(kept).scatter(-1, order, (probs > 0) & (ahead < top_p))
    assert torch.equal(kept, expected) and kept.any(-1).all()


def test_a_draw_is_a_token_whatever_the_logits(device):
    for value in (torch.nan, -torch.inf, torch.inf):
        tokens = drawn(torch.full((3, 1025), value, device=device), 3, temperature=1.0)
        assert all(0 <= token < 1025 for token in tokens.tolist())
    equal = torch.zeros(3, 1025, device=device)
    equal[:, 1000:] = equal[:, 5] = 2
    assert drawn(equal, 3, temperature=0.0).tolist() == [5, 5, 5]


def test_noise_is_uniform_and_has_no_pattern():
    """Of tokens, of positions and of seeds, which differ in few bits."""
    from based_model.sampling import _gumbel

    seeds, positions = torch.arange(300)[:, None], torch.full((300, 1), 7)
    for noise in (_gumbel(seeds, positions, 300), _gumbel(positions, seeds, 300)):
        uniform = (-(-noise).exp()).exp().double()
        counts = uniform.flatten().mul(64).long().bincount(minlength=64)
        assert ((counts - 90000 / 64) ** 2).sum() / (90000 / 64) < 120  # chi^2 of 63 degrees
        for x in (uniform, uniform.T):
            correlations = torch.corrcoef(x) - torch.eye(300)
            assert correlations.abs().max() < 6 / 300**0.5
    same = _gumbel(torch.tensor([[3]]), torch.tensor([[9]]), 50)
    both = _gumbel(torch.tensor([[8], [3]]), torch.tensor([[1], [9]]), 50)
    assert torch.equal(same[0], both[1])
    large = torch.tensor([[2**62 + 1], [1]])
    assert not torch.equal(*_gumbel(large, torch.ones_like(large), 50))


def test_greedy_generation_follows_the_full_forward_for_every_prompt(device):
    model, prompts = tiny_model(device=device), prompts_of(3, 1, 12, device=device)
    steps = generate.generate(model, prompts, 10, GREEDY)
    for prompt, row in zip(prompts, torch.tensor(list(steps), device=device).T, strict=True):
        text = prompt
        for token in row:
            assert model(text[None])[0, -1].argmax() == token
            text = torch.cat([text, token[None]])


def test_streamed_text_is_seeded_and_ends_with_its_file(device):
    model = tiny_model(device=device)

    def text(seed, prompt="é", sampling=Sampling()):
        return "".join(generate.stream_text(model, ByteText(), prompt, 30, sampling, seed))

    assert text(1) == text(1) != text(2)
    assert text(1, prompt="")
    model.norm.weight[:] = 0.0
    model.norm.weight[0] = 1.0
    model.embedding.weight[:, 0] = 0.0  # all logits are 0, the greedy choice is SEPARATOR
    assert text(0, "a", GREEDY) == ""


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_bad_sampling_settings_are_named_errors(changes, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        generate.GenerateConfig(checkpoint=tmp_path, **changes)


def test_each_text_ends_with_its_own_separator(device):
    model, sampling = tiny_model(device=device), Sampling(temperature=1.0)
    model.norm.weight[:] = 0.0  # all logits are 0: bytes at random
    prefix = read_prompts(model, prompts_of(2, device=device)).fork(40)
    rows = continued(model, prefix, 120, sampling, seed=3).tolist()
    ends = [row.index(SEPARATOR) if SEPARATOR in row else None for row in rows]
    assert None in ends and len(set(ends)) > 5
    steps = generate.continue_text(model, ByteText(), prefix, 120, sampling, seed=3)
    for pieces, row, end in zip(zip(*steps, strict=True), rows, ends, strict=True):
        assert "".join(pieces) == bytes(row[:end]).decode(errors="replace")


def test_tokens_of_a_tokenizer(tmp_path, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("tyro")
    words = ["<|endoftext|>", "the", "cat", "sat", "on", "mat"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:1])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))

    model = tiny_model(vocab_size=6)
    save_checkpoint(tmp_path / "run", 1, model)
    tokens = continued(model, read_prompts(model, [torch.tensor([1, 2])]), 8)[0].tolist()
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    args = ["--checkpoint", tmp_path / "run", "--prompt", "the cat", "--temperature", 0]
    argv = ["generate", *args, "--max-new-tokens", 8, "--tokenizer", file]
    monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
    run_cli(generate.GenerateConfig, generate.run, prog="generate")
    continuation = capsys.readouterr().out.removeprefix("the cat").split()
    assert continuation == [words[token] for token in tokens]

    with pytest.raises(ConfigError, match="expected a byte-level model"):
        generate.text_of_model(6)
    small = tiny_model(vocab_size=5)
    with pytest.raises(ConfigError, match="expected at most the model's 5 tokens, got 6"):
        generate.text_of_model(small.config.vocab_size, file)


def test_tokenizer_that_is_none(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="tokenizer: expected a tokenizer.json, got"):
        generate.text_of_model(6, tmp_path / "tokenizer.json")
