"""The table: client-steps per second, side by side."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import Entry
from benchmarks.workloads import WORKLOADS, Workload

HEAD = """| runner | setting | steps/s | middle half | ratio | CPU ms/step | steps a round | rounds | moved | note |
|---|---|---|---|---|---|---|---|---|---|"""
BASE = ("bare", "processes")
Tables = Mapping[tuple[str, str], Sequence[Entry]]


def write(path: Path, tables: Tables, commits: Mapping[str, str]) -> None:
    """Write the tables as Markdown, and all samples as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {e.runner: e.versions for entries in tables.values() for e in entries if e.versions}
    about = {"machine": machine(), "versions": versions, "commits": dict(commits)}
    parts = [f"# Side by side\n\n{about['machine']}", *(table(*key, entries) for key, entries in tables.items())]
    parts.append("\n".join(f"- {name}: {_line(said)}" for name, said in versions.items()))
    parts.append("\n".join(f"- {name}: commit {commit}" for name, commit in commits.items()))
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    samples = [
        {"workload": workload, "method": method, **asdict(entry)}
        for (workload, method), entries in tables.items()
        for entry in entries
    ]
    path.with_suffix(".json").write_text(json.dumps({**about, "samples": samples}, indent=1) + "\n")


def machine() -> str:
    """Return processor, cores and date; no name of the machine."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, {datetime.now(UTC):%Y-%m-%d}"


def table(workload: str, method: str, entries: Sequence[Entry]) -> str:
    """Return one table; the ratio is to the bare loop in several processes."""
    work = WORKLOADS[workload]
    base = next((e for e in entries if e.runner == BASE[0] and BASE[1] in e.setting and not fault(e, work)), None)
    rows = "\n".join(_row(e, work, base) for e in entries)
    return f"## {workload}, {method}: {work.steps_per_round} steps a round\n\n{HEAD}\n{rows}"


def speeds(entry: Entry) -> list[float]:
    """Return client-steps per second of the timed rounds."""
    return [r["steps"] / r["seconds"] for r in entry.rounds[1:]]


def fault(entry: Entry, work: Workload) -> str:
    """Return why an entry cannot be compared, or an empty string."""
    if entry.error:
        return entry.error
    if len(entry.rounds) < 2:
        return "no timed round"
    taken = {int(r["steps"]) for r in entry.rounds}
    if taken != {work.steps_per_round}:
        return f"takes {', '.join(map(str, sorted(taken)))} steps a round, not {work.steps_per_round}: no ratio"
    if not min(r["moved"] for r in entry.rounds) > 0:
        return "the server's weights did not move: no ratio"
    return ""


def _row(entry: Entry, work: Workload, base: Entry | None) -> str:
    name, note = f"| {entry.runner} | {entry.setting} |", fault(entry, work).replace("|", "/")
    if len(entry.rounds) < 2:
        return f"{name} | | | | | | | {note} |"
    fast = speeds(entry)
    low, _, high = statistics.quantiles(fast, n=4, method="inclusive") if len(fast) > 1 else fast * 3
    timed = entry.rounds[1:]
    cpu = 1e3 * sum(r["cpu_seconds"] for r in timed) / sum(r["steps"] for r in timed)
    middle = statistics.median(fast)
    ratio = "" if note or base is None else f"{middle / statistics.median(speeds(base)):.2f}"
    moved, steps = entry.rounds[0]["moved"], timed[-1]["steps"]
    return (
        f"{name} {middle:.1f} | {low:.1f} to {high:.1f} | {ratio} | {cpu:.2f} | {steps:.0f} | {len(timed)} "
        f"| {moved:.3g} | {note} |"
    )


def _line(said: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in said.items())
