"""Whole models on a GPU: generation, prefill, training, and a profile, next to a Transformer++.

    python bench/end_to_end.py --out FILE.json [--list] [CELL ...]

A cell is one model at one size; --list names them, most important first, and regular expressions
choose, in their order. Each cell is in FILE.json as soon as it is measured, and one that is there
is not measured again, so a run may be cut off and continued. With no --out the file is
bench/results/end-to-end-<machine>.json; bench/run.py --render puts it into RESULTS.md and README.

Random weights in bf16. Our decode steps run in based_model.Engine, host included. A context is
entered by filling the states with random numbers. The Transformer's decode step is
transformer_step.py: products and norms of ours around stock attention over the exact cached prefix.
"""

import argparse
import datetime
import gc
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import ceilings
import timing
import training_step
import transformer_step
from based_model import PRESETS, Based, Engine, Sampling
from based_model.engine import Request
from end_to_end_report import BEST, OURS, PAPER, SMALL, SMALL_OURS
from provenance import commit, slug

HERE = Path(__file__).parent
GENERATED = 1024  # tokens that "0" as a context stands for: all of them, from the first on
MANY = -1  # as many rows as fit
# Repetitions of a cell: so many at most, about so many seconds, so many at least, and so many of
# those that take longer than the seconds.
REPETITIONS, SECONDS, LEAST, LEAST_OF_LONG = 20, 1.5, 3, 1
STEPS = 16  # of decoding in a repetition
# Of a prefill: the first that takes the width of the heads.
ATTENTIONS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@dataclass(frozen=True)
class Cell:
    work: str  # decode, prefill, train, or one of them and " profile"
    model: str
    batch: int  # rows, MANY for as many as fit
    length: int  # context of a decode step, tokens of a prefilled or trained row

    @property
    def name(self) -> str:
        batch = "max" if self.batch == MANY else self.batch
        return f"{self.work} {self.model} B{batch} T{self.length}"


def cells() -> list[Cell]:
    """All of them: those that the targets speak of, then the others, each part by model."""
    models = (OURS, BEST, PAPER)
    prefills = (("prefill profile", 4, 8192), ("prefill", 1, 131072))
    training = (("train", 16, 2048), ("train profile", 16, 2048), ("train", 4, 8192))
    targets = [
        *(Cell("decode", m, b, t) for m in models for b, t in ((128, 0), (64, 8192), (MANY, 8192))),
        *(Cell("decode", OURS, 1, t) for t in (0, 100, 100_000)),
        *(Cell("decode profile", OURS, b, 512) for b in (128, 1)),
        *(Cell("prefill", m, 4, 8192) for m in models),
        *(Cell(w, m, b, t) for m in models[:2] for w, b, t in prefills),
        *(Cell(w, m, b, t) for m in (SMALL_OURS, SMALL) for w, b, t in training),
    ]
    sizes = [(b, t) for t in (0, 8192, 32768) for b in (1, 8, 32, 128, MANY)]
    everything = [
        *(Cell("decode", m, b, t) for m in models for b, t in sizes),
        *(Cell("prefill", m, b, t) for m in models for b, t in ((2, 4096), (1, 131072))),
    ]
    order = list(dict.fromkeys(cell.model for cell in targets))
    rest = [cell for cell in everything if cell not in targets]
    # A model is built once in each part.
    return [
        *sorted(targets, key=lambda c: order.index(c.model)),
        *sorted(rest, key=lambda c: order.index(c.model)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cells", nargs="*", metavar="REGEX", help="of their names; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a cell, about")
    parser.add_argument("--list", action="store_true", help="print the cells' names and stop")
    args = parser.parse_args()
    wanted = args.cells or [""]
    found = [c for pattern in wanted for c in cells() if re.search(pattern, c.name)]
    chosen = list(dict.fromkeys(found))
    if args.list:
        return print("\n".join(cell.name for cell in chosen))

    machine = torch.cuda.get_device_name()
    path = args.out or HERE / "results" / f"end-to-end-{slug(machine)}.json"
    results = json.loads(path.read_text()) if path.exists() else head(machine)
    measured = {"commit": args.commit or commit(), "date": datetime.date.today().isoformat()}
    runner = Runner(args.seconds)
    for cell in chosen:
        if cell.name in results["cells"]:
            continue
        began = time.perf_counter()
        try:
            figures = runner.run(cell)
        except Exception as error:  # one cell must not take the others with it
            first, *_ = str(error).splitlines() or [""]
            figures = {"failure": f"{type(error).__name__}: {first[:300]}"}
        results["cells"][cell.name] = {**asdict(cell), **figures, **measured}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        seconds = time.perf_counter() - began
        print(f"{cell.name}: {summary(figures)} ({seconds:.1f} s)", flush=True)
    sys.exit(any("failure" in cell for cell in results["cells"].values()))


def head(machine: str) -> dict:
    """Results without a cell."""
    return {
        "machine": {"name": machine, "torch": torch.__version__},
        "ceilings": ceilings.measure(timing.CudaTimer(), "cuda", {torch.bfloat16}, seconds=0.3),
        "cells": {},
    }


def summary(figures: dict) -> str:
    if "failure" in figures:
        return figures["failure"]
    if "kernels" in figures:
        lines = [
            f"{kernel['share']:6.1%} {kernel['ms']:8.3f} ms {kernel['calls']:5} {kernel['name']}"
            for kernel in figures["kernels"]
        ]
        total = f"sum {figures['kernel_ms']:.3f} of {figures['median_ms']:.3f} ms"
        return "\n".join(["", *lines, total])
    return ", ".join(
        f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
    )


class Runner:
    """Holds the model of the last cell, or its training step, as building one takes time."""

    def __init__(self, seconds: float):
        self.name, self.model = None, None
        self.repeat = partial(repeat, limit=seconds)

    def run(self, cell: Cell) -> dict:
        work, *profile = cell.work.split()
        name = (cell.model, cell.batch, cell.length) if work == "train" else cell.model
        self._free()
        if self.name != name:
            self.name, self.model = None, None
            self._free()
            torch.compiler.reset()
            self.model = training_step.Step(cell) if work == "train" else build(cell.model)
            self.name = name
        torch.cuda.reset_peak_memory_stats()
        measure = {"decode": self._decode, "prefill": self._prefill, "train": self._train}[work]
        return {**measure(cell, bool(profile)), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}

    def _free(self):
        gc.collect()
        torch.cuda.empty_cache()

    def _decode(self, cell: Cell, profile: bool) -> dict:
        if "attention" in self.model.config.layers:
            return transformer_step.measure(self.model, cell, self.repeat, GENERATED)
        rows = most_rows(self.model) if cell.batch == MANY else cell.batch
        engine = running(self.model, rows, cell.length)

        def step():
            for _ in range(STEPS):
                engine.step()

        figures = {"rows": rows, "bytes": step_bytes(self.model, engine, rows, cell.length)}
        step()  # captures the graph
        if profile:
            return {**figures, **kernels(step, STEPS)}
        if cell.length == 0 and rows <= 128:  # all the tokens, as a user would make them
            return {**figures, **self.repeat(lambda: generate(engine), GENERATED, rows)}
        if cell.length == 0:  # every step costs the same once the windows are full
            engine.state.positions.fill_(GENERATED // 2)
        return {**figures, **self.repeat(step, STEPS, rows)}

    def _prefill(self, cell: Cell, profile: bool) -> dict:
        config = self.model.config
        tokens = torch.randint(config.vocab_size, (cell.batch, cell.length), device="cuda")
        run = self.model.prefill
        if "attention" in config.layers:

            @torch.no_grad()
            def run(tokens):  # without its caches, which would not fit
                with sdpa_kernel(ATTENTIONS, set_priority=True):
                    x, _ = self.model.hidden(tokens)
                return self.model.logits(x[:, -1])

        run(tokens)  # compiles, for this shape
        if profile:
            return kernels(lambda: run(tokens), 1)
        return self.repeat(lambda: run(tokens), 1, cell.batch * cell.length)

    def _train(self, cell: Cell, profile: bool) -> dict:
        if profile:
            return kernels(self.model, 1)
        figures = self.repeat(self.model, 1, cell.batch * cell.length)
        return {**figures, "mfu": self.model.mfu(figures["median_ms"])}


@torch.no_grad()
def build(name: str) -> Based:
    """A preset of random weights in bf16, made on the GPU."""
    with torch.device("meta"):
        model = Based(PRESETS[name])
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    model.reset_parameters()
    return model


def running(model: Based, rows: int, context: int) -> Engine:
    """An engine in which so many sequences have read `context` tokens, as far as a GPU can tell."""
    engine = Engine(model, rows, batch_sizes=[rows])
    for layer in engine.state.layers:
        for x in layer if context else ():
            x.normal_()
    for mixer, layer in zip(model.config.layers, engine.state.layers):
        if mixer == "linear" and context:
            layer[1].mul_(0.1)[..., 0] = context  # the first feature counts: no sum is near 0
    engine.state.positions.fill_(context)
    for slot in range(rows):
        request = Request(torch.tensor([0]), 10**9, Sampling(temperature=0.0), slot, None)
        engine._occupy(slot, request)
    return engine


def generate(engine: Engine):
    """All tokens of texts that begin with the first one."""
    engine.state.positions.zero_()
    for _ in range(GENERATED):
        engine.step()


def most_rows(model: Based) -> int:
    """Rows whose states leave room for the step itself."""
    free, _ = torch.cuda.mem_get_info()
    each = model.state_size(0) * 1.04 + 12 * model.config.padded_vocab_size  # rings, logits
    return int((free - 2e9) / each) // 128 * 128


def step_bytes(model: Based, engine: Engine, rows: int, context: int) -> int:
    """What a step has to read and write: all weights, and of the states what it looks at."""
    config, total = model.config, sum(p.nbytes for p in model.parameters())
    deferred = engine.state.fill is not None
    for mixer, layer in zip(config.layers, engine.state.layers, strict=True):
        row = sum(x[0].nbytes for x in layer)
        if mixer == "linear":  # rings half full; the state is written in every step or every 16th
            row = sum(x[0].nbytes for x in layer[:2]) * (1 + (1 / 16 if deferred else 1))
            row += sum(x[0].nbytes for x in layer[2:]) / 2
        elif mixer == "window":
            row *= min(1, (context or GENERATED) / config.window)
        else:
            row *= 2
        total += rows * row
    return int(total)


def repeat(run, steps: int, rows: int, limit: float = SECONDS) -> dict:
    """Median time of a step over repetitions, each of so many steps of so many rows."""
    times, spent = [], 0.0
    while len(times) < REPETITIONS:
        if spent > limit and len(times) >= (LEAST_OF_LONG if spent > 2 * limit else LEAST):
            break
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        times.append(1e3 * seconds / steps)
        spent += seconds
    return {
        "median_ms": median(times),
        "quartiles_ms": quantiles(times * 2, n=4, method="inclusive")[::2],
        "samples": len(times),
        "tokens_per_ms": rows / median(times),
    }


def kernels(run, steps: int) -> dict:
    """Where the GPU's time goes: milliseconds of a step by kernel, largest first."""
    timed = repeat(run, steps, 1)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    rows = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    rows.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows)
    listed = [
        {
            "name": e.key[:100],
            "ms": e.self_device_time_total / 1e3 / steps,
            "calls": round(e.count / steps),
            "share": e.self_device_time_total / total,
        }
        for e in rows[:40]
    ]
    return {**timed, "kernel_ms": total / 1e3 / steps, "kernels": listed}


if __name__ == "__main__":
    main()
