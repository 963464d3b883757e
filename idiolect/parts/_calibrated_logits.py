"""Outputs shifted by how often each class occurs, in training alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree, vectors
from idiolect.core.types import Local, Objective, Pass, Term
from idiolect.parts.common.classes import classifier

ABSENT = 1e-8
"""What a class without examples counts as, so that no shift is infinite."""


def _shifted(names: Scope, shift: Callable[[Tensor], Tensor], added: int = 0) -> Callable[[Local], Objective]:
    """Return an objective on outputs to which a function of the client's counts of classes is added."""

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)
        counts = (local.counts(found.classes) + added).clamp(min=ABSENT)

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            return inner(seen._replace(outputs=seen.outputs + facts["shift"]), y)

        return Objective(found.layer, loss, vectors(shift=shift(counts)))

    return objective


@part
def calibrated_logits(tau: float, names: Scope = head) -> Part:
    r"""Lower each class's output by a margin that grows as the class gets rarer on the client.

    .. math::  L = -\log \frac{e^{f_y - \tau n_y^{-1/4}}}{\sum_c e^{f_c - \tau n_c^{-1/4}}}

    where :math:`n_c` counts the client's training examples of class c. A rare class has to win by more, and a class
    that the client lacks is not pushed down. The model predicts without margins.

    Args:
        tau: size of the margin, at least 0; 0 is the plain loss.
        names: the linear layer whose outputs the loss is given.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `tau` is negative, or targets are not class labels.

    Example:
        >>> calibrated_logits(1.0)
        calibrated_logits(tau=1.0, names=head)

    Reference: Zhang et al., FedLC, ICML 2022.
    Differs:   there is no code of the authors; the sum is over all classes, as in public implementations. A class
        that is absent counts as 1e-8 examples, so its margin is 100 tau, where the formula has infinity.
    """
    require(tau >= 0, f"calibrated_logits: tau must be at least 0, got {tau}")
    return Part(objective=_shifted(names, lambda counts: -tau * counts**-0.25), neutral={"tau": 0.0})


@part
def balanced_softmax(names: Scope = head, added: int = 0) -> Part:
    r"""Train as if the client had as many examples of each class.

    .. math::  L = -\log \frac{n_y e^{f_y}}{\sum_c n_c e^{f_c}}

    where :math:`n_c` counts the client's training examples of class c. The model predicts without the counts.

    Args:
        names: the linear layer whose outputs the loss is given.
        added: how many examples each class counts beside those the client has, at least 0. FedTHE's authors add 1.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `added` is negative, or targets are not class labels.

    Example:
        >>> balanced_softmax()
        balanced_softmax(names=head, added=0)

    Reference: Ren et al., NeurIPS 2020; in federated learning Chen and Chao, FedRoD, ICLR 2022.
    Differs:   a class without any counts as 1e-8 examples.
    """
    require(added >= 0, f"balanced_softmax: added must be at least 0, got {added}")
    return Part(objective=_shifted(names, lambda counts: counts.log(), added))
