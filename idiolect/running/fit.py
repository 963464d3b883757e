"""Train: one call from a model and clients to a finished run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.calls import takes
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.rounds.training import Training
from idiolect.running.arguments import check_types, explained
from idiolect.running.assemble import assemble
from idiolect.running.options import Machine, Output
from idiolect.running.playing import play_all
from idiolect.running.run import Run
from idiolect.running.validate import numbers_of, untested


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
        rounds: number of rounds. A run that is resumed may have more rounds than before.
        training: how a client trains in a round: learning rate, epochs, batch size, optimizer.
        seed: decides which clients take part, the order of examples and dropout. The same seed gives the same bits.
        participation: fraction of the clients that take part in a round, above 0 and at most 1; at least one client
            always takes part.
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
        UsageError: before training, one line that names the invalid input; during training, if no client's result is
            finite.

    Example:
        >>> import idiolect, torch
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
    if on_round is not None:
        takes("on_round", on_round, "run, record")
    rounds, participation, evaluate_every, seed = numbers_of(rounds, participation, evaluate_every, seed)
    run = assemble(
        model,
        clients,
        method,
        rounds=rounds,
        training=training,
        seed=seed,
        participation=participation,
        loss=loss,
        metrics=metrics,
        machine=machine,
        directory=output.directory,
    )
    run.about.update(output.about or {})
    run.directory = output.directory
    for note in untested(run.federation.clients):
        print(f"idiolect: {note}", file=sys.stderr)
    play_all(run, evaluate_every, output, on_round)
    return run
