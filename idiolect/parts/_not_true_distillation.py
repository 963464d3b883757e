"""Distillation of the received model over the classes other than the label."""

from __future__ import annotations

import math

from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree
from idiolect.core.types import Local, Objective, Pass, Term
from idiolect.parts.common.classes import classifier, of_class


def _not_true(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the log-probabilities of the classes other than the label; 0 for the label."""
    true = of_class(y, outputs.shape[1])
    return outputs.masked_fill(true, -math.inf).log_softmax(1).masked_fill(true, 0.0)


@part
def not_true_distillation(strength: float, temperature: float = 1.0, names: Scope = head) -> Part:
    r"""Distill the received model's distribution over the classes other than the label.

    .. math::  L + \beta \tau^2 \sum_{c \neq y} q_c \log \frac{q_c}{p_c}, \qquad
               p = \operatorname{softmax}_{c \neq y} (f / \tau)

    and q the same for the model from which local training starts, in evaluation mode. The label is excluded, so the
    term does not affect learning of the true class.

    Args:
        strength: :math:`\beta`, at least 0; 0 is the plain loss.
        temperature: :math:`\tau`, above 0. Its square preserves the scale of the gradient, as in the authors' code.
        names: the linear layer from features to classes.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      one more pass without a gradient per step.
    Raises:    UsageError: if `strength` is negative, `temperature` not above 0, or targets are not class labels.

    Example:
        >>> not_true_distillation(1.0)
        not_true_distillation(strength=1.0, temperature=1.0, names=head)

    Reference: Lee et al., FedNTD, NeurIPS 2022.
    Differs:   if some tensors are personal, the distilled model includes the client's personal ones.
    """
    require(strength >= 0, f"not_true_distillation: strength must be at least 0, got {strength}")
    require(temperature > 0, f"not_true_distillation: temperature must be above 0, got {temperature}")

    def loss(inner: Term, seen: Pass, y: Tensor, received: Tree) -> Tensor:
        q = _not_true(seen.under(received).outputs / temperature, y)
        p = _not_true(seen.outputs / temperature, y)
        return inner(seen, y) + strength * temperature**2 * (q.exp() * (q - p)).sum(1).mean()

    def objective(local: Local) -> Objective:
        return Objective(classifier(names, local.structure).layer, loss, local.start)

    return Part(objective=objective, neutral={"strength": 0.0})
