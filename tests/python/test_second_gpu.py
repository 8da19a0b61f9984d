"""A second GPU: what lives there runs there, whatever device is current, and as on the first."""

import functools
import json
from pathlib import Path

import pytest
import torch

import based_ops
from bad_arguments import arguments
from based_model import Engine, train
from support import expanded_dim, flatten, randn
from test_engine import CONTEXT, PATTERNS, Poisoned, plain, requests_of, served, tiny_model
from test_train_distributed import RUNS, assert_near, torchrun
from training import assert_equal_weights, losses, make_text, tiny_settings

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
F32, BF16 = torch.float32, torch.bfloat16
OPS = (
    *("taylor_feature_map", "linear_attention", "sliding_window_attention", "short_conv"),
    *("linear_attention_decode", "linear_attention_decode_deferred", "linear_attention_fold"),
    *("sliding_window_decode", "short_conv_decode"),
)
CALLS = [(op, dtype) for op in OPS for dtype in (F32, BF16)]
CALLS += [("skinny_linear", BF16), ("skinny_linear", torch.float16), ("decode_block", BF16)]
ON_HOPPER = ("skinny_linear", "decode_block")


def call(op, dtype):
    """Arguments on the CPU, of sizes whose kernels ask for more shared memory than is usual."""
    B, T, H, D, V, W, C, K = 2, 300, 3, 16, 64, 128, 72, 3
    draw = functools.partial(randn, dtype=dtype)
    state = randn(B, H, expanded_dim(D), V, dtype=F32), randn(B, H, expanded_dim(D), dtype=F32) + 9
    heads = (B, H) if "decode" in op else (B, T, H)
    feature, head = (draw(*heads, D) for _ in "qk"), (draw(*heads, V) for _ in "qkv")
    rings = draw(B, W, H, V), draw(B, W, H, V)
    pending = {"pending_k": draw(B, 5, H, D), "pending_v": draw(B, 5, H, V)}
    waiting = {**pending, "fill": torch.tensor([1, 4])}
    channels = (B, C) if "decode" in op else (B, T, C)
    conv = {"x": draw(*channels), "gate": draw(*channels), "bias": draw(C)}
    conv |= {"weight": draw(C, K), "activation": "silu"}
    tokens = dict(zip("qkv", (*feature, next(head))))
    windows = dict(zip("qkv", (next(head), next(head), tokens["v"])))
    states = dict(zip(("kv_state", "k_state"), state))
    return {
        "taylor_feature_map": {"x": draw(B, T, D)},
        "linear_attention": {**tokens, "initial_state": state},
        "linear_attention_decode": {**tokens, **states},
        "linear_attention_decode_deferred": {**tokens, **states, **waiting},
        "linear_attention_fold": {**states, **waiting},
        "sliding_window_attention": {**windows, "window": W},
        "sliding_window_decode": {
            **dict(zip(("k_cache", "v_cache"), rings)),
            **windows,
            "positions": torch.tensor([3, 200]),
        },
        "short_conv": {**conv, "initial_state": draw(B, C, K - 1)},
        "short_conv_decode": {**conv, "conv_state": draw(B, C, K - 1)},
        "skinny_linear": {"x": draw(5, 200), "weight": draw(300, 200), "bias": draw(300)},
        "decode_block": {
            **{"mixed": draw(5, 200), "x": randn(5, 72, dtype=F32), "out_weight": draw(72, 200)},
            **{"norm_weight": draw(72), "fc1": draw(2 * 136, 72), "fc2": draw(72, 136)},
            **{"next_norm_weight": draw(72), "next_weight": draw(300, 72)},
            **{"counters": torch.zeros(8, dtype=torch.int32), "next_bias": draw(300)},
        },
    }[op]


def on(device, value):
    """A copy there, of tensors in tuples too."""
    if isinstance(value, tuple):
        return tuple(on(device, x) for x in value)
    return value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value


def results(op, values, device):
    """On the CPU: what a call returns, its gradients, and its arguments after it."""
    values = {name: on(device, x) for name, x in values.items()}
    leaves = [x for x in flatten([x for x in values.values() if not isinstance(x, (int, str))])]
    leaves = [x for x in leaves if x.is_floating_point()]
    no_grad = op.endswith(("decode", "deferred", "fold", *ON_HOPPER))
    for x in leaves:
        x.requires_grad_(not no_grad)
    returned = getattr(based_ops, op)(**values)
    returned = [] if returned is None else flatten(returned)
    assert all(x.device == device for x in returned)
    gradients = []
    if not no_grad:
        total = sum(x.float().square().sum() for x in returned)
        gradients = torch.autograd.grad(total, leaves)
        assert all(x.device == device for x in gradients)
    return [x.detach().cpu() for x in (*returned, *gradients, *leaves)]


@pytest.mark.parametrize("op, dtype", CALLS, ids=str)
def test_op_on_cuda_1_equals_cuda_0(op, dtype):
    if op in ON_HOPPER and torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip(f"{op} runs on Hopper")
    values = call(op, dtype)
    assert torch.cuda.current_device() == 0
    expected = results(op, values, FIRST)
    got = results(op, values, SECOND)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(x.isfinite().all() and x.any() for x in got)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", ["linear_attention_decode", "sliding_window_decode"])
def test_op_runs_on_the_current_stream_of_cuda_1(op):
    """While cuda:0 is current: a stream of cuda:0, or another of cuda:1, would read zeros."""
    values = {name: on(SECOND, x) for name, x in call(op, BF16).items()}
    expected = getattr(based_ops, op)(**{name: on(SECOND, x) for name, x in values.items()})
    late, stream = torch.zeros_like(values["v"]), torch.cuda.Stream(SECOND)
    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of ms
        late.copy_(values["v"])
        with torch.cuda.device(FIRST):
            out = getattr(based_ops, op)(**values | {"v": late})
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("op", OPS[1:])
def test_op_with_a_tensor_on_another_gpu_is_a_named_error(op):
    valid = {name: on(FIRST, x) for name, x in arguments(op).items()}
    names = [name for name, x in valid.items() if isinstance(x, torch.Tensor)]
    names.remove("pending_k" if op == "linear_attention_fold" else names[0])  # fixes the device
    for name in names:
        expected = f"^{op}: {name}: expected .*cuda:0.*, got cuda:1"
        with pytest.raises(RuntimeError, match=expected):
            getattr(based_ops, op)(**valid | {name: on(SECOND, valid[name])})


def test_checked_indices_on_cuda_1():
    values = {name: on(SECOND, x) for name, x in arguments("short_conv_decode").items()}
    values["state_indices"] += 2
    based_ops.set_checks(True)
    try:
        with pytest.raises(RuntimeError, match="short_conv_decode: state_indices: expected"):
            based_ops.short_conv_decode(**values)
    finally:
        based_ops.set_checks(False)


@pytest.mark.parametrize("layers", PATTERNS, ids="-".join)
def test_engine_on_cuda_1_equals_the_plain_loop(layers):
    wanted = requests_of(4)
    model, first = tiny_model(SECOND, layers), tiny_model(FIRST, layers)
    got = served(Poisoned(model, 3, context=CONTEXT, batch_sizes=[3]), wanted, [0, 0, 1, 4])
    assert torch.cuda.current_device() == 0
    assert got == [plain(first, *request) for request in wanted]
    assert got == [plain(model, *request) for request in wanted]


def test_engine_in_bf16_on_cuda_1_equals_cuda_0():
    """Where a step has kernels of its own for few rows."""
    wanted = requests_of(6)
    tokens = [
        served(
            Engine(tiny_model(device, dtype=BF16), 4, batch_sizes=[4]), wanted, [0, 0, 1, 4, 4, 9]
        )
        for device in (FIRST, SECOND)
    ]
    assert tokens[0] == tokens[1]


def test_training_on_cuda_1_equals_cuda_0(tmp_path):
    text = make_text(tmp_path / "text")
    for name in ("cuda:0", "cuda:1"):
        train.train(tiny_settings(text, tmp_path / name, device=name))
    assert losses(tmp_path / "cuda:0") == losses(tmp_path / "cuda:1")
    assert_equal_weights(tmp_path / "cuda:0", tmp_path / "cuda:1")


def test_training_on_two_cuda_devices_equals_one(tmp_path):
    """NCCL between two processes, ddp and fsdp."""
    options = {"device": "cuda", "sample_tokens": 0}
    text = make_text(tmp_path / "text")
    train.train(tiny_settings(text, tmp_path / "one", **options))
    names = [name for name, changes in RUNS.items() if not {"resume", "signal_at"} & {*changes}]
    settings = [
        tiny_settings(text, tmp_path / name, **options, **RUNS[name]).to_dict() for name in names
    ]
    (tmp_path / "runs.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("two_processes.py")
    done = torchrun(script, tmp_path / "runs.json", timeout=300)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert_near(tmp_path / name, tmp_path / "one")
