"""The worker of a site's own process: it answers the relay's messages one after the other."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from idiolect.flower.protocol.messages import EVALUATE, FIELDS, REFUSED, REGISTER, TRAIN
from idiolect.flower.site.app import Site
from idiolect.flower.site.relay import FAILED, receive, send

_DONE = {REGISTER: "registered", TRAIN: "trained", EVALUATE: "evaluated"}


class RelayServer:
    """Answer messages over a socket, in a thread of its own.

    Args:
        site: the app that answers.
        config: the site's own settings.
        path: path of the socket, in a folder that only its owner can enter.
    """

    def __init__(self, site: Site, config: Mapping[str, object], path: Path) -> None:
        self._site, self._config = site, dict(config)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except (OSError, ConnectionError) as error:
                    print(f"idiolect: a message was lost: {error}", file=sys.stderr, flush=True)

    def _answer(self, connection: socket.socket) -> None:
        kind, content = receive(connection)
        started = time.monotonic()
        instruction: dict[str, object] = dict(content.config_records.get(FIELDS, {}))
        try:
            reply = self._site.answer(kind, content, self._config)
            done = _DONE[kind]
            if REFUSED in reply:
                done = f"refused: {reply.config_records[REFUSED]['reason']!s}"
            elif kind == EVALUATE:
                folder = f"{self._config['state-dir']}/{self._config['client-id']}/{instruction['run']!s}"
                done = f"evaluated; the personal model is {folder}/personal.safetensors"
        except Exception as error:  # user code may raise anything; the worker continues
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            done, reply = f"failed: {reason}", RecordDict({FAILED: ConfigRecord({"reason": reason})})
        seconds, completed = time.monotonic() - started, instruction.get("round", 0)
        print(f"idiolect: {done} ({seconds:.1f} s; rounds completed: {completed!s})", flush=True)
        send(connection, kind, reply)
