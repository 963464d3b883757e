"""Exchange of a mean feature per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree, overlay
from idiolect.core.types import Arrival, Central, Local, Objective, Pass, Query, Setup, Term, Update
from idiolect.parts.common.classes import classifier, of_class


@part
def prototypes(strength: float, weighting: Literal["uniform", "samples"] = "uniform", names: Scope = head) -> Part:
    r"""Pull the features of an example toward the mean feature of its class over all clients.

    .. math::  L + \frac{\lambda}{d} \lVert z - \bar c_y \rVert^2, \qquad
               \bar c_y = \sum_{i: n_{i,y} > 0} q_i\, c_{i,y}, \qquad
               c_{i,y} = \frac{1}{n_{i,y}} \sum_{b: y_b = y} z_b

    After training a client computes :math:`c_{i,y}` in one pass over its examples, in evaluation mode. A class that
    no client has had yet has no pull; a class that the cohort lacks keeps its prototype.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is the plain loss.
        weighting: clients that have a class get equal weights in its prototype, or weights by their examples of it.
        names: the linear layer from features to classes.

    Memory:    none.
    Sends:     prototypes and counts, one per class.      Receives: prototypes, and which of them exist.
    Cost:      one pass without a gradient per round.
    Raises:    UsageError: if `strength` is negative, `weighting` is neither, or targets are not class labels.

    Example:
        >>> prototypes(1.0)
        prototypes(strength=1.0, weighting='uniform', names=head)

    Reference: Tan et al., FedProto, AAAI 2022.
    Differs:   the authors collect features during training, with a changing model, and discard the prototype of a
        class that the cohort lacks. The paper's formula divides by clients and by examples; its code gives clients
        equal weights, which is the default here.
    """
    require(strength >= 0, f"prototypes: strength must be at least 0, got {strength}")
    require(weighting in ("uniform", "samples"), f"prototypes: weighting is 'uniform' or 'samples', not {weighting!r}")

    def server(setup: Setup) -> Tree:
        _, classes, features = classifier(names, setup.structure)
        zeros = setup.weights.flat.new_zeros
        return Tree.of({"prototypes": zeros(classes, features), "known": zeros(classes)})

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            own = of_class(y, found.classes).to(seen.features.dtype)
            gaps = (seen.features - own @ facts["prototypes"]).square().mean(1)
            return inner(seen, y) + strength * (gaps * (own @ facts["known"])).mean()

        return Objective(found.layer, loss, local.received)

    def finish(local: Local) -> tuple[Tree, Tree]:
        name, classes, features = classifier(names, local.structure)

        def sums(seen: Pass, y: Tensor, facts: Tree) -> Mapping[str, Tensor]:
            own = of_class(y, classes).to(seen.features.dtype)
            return {"prototypes": own.T @ seen.features, "counts": own.sum(0)}

        shapes = {"prototypes": (classes, features), "counts": (classes,)}
        total = local.total(local.end, Query(name, sums, shapes))
        means = total["prototypes"] / total["counts"].clamp(min=1)[..., None]
        return local.memory, overlay(total, Tree(total.layout.only({"prototypes"}), means.flatten(-2)))

    def contribute(central: Central, arrival: Arrival) -> tuple[Tree, Tree]:
        sent, count = arrival.own["prototypes"], arrival.own["counts"]
        weight = count if weighting == "samples" else (count > 0).to(sent.dtype)
        known = torch.ones_like(count)
        per_class = {"prototypes": weight[:, None].expand_as(sent), "known": weight}
        return Tree.of({"prototypes": sent, "known": known}), Tree.of(per_class)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(mean)

    return Part(
        server=server,
        objective=objective,
        finish=finish,
        contribute=contribute,
        aggregate=aggregate,
        uniform=True,
        neutral={"strength": 0.0},
    )
