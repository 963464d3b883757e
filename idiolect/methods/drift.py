"""Methods that reduce client drift from the common optimum."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import control_variates, relaxed_start, share


@carded("SCAFFOLD", 2020, "convergence", "Karimireddy et al., ICML 2020")
def scaffold(weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients correct each local step with control variates.

    Args:
        weighting: mean of the weights over clients by training examples, or uniform. The mean of the control
            variates is always uniform.
    """
    return Method((share(everything), control_variates()), "SCAFFOLD", weighting)


@carded("FedInit", 2023, "convergence", "Sun et al., NeurIPS 2023")
def fedinit(beta: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients start beyond the shared model, in the direction away from their last local weights.

    Args:
        beta: distance beyond the shared model, as a share of its distance from those weights.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), relaxed_start(beta)), "FedInit", weighting)
