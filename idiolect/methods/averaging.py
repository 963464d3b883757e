"""Baselines: one shared model, separate local models, fine-tuning, and a proximal term."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, nothing
from idiolect.parts import finetune, proximal, share


@carded("FedAvg", 2017, "baseline", "McMahan et al., AISTATS 2017")
def fedavg(weighting: Weighting = "samples") -> Method:
    """Share all tensors: one model for all clients.

    Args:
        weighting: mean over clients by training examples, or uniform.

    Example:
        >>> fedavg()
        Method((share(names=everything, variance='mean'),), 'FedAvg', 'samples')
    """
    return Method((share(everything),), "FedAvg", weighting)


@carded("FedAvg-FT", 2017, "label skew", "FedAvg, then each client fine-tunes; a strong baseline in most papers")
def fedavg_ft(
    names: Scope = everything,
    epochs: int | None = None,
    lr: float | None = None,
    freeze_statistics: bool = False,
    weighting: Weighting = "samples",
) -> Method:
    """Train with FedAvg; each client fine-tunes the shared model before predicting.

    Args:
        names: tensors to fine-tune; `head` selects the layer that makes the output only.
        epochs: passes over the client's training examples; None takes the run's local epochs.
        lr: learning rate of fine-tuning; None takes the round's.
        freeze_statistics: keep the received running statistics during fine-tuning.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), finetune(names, epochs, lr, freeze_statistics)), "FedAvg-FT", weighting)


@carded("FedProx", 2020, "convergence", "Li et al., MLSys 2020")
def fedprox(mu: float = 0.01, weighting: Weighting = "samples") -> Method:
    """FedAvg with a proximal term that pulls local training toward the received weights.

    Args:
        mu: strength of the proximal term; 0.01 is FedBN's baseline on digits.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), proximal(mu)), "FedProx", weighting)


@carded("Local", 2017, "baseline", "no federation; called SingleSet in FedBN's paper")
def local() -> Method:
    """Share nothing: each client trains alone, in the rounds in which it is sampled."""
    return Method((share(nothing),), "Local")
