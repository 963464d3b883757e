"""Several methods on the same data, seeds and initial weights: one table, one report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from idiolect.cli.experiment import build, load_pool, run, split_of
from idiolect.cli.settings import Experiment, command
from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.data import ByClient, ByDomain, Pool, Split, holdings
from idiolect.engines.base import Engine
from idiolect.registry.names import method_of
from idiolect.report import RunSummary, comparison_markdown, comparison_rows
from idiolect.running.describe import describe
from idiolect.storage.run_directory import read_run

MOST_GROUPS = 12
"""With more clients than this, the report has no table of groups."""


def compare(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    progress: bool = False,
    on_run: Callable[[RunSummary], None] | None = None,
    engine: Engine | None = None,
) -> list[RunSummary]:
    """Run every method with every seed.

    For one seed all methods have the same clients, initial weights and cohorts. With `experiment.directory`
    each run is written to its own directory in it, and the comparison as comparison.md, comparison.json and
    report.html. With `experiment.resume` finished runs are kept and the others are continued.

    Args:
        experiment: the settings; its own method and seed are not used.
        methods: expressions, such as ``"fedfsa(rho_larger=0.9)"``.
        seeds: one run of each method for each.
        progress: show a progress bar for each run.
        on_run: called with each run that is done.
        engine: see `idiolect.cli.experiment.run`.

    Returns:
        One summary per run, method by method.

    Raises:
        UsageError: one line, before any training.

    Example:
        >>> few = Experiment(clients=4, rounds=1)
        >>> [(run.label, run.seed) for run in compare(few, ["local", "fedbn"], seeds=[3])]
        [('Local', 3), ('FedBN', 3)]
    """
    if not methods or not seeds:
        raise UsageError("compare needs at least one method and one seed")
    names = labels(methods)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {', '.join(map(str, seeds))}: one occurs twice")
    pool = load_pool(experiment)
    first = experiment.model_copy(update={"seed": seeds[0]})
    parts = {label: _parts(first, pool, text) for label, text in zip(names, methods, strict=True)}
    folder = _folder(experiment)
    runs = []
    for label, text in zip(names, methods, strict=True):
        for seed in seeds:
            own = folder and folder / f"{_file_name(label)}-seed{seed}"
            begun = own is not None and (own / "config.json").exists()
            settings = {"method": text, "seed": seed, "directory": own, "resume": begun}
            done = run(experiment.model_copy(update=settings), pool, progress, report=False, engine=engine)
            runs.append(done.summary(label))
            if on_run:
                on_run(runs[-1])
    if folder:
        _write(folder, first, pool, methods, seeds, runs, parts)
    return runs


def labels(methods: Sequence[str]) -> list[str]:
    """Return the methods' names, or their expressions where two have the same name.

    Raises:
        UsageError: if an expression is no method or occurs twice.

    Example:
        >>> labels(["fedbn", "fedfsa(top=1)", "fedfsa(top=2)"])
        ['FedBN', 'fedfsa(top=1)', 'fedfsa(top=2)']
    """
    made = [method_of(text) for text in methods]
    twice = next((text for i, text in enumerate(methods) if made[i] in made[:i]), None)
    if twice is not None:
        raise UsageError(f"method {twice!r} occurs twice")
    names = [method.name for method in made]
    return [name if names.count(name) == 1 else text for name, text in zip(names, methods, strict=True)]


def _parts(experiment: Experiment, pool: Pool, text: str) -> list[dict[str, str]]:
    """Return the table of a method's parts; a method that does not fit the model is refused here."""
    setup = build(experiment.model_copy(update={"method": text}), pool)
    return describe(setup.method, Model(setup.model, setup.loss))


def _folder(experiment: Experiment) -> Path | None:
    folder = experiment.directory
    if folder is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a directory")
    if not experiment.resume and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: add --resume to go on with it, or choose another directory")
    return folder


def _write(
    folder: Path,
    experiment: Experiment,
    pool: Pool,
    methods: Sequence[str],
    seeds: Sequence[int],
    runs: list[RunSummary],
    parts: dict[str, list[dict[str, str]]],
) -> None:
    from idiolect.report.html import write_report  # draws with plotly, which takes its time to load

    clients = build(experiment, pool).clients
    classes = pool.classes
    held = {c: {classes[k]: n for k, n in h.items()} for c, h in holdings(clients).items()} if classes else {}
    unused = {name: Experiment.model_fields[name].default for name in ("method", "seed")}
    asked = experiment.model_copy(update=unused)
    line = command(asked, "compare", "--methods", *methods, "--seeds", *map(str, seeds))
    rows = [{k: None if v != v else v for k, v in row.items()} for row in comparison_rows(runs)]
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(f"{comparison_markdown(runs)}\n`{line}`\n", encoding="utf-8")
    write_report(
        folder / "report.html",
        title=f"{pool.name}: {len(parts)} methods, {len(clients)} clients",
        runs=runs,
        holdings=held,
        groups=_groups(split_of(experiment, pool), list(clients)),
        facts={"command": line, **_facts(folder)},
        describe=parts,
    )


def _groups(split: Split, clients: list[str]) -> dict[str, str] | None:
    """Return each client's domain or site, if the split is by one and there are few clients."""
    if not isinstance(split, ByClient | ByDomain) or len(clients) > MOST_GROUPS:
        return None
    several = isinstance(split, ByDomain) and split.clients_per_domain > 1
    return {client: client.rpartition("-")[0] if several else client for client in clients}


def _facts(folder: Path) -> dict[str, str]:
    """Return the settings and versions that all runs of a comparison share, read from the first of them."""
    card = read_run(next(file.parent for file in sorted(folder.glob("*/config.json"))))[0]
    own = {"method", "seed", "command", "data"}
    settings = {name: str(value) for name, value in card["config"].items() if name not in own}
    return {**settings, **card["versions"], "platform": card["platform"]}


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=+~-]+", "-", label).strip("-")
