"""The entry point: find the command, build its parser, run it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from idiolect.cli import sites
from idiolect.cli.parser import Command, Parser
from idiolect.core.errors import UsageError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 after a failed run, 2 after a usage error, 130 after Ctrl-C.
    """
    try:
        given = parse(sys.argv[1:] if arguments is None else arguments)
        code: int | None = given.act(given)
        return code or 0
    except UsageError as error:
        print(f"idiolect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nidiolect: stopped{''.join(stopped.args)}", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments of a command, and as `act` the function that runs it.

    Raises:
        UsageError: if there is no such command, or an argument is missing, wrong or unknown.

    Example:
        >>> parse(["compare", "--methods", "fedbn", "local", "--rounds", "5"]).methods
        ['fedbn', 'local']
        >>> parse(["comapre"])
        Traceback (most recent call last):
        idiolect.UsageError: unknown command 'comapre' (did you mean compare?); see idiolect --help
    """
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return COMMANDS[name].parser().read(arguments[1:])
    if name and not name.startswith("-"):
        hint = f" (did you mean {_MEANT[name]}?)" if name in _MEANT else did_you_mean(name, COMMANDS)
        raise UsageError(f"unknown command {name!r}{hint}; see idiolect --help")
    if _top().read(arguments).version:
        from importlib.metadata import version

        print(f"idiolect {version('idiolect')}")
        raise SystemExit(0)
    raise UsageError("which command? see idiolect --help")


def _top() -> Parser:
    """Return the parser of ``idiolect --help`` and ``--version``."""
    parser = Parser(
        prog="idiolect",
        usage="idiolect COMMAND ...",
        description="Personalized federated learning: compare methods on your data.",
        epilog="idiolect COMMAND --help shows the settings of a command.",
    )
    for title, commands in (("commands", SIMULATION), ("commands for real sites", sites.COMMANDS)):
        lines = [f"{command.name:10} {command.about}" for command in commands]
        parser.add_argument_group(title, "\n".join(lines))
    parser.add_argument("--version", action="store_true", help="show the version")
    return parser


def _add_run(parser: Parser) -> None:
    from idiolect.cli.settings import Experiment, add_settings

    parser.add_argument("file", nargs="?", metavar="FILE.toml", help="settings, by the names below: local_epochs = 5")
    add_settings(parser, Experiment.model_fields)


def _run(given: argparse.Namespace) -> None:
    from idiolect.cli.settings import experiment_of

    experiment = experiment_of(given)  # what is wrong is said before PyTorch is loaded
    from idiolect.cli import train

    train.run_one(experiment)


def _add_compare(parser: Parser) -> None:
    from idiolect.cli.settings import METHODS, Experiment, add_settings

    listed = f"methods to compare (default: {' '.join(METHODS)})"
    parser.add_argument("file", nargs="?", metavar="FILE.toml", help="settings, by the names below")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=listed)
    parser.add_argument("--seeds", nargs="+", metavar="N", help="one run of each method per seed (default: 0)")
    add_settings(parser, [name for name in Experiment.model_fields if name not in ("method", "seed")])


def _compare(given: argparse.Namespace) -> None:
    from idiolect.cli.settings import comparison_of

    experiment, methods, seeds = comparison_of(given)
    from idiolect.cli import train

    train.run_several(experiment, methods, seeds, chosen=bool(given.methods))


def _methods(given: argparse.Namespace) -> None:
    from rich.console import Console

    from idiolect.cli import catalog

    catalog.show(Console())


def _add_describe(parser: Parser) -> None:
    from idiolect.cli.settings import GROUPS, add_settings

    parser.add_argument("method", metavar="METHOD", help="such as fedbn, or 'fedbn + sam(0.05)'")
    add_settings(parser, [*GROUPS["data"], "model"])


def _describe(given: argparse.Namespace) -> None:
    from rich.console import Console

    from idiolect.cli import screens
    from idiolect.cli.settings import experiment_of

    screens.describe_method(Console(), given.method, experiment_of(given))


def _add_data(parser: Parser) -> None:
    from idiolect.cli.settings import GROUPS, add_settings

    parser.add_argument("name", nargs="?", metavar="NAME", help="a named set, or a file of your own")
    add_settings(parser, [*GROUPS["data"][1:], *GROUPS["clients"], "seed"])


def _data(given: argparse.Namespace) -> None:
    from rich.console import Console

    from idiolect.cli import screens
    from idiolect.cli.settings import experiment_of

    experiment = experiment_of(given)
    if given.name is None:
        unused = sorted(experiment.model_fields_set - {"data_dir"})
        if unused:
            raise UsageError(f"--{unused[0].replace('_', '-')} is for the clients of one set: idiolect data NAME")
        screens.data_sets(Console(), experiment.data_dir)
    else:
        screens.data_set(Console(), experiment.model_copy(update={"data": given.name}))


_SETTINGS = "[FILE.toml] [--setting VALUE ...]"
SIMULATION = (
    Command("run", "Train with one method.", _SETTINGS, _add_run, _run),
    Command("compare", "Train with several methods, on the same data and seeds.", _SETTINGS, _add_compare, _compare),
    Command("methods", "List the methods.", "", lambda parser: None, _methods),
    Command("describe", "Show a method's parts.", "METHOD [--setting VALUE ...]", _add_describe, _describe),
    Command("data", "List data sets, or show the clients of one.", "[NAME] [--setting VALUE ...]", _add_data, _data),
)
_MEANT = {"train": "run", "fit": "run", "start": "run", "list": "methods", "show": "describe", "help": "--help"}
"""Words for a command that are spelled otherwise."""
COMMANDS = {command.name: command for command in (*SIMULATION, *sites.COMMANDS)}
"""All commands by name."""
