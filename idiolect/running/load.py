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
from idiolect.running.assemble import assemble
from idiolect.running.options import Machine
from idiolect.running.run import Run
from idiolect.storage import checkpoint
from idiolect.storage.run_directory import read_run


def restored(
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
    """Return the run that a directory holds; the arguments are those of `idiolect.load_run`.

    Raises:
        UsageError: one line, if the directory holds no run, or the run was started with something else.
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
