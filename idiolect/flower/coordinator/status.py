"""`idiolect status`: how a running federation stands."""

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
    """Print round, phase, sites and the last events of a run.

    Args:
        console: where to print.
        folder: of the run, or of the server if the run is in its folder `run`.

    Raises:
        UsageError: if no run has begun there.
    """
    found = next((path for path in (folder, folder / "run") if (path / STATUS).is_file()), None)
    if found is None:
        raise UsageError(f"no run has begun in {folder} yet: it has no {STATUS}")
    told = json.loads((found / STATUS).read_text())
    console.print(f"round {told['round']} of {told['rounds']} played, {told['phase']} (as of {_ago(told['time'])})")
    console.print(_sites(told["sites"]))
    events = (found / EVENTS).read_text().splitlines()[-5:] if (found / EVENTS).is_file() else []
    for event in map(json.loads, events):
        who = f"{event['client']}: " if event["client"] else ""
        console.print(f"{event['time'][11:19]}  {who}{event['what']}", style="dim", highlight=False)


def _sites(sites: dict[str, dict[str, Any]]) -> Table:
    measured = list(dict.fromkeys(k for site in sites.values() for k in site.get("measured", {})))
    table = Table("site", "state", "last seen")
    for name in (*measured, "examples", "MB up", "MB down"):
        table.add_column(name, justify="right")
    for client, site in sites.items():
        numbers = [f"{site['measured'][m]:.4f}" if m in site.get("measured", {}) else "–" for m in measured]
        traffic = [f"{site[way] / 1e6:.2f}" if way in site else "–" for way in ("up", "down")]
        seen = _ago(site["last seen"]) if site.get("last seen") else "–"
        table.add_row(client, site["state"], seen, *numbers, f"{site['examples']:,}", *traffic)
    return table


def _ago(then: float) -> str:
    """Return a time in words.

    Example:
        >>> _ago(time.time() - 90)
        '1 min ago'
    """
    seconds = max(0.0, time.time() - then)
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {word} ago"
    return f"{int(seconds)} s ago"
