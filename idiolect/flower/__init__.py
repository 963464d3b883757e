"""The same methods on real sites, over Flower, and on Flower's simulation engine.

A site keeps its data and one file, the coordinator keeps another; docs/sites.md walks through both. Sites need ``pip
install 'idiolect[flower]'``, the simulation engine ``pip install 'idiolect[ray]'``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Loss, Model, seeded
from idiolect.compute.metrics import Metric, accuracy
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.data import ClientData
from idiolect.engines.sequential import Engine
from idiolect.rounds.training import Training
from idiolect.running.validate import check_run, is_cross_entropy

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from idiolect.flower.site.app import Site

__all__ = ["client_app", "server_app", "simulation"]


def client_app(
    *,
    model: Callable[[], nn.Module],
    data: Callable[..., ClientData],
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    parts: Sequence[Callable[..., Part]] = (),
) -> Site:
    """Make Flower's app of a site: it trains on the site's own data with the method that the coordinator names.

    A round here is the round of the sequential engine, bit for bit. What is personal (memory of the parts,
    normalization of FedBN) is kept in the site's folder and never sent; `personal.safetensors` there is the client's
    own model.

    Args:
        model: makes the network; the same function as the coordinator's. It is called with torch's seed set, so that
            random initial weights are the same everywhere.
        data: gives the site's examples, as ``data()`` or ``data(client)``; called once.
        loss: (output, target) to the mean over the batch.
        metrics: what is measured beside the loss, on the site's test examples; as `idiolect.fit` by default.
        parts: functions marked `@part` of your own that a coordinator's method may name. Nothing else that a message
            names is ever called, but for idiolect's methods and parts.

    Raises:
        UsageError: if Flower is not installed.

    Example:
        >>> import torch, idiolect.flower
        >>> def load_my_data():
        ...     return idiolect.ClientData(train=(torch.randn(20, 3), torch.arange(20) % 2))
        >>> app = idiolect.flower.client_app(model=lambda: nn.Linear(3, 2), data=load_my_data)
    """
    need_flower()
    from idiolect.flower.site.app import Site

    return Site(model, data, loss, _metrics(loss, metrics), parts)


def server_app(
    *,
    model: Callable[[], nn.Module],
    method: Method,
    rounds: int,
    sites: int = 2,
    quorum: int | None = None,
    participation: float = 1.0,
    seed: int = 0,
    training: Training = Training(),
    loss: Loss = F.cross_entropy,
    metrics: Sequence[Metric] | None = None,
    evaluate_every: int = 1,
    directory: str | Path = "run",
    deadline: float = 3600.0,
    give_up: float = 3600.0,
) -> ServerApp:
    """Make Flower's app of the coordinator: rounds over the sites that have joined, by any method.

    The arithmetic is the simulator's: the same seed, model and clients give the same bits. After each round the
    directory holds all that is needed to go on; a coordinator that is started again in it does so.

    Args:
        model: makes the network.
        method: from `idiolect.methods`, or parts of your own choice.
        rounds: how many rounds.
        sites: so many must have joined before the first round; more may join at any time.
        quorum: so many results complete a round; None for more than half of the sites asked.
        participation: share of the clients that takes part in a round, in (0, 1].
        seed: decides initial weights, cohorts, the order of examples and dropout.
        training: how a site trains in a round.
        loss: as at the sites.
        metrics: as at the sites.
        evaluate_every: rounds between evaluations of those that take part; the last round is always evaluated, by all.
        directory: config, one line of metrics a round, events, status, checkpoint, report. A relative one is in the
            folder that `idiolect serve` is given.
        deadline: seconds that a round may take while enough sites are there; what comes later does not count, and the
            site goes back to its state before.
        give_up: seconds without any progress, after which the run ends with an error. Submitted again, it goes on.

    Raises:
        UsageError: if a setting cannot be, or Flower is not installed.

    Example:
        >>> import idiolect.flower
        >>> app = idiolect.flower.server_app(
        ...     model=lambda: nn.Linear(3, 2), method=idiolect.methods.fedavg(), rounds=50, sites=3, quorum=2)
    """
    need_flower()
    check_run(rounds, participation, evaluate_every)
    if sites < 1 or (quorum is not None and not 1 <= quorum <= sites):
        raise UsageError(f"quorum is 1 to sites, and sites at least 1, got quorum={quorum}, sites={sites}")
    if not (deadline > 0 and give_up > 0):
        raise UsageError(f"deadline and give_up are seconds above 0, got {deadline} and {give_up}")
    from flwr.serverapp import ServerApp

    from idiolect.flower.coordinator.coordinator import Coordinator
    from idiolect.flower.coordinator.requests import Patience, TooFewSitesError
    from idiolect.flower.server.launch import end_with_the_server

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        end_with_the_server()
        net, wait = Model(seeded(model, seed), loss), Patience(sites, quorum, deadline, give_up)
        settings = (method, training, rounds, participation, seed)
        try:
            Coordinator(net, *settings, grid, Path(directory), _metrics(loss, metrics), evaluate_every, wait).play_all()
        except (UsageError, TooFewSitesError) as error:
            print(f"idiolect: {error}", flush=True)  # in one line, before Flower tells it in many
            raise

    return app


def simulation(*, cpus: float = 1.0, gpus: float = 0.0) -> Engine:
    """Make the engine that has a run's clients trained by Flower's simulation engine, on a cluster of Ray.

    It is for clusters; on one machine idiolect's own engines are faster. See `idiolect.flower.ray.engine.RayEngine`
    for which
    cluster, what travels and what all its machines need.

    Args:
        cpus: cores for a client.
        gpus: GPUs for a client, such as 0.25; 0 where the run's device is a CPU.

    Raises:
        UsageError: if a number cannot be, or Flower's simulation engine is not installed.

    Example:
        >>> engine = idiolect.flower.simulation(cpus=2)  # doctest: +SKIP
        >>> machine = idiolect.Machine(engine=engine)  # doctest: +SKIP
        >>> run = idiolect.fit(model, clients, method, rounds=50, machine=machine)  # doctest: +SKIP
    """
    if not (find_spec("flwr") and find_spec("ray")):
        raise UsageError("the engine 'flower' needs Flower's simulation engine: pip install 'idiolect[ray]'")
    for reports in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED"):
        os.environ.setdefault(reports, "0")
    from idiolect.flower.ray.engine import RayEngine

    return RayEngine(cpus, gpus)


def _metrics(loss: Loss, metrics: Sequence[Metric] | None) -> tuple[Metric, ...]:
    if metrics is None:
        return (accuracy,) if is_cross_entropy(loss) else ()
    return tuple(metrics)


def need_flower() -> None:
    """Say what is missing, if Flower is not installed."""
    try:
        import flwr.app  # noqa: F401
    except ImportError:
        raise UsageError("real sites need Flower: pip install 'idiolect[flower]'") from None
