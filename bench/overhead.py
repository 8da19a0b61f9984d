"""Host time of an eager call: Python, autograd, dispatch and the launch, at sizes that are no work.

On a GPU the calls are queued, not waited for. There autograd hands every backward to a thread of
its own and waits for it, which is most of what a small one takes: the last rows are an
autograd.Function of three tensors that launches nothing, and linear attention without that thread.
"""

import time
from statistics import median, quantiles

import torch

import based_ops

CALLS, REPEATS = 100, 15
WARM_UP_S = 0.2  # a processor that has been waiting for a GPU is slow at first
BATCH, NHEADS, FEATURE_DIM, HEAD_DIM, WINDOW, CHANNELS, TAPS = 1, 2, 16, 64, 16, 64, 3
TARGETS_US = {("linear_attention", "forward"): 15, ("linear_attention", "forward+backward"): 60}


def measure(device, missing):
    """[{op, work, median_us, quartiles_us, target_us}] of every op that runs there."""
    rows = []
    for op, call, inputs in calls(device):
        if op in missing:
            continue
        with torch.no_grad():
            rows.append(_row(op, "forward", device, lambda: call(*inputs)))
        if "decode" in op or f"{op}_backward" in missing:
            continue
        rows.append(_row(op, "forward+backward", device, _both(call, inputs)))
    _, call, inputs = calls(device)[0]
    rows.append(_row("(nothing)", "forward+backward", device, _both(Nothing.apply, inputs)))
    if device == "cuda" and "linear_attention_backward" not in missing:
        with torch.autograd.set_multithreading_enabled(False):
            work = "forward+backward, one thread"
            rows.append(_row("linear_attention", work, device, _both(call, inputs)))
    return rows


def _both(call, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    dout = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, dout)


class Nothing(torch.autograd.Function):
    """The least that any op of three tensors takes: outputs and gradients are allocated only."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[-1])

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def calls(device):
    """(op, function, its tensors) of every op, one token long."""

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device).to(dtype)

    q, k = draw(2, BATCH, 1, NHEADS, FEATURE_DIM)
    v = draw(BATCH, 1, NHEADS, HEAD_DIM)
    expanded = 1 + FEATURE_DIM + FEATURE_DIM * (FEATURE_DIM + 1) // 2
    shape = BATCH, NHEADS, expanded
    state = draw(*shape, HEAD_DIM, dtype=torch.float32), draw(*shape, dtype=torch.float32)
    rings = draw(2, BATCH, WINDOW, NHEADS, HEAD_DIM)
    positions = torch.zeros(BATCH, dtype=torch.int64, device=device)
    x, weight = draw(BATCH, 1, CHANNELS), draw(CHANNELS, TAPS)
    token, conv_state = draw(BATCH, CHANNELS), draw(BATCH, CHANNELS, TAPS - 1)

    def window(q, k, v):
        return based_ops.sliding_window_attention(q, k, v, WINDOW)

    def conv(x, weight):
        return based_ops.short_conv(x, weight, activation="silu", gate=x)

    def conv_decode(*args):
        return based_ops.short_conv_decode(*args, activation="silu")

    return [
        ("linear_attention", based_ops.linear_attention, (q, k, v)),
        ("linear_attention_decode", based_ops.linear_attention_decode,
         (q[:, 0], k[:, 0], v[:, 0], *state)),
        ("sliding_window_attention", window, (v, v, v)),
        ("sliding_window_decode", based_ops.sliding_window_decode,
         (v[:, 0], v[:, 0], v[:, 0], *rings, positions)),
        ("short_conv", conv, (x, weight)),
        ("short_conv_decode", conv_decode, (token, weight, conv_state)),
        ("taylor_feature_map", based_ops.taylor_feature_map, (q,)),
    ]  # fmt: skip


def _row(op, work, device, call):
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_S:
        call()
    times = []
    for _ in range(REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return {
        "op": op,
        "work": work,
        "median_us": median(times),
        "quartiles_us": quantiles(times, n=4, method="inclusive")[::2],
        "target_us": TARGETS_US.get((op, work)),
    }
