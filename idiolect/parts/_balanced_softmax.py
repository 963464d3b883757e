"""A softmax balanced by a client's class frequencies."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.parts.common.logits import shifted


@part
def balanced_softmax(names: Scope = head, added: int = 0) -> Part:
    r"""Train as if the client had as many examples of each class.

    .. math::  L = -\log \frac{n_y e^{f_y}}{\sum_c n_c e^{f_c}}

    where :math:`n_c` counts the client's training examples of class c. The model predicts without the counts.

    Args:
        names: the linear layer whose outputs enter the loss.
        added: number added to each class count, at least 0. FedTHE's authors add 1.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `added` is negative, or targets are not class labels.

    Example:
        >>> balanced_softmax()
        balanced_softmax(names=head, added=0)

    Reference: Ren et al., NeurIPS 2020; in federated learning Chen and Chao, FedRoD, ICLR 2022.
    Differs:   a class that is absent counts as 1e-8 examples instead of none.
    """
    require(added >= 0, f"balanced_softmax: added must be at least 0, got {added}")
    return Part(objective=shifted(names, lambda counts: counts.log(), added))
