"""A proximal term that keeps weights near the received ones."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree
from idiolect.core.types import Local
from idiolect.parts.common.pull import pull


@part
def proximal(mu: float) -> Part:
    r"""Pull the exchanged weights toward the received weights.

    .. math::  d = g + \mu\, (w - w^t)

    the gradient of :math:`\tfrac{\mu}{2} \lVert w - w^t \rVert^2`. Personal tensors have no pull.

    Args:
        mu: strength of the pull, at least 0; 0 is no pull.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `mu` is negative.

    Example:
        >>> proximal(0.01)
        proximal(mu=0.01)

    Reference: Li et al., MLSys 2020 (FedProx).
    Differs:   some public code penalizes the norm without its square, whose gradient has length mu at any distance;
        here it is squared, as in the paper.
    """
    require(mu >= 0, f"proximal: mu must be at least 0, got {mu}")

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pull(mu, direction, weights, local.shared)

    return Part(direction=direction, neutral={"mu": 0.0})
