"""Runs one of Flower's commands, and ends it when whoever started it has gone, however it went.

Run as a file, so that it imports nothing but what the command needs. Standard input is a pipe from the starter.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import entry_points


def main(name: str, arguments: list[str]) -> None:
    """Run a console script of an installed package in this process."""
    threading.Thread(target=_watch, daemon=True).start()
    (command,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, *arguments]
    command.load()()


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
