"""Terms that hold a client near a reference."""

from __future__ import annotations

from idiolect.part import Part, part, require
from idiolect.tree import Tree, axpy, pick
from idiolect.words import Local, Slot


@part
def proximal(mu: float) -> Part:
    r"""Pull the exchanged weights back to what was received.

    .. math::  d = g + \mu\, (w - w^t)

    the gradient of :math:`\tfrac{\mu}{2} \lVert w - w^t \rVert^2`. Personal tensors are left alone.

    Args:
        mu: strength, at least 0; 0 is no pull.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `mu` is negative.

    Example:
        >>> proximal(0.01)
        proximal(mu=0.01)

    Reference: Li et al., MLSys 2020 (FedProx).
    Differs:   some public codes penalise the norm without its square, whose gradient has length mu however
        near the weights are; here it is squared, as in the paper.
    """
    require(mu >= 0, f"proximal: mu must be at least 0, got {mu}")

    def direction(direction: Tree, weights: Tree, local: Local, slot: Slot) -> Tree:
        anchor = pick(local.shared, direction)
        return axpy(mu, pick(weights, anchor) - anchor, direction)

    return Part(direction=direction, neutral={"mu": 0.0})
