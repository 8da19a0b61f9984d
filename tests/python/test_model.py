"""The model: parameter counts, config errors, and one function whichever way it is computed."""

import dataclasses

import pytest
import torch

from based_model import PRESETS, Based, ModelConfig, ModelState
from based_model.config import ConfigError

TINY = ModelConfig(
    layers=("conv", "linear", "window", "conv", "linear"),
    d_model=12,
    mlp_dim=16,
    nheads=2,
    feature_dim=3,
    window=3,
    vocab_size=11,
)
PATTERNS = [
    ("linear",),
    ("window",),
    ("conv",),
    ("attention", "attention"),
    TINY.layers,
    ("window", "attention", "linear"),
]
SEQLEN = 8  # longer than the window and the convolution, so that rings wrap


def tiny_model(layers=TINY.layers, dtype=torch.float64, **changes) -> Based:
    torch.manual_seed(0)
    model = Based(dataclasses.replace(TINY, layers=layers, **changes)).to(dtype)
    for p in model.parameters():  # away from the small initial values, where all logits are alike
        torch.nn.init.normal_(p, std=0.4)
    return model


def tokens_of(batch, seqlen, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, seqlen), generator=generator)


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_same_state(actual: ModelState, expected: ModelState, layers=TINY.layers):
    positions = expected.positions.tolist()
    assert actual.positions.tolist() == positions
    for mixer, *states in zip(layers, actual.layers, expected.layers, strict=True):
        for x, y in zip(*states, strict=True):
            if mixer == "attention":  # a key-value cache may have free slots
                x, y = (torch.cat([row[:n] for row, n in zip(z, positions)]) for z in (x, y))
            assert_same(x, y)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("based-360m", 362_620_928),
        ("based-1.4b", 1_349_453_056),
        ("based-1.4b-28x64", 1_354_269_952),
        ("transformer-360m", 359_801_856),
        ("transformer-1.3b", 1_327_067_280),
        ("transformer-1.3b-26x64", 1_310_594_688),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, count):
    with torch.device("meta"):
        model = Based(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == count


def test_initial_values():
    config = dataclasses.replace(TINY, d_model=128, mlp_dim=256, layers=("conv", "linear") * 2)
    torch.manual_seed(0)
    model = Based(config)
    conv, linear = model.layers[0].mixer, model.layers[1].mixer
    assert linear.v_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for written in (linear.out_proj, conv.out_proj, model.layers[0].mlp.fc2):
        assert written.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert conv.in_proj.bias.abs().max() == 0
    assert conv.conv_weight.abs().max().item() == pytest.approx(3**-0.5, rel=0.05)


def test_config_survives_json():
    for config in PRESETS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_sizes": [3]}, r"unknown keys \['kernel_sizes'\]"),
        ({"layers": []}, "layers: expected a non-empty tuple"),
        ({"layers": "linear"}, "layers: expected a non-empty tuple"),
        ({"layers": ["conv", "mamba"]}, r"layers\[1\]: expected one of .*got 'mamba'"),
        ({"nheads": 5}, r"d_model: expected a multiple of nheads \(5\), got 12"),
        ({"nheads": 4}, "even d_model / nheads"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"feature_dim": 16.0}, "feature_dim: expected an integer >= 1, got 16.0"),
        ({"mlp_dim": True}, "mlp_dim: expected an integer >= 1, got True"),
        ({"conv_width": 9}, "conv_width: expected 2 ... 8, got 9"),
        ({"layers": ["attention"], "attention_rotary": 1.1}, "attention_rotary: expected a share"),
        ({"layers": ["attention"], "attention_rotary": 0.1}, "attention_rotary: expected a share"),
        ({"norm_eps": 0.0}, "norm_eps: expected a number > 0"),
    ],
)
def test_bad_config_is_a_named_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**TINY.to_dict(), **changes})


def test_missing_config_key_is_a_named_error():
    values = TINY.to_dict()
    del values["d_model"]
    with pytest.raises(ConfigError, match=r"missing keys \['d_model'\]"):
        ModelConfig.from_dict(values)


def test_padded_vocabulary_has_no_logits():
    model = tiny_model()
    assert model.embedding.weight.shape[0] == 16
    assert model(tokens_of(1, 2)).shape == (1, 2, 11)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_full_equals_prefill_and_decode_at_every_split(layers):
    model, tokens = tiny_model(layers), tokens_of(2, SEQLEN)
    full, full_state = model(tokens, output_state=True)
    for split in range(SEQLEN + 1):
        head, state = model(tokens[:, :split], output_state=True)
        before = state.clone()
        tail, final = model(tokens[:, split:], state=state, output_state=True)
        assert_same(torch.cat([head, tail], 1), full.detach())
        assert_same_state(final, full_state, layers)
        assert_same_state(state, before, layers)  # forward leaves the given state alone

        for t in range(split, SEQLEN):
            assert_same(model.decode(tokens[:, t], before), full[:, t])
        assert_same_state(before, full_state, layers)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_packed_equals_separate(layers):
    model = tiny_model(layers)
    lengths = [4, 0, 1, 7]
    parts = [tokens_of(1, length, seed=i) for i, length in enumerate(lengths)]
    again = [tokens_of(1, length, seed=9 + i) for i, length in enumerate(lengths[::-1])]

    def packed(parts, state=None):
        cu_seqlens = torch.tensor([0] + [p.shape[1] for p in parts]).cumsum(0)
        return model(torch.cat(parts, 1), state, True, cu_seqlens)

    first, state = packed(parts)
    second, final = packed(again, state)
    separate = [model(p, output_state=True) for p in parts]
    continued = [model(p, s, True) for p, (_, s) in zip(again, separate, strict=True)]
    assert_same(first, torch.cat([out for out, _ in separate], 1))
    assert_same(second, torch.cat([out for out, _ in continued], 1))
    for i, (_, expected) in enumerate(continued):
        row = ModelState(
            [tuple(x[i : i + 1] for x in layer) for layer in final.layers],
            final.positions[i : i + 1],
        )
        assert_same_state(row, expected, layers)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_deferred_writes_change_nothing_but_the_form(layers):
    """Decoding, copies on the way, and whatever needs the plain form: it makes it."""
    model, tokens = tiny_model(layers), tokens_of(2, 17)
    expected, final = model(tokens, output_state=True)
    _, state = model.prefill(tokens[:, :3])
    model.defer_writes(state, capacity=4)
    for t in range(3, 9):
        assert_same(model.decode(tokens[:, t], state), expected[:, t].detach())
        copy = state.clone()
    assert state.fill.tolist() == [2, 2]
    logits, state = model(tokens[:, 9:12], state, output_state=True)
    assert state.fill is None
    assert_same(logits, expected[:, 9:12])
    model.defer_writes(state, capacity=4)
    for t in range(12, 17):
        assert_same(model.decode(tokens[:, t], state), expected[:, t].detach())
    state.fold()
    assert_same_state(state, final, layers)
    assert_same(model.decode(tokens[:, 9], copy), expected[:, 9].detach())


def test_prefill_gives_the_last_logits_of_each_prompt():
    model, tokens = tiny_model(), tokens_of(1, 9)
    logits, state = model.prefill(tokens, cu_seqlens=torch.tensor([0, 2, 9]))
    assert_same(logits[0], model(tokens[:, :2])[0, -1].detach())
    assert_same(logits[1], model(tokens[:, 2:])[0, -1].detach())
    assert state.positions.tolist() == [2, 7]
    assert_same(model.prefill(tokens)[0], model(tokens)[:, -1].detach())


def test_fp32_prefill_and_decode_agree():
    model, tokens = tiny_model(dtype=torch.float32), tokens_of(2, 40)
    _, state = model.prefill(tokens[:, :20])
    for t in range(20, 40):
        logits = model.decode(tokens[:, t], state)
    assert_same(logits, model(tokens)[:, -1].detach(), 1e-4)


def test_bf16_weights_keep_an_fp32_residual():
    model, tokens = tiny_model(dtype=torch.bfloat16), tokens_of(2, SEQLEN)
    hidden, state = model.hidden(tokens, output_state=True)
    assert hidden.dtype == torch.float32
    assert [x.dtype for x in state.layers[1]] == [torch.float32] * 2
    assert model.decode(tokens[:, 0], state).dtype == torch.bfloat16


def test_loss_is_the_cross_entropy_of_the_logits_padding_left_out():
    model, tokens, targets = tiny_model(), tokens_of(2, SEQLEN), tokens_of(2, SEQLEN, seed=2)
    loss, state = model(tokens, output_state=True, targets=targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32 and state.positions.tolist() == [SEQLEN, SEQLEN]

    logits = model(tokens)
    assert logits.shape[-1] == TINY.vocab_size < len(model.embedding.weight)
    picked = logits.gather(-1, targets[..., None])[..., 0]
    expected = (logits.logsumexp(-1) - picked).mean()
    assert_same(loss.double(), expected, 1e-6)
    for actual, x in zip(gradients, torch.autograd.grad(expected, list(model.parameters()))):
        assert_same(actual, x, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_state_size(layers, dtype):
    model = tiny_model(layers, dtype)
    sizes = {seqlen: model.prefill(tokens_of(2, seqlen))[1].nbytes() // 2 for seqlen in (1, 5, 50)}
    assert sizes == {seqlen: model.state_size(seqlen) for seqlen in sizes}
    assert (len(set(sizes.values())) == 1) == ("attention" not in layers)


def test_key_value_cache_is_seldom_copied_and_read_only_where_it_holds_tokens():
    model, tokens = tiny_model(("attention",)), tokens_of(2, 300)
    _, state = model.prefill(tokens[:, :10])
    expected = model(tokens).detach()
    places = set()
    for t in range(10, 300):
        assert_same(model.decode(tokens[:, t], state), expected[:, t])
        k_cache, v_cache = state.layers[0]
        places.add(k_cache.data_ptr())
        k_cache[:, t + 1 :], v_cache[:, t + 1 :] = 1e3, 1e3
    assert len(places) <= 5
    # A forward from a cache with free slots, and back to decoding.
    state = ModelState([tuple(x[:, :310] for x in state.layers[0])], state.positions)
    more = tokens_of(2, 20, seed=2)
    both = model(torch.cat([tokens, more], 1)).detach()
    logits, state = model(more[:, :19], state, output_state=True)
    assert_same(logits.detach(), both[:, 300:319])
    assert_same(model.decode(more[:, 19], state), both[:, 319])


def test_cloned_state_goes_its_own_way():
    model, tokens = tiny_model(), tokens_of(1, 5)
    _, state = model.prefill(tokens)
    fork = state.clone()
    model.decode(tokens[:, 0], fork)
    assert_same_state(state, model.prefill(tokens)[1])
    assert fork.positions.tolist() == [6]


def test_every_parameter_gets_a_gradient():
    model = tiny_model(dtype=torch.float32)
    model(tokens_of(2, SEQLEN)).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
