"""Train: one call from a model and clients to a finished run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Model
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.calls import takes
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.engines.choose import check_engine, choose
from idiolect.engines.federation import Federation
from idiolect.rounds.training import Training
from idiolect.running.arguments import check_types, explained
from idiolect.running.evaluation import default_metrics, evaluate_all
from idiolect.running.options import Machine, Output
from idiolect.running.run import Run
from idiolect.running.trial import check_metrics
from idiolect.running.validate import check_parts, device_of, numbers_of, prepare, untested
from idiolect.storage import checkpoint
from idiolect.storage.disk import store_for
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from idiolect.running.progress import Progress


@explained
def fit(
    model: nn.Module,
    clients: Mapping[str, ClientData],
    method: Method,
    *,
    rounds: int,
    training: Training = Training(),
    seed: int = 0,
    participation: float = 1.0,
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    evaluate_every: int = 1,
    machine: Machine = Machine(),
    output: Output = Output(),
    on_round: Callable[[Run, Mapping[str, Any]], None] | None = None,
) -> Run:
    """Train a personal model for every client.

    Args:
        model: any module; its weights are the initial weights, and it is not changed. Everything runs in its dtype.
        clients: each client's examples, by the client's name.
        method: from `idiolect.methods`, or parts of your own choice.
        rounds: number of rounds.
        training: how a client trains in a round: learning rate, epochs, batch size, optimizer.
        seed: decides which clients take part, the order of examples and dropout. The same seed gives the same bits.
        participation: share of the clients that take part in a round, in (0, 1]; at least one does.
        loss: (output, target) to the mean over the batch.
        metrics: what is measured besides the loss; the first leads the tables. By default accuracy for
            cross-entropy, and nothing for other losses.
        evaluate_every: rounds between evaluations of all clients; the last round is always evaluated.
        machine: engine, device, precision, and where the clients' memories are kept.
        output: directory, resume, report, progress bar.
        on_round: called after each round with the run and the round's record.

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
    check_types(model, clients, method, metrics, {"training": training, "machine": machine, "output": output})
    takes("loss", loss, "output, target")
    if on_round is not None:
        takes("on_round", on_round, "run, record")
    rounds, participation, evaluate_every, seed = numbers_of(rounds, participation, evaluate_every, seed)
    with torch.random.fork_rng(devices=[]):
        wrapped = Model(model, loss, device_of(machine.device, model), machine.precision == "bfloat16")
        wrapped, kept, notes = prepare(wrapped, clients, training)
        wrapped = wrapped.extended(method.attach)
        engine = machine.engine
        if isinstance(engine, str):
            engine, note = choose(engine, wrapped, kept, training, max(1, round(participation * len(kept))))
        else:
            check_engine(engine, wrapped, kept, training)
            note = repr(engine)
        own = ", ".join(p.name for p in method.parts if p.objective)
        by_autograd = f", with the loss of {own} by autograd" if own and "explicit kernels" in note else ""
        notes.append(f"clients are trained {note}{by_autograd}")
        if method.transductive:
            notes.append(f"predictions use the unlabeled test inputs (transductive): {', '.join(method.transductive)}")
        keep = partial(store_for, machine.memory, output.directory, len(kept))
        federation = Federation(wrapped, method, training, rounds, participation, seed, kept, engine, keep)
        check_parts(federation)
        measured = default_metrics(loss) if metrics is None else tuple(metrics)
        check_metrics(wrapped, kept, measured)
        for note in untested(kept):
            print(f"idiolect: {note}", file=sys.stderr)
        run = Run(federation, measured, notes, dict(output.about or {}))
        with closing(engine):
            _play_all(run, evaluate_every, output, on_round)
    return run


def _play_all(
    run: Run, evaluate_every: int, output: Output, on_round: Callable[[Run, Mapping[str, Any]], None] | None
) -> None:
    """Play the rounds that are left, write each, and finish the run."""
    store, rounds = _open(run, output), run.federation.rounds
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
    if output.directory is None:
        return None
    store = RunDirectory(output.directory, resume=output.resume)
    if output.resume:
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
