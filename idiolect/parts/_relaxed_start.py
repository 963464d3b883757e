"""A start of local training beyond the received weights, away from the client's last weights."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, overlay, pick
from idiolect.core.types import Central, Local, Setup, Update


@part
def relaxed_start(beta: float = 0.1) -> Part:
    r"""Start beyond the received weights, in the direction away from the client's last trained weights.

    .. math::  s_i = w^t + \beta\, (w^t - w_i^{old}), \qquad
               w^{t+1} = w^t + \sum_{i \in S_t} p_i\, (w_i^{t+} - s_i)

    on trainable tensors that are exchanged. :math:`w_i^{old}` is the initial model for a client that has not trained
    yet. The start is used only for training: a client predicts with the received weights.

    Args:
        beta: distance beyond the received weights, as a share of :math:`w^t - w_i^{old}`, at least 0; 0 starts from
            the received weights.

    Memory:    the exchanged weights as last trained.
    Sends:     :math:`s_i - w^t`, one tensor per exchanged weight.       Receives: nothing.
    Cost:      bytes up double; no extra gradient.
    Raises:    UsageError: if `beta` is negative.

    Example:
        >>> relaxed_start()
        relaxed_start(beta=0.1)

    Reference: Sun et al., FedInit, NeurIPS 2023.
    Differs:   the results are those of the authors' code, whose server adds the mean of :math:`w_i - s_i`. Their server
        keeps every client's last weights; here the client sends the difference instead. With equal weights of clients
        and all clients in every round, the new shared weights are the plain mean of :math:`w_i`.
    """
    require(beta >= 0, f"relaxed_start: beta must be at least 0, got {beta}")

    def memory(setup: Setup) -> Tree:
        return pick(setup.shared, setup.structure.names("weight"))

    def offset(local: Local) -> Tree:
        return beta * (pick(local.shared, local.memory) - local.memory)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        return axpy(1.0, offset(local), weights), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        return pick(local.end, local.memory), offset(local)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(shared=axpy(-1.0, mean, central.new))

    def deploy(local: Local, weights: Tree) -> Tree:
        return overlay(weights, pick(local.shared, local.memory))

    if not beta:
        return Part(neutral={"beta": 0.0})
    return Part(memory=memory, begin=begin, finish=finish, aggregate=aggregate, deploy=deploy, neutral={"beta": 0.0})
