"""The process of a site that stays: model, data and state at hand, one message after the other."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from idiolect.flower.protocol.messages import EVALUATE, HELLO, TRAIN
from idiolect.flower.site.app import REFUSED, Site
from idiolect.flower.site.relay import FAILED, receive, send

_DONE = {HELLO: "said who this is", TRAIN: "trained", EVALUATE: "measured"}


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
        began, done = time.monotonic(), _DONE[kind]
        try:
            reply = self._site.answer(kind, content, self._config)
            if kind == EVALUATE:
                done = f"measured; its own model is {self._config['state-dir']}/{self._config['client-id']}/" + (
                    f"{content.config_records['words']['run']!s}/personal.safetensors"
                )
            if REFUSED in reply:
                done = f"refused: {reply.config_records[REFUSED]['why']!s}"
        except Exception as error:  # the user's own code may raise anything; the site lives on
            traceback.print_exc()
            done = f"failed: {type(error).__name__}: {error}"
            reply = RecordDict({FAILED: ConfigRecord({"why": done.removeprefix("failed: ")})})
        round_ = content.config_records["words"].get("round", 0) if "words" in content else 0
        print(f"idiolect: {round_!s} rounds played: {done} ({time.monotonic() - began:.1f} s)", flush=True)
        send(line, kind, reply)
