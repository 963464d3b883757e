"""Methods against the drift of clients from the common optimum."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import control_variates, relaxed_start, share


@carded("SCAFFOLD", 2020, "convergence", "Karimireddy et al., ICML 2020")
def scaffold(weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients correct each step by control variates.

    Args:
        weighting: mean of the weights over clients by training examples, or uniform. Variates are always
            averaged equally.
    """
    return Method((share(everything), control_variates()), "SCAFFOLD", weighting)


@carded("FedInit", 2023, "convergence", "Sun et al., NeurIPS 2023")
def fedinit(beta: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients start a little beyond the shared model, seen from where their last training ended.

    Args:
        beta: how far beyond, as a share of that distance.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), relaxed_start(beta)), "FedInit", weighting)
