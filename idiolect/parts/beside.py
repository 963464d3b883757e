"""A copy of a client's weights and statistics that moves with every step beside the model, and is never sent."""

from __future__ import annotations

from torch import nn

from idiolect.anatomy import Anatomy, Private, anatomy_of, initial_tree
from idiolect.parts.first import TRAINED
from idiolect.tree import Layout, Tree, overlay, pick, where


def attach_copy(module: nn.Module, name: str, trains: bool) -> Private:
    """Attach a copy to a module and return it; its weights train like any other, or are state."""
    anatomy, own = anatomy_of(module), Private()
    start = pick(initial_tree(module, anatomy), anatomy.exchangeable)
    weights, statistics = pick(start, anatomy.names("weight")).flat, pick(start, anatomy.names("statistic")).flat
    if trains:
        own.weights = nn.Parameter(weights.clone())
    else:
        own.register_buffer("weights", weights.clone(), persistent=False)
    own.register_buffer("statistics", statistics.clone(), persistent=False)
    module.add_module(name, own)
    return own


def copied(anatomy: Anatomy) -> Layout:
    """Return the layout of a copy: all that could be exchanged, weights before statistics."""
    return anatomy.layout.only(anatomy.exchangeable)


def copy_in(row: Tree, name: str, anatomy: Anatomy) -> Tree:
    """Return the copy that a row holds."""
    return Tree(copied(anatomy), pick(row, _names(name)).flat)


def put_copy(row: Tree, name: str, copy: Tree) -> Tree:
    """Return a row, or its buffers, with another copy in it."""
    return overlay(row, Tree(row.layout.only(_names(name)), copy.flat))


def begin_copy(row: Tree, name: str, anatomy: Anatomy, memory: Tree) -> Tree:
    """Return a row whose copy is the model itself, where the client has not trained before."""
    model = pick(row, copied(anatomy).starts)
    return put_copy(row, name, where(memory[TRAINED] > 0, copy_in(row, name, anatomy), model))


def _names(name: str) -> frozenset[str]:
    return frozenset({f"{name}.weights", f"{name}.statistics"})
