"""IFCA as a textbook loop; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Loss,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    copy_of,
    gradient,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
)


@dataclass
class ClusterResult(OracleResult):
    """What IFCA left behind, with one entry per round.

    Attributes:
        clusters: each cluster's tensors.
        chosen: which cluster each client of the cohort trained.
    """

    clusters: list[list[State]] = field(default_factory=list)
    chosen: list[dict[int, int]] = field(default_factory=list)


def ifca(
    clusters: Sequence[State], examples: Callable[[int], tuple[Tensor, Tensor]], **world: Unpack[World]
) -> ClusterResult:
    """IFCA with averaging of models: a client trains the cluster with the least loss on all its examples.

    The mean of a cluster is over those clients of the cohort that trained it; without any it stays. ``shared``
    of the result is the mean over the whole cohort: exchanged tensors that no cluster has its own of start there.

    Args:
        clusters: the tensors that each cluster has its own of, as they begin.
        examples: ``examples(client)`` gives all its (x, y).
        world: see :class:`World`.

    Reference: Ghosh et al., NeurIPS 2020.
    """
    models, shared = start(world)
    weights, clusters = world["weights"], list(clusters)
    result = ClusterResult()
    for t in range(world["rounds"]):
        cohort, chosen = cohort_of(world, t), {}
        for i in cohort:
            receive(models[i], shared)
            chosen[i] = best(models[i], clusters, *examples(i), loss_of(world))
            receive(models[i], clusters[chosen[i]])
            batches = world["batches"](t, i)
            local_training(
                models[i], batches, lr_of(world, t), lambda m, x, y, _: gradient(m, x, y, loss_of(world)), {}, world
            )
        for j, old in enumerate(clusters):
            members = [i for i in cohort if chosen[i] == j]
            if members:
                clusters[j] = average([models[i] for i in members], [weights[i] for i in members], old)
        shared = average([models[i] for i in cohort], [weights[i] for i in cohort], shared)
        result.shared.append(shared)
        result.clusters.append(list(clusters))
        result.chosen.append(chosen)
        copies = [deepcopy(model) for model in models]
        for i, model in enumerate(copies):
            receive(model, shared)
            receive(model, clusters[best(model, clusters, *examples(i), loss_of(world))])
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result


def best(model: nn.Module, clusters: Sequence[State], x: Tensor, y: Tensor, loss: Loss) -> int:
    """Which cluster's tensors, in place of the model's own, give the least loss by running statistics."""
    trial, losses = deepcopy(model).eval(), []
    for tensors in clusters:
        receive(trial, tensors)
        with torch.no_grad():
            losses.append(float(loss(trial(x), y)))
    return losses.index(min(losses))
