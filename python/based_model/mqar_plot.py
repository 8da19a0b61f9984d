"""Accuracy against bytes of state: our results and the published ones, as a PNG.

python -m based_model.mqar_plot bench/results/mqar-*.jsonl figure.png
"""

import json
import math
import sys
from pathlib import Path

PUBLISHED_EPOCHS = 32
# log2 of the bytes of state, accuracy: read off Figure 2 of the Based paper (arXiv 2402.18668 v2).
PUBLISHED = {
    "based": [
        (12.54, 0.538),
        (13.52, 0.710),
        (14.51, 0.817),
        (15.29, 0.891),
        (16.28, 0.974),
        (16.37, 0.955),
        (17.27, 0.991),
        (18.26, 0.990),
        (19.35, 0.997),
    ],
    "window": [
        (13, 0.071),
        (14, 0.143),
        (15, 0.310),
        (16, 0.513),
        (17, 0.654),
        (18, 0.798),
        (19, 0.936),
        (20, 1.0),
    ],
    "mamba": [
        (13, 0.570),
        (14, 0.608),
        (15, 0.773),
        (16, 0.801),
        (17, 0.894),
        (18, 0.910),
        (19, 0.863),
    ],
    "h3": [(13, 0.186), (15, 0.255), (17, 0.313), (19, 0.360)],
    "hyena": [(19, 0.204), (20, 0.339), (21, 0.454), (22, 0.506)],
    "attention": [(20, 1.0)],
    # Newer, their convolutions' state counted.
    "rwkv7": [(14, 0.816), (17, 0.914), (20, 0.981)],
    "mamba2": [(13, 0.520), (16.6, 0.844)],
    "gla": [(16, 0.950)],
    "deltanet": [(15, 0.963)],
    "gated-deltanet": [(16, 0.989)],
}


def best_of_models(records: list[dict]) -> list[dict]:
    """The best learning rate's record of every model, by mixer and bytes of state."""
    best = {}
    for record in records:
        model = tuple(sorted((k, v) for k, v in record["run"].items() if k != "lr"))
        if model not in best or record["accuracy"] > best[model]["accuracy"]:
            best[model] = record
    return sorted(best.values(), key=lambda r: (r["run"]["mixer"], r["state_bytes"]))


def published_accuracy(record: dict) -> float | None:
    """The published point of a record's mixer at its bytes of state, if there is one."""
    if record["run"]["tasks"] != "paper":
        return None
    size = math.log2(record["state_bytes"])
    points = PUBLISHED.get(record["run"]["mixer"], [])
    return next((accuracy for at, accuracy in points if abs(at - size) < 0.03), None)


def shortened(record: dict) -> bool:
    """Whether a run had fewer epochs than the paper's tasks are learnt in."""
    return record["run"]["tasks"] == "paper" and record["run"]["epochs"] < PUBLISHED_EPOCHS


def plot_results(records: list[dict], file: Path):
    """Draws ours (dots, a line through the best of at most so many bytes; circles after fewer
    epochs) beside the published.

    The published points belong to the paper's tasks and are drawn only beside results on these.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    best = best_of_models(records)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = [record["state_bytes"] for record in best]
    axes.set_xscale("log", base=2)
    mixers = list(dict.fromkeys(record["run"]["mixer"] for record in best))
    published = any(record["run"]["tasks"] == "paper" for record in best)
    names = list(dict.fromkeys([*PUBLISHED, *mixers]))
    for name in names if published else mixers:
        shade, kind = divmod(names.index(name), 10)
        color = colormaps["tab20"](2 * kind + shade)
        ours = [r for r in best if r["run"]["mixer"] == name]
        for epochs in sorted({r["run"]["epochs"] for r in ours if shortened(r)}):
            short = [r for r in ours if r["run"]["epochs"] == epochs]
            points = [(r["state_bytes"], r["accuracy"]) for r in short]
            axes.plot(
                *zip(*points), "o", color=color, mfc="white", label=f"{name}, {epochs} epochs"
            )
        points = [(r["state_bytes"], r["accuracy"]) for r in ours if not shortened(r)]
        if points:
            best_yet = [p for p in points if all(p[1] > q[1] for q in points if q[0] < p[0])]
            axes.plot(*zip(*points), "o", color=color, label=name)
            axes.plot(*zip(*best_yet), color=color)
        if published and name in PUBLISHED:
            points = [(2**size, accuracy) for size, accuracy in PUBLISHED[name]]
            axes.plot(*zip(*points), "x--", color=color, alpha=0.5, label=f"{name}, published")
    low, high = axes.get_xlim()
    axes.set(xlim=(min(low, min(sizes) / 2), max(high, 2 * max(sizes))), ylim=(0, 1.03))
    axes.set(xlabel="bytes of state", ylabel="accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    plot_results(
        [json.loads(line) for source in sources for line in source.read_text().splitlines()], target
    )
