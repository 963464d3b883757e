"""A run before its first round: model, clients and method checked and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from idiolect.compute.autograd import Model
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.calls import takes
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.engines.choose import check_engine, choose
from idiolect.engines.federation import Federation
from idiolect.rounds.training import Training
from idiolect.running.arguments import check_types
from idiolect.running.evaluation import default_metrics
from idiolect.running.options import Machine
from idiolect.running.run import Run
from idiolect.running.trial import check_metrics
from idiolect.running.validate import check_parts, device_of, prepare
from idiolect.storage.disk import store_for


def assemble(
    model: nn.Module,
    clients: Mapping[str, ClientData],
    method: Method,
    *,
    rounds: int,
    training: Training,
    seed: int,
    participation: float,
    loss: Loss,
    metrics: Sequence[Metric] | None,
    machine: Machine,
    directory: str | Path | None,
) -> Run:
    """Return a run at round 0; the arguments are those of `fit`, with the directory of its output.

    Raises:
        UsageError: one line, if something does not fit.
    """
    check_types(model, clients, method, metrics, {"training": training, "machine": machine})
    takes("loss", loss, "output, target")
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
        keep = partial(store_for, machine.memory, directory, len(kept))
        federation = Federation(wrapped, method, training, rounds, participation, seed, kept, engine, keep)
        check_parts(federation)
        measured = default_metrics(loss) if metrics is None else tuple(metrics)
        check_metrics(wrapped, kept, measured)
        return Run(federation, measured, notes)
