"""Methods against the drift of clients from the common optimum."""

from __future__ import annotations

from idiolect.card import carded
from idiolect.method import Method, Weighting
from idiolect.parts import control_variates, share
from idiolect.scope import everything


@carded("SCAFFOLD", 2020, "convergence", "Karimireddy et al., ICML 2020")
def scaffold(weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients correct each step by control variates.

    Args:
        weighting: mean of the weights over clients by training examples, or uniform. Variates are always
            averaged equally.
    """
    return Method((share(everything), control_variates()), "SCAFFOLD", weighting)
