"""What a run leaves behind: numbers over clients, files, tables for the terminal, one HTML report."""

from __future__ import annotations

from idiolect.report.metrics import Choice, Record, Selection, rounds_to, select, summarize
from idiolect.report.tables import (
    RunSummary,
    comparison,
    comparison_markdown,
    comparison_rows,
    round_table,
)

__all__ = [
    "Choice",
    "Record",
    "RunSummary",
    "Selection",
    "comparison",
    "comparison_markdown",
    "comparison_rows",
    "round_table",
    "rounds_to",
    "select",
    "summarize",
]
