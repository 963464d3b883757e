"""``python -m benchmarks``: time everything that is installed or pointed at, side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Entrant, commits, play
from benchmarks.report import write
from benchmarks.workloads import WORKLOADS

ON_GPU = [("ours", "gpu"), ("pfllib", "gpu")]
PEERS = ("pfllib", "fedfsa", "pflresearch", "flbench", "flower")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the contest that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU: w1all and bn1000, unless others are named")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--methods", nargs="+", choices=("fedavg", "fedfsa"), default=["fedavg", "fedfsa"])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each, after one of warm-up")
    parser.add_argument("--only", nargs="+", help="runners to take; all that are there by default")
    parser.add_argument("--skip", nargs="+", default=[], metavar="RUNNER:SETTING", help='such as "ours:sequential"')
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="threads, or processes")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=CHECKOUT", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.md"))
    told = parser.parse_args(argv)
    if told.rounds < 1:
        parser.error("--rounds is at least 1")
    if told.gpu and not torch.cuda.is_available():
        parser.exit(2, "no GPU here, nothing was timed; on a machine with one, the same command is ready\n")
    pairs = []
    for given in (told.peer, told.peer_python):
        split = dict(pair.partition("=")[::2] for pair in given)
        if wrong := [name for name, path in split.items() if name not in PEERS or not Path(path).exists()]:
            parser.error(f"{wrong[0]}={split[wrong[0]]}: give NAME=PATH, a path that exists, NAME one of {PEERS}")
        pairs.append({name: Path(path) for name, path in split.items()})
    checkouts, pythons = pairs
    all_of_them = [
        Entrant(name, setting, checkouts.get(name), pythons.get(name))
        for name, setting in (ON_GPU if told.gpu else settings(told.cores))
        if (name not in PEERS or name in checkouts or name in pythons)
        and (not told.only or name in told.only)
        and f"{name}:{setting}" not in told.skip
    ]
    if not all_of_them:
        parser.error(f"--only {told.only}: no such runner, or a peer without --peer")
    tables = {}
    for workload in told.workloads or (("w1all", "bn1000") if told.gpu else ("w1", "w2", "bn")):
        for method in told.methods:
            tables[workload, method] = play(all_of_them, workload, method, told.rounds, told.timeout)
            write(told.out, tables, commits(checkouts))
    print(told.out.read_text())


def settings(cores: int) -> Iterator[tuple[str, str]]:
    """Yield every runner with each way it may use the machine."""
    threads, processes = f"{cores} threads", f"{cores} processes"
    yield from (("bare", s) for s in ("1 thread", threads, processes))
    yield "naive", "default threads"
    yield from (("ours", s) for s in ("sequential", "stacks of 10", threads, processes))
    yield from (("pfllib", s) for s in ("1 thread", threads))
    yield from (("fedfsa", s) for s in ("1 thread", threads))
    yield from (("pflresearch", s) for s in ("1 thread", processes))
    yield from (("flbench", s) for s in ("1 thread", processes))
    yield from (("flower", s) for s in (threads, processes))


if __name__ == "__main__":
    main()
