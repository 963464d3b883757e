"""Where local training starts, away from where the client ended."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, overlay, pick
from idiolect.core.types import Local, Setup
from idiolect.parts.common.first import TRAINED, trained, untrained


@part
def relaxed_start(beta: float = 0.1) -> Part:
    r"""Setup a little beyond what was received, seen from where the client's last training ended.

    .. math::  s_i = w^t + \beta\, (w^t - w_i^{old})

    On trainable tensors that are exchanged. A client that trains for the first time starts from what it received.
    The start serves training alone, which moves back towards the client's optimum: a client that predicts does
    so with the weights as they were received.

    Args:
        beta: how far beyond, at least 0; 0 starts from what was received.

    Memory:    the exchanged weights as last trained, and whether there are any.
    Sends:     nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `beta` is negative.

    Example:
        >>> relaxed_start()
        relaxed_start(beta=0.1)

    Reference: Sun et al., FedInit, NeurIPS 2023.
    """
    require(beta >= 0, f"relaxed_start: beta must be at least 0, got {beta}")

    def memory(setup: Setup) -> Tree:
        return Tree.of({**pick(setup.shared, setup.structure.names("weight")), **untrained(setup)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        old = pick(local.memory, weights)
        return axpy(beta * local.memory[TRAINED], pick(weights, old) - old, weights), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        return overlay(trained(local.memory), pick(local.end, local.memory)), Tree.of({})

    def deploy(local: Local, weights: Tree) -> Tree:
        return overlay(weights, pick(local.shared, local.memory))

    return Part(memory=memory, begin=begin, finish=finish, deploy=deploy, neutral={"beta": 0.0})
