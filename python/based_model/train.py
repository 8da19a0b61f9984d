"""Trains a Based model, by default a small byte-level one on the Python standard library's sources.

    python -m based_model.train
    python -m based_model.train --resume runs/NAME

The recipe is the paper's (AdamW, warm-up, cosine, clipping) at a size that two CPU cores finish
in minutes. At the end it prints bits per byte on held-out files, and a generated sample.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from based_model import checkpoint as ckpt
from based_model.cli import run_cli
from based_model.config import ConfigError
from based_model.data import WindowSampler, compressed_bits_per_byte, load_corpus, valid_batches
from based_model.generate import Sampling, stream_text
from based_model.log import RunLog
from based_model.model import Based
from based_model.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from based_model.settings import TrainConfig
from based_model.signals import StopSignal


class Trainer:
    """A model in training: everything that a checkpoint has to bring back.

    Equal settings and an equal step mean equal weights, bit for bit on the CPU with the same
    number of threads, whether or not the run was interrupted on the way.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.corpus = load_corpus(
            config.data, config.valid_data, config.valid_share, config.token_dtype
        )
        self.model = Based(config.model_config(self.corpus.vocab_size)).to(config.device)
        self.optimizer = build_optimizer(
            self.model, config.weight_decay, (config.beta1, config.beta2)
        )
        self.batches = WindowSampler(
            self.corpus.train, config.batch_size, config.seqlen, config.seed
        )
        self.step = 0
        if config.resume is not None:
            self._resume(ckpt.find_checkpoint(config.resume))

    def training_step(self) -> dict[str, float]:
        """One optimizer step on the next batch; returns what to log of it."""
        config = self.config
        lr = learning_rate(self.step, config.steps, config.warmup_steps, config.lr, config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        inputs, targets = self._checked(*next(self.batches))
        loss = 0.0
        part_size = config.batch_size // config.accumulate
        for part in zip(inputs.split(part_size), targets.split(part_size), strict=True):
            # Equal parts: the mean of their means is the batch's.
            part_loss = self.loss(*part) / config.accumulate
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}, learning rate {lr}; "
                "this step was not taken and nothing was saved"
            )
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; inputs and targets (B,T)."""
        device, bf16 = self.config.device, self.config.precision == "bf16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = self.model(inputs.to(device))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten())

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray) -> float:
        """Nats per token of a text, each window of seqlen tokens predicted from its own start."""
        nats = 0.0
        for inputs, targets in valid_batches(
            tokens, self.config.batch_size // self.config.accumulate, self.config.seqlen
        ):
            nats += self.loss(*self._checked(inputs, targets)).item() * targets.numel()
        return nats / (len(tokens) - 1)

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
        path = ckpt.save_checkpoint(run, self.step, self.model, state)
        ckpt.keep_newest(run, self.config.keep)
        return path

    def _resume(self, path: Path):
        config = self.config
        saved = ckpt.load_model(path, config.device)
        if saved.config != self.model.config:
            raise ConfigError(
                f"resume: expected the model of {path}, {saved.config}, got {self.model.config}"
            )
        self.model.load_state_dict(saved.state_dict())
        values = ckpt.load_training_values(path)
        if values["text"] != self.corpus.fingerprint():
            raise ConfigError(f"data: expected the text that {path} was trained on, got another")
        tensors = ckpt.load_training_tensors(path, config.device)
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        torch.set_rng_state(tensors["torch_rng"].cpu())
        self.batches.load_state_dict(values["batches"])
        self.step = values["step"]
        if self.step > config.steps:
            raise ConfigError(f"steps: expected at least the {self.step} done, got {config.steps}")

    def _checked(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        vocab_size = self.model.config.vocab_size
        largest = max(inputs.max().item(), targets.max().item())
        if largest >= vocab_size:
            raise ConfigError(f"data: expected token ids below {vocab_size}, got {largest}")
        return inputs, targets


def train(config: TrainConfig) -> dict[str, float]:
    """Runs or continues one training; returns held-out nats per token and bits per byte.

    SIGINT and SIGTERM let the step finish, save, and return an empty dict.
    """
    from tqdm import tqdm

    run = _run_folder(config)
    trainer = Trainer(config)
    if config.resume is not None and config.out is None:
        for path in ckpt.set_aside_newer(ckpt.find_checkpoint(config.resume)):
            print(f"newer than the checkpoint to continue from, set aside: {path}")
    log = RunLog(run / "log.jsonl", trainer.step)
    describe(trainer)
    tokens_per_step = config.batch_size * config.seqlen
    part = trainer.corpus.valid[: 16 * config.seqlen + 1]
    bar = tqdm(
        total=config.steps * tokens_per_step,
        initial=trainer.step * tokens_per_step,
        unit="tok",
        unit_scale=True,
    )
    with bar, StopSignal() as stop:
        while trainer.step < config.steps and not stop.name:
            started = time.perf_counter()
            record = trainer.training_step()
            log.write({**record, "tokens_per_s": tokens_per_step / (time.perf_counter() - started)})
            bar.update(tokens_per_step)
            bar.set_postfix_str(f"step {trainer.step}, loss {record['loss']:.3f}")
            if trainer.step % config.eval_every == 0 and trainer.step < config.steps:
                loss = trainer.evaluate(part)
                log.write({"step": trainer.step, "valid_loss": loss})
                bar.write(f"step {trainer.step}: loss {loss:.3f} on a part of the held-out text")
            if trainer.step % config.save_every == 0 and trainer.step < config.steps:
                trainer.save(run)
        saved = trainer.save(run)
    if trainer.step < config.steps:
        print(f"{stop.name} after step {trainer.step}: saved {saved}, continue with --resume {run}")
        return {}
    return report(trainer, saved, log)


def describe(trainer: Trainer):
    """What is about to run, on the screen."""
    config, corpus, model = trainer.config, trainer.corpus, trainer.model
    unit = "bytes" if corpus.is_bytes else "tokens"
    print(
        f"{config.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config.precision} on {config.device}, {torch.get_num_threads()} threads\n"
        f"layers: {' '.join(model.config.layers)}\n"
        f"state after {config.seqlen} tokens: {model.state_size(config.seqlen):,} bytes\n"
        f"text: {len(corpus.train):,} {unit} of {len(corpus.train_files)} files to train on, "
        f"{len(corpus.valid):,} of {len(corpus.valid_files)} held out"
    )


def report(trainer: Trainer, saved: Path, log: RunLog) -> dict[str, float]:
    """What the run has come to: held-out loss beside general compressors, and a sample."""
    config = trainer.config
    tokens = trainer.corpus.valid[: config.max_valid_tokens]
    loss = trainer.evaluate(tokens)
    results = {"loss": loss}
    print(f"\nheld-out loss: {loss:.4f} nats per token over {len(tokens):,} tokens")
    if trainer.corpus.is_bytes:
        results["bits_per_byte"] = loss / math.log(2)
        results |= compressed_bits_per_byte(tokens.tobytes())
        sampling = Sampling()
        prompt = config.sample_prompt
        pieces = stream_text(trainer.model, prompt, config.sample_bytes, sampling, config.seed)
        print(f"sample (prefill, then recurrent decode, temperature {sampling.temperature}):\n")
        print(prompt + "".join(pieces))
        print(
            f"\nheld-out bits per byte: model {results['bits_per_byte']:.3f}, "
            f"gzip {results['gzip']:.3f}, xz {results['xz']:.3f}"
        )
    log.write({"step": trainer.step, **results})
    print(f"checkpoint: {saved}")
    return results


def _run_folder(config: TrainConfig) -> Path:
    """Where the run writes; a run that is there already is continued only when asked to."""
    if config.resume is not None and config.out is None:
        return ckpt.find_checkpoint(config.resume).parent
    run = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if ckpt.list_checkpoints(run):
        raise ConfigError(f"out: {run} holds a run already; --resume {run} continues it")
    return run


def main():
    """The command line. With --resume the run's own settings are the defaults."""
    run_cli(TrainConfig, train, prog="python -m based_model.train", defaults=_resumed_settings)


def _resumed_settings(argv: list[str]) -> TrainConfig | None:
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    resume = parser.parse_known_args(argv)[0].resume
    if resume is None:
        return None
    values = ckpt.load_training_values(ckpt.find_checkpoint(resume))
    return TrainConfig.from_dict({**values["settings"], "out": None, "resume": str(resume)})


if __name__ == "__main__":
    main()
