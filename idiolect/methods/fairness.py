"""Methods that make results more uniform over clients."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import loss_weights, share


@carded("q-FedAvg", 2020, "fairness", "Li et al., ICLR 2020")
def qfedavg(q: float = 1.0, weighting: Weighting = "samples") -> Method:
    """FedAvg in which clients with a larger loss have larger weights, which makes accuracy more uniform.

    Choose q on validation data: the best value differs by orders of magnitude between data sets.

    Args:
        q: exponent of the loss in the weights; 0 is FedAvg. The authors take 0.001 to 5.
        weighting: by training examples, as in the paper's objective, or uniform (the authors' code).
    """
    return Method((share(everything), loss_weights(q)), "q-FedAvg", weighting)
