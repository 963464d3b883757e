"""Several cluster models on the server, of which each client trains one."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from idiolect.core.part import Part, part, require
from idiolect.core.rng import derive, uniform_hash
from idiolect.core.scope import Scope, everything, nothing
from idiolect.core.tree import Tree, axpy, overlay, pick, spread
from idiolect.core.types import Arrival, Central, Local, Setup, Update
from idiolect.parts.common.copies import copies


@part
def clusters(count: int = 2, names: Scope = everything, noise: float = 0.1, seed: int = 0) -> Part:
    r"""Keep several models on the server; each client trains the one with the lowest loss on its data.

    .. math::  \hat\jmath_i = \arg\min_j F_i(\theta_j^t), \qquad
               \theta_j^{t+1} = \frac{\sum_i s_{ij}\, n_i\, w_i^{t+}}{\sum_i s_{ij}\, n_i}, \qquad
               s_{ij} = 1 \text{ where } j = \hat\jmath_i \text{, else } 0

    over the cohort, with the method's weighting: the trained models are averaged within each cluster, and a cluster
    that no client chose is unchanged. :math:`F_i` is the loss on all the client's training examples, normalized with
    running statistics. To predict, the client chooses again, among the newest models.

    The first model is the initial one. Each weight of the others differs from it by :math:`\nu r u`, with r the
    root mean square of its tensor and u of mean 0 and variance 1 (uniform), since equal models would stay equal.

    Args:
        count: number of clusters, at least 1; with 1 there is no choice.
        names: exchanged tensors of which each cluster has its own copy. The others are common to all: with `head`,
            clusters share one body.
        noise: :math:`\nu`, above 0: size of the initial differences between clusters, relative to the initial
            weights. With large differences one cluster may have the lowest loss for all clients.
        seed: seed of that noise.

    Memory:    the client's cluster.
    Sends:     that choice, one number per cluster; `share` sends the trained tensors.
    Receives:  every cluster's tensors. The mean over all clusters, computed by `share`, is sent as well; its named
        tensors are not used by any client.
    Cost:      `count` times the bytes of the named tensors down; `count` forward passes over the client's
        examples per round, and for each personal model; no extra gradient.
    Raises:    UsageError: if an argument is out of range, or no weight among `names` is exchanged.

    Example:
        >>> clusters(4)
        clusters(count=4, names=everything, noise=0.1, seed=0)

    Reference: Ghosh et al., IFCA, NeurIPS 2020, with averaging of models (its option II) and, for `names`, the
        sharing of weights between clusters.
    Differs:   the paper draws initial models independently and gives clients equal weights; its gradient-averaging
        option is not implemented. Personal tensors (``share(~batch_norm)``) stay personal in every cluster.
    """
    require(count >= 1, f"clusters: count must be at least 1, got {count}")
    require(noise > 0, f"clusters: noise must be above 0, got {noise}; equal clusters would never part")

    def server(setup: Setup) -> Tree:
        first = pick(setup.shared, names(setup.structure))
        weights = pick(first, setup.structure.names("weight"))
        require(len(weights) > 0, f"clusters: no weight among {names!r} is exchanged; share it, or name others")
        others = [axpy(noise, _noise(weights, derive(seed, "cluster", j)), first) for j in range(1, count)]
        return Tree(copies(first.layout, count), torch.cat([model.flat for model in (first, *others)]))

    def memory(setup: Setup) -> Tree:
        return Tree.of({"choice": setup.weights.flat.new_zeros(count)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        where, models = pick(local.shared, names(local.structure)).layout, local.received.flat.view(count, -1)
        losses = [local.whole(overlay(weights, Tree(where, model)), only=nothing).loss for model in models]
        best = torch.stack(losses, dim=-1).nan_to_num(nan=torch.inf).argmin(dim=-1)
        choice = Tree(local.memory.layout, one_hot(best, count).to(weights.flat))
        return overlay(weights, Tree(where, models[best])), choice

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.memory, local.memory

    def contribute(central: Central, arrival: Arrival) -> tuple[Tree, Tree]:
        model = pick(arrival.weights, names(central.structure))
        where = copies(model.layout, count)
        counted = arrival.own.flat[:, None].expand(count, len(model.flat))
        return Tree(where, model.flat.repeat(count)), Tree(where, counted.flatten())

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(mean)

    return Part(
        memory=memory,
        server=server,
        begin=begin,
        finish=finish,
        contribute=contribute,
        aggregate=aggregate,
        neutral={"count": 1},
    )


def _noise(weights: Tree, seed: int) -> Tree:
    """Return uniform noise with the root mean square of each tensor."""
    flat = weights.flat
    size = torch.stack([t.square().mean().sqrt() for t in weights.values()])
    uniform = uniform_hash(torch.tensor(seed, device=flat.device), len(flat), flat.dtype)
    return spread(size, weights.layout) * (12**0.5 * (uniform - 0.5))
