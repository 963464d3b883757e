"""What people see of a running federation: one line per event, and a file that says how things stand."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from idiolect.storage.run_directory import as_json, write_whole

STATUS, EVENTS = "status.json", "events.jsonl"

AGAIN = 60.0
"""Seconds after which the same line may be said again."""


class Events:
    """Events of a run, printed and kept in events.jsonl; and status.json, which is replaced as a whole.

    Args:
        path: the directory of the run.
        rounds: how many there will be.

    Attributes:
        round: rounds played.
        results: what each client has measured last, for the status.
    """

    def __init__(self, path: Path, rounds: int) -> None:
        self.round = 0
        self.results: Mapping[str, Mapping[str, float]] = {}
        self._path, self._rounds = path, rounds
        self._shown = ""
        self._last: dict[tuple[int, str, str], float] = {}

    def tell(self, what: str, client: str = "") -> None:
        """Say one line; the same line about the same client in the same round is not said again for a minute."""
        now, what = time.time(), plain(what)
        said = self.round, client, what
        if now - self._last.get(said, 0.0) < AGAIN:
            return
        self._last[said] = now
        who = f"client {client!r}: " if client else ""
        print(f"idiolect: {self.round} of {counted(self._rounds, 'round')} played: {who}{what}", flush=True)
        stamp = datetime.fromtimestamp(now).astimezone().isoformat(timespec="seconds")
        event = {"time": stamp, "rounds played": self.round, "client": client, "what": what}
        with (self._path / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def show(self, phase: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the status, if it differs."""
        own = {client: {**site, "measured": self.results.get(client, {})} for client, site in sites.items()}
        shown = {"round": self.round, "rounds": self._rounds, "phase": phase, "sites": own}
        if (text := as_json(shown)) != self._shown:
            self._shown = text
            write_whole(self._path / STATUS, as_json({"time": time.time(), **shown}, indent=1).encode())


def plain(text: str) -> str:
    r"""Return what may be another's text as one line of a length that can be read, and no sign that moves a cursor.

    Example:
        >>> plain("out of\nmemory \x1b[2J")
        'out of memory ?[2J'
    """
    line = " ".join(text.split())
    return "".join(sign if sign.isprintable() else "?" for sign in line[:500])


def counted(number: int, what: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "site"), counted(3, "site")
        ('1 site', '3 sites')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
