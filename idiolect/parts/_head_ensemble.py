"""An ensemble of two heads with weights that are optimized for each test input, without its label."""

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
from idiolect.parts.common.outputs import change_outputs

NAME = "head_ensemble"


class OwnHead(Private):
    """A second linear layer, with its weight for each input to predict; these weights are filled before predicting."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(shared.weight.detach().clone())
        self.register_parameter("bias", None)
        if shared.bias is not None:
            self.bias = nn.Parameter(shared.bias.detach().clone(), shared.bias.requires_grad)
        self.register_buffer("share", shared.weight.detach().new_zeros(0), persistent=False)

    def outputs(self, features: Tensor) -> Tensor:
        """Return the outputs of this layer for features."""
        return F.linear(features, self.weight, self.bias)

    def mix(self, shared: nn.Module, x: Tensor, outputs: Tensor) -> Tensor:
        """Return the mixed outputs of both heads, for the shared head's input."""
        share = self.get_buffer("share")[:, None]
        if shared.training or not len(share):
            return outputs
        return torch.lerp(outputs.to(share), self.outputs(x).to(share), share)  # in full precision


@part
def head_ensemble(
    epochs: int = 1, steps: int = 20, lr: float = 0.1, momentum: float = 0.1, alone: float = 0.1, names: Scope = head
) -> Part:
    r"""Give each client a second head, and mix it with the shared one by weights optimized for each test input.

    .. math::  q = (1 - \lambda)\, g(z) + \lambda\, p_i(z), \qquad
               \min_\lambda\; c\, \mathrm{H}(\sigma(q))
                   + (1 - c) \big( (1 - \lambda) \lVert r - \bar m \rVert + \lambda \lVert r - m_i \rVert \big)

    for each input, with features z, shared head g, own head :math:`p_i`, softmax :math:`\sigma`, entropy H and
    :math:`c = \cos(\sigma(g), \sigma(p_i))`: if the heads agree, the entropy of the mixture dominates; if they
    disagree, the distances of the features from the client's mean :math:`m_i` and the cohort's, :math:`\bar m`. The
    compared features are :math:`r = \beta z + (1 - \beta) h`, with the running mean h of the inputs so far,
    :math:`h \leftarrow \alpha z + (1 - \alpha) h`, which starts at the first input. Adam optimizes :math:`\lambda`,
    starting at one half; the two weights are a softmax of two numbers.

    Before a client trains or predicts, its personal head is trained on the features of the received body, and
    :math:`m_i` is the mean of these features. :math:`\bar m` is the unweighted mean over the cohort; before the first
    round it does not exist, and only the entropy term is used. Local training does not change the personal head.

    Predictions are transductive: they depend on which inputs are predicted together, and in which order, except with
    ``alone=1``. The shared model is g alone.

    Args:
        epochs: passes over the training examples that train the personal head; at least 0.
        steps: steps of Adam, at least 0; 0 gives both heads equal weights.
        lr: learning rate of Adam, above 0.
        momentum: :math:`\alpha` in (0, 1]: weight of an input in the running mean.
        alone: :math:`\beta` in [0, 1]: weight of the input's own features; at 1 other inputs have no influence.
        names: the linear layer that is the shared head. The loss takes its outputs.

    Memory:    the personal head, the mean features, and a flag that the client has trained.
    Sends:     the mean features.       Receives: the cohort's.
    Cost:      `epochs` more passes per round, backwards through the personal head only, and one without gradient; the
        same for each personal model, and one more pass over the inputs to predict.
    Raises:    UsageError: if an argument is out of range, or `names` is not one linear layer.

    Example:
        >>> head_ensemble(steps=10)
        head_ensemble(epochs=1, steps=10, lr=0.1, momentum=0.1, alone=0.1, names=head)

    Reference: Jiang and Lin, FedTHE, ICLR 2023.
    Differs:   the authors' code keeps personal heads by worker process; here they are kept by client. Its personal
        heads start at random and have no bias; here they start as the first received shared head, with its bias. Its
        first mean of the cohort is a vector of ones; here there is none. There, the running mean excludes the first
        input of each batch, and all inputs of a batch stop together when the gradient is small; here each input is
        included and takes all steps, so the result does not depend on batches. The personal head's features are
        normalized with running statistics, as for predictions.
    """
    require(epochs >= 0 and steps >= 0, f"head_ensemble: epochs and steps must be at least 0, got {epochs}, {steps}")
    require(lr > 0, f"head_ensemble: lr must be above 0, got {lr}")
    require(0 < momentum <= 1, f"head_ensemble: momentum must be in (0, 1], got {momentum}")
    require(0 <= alone <= 1, f"head_ensemble: alone must be in [0, 1], got {alone}")

    own = Scope(f"the own head beside {names}", lambda structure: _own_head(names, structure))

    def attach(module: nn.Module) -> None:
        shared = layer_in(module, names)
        if not hasattr(shared, NAME):
            shared.add_module(NAME, second := OwnHead(shared))
            change_outputs(shared, second.mix)

    def memory(setup: Setup) -> Tree:
        return Tree.of({**untrained(setup), **server(setup)})

    def server(setup: Setup) -> Tree:
        return Tree.of({"mean": setup.weights.flat.new_zeros(classifier(names, setup.structure).features)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        found = classifier(names, local.structure)
        last, first_name = pick(weights, own(local.structure)), local.structure.first_name
        shared = [first_name(name.replace(f"{NAME}.", "")) for name in last]
        copy = Tree(last.layout, torch.cat([weights.stretch(name) for name in shared], dim=-1))
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
    """Return the running mean of features after each input, ``(n, d)``; it starts at the first input."""
    means = [features[0]]
    for now in features[1:]:
        means.append(torch.lerp(means[-1], now, momentum))
    return torch.stack(means)


def _shares(shared: Tensor, own: Tensor, apart: Tensor, steps: int, lr: float) -> Tensor:
    """Return the weight of the personal head for each input, ``(n,)``.

    The weights of the heads are a softmax of two numbers that start equal and have opposite gradients, so Adam
    takes opposite steps for them: one number determines both.

    Args:
        shared: ``(n, classes)`` outputs of the shared head.
        own: outputs of the personal head.
        apart: ``(n,)`` distance of the features from the client's mean minus that from the cohort's.
        steps: steps of Adam.
        lr: learning rate of Adam.
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
