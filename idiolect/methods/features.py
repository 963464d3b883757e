"""Methods that look at features: what the body makes of examples before the head sees them."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import (
    balanced_softmax,
    domain_bias,
    feature_alignment,
    fisher_weights,
    head_ensemble,
    nearest_neighbors,
    share,
)


@carded("FedDBE", 2023, "label skew", "Zhang et al., NeurIPS 2023")
def feddbe(strength: float = 5.0, momentum: float = 0.1, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients shift their features by a vector of their own, which keeps the shared ones alike.

    Args:
        strength: of the pull of a client's mean features to everybody's.
        momentum: of the running mean of features within a round.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), domain_bias(strength, momentum)), "FedDBE", weighting)


@carded("kNN-Per", 2022, "feature shift", "Marfoq et al., ICML 2022")
def knnper(
    neighbors: int = 10,
    share_of_neighbors: float = 0.5,
    capacity: int = 1000,
    scale: float = 1.0,
    weighting: Weighting = "samples",
) -> Method:
    """FedAvg; to predict, the shared model is mixed with the labels of the client's nearest examples.

    Args:
        neighbors: how many of its examples a client asks.
        share_of_neighbors: what they count, in [0, 1]; choose it by validation examples, never by test examples.
        capacity: how many examples they are looked for among.
        scale: how far a neighbor's vote carries.
        weighting: mean over clients by training examples, or uniform.
    """
    parts = (share(everything), nearest_neighbors(neighbors, share_of_neighbors, capacity, scale))
    return Method(parts, "kNN-Per", weighting)


@carded("FedAS", 2024, "label skew", "Yang et al., CVPR 2024")
def fedas(names: Scope = head, epochs: int = 1, lr: float | None = None) -> Method:
    """A private head; the received body is brought to the features it knows; clients count by what they have to learn.

    Args:
        names: the head, a linear layer, which stays with the client.
        epochs: passes that bring the body to the client's features.
        lr: learning rate of these; None takes the round's.
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
) -> Method:
    """A shared model that treats classes alike, and a head of each client's own, weighed anew for each test input.

    Meant for test inputs that differ from the training examples. Predictions use the unlabeled test inputs.

    Args:
        epochs: passes that train a client's own head before it trains or predicts.
        steps: that find an input's weights; 0 weighs both heads equally.
        lr: of these steps; the authors take ten times the learning rate of the own head.
        momentum: weight of an input in the running mean of features.
        alone: weight of the input's own features against that mean; at 1 it is predicted as it would be alone.
        weighting: mean over clients by training examples, or uniform (the authors').
    """
    parts = (share(everything), balanced_softmax(added=1), head_ensemble(epochs, steps, lr, momentum, alone))
    return Method(parts, "FedTHE", weighting)
