"""Several finished runs on the same text, side by side.

python -m based_model.train --preset transformer-cpu --out runs/transformer
python -m based_model.train --preset based-cpu --out runs/based
python -m based_model.compare runs/transformer runs/based
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from based_model.checkpoint import find_checkpoint, load_config, load_training_values
from based_model.cli import Positional, run_cli
from based_model.config import ConfigError
from based_model.log import read_log
from based_model.model import Based
from based_model.plot import plot_runs

# What makes two losses comparable, of the settings.
SAME = ("steps", "batch_size", "seqlen")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compares the held-out loss of finished runs with the first one's, and draws all curves."""

    # Folders of runs that saw equally much of the same text.
    runs: Annotated[tuple[Path, ...], Positional]
    # Where to draw the curves.
    out: Path = Path("compare.png")

    def __post_init__(self):
        if len(self.runs) < 2:
            raise ConfigError(f"runs: expected at least two folders, got {len(self.runs)}")


def compare(config: CompareConfig) -> list[dict]:
    """Prints and returns a row per run; ConfigError if the runs cannot be compared."""
    rows = [_row(run) for run in config.runs]
    for row in rows[1:]:
        for name in ("text", *SAME):
            if row[name] != rows[0][name]:
                raise ConfigError(
                    f"{row['run']}: {name}: expected that of {rows[0]['run']}, "
                    f"{rows[0][name]}, got {row[name]}"
                )
    in_bits = all("valid_bits_per_byte" in row for row in rows)
    key, unit = ("valid_bits_per_byte", "bits/byte") if in_bits else ("valid_loss", "nats/token")
    print(
        f"{'run':24} {'preset':20} {'parameters':>13} {'held-out ' + unit:>20} {'difference':>11}"
    )
    for row in rows:
        print(
            f"{str(row['run']):24} {row['preset']:20} {row['parameters']:13,} {row[key]:20.4f} "
            f"{row[key] - rows[0][key]:+11.4f}"
        )
    bytes_per_token = None
    if in_bits:
        bytes_per_token = rows[0]["valid_loss"] / math.log(2) / rows[0][key]
    plot_runs(list(config.runs), config.out, bytes_per_token)
    print(f"loss curves: {config.out}")
    return rows


def _row(run: Path) -> dict:
    checkpoint = find_checkpoint(run)
    values = load_training_values(checkpoint)
    settings = values["settings"]
    last = read_log(run)[-1]
    if values["step"] != settings["steps"] or "valid_loss" not in last:
        raise ConfigError(
            f"{run}: expected a finished run of {settings['steps']} steps, got one that is at "
            f"{values['step']}"
        )
    with torch.device("meta"):
        model = Based(load_config(checkpoint))
    return {
        "run": run,
        "preset": settings["preset"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": values["text"],
        **{name: settings[name] for name in SAME},
        **last,
    }


if __name__ == "__main__":
    run_cli(CompareConfig, compare, prog="python -m based_model.compare", packages=("matplotlib",))
