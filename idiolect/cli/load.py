"""`load_run`: a run of another process, from its directory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.nn import functional as F

from idiolect.cli.experiment import build
from idiolect.cli.main import parse
from idiolect.cli.settings import Experiment, experiment_of
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.rounds.training import Training
from idiolect.running.arguments import explained
from idiolect.running.load import restored
from idiolect.running.options import Machine
from idiolect.running.run import Run
from idiolect.storage.run_directory import read_run


@explained
def load_run(
    directory: str | Path,
    model: nn.Module | None = None,
    clients: Mapping[str, ClientData] | None = None,
    method: Method | None = None,
    *,
    training: Training | None = None,
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    machine: Machine | None = None,
) -> Run:
    """Return the run that a directory holds, as `fit` returned it: predict, add clients, make tables, play more rounds.

    The directory holds numbers and tensors, and no code. So the module and the clients' examples are given again, and
    are compared with those of the run. Those of a run of the command line are made again by its settings, and are not
    given. Nothing is written.

    Args:
        directory: the directory of the run.
        model: the module that was given to `fit`, with the same initial weights; None for a run of the command line.
        clients: the clients' examples; None for a run of the command line.
        method: the method, if it has parts of your own; else it is read from the directory.
        training: local training, if its schedule is a function of your own.
        loss: the loss of the run.
        metrics: the metrics of the run, if they were given.
        machine: engine, device, precision, and where the clients' memories are kept.

    Raises:
        UsageError: one line, if the directory holds no run, or the run was started with something else than what is
            given; it names what differs.

    Example:
        >>> import tempfile, torch, idiolect
        >>> x, folder = torch.randn(8, 3), tempfile.mkdtemp()
        >>> net, clients = nn.Linear(3, 2), {"a": idiolect.ClientData(train=(x, [0, 1] * 4))}
        >>> output = idiolect.Output(folder + "/run", report=False)
        >>> run = idiolect.fit(net, clients, idiolect.methods.fedbabu(), rounds=2, output=output)
        >>> again = idiolect.load_run(folder + "/run", net, clients)
        >>> torch.equal(again.personal("a")(x), run.personal("a")(x))
        True
        >>> again.play(rounds=3)
        >>> again.round
        5
    """
    if model is None and clients is None:
        experiment = _experiment(directory)
        made = build(experiment)
        where = machine or Machine(experiment.engine, experiment.device, experiment.precision)
        return restored(
            directory, made.model, made.clients, made.method, training=made.training, loss=made.loss, machine=where
        )
    if model is None or clients is None:
        missing = "model" if model is None else "clients"
        raise UsageError(f"load_run needs both the model and the clients: {missing} is missing")
    where = machine or Machine()
    return restored(directory, model, clients, method, training=training, loss=loss, metrics=metrics, machine=where)


def _experiment(directory: str | Path) -> Experiment:
    """Return the settings of a run of the command line."""
    command = shlex.split(read_run(directory)[0]["config"].get("command", ""))
    if not command:
        raise UsageError(
            f"{directory} was written from Python: give the module and the clients, load_run(directory, model, clients)"
        )
    return experiment_of(parse(command[1:]))
