"""`idiolect status`: print the status of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from idiolect.core.errors import UsageError
from idiolect.flower.coordinator.events import EVENTS, STATUS


def status(console: Console, folder: Path) -> None:
    """Print completed rounds, phase, sites and the latest events of a run.

    Args:
        console: where to print.
        folder: folder of the run, or of the server if the run is in its folder `run`.

    Raises:
        UsageError: if no run has started there.
    """
    directory = next((path for path in (folder, folder / "run") if (path / STATUS).is_file()), None)
    if directory is None:
        raise UsageError(f"no run has started in {folder}: it has no {STATUS}")
    found = json.loads((directory / STATUS).read_text())
    completed = f"{found['round']} of {found['rounds']} rounds completed"
    console.print(f"{completed}; {found['phase']} (updated {_ago(found['time'])})")
    console.print(_table(found["sites"]))
    events = (directory / EVENTS).read_text().splitlines()[-5:] if (directory / EVENTS).is_file() else []
    for event in map(json.loads, events):
        client = f"{event['client']}: " if event["client"] else ""
        console.print(f"{event['time'][11:19]}  {client}{event['event']}", style="dim", highlight=False)


def _table(sites: dict[str, dict[str, Any]]) -> Table:
    metrics = list(dict.fromkeys(name for site in sites.values() for name in site.get("metrics", {})))
    table = Table("site", "state", "last seen")
    for name in (*metrics, "examples", "MB up", "MB down"):
        table.add_column(name, justify="right")
    for client, site in sites.items():
        values = [f"{site['metrics'][m]:.4f}" if m in site.get("metrics", {}) else "–" for m in metrics]
        traffic = [f"{site[way] / 1e6:.2f}" if way in site else "–" for way in ("bytes_up", "bytes_down")]
        seen = _ago(site["last_seen"]) if site.get("last_seen") else "–"
        table.add_row(client, site["state"], seen, *values, f"{site['examples']:,}", *traffic)
    return table


def _ago(then: float) -> str:
    """Return how long ago a time was, in words.

    Example:
        >>> _ago(time.time() - 90)
        '1 min ago'
    """
    seconds = max(0.0, time.time() - then)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"
