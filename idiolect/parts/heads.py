"""What parts that work on features need to know of the head, and how they add to it."""

from __future__ import annotations

import torch
from torch import nn

from idiolect.anatomy import Anatomy, Private, anatomy_of
from idiolect.part import require
from idiolect.scope import Scope, layer_of


def shape_of(names: Scope, anatomy: Anatomy) -> tuple[str, int, int]:
    """Return a linear layer's name, its number of outputs (classes) and of inputs (features)."""
    layer = layer_of(names, anatomy)
    shape = anatomy.layout.shape_of.get(inside(layer, "weight"), torch.Size())
    linear = any(i.module == layer and issubclass(i.owner, nn.Linear) for i in anatomy.items)
    require(linear and len(shape) == 2, f"{names} is layer {layer!r}, which is no plain linear layer: name one")
    return layer, shape[0], shape[1]


def inside(layer: str, name: str) -> str:
    """Return the name in the model of what a layer calls `name`; the model itself may be the layer."""
    return f"{layer}.{name}" if layer else name


def equip(module: nn.Module, names: Scope, name: str) -> tuple[nn.Linear, Private] | None:
    """Give the linear layer of a scope a private module of this name; None if it has it already."""
    layer = module.get_submodule(shape_of(names, anatomy_of(module))[0])
    if hasattr(layer, name):
        return None
    assert isinstance(layer, nn.Linear)
    own = Private()
    layer.add_module(name, own)
    return layer, own
