"""What a result was measured with: the commit, and the machine's name as part of a file's."""

import re
import subprocess
from pathlib import Path


def commit() -> str:
    """Short hash of what is measured, with -dirty for changes on top."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def slug(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
