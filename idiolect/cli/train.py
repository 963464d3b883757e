"""The commands that train: ``run`` and ``compare``."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console

from idiolect.cli.compare import compare
from idiolect.cli.experiment import run
from idiolect.cli.settings import Experiment, command
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.engines.base import Engine
from idiolect.engines.choose import NAMES
from idiolect.registry.expression import evaluate
from idiolect.report import RunSummary, comparison, select
from idiolect.report.tables import number


def run_one(experiment: Experiment) -> None:
    """Train with one method and print its row of results."""
    experiment = _with_directory(experiment)
    try:
        done = run(experiment, progress=sys.stderr.isatty(), engine=_engine(experiment))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*_how_to_resume(experiment, "run")) from None
    for note in done.notes:
        print(f"idiolect: {note}", file=sys.stderr)
    _print_results([done.summary()], experiment)


def run_several(experiment: Experiment, methods: list[str], seeds: list[int], chosen: bool = True) -> None:
    """Train with several methods and seeds and print one table; say which methods if nobody has `chosen` them."""
    experiment = _with_directory(experiment)
    if not chosen:
        print(f"idiolect: comparing {', '.join(methods)}; --methods takes others", file=sys.stderr)
    bars = sys.stderr.isatty()
    on_run = None if bars else _print_score
    try:
        runs = compare(experiment, methods, seeds, progress=bars, on_run=on_run, engine=_engine(experiment))
    except KeyboardInterrupt:
        more = ("--methods", *methods, "--seeds", *map(str, seeds))
        raise KeyboardInterrupt(*_how_to_resume(experiment, "compare", *more)) from None
    _print_results(runs, experiment)


def _with_directory(experiment: Experiment) -> Experiment:
    if experiment.resume and not experiment.directory:
        raise UsageError("resume needs the directory of what to go on with: --resume --directory runs/NAME")
    if experiment.directory:
        return experiment
    return experiment.model_copy(update={"directory": Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")})


def _engine(experiment: Experiment) -> Engine | None:
    """Return Flower's engine if the settings ask for it, such as ``flower(cpus=2)``, else None."""
    name = experiment.engine.partition("(")[0].strip().lower()
    if name != "flower":
        known = (*NAMES, "flower")
        if experiment.engine not in known:
            raise UsageError(
                f"no engine {experiment.engine!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        return None
    from idiolect.flower import simulation

    engine: Engine = evaluate(experiment.engine, {"flower": simulation}, "engine")  # type: ignore[assignment]
    return engine


def _how_to_resume(experiment: Experiment, verb: str, *more: str) -> tuple[str, ...]:
    if experiment.directory is None or not experiment.directory.exists():
        return ()
    resumed = experiment.model_copy(update={"resume": True})
    return (f"; go on with: {command(resumed, verb, *more, places=True)}",)


def _print_score(run: RunSummary) -> None:
    last = select(run.records, run.metric, run.higher_is_better).last
    value = number(last.personalized["mean"] if last else None, run.metric)
    print(f"{run.label}, seed {run.seed}: {run.metric} {value}", file=sys.stderr, flush=True)


def _print_results(runs: list[RunSummary], experiment: Experiment) -> None:
    console = Console()
    console.print(comparison(runs))
    if experiment.directory:
        console.print(f"\nreport: {experiment.directory / 'report.html'}", highlight=False, soft_wrap=True)
