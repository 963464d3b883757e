"""The process of a site that stays: model, data and state at hand, one message after the other."""

from __future__ import annotations

import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from idiolect.flower.relay import FAILED, receive, send
from idiolect.flower.site import Site


class Worker:
    """Answers messages over a socket, in a thread of its own.

    Args:
        site: who answers.
        config: the site's own settings.
        path: of the socket; its folder must be one that only its owner can enter.
    """

    def __init__(self, site: Site, config: Mapping[str, object], path: Path) -> None:
        self._site, self._config = site, dict(config)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(path))
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._door.close()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            with line:
                try:
                    self._answer(line)
                except (OSError, ConnectionError) as error:
                    print(f"idiolect: a message was lost on its way: {error}", file=sys.stderr, flush=True)

    def _answer(self, line: socket.socket) -> None:
        kind, content = receive(line)
        try:
            reply = self._site.answer(kind, content, self._config)
        except Exception as error:  # the user's own code may raise anything; the site lives on
            traceback.print_exc()
            reply = RecordDict({FAILED: ConfigRecord({"why": f"{type(error).__name__}: {error}"})})
        send(line, kind, reply)
