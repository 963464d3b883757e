"""Methods that change the clients' training loss."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head, nothing
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
def fedlc(tau: float = 1.0, weighting: Weighting = "samples", names: Scope = head) -> Method:
    """FedAvg whose clients lower the logits of classes that are rare in their training examples.

    Args:
        tau: size of the margin.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), calibrated_logits(tau, names)), "FedLC", weighting)


@carded("FedNTD", 2022, "label skew", "Lee et al., NeurIPS 2022")
def fedntd(
    strength: float = 1.0, temperature: float = 1.0, weighting: Weighting = "samples", names: Scope = head
) -> Method:
    """FedAvg whose clients distill the received model's distribution over the classes other than the label.

    Args:
        strength: weight of the distillation term in the loss.
        temperature: temperature of both distributions over classes.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), not_true_distillation(strength, temperature, names)), "FedNTD", weighting)


@carded("MOON", 2021, "label skew", "Li, He and Song, CVPR 2021")
def moon(
    strength: float = 1.0, temperature: float = 0.5, weighting: Weighting = "samples", names: Scope = head
) -> Method:
    """FedAvg with a contrastive loss: pull features toward the received model's, away from the last local model's.

    Args:
        strength: weight of the contrastive loss; the authors choose among 0.1, 1, 5 and 10.
        temperature: temperature of the contrastive loss.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), model_contrast(strength, temperature, names)), "MOON", weighting)


@carded("FedRoD", 2022, "label skew", "Chen and Chao, ICLR 2022")
def fedrod(weighting: Weighting = "samples", names: Scope = head) -> Method:
    """Train a class-balanced shared model, and a personal head per client for the client's class distribution.

    Generalized accuracy is that of the shared head, personalized accuracy that of both heads together.

    Args:
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), balanced_softmax(names), private_head(names)), "FedRoD", weighting)


@carded("FedProto", 2022, "label skew", "Tan et al., AAAI 2022")
def fedproto(strength: float = 1.0, weighting: Weighting = "uniform", names: Scope = head) -> Method:
    """Train one model per client; clients exchange only the mean feature of each class.

    Args:
        strength: strength of the pull of features toward the prototype of their class.
        weighting: clients that have a class get equal weights in its prototype (the authors'), or weights by their
            number of examples of it.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(nothing), prototypes(strength, weighting, names)), "FedProto")


@carded("FedCR", 2023, "label skew", "Zhang et al., ICML 2023")
def fedcr(
    strength: float = 1e-4,
    samples: int = 18,
    renewal: float = 1.0,
    kl: Literal["code", "bound"] = "code",
    weighting: Weighting = "samples",
    names: Scope = head,
) -> Method:
    """Share a body with Gaussian features, regularized toward one Gaussian per class; heads are personal.

    Heads are fine-tuned before the client predicts.

    Args:
        strength: weight of the regularizer; the authors' for CIFAR-100, and FedFSA's authors take 1e-3.
        samples: samples of an example's features in each step.
        renewal: step of the classes' Gaussians toward the new ones in each round.
        kl: the divergence of the authors' code, or that of their theory.
        weighting: mean of the body over clients by training examples, or uniform (the authors').
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    parts = (
        share(~names),
        class_gaussians(strength, samples, renewal, kl, names),
        finetune(names, freeze_statistics=True),
    )
    return Method(parts, "FedCR", weighting)
