"""Head and body by turns."""

from __future__ import annotations

from idiolect.part import Part, part, require
from idiolect.scope import Scope, head
from idiolect.tree import Tree, pick
from idiolect.words import Local, Slot


@part
def head_then_body(names: Scope = head, epochs: int = 1, lr: float | None = None) -> Part:
    r"""Train the head alone on what was received; then it stands still while the rest is trained.

    .. math::  h \leftarrow h - \eta_h \nabla_h F_i(u^t, h) \text{ for some epochs, then }
               u \leftarrow u - \eta \nabla_u F_i(u, h) \text{ in local training}

    While the head is trained the body stands still, its running statistics too. A client's head is trained before it
    predicts as well, and what comes of that is not kept.

    Args:
        names: the head.
        epochs: passes over the training examples for the head, at least 0.
        lr: learning rate of the head; None takes the round's.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      `epochs` passes more a round, and to predict, backwards through the head alone.
    Raises:    UsageError: if `epochs` is negative.

    Example:
        >>> head_then_body(epochs=2)
        head_then_body(names=head, epochs=2, lr=None)

    Reference: Xu et al., FedPAC, ICLR 2023; Collins et al., FedRep, ICML 2021.
    Differs:   the authors' running statistics move while the head is trained.
    """
    require(epochs >= 0, f"head_then_body: epochs must be at least 0, got {epochs}")

    def begin(local: Local, weights: Tree, slot: Slot) -> tuple[Tree, Tree]:
        return local.train(weights, only=names, epochs=epochs, lr=lr, freeze_statistics=True), slot.memory

    def direction(direction: Tree, weights: Tree, local: Local, slot: Slot) -> Tree:
        return pick(direction, frozenset(direction) - names(local.anatomy))

    return Part(begin=begin, direction=direction)
