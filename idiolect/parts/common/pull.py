"""The pull of weights toward an anchor."""

from __future__ import annotations

from idiolect.core.tree import Tree, axpy, pick


def pull(mu: float, direction: Tree, weights: Tree, anchor: Tree) -> Tree:
    """Add the gradient of half `mu` times the squared distance to the anchor, for the tensors in the anchor."""
    near = pick(anchor, direction)
    return axpy(mu, pick(weights, near) - near, direction)
