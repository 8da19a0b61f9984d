"""Recall against state size: trains small models on MQAR and draws their accuracy.

    python -m based_model.mqar                                   # a few minutes on two CPU cores
    python -m based_model.mqar --mixer based --d-model 64 --feature-dim 16 --lr 3e-3 1e-2
    python -m based_model.mqar --sweep bench/mqar/based.json --device cuda --parallel 8

Every finished run is a line of JSON in the results file, and is not run again; the best learning
rate of a model counts. The recipe and the published points are those of the Based paper's Figure 2
(arXiv 2402.18668).
"""

import dataclasses
import functools
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from based_model.cli import run_cli
from based_model.config import ConfigError
from based_model.mqar_data import TASKS, generate_all
from based_model.mqar_plot import best_of_models, plot_results, published_accuracy
from based_model.mqar_run import MixerName, Run, RunConfig
from based_model.signals import StopSignal

# Based, and a sliding window with as many bytes of state as it has.
DEMONSTRATION = [
    RunConfig(mixer="based", d_model=64, feature_dim=8, batch_size=128, epochs=8),
    RunConfig(mixer="window", d_model=64, window=22, batch_size=128, epochs=8),
]


@dataclass(frozen=True, kw_only=True)
class MqarConfig(RunConfig):
    """Trains models to recall values by their keys; without a mixer or a sweep, a demonstration."""

    mixer: MixerName | None = None
    # Learning rates to try, a run each.
    lr: tuple[float, ...] = (1e-2,)
    # JSON: {"shared": {settings}, "grids": [{settings, lists of them for several runs}, ...]}.
    sweep: Path | None = None
    # Results, one line of JSON a run; new ones are added.
    out: Path = Path("runs/mqar.jsonl")
    # The figure; default: beside the results.
    plot: Path | None = None
    # Where to train: cpu, cuda, cuda:1 ...; several share the runs.
    device: tuple[str, ...] = ("cpu",)
    # Runs side by side on a device.
    parallel: int = 1
    # On a GPU: capture the steps in CUDA graphs; without, for looking at what goes wrong.
    graphs: bool = True
    # Seconds after which to stop; what is not finished is not kept.
    time_limit: float | None = None
    # CPU threads; default: as many as torch finds cores.
    threads: int | None = None
    # Leave out the other learning rates of a model once one has reached `enough`.
    first_enough: bool = False
    # Give a run up that is so far behind another learning rate's at the same epoch, from a quarter
    # of its epochs on. Never raises what a model reaches.
    give_up_behind: float | None = None

    def __post_init__(self):
        for name in ("parallel", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if not self.device:
            raise ConfigError("device: expected at least one, got none")
        if self.sweep is not None and self.mixer is not None:
            raise ConfigError("sweep: expected it without a mixer: the file names its own")
        self.runs()  # raises what the runs have to say about their settings

    def runs(self) -> list[RunConfig]:
        """The runs asked for."""
        if self.sweep is not None:
            return read_sweep(self.sweep)
        if self.mixer is None:
            return DEMONSTRATION
        names = {field.name for field in dataclasses.fields(RunConfig)}
        values = {name: getattr(self, name) for name in names}
        return [RunConfig(**{**values, "lr": lr}) for lr in self.lr]


def read_sweep(path: Path) -> list[RunConfig]:
    """The runs of a sweep file; ConfigError says what is wrong with it."""
    try:
        values = json.loads(path.read_text())
        shared, grids = values.get("shared", {}), values["grids"]
        if unknown := sorted(set(values) - {"shared", "grids"}):
            raise ConfigError(f"{path}: expected the keys shared and grids, got {unknown}")
        runs = []
        for grid in grids:
            grid = {**grid, **{name: shared[name] for name in shared if name not in grid}}
            choices = [value if isinstance(value, list) else [value] for value in grid.values()]
            for combination in itertools.product(*choices):  # the last name's change fastest
                runs.append(RunConfig(**dict(zip(grid, combination))))
        return runs
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a sweep: {error!r}") from error


def model_of(settings: dict) -> str:
    """All settings but the learning rate, as a key."""
    return json.dumps({k: v for k, v in settings.items() if k != "lr"}, sort_keys=True)


class Results:
    """The results file. A line that a crash cut short is dropped."""

    def __init__(self, path: Path):
        self.path, self.records = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                os.truncate(path, len(whole))
            self.records = [json.loads(line) for line in whole.splitlines()]

    def has(self, config: RunConfig) -> bool:
        return any(record["run"] == config.settings() for record in self.records)

    def append(self, record: dict):
        """In one write: the file has whole lines at any time."""
        line = json.dumps(record).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)
        self.records.append(record)


class Rivalry:
    """Which learning rates of a model are worth going on with."""

    def __init__(self, config: MqarConfig, results: Results):
        self.config = config
        self.best = {}  # by model and epoch: the highest accuracy
        self.reached = set()
        for record in results.records:
            run = RunConfig(**record["run"])
            for epoch, accuracy in enumerate(record["curve"], 1):
                self.hopeless(run, epoch, accuracy)

    def hopeless(self, run: RunConfig, epoch: int, accuracy: float) -> bool:
        """To be asked after every epoch, which it keeps in mind, and with epoch 0 before a run."""
        model = model_of(run.settings())
        if accuracy > run.enough:
            self.reached.add(model)
        if self.config.first_enough and model in self.reached and accuracy <= run.enough:
            return True
        best = self.best[model, epoch] = max(accuracy, self.best.get((model, epoch), 0.0))
        behind = self.config.give_up_behind
        return behind is not None and epoch >= run.epochs / 4 and accuracy < best - behind


def run_all(config: MqarConfig, results: Results, stop: StopSignal) -> bool:
    """Runs what the results lack, several at a time; False if stopped before the end."""
    from tqdm import tqdm

    started = time.perf_counter()
    rivalry = Rivalry(config, results)
    waiting = deque(run for run in config.runs() if not results.has(run))

    @functools.cache
    def examples(tasks: str, seed: int, device: str):
        if device == "cpu":
            return generate_all(TASKS[tasks], seed)
        return tuple([part.to(device) for part in half] for half in examples(tasks, seed, "cpu"))

    def start(run: RunConfig) -> tuple[Run, Iterator[None]]:
        used = [str(other.device) for other, _ in active]
        device = min(devices, key=used.count)
        run = Run(run, *examples(run.tasks, run.seed, device), device, config.graphs)
        return run, run.work()

    devices = [str(torch.device(device)) for device in config.device]
    active: list[tuple[Run, Iterator[None]]] = []
    with tqdm(total=sum(run.epochs for run in waiting), unit="epoch", smoothing=0.1) as bar:
        while waiting or active:
            while waiting and len(active) < config.parallel * len(devices):
                if rivalry.hopeless(waiting[0], 0, 0.0):
                    bar.write(f"{waiting[0].name()}: left out, another learning rate is enough")
                    bar.update(waiting.popleft().epochs)
                else:
                    active.append(start(waiting.popleft()))
            for entry in active.copy():
                run, steps = entry
                epoch = run.epoch
                ended = next(steps, steps) is steps
                if run.epoch > epoch:
                    bar.update()
                    bar.set_postfix_str(
                        f"{run.config.name()}, epoch {run.epoch}: loss {run.loss:.3f}, "
                        f"accuracy {run.accuracy:.3f}"
                    )
                    ended |= rivalry.hopeless(run.config, run.epoch, run.accuracy)
                if ended:
                    active.remove(entry)
                    bar.update(run.config.epochs - run.epoch)
                    record = run.record()
                    results.append(record)
                    bar.write(summary(record, run.config.name()))
                    run.close()
            late = config.time_limit and time.perf_counter() - started > config.time_limit
            if stop.number or late:
                for run, _ in active:
                    bar.write(
                        f"{run.config.name()}: stopped after {run.epoch} epochs "
                        f"at {run.accuracy:.3f}"
                    )
                return False
    return True


def summary(record: dict, name: str) -> str:
    published = published_accuracy(record)
    beside = "" if published is None else f" (published: {published:.3f})"
    return (
        f"{name}: accuracy {record['accuracy']:.3f}{beside}, {record['state_bytes']:,} bytes of "
        f"state, {record['epochs']} epochs, {record['seconds']:.0f} s"
    )


def mqar(config: MqarConfig) -> list[dict]:
    """Runs, prints the best of each model and draws the figure; returns all results."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    for device in config.device:
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:  # torch's where there is no such GPU
            raise ConfigError(f"device: expected one that torch has, got {device}") from error
    started = time.perf_counter()
    results = Results(config.out)
    with StopSignal() as stop:
        finished = run_all(config, results, stop)
    print(f"{'all runs done' if finished else 'stopped'} in {time.perf_counter() - started:.0f} s")
    for record in best_of_models(results.records):
        run = RunConfig(**record["run"])
        print(summary(record, run.name()))
    if results.records:
        plot = config.plot or config.out.with_suffix(".png")
        plot_results(results.records, plot)
        print(f"figure: {plot}")
    return results.records


def main():
    run_cli(MqarConfig, mqar, prog="python -m based_model.mqar", packages=("matplotlib", "tqdm"))


if __name__ == "__main__":
    main()
