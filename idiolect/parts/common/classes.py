"""Helpers for parts that use features and classes: the head, and the class of each example."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from idiolect.core.errors import UsageError
from idiolect.core.scope import Scope, layer_of
from idiolect.core.structure import ModelStructure, Private, structure_of
from idiolect.core.tree import Tree, combine, layout


class Classifier(NamedTuple):
    """A linear layer from features to classes."""

    layer: str
    """Name of the layer."""
    classes: int
    features: int

    def tensor(self, name: str) -> str:
        """Return the full name of a tensor of this layer."""
        return f"{self.layer}.{name}" if self.layer else name


def classifier(names: Scope, structure: ModelStructure) -> Classifier:
    """Return the linear layer to which the named tensors belong.

    Raises:
        UsageError: if they do not belong to one linear layer.

    Example:
        >>> from idiolect.core.scope import head
        >>> classifier(head, structure_of(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))))
        Classifier(layer='2', classes=3, features=4)
    """
    found = Classifier(layer_of(names, structure), 0, 0)
    weight = structure.first_name(found.tensor("weight"))
    shape = structure.layout.shape_of.get(weight, torch.Size())
    called = found.layer in structure.makers.layers or not any(
        i.name == weight and issubclass(i.owner, nn.Embedding) for i in structure.items
    )
    if len(shape) != 2 or not called:
        raise UsageError(f"{names} must be a linear layer from features to classes; {found.layer!r} is none")
    return found._replace(classes=shape[0], features=shape[1])


def layer_in(module: nn.Module, names: Scope) -> nn.Linear:
    """Return the layer that `classifier` finds, as a module.

    Raises:
        UsageError: if it is not linear.
    """
    found = module.get_submodule(classifier(names, structure_of(module)).layer)
    if not isinstance(found, nn.Linear):
        raise UsageError(f"{names} must be a linear layer from features to classes, not {type(found).__name__}")
    return found


def equip(module: nn.Module, names: Scope, name: str) -> tuple[nn.Linear, Private] | None:
    """Add a private module of this name to the layer that `classifier` finds; return None if it exists already."""
    layer = layer_in(module, names)
    if hasattr(layer, name):
        return None
    own = Private()
    layer.add_module(name, own)
    return layer, own


def filled(weights: Tree, store: Tree) -> Tree:
    """Return weights with buffers that have other shapes: those that are filled before predicting."""
    shapes = {**weights.layout.shape_of, **store.layout.shape_of}
    return combine(layout(tuple(shapes), tuple(shapes.values())), weights, store)


def of_class(y: Tensor, classes: int) -> Tensor:
    """Return the class of each example as a one-hot tensor of bool, ``(b, classes)``.

    Raises:
        UsageError: if the targets are not ``(b,)`` labels.
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != 1:
        raise UsageError("the method compares classes: it needs one class label per example as target")
    return torch.arange(classes, device=y.device) == y[:, None]
