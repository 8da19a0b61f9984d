"""A Transformer's decode step at its best: stock attention over exactly the cached tokens.

Norms, SwiGLU and products are those of based_model.fused (one row: gemv; up to 64: skinny_linear;
beyond: cuBLAS and torch.compile), but not decode_block, which would serve it as well. Rotary and
the write to the cache are one compiled kernel, and the attention is the fastest that torch ships
for the shape, found by trying. (FlexAttention, which has to be compiled for each shape, was slower
than cuDNN's at the three shapes where it was tried on an H100: 1.24 against 1.20 ms for 64 rows at
8,192 tokens.) One CUDA graph for each length: a server could not do that for every length, so this
is what no server beats.
"""

from statistics import linear_regression, median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based_model.fused import linear, norm_linear, norm_mlp, rotary_angles
from based_model.sampling import Draws, sample

RESERVE = 3e9  # bytes that a step needs beside weights and caches
LONG = 1 << 19  # tokens in the caches from which on one step is long enough to be timed alone


def backends():
    """Attentions of one query a head: q (B,H,1,V), k and v (B,H,S,V), scale -> (B,H,1,V)."""

    def sdpa(backend):
        def run(q, k, v, scale):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=scale)

        return run

    return {
        "SDPA FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }


class Step:
    """The step that reads token number `context`, counted from 1, of every row.

    Where the caches of all layers do not fit the GPU, layers take turns with those that do:
    `shared` says so. The time is that of a GPU with more memory, as no cache of a layer stays in
    the GPU's own cache until the next one.
    """

    def __init__(self, model, rows: int, context: int):
        self.model, self.rows, self.context = model, rows, context
        config = model.config
        self.head_dim = config.head_dim
        # 16-byte rows: attention kernels would otherwise copy the caches in every step.
        self.width = -(-config.head_dim // 8) * 8
        shape = (rows, context, config.nheads, self.width)
        weight = model.embedding.weight
        free, _ = torch.cuda.mem_get_info()
        each = 2 * weight.itemsize * rows * context * config.nheads * self.width
        count = min(len(config.layers), int((free - RESERVE) // each))
        if count < 1:
            raise MemoryError(f"one layer's cache of {each / 1e9:.1f} GB does not fit")
        self.shared = count < len(config.layers)
        self.caches = [
            tuple(weight.new_empty(shape).normal_() for _ in range(2)) for _ in range(count)
        ]
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.positions = torch.full_like(self.tokens, context - 1)
        self.draws = Draws.greedy(rows, weight.device)
        self.attention, self.attention_name = None, None

    def choose(self, timer):
        """The fastest attention at this shape, as (name, milliseconds of every one)."""
        k, v = (cache.transpose(1, 2) for cache in self.caches[0])
        q = k.new_empty(self.rows, self.model.config.nheads, 1, self.width).normal_()
        times = {}
        for name, attention in backends().items():
            try:
                times[name] = timer(lambda: attention(q, k, v, self.head_dim**-0.5))
            except Exception as error:  # not every kernel takes every shape
                times[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        timed = {name: ms for name, ms in times.items() if isinstance(ms, float)}
        self.attention_name = min(timed, key=timed.get)
        self.attention = backends()[self.attention_name]
        return times

    def __call__(self):
        config, scale = self.model.config, self.head_dim**-0.5
        dtype = torch.float32
        cos, sin = rotary_angles(
            self.positions, config.attention_rotary_dim, config.rotary_base, dtype
        )
        x, update = self.model._embed(self.tokens), None
        for i, layer in enumerate(self.model.layers):
            k_cache, v_cache = self.caches[i % len(self.caches)]
            x, qkv = norm_linear(x, update, layer.norm1, layer.mixer.qkv_proj.weight)
            q = _store(qkv, cos, sin, k_cache, v_cache)
            k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
            out = self.attention(q[:, :, None], k, v, scale)[:, :, 0, : self.head_dim]
            update = linear(out.flatten(-2), layer.mixer.out_proj.weight)
            fc1, fc2 = layer.mlp.fc1.weight, layer.mlp.fc2.weight
            x, update = norm_mlp(x, update, layer.norm2, fc1, fc2)
        _, logits = norm_linear(x, update, self.model.norm, self.model.embedding.weight)
        logits = logits[:, : config.vocab_size]
        self.tokens.copy_(sample(logits, self.draws, self.positions, False))


@torch.compile
def _store(qkv, cos, sin, k_cache, v_cache):
    """Rotates q and k, and writes k and v to the last place of the caches; q (B,H,width)."""
    rows, _, nheads, width = k_cache.shape
    q, k, v = qkv.view(rows, 3, nheads, -1).unbind(1)
    half, rest = cos.shape[-1], width - q.shape[-1]

    def rotated(x):
        x1, x2 = x[..., :half], x[..., half : 2 * half]
        x = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, x[..., 2 * half :]), -1)
        return F.pad(x.to(qkv.dtype), (0, rest))

    k_cache[:, -1] = rotated(k)
    v_cache[:, -1] = F.pad(v, (0, rest))
    return rotated(q)


@torch.no_grad()
def measure(model, cell, repeat, generated) -> dict:
    """A cell of end_to_end.py: for "0" the mean over `generated` steps, from a line through the
    times at four lengths."""
    lengths = [cell.length]
    if cell.length == 0:
        lengths = [generated * i // 4 for i in range(1, 5)]
    rows = cell.batch
    if rows < 0:
        config = model.config
        free, _ = torch.cuda.mem_get_info()
        width = -(-config.head_dim // 8) * 8
        each = 4 * len(config.layers) * lengths[-1] * config.nheads * width
        rows = int((free - RESERVE) // (each + 12 * config.padded_vocab_size))
        if rows < 1:
            raise MemoryError("not one row fits")
    points, names, tried = [], [], {}
    for length in lengths:
        step = Step(model, rows, length)
        tried = step.choose(_milliseconds)
        names.append(step.attention_name)
        figures = _replayed(step, repeat, rows)
        points.append(figures["median_ms"])
        shared = step.shared
        caches = sum(x.nbytes for cache in step.caches for x in cache) / len(step.caches)
        del step
        torch.cuda.empty_cache()
    result = {**figures, "rows": rows, "attention": ", ".join(dict.fromkeys(names))}
    result |= {"tried_ms": tried, "caches_shared_by_layers": shared}
    weights = sum(p.nbytes for p in model.parameters())
    share = 0.5 if cell.length == 0 else 1  # of the caches: on average
    result["bytes"] = int(weights + share * caches * len(model.layers))
    if cell.length == 0:
        slope, intercept = linear_regression(lengths, points)
        mean = slope * (generated + 1) / 2 + intercept
        result |= {"median_ms": mean, "tokens_per_ms": rows / mean}
        result["points_ms"] = dict(zip(map(str, lengths), points))
        result.pop("quartiles_ms")
    return result


def _replayed(step: Step, repeat, rows: int) -> dict:
    graph, many = captured(step), 4 if rows * step.context < LONG else 1
    return repeat(lambda: [graph.replay() for _ in range(many)], many, rows)


def captured(run) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph


def _milliseconds(run) -> float:
    """Of a call, from replays of a graph of it."""
    graph, times = captured(run), []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)
