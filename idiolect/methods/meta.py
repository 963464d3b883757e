"""Meta-learning methods: the shared model is an initialization that each client adapts in a few steps."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import meta_gradient, share


@carded("Per-FedAvg", 2020, "label skew", "Fallah et al., NeurIPS 2020")
def per_fedavg(
    rate: float = 0.01,
    variant: Literal["first_order", "hessian_free"] = "first_order",
    delta: float = 1e-2,
    steps: int = 1,
    weighting: Weighting = "samples",
) -> Method:
    """FedAvg on the loss after one gradient step, which each client takes before it predicts.

    Args:
        rate: length of that step; the run's learning rate is that of training.
        variant: without second derivatives, or with a difference of gradients in place of the Hessian.
        delta: distance between the points of those gradients; see `meta_gradient`.
        steps: plain gradient steps on the client's training examples before predicting.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), meta_gradient(rate, variant, delta, steps)), "Per-FedAvg", weighting)
