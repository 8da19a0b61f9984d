"""The log of a run: one JSON object per line, the history of the newest weights."""

import json
from pathlib import Path


class RunLog:
    """Appends records to a file; lines past the step that a run continues from are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in read_log(path) if line["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(path)
        self.file = path.open("a")

    def write(self, record: dict):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a crash cut short is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
