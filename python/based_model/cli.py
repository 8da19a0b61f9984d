"""From a config dataclass to a command line, with every failure of the user's as one line."""

import importlib
import sys
from collections.abc import Callable
from typing import TypeVar

from based_model.checkpoint import CheckpointError
from based_model.config import ConfigError

try:  # how an argument of a config class looks on the command line
    from tyro.conf import Positional
    from tyro.conf import UseAppendAction as Repeatable
except ImportError:  # run_cli says what to install
    Positional = Repeatable = None

Config = TypeVar("Config")


def run_cli(
    config_class: type[Config],
    run: Callable[[Config], object],
    prog: str,
    packages: tuple[str, ...] = (),
    defaults: Callable[[list[str]], Config | None] = lambda argv: None,
):
    """Parses sys.argv into config_class and calls run with it; exits 2 on what the user can fix.

    packages are those that run will need beside tyro: better to miss one now than at the end.
    defaults may look at the arguments and give an instance whose values stand where no argument
    does.
    """
    try:
        import tyro

        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        names = " ".join(("tyro", *packages))
        sys.exit(f"error: {error}; install the [train] extra, or: pip install {names}")
    try:
        default = defaults(sys.argv[1:])
        given = {} if default is None else {"default": default}
        run(tyro.cli(config_class, prog=prog, **given))
    except (CheckpointError, ConfigError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
