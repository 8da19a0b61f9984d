"""The log of a run: one JSON object per line and TensorBoard's files, up to the newest weights."""

import json
from pathlib import Path


class RunLog:
    """Appends records to RUN/log.jsonl and to RUN/tensorboard.

    What is past the step that a run continues from is dropped.
    """

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        if path.exists():
            lines = [line for line in read_log(run) if line["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(path)
        self.file = path.open("a")
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def write(self, record: dict):
        """One line of numbers, one of them the step."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, record["step"])

    def close(self):
        self.file.close()
        self.tensorboard.close()


def read_log(run: Path) -> list[dict]:
    """The records of a run's log; a last line that a crash cut short is left out."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
