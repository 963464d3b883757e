"""A personal model per client, regularized toward the shared model."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree
from idiolect.core.types import Local, Setup
from idiolect.parts.common.pull import pull


@part
def personal_model(strength: float) -> Part:
    r"""Train a personal model per client, in addition to the shared model and pulled toward it.

    .. math::  v_i \leftarrow v_i - \eta \big( g_i(v_i) + \lambda\, (v_i - w^t) \big)

    over the same batches as the shared model, after it; the anchor is the received weights, and is fixed.
    The client predicts with :math:`v_i`, which starts from the initial weights.

    Args:
        strength: :math:`\lambda`, at least 0; 0 trains each client alone.

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
