"""The HTML report of one run, whether its clients were simulated or real sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idiolect.compute.autograd import Model
from idiolect.compute.metrics import Metric
from idiolect.core.method import Method
from idiolect.report import Record, RunSummary
from idiolect.running.describe import describe


def summary_of(label: str, seed: int, records: Sequence[Record], metrics: Sequence[Metric]) -> RunSummary:
    """Return the data of one run for tables and reports; the first metric leads, else the loss.

    Example:
        >>> summary_of("FedAvg", 0, [], []).metric
        'loss'
    """
    if not metrics:
        return RunSummary(label, seed, records, "loss", higher_is_better=False)
    return RunSummary(label, seed, records, metrics[0].name, metrics[0].higher_is_better)


def write_run_report(
    path: str | Path,
    method: Method,
    model: Model,
    summary: RunSummary,
    *,
    title: str,
    config: Mapping[str, Any],
    holdings: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Write the report of one run as one HTML file that needs nothing else.

    Args:
        path: of the file.
        method: the method.
        model: the model, for the sizes of what each part keeps and sends.
        summary: the run's records, see `summary_of`.
        title: heading of the page.
        config: the settings to list.
        holdings: client to label to its number of training examples, where labels are known.
    """
    from idiolect.report.html import write_report  # draws with plotly, which takes time to load

    write_report(
        path,
        title=title,
        runs=[summary],
        holdings=holdings or {},
        groups=None,
        facts={name: str(value) for name, value in config.items()},
        describe={method.name: describe(method, model)},
    )
