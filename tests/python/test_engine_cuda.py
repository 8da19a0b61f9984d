"""The engine on a GPU: its graph against the whole-sequence forward, its kernel against fp64."""

import copy
import dataclasses

import pytest
import torch

from based_model import PRESETS, Based, Engine, ModelConfig, Sampling
from based_model.sampling import Draws, sample
from support import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

SMALL = ModelConfig(
    layers=("conv", "linear", "window", "conv", "attention"),
    d_model=256,
    mlp_dim=512,
    nheads=4,
    feature_dim=16,
    window=64,
    vocab_size=1000,
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize(
    "rows, width, dtype",
    [
        *((7, 3, torch.float32), (129, 70, torch.float32), (1680, 4608, torch.float16)),
        *((1, 1, torch.bfloat16), (129, 70, torch.bfloat16), (50264, 1792, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", ["nothing", "norm", "update and norm", "swiglu"])
def test_gemv_on_cuda(rows, width, first, dtype):
    from based_model.gemv import gemv

    weight, bias = randn(rows, width, dtype=dtype), randn(rows, dtype=dtype)
    x, update = randn(1, width), randn(1, width, dtype=dtype)
    norm = torch.nn.RMSNorm(width, eps=1e-5, device="cuda", dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    if first == "swiglu":
        x = randn(1, 2 * width, dtype=dtype)
        vector = x[:, :width].double() * torch.nn.functional.silu(x[:, width:].double())
        summed, out = gemv(x, weight, bias, swiglu=True)
    elif first == "nothing":
        x = x.to(dtype)
        summed, out = gemv(x, weight, bias)
        vector = x.double()
    else:
        update = update if first == "update and norm" else None
        vector = total = x.double() + (0 if update is None else update.double())
        summed, out = gemv(x, weight, bias, update=update, norm=norm.requires_grad_(False))
        vector = vector * (vector.square().mean() + 1e-5).rsqrt() * norm.weight.double()
        assert summed.dtype == torch.float32 and (summed - total).abs().max() < 1e-6
    expected = vector.to(dtype).double() @ weight.double().T + bias.double()
    bound = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]
    assert out.dtype == dtype and out.shape == (1, rows)
    assert (out.double() - expected).norm() <= bound * expected.norm()


class Recorded(Engine):
    """Keeps the logits of the newest step."""

    def __init__(self, model, slots, **options):
        super().__init__(model, slots, **options)
        self.logits = torch.full((slots, model.config.vocab_size), float("nan"), device="cuda")
        decode = model.decode

        def recorded(tokens, *args):
            logits = decode(tokens, *args)
            self.logits[: len(logits)] = logits
            return logits

        model.decode = recorded


@pytest.mark.parametrize("slots", [1, 8, 40])
@pytest.mark.parametrize("config", [SMALL, PRESETS["based-360m"]], ids=["small", "based-360m"])
def test_graph_on_cuda_follows_the_forward(config, slots):
    """Teacher-forced: logits as near to the fp32 model's as forward()'s are, for every text.

    The argmax too wherever the best leads by more than 2e-2 of the largest logit: bf16 logits above
    2 lie 0.016 apart, and forward() itself has other argmaxes than the fp32 model up to 1.7e-2.
    The two are as far from each other as from that model, because decode_block rounds elsewhere.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Based(config).bfloat16().requires_grad_(False)
    exact_model = copy.deepcopy(model).float()
    engine = Recorded(model, slots, context=256, batch_sizes=[slots])
    prompts = torch.randint(config.vocab_size, (slots, 150)).tolist()
    requests = [
        engine.add(prompt[: 20 + i % 130], 60, Sampling(temperature=1.0), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    seen = [[] for _ in requests]
    while not all(request.finished for request in requests):
        before = [request.slot for request in requests]
        drawn = [max(1, request.drawn) for request in requests]  # the first is no step's
        engine.step()
        logits = engine.logits.clone()
        for i, request in enumerate(requests):
            if request.drawn > drawn[i]:
                slot = request.slot if before[i] is None else before[i]
                seen[i].append(logits[slot])
    for request, prompt, own in zip(requests, prompts, seen):
        prompt = prompt[: len(request.prompt)]
        text = torch.tensor([prompt + request.tokens], device="cuda")
        with torch.no_grad():
            forward = model(text)[0, len(prompt) : -1]
            exact = exact_model(text)[0, len(prompt) : -1]
        got = torch.stack(own)
        assert got.shape == forward.shape
        assert error(got, exact) <= 1.1 * error(forward, exact) <= 2.5e-2
        first, second = exact.topk(2, -1).values.unbind(-1)
        clear = first - second > 2e-2 * exact.abs().amax(-1)
        assert clear.any() and torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("slots", [8, 130])
def test_bits_on_cuda_do_not_depend_on_the_slot(slots):
    """In products of many rows too: the same sequence in every slot gives the same state."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Based(PRESETS["based-360m"]).bfloat16().requires_grad_(False)
    engine = Engine(model, slots, batch_sizes=[slots])
    others = [engine.add([i % 50257], 30, Sampling(), seed=i) for i in range(slots // 2)]
    same = [engine.add(range(9), 30, Sampling(), seed=1) for _ in range(slots - len(others))]
    for _ in range(20):
        engine.step()
    places = [request.slot for request in same]
    for layer in engine.state.layers:
        for x in layer[:2]:
            own = x[places]
            assert own.isfinite().all() and torch.equal(own, own[:1].expand_as(own))
    for _ in engine.run():
        pass
    assert all(request.tokens == same[0].tokens for request in same)


def test_steps_on_cuda_do_not_wait_for_the_host():
    """Once the graphs are there: the only wait is for the tokens of the step before."""
    config = dataclasses.replace(SMALL, layers=SMALL.layers[:-1])  # attention counts its cache
    with torch.device("cuda"):
        model = Based(config).bfloat16().requires_grad_(False)
    engine = Engine(model, 4)
    warm = [engine.add([1], 40, Sampling(top_k=5)) for _ in range(4)]
    while not all(request.finished for request in warm):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        requests = [engine.add([1], 40, Sampling(top_k=5)) for _ in range(4)]
        while not all(request.finished for request in requests):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.tokens == b.tokens for a, b in zip(warm, requests, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("rows", [1, 128])
def test_a_draw_on_cuda_is_the_one_on_the_cpu(rows, restricted):
    """Of any row, with its own sampling; no two scores are within a rounding error here."""
    logits = 3 * torch.randn(rows, 50257)
    draws = Draws.greedy(rows, torch.device("cpu"))
    for row in range(rows):
        limits = {"top_k": row % 3 * 20, "top_p": 0.9 if row % 2 else 1.0} if restricted else {}
        draws.set(row, Sampling(temperature=row % 5 * 0.4, **limits), 2**62 - 2**50 * row)
    positions = torch.randint(10**6, (rows,))
    expected = sample(logits, draws, positions, restricted)
    on_gpu = Draws(*(x.cuda() for x in draws.tensors()))
    got = sample(logits.cuda(), on_gpu, positions.cuda(), restricted)
    assert torch.equal(got.cpu(), expected)


def test_command_line_on_cuda_writes_what_it_writes_on_the_cpu(tmp_path, capsys):
    pytest.importorskip("safetensors")
    from based_model.checkpoint import save_checkpoint
    from based_model.generate import GenerateConfig, run

    torch.manual_seed(0)
    model = Based(dataclasses.replace(SMALL, vocab_size=256)).requires_grad_(False)
    for p in model.parameters():  # far from the small initial values: no near ties
        torch.nn.init.normal_(p, std=0.2)
    model.embedding.weight[:32] *= 0.01  # printable ASCII
    model.embedding.weight[127:] *= 0.01
    run_folder = save_checkpoint(tmp_path / "run", 1, model).parent
    texts = []
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        settings = {"checkpoint": run_folder, "temperature": 0.0, "samples": 2}
        first = {"prompt": ("def f", "a"), "device": device, "save_state": tmp_path / device}
        run(GenerateConfig(**settings, **first, max_new_tokens=40))
        texts.append(capsys.readouterr().out)
        rest = {"prompt": ("(x)", "b"), "device": other, "load_state": tmp_path / device}
        run(GenerateConfig(**settings, **rest, max_new_tokens=40))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] and "----- continuation 2" in texts[0]
    assert texts[1] == texts[3] and texts[1].startswith("===== prompt 1\n(x)\n")
    run(
        GenerateConfig(
            **settings, prompt=("a",), max_new_tokens=40, device="cuda", precision="bf16"
        )
    )
    assert "----- continuation 2" in capsys.readouterr().out
