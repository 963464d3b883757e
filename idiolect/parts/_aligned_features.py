"""A regularizer that pulls features toward the cohort's mean for their class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, layout, pick
from idiolect.core.types import Central, Local, Objective, Pass, Query, Setup, Term, Update
from idiolect.parts.common.classes import classifier, of_class


@part
def aligned_features(strength: float = 1.0, names: Scope = head) -> Part:
    r"""Pull the features of an example toward the mean of its class over the cohort.

    .. math::  L = L_i + \frac{\lambda}{d}\, \lVert z - \bar z_y \rVert^2, \qquad
               \bar z_y = \frac{\sum_{i \in S_t} \sum_{k: y_k = y} z_i(x_k)}{\sum_{i \in S_t} n_{i,y}}

    where z is the input of the head, and the means are computed with the trained bodies. Features of a class that no
    client of the last round had are pulled toward the client's own mean under the received body. The first round has
    no pull.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is no pull.
        names: the head: the tensors of one linear layer.

    Memory:    none.
    Sends:     the sum of features and the number of examples of each class.       Receives: the cohort's sums.
    Cost:      C (d + 1) values, both ways; two passes over the examples without gradient per round.
    Raises:    UsageError: if `strength` is negative, the head is not one linear layer, or targets are not classes.

    Example:
        >>> aligned_features(0.5)
        aligned_features(strength=0.5, names=head)

    Reference: Xu et al., FedPAC, ICLR 2023.
    Differs:   features are computed in evaluation mode; the authors compute them in training mode.
    """
    require(strength >= 0, f"aligned_features: strength must be at least 0, got {strength}")

    def server(setup: Setup) -> Tree:
        sums = setup.weights[setup.structure.first_name(classifier(names, setup.structure).tensor("weight"))]
        return Tree.of({"sums": torch.zeros_like(sums), "counts": sums.new_zeros(len(sums))})

    def objective(local: Local) -> Objective:
        theirs, own = local.received, local.total(local.start, class_sums(names, local.structure))
        targets = torch.where(theirs["counts"][..., None] > 0, _means(theirs), _means(own))
        facts = Tree(layout(("targets",), (targets.shape[-2:],)), targets.flatten(-2))
        weight = strength if local.round > 0 else 0.0

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            return inner(seen, y) + weight * F.mse_loss(seen.features, facts["targets"][y])

        return Objective(classifier(names, local.structure).layer, loss, facts)

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.memory, pick(local.total(local.end, class_sums(names, local.structure)), local.received)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(mean)

    return Part(
        server=server,
        objective=objective,
        finish=finish,
        aggregate=aggregate,
        uniform=True,
        neutral={"strength": 0.0},
    )


def class_sums(names: Scope, structure: ModelStructure) -> Query:
    """Return, from the inputs of a head, the sum and number of examples of each class, and the sum of all squares."""
    layer, classes, width = classifier(names, structure)

    def sums(seen: Pass, y: Tensor, facts: Tree) -> Mapping[str, Tensor]:
        members = of_class(y, classes).to(seen.features.dtype)
        return {"sums": members.T @ seen.features, "counts": members.sum(0), "squares": seen.features.square().sum()}

    return Query(layer, sums, {"sums": (classes, width), "counts": (classes,), "squares": ()})


def _means(sums: Tree) -> Tensor:
    """Return mean features by class, zero for a class without examples."""
    return sums["sums"] / sums["counts"].clamp(min=torch.finfo(sums.flat.dtype).tiny)[..., None]
