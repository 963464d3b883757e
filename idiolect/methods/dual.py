"""Methods whose clients keep a dual variable: the accumulated difference from the shared model."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import consistent_sam, dynamic, sam, server_sam, share


@carded("FedDyn", 2021, "convergence", "Acar et al., ICLR 2021")
def feddyn(strength: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedAvg with a dynamic regularizer: a proximal term, corrected by each client's dual variable.

    Args:
        strength: strength of the regularizer, above 0; alpha in the paper.
        weighting: mean of the weights over clients by training examples, or uniform (the authors'). The mean of the
            duals is always uniform.
    """
    return Method((share(everything), dynamic(strength)), "FedDyn", weighting)


@carded("FedSpeed", 2023, "label skew", "Sun et al., ICLR 2023")
def fedspeed(
    rho: float = 0.1,
    strength: float = 0.1,
    dual_mean: Literal["all", "participants"] = "all",
    weighting: Weighting = "samples",
) -> Method:
    """FedDyn with SAM's gradient, for many local steps.

    With `Training(clip=...)` it differs from the authors' code, which clips only a part of the pull: see `dynamic`.

    Args:
        rho: radius of the perturbation.
        strength: strength of the pull, above 0; the inverse of the paper's lambda.
        dual_mean: the server adds the mean dual of ``"all"`` clients, as in the authors' code, or of the round's
            ``"participants"``, as in their paper. With all clients in every round both are the same.
        weighting: mean of the weights over clients by training examples, or uniform (the authors').

    Example:
        >>> fedspeed().parts[1:]
        (sam(rho=0.1, names=None), dynamic(strength=0.1, dual_mean='all'))
    """
    return Method((share(everything), sam(rho), dynamic(strength, dual_mean)), "FedSpeed", weighting)


@carded("FedSMOO", 2023, "label skew", "Sun et al., ICML 2023")
def fedsmoo(
    rho: float = 0.1,
    strength: float = 0.1,
    report: Literal["code", "paper"] = "code",
    weighting: Weighting = "samples",
) -> Method:
    """FedDyn with SAM's gradient and a constraint that keeps the clients' perturbations consistent.

    Args:
        rho: radius of the perturbation.
        strength: strength of the pull, above 0.
        report: form in which clients report their perturbations: that of the authors' code or of their paper.
        weighting: mean over clients by training examples, or uniform (the authors').
    """
    return Method((share(everything), consistent_sam(rho, report), dynamic(strength)), "FedSMOO", weighting)


@carded("FedGloSS", 2025, "label skew", "Caldarola et al., CVPR 2025")
def fedgloss(
    rho: float = 0.15, strength: float = 0.1, rho_local: float = 0.15, weighting: Weighting = "samples"
) -> Method:
    """FedDyn whose server applies SAM's perturbation to the model that it sends, at no communication cost.

    Args:
        rho: radius of the server's perturbation.
        strength: strength of the pull, above 0; 1 / beta in the paper.
        rho_local: radius of the clients' own perturbation; 0 takes plain local steps.
        weighting: mean over clients by training examples (the authors'), or uniform.
    """
    return Method((share(everything), sam(rho_local), server_sam(rho), dynamic(strength)), "FedGloSS", weighting)
