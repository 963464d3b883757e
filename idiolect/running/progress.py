"""The progress bar of a run: rounds played, last score, time left."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar on standard error: rounds done, the last evaluation, time left."""

    def __init__(self, name: str, rounds: int, done: int, lead: str) -> None:
        self._lead = lead
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(name, total=rounds, completed=done, score="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, record: Mapping[str, Any]) -> None:
        """Show that a round is done."""
        if "personalized" in record:
            mean = record["personalized"]["test"][self._lead]["mean"]
            self._bar.update(self._task, score=f"{self._lead} {'n/a' if mean != mean else f'{mean:.3f}'}")
        self._bar.advance(self._task)
