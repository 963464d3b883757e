"""Training of the head before the body."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree
from idiolect.core.types import Local


@part
def head_first(
    names: Scope = head, epochs: int | None = None, lr: float | None = None, freeze_statistics: bool = False
) -> Part:
    r"""Train only the named tensors before local training, on the received model.

    .. math::  h_i \leftarrow h_i - \eta\, \nabla_h F_i(u^t, h_i) \quad \text{for some epochs, with the body } u^t

    The run's optimizer is used, and is reset for local training. A client does the same before it predicts: it uses
    the newest body with a head retrained on it, which is not kept.

    Args:
        names: tensors that are trained first: `head` for the layer that makes the output.
        epochs: passes over the training examples; None takes the run's local epochs, 0 trains nothing.
        lr: learning rate; None takes the round's.
        freeze_statistics: normalize with the running statistics in these epochs. If False, they are updated.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      `epochs` more passes per round, and for each personal model; backwards through the named tensors only.
    Raises:    UsageError: if `epochs` is negative or `lr` is not above 0.

    Example:
        >>> head_first(epochs=10)
        head_first(names=head, epochs=10, lr=None, freeze_statistics=False)

    Reference: Collins et al., FedRep, ICML 2021; Xu et al., FedPAC, ICLR 2023.
    Differs:   the authors train every client's head once more after the last round; here it is trained whenever a
        client's model is evaluated. These epochs use the same order of examples as the first epochs that follow.
    """
    require(epochs is None or epochs >= 0, f"head_first: epochs must be at least 0, got {epochs}")
    require(lr is None or lr > 0, f"head_first: lr must be above 0, got {lr}")

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        trained = local.train(weights, only=names, epochs=epochs, lr=lr, freeze_statistics=freeze_statistics)
        return trained, local.memory

    return Part(begin=begin, neutral={"epochs": 0})
