"""A run of another process, from its directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.nn import functional as F

from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.registry.printed import method_from, training_from
from idiolect.rounds.training import Training
from idiolect.running.arguments import explained
from idiolect.running.assemble import assemble
from idiolect.running.options import Machine
from idiolect.running.run import Run
from idiolect.storage import checkpoint
from idiolect.storage.run_directory import read_run


@explained
def load_run(
    directory: str | Path,
    model: nn.Module,
    clients: Mapping[str, ClientData],
    method: Method | None = None,
    *,
    training: Training | None = None,
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    machine: Machine = Machine(),
) -> Run:
    """Return the run that a directory holds, as `fit` returned it: predict, add clients, make tables, play more rounds.

    The directory holds numbers and tensors, and no code. So the module and the clients' examples are given again, and
    are compared with those of the run. Nothing is written.

    Args:
        directory: the directory of the run.
        model: the module that was given to `fit`, with the same initial weights.
        clients: the clients' examples.
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
    card, records = read_run(directory)
    config = card["config"]
    run = assemble(
        model,
        clients,
        _read("method", config["method"]) if method is None else method,  # type: ignore[arg-type]
        rounds=config["rounds"],
        training=_read("training", config["training"]) if training is None else training,  # type: ignore[arg-type]
        seed=config["seed"],
        participation=config["participation"],
        loss=loss,
        metrics=metrics,
        machine=machine,
        directory=directory,
    )
    own = run.config()
    run.about.update({name: value for name, value in config.items() if name not in own})
    run.directory = Path(directory)
    checkpoint.load(run.directory, run.federation, own)
    run.records[:] = [record for record in records if record["round"] <= run.round]
    return run


_READERS: Mapping[str, Callable[[str], object]] = {"method": method_from, "training": training_from}


def _read(name: str, text: str) -> object:
    try:
        return _READERS[name](text)
    except UsageError as error:
        raise UsageError(f"{name} of the run has something of your own: give {name}=... ({error})") from None
