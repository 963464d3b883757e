"""Methods that search for flat minima."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head, normalization
from idiolect.parts import (
    adaptive_sam,
    control_variates,
    estimated_sam,
    finetune,
    flexible_sam,
    sam,
    server_momentum,
    share,
)


@carded("FedSAM", 2022, "label skew", "Qu et al., ICML 2022; Caldarola et al., ECCV 2022")
def fedsam(rho: float = 0.05, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients train with sharpness-aware minimization.

    Args:
        rho: radius of the perturbation; 0.05 in FedFSA's comparison.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), sam(rho)), "FedSAM", weighting)


@carded("FedASAM", 2022, "label skew", "Caldarola et al., ECCV 2022")
def fedasam(rho: float = 0.7, eta: float = 0.2, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients train with adaptive SAM.

    Args:
        rho: radius of the perturbation, about ten times that of SAM.
        eta: constant added to the magnitude of a weight.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), adaptive_sam(rho, eta)), "FedASAM", weighting)


@carded("SAM-ON", 2023, "label skew", "Müller et al., NeurIPS 2023")
def sam_on(rho: float = 0.5, weighting: Weighting = "samples") -> Method:
    """FedSAM that perturbs only the scale and shift of normalization layers; all weights are trained.

    ``sam(rho, normalization)`` does the same in any method, and so does ``adaptive_sam``. With `fedbn` only the
    client's personal tensors are perturbed. A model without normalization is refused.

    Args:
        rho: radius of the perturbation; larger than FedSAM's, since few weights are perturbed.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), sam(rho, normalization)), "SAM-ON", weighting)


@carded("FedLESAM", 2024, "label skew", "Fan et al., ICML 2024")
def fedlesam(rho: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedSAM that perturbs along the change of the shared model since the client last took part, at FedAvg's cost.

    FedLESAM-S is ``fedlesam() + control_variates()``.

    Args:
        rho: radius of the perturbation; the authors recommend tuning it.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), estimated_sam(rho)), "FedLESAM", weighting)


@carded("MoFedSAM", 2022, "label skew", "Qu et al., ICML 2022")
def mofedsam(rho: float = 0.1, alpha: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedSAM whose local steps include the direction of the last round's aggregated update.

    Args:
        rho: radius of the perturbation.
        alpha: weight of the local gradient; the rest is the server's direction.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), sam(rho), server_momentum(alpha)), "MoFedSAM", weighting)


@carded("FedGAMMA", 2023, "label skew", "Dai et al., IEEE TNNLS 2023")
def fedgamma(rho: float = 0.01, weighting: Weighting = "uniform") -> Method:
    r"""FedSAM whose clients correct each local step with control variates, so that they seek one flat minimum.

    .. math::  w \leftarrow w - \eta\, \big( \nabla F_i(w + \varepsilon) + c - c_i \big), \qquad
               \varepsilon = \rho\, g / (\lVert g \rVert + 10^{-7})

    The correction is added at the weights themselves, and does not change the perturbation. A client sends the change
    of :math:`c_i` with its weights.

    Differs: public code divides the change of the weights by the steps of one client, which need not be a whole
    number; here by those that the client took.

    Args:
        rho: radius of the perturbation; the published one is a tenth of what is common for FedSAM.
        weighting: mean of the weights over clients by training examples, or uniform.
    """
    return Method((share(everything), sam(rho), control_variates()), "FedGAMMA", weighting)


@carded("FedFSA", 2025, "label skew", "Xing et al., AAAI 2025")
def fedfsa(
    rho: float = 0.1,
    rho_larger: float = 0.2,
    top: int = 2,
    alpha: float = 0.1,
    selection: Literal["most", "least", "random"] = "most",
    sensitivity: Literal["code", "paper"] = "code",
    weighting: Weighting = "samples",
    names: Scope = head,
) -> Method:
    """MoFedSAM with a larger radius on each client's most sensitive layers; the head is fine-tuned before predicting.

    Defaults are the authors' for Fashion-MNIST and CIFAR-10; for CIFAR-100 they use rho 0.05, rho_larger 0.9.

    Args:
        rho: radius of the other layers.
        rho_larger: radius of the sensitive layers.
        top: number of sensitive layers.
        alpha: weight of the local gradient; the rest is the server's direction.
        selection: the most sensitive layers, the least sensitive, or random ones (the paper's ablation).
        sensitivity: definition in the authors' code, or that in the paper.
        weighting: mean over clients by training examples, or uniform (the authors').
        names: tensors that are fine-tuned; `head` is the layer that makes the output.

    Example:
        >>> [p.name for p in fedfsa(rho_larger=0.9).parts]
        ['share', 'flexible_sam', 'server_momentum', 'finetune']
    """
    parts = (
        share(everything),
        flexible_sam(rho, rho_larger, top, selection, sensitivity),
        server_momentum(alpha),
        finetune(names),
    )
    return Method(parts, "FedFSA", weighting)
