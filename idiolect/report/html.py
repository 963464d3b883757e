"""The report: one self-contained HTML file that needs no network, on the screen and on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from idiolect.core.errors import writing
from idiolect.report import heatmaps
from idiolect.report.figures import BASELINE, Methods, curves, distribution, gain, styles, traffic
from idiolect.report.page import Rows, Section, page, table
from idiolect.report.tables import RunSummary, by_label, comparison_cells, group_cells


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[RunSummary],
    holdings: Mapping[str, Mapping[str, int]],
    groups: Mapping[str, str] | None,
    facts: Mapping[str, str],
    describe: Mapping[str, Rows],
) -> None:
    """Write the report of one or more runs as one HTML file of about 5 MB.

    Sections without data are left out. All names are escaped: clients, labels and facts are user data.

    Args:
        path: the file, replaced if it exists; its directory is made.
        title: heading of the page.
        runs: what to compare; runs with one label and different seeds are one method.
        holdings: client -> label -> number of examples; empty where there are no labels (regression).
        groups: client -> domain, site, ...; None where clients have no groups.
        facts: what is needed to repeat the runs, such as versions, seeds and the command.
        describe: method label -> its table, one mapping from column to text per row.

    Raises:
        UsageError: if there is no run, or if the runs cannot be compared (see `comparison_rows`).

    Example:
        >>> import tempfile
        >>> view = {"test": {"accuracy": {"mean": 0.9, "std": 0.1, "worst_decile": 0.8}}}
        >>> record = {"round": 1, "cohort": ["a", "b"], "seconds": 2.0, "bytes_up": 600, "bytes_down": 800,
        ...           "gradients": 6, "personalized": view, "generalized": None}
        >>> file = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(file, "First run", [RunSummary("FedBN", 0, [record])], {}, None, {"seed": "0"}, {})
        >>> "First run" in file.read_text(encoding="utf-8")
        True
    """
    methods = by_label(runs)
    sections = [
        *_results(methods),
        *_clients(methods, holdings, groups),
        *_sensitivities(methods),
        *_tables(facts, describe),
    ]
    file = Path(path)
    content = page(title, _subtitle(methods), sections)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def _results(methods: Methods) -> list[Section]:
    runs = [run for group in methods.values() for run in group]
    seeds = len(runs) > len(methods)
    upper, lifts = ("upper", "lifts") if runs[0].higher_is_better else ("lower", "lowers")
    over = "seeds (with n − 1)" if seeds else "clients"
    bands = " Lines are means over seeds; bands reach from the worst to the best seed." if seeds else ""
    results = Section(
        "Results",
        f"Test results at the last evaluated round. A mean over clients counts each client once. ± is the standard "
        f"deviation over {over}. Worst decile is the mean of the worst tenth of the clients. Best by val is the "
        f"result in the round that is best on validation examples. Best on test is the best of all rounds on the "
        f"test examples themselves, so it is too optimistic.",
        table(comparison_cells(runs), _colors(methods)),
    )
    return [
        results,
        *_figure(
            "Round by round",
            "Solid lines are personalized: each client predicts with its own weights. Dashed lines are generalized: "
            f"all clients predict with the shared weights.{bands} Click a name to hide it.",
            curves(methods),
        ),
        *_figure(
            "From client to client",
            "One dot per client and seed at the last evaluated round. The box holds the middle half, the dashed "
            f"line in it is the mean, and the black bar is the worst decile. A good method also {lifts} the bar.",
            distribution(methods),
        ),
        *_figure(
            "Who gains by taking part",
            f"How much better each client does than by training alone ({BASELINE}), mean over seeds, in percentage "
            "points for accuracy. A client below zero would do better alone.",
            gain(methods),
        ),
        *_figure(
            "What it costs to send",
            f"Personalized result against the bytes that all clients have sent (up) and received (down) so far. Of two "
            f"curves, the one further to the {upper} left costs less.",
            traffic(methods),
        ),
    ]


def _colors(methods: Methods) -> dict[str, str]:
    return {label: style.color for label, style in styles(list(methods)).items()}


def _clients(
    methods: Methods, holdings: Mapping[str, Mapping[str, int]], groups: Mapping[str, str] | None
) -> list[Section]:
    held = _figure(
        "Who holds what",
        "Examples per client and label. Darker is more, almost white is none. Clients with similar rows have similar "
        "labels.",
        heatmaps.holding(holdings, groups),
    )
    if not groups:
        return held
    runs = [run for group in methods.values() for run in group]
    aid = "Personalized result at the last evaluated round, mean over the clients of the group and the seeds."
    return [*held, Section("Group by group", aid, table(group_cells(runs, groups), _colors(methods)))]


def _sensitivities(methods: Methods) -> list[Section]:
    shown = {label: runs for label, runs in methods.items() if heatmaps.has_sensitivity(runs)}
    figures: list[tuple[str, str, Callable[[Sequence[RunSummary]], go.Figure | None]]] = [
        (
            "sensitivity over rounds",
            "Mean over the cohort, on a logarithmic scale; bright is sensitive. A row that stays bright is a layer "
            "that still moves much in late rounds.",
            heatmaps.sensitivity_by_round,
        ),
        (
            "sensitivity by client",
            "Sensitivity of the layers at each client's last participation. Different columns are different clients.",
            heatmaps.sensitivity_by_client,
        ),
        (
            "layers chosen",
            "How often each layer was among the sensitive ones, over all participations and seeds.",
            heatmaps.chosen_layers,
        ),
    ]
    return [
        section
        for label, runs in shown.items()
        for name, aid, draw in figures
        for section in _figure(f"{label}: {name}", aid, draw(runs))
    ]


def _tables(facts: Mapping[str, str], describe: Mapping[str, Rows]) -> list[Section]:
    parts = [
        Section(f"{label}: how it works", "The parts this method is composed of.", table(rows))
        for label, rows in describe.items()
        if rows
    ]
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    aid = "What is needed to repeat these runs."
    return [*parts, *([Section("Facts", aid, f'<table class="facts">{body}</table>')] if facts else [])]


def _figure(name: str, aid: str, figure: go.Figure | None) -> list[Section]:
    return [Section(name, aid, figure)] if figure is not None else []


def _subtitle(methods: Methods) -> str:
    runs = [run for group in methods.values() for run in group]
    clients = {client for run in runs for record in run.records for client in record["cohort"]}
    clients |= {client for run in runs for record in run.records for client in record.get("clients") or ()}
    rounds = max(len(run.records) for run in runs)
    seeds = len({run.seed for run in runs})
    counts = ((len(methods), "method"), (len(clients), "client"), (rounds, "round"), (seeds, "seed"))
    return " · ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
