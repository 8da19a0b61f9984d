"""One training of a recall model, as a generator of steps that others can run in between."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from based_model.config import ConfigError
from based_model.mqar_data import TASKS, Examples
from based_model.mqar_models import H3, Attention, BaseConv, Linear, RecallModel
from based_model.mqar_rivals import RIVALS

MixerName = Literal[
    "based", "based-window", "attention", "window", "conv", "h3",
    "mamba", "mamba2", "rwkv7", "gla", "deltanet", "gated-deltanet",
]  # fmt: skip
# The sizes that make a difference to a mixer, beside d_model.
SIZES = {
    "based": ("feature_dim",),
    "based-window": ("feature_dim", "window"),
    "window": ("window",),
    "h3": ("state_dim",),
} | {name: rival.sizes for name, rival in RIVALS.items()}

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one training is made of; equal settings are the same run."""

    # Token mixers: a BaseConv and then the named one; conv, h3 and the Mambas twice instead;
    # based-window has a sliding window before the linear attention. The last six need fla.
    mixer: MixerName = "based"
    # Width of the model.
    d_model: int = 64
    # Width of q and k before the feature map (based).
    feature_dim: int = 16
    # Tokens that are seen, the own one included (window, based-window).
    window: int = 64
    # Size of a state: of every channel's (h3, mamba), or the width of a head's keys.
    state_dim: int = 16
    # Examples to learn and to be tested on (based_model.mqar_data.TASKS).
    tasks: Literal["cpu", "paper"] = "cpu"
    # Learning rate at the start; a cosine over the epochs takes it to zero.
    lr: float = 1e-2
    # Passes over the examples at most.
    epochs: int = 32
    # Stop above this accuracy.
    enough: float = 0.99
    # Examples per step.
    batch_size: int = 256
    # AdamW's weight decay, of everything.
    weight_decay: float = 0.1
    # Dropout of the embedding.
    dropout: float = 0.1
    # bf16: activations and the weights they meet are bfloat16; AdamW keeps fp32 weights.
    precision: Literal["fp32", "bf16"] = "fp32"
    # Seed of the examples, the weights and the batches.
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("mixer", get_args(MixerName)),
            ("tasks", tuple(TASKS)),
            ("precision", ("fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        for name in ("d_model", "feature_dim", "window", "state_dim", "epochs", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        if self.mixer == "h3":
            for name in ("d_model", "state_dim"):
                if getattr(self, name) % 2:
                    raise ConfigError(f"{name}: expected an even number, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"lr: expected > 0, got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")

    def settings(self) -> dict:
        """The settings that count, for JSON: two runs with equal ones are the same."""
        values = dataclasses.asdict(self)
        sizes = SIZES.get(self.mixer, ())
        unused = {"feature_dim", "window", "state_dim"} - set(sizes)
        return {name: value for name, value in values.items() if name not in unused}

    def name(self) -> str:
        """The settings that usually differ, in a few words."""
        sizes = " ".join(f"{name} {getattr(self, name)}" for name in SIZES.get(self.mixer, ()))
        return f"{self.mixer} d_model {self.d_model} {sizes}".rstrip() + f" lr {self.lr:.1e}"


def build_model(config: RunConfig) -> RecallModel:
    """A new model in fp32 on the CPU, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    tasks, d_model = TASKS[config.tasks], config.d_model
    if config.mixer in ("conv", "h3"):
        make = {"conv": lambda: BaseConv(d_model), "h3": lambda: H3(d_model, config.state_dim)}
        mixers = [make[config.mixer]() for _ in range(2)]
    elif config.mixer in RIVALS:
        mixers = RIVALS[config.mixer].mixers(d_model, config.state_dim)
    else:
        mixers = [BaseConv(d_model)]
        if config.mixer != "based":
            window = None if config.mixer == "attention" else config.window
            mixers.append(Attention(d_model, tasks.seqlen, window))
        if config.mixer in ("based", "based-window"):
            mixers.append(Linear(d_model, config.feature_dim))
    residual_only = config.mixer in ("mamba", "mamba2")
    return RecallModel(tasks.vocab_size, d_model, mixers, config.dropout, not residual_only)


class Run:
    """One training. work() does it a step at a time; record() says what has come of it.

    On a GPU every shape's step and the test are captured in CUDA graphs the second time they come
    up, and all goes to a stream of its own: work() of several runs side by side fills the GPU.
    """

    def __init__(
        self,
        config: RunConfig,
        train: list[Examples],
        test: list[Examples],
        device: str,
        graphs: bool = True,
    ):
        self.config, self.train, self.test = config, train, test
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.graphs = graphs and self.cuda
        self.started = time.perf_counter()
        self.epoch, self.loss, self.accuracy, self.by_task = 0, math.nan, 0.0, []
        self.curve: list[float] = []  # the accuracy after every epoch
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None  # of all its graphs
        self.model = build_model(config)
        self.state_bytes = 4 * self.model.state_size()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.autocast = config.precision == "bf16" and not self.model.low_precision()
        with self._on_stream():
            self._flatten()
            self.lr = torch.tensor(config.lr, device=self.device)
            self.optimizer = torch.optim.AdamW(
                [self.master],
                lr=self.lr,
                weight_decay=config.weight_decay,
                fused=True,
                capturable=self.cuda,
            )
            self.loss_sum = torch.zeros((), device=self.device)
            self.steps = [self._make_step(examples) for examples in train]
            self.evaluate = self._captured(self._evaluate)

    def work(self) -> Iterator[None]:
        """Trains; yields wherever another run may go on. The device works ahead of this."""
        config = self.config
        order = torch.Generator().manual_seed(config.seed)
        for epoch in range(config.epochs):
            with self._on_stream():
                self.lr.fill_(config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2)
                self.loss_sum.zero_()
                batches = self._batches(order)
            for task, rows in batches:
                with self._on_stream():
                    self.steps[task](rows)
                yield
            with self._on_stream():
                results = self.evaluate()
                results = torch.stack((*results, self.loss_sum / len(batches)))
                results = results.to("cpu", non_blocking=True)
                done = torch.cuda.Event() if self.cuda else None
                if done:
                    done.record(self.stream)
            while done and not done.query():
                yield
            *by_task, self.loss = results.tolist()
            counts = [len(examples) for examples in self.test]
            self.accuracy = sum(a * n for a, n in zip(by_task, counts)) / sum(counts)
            self.curve.append(round(self.accuracy, 4))
            self.epoch = epoch + 1
            self.by_task = [
                [examples.tokens.shape[1], examples.answers.shape[1], round(accuracy, 5)]
                for examples, accuracy in zip(self.test, by_task)
            ]
            if self.accuracy > config.enough or not math.isfinite(self.loss):
                return
            yield

    def record(self) -> dict:
        """What has come of it so far, for JSON."""
        return {
            "run": self.config.settings(),
            "accuracy": round(self.accuracy, 5),
            "by_task": self.by_task,  # seqlen, pairs, accuracy
            "curve": self.curve,
            "loss": round(self.loss, 5) if math.isfinite(self.loss) else None,
            "epochs": self.epoch,
            "state_bytes": self.state_bytes,
            "parameters": self.parameters,
            "seconds": round(time.perf_counter() - self.started, 2),
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "cpu",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    def close(self):
        """Frees its graphs and what they hold on to. It takes no step after that."""
        self.steps, self.evaluate = [], None

    def _on_stream(self):
        return torch.cuda.stream(self.stream) if self.cuda else contextlib.nullcontext()

    def _flatten(self):
        """Moves all weights into one vector: master, fp32, with a bf16 copy of it if wanted."""
        self.params: list[nn.Parameter] = list(self.model.parameters())
        flat = torch.cat([p.detach().flatten() for p in self.params])
        self.master = nn.Parameter(flat.to(self.device))
        self.weights = self.master.data
        if self.config.precision == "bf16" and not self.autocast:
            self.weights = self.master.data.bfloat16()
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, self.weights.split(sizes)):
            p.data = part.view_as(p)

    def _update(self, loss: Tensor):
        """One step of AdamW for all weights at once."""
        grads = torch.autograd.grad(loss, self.params)
        self.master.grad = torch.cat([g.flatten() for g in grads]).float()
        self.optimizer.step()
        if self.weights.dtype != torch.float32:
            self.weights.copy_(self.master.detach())
        self.loss_sum += loss.detach()

    def _captured(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """work; on a GPU captured in a CUDA graph at the second call."""
        graph, calls, result = None, 0, None

        def call():
            nonlocal graph, calls, result
            calls += 1
            if not self.graphs or calls == 1:
                return work()
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                gc.disable()  # it could find another run's graphs, and freeing them ends a capture
                try:
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    result = work()
                    graph.capture_end()
                finally:
                    gc.enable()
            graph.replay()
            return result

        return call

    def _make_step(self, examples: Examples) -> Callable[[Tensor], None]:
        """A function that takes the rows (B,) of a batch and makes one step with them."""
        rows = torch.zeros(self.config.batch_size, dtype=torch.int64, device=self.device)

        def step():
            batch = examples.rows(rows)
            with self._autocast():
                loss = self.model.loss(batch.tokens, batch.positions, batch.answers)
            self._update(loss)

        step = self._captured(step)

        def step_with(new_rows: Tensor):
            rows.copy_(new_rows)
            step()

        return step_with

    def _autocast(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=not self.cuda
        )

    def _batches(self, order: torch.Generator) -> list[tuple[int, Tensor]]:
        """An epoch's batches, (task, rows (B,)), in random order; no batch mixes tasks."""
        size = self.config.batch_size
        batches = []
        for task, examples in enumerate(self.train):
            rows = torch.randperm(len(examples), generator=order)
            rows = rows[: len(rows) // size * size].view(-1, size).to(self.device)
            batches += [(task, part) for part in rows]
        return [batches[i] for i in torch.randperm(len(batches), generator=order)]

    @torch.no_grad()
    def _evaluate(self) -> list[Tensor]:
        """The share of right answers in each test task."""
        self.model.eval()
        accuracies = []
        for examples in self.test:
            right = torch.zeros((), device=self.device)
            part = max(1, 65536 // examples.tokens.shape[1])
            for first in range(0, len(examples), part):
                batch = examples.rows(slice(first, first + part))
                with self._autocast():
                    predicted = self.model.predict(batch.tokens, batch.positions)
                right += (predicted == batch.answers).sum()
            accuracies.append(right / examples.answers.numel())
        self.model.train()
        return accuracies
