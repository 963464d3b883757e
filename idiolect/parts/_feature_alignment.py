"""An alignment of the received body with the features that the client's head was trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import EMPTY, Tree, pick, where
from idiolect.core.types import Local, Objective, Pass, Query, Setup, Term
from idiolect.parts.common.classes import classifier


def _to_class_means(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
    """Return the distance of features from their class mean, summed over the classes of a batch."""
    of_its_class = (y[:, None] == y).sum(dim=1)
    return ((seen.features - facts["means"][y]).square().mean(dim=1) / of_its_class).sum()


@part
def feature_alignment(epochs: int = 1, lr: float | None = None, names: Scope = head) -> Part:
    r"""Train the received body, before local training, toward the client's last mean features of each class.

    .. math::  \sum_{y \in B} \frac{1}{d\, |B_y|} \sum_{x \in B_y} \lVert u(x) - c_{i,y} \rVert^2

    over the batches B of the client's examples, where :math:`c_{i,y}` is the mean of class y's features under
    the client's last model. The head is unchanged. A client that has not trained yet skips the alignment. The
    client predicts with the aligned body.

    Args:
        epochs: passes over the training examples, at least 0; 0 skips the alignment.
        lr: learning rate; None takes the round's. The authors always take 0.01.
        names: the head, a linear layer.

    Memory:    the means, d values per class, and a flag that they exist.      Sends: nothing.
    Receives:  nothing.
    Cost:      `epochs` additional passes per round, and for each personal model; one pass without gradient at the
        end of a round.
    Raises:    UsageError: if `epochs` is negative, `lr` is not above 0, `names` is no linear layer, or targets
        are no labels.

    Example:
        >>> feature_alignment()
        feature_alignment(epochs=1, lr=None, names=head)

    Reference: Yang et al., FedAS, CVPR 2024.
    Differs:   the authors' code keeps the last body and computes the means with it when the next one is received,
        in the mode in which the model was left; here they are computed at the end of training, in evaluation mode.
        They align by plain gradient descent; here the run's optimizer, batch size and clipping apply.
    """
    require(epochs >= 0, f"feature_alignment: epochs must be at least 0, got {epochs}")
    require(lr is None or lr > 0, f"feature_alignment: lr must be above 0, got {lr}")

    def memory(setup: Setup) -> Tree:
        _, classes, width = classifier(names, setup.structure)
        flat = setup.weights.flat
        return Tree.of({"means": flat.new_zeros(classes, width), "flag/trained": flat.new_zeros(1)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        trained = local.memory["flag/trained"] > 0
        if not epochs or not trained.any():
            return weights, local.memory
        goal = Objective(classifier(names, local.structure).layer, _to_class_means, pick(local.memory, {"means"}))
        aligned = local.train(weights, only=~names, epochs=epochs, lr=lr, objective=goal)
        return where(trained, aligned, weights), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        layer, classes, width = classifier(names, local.structure)
        counts = local.counts(classes)

        def of_classes(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
            return {"sums": one_hot(y, classes).to(seen.features).T @ seen.features}

        sums = local.total(local.end, Query(layer, of_classes, {"sums": (classes, width)}))["sums"]
        means = (sums / counts.clamp(min=1)[..., None]).flatten(-2)
        return Tree(local.memory.layout, torch.cat([means, torch.ones_like(means[..., :1])], dim=-1)), EMPTY

    return Part(memory=memory, begin=begin, finish=finish, neutral={"epochs": 0})
