"""A flag that a client has trained before; without it, the state of its last round is not valid."""

from __future__ import annotations

import torch

from idiolect.core.tree import Tree, overlay
from idiolect.core.types import Setup

TRAINED = "flag/trained"
"""Name in a memory: 1 once the client has trained."""


def untrained(setup: Setup) -> Tree:
    """Return the flag of a client that has not trained."""
    return Tree.of({TRAINED: setup.weights.flat.new_zeros(1)})


def trained(memory: Tree) -> Tree:
    """Return a memory with the flag set."""
    return overlay(memory, Tree(memory.layout.only({TRAINED}), torch.ones_like(memory[TRAINED])))
