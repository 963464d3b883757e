"""The command line: ``idiolect run``, ``compare``, ``methods``, ``describe`` and ``data``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console

from idiolect.errors import UsageError, did_you_mean

GROUPS = {
    "data": ("data", "data_dir", "label", "client"),
    "clients": ("split", "clients", "shift", "test", "val", "size"),
    "method": ("method", "model"),
    "training": (
        *("rounds", "participation", "seed", "lr", "local_epochs", "batch_size"),
        *("optimiser", "schedule", "clip"),
    ),
    "results": ("evaluate_every", "directory", "resume"),
}
"""Settings as they are grouped in the help."""

METHODS = ("local", "fedavg", "fedavg_ft", "fedbn", "fedfsa")
"""What is compared when nothing is said."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a usage error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _main(list(arguments))
    except UsageError as error:
        print(f"idiolect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("idiolect: stopped", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    parser = _parser()
    found, rest = parser.parse_known_args(arguments)
    if rest:
        known = [o for o in found.parser._option_string_actions if o.startswith("--")]
        raise UsageError(f"unknown argument {rest[0]}{did_you_mean(rest[0], known)}; see {found.parser.prog} --help")
    run: int = found.act(found)
    return run
