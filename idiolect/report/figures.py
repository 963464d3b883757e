"""Figures of runs over rounds and clients; each function returns a Plotly figure, or None without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from statistics import fmean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from idiolect.report.metrics import Choice, evaluated, select
from idiolect.report.tables import RunSummary, byte_unit, client_values, title

Methods = Mapping[str, Sequence[RunSummary]]
"""Label -> its runs, one per seed, as `by_label` returns them."""

BASELINE = "Local"
FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"
INK, GRID = "#1f2933", "#e4e7eb"

# Okabe and Ito (2008), without the yellow that vanishes on white, then darker tones of Tol's muted scheme.
_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#332288", "#882255", "#999933", "#44aa99", "#117733", "#aa4499",
)  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure: a color, and a marker for those who do not see colors."""

    color: str
    symbol: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Return one fixed look per method; the baseline is gray.

    Example:
        >>> styles(["Local", "FedBN"])["FedBN"].color
        '#0072b2'
    """
    others = [label for label in labels if label != BASELINE]
    looks = {label: Style(_COLORS[i % len(_COLORS)], _SYMBOLS[i % len(_SYMBOLS)]) for i, label in enumerate(others)}
    return {label: looks.get(label, Style("#6b7280", "circle-open")) for label in labels}


def canvas(figure: go.Figure, height: int, x: str = "", y: str = "") -> go.Figure:
    """Give a figure the common look: light, quiet grid, legend above the plot."""
    figure.update_layout(
        template="none", height=height, autosize=True, paper_bgcolor="white", plot_bgcolor="white",
        font={"family": FONT, "size": 13, "color": INK}, margin={"l": 64, "r": 24, "t": 44, "b": 52},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 13}},
        hoverlabel={"font": {"family": FONT, "size": 12}},
    )  # fmt: skip
    axis = {
        "gridcolor": GRID,
        "linecolor": "#9aa5b1",
        "zeroline": False,
        "ticks": "outside",
        "automargin": True,
    }
    figure.update_xaxes(title={"text": x, "font": {"size": 13}}, tickcolor="#9aa5b1", **axis)
    figure.update_yaxes(title={"text": y, "font": {"size": 13}, "standoff": 12}, tickcolor="#9aa5b1", **axis)
    return figure


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Return what an axis writes for names that are too long for it; the full name stays in the hover.

    Example:
        >>> shortened(["MNIST", "Universitätsklinikum Heidelberg"])
        {'Universitätsklinikum Heidelberg': 'Universitätsklinikum He…'}
    """
    return {escape(name): escape(name[:23] + "…") for name in names if len(name) > 24}


def curves(methods: Methods) -> go.Figure | None:
    """Metric over rounds: personalized solid, generalized dashed; mean over seeds with its min–max band."""
    figure = go.Figure()
    looks = styles(list(methods))
    for suffix, view, dash in ((" generalized", _generalized, "dash"), ("", _personalized, "solid")):  # solid on top
        for label, runs in methods.items():
            seeds = _by_round(runs, view)
            if seeds:
                style = looks[label]
                _add_band(figure, seeds, label, style)
                figure.add_scatter(
                    x=list(seeds), y=[fmean(v) for v in seeds.values()], name=escape(label),
                    line={"color": style.color, "width": 1.6 if suffix else 2.2, "dash": dash},
                    mode="lines+markers", marker={"symbol": style.symbol, "size": 7, "maxdisplayed": 8},
                    legendgroup=escape(label), showlegend=not suffix,
                    hovertemplate=f"{_template(label + suffix)} %{{y:.4g}} at round %{{x}}<extra></extra>",
                )  # fmt: skip
    if not figure.data:
        return None
    canvas(figure, 440, "round", _axis_title(methods))
    few = max(max(trace.x) for trace in figure.data) <= 10
    return figure.update_xaxes(dtick=1) if few else figure


def _add_band(figure: go.Figure, seeds: Mapping[int, Sequence[float]], label: str, style: Style) -> None:
    """Shade from the worst to the best seed."""
    if max(map(len, seeds.values())) < 2:
        return
    low, high = [min(v) for v in seeds.values()], [max(v) for v in seeds.values()]
    figure.add_scatter(
        x=[*seeds, *reversed(seeds)], y=[*high, *reversed(low)], fill="toself", fillcolor=style.color,
        opacity=0.15, mode="lines", line={"width": 0}, legendgroup=escape(label), showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip


def distribution(methods: Methods) -> go.Figure | None:
    """One dot per client and seed at the last evaluated round; a box, mean and worst decile per method."""
    figure = go.Figure()
    deciles: list[float] = []
    shown: list[str] = []
    several = any(len(client_values(run)) > 1 for runs in methods.values() for run in runs)
    for label, runs in methods.items():
        values = [(c, _scale(run) * v) for run in runs for c, v in client_values(run).items()]
        if not values or not several:
            continue
        few = len(values) <= 30
        style = styles(list(methods))[label]
        figure.add_box(
            y=[v for _, v in values], x=[len(shown)] * len(values), text=[escape(c) for c, _ in values],
            name=escape(label), boxpoints="all" if len(values) <= 2000 else "suspectedoutliers", boxmean=True,
            width=0.5, jitter=0.6, pointpos=0,
            marker={"color": style.color, "size": 8 if few else 5, "opacity": 0.7 if few else 0.45},
            line={"color": style.color, "width": 1.6}, whiskerwidth=0.25,
            fillcolor="rgba(0,0,0,0)", showlegend=False, hovertemplate="%{text}: %{y:.4g}<extra></extra>",
        )  # fmt: skip
        lasts = [select(run.records, run.metric, run.higher_is_better).last for run in runs]
        deciles.append(fmean(_scale(runs[0]) * choice.personalized["worst_decile"] for choice in lasts if choice))
        shown.append(escape(label))
    if not shown:
        return None
    figure.add_scatter(
        x=[place + side for place in range(len(shown)) for side in (-0.35, 0.35, 0)],
        y=[value for decile in deciles for value in (decile, decile, None)], mode="lines", name="worst decile",
        line={"width": 3, "color": INK}, hovertemplate="worst decile: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    canvas(figure, 440, "", _axis_title(methods))
    short = shortened(methods)
    return figure.update_xaxes(
        tickvals=list(range(len(shown))), ticktext=[short.get(name, name) for name in shown], showgrid=False,
        range=[-0.6, len(shown) - 0.4],
    )  # fmt: skip


def gain(methods: Methods) -> go.Figure | None:
    """Gain of each client over training alone (Local): by name when they are few, else sorted by gain."""
    figure = go.Figure()
    alone = _over_seeds(methods.get(BASELINE, ()))
    named = len(alone) <= 20
    for label, runs in methods.items():
        own = _over_seeds(runs)
        sign = _scale(runs[0]) * (1.0 if runs[0].higher_is_better else -1.0)
        gains = {escape(c): sign * (own[c] - alone[c]) for c in alone if c in own}
        if label == BASELINE or not gains:
            continue
        names = list(gains) if named else sorted(gains, key=gains.__getitem__)
        style = styles(list(methods))[label]
        losing = sum(value < 0 for value in gains.values())
        figure.add_scatter(
            x=names if named else list(range(1, len(names) + 1)), y=[gains[c] for c in names], text=names,
            name=f"{escape(label)} ({losing} of {len(names)} lose)", mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 10 if named else 7},
            hovertemplate="%{text}: %{y:+.3g}<extra></extra>",
        )  # fmt: skip
    if not figure.data:
        return None
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    unit = "points" if _scale(_first(methods)) == 100 else escape(_first(methods).metric)
    order = "" if named else "clients, from smallest to largest gain"
    canvas(figure, 400, order, f"gain ({unit})")
    return figure.update_xaxes(type="category" if named else "linear", labelalias=shortened(alone))


def traffic(methods: Methods) -> go.Figure | None:
    """Metric against the bytes sent so far by all clients (left) and to all clients (right)."""
    ways = ("bytes_up", "bytes_down")
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    totals = [sum(r[way] for r in run.records) for runs in methods.values() for run in runs for way in ways]
    size, unit = byte_unit(max(totals))
    for column, way in enumerate(ways, start=1):
        for label, runs in methods.items():
            metric = _by_round(runs, _personalized)
            sent = _by_round(runs, lambda run, way=way: _sent(run, way))  # type: ignore[misc]
            style = styles(list(methods))[label]
            if metric:
                figure.add_scatter(
                    x=[fmean(sent[t]) / size for t in metric], y=[fmean(v) for v in metric.values()],
                    row=1, col=column, name=escape(label), legendgroup=escape(label), showlegend=column == 1,
                    mode="lines+markers", line={"color": style.color, "width": 2}, customdata=list(metric),
                    marker={"symbol": style.symbol, "size": 7, "maxdisplayed": 8},
                    hovertemplate=f"{_template(label)} %{{y:.4g}} after %{{x:.3g}} {unit}"
                    " (round %{customdata})<extra></extra>",
                )  # fmt: skip
    if not figure.data:
        return None
    canvas(figure, 400, f"{unit} up", _axis_title(methods))
    figure.update_traces(cliponaxis=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text=f"{unit} down", col=2)
    return figure.update_yaxes(title_text="", col=2)


def _by_round(runs: Sequence[RunSummary], view: Callable[[RunSummary], Mapping[int, float]]) -> dict[int, list[float]]:
    """Return round -> the values of the seeds that have one, in order of rounds."""
    seeds = [view(run) for run in runs]
    return {t: [of[t] for of in seeds if t in of] for t in sorted({t for of in seeds for t in of})}


def _personalized(run: RunSummary) -> dict[int, float]:
    return _means(run, lambda choice: choice.personalized)


def _generalized(run: RunSummary) -> dict[int, float]:
    return _means(run, lambda choice: choice.generalized)


def _means(run: RunSummary, view: Callable[[Choice], Mapping[str, float] | None]) -> dict[int, float]:
    found = {choice.round: view(choice) for choice in evaluated(run.records, run.metric)}
    return {t: _scale(run) * summary["mean"] for t, summary in found.items() if summary}


def _sent(run: RunSummary, way: str) -> dict[int, float]:
    sums = accumulate(record[way] for record in run.records)
    return {record["round"]: total for record, total in zip(run.records, sums, strict=True)}


def _over_seeds(runs: Sequence[RunSummary]) -> dict[str, float]:
    seeds = [client_values(run) for run in runs]
    return {c: fmean(of[c] for of in seeds if c in of) for c in dict.fromkeys(c for of in seeds for c in of)}


def _scale(run: RunSummary) -> float:
    return 100.0 if run.metric.endswith("accuracy") else 1.0


def _first(methods: Methods) -> RunSummary:
    return next(iter(methods.values()))[0]


def _axis_title(methods: Methods) -> str:
    return escape(title(_first(methods).metric))


def _template(text: str) -> str:
    """Escape a name that stands inside a hover template, where %{...} would be a placeholder."""
    return escape(text).replace("%", "&#37;").replace("{", "&#123;")
