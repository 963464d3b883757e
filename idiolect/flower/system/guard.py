"""Run one of Flower's commands and end it when the process that started it has ended.

This file is run as a script, so it imports nothing but what the command needs. Its standard input is a pipe from the
process that started it; the pipe closes when that process ends, for whatever reason.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import entry_points


def main(name: str, arguments: list[str]) -> None:
    """Run a console script of an installed package in this process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    (command,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, *arguments]
    command.load()()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
