"""From a config dataclass to a command line, with every failure of the user's as one line."""

import sys
from collections.abc import Callable
from typing import TypeVar

from based_model.checkpoint import CheckpointError
from based_model.config import ConfigError

Config = TypeVar("Config")


def run_cli(
    config_class: type[Config],
    run: Callable[[Config], object],
    prog: str,
    defaults: Callable[[list[str]], Config | None] = lambda argv: None,
):
    """Parses sys.argv into config_class and calls run with it; exits 2 on what the user can fix.

    defaults may look at the arguments and give an instance whose values stand where no argument
    does.
    """
    try:
        import safetensors  # noqa: F401
        import tqdm  # noqa: F401
        import tyro
    except ImportError as error:
        sys.exit(
            f"error: {error}; install the [train] extra, or: pip install tyro tqdm safetensors"
        )
    try:
        default = defaults(sys.argv[1:])
        given = {} if default is None else {"default": default}
        run(tyro.cli(config_class, prog=prog, **given))
    except (CheckpointError, ConfigError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
