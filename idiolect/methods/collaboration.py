"""Methods in which similar clients learn from each other: the server sends each client a result of its own."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head, nothing
from idiolect.parts import (
    aligned_features,
    attention,
    critical_mix,
    first_order_mix,
    freeze,
    head_first,
    mixed_heads,
    share,
    similar_bodies,
)


@carded("FedAMP", 2021, "label skew", "Huang et al., AAAI 2021")
def fedamp(strength: float = 1.0, others: float = 1.0, sigma: float | None = None) -> Method:
    """Train one model per client, pulled toward a mean in which more similar models have larger weights.

    There is no shared model. Each client sends its whole model to the server, which computes the distances between
    models. The method suits few clients that take part in most rounds; a round mixes only its own clients.

    Args:
        strength: strength of the pull; 0 trains each client alone.
        others: share of other clients in a client's mean if all models have the same weights.
        sigma: squared distance at which another model's weight falls to 1 / e of that; None takes the median.
    """
    return Method((share(nothing), attention(strength, others, sigma)), "FedAMP")


@carded("FedCAC", 2023, "label skew", "Wu et al., ICCV 2023")
def fedcac(top: float = 0.5, rounds: int = 100, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients start their critical values from a mean over clients with similar critical values.

    Args:
        top: share of each tensor's values that are critical.
        rounds: rounds until a client no longer mixes its critical values with others; the authors take 100 to 200.
        weighting: mean over clients by training examples, or uniform; partners always have equal weights.
    """
    return Method((share(everything), critical_mix(top, rounds)), "FedCAC", weighting)


@carded("FedFomo", 2021, "label skew", "Zhang et al., ICLR 2021")
def fedfomo(others: int = 5, explore: float = 0.3, decay: float = 0.05) -> Method:
    """Start each client from a weighted mean of those models of other clients that lower its validation loss.

    There is no shared model. Clients receive whole models of other clients and send their own to the server. Give
    clients validation examples: without them the weights come from training examples, which favor the client's own
    model.

    Args:
        others: number of other clients' models that a client receives in a round.
        explore: probability in the first round that each of them is chosen at random.
        decay: amount subtracted from that probability in every round. The authors subtract 0.05 from 0.3.
    """
    return Method((share(nothing), first_order_mix(others, explore, decay)), "FedFomo")


@carded("pFedSim", 2023, "label skew", "Tan et al., 2023")
def pfedsim(warmup: int = 10, weighting: Weighting = "samples", names: Scope = head) -> Method:
    """Run FedAvg first; then each client keeps its head and receives a mix of the bodies of clients with similar heads.

    Args:
        warmup: rounds of FedAvg. The authors take half of all rounds; set it to half of yours.
        weighting: weighting of FedAvg: mean over clients by training examples, or uniform.
        names: the head, a linear layer from features to classes; `head` is the layer that makes the output.
    """
    return Method((share(everything), similar_bodies(warmup, names)), "pFedSim", weighting)


@carded("FedPAC", 2023, "label skew", "Xu et al., ICLR 2023")
def fedpac(
    strength: float = 1.0,
    head_epochs: int = 1,
    head_lr: float | None = None,
    names: Scope = head,
    weighting: Weighting = "samples",
) -> Method:
    """Share a body whose features are aligned by class; each client's head is a weighted mix of clients' heads.

    Each client sends its head to the server, which mixes them. For classification only: targets are labels.

    Args:
        strength: strength of the pull of features toward the cohort's mean for their class.
        head_epochs: passes that train the head before the body.
        head_lr: learning rate of the head; None takes the round's. The authors take 0.1.
        names: the tensors of the head.
        weighting: weighting of bodies: mean over clients by training examples, or uniform.
    """
    parts = (
        share(~names),
        mixed_heads(names),
        aligned_features(strength, names),
        head_first(names, head_epochs, head_lr, freeze_statistics=True),
        freeze(names),
    )
    return Method(parts, "FedPAC", weighting)
