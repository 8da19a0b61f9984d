"""Several runs, one after the other, in the process group that torchrun opens for this file.

torchrun --nproc-per-node 2 two_processes.py RUNS.json, a list of settings of based_model.train. One
with the extra key "signal_at" gets a SIGTERM in that step, in one of the processes only.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import training  # noqa: F401, which adds the preset "tiny"
from based_model.parallel import process_group
from based_model.settings import TrainConfig
from based_model.train import train
from based_model.trainer import Trainer

training_step = Trainer.training_step


def main():
    with process_group() as ranks:
        for settings in json.loads(Path(sys.argv[1]).read_text()):
            signal_at = settings.pop("signal_at", None)

            def step_with_signal(trainer):
                if trainer.step + 1 == signal_at and ranks.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return training_step(trainer)

            with mock.patch.object(Trainer, "training_step", step_with_signal):
                assert bool(train(TrainConfig.from_dict(settings))) == (signal_at is None)


if __name__ == "__main__":
    main()
