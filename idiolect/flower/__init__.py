"""The same methods on real sites, over Flower, and on Flower's simulation engine.

Each site has its data and one file, and the coordinator has another; see docs/sites.md. Sites need ``pip install
'idiolect[flower]'``, the simulation engine needs ``pip install 'idiolect[ray]'``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Model, seeded
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.core.values import real, whole
from idiolect.data import ClientData
from idiolect.engines.base import Engine
from idiolect.rounds.training import Training
from idiolect.running.evaluation import default_metrics
from idiolect.running.validate import numbers_of

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
    """Create Flower's app of a site: it trains on the site's own data with the method of the coordinator.

    A round at a site equals a round of the sequential engine, bit for bit. Personal tensors (memory of the parts,
    normalization layers of FedBN) are kept in the site's folder and never sent; `personal.safetensors` in that folder
    is the client's personal model.

    Args:
        model: function that makes the network, the same as the coordinator's. It is called with torch's seed set, so
            that random initial weights are the same everywhere.
        data: function that returns the site's examples, called as ``data()`` or ``data(client)``, once.
        loss: (output, target) to the mean loss of a batch.
        metrics: metrics beside the loss, on the site's test examples; by default those of `idiolect.fit`.
        parts: your own functions marked `@part` that the coordinator's method may use. Apart from these, a message can
            only name idiolect's methods and parts.

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

    return Site(model, data, loss, default_metrics(loss) if metrics is None else tuple(metrics), parts)


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
    """Create Flower's app of the coordinator: it trains in rounds with the sites that have joined, by any method.

    Results equal those of the simulation, bit for bit, with the same seed, model and clients. After each round the
    directory holds a checkpoint; a coordinator that is started in the same directory resumes the run.

    Args:
        model: function that makes the network.
        method: a method from `idiolect.methods`, or one composed of parts.
        rounds: number of rounds.
        sites: number of sites that must join before the first round; more may join at any time.
        quorum: number of results that complete a round; None for more than half of the cohort.
        participation: fraction of the clients that takes part in a round, in (0, 1].
        seed: determines initial weights, cohorts, the order of examples and dropout.
        training: local training of a site in a round.
        loss: the loss, the same as at the sites.
        metrics: the metrics, the same as at the sites.
        evaluate_every: rounds between two evaluations by the cohort; after the last round all sites evaluate.
        directory: directory of the run: config, metrics, events, status, checkpoint and report. A relative path is
            relative to the folder of `idiolect serve`.
        deadline: maximum seconds of a round while enough sites are online. A later result is ignored, and the site
            goes back to its state from before the round.
        give_up: seconds without progress after which the run ends with an error. Submit it again to resume it.

    Raises:
        UsageError: if a setting is invalid, or Flower is not installed.

    Example:
        >>> import idiolect.flower
        >>> app = idiolect.flower.server_app(
        ...     model=lambda: nn.Linear(3, 2), method=idiolect.methods.fedavg(), rounds=50, sites=3, quorum=2)
    """
    need_flower()
    rounds, participation, evaluate_every, seed = numbers_of(rounds, participation, evaluate_every, seed)
    sites = whole("sites", sites, 1)
    quorum = None if quorum is None else whole("quorum", quorum, 1)
    if quorum and quorum > sites:
        raise UsageError(f"quorum must be 1 to sites, got sites={sites}, quorum={quorum}")
    deadline, give_up = (
        real(name, seconds, lambda s: s > 0, "above 0")
        for name, seconds in (("deadline", deadline), ("give_up", give_up))
    )
    from flwr.serverapp import ServerApp

    from idiolect.flower.coordinator.coordinator import Coordinator
    from idiolect.flower.coordinator.requests import TooFewSitesError, WaitPolicy
    from idiolect.flower.system.launch import exit_with_parent

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        exit_with_parent()
        settings = (Model(seeded(model, seed), loss), method, training, rounds, participation, seed)
        policy = WaitPolicy(sites, quorum, deadline, give_up)
        try:
            Coordinator(
                *settings,
                grid,
                Path(directory),
                default_metrics(loss) if metrics is None else tuple(metrics),
                evaluate_every,
                policy,
            ).play_all()
        except (UsageError, TooFewSitesError) as error:
            print(f"idiolect: {error}", flush=True)  # in one line, before Flower's traceback
            raise

    return app


def simulation(*, cpus: float = 1.0, gpus: float = 0.0) -> Engine:
    """Return an engine that trains clients with Flower's simulation engine, on a Ray cluster.

    On one machine idiolect's own engines are faster. `idiolect.flower.ray.engine.RayEngine` describes which cluster is
    used, what is sent, and what its machines need.

    Args:
        cpus: cores of an actor.
        gpus: GPUs of an actor, such as 0.25; 0 if the run's device is a CPU.

    Raises:
        UsageError: if a number is invalid, or Flower's simulation engine is not installed.

    Example:
        >>> engine = idiolect.flower.simulation(cpus=2)  # doctest: +SKIP
        >>> machine = idiolect.Machine(engine=engine)  # doctest: +SKIP
        >>> run = idiolect.fit(model, clients, method, rounds=50, machine=machine)  # doctest: +SKIP
    """
    if not (find_spec("flwr") and find_spec("ray")):
        raise UsageError("the engine 'flower' needs Flower's simulation engine: pip install 'idiolect[ray]'")
    for telemetry in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED"):
        os.environ.setdefault(telemetry, "0")
    from idiolect.flower.ray.engine import RayEngine

    return RayEngine(cpus, gpus)


def need_flower() -> None:
    """Raise a `UsageError` if Flower is not installed."""
    try:
        import flwr.app  # noqa: F401
    except ImportError:
        raise UsageError("real sites need Flower: pip install 'idiolect[flower]'") from None
