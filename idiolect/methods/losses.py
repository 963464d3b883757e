"""Methods whose clients train on a loss of their own."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything, head, nothing
from idiolect.parts import (
    balanced_softmax,
    calibrated_logits,
    class_gaussians,
    finetune,
    model_contrast,
    not_true_distillation,
    private_head,
    prototypes,
    share,
)


@carded("FedLC", 2022, "label skew", "Zhang et al., ICML 2022")
def fedlc(tau: float = 1.0, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients lower the outputs of classes that are rare among their examples.

    Args:
        tau: size of the margin.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), calibrated_logits(tau)), "FedLC", weighting)


@carded("FedNTD", 2022, "label skew", "Lee et al., NeurIPS 2022")
def fedntd(strength: float = 1.0, temperature: float = 1.0, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients keep what the received model says of the classes that an example is not of.

    Args:
        strength: of what is kept, against what is learned.
        temperature: of both distributions over classes.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), not_true_distillation(strength, temperature)), "FedNTD", weighting)


@carded("MOON", 2021, "label skew", "Li, He and Song, CVPR 2021")
def moon(strength: float = 1.0, temperature: float = 0.5, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients draw features towards the received model's, away from their own last ones.

    Args:
        strength: of the contrast; the authors choose among 0.1, 1, 5 and 10.
        temperature: of the contrast.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), model_contrast(strength, temperature)), "MOON", weighting)


@carded("FedRoD", 2022, "label skew", "Chen and Chao, ICLR 2022")
def fedrod(weighting: Weighting = "samples") -> Method:
    """A shared model that treats classes alike, and a head of each client's own for what its classes need.

    Generalized accuracy is that of the shared head, personalized accuracy that of both heads together.

    Args:
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), balanced_softmax(), private_head()), "FedRoD", weighting)


@carded("FedProto", 2022, "label skew", "Tan et al., AAAI 2022")
def fedproto(strength: float = 1.0, weighting: Weighting = "uniform") -> Method:
    """Every client trains a model of its own; what is exchanged is a mean feature per class.

    Args:
        strength: of the pull of features towards the prototype of their class.
        weighting: clients that have a class count equally for its prototype (the authors'), or by their examples
            of it.
    """
    return Method((share(nothing), prototypes(strength, weighting)), "FedProto")


@carded("FedCR", 2023, "label skew", "Zhang et al., ICML 2023")
def fedcr(
    strength: float = 1e-4,
    samples: int = 18,
    renewal: float = 1.0,
    kl: Literal["code", "bound"] = "code",
    weighting: Weighting = "samples",
) -> Method:
    """A shared body of Gaussian features, held near one Gaussian per class, and a personal head, tuned at the end.

    Args:
        strength: of the hold; the authors' for CIFAR-100, and FedFSA's authors take 1e-3.
        samples: draws of the features of an example in each step.
        renewal: how far the Gaussians of classes go to the new ones each round.
        kl: the divergence as the authors' code has it, or as their theory does.
        weighting: mean of the body over clients by training examples, or uniform (the authors').
    """
    parts = (share(~head), class_gaussians(strength, samples, renewal, kl), finetune(head, freeze_statistics=True))
    return Method(parts, "FedCR", weighting)
