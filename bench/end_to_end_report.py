"""Results of end_to_end.py -> markdown tables for RESULTS.md and README, and one figure."""

import json
from pathlib import Path

from based_model import PRESETS, Based

HERE = Path(__file__).parent
OURS, BEST, PAPER = "based-1.4b-28x64", "transformer-1.3b-26x64", "transformer-1.3b"
SMALL_OURS, SMALL = "based-360m", "transformer-360m"
ROLES = {
    OURS: "Based, 28 heads of 64",
    BEST: "Transformer++, its best shape, 26 heads of 64",
    PAPER: "Transformer++, the paper's shape, 24 heads of 70",
    SMALL_OURS: "Based 360M",
    SMALL: "Transformer++ 360M",
}
MAX = "max"
# Of the H200 that they were set for: (what, at least, how to write it, work, batch, tokens, over
# which model's tokens per ms; None: our own tokens per ms, MFU: our share of the peak).
MFU = "MFU"
TARGETS = (
    ("decode, batch 128, 1,024 tokens, tokens per ms", 70, ".1f", "decode", 128, 0, None),
    ("the same over Transformer++, 26 heads of 64", 3, ".2f", "decode", 128, 0, BEST),
    ("the same over Transformer++, 24 heads of 70", 10, ".2f", "decode", 128, 0, PAPER),
    ("decode, batch 64 at 8,192, over Transformer++", 16, ".1f", "decode", 64, 8192, BEST),
    ("the same, each at its best batch", 40, ".1f", "decode", MAX, 8192, BEST),
    ("decode, batch 1, 1,024 tokens, tokens per ms", 0.7, ".3f", "decode", 1, 0, None),
    ("prefill (4, 8192) over Transformer++", 1.3, ".2f", "prefill", 4, 8192, BEST),
    ("prefill (1, 131072) over Transformer++", 7, ".2f", "prefill", 1, 131072, BEST),
    ("training at 2,048 over Transformer++", 1.1, ".2f", "train", 16, 2048, SMALL),
    ("training at 8,192 over Transformer++", 1.5, ".2f", "train", 4, 8192, SMALL),
    ("training at 2,048, MFU", 0.4, ".1%", "train", 16, 2048, MFU),
    ("training at 8,192, MFU", 0.4, ".1%", "train", 4, 8192, MFU),
)
NOTES = """\
Random weights, bf16. Based decodes in based_model.Engine, greedy, host included; the
Transformer's step is a CUDA graph of our products, norms and SwiGLU, those of one row and of 64
at most by kernels of our own, around the fastest stock attention over exactly the cached prefix
(bench/transformer_step.py; heads of 70 are cached in rows of 72, which spares a copy), without
a host and without decode_block, which would serve it as well. Context 0: a text of 1,024 tokens
from its first one on, without a prompt (Transformer: a line through steps at four lengths).
Prefill: both models in the same code, the Transformer's attention cuDNN's, of heads of 70
FlashAttention-2, and without keeping its caches, which might not fit. Training: a step of
based_model.train with --compile --precision bf16; MFU counts 6 FLOP a parameter and token, of
989 TFLOP/s. of floor: the bytes of weights and states that a step must move, at the speed of a
copy. Kernels that only read are faster than a copy. In a profile, kernels that begin early
count the time that they wait for the one before. ^ the caches of all layers do not fit this
card: layers take turns with those that do, which takes the same time. x: that model's time a
token over Based's at equal batch (max: each at its own) and length. samples: repetitions of
which the median is shown; one of a decode step is 16 steps, or all 1,024 of a text; of the
Transformer's 4 replays, or one that reads 2^19 cached tokens or more."""


def render(path: Path) -> str:
    """Draws the figure beside a results file, writes README's table, returns RESULTS.md's section.

    README has the place between two comments; the first names the file whose table it shows.
    """
    results, figure = json.loads(path.read_text()), path.with_suffix(".png")
    try:
        draw(results, figure)
    except ImportError as error:  # matplotlib: no reason to lose the tables
        print(f"{figure.name} is left as it is: {error}")
    readme_path = HERE.parent / "README.md"
    begin, end = f"<!-- {path.name}: written by bench/run.py --render -->", "<!-- end -->"
    before, found, after = readme_path.read_text().partition(begin)
    if found:
        after = after.partition(end)[2]
        own = readme(results, f"bench/results/{figure.name}")
        readme_path.write_text(f"{before}{begin}\n\n{own}\n\n{end}{after}")
    return markdown(results, f"results/{figure.name}")


def markdown(results: dict, figure: str) -> str:
    """A section of RESULTS.md."""
    cells, ceilings = results["cells"], results["ceilings"]
    parts = [
        f"## {results['machine']['name']}, end to end",
        f"torch {results['machine']['torch']}, {every(cells, 'date')}, "
        f"commits {every(cells, 'commit')}. "
        f"Copy {ceilings['bandwidth_gb_s']:.0f} GB/s, matrix product "
        f"{max(ceilings['gemm_tflop_s'].values()):.0f} TFLOP/s.",
        NOTES,
        table(target_rows(cells)),
        f"![Throughput and memory]({figure})",
        table(decode_rows(cells, ceilings)),
        table(prefill_rows(cells)),
        table(train_rows(cells)),
        remarks(cells),
        *(profile(cell) for cell in cells.values() if "kernels" in cell),
        *(f"LEFT OUT, {name}: {c['failure']}" for name, c in cells.items() if "failure" in c),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def readme(results: dict, figure: str) -> str:
    """The table of README.md: one row for each model."""
    cells = results["cells"]
    columns = {
        "decode, batch 1, 1,024 tokens": ("decode", 1, 0),
        "batch 128, 1,024 tokens": ("decode", 128, 0),
        "batch 64 at 8,192": ("decode", 64, 8192),
        "best batch at 8,192": ("decode", MAX, 8192),
        "prefill (4, 8192)": ("prefill", 4, 8192),
        "prefill (1, 131072)": ("prefill", 1, 131072),
    }
    rows = [("tokens per ms", *columns)]
    for model in (OURS, BEST, PAPER):
        found = [find(cells, work, model, b, t) for work, b, t in columns.values()]
        if any(found):
            rows.append((ROLES[model], *(compared(cells, cell) for cell in found)))
    machine, date = results["machine"], every(cells, "date")
    where = f"{machine['name']}, torch {machine['torch']}, {date}"
    picture = f"![Throughput and memory]({figure})"
    parts = [f"{where}, bf16:", table(rows), table(train_rows(cells)), remarks(cells), picture]
    return "\n\n".join(part for part in parts if part)


def every(cells: dict, key: str) -> str:
    return ", ".join(sorted({cell[key] for cell in cells.values()}))


def remarks(cells: dict) -> str:
    """What has been written by hand into the cells about them."""
    found = [f"- {name}: {cell['remark']}" for name, cell in cells.items() if "remark" in cell]
    return "\n".join(found)


def find(cells: dict, work: str, model: str, batch, length: int) -> dict | None:
    cell = cells.get(f"{work} {model} B{batch} T{length}")
    return cell if cell and "median_ms" in cell else None


def rate(cell: dict | None) -> str:
    if cell is None:
        return "–"
    digits = f"{cell['tokens_per_ms']:.3g}"
    if cell["batch"] < 0:
        digits += f" ({cell['rows']} rows)"
    return digits + "^" * cell.get("caches_shared_by_layers", False)


def compared(cells: dict, cell: dict | None) -> str:
    """Its rate, and how many times as long as ours it takes."""
    ratio = times(cells, cell, OURS) if cell else ""
    return f"{rate(cell)}, {ratio}" if ratio else rate(cell)


def of_work(cells: dict, work: str) -> list[dict]:
    """Measured cells of a kind, by size, ours first."""
    own = [c for c in cells.values() if c["work"] == work and "median_ms" in c]
    order = list(ROLES)
    return sorted(own, key=lambda c: (c["length"], c["batch"] % 2**31, order.index(c["model"])))


def times(cells: dict, cell: dict, ours: str) -> str:
    """How many times as long a model takes for a token as ours does."""
    batch = MAX if cell["batch"] < 0 else cell["batch"]
    own = find(cells, cell["work"], ours, batch, cell["length"])
    if own is None or cell["model"] == ours:
        return ""
    return f"{own['tokens_per_ms'] / cell['tokens_per_ms']:.2f}x"


def decode_rows(cells: dict, ceilings: dict):
    header = ("context", "batch", "model", "ms a step", "samples", "tokens per ms", "x", "of floor")
    yield (*header, "peak GB", "commit", "attention")
    for cell in of_work(cells, "decode"):
        floor = cell["bytes"] / ceilings["bandwidth_gb_s"] / 1e6
        batch = f"{cell['rows']} (max)" if cell["batch"] < 0 else str(cell["batch"])
        yield (
            str(cell["length"]),
            batch + "^" * cell.get("caches_shared_by_layers", False),
            ROLES[cell["model"]],
            f"{cell['median_ms']:.3f}",
            str(cell["samples"]),
            f"{cell['tokens_per_ms']:.3g}",
            times(cells, cell, OURS),
            f"{floor / cell['median_ms']:.0%}",
            f"{cell['peak_gb']:.1f}",
            cell["commit"],
            cell.get("attention", ""),
        )


def target_rows(cells: dict):
    """What was aimed at, and what came out of it."""
    yield ("target, of an H200", "at least", "measured")
    for what, least, form, *size, other in TARGETS:
        value = target_value(cells, *size, other)
        yield (what, format(least, form), "not measured" if value is None else format(value, form))
    own = [find(cells, "decode", OURS, 1, n) for n in (100, 100_000)]
    change = "not measured"
    if all(own):
        change = f"{own[1]['median_ms'] / own[0]['median_ms'] - 1:+.2%}"
    yield ("decode, token 100,000 against token 100, time", "within ±2%", change)


def target_value(cells: dict, work: str, batch, length: int, other: str | None) -> float | None:
    ours = find(cells, work, SMALL_OURS if work == "train" else OURS, batch, length)
    if ours is None or other in (None, MFU):
        return ours and ours["mfu" if other else "tokens_per_ms"]
    theirs = find(cells, work, other, batch, length)
    return theirs and ours["tokens_per_ms"] / theirs["tokens_per_ms"]


def prefill_rows(cells: dict):
    yield ("prefill (B, T)", "model", "ms", "samples", "tokens per ms", "x", "peak GB", "commit")
    for cell in of_work(cells, "prefill"):
        yield (
            f"({cell['batch']}, {cell['length']})",
            ROLES[cell["model"]],
            f"{cell['median_ms']:.1f}",
            str(cell["samples"]),
            f"{cell['tokens_per_ms']:.3g}",
            times(cells, cell, OURS),
            f"{cell['peak_gb']:.1f}",
            cell["commit"],
        )


def train_rows(cells: dict):
    header = ("training step (B, T)", "model", "ms", "samples", "tokens per s", "x", "MFU")
    yield (*header, "peak GB", "commit")
    for cell in of_work(cells, "train"):
        yield (
            f"({cell['batch']}, {cell['length']})",
            ROLES[cell["model"]],
            f"{cell['median_ms']:.1f}",
            str(cell["samples"]),
            f"{1e3 * cell['tokens_per_ms']:,.0f}",
            times(cells, cell, SMALL_OURS),
            f"{cell['mfu']:.1%}",
            f"{cell['peak_gb']:.1f}",
            cell["commit"],
        )


def profile(cell: dict) -> str:
    """The kernels of a step down to a hundredth of it."""
    rows = [("share", "ms", "calls", "kernel")]
    rows += [
        (f"{k['share']:.1%}", f"{k['ms']:.3f}", str(k["calls"]), f"`{k['name'][:80]}`")
        for k in cell["kernels"]
        if k["share"] >= 0.01
    ]
    title = (
        f"{cell['work']}, {ROLES[cell['model']]}, batch {cell['batch']}, {cell['length']} tokens: "
        f"{cell['median_ms']:.3f} ms, kernels {cell['kernel_ms']:.3f} ms, commit {cell['commit']}"
    )
    return f"{title}\n\n{table(rows)}"


def table(rows) -> str:
    header, *body = rows
    if not body:
        return ""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict, path: Path):
    """Throughput against batch and against context, memory of a sequence against context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    figure, (by_batch, by_context, memory) = plt.subplots(1, 3, figsize=(13, 4))
    own = of_work(results["cells"], "decode")
    for model, color in zip((OURS, BEST, PAPER), ("C0", "C1", "C2")):
        for length, style in ((0, "-"), (8192, "--"), (32768, ":")):
            points = [
                (c["rows"], c["tokens_per_ms"])
                for c in own
                if (c["model"], c["length"]) == (model, length)
            ]
            line(by_batch, points, color + style, ROLES[model] if length == 0 else None)
        for batch, style in ((1, "--"), (32, ":"), (128, "-")):
            points = []
            for c in own:
                if (c["model"], c["batch"]) == (model, batch):
                    lengths = c.get("points_ms", {str(c["length"] or 512): c["median_ms"]})
                    points += [(int(n), batch / ms) for n, ms in lengths.items()]
            line(by_context, points, color + style)
        with torch.device("meta"):
            shape = Based(PRESETS[model]).to(torch.bfloat16)
        lengths = [2**i for i in range(7, 18)]
        sizes = [(n, shape.state_size(n) / 1e6) for n in lengths]
        line(memory, sizes, color + "--" if model == PAPER else color, ROLES[model])
    titles = {
        by_batch: "decode: 1,024 tokens (-), at 8,192 (--), 32,768 (:)",
        by_context: "decode: batch 1 (--), 32 (:), 128 (-)",
        memory: "state of one sequence",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="batch" if axes is by_batch else "context")
        axes.set_ylabel("MB" if axes is memory else "tokens per ms")
    memory.legend(fontsize=7)
    date = every(results["cells"], "date")
    figure.suptitle(f"{results['machine']['name']}, bf16, {date}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def line(axes, points: list[tuple[float, float]], style: str, label: str | None = None):
    """Through points in the order of x; nothing if there are none."""
    if points:
        axes.plot(*zip(*sorted(points)), style, marker="o", ms=3, label=label)
