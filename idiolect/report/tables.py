"""Runs side by side: one row per method, for the terminal, for Markdown and for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from idiolect.core.errors import UsageError
from idiolect.report.metrics import Choice, Record, evaluated, select

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "—"
OPTIMISTIC = "best on test (optimistic)"


@dataclass(frozen=True)
class RunSummary:
    """One run to be shown: several runs with one label and different seeds are one method.

    Attributes:
        label: the method, as the reader shall see it.
        seed: of this run.
        records: its rounds, as `read_run` returns them.
        metric: what is compared, such as "accuracy"; one for all runs of a table.
        higher_is_better: False for losses and errors.
    """

    label: str
    seed: int
    records: Sequence[Record]
    metric: str = "accuracy"
    higher_is_better: bool = True


def by_label(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Group runs into methods, in order of first appearance.

    Raises:
        UsageError: if there is no run, if metrics differ, or if two runs have the same label and seed.
    """
    if not runs:
        raise UsageError("there is no run to show: give at least one")
    methods: dict[str, list[RunSummary]] = {}
    for run in runs:
        if (run.metric, run.higher_is_better) != (runs[0].metric, runs[0].higher_is_better):
            raise UsageError(f"runs of {runs[0].metric!r} and {run.metric!r} cannot share a table: give one metric")
        if any(other.seed == run.seed for other in methods.get(run.label, [])):
            raise UsageError(f"two runs are called {run.label!r} with seed {run.seed}: give them different labels")
        methods.setdefault(run.label, []).append(run)
    return methods


def comparison_rows(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Return one row per method; every number is a mean over its seeds, and None where there is none.

    Keys: method, seeds and rounds (counts), personalized, std and std_over ("seeds": sample deviation over
    seeds, as soon as any method has several; else "clients": population deviation), worst_decile, generalized
    (all four at the last evaluated round), best_by_val, best_on_test (test values of the rounds so chosen),
    bytes_up, bytes_down and gradients (per participating client and round), seconds (per round).

    Raises:
        UsageError: if the runs cannot be compared (see `by_label`) or lack the metric.

    Example:
        >>> view = {"test": {"accuracy": {"mean": 0.9, "std": 0.1, "worst_decile": 0.8}}}
        >>> record = {"round": 1, "cohort": ["a", "b"], "seconds": 2.0, "bytes_up": 600, "bytes_down": 800,
        ...           "gradients": 6, "personalized": view, "generalized": None}
        >>> [row] = comparison_rows([RunSummary("FedBN", seed=0, records=[record])])
        >>> row["personalized"], row["std_over"], row["std"], row["bytes_up"], row["best_by_val"]
        (0.9, 'clients', 0.1, 300.0, None)
    """
    methods = by_label(runs)
    over_seeds = any(len(group) > 1 for group in methods.values())
    return [_row(label, group, over_seeds) for label, group in methods.items()]


def _row(label: str, group: Sequence[RunSummary], over_seeds: bool) -> dict[str, Any]:
    chosen = [select(run.records, run.metric, run.higher_is_better) for run in group]
    last = [selection.last for selection in chosen]
    personalized = [c.personalized["mean"] for c in last if c]
    spread = float(np.std(personalized, ddof=1)) if len(personalized) > 1 else None
    rounds = [record for run in group for record in run.records]
    clients = sum(len(record["cohort"]) for record in rounds)
    return {
        "method": label,
        "seeds": len(group),
        "rounds": max(len(run.records) for run in group),
        "personalized": _mean_of(last, lambda c: c.personalized["mean"]),
        "std": spread if over_seeds else _mean_of(last, lambda c: c.personalized["std"]),
        "std_over": "seeds" if over_seeds else "clients",
        "worst_decile": _mean_of(last, lambda c: c.personalized["worst_decile"]),
        "best_by_val": _mean_of([s.best_by_val for s in chosen], lambda c: c.personalized["mean"]),
        "best_on_test": _mean_of([s.best_on_test for s in chosen], lambda c: c.personalized["mean"]),
        "generalized": _mean_of(last, lambda c: c.generalized["mean"] if c.generalized else None),
        "bytes_up": sum(r["bytes_up"] for r in rounds) / clients if clients else None,
        "bytes_down": sum(r["bytes_down"] for r in rounds) / clients if clients else None,
        "gradients": sum(r["gradients"] for r in rounds) / clients if clients else None,
        "seconds": fmean(r["seconds"] for r in rounds) if rounds else None,
    }


def _mean_of(choices: Sequence[Choice | None], value: Callable[[Choice], float | None]) -> float | None:
    """Return the mean over seeds; None as soon as one seed has no value, so that all columns count alike."""
    values = [None if choice is None else value(choice) for choice in choices]
    numbers = [v for v in values if v is not None]
    return fmean(numbers) if len(numbers) == len(values) else None


def comparison_cells(runs: Sequence[RunSummary]) -> list[dict[str, str]]:
    """Return the rows of `comparison_rows` as text, by column header; accuracies in per cent.

    A ± is missing where a method has one seed and others have several: it has no deviation over seeds.
    """
    metric = runs[0].metric if runs else ""
    return [_cells(row, metric) for row in comparison_rows(runs)]


def _cells(row: Mapping[str, Any], metric: str) -> dict[str, str]:
    spread = "" if row["std"] is None or math.isnan(row["std"]) else f" ± {number(row['std'], metric)}"
    return {
        "method": row["method"],
        f"personalized ± std over {row['std_over']}": number(row["personalized"], metric) + spread,
        "worst decile": number(row["worst_decile"], metric),
        "best by val": number(row["best_by_val"], metric),
        OPTIMISTIC: number(row["best_on_test"], metric),
        "generalized": number(row["generalized"], metric),
        "up/down per client and round": _traffic(row["bytes_up"], row["bytes_down"]),
        "gradients per client and round": NOTHING if row["gradients"] is None else _significant(row["gradients"], 3),
        "s per round": NOTHING if row["seconds"] is None else _significant(row["seconds"], 3),
    }


def comparison(runs: Sequence[RunSummary]) -> Table:
    """Return the comparison as a table for the terminal; it fits 80 columns with names of up to 10 letters.

    The optimistic column is left to Markdown and the report.

    Example:
        >>> view = {"test": {"accuracy": {"mean": 0.9, "std": 0.1, "worst_decile": 0.8}}}
        >>> record = {"round": 1, "cohort": ["a", "b"], "seconds": 2.0, "bytes_up": 600, "bytes_down": 800,
        ...           "gradients": 6, "personalized": view, "generalized": None}
        >>> comparison([RunSummary("FedBN", seed=0, records=[record])]).row_count
        1
    """
    rows = [{k: v for k, v in row.items() if k != OPTIMISTIC} for row in comparison_cells(runs)]
    return _table(f"{title(runs[0].metric)}, last evaluated round", rows)


def comparison_markdown(runs: Sequence[RunSummary]) -> str:
    """Return the comparison as a Markdown table, ending in a newline.

    Example:
        >>> record = {"round": 1, "cohort": [], "seconds": 2.0, "bytes_up": 0, "bytes_down": 0, "gradients": 0}
        >>> print(comparison_markdown([RunSummary("FedBN", seed=0, records=[record])]).splitlines()[2])
        | FedBN | — | — | — | — | — | — | — | 2.00 |
    """
    rows = comparison_cells(runs)
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(_markdown(cell) for cell in line)} |\n" for line in lines)


def round_table(records: Sequence[Record], metric: str = "accuracy") -> Table:
    """Return the rounds of one run as a table for the terminal, one row per round.

    Raises:
        UsageError: if rounds were evaluated, but never with this metric.
    """
    by_round = {choice.round: choice for choice in evaluated(records, metric)}
    rows = [_round_cells(record, by_round.get(record["round"]), metric) for record in records]
    return _table(f"{title(metric)}, round by round", rows)


def _round_cells(record: Record, choice: Choice | None, metric: str) -> dict[str, str]:
    std = choice.personalized["std"] if choice else math.nan
    spread = "" if math.isnan(std) else f" ± {number(std, metric)}"
    clients = len(record["cohort"])
    per_client = [record[way] / clients if clients else None for way in ("bytes_up", "bytes_down")]
    return {
        "round": str(record["round"]),
        "cohort": str(clients),
        "train loss": "nan" if math.isnan(record.get("train_loss") or 0) else number(record.get("train_loss"), "loss"),
        "personalized ± std over clients": _mean_cell(choice.personalized if choice else None, metric) + spread,
        "worst decile": number(choice.personalized["worst_decile"] if choice else None, metric),
        "val": _mean_cell(choice.val if choice else None, metric),
        "generalized": _mean_cell(choice.generalized if choice else None, metric),
        "up/down per client": _traffic(*per_client),
        "s": _significant(record["seconds"], 3),
    }


def _mean_cell(summary: Mapping[str, float] | None, metric: str) -> str:
    return number(summary["mean"] if summary else None, metric)


def group_cells(runs: Sequence[RunSummary], groups: Mapping[str, str]) -> list[dict[str, str]]:
    """Return one row per method and one column per group: the mean over the group's clients and the seeds.

    Personalized test values of the last evaluated round, as text; groups are domains, sites, ...
    """
    return [
        {"method": label} | {group: _group_mean(of, groups, group) for group in dict.fromkeys(groups.values())}
        for label, of in by_label(runs).items()
    ]


def _group_mean(runs: Sequence[RunSummary], groups: Mapping[str, str], group: str) -> str:
    values = [v for run in runs for c, v in client_values(run).items() if groups.get(c) == group]
    return number(fmean(values) if values else None, runs[0].metric)


def client_values(run: RunSummary) -> dict[str, float]:
    """Return client -> its personalized test metric, where it has one, in the last evaluated round."""
    listed = [record["clients"] for record in run.records if record.get("clients")]
    values = {c: (v["personalized"] or {}).get(run.metric) for c, v in (listed[-1] if listed else {}).items()}
    return {c: float(v) for c, v in values.items() if v is not None and not math.isnan(v)}


def title(metric: str) -> str:
    """Return the name of a metric with its unit: accuracies are shown in per cent.

    Example:
        >>> title("accuracy"), title("loss")
        ('accuracy (%)', 'loss')
    """
    return f"{metric} (%)" if metric.endswith("accuracy") else metric


def number(value: float | None, metric: str) -> str:
    """Return a metric's value as text; None is a dash, and what no client could measure is n/a.

    Example:
        >>> number(0.91234, "accuracy"), number(0.9, "loss"), number(None, "loss"), number(math.nan, "loss")
        ('91.23', '0.9000', '—', 'n/a')
    """
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "n/a"
    return f"{100 * value:.2f}" if metric.endswith("accuracy") else _significant(value, 4)


def _significant(value: float, digits: int) -> str:
    return format(value, f"#.{digits}g").rstrip(".")


def human_bytes(count: float) -> str:
    """Return a number of bytes in a decimal unit.

    Example:
        >>> human_bytes(999), human_bytes(5_042_000), human_bytes(56_300)
        ('999 B', '5.0 MB', '56 kB')
    """
    return f"{_in_unit(count, *byte_unit(count))} {byte_unit(count)[1]}"


def _traffic(up: float | None, down: float | None) -> str:
    """Return up and down in one unit, as ``5.0/10 MB``."""
    if up is None or down is None:
        return NOTHING
    unit = byte_unit(max(up, down))
    return f"{_in_unit(up, *unit)}/{_in_unit(down, *unit)} {unit[1]}"


def byte_unit(count: float) -> tuple[float, str]:
    """Return the size and the name of the largest decimal unit in which a count of bytes is at least one."""
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next((unit for unit in units if count >= 0.9995 * unit[0]), (1.0, "B"))


def _in_unit(count: float, size: float, unit: str) -> str:
    scaled = count / size
    return f"{scaled:.1f}" if unit != "B" and scaled < 9.95 else f"{scaled:.0f}"


def _table(name: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of text: names to the left, numbers to the right under headers folded to their width."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=name, box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left")
    for position, header in enumerate(rows[0] if rows else ()):
        width = max(len(part) for part in [*header.split(), *(row[header] for row in rows)])
        folded = "\n".join(wrap(header, width, break_on_hyphens=False))
        if position == 0:
            table.add_column(escape(header), overflow="fold")
        else:
            table.add_column(escape(folded), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.values()))
    return table


def _markdown(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
