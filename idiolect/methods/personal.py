"""Methods that keep, or mix in, a model of the client's own."""

from __future__ import annotations

from idiolect.card import carded
from idiolect.method import Method, Weighting
from idiolect.parts import adaptive_mix, personal_model, share
from idiolect.scope import Scope, everything, head


@carded("Ditto", 2021, "label skew", "Li et al., ICML 2021")
def ditto(strength: float = 1.0, weighting: Weighting = "samples") -> Method:
    """FedAvg, and beside it a whole model per client that is pulled towards the shared one.

    Args:
        strength: of the pull; 0 is training alone.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), personal_model(strength)), "Ditto", weighting)


@carded("FedALA", 2023, "label skew", "Zhang et al., AAAI 2023")
def fedala(
    names: Scope = head, share_of_batches: float = 0.8, lr: float = 1.0, weighting: Weighting = "samples"
) -> Method:
    """FedAvg whose clients start from a learned mix of their last model and the shared one.

    Args:
        names: which tensors are mixed; the others start from the shared model.
        share_of_batches: share of a pass that the mix is learned on.
        lr: step of the mix.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), adaptive_mix(names, share_of_batches, lr)), "FedALA", weighting)
