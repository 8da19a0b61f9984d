"""The loss curves of runs, as a PNG."""

import math
from pathlib import Path

import numpy as np

from based_model.log import read_log


def plot_runs(runs: list[Path], file: Path, bytes_per_token: float | None = None):
    """Draws the losses of runs, in nats per token, over their steps.

    Thin: every step's training loss; thick: its mean over a fiftieth of the run; dots: held-out
    text. bytes_per_token adds a second axis in bits per byte.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        records = read_log(run)
        steps, losses = np.array([(r["step"], r["loss"]) for r in records if "loss" in r]).T
        width = math.ceil(len(losses) / 50)
        means = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps, losses, color=f"C{i}", linewidth=0.5, alpha=0.4)
        axes.plot(steps[width - 1 :], means, color=f"C{i}", label=f"{run.name}, training")
        valid = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
        if valid:
            axes.plot(*zip(*valid), "o", color=f"C{i}", label=f"{run.name}, held out")
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    if bytes_per_token is not None:
        scale = math.log(2) * bytes_per_token
        second = axes.secondary_yaxis("right", functions=(lambda y: y / scale, lambda y: y * scale))
        second.set_ylabel("bits per byte")
    figure.savefig(file, dpi=120)
