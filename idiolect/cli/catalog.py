"""The catalog of methods in the terminal, read from a file so that PyTorch is not loaded."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import groupby
from typing import TypedDict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Entry(TypedDict):
    """One method of the catalog."""

    name: str
    title: str
    year: int
    problem: str
    gradients: int
    """Gradients per local step."""
    down: float
    """Values that a client receives in a round, in models."""
    up: float
    """Values that a client sends in a round, in models."""
    idea: str


def read() -> list[Entry]:
    """Return the catalog by problem; `make docs` writes it.

    Example:
        >>> [entry["title"] for entry in read() if entry["problem"] == "baseline"]
        ['FedAvg', 'Local']
    """
    entries: list[Entry] = json.loads((files("idiolect") / "methods" / "catalog.json").read_text(encoding="utf-8"))
    return entries


def show(console: Console) -> None:
    """List the methods by problem, with what each costs a client in a round."""
    listed = table("method", "year", "gradients", "down", "up", "what it does")
    for problem, entries in groupby(read(), key=lambda entry: entry["problem"]):
        listed.add_row(Text(problem, style="bold"))
        for entry in entries:
            sizes = (f"{entry['down']:.2f}", f"{entry['up']:.2f}")
            row = (f"  {entry['name']}", str(entry["year"]), str(entry["gradients"]), *sizes, entry["idea"])
            listed.add_row(*row)
        listed.add_section()
    console.print(
        "gradients: per local step; down, up: what a client receives and sends in a round, in models "
        "(of the default network for digits)\n"
    )
    console.print(listed)
    console.print("\nidiolect describe METHOD tells more; parts are added with +: 'fedbn + sam(0.05)'")


def table(*headers: str) -> Table:
    """Return an empty table in the style of the command line."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for position, header in enumerate(headers):
        made.add_column(header, overflow="fold", no_wrap=position == 0)
    return made
