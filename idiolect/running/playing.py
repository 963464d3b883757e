"""Rounds of a run: play them, evaluate when it is due, and write each to the run's directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from idiolect.running.evaluation import evaluate_all
from idiolect.running.options import Output
from idiolect.storage import checkpoint
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import RunDirectory, holds_run, read_run

if TYPE_CHECKING:
    from idiolect.running.progress import Progress
    from idiolect.running.run import Run

OnRound = Callable[["Run", Mapping[str, Any]], None]
"""Called after each round, with the run and the round's record."""


def play_all(run: Run, evaluate_every: int, output: Output, on_round: OnRound | None = None) -> None:
    """Play the rounds that are left, write each, and finish the run.

    Args:
        run: the run; it is at round 0, or where a checkpoint left it.
        evaluate_every: rounds between evaluations of all clients; the last round is always evaluated.
        output: where it is written, and how.
        on_round: called after each round with the run and the round's record.
    """
    rounds = run.federation.rounds
    with torch.random.fork_rng(devices=[]), closing(run.federation.engine):
        store = _open(run, output)
        with _bar(run, rounds) if output.progress else nullcontext() as bar:
            while run.round < rounds:
                due = (run.round + 1) % evaluate_every == 0 or run.round + 1 == rounds
                record = _play(run, due)
                if store:
                    store.append(record)
                    if due:
                        checkpoint.save(store, run.federation)
                if on_round:
                    on_round(run, record)
                if bar:
                    bar.advance(record)
        if store:
            _finish(run, store, output.report)


def _bar(run: Run, rounds: int) -> Progress:
    from idiolect.running.progress import Progress  # draws with rich, which takes time to load

    return Progress(f"{run.federation.method.name}, seed {run.federation.seed}", rounds, run.round, run.lead)


def _play(run: Run, evaluating: bool) -> dict[str, Any]:
    began = time.perf_counter()
    played = run.federation.play()
    trained = time.perf_counter()
    record: dict[str, Any] = {
        "round": run.round,
        "cohort": played.cohort,
        "lr": played.lr,
        "seconds": trained - began,
        "train_loss": played.loss,
        "bytes_up": played.bytes_up,
        "bytes_down": played.bytes_down,
        "gradients": played.gradients,
    }
    if played.dropped:
        record["dropped"] = played.dropped
    shown = {client: run.inspect(client) for client in played.cohort}
    if any(shown.values()):
        record["inspect"] = shown
    if evaluating:
        record |= evaluate_all(run.federation, run.metrics)
        record["seconds_evaluating"] = time.perf_counter() - trained
    run.records.append(record)
    return record


def _open(run: Run, output: Output) -> RunDirectory | None:
    """Return the directory of the run, started or resumed, or None; a resumed run may have more rounds than before."""
    if output.directory is None:
        return None
    resume = holds_run(output.directory) if output.resume == "auto" else output.resume
    store = RunDirectory(output.directory, resume=resume)
    if not resume:
        store.write_config(run.config())
        return store
    played = read_run(store.path)[0]["config"]["rounds"]
    more = played < run.federation.rounds
    run.records[:] = checkpoint.restore(store, run.federation, run.config(played if more else None))
    if more:
        store.write_config(run.config())
    return store


def _finish(run: Run, store: RunDirectory, report: bool) -> None:
    memory = run.federation.memory
    store.save_tensors("shared", run.weights)
    if isinstance(memory, RamStore):  # on disk they are written already, and may be more than fits in RAM
        kept = {f"{c}/{n}": t for c in memory for n, t in run.memory(c)["share"].items()}
        store.save_tensors("personal", kept)
    if report:
        run.report(store.path / "report.html")
