"""Commands and their parsers: errors are one line, and options cannot be abbreviated."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from idiolect.core.errors import UsageError, did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors are usage errors of one line."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        def layout(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)

        super().__init__(**settings, allow_abbrev=False, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        """Raise a usage error that points to the help."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed arguments.

        Raises:
            UsageError: if one is missing, wrong or unknown.
        """
        found, rest = self.parse_known_args(arguments)
        if rest:
            known = [option for option in self.format_help().split() if option.startswith("--")]
            self.error(f"unknown argument {rest[0]}{did_you_mean(rest[0], known)}")
        return found


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        name: the word after `idiolect`.
        about: one line, for the list of commands and for the command's own help.
        usage: its arguments, as the help shows them.
        add: adds its arguments to a parser.
        act: runs it and returns its exit code, None for 0.
    """

    name: str
    about: str
    usage: str
    add: Callable[[Parser], None]
    act: Callable[[argparse.Namespace], int | None]

    def parser(self) -> Parser:
        """Return the parser of the command."""
        prog = f"idiolect {self.name}"
        made = Parser(prog=prog, usage=f"{prog} {self.usage}".rstrip(), description=self.about)
        made.set_defaults(act=self.act)
        self.add(made)
        return made
