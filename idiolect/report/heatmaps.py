"""Heat maps: who holds which labels, and how sensitive the layers of each client's network are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from idiolect.report.figures import INK, canvas, shortened
from idiolect.report.tables import RunSummary

_BLUES = (
    (0.0, "#f3f5f7"),
    (1e-6, "#d6e6f4"),
    (0.25, "#9ac8e1"),
    (0.5, "#4a98c9"),
    (0.75, "#1764ab"),
    (1.0, "#08306b"),
)


def holding(holdings: Mapping[str, Mapping[str, int]], groups: Mapping[str, str] | None) -> go.Figure | None:
    """Clients × labels: how many examples of each label a client holds; clients of one group stand together.

    Args:
        holdings: client -> label -> number of examples.
        groups: client -> domain, site, ...; None where clients have no groups.
    """
    labels = sorted({label for held in holdings.values() for label in held}, key=_natural)
    if not labels:
        return None
    group_of = groups or {}
    order = list(dict.fromkeys(group_of.get(c, "") for c in holdings))
    clients = sorted(holdings, key=lambda c: order.index(group_of.get(c, "")))
    counts = [[holdings[c].get(label, 0) for label in labels] for c in clients]
    figure = go.Figure(
        go.Heatmap(
            z=counts, x=[escape(label) for label in labels], y=[escape(c) for c in clients],
            colorscale=_BLUES, zmin=0, zmax=max(max(row) for row in counts) or 1,
            colorbar=_colorbar(),
            texttemplate="%{z}" if len(clients) <= 16 and len(labels) <= 16 else None, xgap=_gap(labels),
            ygap=_gap(clients), hovertemplate="%{y} holds %{z} of label %{x}<extra></extra>",
        )
    )  # fmt: skip
    _categories(figure, columns=labels, rows=clients, x="label", y="client")
    if groups:
        _mark_groups(figure, [group_of.get(c, "") for c in clients])
    return figure


def _mark_groups(figure: go.Figure, groups: Sequence[str]) -> None:
    """Name each block of rows to the right of the map and draw a line between blocks."""
    start = 0
    shown = {group: shortened([group]).get(escape(group), escape(group)) for group in groups}
    for group, block in groupby(groups):
        end = start + len(list(block))
        figure.add_annotation(
            x=1.01, xref="paper", xanchor="left", y=(start + end - 1) / 2, text=shown[group], showarrow=False
        )
        if start:
            figure.add_hline(y=start - 0.5, line={"color": INK, "width": 1})
        start = end
    figure.update_layout(margin={"r": 24 + 7 * max(map(len, shown.values()))})


def has_sensitivity(runs: Sequence[RunSummary]) -> bool:
    """Say whether any round of these runs shows the sensitivity of layers."""
    return any(_participations(run) for run in runs)


def sensitivity_by_round(runs: Sequence[RunSummary]) -> go.Figure:
    """Layers × rounds: mean sensitivity over the cohorts of all seeds, on a logarithmic color scale."""
    return _layers([(str(t), entry) for run in runs for t, _, entry in _participations(run)], "round")


def sensitivity_by_client(runs: Sequence[RunSummary]) -> go.Figure:
    """Layers × clients: sensitivity at each client's last participation, mean over seeds."""
    last = [{client: entry for _, client, entry in _participations(run)} for run in runs]
    return _layers([pair for seed in last for pair in seed.items()], "client")


def chosen_layers(runs: Sequence[RunSummary]) -> go.Figure | None:
    """Bars: in how many per cent of the participations each layer was among the sensitive ones."""
    entries = [entry for run in runs for *_, entry in _participations(run)]
    layers = list(dict.fromkeys(layer for e in entries for layer in e["sensitivity"]))
    share = [100 * fmean((e.get("chosen") or {}).get(layer, 0) > 0 for e in entries) for layer in layers]
    if not any(share):
        return None
    figure = go.Figure(
        go.Bar(
            x=share, y=[escape(layer) for layer in layers], orientation="h", marker={"color": "#627d98"},
            texttemplate="%{x:.0f} %", textposition="outside", cliponaxis=False,
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    canvas(figure, 110 + 24 * len(layers), "participations (%)")
    figure.update_xaxes(range=[0, 105])
    return figure.update_yaxes(type="category", autorange="reversed")


def _layers(columns_of: Sequence[tuple[str, Mapping[str, Any]]], x: str) -> go.Figure:
    """Draw the mean of each layer × column on a logarithmic scale; without a positive mean it stays blank."""
    cells: dict[tuple[str, str], list[float]] = {}
    for column, entry in columns_of:
        for layer, value in entry["sensitivity"].items():
            cells.setdefault((layer, column), []).append(math.nan if value is None else value)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    columns = sorted({column for _, column in cells}, key=_natural)
    means = {cell: fmean(values) for cell, values in cells.items()}
    logs = {cell: math.log10(mean) for cell, mean in means.items() if 0 < mean < math.inf}
    ticks = _log_ticks(min(logs.values(), default=0), max(logs.values(), default=0))
    figure = go.Figure(
        go.Heatmap(
            z=[[logs.get((layer, column)) for column in columns] for layer in layers],
            customdata=[[means.get((layer, column)) for column in columns] for layer in layers],
            x=[escape(column) for column in columns], y=[escape(layer) for layer in layers],
            colorscale="Cividis",
            colorbar=_colorbar()
            | {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]},
            hovertemplate=f"%{{y}}, {x} %{{x}}: %{{customdata:.3g}}<extra></extra>",
        )
    )  # fmt: skip
    return _categories(figure, columns=columns, rows=layers, x=x, y="")


def _categories(figure: go.Figure, columns: Sequence[str], rows: Sequence[str], x: str, y: str) -> go.Figure:
    """Size a heat map to its rows; Plotly thins out tick labels that would overlap."""
    height = max(24 * len(rows), 150) if len(rows) <= 24 else min(max(576, 7 * len(rows)), 1000)
    canvas(figure, 140 + height, x, y)
    figure.update_layout(margin={"t": 72})
    axis = {"type": "category", "showgrid": False}
    figure.update_xaxes(labelalias=shortened(columns), **axis)
    return figure.update_yaxes(labelalias=shortened(rows), autorange="reversed", **axis)


def _colorbar() -> dict[str, Any]:
    """Return a bar above the map, so that the map has the whole width of a narrow screen; the heading names it."""
    return {
        "orientation": "h", "thickness": 10, "outlinewidth": 0, "len": 0.7, "nticks": 4, "x": 0, "xanchor": "left",
        "xpad": 0, "yref": "container", "y": 1.0, "yanchor": "top", "ypad": 24,
    }  # fmt: skip


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between two logarithms, and 2 and 5 times them where they are few.

    Example:
        >>> _log_ticks(-2.1, -0.9)
        [0.01, 0.02, 0.05, 0.1]
    """
    steps = (1, 2, 5) if high - low < 1.3 else (1,)
    ticks = [float(f"{step}e{p}") for p in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _participations(run: RunSummary) -> list[tuple[int, str, Mapping[str, Any]]]:
    """Return (round, client, what it showed) of the participations that show sensitivities, in order."""
    return [
        (record["round"], client, entry)
        for record in run.records
        for client, entry in (record.get("inspect") or {}).items()
        if entry.get("sensitivity")
    ]


def _gap(names: Sequence[str]) -> int:
    return 1 if len(names) <= 40 else 0


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort numbers inside names by value, and before letters: 2, 10, c2, c10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not p[0].isdecimal(), int(p) if p[0].isdecimal() else 0, p) for p in parts]
