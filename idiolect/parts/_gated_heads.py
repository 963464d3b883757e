"""A personal and a shared head, with a gate that gives each of them its share of every feature."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.rng import derive, uniform_hash
from idiolect.core.scope import Scope, head
from idiolect.core.structure import Attached, Private
from idiolect.core.tree import Layout, Tree, combine, counting, layout, overlay, pick, vectors, where
from idiolect.core.types import Central, Local, Objective, Pass, Setup, Term, Update
from idiolect.parts.common.classes import classifier, filled, layer_in
from idiolect.parts.common.first import TRAINED, trained, untrained
from idiolect.parts.common.initial import linear_start
from idiolect.parts.common.noise import add_count, count_steps, key_of, seed_of
from idiolect.parts.common.outputs import change_outputs

WIDTHS = (10, 15, 20, 50)
"""Widths of the kernels that compare features."""


class Gate(Attached):
    """The map from features to the share of each feature that the personal head gets.

    Args:
        like: the weight of the head.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        width = like.shape[1]
        self.weight = nn.Parameter(linear_start((2 * width, width), width, like, "gate", "weight"))
        self.bias = nn.Parameter(linear_start((2 * width,), width, like, "gate", "bias"))
        self.scale = nn.Parameter(like.new_ones(2 * width))
        self.shift = nn.Parameter(like.new_zeros(2 * width))

    def share(self, features: Tensor, direction: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Return the shares; noise is added to the logits."""
        raw = F.linear(features * direction, self.weight, self.bias)
        own, shared = F.layer_norm(raw, self.bias.shape, self.scale, self.shift).relu().chunk(2, dim=-1)
        return torch.sigmoid(own - shared + noise)  # the softmax of the pair


class SharedHead(Private):
    """The shared head and the direction of the client, without values except to predict.

    Args:
        like: the weight of the head.
        form: the layout of the values.
    """

    def __init__(self, like: Tensor, form: Layout) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("row", like.new_zeros(0), persistent=False)

    def beside(self, layer: nn.Module, x: Tensor, outputs: Tensor) -> Tensor:
        """Return the outputs of both heads, for the personal head's input."""
        row = self.get_buffer("row")
        return outputs if layer.training or not len(row) else _outputs(layer, x, Tree(self.form, row))


def add_gate(names: Scope, module: nn.Module) -> None:
    """Add a gate, a shared head and a count of steps for the noise to the layer from features to classes."""
    layer = layer_in(module, names)
    if not hasattr(layer, "gate"):
        like = layer.weight.detach()
        own = {n: p.shape for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
        shared = SharedHead(like, layout((*own, "direction"), (*own.values(), like[0].shape)))
        layer.gate, layer.shared_head = Gate(like), shared
        change_outputs(layer, shared.beside)
        add_count(layer)


@part
def gated_heads(strength: float = 1.0, names: Scope = head) -> Part:
    r"""Give every feature partly to a personal, partly to a shared head, as a gate decides for each example.

    .. math::  h_i(z \odot r) + \bar h\big(z \odot (1 - r)\big), \qquad
               r = \sigma(a - b + \epsilon), \qquad
               (a, b) = \operatorname{ReLU}\big(\operatorname{LN}(G (z \odot \hat v_i) + g)\big)

    with features z, and the direction :math:`\hat v_i = v_i / \lVert v_i \rVert` of the sum :math:`v_i` of the rows of
    the personal head's weight, as it is when training starts. In training :math:`\epsilon` is logistic noise, which
    makes (r, 1 - r) a Gumbel-softmax of (a, b); in predictions it is 0. Body, gate and personal head are trained on

    .. math::  L + \lambda \operatorname{mean}_{jk} \sum_{s \in \{10, 15, 20, 50\}} \Big(
               e^{-\lVert z_j - z_k \rVert^2 / 2s} + e^{-\lVert \bar z_j - \bar z_k \rVert^2 / 2s}
               - 2 e^{-\lVert z_j - \bar z_k \rVert^2 / 2s} \Big)

    which pulls the distribution of a batch's features toward that of the features :math:`\bar z` under the received
    body, in evaluation mode. The shared head is not trained: it becomes the mean of
    :math:`\tfrac{1}{2} (h_i + \bar h)` over the cohort. Before a client has trained, :math:`h_i = \bar h`.

    The head of the model is the personal one, so exchange all but the head: ``share(~head)``.

    Args:
        strength: :math:`\lambda`, at least 0. The authors' example for MNIST takes 5, their program by default 0.
        names: the personal head, a linear layer.

    Memory:    a flag that the client has trained.
    Sends:     :math:`\tfrac{1}{2} (h_i + \bar h)`, from which the server can compute :math:`h_i`; and the gate with the
        body: :math:`2 d^2 + 6 d` values for d features.       Receives: :math:`\bar h` and the gate.
    Cost:      no extra gradient; one more pass without a gradient per step, except with ``strength=0``. The part fills
        buffers to predict, so it must be the last that changes the weights for prediction.
    Raises:    UsageError: if `strength` is negative, or `names` is no linear layer.

    Example:
        >>> gated_heads(strength=5.0)
        gated_heads(strength=5.0, names=head)

    Reference: Zhang et al., FedCP, KDD 2023.
    Differs:   in the authors' code predictions are noisy, the received body normalizes by the batch and updates its
        statistics, a client that was absent starts with an old shared head and gate, and :math:`v_i` is random before
        a client has trained. Here predictions have no noise, the received body is in evaluation mode, and every client
        starts with the newest shared tensors. The gate starts from the same random numbers in every run.
    """
    require(strength >= 0, f"gated_heads: strength must be at least 0, got {strength}")

    def server(setup: Setup) -> Tree:
        own = pick(setup.weights, names(setup.structure))
        return Tree(layout(tuple(n.rpartition(".")[2] for n in own), own.layout.shapes), own.flat)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        own = pick(weights, names(local.structure))
        first = Tree(own.layout, local.received.flat)
        return overlay(weights, where(local.memory[TRAINED] > 0, own, first)), local.memory

    def given(local: Local) -> Tree:
        weight = local.structure.first_name(classifier(names, local.structure).tensor("weight"))
        rows = local.start[weight].sum(-2)
        direction = F.normalize(rows.to(counting(rows.dtype)), dim=-1).to(rows)
        return _joined(local.received, vectors(direction=direction))

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            z, seed = seen.features, seed_of(seen, found, facts["seed"]) + derive("gate")
            noise = torch.logit(uniform_hash(seed, z.numel(), torch.float64)).to(z).view_as(z)
            here = {name: tensor.to(z) for name, tensor in facts.items()}  # the seed may have made them wider
            total = inner(seen._replace(outputs=_outputs(seen.layer, z, here, noise)), y)
            return total + strength * discrepancy(z, seen.under(here).features) if strength else total

        facts = _joined(given(local), vectors(seed=key_of(local)))
        return Objective(found.layer, loss, _joined(local.start, facts) if strength else facts)

    def finish(local: Local) -> tuple[Tree, Tree]:
        own = Tree(local.received.layout, pick(local.end, names(local.structure)).flat)
        return trained(local.memory), 0.5 * (own + local.received)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(state=mean)

    def deploy(local: Local, weights: Tree) -> Tree:
        name, row = classifier(names, local.structure).tensor("shared_head.row"), given(local).flat
        return filled(weights, Tree(layout((name,), (row.shape[-1:],)), row))

    return Part(
        attach=partial(add_gate, names),
        memory=untrained,
        server=server,
        begin=begin,
        objective=objective,
        gradient=partial(count_steps, names),
        finish=finish,
        aggregate=aggregate,
        deploy=deploy,
    )


def _joined(*trees: Tree) -> Tree:
    shapes = {name: shape for tree in trees for name, shape in tree.layout.shape_of.items()}
    return combine(layout(tuple(shapes), tuple(shapes.values())), *trees)


def _outputs(layer: Any, z: Tensor, given: Mapping[str, Tensor], noise: Tensor | float = 0.0) -> Tensor:  # noqa: ANN401
    """Return the sum of the outputs of a personal head and of the given shared head."""
    share = layer.gate.share(z, given["direction"], noise)
    own: Tensor = F.linear(z * share, layer.weight, layer.bias)
    return own + F.linear(z * (1 - share), given["weight"], given.get("bias", layer.bias))


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """Return the maximum mean discrepancy of two samples of features, ``(b, d)`` each: 0 if they are equal.

    Example:
        >>> one = torch.tensor([[0.0], [2.0]])
        >>> discrepancy(one, one).item(), round(discrepancy(one, one + 1.0).item(), 4)
        (0.0, 0.1884)
    """
    one, other = (z.flatten(0, -2).to(counting(z.dtype)) for z in (one, other))

    def alike(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return torch.stack([(-squares / (2 * width)).exp() for width in WIDTHS]).sum(0)

    return (alike(one, one) + alike(other, other) - 2 * alike(one, other)).mean()
