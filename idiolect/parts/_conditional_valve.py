"""A conditional map of features, with two routes: to the client's head, and to shared embeddings of the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.rng import derive, normal_hash
from idiolect.core.scope import Scope, head
from idiolect.core.structure import Attached, Private
from idiolect.core.tree import Tree, axpy, counting, layout, overlay, pick
from idiolect.core.types import Local, Objective, Pass, Term
from idiolect.parts.common.classes import classifier, layer_in, of_class
from idiolect.parts.common.initial import linear_start
from idiolect.parts.common.outputs import change_input

LEAVES = ("embeddings", "weight", "bias", "scale", "shift")


class Valve(Attached):
    """An embedding of each class, and a map that scales and shifts features as a context tells.

    Args:
        like: the weight of the head.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        classes, width = like.shape
        key = torch.tensor(derive("valve", "embeddings"), device=like.device)
        self.embeddings = nn.Parameter(normal_hash(key, classes * width, like.dtype).view(classes, width))
        self.weight = nn.Parameter(linear_start((2 * width, width), width, like, "valve", "weight"))
        self.bias = nn.Parameter(linear_start((2 * width,), width, like, "valve", "bias"))
        self.scale = nn.Parameter(like.new_ones(2, width))
        self.shift = nn.Parameter(like.new_zeros(2, width))

    def open(self, features: Tensor, context: Tensor) -> Tensor:
        """Return the features under a context, ``(d,)``."""
        raw = F.linear(context, self.weight, self.bias).relu().view(2, -1)
        gamma, beta = F.layer_norm(raw, raw.shape[1:]) * self.scale + self.shift
        return torch.relu((1 + gamma) * features + beta)


class Context(Private):
    """The context of the client, which every pass through the head uses.

    Args:
        like: the weight of the head.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("own", like.new_zeros(like.shape[1]), persistent=False)

    def opened(self, layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        """Return the features of the personal route, for the head's input."""
        found: Tensor = layer.valve.open(x, self.get_buffer("own"))
        return found.to(x.dtype)


@part
def conditional_valve(strength: float = 0.01, decay: float = 0.1, names: Scope = head) -> Part:
    r"""Scale and shift features by a context: by the client's for its head, by the global one for class embeddings.

    .. math::  V(z, c) = \operatorname{ReLU}\big((1 + \gamma(c)) \odot z + \beta(c)\big), \qquad
               \gamma, \beta = \operatorname{LN}(\operatorname{ReLU}(\text{linear}(c)))

    .. math::  L\big(h_i(V(z, p_i)), y\big) - \log \frac{e^{\cos(Z, E_y)}}{\sum_c e^{\cos(Z, E_c)}}
               + \lambda \Big( \sum_b \lVert Z_b - \bar E_{y_b} \rVert^2 \Big)^{1/2}, \qquad Z = V(z, g)

    with an embedding :math:`E_c` of each class. Embeddings and V are trained, and exchanged with the body. With the
    received embeddings :math:`\bar E` the contexts of a round are

    .. math::  p_i = \sum_c \frac{n_{i,c}}{n_i} \bar E_c, \qquad g = \frac{1}{C} \sum_c \bar E_c

    for a client with :math:`n_{i,c}` examples of class c. It predicts with :math:`h_i(V(z, p_i))`.

    The head of the model is the personal one, so exchange all but the head: ``share(~head)``.

    Args:
        strength: :math:`\lambda`, at least 0. The last term grows with the root of the batch size.
        decay: weight decay of the embeddings and of V alone, at least 0; the authors take 0.1 for small networks,
            and 0 with a strength of 0.0001 for ResNet-18.
        names: the personal head, a linear layer from features to classes.

    Memory:    :math:`p_i`.
    Sends:     embeddings and V with the body, C d + 2 d² + 6 d values for C classes and d features.
    Receives:  the same.
    Cost:      no extra gradient.
    Raises:    UsageError: if `strength` or `decay` is negative, `names` is no linear layer, or targets are no labels.

    Example:
        >>> conditional_valve(strength=0.001)
        conditional_valve(strength=0.001, decay=0.1, names=head)

    Reference: Zhang et al., GPFL, ICCV 2023.
    Differs:   in the authors' code the contexts are 0 in the first round, and later they come from the embeddings that
        the client had before it received the new ones; here from the received ones in every round. Their weight decay
        is not clipped; here it is clipped with the gradient. Embeddings and V start from the same random numbers in
        every run.
    """
    require(strength >= 0, f"conditional_valve: strength must be at least 0, got {strength}")
    require(decay >= 0, f"conditional_valve: decay must be at least 0, got {decay}")

    def attach(module: nn.Module) -> None:
        layer = layer_in(module, names)
        if not hasattr(layer, "valve"):
            like = layer.weight.detach()
            layer.valve, layer.context = Valve(like), (own := Context(like))
            change_input(layer, own.opened)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        found = classifier(names, local.structure)
        counts = local.counts(found.classes)
        shares = (counts / counts.sum(-1, keepdim=True))[..., None]
        context = (shares * weights[found.tensor("valve.embeddings")]).sum(-2)
        name = layout((found.tensor("context.own"),), (context.shape[-1:],))
        return overlay(weights, Tree(name, context.to(weights.flat.dtype))), local.memory

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)
        embeddings = found.tensor("valve.embeddings")

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            layer: Any = seen.layer
            received, own = facts[embeddings], of_class(y, found.classes)
            guided = layer.valve.open(seen.features, received.mean(0))
            dtype = counting(guided.dtype)
            one, other = (F.normalize(t.to(dtype), dim=1) for t in (guided, layer.valve.embeddings))
            fit = (one @ other.T).log_softmax(1).masked_fill(~own, 0.0).sum(1).mean()
            gap: Tensor = torch.linalg.vector_norm(guided.to(dtype) - own.to(dtype) @ received.to(dtype))
            return inner(seen, y) - fit + strength * gap

        return Objective(found.layer, loss, pick(local.start, {embeddings}))

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        found = classifier(names, local.structure)
        decaying = {found.tensor(f"valve.{leaf}") for leaf in LEAVES} & set(direction)
        return axpy(decay, pick(weights, decaying), direction)

    return Part(attach=attach, begin=begin, objective=objective, direction=direction)
