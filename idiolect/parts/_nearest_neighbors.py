"""A mix of the model's predictions with the labels of the client's nearest examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.rng import uniform_hash
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree, layout
from idiolect.core.types import Local, Pass, Query
from idiolect.parts.common.classes import classifier, equip, filled
from idiolect.parts.common.outputs import change_outputs

NAME = "nearest_neighbors"


@dataclass(frozen=True)
class _Vote:
    """A module that mixes a layer's predictions with the labels of the examples with the nearest features."""

    neighbors: int
    share: float
    scale: float

    def __call__(self, layer: Any, x: Tensor, outputs: Tensor) -> Tensor:  # noqa: ANN401
        kept, labels = layer.nearest_neighbors.features, layer.nearest_neighbors.labels
        if layer.training or not len(labels):
            return outputs
        features, outputs = x.to(kept), outputs.to(kept)
        far = torch.cdist(features, kept).square() / (kept.shape[1] * self.scale)
        near, which = far.masked_fill(labels < 0, math.inf).topk(min(self.neighbors, len(labels)), largest=False)
        votes = (-near).softmax(dim=1)  # a place without an example has none
        heard = torch.zeros_like(outputs).scatter_add(1, labels[which].clamp(min=0).long(), votes)
        model = outputs.log_softmax(dim=1) + outputs.new_tensor(1 - self.share).log()
        return torch.logaddexp((self.share * heard).log(), model)


@part
def nearest_neighbors(
    neighbors: int = 10, share: float = 0.5, capacity: int = 1000, scale: float = 1.0, names: Scope = head
) -> Part:
    r"""Mix each prediction with the labels of the client's own examples whose features are nearest.

    .. math::  p(y \mid x) = \lambda\, p_{nn}(y \mid x) + (1 - \lambda)\, \mathrm{softmax}(f(x))_y, \qquad
               p_{nn}(y \mid x) \propto \sum_{k} e^{-\lVert u(x) - u(x_k) \rVert^2 / (d\, s)}\, [y_k = y]

    over the k nearest of the client's training examples, for d features. The part can be added to any method:
    federated training is unchanged. A model in evaluation mode then returns log-probabilities, which cross-entropy
    and accuracy accept like logits; in training mode it is unchanged.

    Args:
        neighbors: k, at least 1.
        share: :math:`\lambda` in [0, 1]; 0 is the model alone, 1 the neighbors alone, whose loss is infinite if none
            has the correct label. Choose it on validation examples, never on those for which results are reported.
        capacity: number of examples in which neighbors are searched, at least 1; a larger set is sampled at random.
        scale: s, above 0: distance scale of a neighbor's weight.
        names: the head, a linear layer, whose outputs are mixed. Only a log-softmax may follow it.

    Memory:    none: the stored examples are computed for each personal model, in ``capacity * (d + 1)`` values. The
        part must be the last that changes the weights for prediction.
    Sends:     nothing.
    Cost:      none during training. One pass without gradient over the client's examples for each personal model,
        whose features are held in memory at once; `capacity` distances per prediction.
    Raises:    UsageError: if an argument is out of range, `names` is no linear layer, or targets are no labels.

    Example:
        >>> nearest_neighbors(share=0.3)
        nearest_neighbors(neighbors=10, share=0.3, capacity=1000, scale=1.0, names=head)

    Reference: Marfoq et al., kNN-Per, ICML 2022.
    Differs:   the authors show results for a grid of shares and capacities; here a run has one of each.
    """
    require(neighbors >= 1 and capacity >= 1, f"nearest_neighbors: got {neighbors} neighbors of {capacity}")
    require(0 <= share <= 1, f"nearest_neighbors: share must be in [0, 1], got {share}")
    require(scale > 0, f"nearest_neighbors: scale must be above 0, got {scale}")

    def attach(module: nn.Module) -> None:
        if found := equip(module, names, NAME):
            layer, store = found
            like = layer.weight.detach()
            store.register_buffer("features", like.new_zeros(0, layer.in_features), persistent=False)
            store.register_buffer("labels", like.new_zeros(0), persistent=False)
            change_outputs(layer, _Vote(neighbors, share, scale))

    def deploy(local: Local, weights: Tree) -> Tree:
        found = classifier(names, local.structure)
        width, most = found.features, round(2 / torch.finfo(weights.flat.dtype).eps)
        require(
            found.classes <= most, f"nearest_neighbors: labels of {found.classes} classes need weights of a wider "
            f"dtype than {weights.flat.dtype}, which counts to {most}"
        )  # fmt: skip
        seen = local.each(weights, Query(found.layer, _one, {"features": (width,), "label": ()}))
        features, label = seen["features"], seen["label"]
        draws = uniform_hash(local.seed, label.shape[-1], torch.float64)
        kept = draws.masked_fill(label == 0, 1.0).topk(min(capacity, label.shape[-1]), largest=False).indices
        room = capacity - kept.shape[-1]
        features = F.pad(features.gather(-2, kept[..., None].expand(*kept.shape, width)), (0, 0, 0, room))
        label = F.pad(label.gather(-1, kept), (0, room)) - 1
        where = layout(
            (found.tensor(f"{NAME}.features"), found.tensor(f"{NAME}.labels")),
            (torch.Size((capacity, width)), torch.Size((capacity,))),
        )
        return filled(weights, Tree(where, torch.cat([features.flatten(-2), label], dim=-1)))

    return Part(attach=attach, deploy=deploy)


def _one(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
    """Return features and labels from 1 on, so that 0 is no example."""
    require(isinstance(y, Tensor) and not y.is_floating_point(), "nearest_neighbors: needs class labels as targets")
    return {"features": seen.features, "label": (y + 1).to(seen.features)}
