"""The command line: ``idiolect run``, ``compare``, ``methods``, ``describe``, ``data``; and for real sites the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console

from idiolect.cli import screens
from idiolect.cli.compare import compare
from idiolect.cli.experiment import Experiment, check, command, read_toml, run
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.engines.base import Engine
from idiolect.flower import commands, simulation
from idiolect.registry.expression import evaluate
from idiolect.report import RunSummary, comparison, select
from idiolect.report.tables import number

GROUPS = {
    "data": ("data", "data_dir", "label", "client"),
    "clients": ("split", "clients", "shift", "test", "val", "size"),
    "method and model": ("method", "model"),
    "training": (
        *("rounds", "participation", "seed", "lr", "local_epochs", "batch_size"),
        *("optimizer", "schedule", "clip", "evaluate_every"),
    ),
    "machine": ("engine", "device", "precision"),
    "results": ("directory", "resume"),
}
"""Settings, grouped as in the help."""

METHODS = ("local", "fedavg", "fedavg_ft", "fedbn", "fedfsa")
"""What is compared where nothing is said."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 if a run failed, 2 after a usage error, 130 after Ctrl-C."""
    try:
        given = _parse(sys.argv[1:] if arguments is None else arguments)
        return given.act(given) or 0
    except UsageError as error:
        print(f"idiolect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nidiolect: stopped{''.join(stopped.args)}", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        def layout(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=26)

        super().__init__(**settings, allow_abbrev=False, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="idiolect", description="Personalized federated learning: compare methods on your data.")
    parser.add_argument("--version", action="version", version=f"idiolect {version('idiolect')}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")

    def verb(name: str, act: Callable[[argparse.Namespace], int | None], about: str, usage: str) -> _Parser:
        made: _Parser = verbs.add_parser(name, help=about, description=about, usage=f"idiolect {name} {usage}")
        made.set_defaults(act=act, parser=made)
        return made

    every = list(Experiment.model_fields)
    one = verb("run", _run, "Train with one method.", "[FILE.toml] [--setting VALUE ...]")
    one.add_argument("file", nargs="?", metavar="FILE.toml", help="settings, by the names below: local_epochs = 5")
    _settings(one, every)
    several = verb(
        "compare",
        _compare,
        "Train with several methods on the same data, seeds and initial weights.",
        "[FILE.toml] [--setting VALUE ...]",
    )
    several.add_argument("file", nargs="?", metavar="FILE.toml", help="settings, by the names below")
    several.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"what to compare (default: {' '.join(METHODS)})"
    )
    several.add_argument("--seeds", nargs="+", metavar="N", help="one run of each method per seed (default: 0)")
    _settings(several, [name for name in every if name not in ("method", "seed")])
    verb("methods", lambda _: screens.methods(Console()), "List the methods.", "")
    about = verb("describe", _describe, "Say what a method does, keeps and sends.", "METHOD [--setting VALUE ...]")
    about.add_argument("method", metavar="METHOD", help="such as fedbn, or 'fedbn + sam(0.05)'")
    _settings(about, [*GROUPS["data"], "model"])
    held = verb("data", _data, "List data sets, or say who holds what.", "[NAME] [--setting VALUE ...]")
    held.add_argument("name", nargs="?", metavar="NAME", help="a named set, or a file of your own")
    _settings(held, [*GROUPS["data"][1:], *GROUPS["clients"], "seed"])

    for verb_of_sites in commands.ALL:
        verb_of_sites(verb)

    found, rest = parser.parse_known_args(arguments)
    if rest:
        known = [option for option in found.parser.format_help().split() if option.startswith("--")]
        raise UsageError(f"unknown argument {rest[0]}{did_you_mean(rest[0], known)}; see {found.parser.prog} --help")
    return found


def _settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for title, members in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in (member for member in members if member in names):
            field = Experiment.model_fields[name]
            default = "" if field.default is None or field.default is False else f" (default: {field.default})"
            flag, text = f"--{name.replace('_', '-')}", f"{field.description}{default}"
            if field.annotation is bool:
                group.add_argument(flag, action="store_const", const="true", default=argparse.SUPPRESS, help=text)
            else:
                group.add_argument(flag, metavar=_metavar(field.annotation), default=argparse.SUPPRESS, help=text)


def _metavar(kind: Any) -> str:  # noqa: ANN401 - any annotation
    kind = (get_args(kind) or (kind,))[0]
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _experiment(given: argparse.Namespace, file: dict[str, Any] | None = None) -> Experiment:
    """Return the settings of the file with those of the flags on top."""
    flags = {name: value for name, value in vars(given).items() if name in Experiment.model_fields}
    on_top = check(flags, flags=True)
    try:
        base = check(file or {})
    except UsageError as error:
        raise UsageError(f"{given.file}: {error}") from None
    return base.model_copy(update={name: getattr(on_top, name) for name in flags})


def _with_directory(experiment: Experiment) -> Experiment:
    if experiment.directory or experiment.resume:
        return experiment
    return experiment.model_copy(update={"directory": Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")})


def _run(given: argparse.Namespace) -> None:
    experiment = _with_directory(_experiment(given, read_toml(given.file) if given.file else None))
    try:
        done = run(experiment, progress=sys.stderr.isatty(), engine=_engine(experiment))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*_way_on(experiment, "run")) from None
    for note in done.notes:
        print(f"idiolect: {note}", file=sys.stderr)
    _results([done.summary()], experiment)


def _compare(given: argparse.Namespace) -> None:
    file = read_toml(given.file) if given.file else {}
    methods = _texts("methods", given.methods or file.pop("methods", METHODS))
    seeds = _numbers("seeds", given.seeds or file.pop("seeds", (0,)))
    for name in ("methods", "seeds"):
        file.pop(name, None)
    experiment = _with_directory(_experiment(given, file))
    told = None if sys.stderr.isatty() else _tell
    try:
        runs = compare(experiment, methods, seeds, progress=told is None, on_run=told, engine=_engine(experiment))
    except KeyboardInterrupt:
        more = ("--methods", *methods, "--seeds", *map(str, seeds))
        raise KeyboardInterrupt(*_way_on(experiment, "compare", *more)) from None
    _results(runs, experiment)


def _engine(experiment: Experiment) -> Engine | None:
    """Return the engine where it is Flower's, such as ``flower(cpus=2)``; None where it is one of our own."""
    if experiment.engine.partition("(")[0].strip().lower() != "flower":
        return None
    engine: Engine = evaluate(experiment.engine, {"flower": simulation}, "engine")  # type: ignore[assignment]
    return engine


def _texts(name: str, values: Any) -> list[str]:  # noqa: ANN401 - whatever the file holds
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{name} = {values!r} is not a list of text")
    return list(values)


def _numbers(name: str, values: Any) -> list[int]:  # noqa: ANN401
    try:
        return [int(str(value)) for value in values]
    except (TypeError, ValueError):
        raise UsageError(f"{name} = {values!r} is not a list of whole numbers") from None


def _way_on(experiment: Experiment, verb: str, *more: str) -> tuple[str, ...]:
    if experiment.directory is None or not experiment.directory.exists():
        return ()
    going_on = experiment.model_copy(update={"resume": True})
    return (f"; go on with: {command(going_on, verb, *more, places=True)}",)


def _tell(run: RunSummary) -> None:
    last = select(run.records, run.metric, run.higher_is_better).last
    value = number(last.personalized["mean"] if last else None, run.metric)
    print(f"{run.label}, seed {run.seed}: {run.metric} {value}", file=sys.stderr, flush=True)


def _results(runs: list[RunSummary], experiment: Experiment) -> None:
    console = Console()
    console.print(comparison(runs))
    if experiment.directory:
        console.print(f"\nreport: {experiment.directory / 'report.html'}", highlight=False, soft_wrap=True)


def _describe(given: argparse.Namespace) -> None:
    screens.describe_method(Console(), given.method, _experiment(given))


def _data(given: argparse.Namespace) -> None:
    experiment = _experiment(given)
    if given.name is None:
        screens.data_sets(Console(), experiment.data_dir)
    else:
        screens.data_set(Console(), experiment.model_copy(update={"data": given.name}))
