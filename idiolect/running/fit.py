"""Train: one call from a model and clients to a finished run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Loss, Model
from idiolect.compute.metrics import Metric, accuracy
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.engines.base import Engine
from idiolect.engines.choose import choose
from idiolect.engines.federation import Federation
from idiolect.rounds.training import Training
from idiolect.running.evaluation import evaluate_all
from idiolect.running.progress import Progress
from idiolect.running.run import Run
from idiolect.running.validate import check_run, device_of, is_cross_entropy, precision_of, prepare
from idiolect.storage import checkpoint, disk
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import RunDirectory


def fit(
    model: nn.Module,
    clients: Mapping[str, ClientData],
    method: Method,
    *,
    rounds: int,
    participation: float = 1.0,
    seed: int = 0,
    training: Training = Training(),
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    evaluate_every: int = 1,
    on_round: Callable[[Run, Mapping[str, Any]], None] | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    report: bool = True,
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
    engine: str | Engine = "auto",
    device: str = "auto",
    precision: Literal["full", "bfloat16"] = "full",
    memory: disk.Kind = "auto",
) -> Run:
    """Train a personal model for every client.

    Args:
        model: any module; its current weights are the initial weights, and it is not changed. Everything runs
            in its dtype.
        clients: each client's examples, by the client's name.
        method: from `idiolect.methods`, or parts of your own choice.
        rounds: how many rounds.
        participation: share of the clients that takes part in a round, in (0, 1]; at least one does.
        seed: decides cohorts, the order of examples and dropout. The same seed gives the same bits.
        training: how a client trains in a round.
        loss: (output, target) to the mean over the batch.
        metrics: what is measured beside the loss; the first leads the tables. By default accuracy where the loss
            is cross-entropy, and the loss alone otherwise.
        evaluate_every: rounds between evaluations of all clients; the last round is always evaluated.
        on_round: called after each round with the run and the round's record.
        directory: where the run is written: config, one line of metrics a round, tensors, report. None writes
            nothing.
        resume: go on with the run in `directory`, which must have been started with the same settings.
        report: draw report.html into the directory at the end.
        progress: show a progress bar with the time left.
        about: more facts for the config that is written (where the data come from, say).
        engine: how clients are trained, see `idiolect.engines.choose`: ``"auto"``, ``"sequential"``, ``"threads"``,
            ``"processes"``, ``"stacked"``, or one of your own making, such as ``Stacked(16)``. All give the same
            results but for rounding; what was chosen is among the run's notes and in its config.
        device: where everything runs, such as ``"cpu"`` or ``"cuda"``; ``"auto"`` is a GPU if there is one, else where
            the model is. Models that come out are where the given one is.
        precision: ``"bfloat16"`` runs forward passes in mixed precision, see docs/performance.md for what it costs.
        memory: where the clients' memories are between rounds: "ram", "disk" (the folder `memory` in the directory,
            or a temporary one; as many clients as the disk holds), or "auto", which is disk where they would take
            more than an eighth of the RAM of the machine or its container.

    Returns:
        The run: tables, personal models, shared weights.

    Raises:
        UsageError: one line, before any training, if something does not fit; or if no client's result is finite.

    Example:
        >>> import idiolect
        >>> def ward(shift):
        ...     x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
        ...     y = (x.sum(dim=1) > 0).long()
        ...     return idiolect.ClientData(train=(x[:200] + shift, y[:200]), test=(x[200:] + shift, y[200:]))
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> run = idiolect.fit(net, {"a": ward(0.0), "b": ward(3.0)}, idiolect.methods.fedbn(), rounds=20)
        >>> run.records[-1]["personalized"]["test"]["accuracy"]["mean"] > 0.85
        True
        >>> run.personal("b")(torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """
    check_run(rounds, participation, evaluate_every)
    with torch.random.fork_rng(devices=[]):
        wrapped = Model(model, loss, device_of(device, model), precision_of(precision))
        kept, notes = prepare(wrapped, clients, training)
        wrapped = wrapped.extended(method.attach)
        if metrics is None:
            metrics = (accuracy,) if is_cross_entropy(loss) else ()
        if isinstance(engine, str):
            chosen, note = choose(engine, wrapped, kept, training, max(1, round(participation * len(kept))))
        else:
            chosen, note = engine, repr(engine)
        own = ", ".join(p.name for p in method.parts if p.objective)
        by_autograd = f", with the loss of {own} by autograd" if own and "explicit kernels" in note else ""
        notes.append(f"clients are trained {note}{by_autograd}")
        if method.transductive:
            notes.append(f"predictions use the unlabelled test inputs (transductive): {', '.join(method.transductive)}")
        keep = partial(disk.store_for, memory, directory, len(kept))
        federation = Federation(wrapped, method, training, rounds, participation, seed, kept, chosen, keep)
        run = Run(federation, tuple(metrics), notes, dict(about or {}))
        store = _open(run, directory, resume)
        bar_of = Progress(f"{method.name}, seed {seed}", rounds, run.round, run.lead) if progress else nullcontext()
        with closing(chosen), bar_of as bar:
            while run.round < rounds:
                due = (run.round + 1) % evaluate_every == 0 or run.round + 1 == rounds
                record = _play(run, due)
                if store:
                    store.append(record)
                    if due:
                        checkpoint.save(store, federation)
                if on_round:
                    on_round(run, record)
                if bar:
                    bar.advance(record)
        if store:
            _finish(run, store, report)
    return run


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


def _open(run: Run, directory: str | Path | None, resume: bool) -> RunDirectory | None:
    if directory is None:
        if resume:
            raise UsageError("resume needs the directory of the run to go on with")
        return None
    store = RunDirectory(directory, resume=resume)
    if resume:
        run.records[:] = checkpoint.restore(store, run.federation, run.config())
    else:
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
