"""Methods for normalization layers: keep them personal, keep their statistics personal, or share nothing else."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.part import require
from idiolect.core.scope import Scope, batch_norm, everything, statistics, weights
from idiolect.parts import adapted_statistics, hybrid_norm, share


@carded("FedBN", 2021, "feature shift", "Li et al., FedBN, ICLR 2021")
def fedbn(weighting: Weighting = "samples", names: Scope = batch_norm) -> Method:
    """Share all tensors except batch normalization, whose five tensors per layer stay with the client.

    For clients with different scanners, cameras or sensors, whose normalization statistics differ. Layers are
    selected by type. A model without batch normalization is refused; ``fedbn(names=normalization)`` keeps the
    normalization of every kind that it has.

    Args:
        weighting: mean over clients by training examples, or uniform (the authors').
        names: tensors that stay with the client: `batch_norm`, or `normalization` for layer, group, instance and RMS
            normalization too.

    Example:
        >>> fedbn().parts[0]
        share(names=~batch_norm, variance='mean')
    """
    return Method((share(~names),), "FedBN", weighting)


@carded("SiloBN", 2020, "feature shift", "Andreux et al., DART workshop at MICCAI 2020")
def silobn(weighting: Weighting = "samples") -> Method:
    """Share all tensors except the running statistics of normalization; its scale and shift are shared.

    Args:
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(~statistics),), "SiloBN", weighting)


@carded("BN-only", 2021, "feature shift", "the dual of FedBN; an ablation of several papers")
def bn_only(
    what: Literal["all", "affine", "statistics"] = "all",
    weighting: Weighting = "samples",
    names: Scope = batch_norm,
) -> Method:
    """Share only batch normalization; all other tensors stay with the client.

    Args:
        what: ``"affine"`` shares scale and shift, ``"statistics"`` running means and variances, ``"all"`` both.
            Running variances are pooled over clients, including the differences between means.
        weighting: mean over clients by training examples, or uniform.
        names: the layers: `batch_norm`, or `normalization` for every kind of normalization.

    Raises:
        UsageError: if `what` is none of the three.
    """
    scopes = {"all": names, "affine": names & weights, "statistics": statistics}
    require(what in scopes, f"bn_only: what is 'all', 'affine' or 'statistics', not {what!r}")
    return Method((share(scopes[what], variance="pooled"),), "BN-only", weighting)


@carded("AdaBN", 2018, "feature shift", "Li et al., Pattern Recognition 2018")
def adabn(weighting: Weighting = "samples") -> Method:
    """Train with FedAvg; to predict, a client normalizes with the mean and variance of its test inputs.

    Predictions use the unlabeled test inputs. The same after FedBN is ``fedbn() + adapted_statistics()``.

    Args:
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), adapted_statistics()), "AdaBN", weighting)


@carded("HBN", 2025, "label skew", "Chen et al., ICML 2025")
def hbn(
    renewal: float = 0.002, predict: Literal["last", "smoothed"] = "last", weighting: Weighting = "samples"
) -> Method:
    """FedAvg with batch normalization by a learned mix of the batch's statistics and those of all clients.

    For small batches of few classes. The statistics are measured on their own, at the shared weights.

    Args:
        renewal: step of the shared statistics toward those of a round.
        predict: statistics that predictions use: of the last round, or ``"smoothed"`` over rounds.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), hybrid_norm(renewal, predict)), "HBN", weighting)
