"""A private copy of a client's weights and statistics that is updated at every step, and is never sent."""

from __future__ import annotations

from torch import nn

from idiolect.core.structure import ModelStructure, Private, initial_tree, structure_of
from idiolect.core.tree import Layout, Tree, overlay, pick, where
from idiolect.parts.common.first import TRAINED


def attach_copy(module: nn.Module, name: str, trains: bool) -> Private:
    """Attach a copy to a module and return it; its weights are trainable, or are state."""
    structure, own = structure_of(module), Private()
    start = pick(initial_tree(module, structure), structure.exchangeable)
    weights, statistics = pick(start, structure.names("weight")).flat, pick(start, structure.names("statistic")).flat
    if trains:
        own.weights = nn.Parameter(weights.clone())
    else:
        own.register_buffer("weights", weights.clone(), persistent=False)
    own.register_buffer("statistics", statistics.clone(), persistent=False)
    module.add_module(name, own)
    return own


def copied(structure: ModelStructure) -> Layout:
    """Return the layout of a copy: all exchangeable tensors, weights before statistics."""
    return structure.layout.only(structure.exchangeable)


def copy_in(row: Tree, name: str, structure: ModelStructure) -> Tree:
    """Return the copy in a row."""
    return Tree(copied(structure), pick(row, _names(name)).flat)


def put_copy(row: Tree, name: str, copy: Tree) -> Tree:
    """Return a row, or its buffers, with its copy replaced."""
    return overlay(row, Tree(row.layout.only(_names(name)), copy.flat))


def begin_copy(row: Tree, name: str, structure: ModelStructure, memory: Tree) -> Tree:
    """Return a row whose copy is the model itself if the client has not trained before."""
    model = pick(row, copied(structure).starts)
    return put_copy(row, name, where(memory[TRAINED] > 0, copy_in(row, name, structure), model))


def _names(name: str) -> frozenset[str]:
    return frozenset({f"{name}.weights", f"{name}.statistics"})
