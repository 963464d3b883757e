"""Runs contestants in alternation: one plays a round while the others wait."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SETUP_SECONDS = 600.0


class RunnerError(Exception):
    """A runner died, was too slow, or said what is no JSON."""


@dataclass(frozen=True)
class Entrant:
    """Who takes part.

    Args:
        runner: module in `benchmarks.runners`.
        setting: how it may use the machine.
        checkout: the peer's source, where the runner needs one.
        python: the interpreter that has the peer's packages.
    """

    runner: str
    setting: str
    checkout: Path | None = None
    python: Path | None = None


@dataclass
class Entry:
    """What an entrant did in one workload under one method."""

    runner: str
    setting: str
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    error: str = ""
    rounds: list[dict[str, float]] = field(default_factory=list)
    """seconds, steps, cpu_seconds, moved; the first one is the warm-up."""


class Runner:
    """A runner as a process in a session of its own."""

    def __init__(self, entrant: Entrant, workload: str, method: str) -> None:
        # not resolved: the interpreter of a virtual environment is a link that must keep its name
        python = str(entrant.python.absolute() if entrant.python else sys.executable)
        command = [python, "-m", f"benchmarks.runners.{entrant.runner}", "--workload", workload]
        command += ["--method", method, "--setting", entrant.setting]
        command += ["--checkout", str(entrant.checkout)] if entrant.checkout else []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._heard = b""

    def go(self, timeout: float) -> dict[str, Any]:
        """Tell it to play a round; return what it says."""
        assert self._process.stdin
        try:
            self._process.stdin.write(b"go\n")
        except BrokenPipeError:
            raise RunnerError(self._last_words()) from None
        return self.hear(timeout)

    def hear(self, timeout: float) -> dict[str, Any]:
        """Return the next line of JSON."""
        assert self._process.stdout
        end = time.monotonic() + timeout
        while b"\n" not in self._heard:
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RunnerError(f"no answer after {timeout:g} s")
            if not (said := self._process.stdout.read(65536)):
                raise RunnerError(self._last_words())
            self._heard += said
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            said_line: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RunnerError(f"said {line[:80]!r}, which is no JSON") from None
        return said_line

    def stop(self) -> None:
        """End it and all it started."""
        assert self._process.stdin
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):  # all have ended by themselves
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for opened in (self._process.stdout, self._errors):
            if opened:
                opened.close()

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its output and live on
            self._process.wait(5)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return (
            re.sub(r"(/[^\s/'\"]+)+/", "", lines[-1].strip())[:200]
            if lines
            else f"ended with code {self._process.returncode}, without a word"
        )


def play(entrants: Sequence[Entrant], workload: str, method: str, rounds: int, timeout: float) -> list[Entry]:
    """Set all entrants up, then let them play round after round in turn; the order moves on by one in each pass.

    Args:
        entrants: who takes part; one that fails is reported, and the rest goes on.
        workload: name in `benchmarks.workloads`.
        method: fedavg or fedfsa.
        rounds: timed rounds, after one of warm-up.
        timeout: seconds for a round.
    """
    entries = [Entry(e.runner, e.setting) for e in entrants]
    runners: dict[int, Runner] = {}
    try:
        for i, entrant in enumerate(entrants):
            _note(f"{workload} {method}: {entrant.runner}, {entrant.setting}")
            runners[i] = Runner(entrant, workload, method)
            with _Reported(entries, runners, i):
                ready = runners[i].hear(SETUP_SECONDS)
                entries[i].versions, entries[i].threads = ready["versions"], ready["threads"]
        for turn in range(rounds + 1):
            _note(f"{workload} {method}: round {turn} of {rounds}")
            for k in range(len(entrants)):
                i = (turn + k) % len(entrants)
                if i in runners:
                    with _Reported(entries, runners, i):
                        entries[i].rounds.append(runners[i].go(timeout))
    finally:
        for runner in runners.values():
            runner.stop()
    return entries


class _Reported:
    """Whose runner fails inside is out, with the reason in its entry."""

    def __init__(self, entries: list[Entry], runners: dict[int, Runner], which: int) -> None:
        self._entries, self._runners, self._which = entries, runners, which

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, RunnerError):
            return False
        self._entries[self._which].error = str(error)
        self._runners.pop(self._which).stop()
        return True


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def commits(checkouts: Mapping[str, Path]) -> dict[str, str]:
    """Return the commit of each checkout."""
    return {
        name: subprocess.run(
            ["git", "-C", str(path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name, path in checkouts.items()
    }
