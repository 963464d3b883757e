"""A softmax balanced by how often a client has each class."""

from __future__ import annotations

from idiolect.core.part import Part, part
from idiolect.core.scope import Scope, head
from idiolect.parts.common.logits import shifted


@part
def balanced_softmax(names: Scope = head) -> Part:
    r"""Train as if the client had as many examples of each class.

    .. math::  L = -\log \frac{n_y e^{f_y}}{\sum_c n_c e^{f_c}}

    where :math:`n_c` counts the client's training examples of class c. The model predicts without the counts.

    Args:
        names: the linear layer whose outputs the loss is given.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if targets are not class labels.

    Example:
        >>> balanced_softmax()
        balanced_softmax(names=head)

    Reference: Ren et al., NeurIPS 2020; in federated learning Chen and Chao, FedRoD, ICLR 2022.
    Differs:   a class that is absent counts as 1e-8 examples instead of none.
    """
    return Part(objective=shifted(names, lambda counts: counts.log()))
