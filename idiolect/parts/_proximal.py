"""Terms that hold a model near a reference."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, pick
from idiolect.core.types import Local, Setup


def pull(mu: float, direction: Tree, weights: Tree, anchor: Tree) -> Tree:
    """Add the gradient of half `mu` times the squared distance to the anchor, where the anchor has names."""
    near = pick(anchor, direction)
    return axpy(mu, pick(weights, near) - near, direction)


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
    Differs:   some public codes penalize the norm without its square, whose gradient has length mu however
        near the weights are; here it is squared, as in the paper.
    """
    require(mu >= 0, f"proximal: mu must be at least 0, got {mu}")

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pull(mu, direction, weights, local.shared)

    return Part(direction=direction, neutral={"mu": 0.0})


@part
def personal_model(strength: float) -> Part:
    r"""Give every client a whole model of its own, trained beside the shared one and pulled towards it.

    .. math::  v_i \leftarrow v_i - \eta \big( g_i(v_i) + \lambda\, (v_i - w^t) \big)

    over the same batches as the shared model, after it; the anchor is what was received, and does not move.
    The client predicts with :math:`v_i`, which starts from the initial weights.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is training alone.

    Memory:    a whole model, with its own statistics.       Sends: nothing.       Receives: nothing.
    Cost:      one more gradient per step.
    Raises:    UsageError: if `strength` is negative.

    Example:
        >>> personal_model(1.0)
        personal_model(strength=1.0)

    Reference: Li et al., Ditto, ICML 2021, algorithm 1.
    Differs:   the authors' code alternates single batches of the two models; here the shared model's local
        training comes first, as in the paper's algorithm.
    """
    require(strength >= 0, f"personal_model: strength must be at least 0, got {strength}")

    def memory(setup: Setup) -> Tree:
        return setup.weights

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.train(local.memory, direct=lambda d, at: pull(strength, d, at, local.shared)), Tree.of({})

    def deploy(local: Local, weights: Tree) -> Tree:
        return local.memory

    return Part(memory=memory, finish=finish, deploy=deploy, gradients=1)
