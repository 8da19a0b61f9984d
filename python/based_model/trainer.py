"""A model in training, one optimizer step after the other, and what a checkpoint keeps of it."""

import math
from pathlib import Path

import torch
from torch import Tensor

from based_model import checkpoint as ckpt
from based_model.config import ConfigError
from based_model.data import WindowSampler, load_corpus, valid_batches
from based_model.model import Based
from based_model.optim import (
    build_optimizer,
    empty_optimizer_tensors,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from based_model.parallel import backward_of_part, current_ranks, spread, whole
from based_model.settings import TrainConfig
from based_model.text import text_to_train_on


class Trainer:
    """A model in training: everything that a checkpoint has to bring back.

    Equal settings and an equal step mean equal weights, bit for bit on the CPU with the same
    number of threads, whether or not the run was interrupted on the way. With several ranks each
    works on its share of every batch, and all take the same step.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.ranks = config, current_ranks()
        if config.batch_size % (config.accumulate * self.ranks.count):
            raise ConfigError(
                f"batch_size: expected a multiple of accumulate ({config.accumulate}) times "
                f"processes ({self.ranks.count}), got {config.batch_size}"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.text = text_to_train_on(config.tokenizer, config.end_token)
        self.corpus = load_corpus(
            config.data,
            config.valid_data,
            config.valid_share,
            config.token_dtype,
            self.text,
            config.max_valid,
        )
        if (size := self.corpus.vocab_size) and config.vocab_size not in (None, size):
            raise ConfigError(
                f"vocab_size: expected the {size} tokens of the text, got {config.vocab_size}"
            )
        resume = None if config.resume is None else ckpt.find_checkpoint(config.resume)
        self.model = Based(config.model_config(self.corpus.vocab_size))
        if resume is not None:
            self._load_weights(resume)
        self.model.checkpoint_activations = config.checkpoint_activations
        if config.compile:
            self.model.compile_training()
        # What forward and backward go through; its parameters are those of self.model.
        self.module = spread(self.model, config.parallel, torch.device(config.device))
        self.optimizer = build_optimizer(
            self.model, config.weight_decay, (config.beta1, config.beta2)
        )
        self.batches = WindowSampler(
            self.corpus.train,
            config.batch_size,
            config.seqlen,
            config.seed,
            self.ranks.rank,
            self.ranks.count,
        )
        self.step = 0
        if resume is not None:
            self._load_training(resume)

    def training_step(self) -> dict[str, float]:
        """One optimizer step on the next batch; returns what to log of it."""
        config = self.config
        lr = learning_rate(self.step, config.steps, config.warmup_steps, config.lr, config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        inputs, targets = self._checked(*next(self.batches))
        losses = []
        parts = zip(inputs.split(self._part_size), targets.split(self._part_size), strict=True)
        for i, part in enumerate(parts):
            # Equal parts: the mean of their means is the batch's.
            with backward_of_part(self.module, last=i + 1 == config.accumulate):
                part_loss = self.loss(*part) / config.accumulate
                part_loss.backward()
            losses.append(part_loss.detach())
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        norm, *losses = torch.stack([norm, *losses]).tolist()  # waits for the GPU, once a step
        loss = self.ranks.sum(sum(losses)) / self.ranks.count
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._report_non_finite(loss, norm, lr))
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; inputs and targets (B,T)."""
        device, bf16 = self.config.device, self.config.precision == "bf16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            return self.module(inputs.to(device), targets=targets.to(device))

    @torch.no_grad()
    def evaluate(self, windows: int | None = None) -> float:
        """Nats per token of the held-out text, each window predicted from its own start.

        Of all of it, or of about so many windows that lie evenly in it.
        """
        rank, count = self.ranks.rank, self.ranks.count
        tokens, seqlen = self.corpus.valid, self.config.seqlen
        every = 1 if windows is None else max(1, len(tokens) // (seqlen * windows))
        nats = targets_seen = 0.0
        # The odd shapes at the end of the text are not worth compiling for.
        with torch.compiler.set_stance("force_eager" if self.config.compile else "default"):
            for batch in valid_batches(tokens, self._part_size * count, seqlen, every):
                inputs, targets = self._checked(*batch)
                targets_seen += targets.numel()
                # With fewer windows than ranks some repeat the first: all must run the model.
                mine = slice(rank, None, count) if rank < len(inputs) else slice(1)
                loss = self.loss(inputs[mine], targets[mine]).item()
                nats += loss * targets[mine].numel() if rank < len(inputs) else 0.0
        return self.ranks.sum(nats) / targets_seen

    def save(self, run: Path) -> Path:
        """Writes a checkpoint of this step, then deletes all but the newest ones."""
        tensors = optimizer_tensors(self.model, self.optimizer)
        tensors["torch_rng"] = torch.get_rng_state()
        values = {
            "step": self.step,
            "settings": self.config.to_dict(),
            "batches": self.batches.state_dict(),
            "text": self.corpus.fingerprint(),
        }
        state = ckpt.TrainingState(values, tensors)
        path = ckpt.save_checkpoint(run, self.step, self.model, state, self.config.tokenizer)
        if self.ranks.is_main:
            ckpt.keep_newest(run, self.config.keep)
        return path

    @property
    def _part_size(self) -> int:
        """Windows that this rank runs through the model at once."""
        return self.config.batch_size // (self.config.accumulate * self.ranks.count)

    def _load_weights(self, path: Path):
        saved = ckpt.load_model(path)
        if saved.config != self.model.config:
            raise ConfigError(
                f"resume: expected the model of {path}, {saved.config}, got {self.model.config}"
            )
        self.model.load_state_dict(saved.state_dict())

    def _load_training(self, path: Path):
        values = ckpt.load_training_values(path)
        if values["text"] != self.corpus.fingerprint():
            raise ConfigError(f"data: expected the text that {path} was trained on, got another")
        like = {**empty_optimizer_tensors(self.model), "torch_rng": torch.get_rng_state()}
        tensors = ckpt.load_training_tensors(path, like)
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        torch.set_rng_state(tensors["torch_rng"])
        self.batches.load_state_dict(values["batches"])
        self.step = values["step"]
        if self.step > self.config.steps:
            steps = self.config.steps
            raise ConfigError(f"steps: expected at least the {self.step} done, got {steps}")

    def _checked(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        vocab_size = self.model.config.vocab_size
        largest = max(inputs.max().item(), targets.max().item())
        if largest >= vocab_size:
            raise ConfigError(f"data: expected token ids below {vocab_size}, got {largest}")
        return inputs, targets

    def _report_non_finite(self, loss: float, norm: float, lr: float) -> str:
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not whole(p.grad).isfinite().all()
        ]
        where = f"{len(bad)} gradients, first {bad[0]}" if bad else "no gradient"
        return (
            f"step {self.step + 1}: expected a finite loss, got loss {loss}, gradient norm {norm} "
            f"at learning rate {lr}; not finite: {where}. This step was not taken and nothing was "
            "saved"
        )
