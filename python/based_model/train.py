"""Trains a Based model, by default a small byte-level one on the Python standard library's sources.

    python -m based_model.train
    python -m based_model.train --resume runs/NAME

The recipe is the paper's (AdamW, warm-up, cosine, clipping) at a size that two CPU cores finish
in minutes. At the end it prints bits per byte on held-out files, a generated sample, and where the
loss curve is.
"""

import signal
import time
from pathlib import Path

import torch

from based_model import checkpoint as ckpt
from based_model.cli import run_cli
from based_model.config import ConfigError
from based_model.data import compressed_bits_per_byte
from based_model.generate import Sampling, stream_text
from based_model.log import RunLog
from based_model.parallel import current_ranks, process_group
from based_model.plot import plot_runs
from based_model.settings import TrainConfig
from based_model.signals import StopSignal
from based_model.text import ByteText
from based_model.trainer import Trainer

PART = 32  # windows of the held-out text that are looked at on the way
PACKAGES = ("matplotlib", "safetensors", "tensorboard", "tqdm")


def train(config: TrainConfig) -> dict[str, float]:
    """Runs or continues one training; returns held-out nats per token and bits per byte.

    SIGINT and SIGTERM let the step finish, save, and return an empty dict. Every rank of a
    process group calls this; the main one prints and writes.
    """
    ranks = current_ranks()
    run = _run_folder(config)
    trainer = Trainer(config)
    log = None
    if ranks.is_main:
        if config.resume is not None and config.out is None:
            for path in ckpt.set_aside_newer(ckpt.find_checkpoint(config.resume)):
                print(f"newer than the checkpoint to continue from, set aside: {path}")
        log = RunLog(run, trainer.step)
        describe(trainer)
    try:
        with StopSignal() as stop:
            number = run_steps(trainer, run, log, stop)
            saved = trainer.save(run)
        if trainer.step < config.steps:
            if ranks.is_main:
                name = signal.Signals(number).name
                print(f"{name} after step {trainer.step}: saved {saved}")
                print(f"continue with --resume {run}")
            return {}
        return report(trainer, saved, log)
    except FloatingPointError as error:
        saved = ckpt.list_checkpoints(run)
        newest = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise FloatingPointError(f"{error}; {newest}") from error
    finally:
        if log is not None:
            log.close()


def run_steps(trainer: Trainer, run: Path, log: RunLog | None, stop: StopSignal) -> int:
    """Trains to the last step, or to the signal whose number is returned, and saves on the way."""
    from tqdm import tqdm

    config, ranks = trainer.config, trainer.ranks
    tokens_per_step = config.batch_size * config.seqlen
    bar = tqdm(
        total=config.steps * tokens_per_step,
        initial=trainer.step * tokens_per_step,
        unit="tok",
        unit_scale=True,
        disable=not ranks.is_main,
    )
    with bar:
        while trainer.step < config.steps:
            started = time.perf_counter()
            record = trainer.training_step()
            seconds = time.perf_counter() - started
            if log is not None:
                log.write({**record, "tokens_per_s": tokens_per_step / seconds})
            bar.update(tokens_per_step)
            bar.set_postfix_str(f"step {trainer.step}, loss {record['loss']:.3f}")
            # A signal may have reached one rank only.
            if number := int(ranks.max(stop.number)):
                return number
            if trainer.step == config.steps:
                break
            if trainer.step % config.eval_every == 0:
                results = evaluate(trainer, PART)
                if log is not None:
                    log.write({"step": trainer.step, **results})
                    bar.write(f"step {trainer.step}: held out, {in_words(results)}")
            if trainer.step % config.save_every == 0:
                trainer.save(run)
    return 0


def evaluate(trainer: Trainer, windows: int | None = None) -> dict[str, float]:
    """The loss on the held-out text, or a part of it: nats per token and bits per byte."""
    loss = trainer.evaluate(windows)
    results = {"valid_loss": loss}
    if trainer.corpus.valid_text is not None:
        results["valid_bits_per_byte"] = trainer.corpus.bits_per_byte(loss)
    return results


def in_words(results: dict[str, float]) -> str:
    words = f"{results['valid_loss']:.4f} nats per token"
    if "valid_bits_per_byte" in results:
        words += f", {results['valid_bits_per_byte']:.4f} bits per byte"
    return words


def describe(trainer: Trainer):
    """What is about to run, on the screen."""
    config, corpus, model, ranks = trainer.config, trainer.corpus, trainer.model, trainer.ranks
    unit = "bytes" if isinstance(trainer.text, ByteText) and corpus.vocab_size else "tokens"
    processes = f"{ranks.count} processes ({config.parallel})" if ranks.count > 1 else "1 process"
    print(
        f"{config.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config.precision} on {config.device}, {processes} of {torch.get_num_threads()} threads\n"
        f"layers: {' '.join(model.config.layers)}\n"
        f"state after {config.seqlen} tokens: {model.state_size(config.seqlen):,} bytes\n"
        f"text: {len(corpus.train):,} {unit} of {len(corpus.train_files)} files to train on, "
        f"{len(corpus.valid):,} of {len(corpus.valid_files)} held out"
    )


def report(trainer: Trainer, saved: Path, log: RunLog | None) -> dict[str, float]:
    """What the run has come to: held-out loss beside general compressors, a sample, the curve."""
    config, corpus = trainer.config, trainer.corpus
    results = evaluate(trainer)
    if log is None:
        return results
    print(f"\nheld-out loss over {len(corpus.valid):,} tokens: {in_words(results)}")
    bytes_per_token = None
    if corpus.valid_text is not None:
        bytes_per_token = len(corpus.valid_text) / len(corpus.valid)
        results |= compressed_bits_per_byte(corpus.valid_text)
        sampling = Sampling()
        model = ckpt.load_model(saved, config.device)
        print(f"sample (prefill, then recurrent decode, temperature {sampling.temperature}):\n")
        pieces = stream_text(
            model, trainer.text, config.sample_prompt, config.sample_tokens, sampling, config.seed
        )
        print(config.sample_prompt + "".join(pieces))
        print(
            f"\nheld-out bits per byte: model {results['valid_bits_per_byte']:.3f}, "
            f"gzip {results['gzip']:.3f}, xz {results['xz']:.3f}"
        )
    log.write({"step": trainer.step, **results})
    run = saved.parent
    plot_runs([run], run / "loss.png", bytes_per_token)
    print(f"loss curve: {run / 'loss.png'}")
    print(f"checkpoint: {saved}")
    return results


def _run_folder(config: TrainConfig) -> Path:
    """Where the run writes; a run that is there already is continued only when asked to."""
    if config.resume is not None and config.out is None:
        return ckpt.find_checkpoint(config.resume).parent
    run = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    run = current_ranks().from_main(run)
    if ckpt.list_checkpoints(run):
        raise ConfigError(f"out: {run} holds a run already; --resume {run} continues it")
    return run


def main():
    """The command line. With --resume the run's own settings are the defaults."""
    with process_group():
        run_cli(
            TrainConfig,
            train,
            prog="python -m based_model.train",
            packages=PACKAGES,
            defaults=_resumed_settings,
        )


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
