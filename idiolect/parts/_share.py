"""The exchange of weights, as a part."""

from __future__ import annotations

from typing import Literal

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Names, Scope, everything
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, combine, overlay, pick
from idiolect.core.types import Arrival, Central, Local, Setup, Update


@part
def share(names: Scope = everything, variance: Literal["mean", "pooled"] = "mean") -> Part:
    r"""Exchange the named tensors and keep the rest on the client.

    .. math::  w^{t+1}[A] = \sum_{i \in S_t} p_i\, w_i^{t+}[A], \qquad
               \varphi_i \leftarrow w_i^{t+}[A^c], \qquad  s_i^{t} = (w^t[A],\, \varphi_i)

    Counters of batches always stay on the client: a mean of integers is not meaningful.

    Args:
        names: tensors that are exchanged. `everything` is FedAvg, ``~batch_norm`` FedBN, `batch_norm` its dual,
            `nothing` local training.
        variance: aggregation of exchanged running variances. ``"mean"`` averages them like any tensor, as in public
            code; ``"pooled"`` gives the variance of the pooled clients,
            :math:`\sum p_i (v_i + \mu_i^2) - \bar\mu^2`, which includes the differences between their means.

    Memory:    the tensors that are not exchanged.
    Sends:     the exchanged tensors, both ways.
    Cost:      their bytes; no extra gradient.
    Raises:    UsageError: if `variance` is neither, or `names` means nothing in the model.

    Example:
        >>> from idiolect.core.scope import batch_norm
        >>> share(~batch_norm)
        share(names=~batch_norm, variance='mean')

    Reference: McMahan et al., AISTATS 2017 (FedAvg); Li et al., ICLR 2021 (FedBN).
    """
    require(variance in ("mean", "pooled"), f"share: variance is 'mean' or 'pooled', not {variance!r}")

    def memory(setup: Setup) -> Tree:
        shared = names(setup.structure)
        return pick(setup.weights, frozenset(setup.weights) - shared)

    def server(setup: Setup) -> Tree:
        return pick(setup.weights, names(setup.structure))

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        return combine(local.structure.layout, local.received, local.memory), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        return pick(local.end, local.memory), pick(local.end, local.received)

    def contribute(central: Central, arrival: Arrival) -> Tree:
        return _second_moments(central, arrival.own) if variance == "pooled" else arrival.own

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(shared=_variances(central, mean) if variance == "pooled" else mean)

    return Part(memory=memory, server=server, begin=begin, finish=finish, contribute=contribute, aggregate=aggregate)


def _pairs(structure: ModelStructure, names: Tree) -> list[tuple[str, str]]:
    found = [(n.removesuffix("var") + "mean", n) for n in names if n in _variance_names(structure)]
    return [(mean, var) for mean, var in found if mean in names]


def _variance_names(structure: ModelStructure) -> Names:
    return frozenset(n for n in structure.names("statistic") if n.rpartition(".")[2] == "running_var")


def _second_moments(central: Central, tree: Tree) -> Tree:
    """Return a tree with second moments for variances, about the broadcast means, which limits cancellation."""
    old, pairs = central.old, _pairs(central.structure, tree)
    return overlay(tree, Tree.of({var: tree[var] + (tree[mean] - old[mean]) ** 2 for mean, var in pairs}))


def _variances(central: Central, tree: Tree) -> Tree:
    old, pairs = central.old, _pairs(central.structure, tree)
    found = {var: (tree[var] - (tree[mean] - old[mean]) ** 2).clamp(min=0) for mean, var in pairs}
    return overlay(tree, Tree.of(found))
