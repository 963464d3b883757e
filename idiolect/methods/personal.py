"""Methods that keep, or mix in, a model of the client's own."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import adaptive_mix, moreau_envelope, personal_mixture, personal_model, share


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


@carded("APFL", 2020, "label skew", "Deng et al. 2020")
def apfl(share_of_own: float = 0.5, adaptive: bool = True, weighting: Weighting = "samples") -> Method:
    """FedAvg, and for each client a mixture of the shared model with one of its own.

    Args:
        share_of_own: share of the client's own model at first; 0 is the shared model, 1 a model of its own.
        adaptive: learn the share; off, it stays.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), personal_mixture(share_of_own, adaptive)), "APFL", weighting)


@carded("pFedMe", 2020, "label skew", "Dinh et al., NeurIPS 2020")
def pfedme(strength: float = 15.0, steps: int = 5, lr: float = 0.05, weighting: Weighting = "samples") -> Method:
    """Share the point that every client's own model stays near.

    The authors' beta, a longer or shorter step of the server, is ``pfedme() + server_sgd(lr=2.0, momentum=0.0)``.

    Args:
        strength: how near; the run's learning rate times it should stay below 1.
        steps: of the client's own model on each batch.
        lr: of those steps; times `strength` it should stay below 1.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), moreau_envelope(strength, steps, lr)), "pFedMe", weighting)
