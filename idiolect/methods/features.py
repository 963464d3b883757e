"""Methods that use features, the output of the body and the input of the head."""

from __future__ import annotations

from typing import Literal

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import (
    balanced_softmax,
    conditional_valve,
    discriminant_head,
    domain_bias,
    feature_alignment,
    fisher_weights,
    gated_heads,
    head_ensemble,
    nearest_neighbors,
    share,
)


@carded("FedDBE", 2023, "label skew", "Zhang et al., NeurIPS 2023")
def feddbe(
    strength: float = 5.0, momentum: float = 0.1, weighting: Weighting = "samples", names: Scope = head
) -> Method:
    """FedAvg whose clients add a personal vector to their features, which keeps the shared features similar.

    Args:
        strength: strength of the pull of a client's mean features toward the global mean.
        momentum: momentum of the running mean of features within a round.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), domain_bias(strength, momentum, names)), "FedDBE", weighting)


@carded("kNN-Per", 2022, "feature shift", "Marfoq et al., ICML 2022")
def knnper(
    neighbors: int = 10,
    share_of_neighbors: float = 0.5,
    capacity: int = 1000,
    scale: float = 1.0,
    weighting: Weighting = "samples",
    names: Scope = head,
) -> Method:
    """Train with FedAvg; to predict, mix the shared model's output with the labels of the client's nearest examples.

    Args:
        neighbors: number of nearest examples.
        share_of_neighbors: their weight, in [0, 1]; choose it on validation examples, never on test examples.
        capacity: number of examples among which neighbors are searched.
        scale: distance scale of a neighbor's weight.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    parts = (share(everything), nearest_neighbors(neighbors, share_of_neighbors, capacity, scale, names))
    return Method(parts, "kNN-Per", weighting)


@carded("FedAS", 2024, "label skew", "Yang et al., CVPR 2024")
def fedas(names: Scope = head, epochs: int = 1, lr: float | None = None) -> Method:
    """Keep heads personal, align the received body with the client's features, weight clients by Fisher information.

    Args:
        names: the head, a linear layer, which stays with the client.
        epochs: passes that align the body with the client's features.
        lr: learning rate of these passes; None takes the round's.
    """
    return Method((share(~names), feature_alignment(epochs, lr, names), fisher_weights()), "FedAS")


@carded("FedTHE", 2023, "label skew", "Jiang and Lin, ICLR 2023")
def fedthe(
    epochs: int = 1,
    steps: int = 20,
    lr: float = 0.1,
    momentum: float = 0.1,
    alone: float = 0.1,
    weighting: Weighting = "samples",
    names: Scope = head,
) -> Method:
    """Train a class-balanced shared model and personal heads; weight the two heads separately for each test input.

    For test inputs that differ from the training examples. Predictions use the unlabeled test inputs.

    Args:
        epochs: passes that train a client's personal head before the client trains or predicts.
        steps: steps that optimize an input's weights; 0 gives both heads equal weights.
        lr: learning rate of these steps; the authors take ten times the learning rate of the personal head.
        momentum: weight of an input in the running mean of features.
        alone: weight of the input's own features against that mean; at 1 other inputs have no influence.
        weighting: mean over clients by training examples, or uniform (the authors').
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    parts = (
        share(everything),
        balanced_softmax(names, added=1),
        head_ensemble(epochs, steps, lr, momentum, alone, names),
    )
    return Method(parts, "FedTHE", weighting)


@carded("FedCP", 2023, "label skew", "Zhang et al., KDD 2023")
def fedcp(strength: float = 1.0, weighting: Weighting = "samples", names: Scope = head) -> Method:
    """Share the body; a gate, learned and shared too, gives every feature partly to a personal and to a shared head.

    Args:
        strength: strength of the pull of a batch's features toward those under the received body.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(~names), gated_heads(strength, names)), "FedCP", weighting)


@carded("GPFL", 2023, "label skew", "Zhang et al., ICCV 2023")
def gpfl(strength: float = 0.01, decay: float = 0.1, weighting: Weighting = "samples", names: Scope = head) -> Method:
    """Share the body, an embedding per class, and a map of features that, for a client's head, depends on its classes.

    Args:
        strength: strength of the pull of features toward the received embedding of their class.
        decay: weight decay of the embeddings and of the map alone.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(~names), conditional_valve(strength, decay, names)), "GPFL", weighting)


@carded("pFedFDA", 2024, "feature shift", "McLaughlin and Su, NeurIPS 2024")
def pfedfda(
    own: float | None = None,
    covariance: Literal["full", "diagonal"] = "full",
    ridge: float = 1e-4,
    weighting: Weighting = "samples",
    names: Scope = head,
) -> Method:
    """Share the body and Gaussians of its features; each client's head is computed from these and from its own.

    For clients whose features and classes differ, with few examples each. A client chooses how much it uses its own
    Gaussians by cross-validation. Heads are neither trained nor sent.

    Args:
        own: share of a client's own Gaussians, if it is fixed; None chooses it.
        covariance: the whole matrix, or ``"diagonal"`` for variances alone, if features are many.
        ridge: added to each variance of a client.
        weighting: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    parts = (share(~names), discriminant_head(own, covariance, ridge, names))
    return Method(parts, "pFedFDA", weighting)
