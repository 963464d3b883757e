"""``python -m benchmarks.shares``: how much of a round is local training, and what an evaluation of everybody takes.

Workers add the time they spend in local training to a number that all processes share; a round's share is that number
over workers times the round's seconds. Evaluation is of 100 test examples for each client, under its own model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.protocol import Session
from benchmarks.report import machine
from benchmarks.runners.ours import method
from benchmarks.workloads import WORKLOADS, examples, network
from idiolect import client
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import accuracy
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.rounds.training import Training
from idiolect.running.evaluation import evaluate_all


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shares", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["w1", "w2", "bn"])
    parser.add_argument("--rounds", type=int, default=4)
    told = parser.parse_args(argv)
    trained = multiprocessing.Value("d")
    plain = client.descend

    def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        began = time.perf_counter()
        found = plain(*args, **kwargs)
        with trained.get_lock():
            trained.value += time.perf_counter() - began
        return found

    client.descend = timed
    workers = len(os.sched_getaffinity(0))
    print(f"{machine()}\n\n| workload | round, s | outside local training | evaluation of all, s | of a round |")
    print("|---|---|---|---|---|")
    for name in told.workloads:
        made = federation(name, workers)
        rows = []
        for _ in range(told.rounds + 1):
            trained.value, began = 0.0, time.perf_counter()
            made.play()
            seconds = time.perf_counter() - began
            share, began = 1 - trained.value / (workers * seconds), time.perf_counter()
            evaluate_all(made, (accuracy,))
            rows.append((seconds, share, time.perf_counter() - began))
        made.engine.close()
        seconds, share, evaluating = (median(column) for column in zip(*rows[1:], strict=True))
        print(
            f"| {name} | {seconds:.2f} | {100 * share:.1f} % | {evaluating:.2f} | {100 * evaluating / seconds:.0f} % |"
        )


def federation(name: str, workers: int) -> Federation:
    """Return the workload, with test examples, in one process per core."""
    torch.set_num_threads(1)
    work = WORKLOADS[name]
    clients = {
        f"{i:03}": ClientData(train=(x, y), test=(x[:100], y[:100]))
        for i, (x, y) in enumerate(zip(*examples(work), strict=True))
    }
    training = Training(work.lr, work.epochs, work.batch)
    made, share = method(Session(work, "fedavg", "", None)), work.per_round / work.clients
    return Federation(Model(network(work)), made, training, 10**6, share, 1, clients, Processes(workers))


if __name__ == "__main__":
    main()
