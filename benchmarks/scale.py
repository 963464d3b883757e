"""``python -m benchmarks.scale``: what memory and time a round takes as clients and rounds grow.

FedBN on the network of workload ``bn``, 50 clients a round, in two processes. All clients hold the same examples, one
tensor, so that what grows is what the system keeps of a client.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from benchmarks.report import machine
from benchmarks.workloads import WORKLOADS, examples, network
from idiolect.compute.autograd import Model
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.methods import fedbn
from idiolect.rounds.training import Training


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each population in a process of its own and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--clients", nargs="+", type=int, default=[1000, 10000])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    told = parser.parse_args(argv)
    if told.alone:
        print(json.dumps(measure(told.alone, told.rounds)))
        return
    print(f"{machine()}\n\n| clients | memory, MB | ms a round | growth per 1000 rounds: memory, MB | ms a round |")
    print("|---|---|---|---|---|")
    for clients in told.clients:
        command = [sys.executable, "-m", "benchmarks.scale", "--alone", str(clients), "--rounds", str(told.rounds)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        row = json.loads(said)
        grows = f"{row['memory_slope']:+.1f} | {row['ms_slope']:+.2f}"
        print(f"| {clients} | {row['memory']:.0f} | {row['ms']:.1f} | {grows} |")


def measure(clients: int, rounds: int) -> dict[str, float]:
    """Play rounds; return memory of all processes in MB, median milliseconds a round, and how both grow."""
    torch.set_num_threads(1)
    work = WORKLOADS["bn"]
    x, y = (torch.from_numpy(part[0][:64]) for part in examples(work))
    held = ClientData((x, y))
    training = Training(work.lr, 1, work.batch)
    engine = Processes(2)
    share = min(1.0, 50 / clients)
    made = Federation(
        Model(network(work)), fedbn(), training, 10**6, share, 0, dict.fromkeys(map(str, range(clients)), held), engine
    )
    for client in made.clients:  # everybody has trained once: the state is as large as it gets
        made.memory.put(client, made.memory.get(client))
    seconds, memory = [], []
    for _ in range(rounds + 20):
        began = time.perf_counter()
        made.play()
        seconds.append(time.perf_counter() - began)
        memory.append(megabytes([None, *(w.process.pid for w in engine._crew._workers)]))  # type: ignore[union-attr]
    engine.close()
    late = slice(20, None)  # what the first rounds allocate is no growth
    turns = np.arange(rounds)
    return {
        "memory": fmean(memory[late]),
        "ms": 1e3 * median(seconds[late]),
        "memory_slope": 1e3 * float(np.polyfit(turns, memory[late], 1)[0]),
        "ms_slope": 1e6 * float(np.polyfit(turns, seconds[late], 1)[0]),
    }


def megabytes(processes: Sequence[int | None]) -> float:
    """Return what processes take together; pages they share count once."""
    total = 0
    for pid in processes:
        text = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text()
        total += int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))
    return total / 1024


if __name__ == "__main__":
    main()
