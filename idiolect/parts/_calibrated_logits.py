"""Logits calibrated by a client's class frequencies."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.parts.common.logits import shifted


@part
def calibrated_logits(tau: float, names: Scope = head) -> Part:
    r"""Lower each class's logit by a margin that is larger for classes that are rarer on the client.

    .. math::  L = -\log \frac{e^{f_y - \tau n_y^{-1/4}}}{\sum_c e^{f_c - \tau n_c^{-1/4}}}

    where :math:`n_c` counts the client's training examples of class c. A rare class needs a larger margin, and the
    logit of a class that the client lacks is not lowered further by training. The model predicts without margins.

    Args:
        tau: size of the margin, at least 0; 0 is the plain loss.
        names: the linear layer whose outputs enter the loss.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `tau` is negative, or targets are not class labels.

    Example:
        >>> calibrated_logits(1.0)
        calibrated_logits(tau=1.0, names=head)

    Reference: Zhang et al., FedLC, ICML 2022.
    Differs:   the authors published no code; the sum is over all classes, as in public implementations. An absent
        class counts as 1e-8 examples, so its margin is 100 tau instead of the formula's infinity.
    """
    require(tau >= 0, f"calibrated_logits: tau must be at least 0, got {tau}")
    return Part(objective=shifted(names, lambda counts: -tau * counts**-0.25), neutral={"tau": 0.0})
