"""Events and status of a run, for people: printed lines, events.jsonl and status.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from idiolect.storage.run_directory import as_json, write_whole

STATUS, EVENTS = "status.json", "events.jsonl"

REPEAT_AFTER = 60.0
"""Seconds after which the same event may be logged again."""


class Events:
    """Log events, printed and appended to events.jsonl, and write status.json.

    Args:
        path: directory of the run.
        rounds: number of rounds of the run.

    Attributes:
        round: completed rounds.
        metrics: the latest evaluation of each client, for the status.
    """

    def __init__(self, path: Path, rounds: int) -> None:
        self.round = 0
        self.metrics: Mapping[str, Mapping[str, float]] = {}
        self._path, self._rounds = path, rounds
        self._status = ""
        self._last_logged: dict[tuple[int, str, str], float] = {}

    def log(self, text: str, client: str = "") -> None:
        """Log one line; the same line about the same client in the same round is logged once a minute at most."""
        now, text = time.time(), one_line(text)
        event = self.round, client, text
        if now - self._last_logged.get(event, 0.0) < REPEAT_AFTER:
            return
        self._last_logged[event] = now
        subject = f"client {client!r}: " if client else ""
        completed = f"{self.round} of {pluralize(self._rounds, 'round')} completed"
        print(f"idiolect: {completed}: {subject}{text}", flush=True)
        stamp = datetime.fromtimestamp(now).astimezone().isoformat(timespec="seconds")
        record = {"time": stamp, "round": self.round, "client": client, "event": text}
        with (self._path / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_status(self, phase: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the status file if the status has changed."""
        with_metrics = {client: {**site, "metrics": self.metrics.get(client, {})} for client, site in sites.items()}
        status = {"round": self.round, "rounds": self._rounds, "phase": phase, "sites": with_metrics}
        if (text := as_json(status)) != self._status:
            self._status = text
            write_whole(self._path / STATUS, as_json({"time": time.time(), **status}, indent=1).encode())


def one_line(text: str) -> str:
    r"""Return untrusted text as one line of at most 500 printable characters, without terminal control codes.

    Example:
        >>> one_line("out of\nmemory \x1b[2J")
        'out of memory ?[2J'
    """
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line[:500])


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> pluralize(1, "site"), pluralize(3, "site")
        ('1 site', '3 sites')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
