"""Methods with a personal model per client, separate from the shared model or mixed with it."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import adaptive_mix, moreau_envelope, personal_mixture, personal_model, share


@carded("Ditto", 2021, "label skew", "Li et al., ICML 2021")
def ditto(strength: float = 1.0, weighting: Weighting = "samples") -> Method:
    """Run FedAvg and also train a personal model per client, pulled toward the shared model.

    Args:
        strength: strength of the pull; 0 trains each client alone.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), personal_model(strength)), "Ditto", weighting)


@carded("FedALA", 2023, "label skew", "Zhang et al., AAAI 2023")
def fedala(
    names: Scope = head, share_of_batches: float = 0.8, lr: float = 1.0, weighting: Weighting = "samples"
) -> Method:
    """FedAvg whose clients start from a learned mix of their last model and the shared one.

    Args:
        names: tensors that are mixed; the others start from the shared model.
        share_of_batches: share of an epoch's batches on which the mix is learned.
        lr: step size of the mixing weights.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), adaptive_mix(names, share_of_batches, lr)), "FedALA", weighting)


@carded("APFL", 2020, "label skew", "Deng et al. 2020")
def apfl(share_of_own: float = 0.5, adaptive: bool = True, weighting: Weighting = "samples") -> Method:
    """Run FedAvg and train for each client a mixture of the shared model and a personal model.

    Args:
        share_of_own: initial weight of the personal model; 0 is the shared model, 1 the personal model.
        adaptive: learn the weight; False keeps it constant.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), personal_mixture(share_of_own, adaptive)), "APFL", weighting)


@carded("pFedMe", 2020, "label skew", "Dinh et al., NeurIPS 2020")
def pfedme(strength: float = 15.0, steps: int = 5, lr: float = 0.05, weighting: Weighting = "samples") -> Method:
    """Share the center of a Moreau envelope: each client's personal model is regularized toward it.

    For the authors' beta, the step size of the server, use ``pfedme() + server_sgd(lr=2.0, momentum=0.0)``.

    Args:
        strength: strength of the regularizer; its product with the run's learning rate should be below 1.
        steps: steps of the personal model on each batch.
        lr: learning rate of those steps; its product with `strength` should be below 1.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), moreau_envelope(strength, steps, lr)), "pFedMe", weighting)
