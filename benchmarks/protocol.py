"""What a runner says and hears: one line of JSON when it is ready, and one for every round it is told to play."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.workloads import WORKLOADS, Workload, network


@dataclass(frozen=True)
class Session:
    """What a runner is asked to do."""

    work: Workload
    method: str
    setting: str
    """How it may use the machine: "1 thread", "2 threads", "2 processes", or a word of the runner's own."""
    checkout: Path | None

    @property
    def count(self) -> int:
        return 1 if self.device == "cuda" else int(self.setting.split()[0])

    @property
    def device(self) -> str:
        return "cuda" if self.setting == "gpu" else "cpu"


@dataclass(frozen=True)
class Game:
    """A runner that is set up.

    Args:
        play: plays one round of training and aggregation, and returns the local steps it took.
        weights: returns the server's trainable weights as one vector.
        versions: of what is timed.
    """

    play: Callable[[], int]
    weights: Callable[[], Tensor]
    versions: dict[str, str] = field(default_factory=dict)


def serve(prepare: Callable[[Session], Game]) -> None:
    """Set up, then play a round per line of standard input. What the peer prints goes to standard error."""
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--method", choices=("fedavg", "fedfsa"), required=True)
    parser.add_argument("--setting", required=True)
    parser.add_argument("--checkout", type=Path)
    told = parser.parse_args()
    work = WORKLOADS[told.workload]
    start = parameters_to_vector(network(work).parameters()).detach()
    game = prepare(Session(work, told.method, told.setting, told.checkout and told.checkout.resolve()))
    versions = {"python": platform.python_version(), "torch": torch.__version__, **game.versions}
    print(json.dumps({"ready": True, "versions": versions, "threads": torch.get_num_threads()}), file=line)
    for _ in sys.stdin:
        cpu, clock = cpu_seconds(), time.perf_counter()
        steps = game.play()
        if told.setting == "gpu":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - clock, cpu_seconds() - cpu
        moved = float((game.weights().detach().cpu() - start).norm())
        print(json.dumps({"seconds": seconds, "steps": steps, "cpu_seconds": cpu, "moved": moved}), file=line)


def cpu_seconds() -> float:
    """Return the CPU time of this process and all below it, the living and the waited for."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    family, size = {os.getpid()}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


class Counter:
    """Counts the optimizer steps that are taken in this process, whoever takes them."""

    def __init__(self) -> None:
        self.steps = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.steps += 1

    def during(self, play: Callable[[], object]) -> int:
        """Return how many steps a call takes."""
        before = self.steps
        play()
        return self.steps - before
