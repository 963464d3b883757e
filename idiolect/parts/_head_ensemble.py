"""Two heads that each input to predict weighs for itself, without its label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Names, Scope, head
from idiolect.core.structure import ModelStructure, Private
from idiolect.core.tree import Tree, overlay, pick, vectors, where
from idiolect.core.types import Central, Local, Objective, Pass, Query, Setup, Term, Update
from idiolect.parts.common.classes import classifier, filled, layer_in
from idiolect.parts.common.first import TRAINED, trained, untrained

NAME = "head_ensemble"


class OwnHead(Private):
    """A linear layer like another one, and how much each input to predict counts it, which is filled to predict."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(shared.weight.detach().clone())
        self.register_parameter("bias", None)
        if shared.bias is not None:
            self.bias = nn.Parameter(shared.bias.detach().clone(), shared.bias.requires_grad)
        self.register_buffer("share", shared.weight.detach().new_zeros(0), persistent=False)

    def outputs(self, features: Tensor) -> Tensor:
        """Return what this layer makes of features."""
        return F.linear(features, self.weight, self.bias)

    def mix(self, shared: nn.Module, given: tuple[Tensor], outputs: Tensor) -> Tensor:
        """Return the mixed outputs of both heads, as the shared one's forward hook."""
        share = self.get_buffer("share")[:, None]
        if shared.training or not len(share):
            return outputs
        return torch.lerp(outputs.to(share), self.outputs(given[0]).to(share), share)  # in full precision


@part
def head_ensemble(
    epochs: int = 1, steps: int = 20, lr: float = 0.1, momentum: float = 0.1, alone: float = 0.1, names: Scope = head
) -> Part:
    r"""Give every client a second head, and mix it with the shared one by weights that suit each input to predict.

    .. math::  q = (1 - \lambda)\, g(z) + \lambda\, p_i(z), \qquad
               \min_\lambda\; c\, \mathrm{H}(\sigma(q))
                   + (1 - c) \big( (1 - \lambda) \lVert r - \bar m \rVert + \lambda \lVert r - m_i \rVert \big)

    for each input, with features z, shared head g, own head :math:`p_i`, softmax :math:`\sigma`, entropy H and
    :math:`c = \cos(\sigma(g), \sigma(p_i))`: where the heads agree the surer mixture counts, where they do not, whether
    the features are near the client's mean :math:`m_i` or the cohort's, :math:`\bar m`. The features that are compared
    are :math:`r = \beta z + (1 - \beta) h`, with the running mean h of the inputs so far,
    :math:`h \leftarrow \alpha z + (1 - \alpha) h`, which begins at the first. :math:`\lambda` is found by Adam from one
    half, the weights being a softmax of two numbers.

    Before a client trains or predicts, its own head trains on the features of the body it received, and
    :math:`m_i` is the mean of these features. :math:`\bar m` is the plain mean of the cohort's; before the first round
    there is none, and c times the entropy decides. In local training the own head waits.

    Predictions are transductive: they depend on which inputs are predicted together, and in which order, but for
    ``alone=1``. The shared model is g alone.

    Args:
        epochs: passes over the training examples that train the own head; at least 0.
        steps: of Adam, at least 0; 0 weighs both heads equally.
        lr: of Adam, above 0.
        momentum: :math:`\alpha` in (0, 1]: weight of an input in the running mean.
        alone: :math:`\beta` in [0, 1]: weight of the input's own features; at 1 it is predicted as it would be alone.
        names: the linear layer that is the shared head. The loss takes its outputs.

    Memory:    the own head, the mean features, and whether the client has trained.
    Sends:     the mean features.       Receives: the cohort's.
    Cost:      `epochs` more passes per round, backwards through the own head alone, and one without gradient; the same
        wherever a personal model is made, and one more pass over the inputs to predict.
    Raises:    UsageError: if an argument is out of range, or `names` is not one linear layer.

    Example:
        >>> head_ensemble(steps=10)
        head_ensemble(epochs=1, steps=10, lr=0.1, momentum=0.1, alone=0.1, names=head)

    Reference: Jiang and Lin, FedTHE, ICLR 2023.
    Differs:   the authors' code keeps own heads by worker process; here by client. Its own heads begin at random and
        have no bias; here the own head begins as the shared one a client receives first, with its bias. Its first mean
        of the cohort is a vector of ones; here there is none. The running mean leaves out the first input of
        each batch there, and a batch stops its steps together where the gradient is small; here each input counts and
        has all steps, so the result does not depend on batches. The own head's features are normalized by running
        statistics, as they are to predict.
    """
    require(epochs >= 0 and steps >= 0, f"head_ensemble: epochs and steps must be at least 0, got {epochs}, {steps}")
    require(lr > 0, f"head_ensemble: lr must be above 0, got {lr}")
    require(0 < momentum <= 1, f"head_ensemble: momentum must be in (0, 1], got {momentum}")
    require(0 <= alone <= 1, f"head_ensemble: alone must be in [0, 1], got {alone}")

    own = Scope(f"the own head beside {names}", lambda structure: _own_head(names, structure))

    def attach(module: nn.Module) -> None:
        shared = layer_in(module, names)
        if not hasattr(shared, NAME):
            second = OwnHead(shared)
            shared.add_module(NAME, second)
            shared.register_forward_hook(second.mix)  # a bound method: copies of the module keep their own

    def memory(setup: Setup) -> Tree:
        return Tree.of({**untrained(setup), **server(setup)})

    def server(setup: Setup) -> Tree:
        return Tree.of({"mean": setup.weights.flat.new_zeros(classifier(names, setup.structure).features)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        found = classifier(names, local.structure)
        last = pick(weights, own(local.structure))
        copy = Tree(last.layout, torch.cat([weights.stretch(name.replace(f"{NAME}.", "")) for name in last], dim=-1))
        weights = overlay(weights, where(local.memory[TRAINED] > 0, last, copy))
        loss = Objective(found.layer, _own_loss)
        weights = local.train(weights, only=own, epochs=epochs, freeze_statistics=True, objective=loss)
        seen = local.total(weights, Query(found.layer, _summed, {"features": (found.features,), "count": (1,)}))
        return weights, overlay(local.memory, vectors(mean=seen["features"] / seen["count"].clamp(min=1)))

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pick(direction, frozenset(direction) - own(local.structure))

    def finish(local: Local) -> tuple[Tree, Tree]:
        return trained(local.memory), pick(local.memory, {"mean"})

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(state=mean)

    def deploy(local: Local, weights: Tree) -> Tree:
        found = classifier(names, local.structure)
        shapes = {"features": (found.features,), "shared": (found.classes,), "own": (found.classes,)}
        seen = local.each(weights, Query(found.layer, _both, shapes), local.inputs)
        compared = torch.lerp(_running(seen["features"], momentum), seen["features"], alone)
        apart = (compared - local.memory["mean"]).norm(dim=1) - (compared - local.received["mean"]).norm(dim=1)
        share = _shares(seen["shared"], seen["own"], apart if local.round else torch.zeros_like(apart), steps, lr)
        return filled(weights, Tree.of({found.tensor(f"{NAME}.share"): share}))

    return Part(
        attach=attach,
        memory=memory,
        server=server,
        begin=begin,
        direction=direction,
        finish=finish,
        aggregate=aggregate,
        deploy=deploy,
        uniform=True,
        transductive=True,
    )


def _own_head(names: Scope, structure: ModelStructure) -> Names:
    found = classifier(names, structure)
    return structure.names("weight") & {found.tensor(f"{NAME}.{leaf}") for leaf in ("weight", "bias")}


def _own_outputs(seen: Pass) -> Tensor:
    layer: Any = seen.layer
    outputs: Tensor = layer.get_submodule(NAME).outputs(seen.features)
    return outputs


def _own_loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
    return inner(seen._replace(outputs=_own_outputs(seen)), y)


def _summed(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
    return {"features": seen.features.sum(0), "count": seen.features.new_full((1,), len(y))}


def _both(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
    return {"features": seen.features, "shared": seen.layer(seen.features), "own": _own_outputs(seen)}


def _running(features: Tensor, momentum: float) -> Tensor:
    """Return the running mean of features after each input, ``(n, d)``; it begins at the first."""
    means = [features[0]]
    for now in features[1:]:
        means.append(torch.lerp(means[-1], now, momentum))
    return torch.stack(means)


def _shares(shared: Tensor, own: Tensor, apart: Tensor, steps: int, lr: float) -> Tensor:
    """Return how much each input counts its own head, ``(n,)``.

    The weights of the heads are a softmax of two numbers that begin alike and have opposite gradients, so under Adam
    they move by opposite steps: one number says where both are.

    Args:
        shared: ``(n, classes)`` outputs of the shared head.
        own: of the own head.
        apart: ``(n,)`` how much farther the features are from the client's mean than from the cohort's.
        steps: of Adam.
        lr: of Adam.
    """
    agreement = F.cosine_similarity(shared.softmax(1), own.softmax(1), dim=1)
    place, first, second = torch.zeros_like(apart), torch.zeros_like(apart), torch.zeros_like(apart)
    for step in range(1, steps + 1):
        share = torch.sigmoid(2 * place)
        logs = torch.lerp(shared, own, share[:, None]).log_softmax(1)
        p = logs.exp()
        entropy = -(p * logs).sum(1, keepdim=True)
        slope = -agreement * (p * (logs + entropy) * (own - shared)).sum(1) + (1 - agreement) * apart
        slope = slope * share * (1 - share)
        first, second = torch.lerp(slope, first, 0.9), torch.lerp(slope.square(), second, 0.999)
        place = place - lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.sigmoid(2 * place)
