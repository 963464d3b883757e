"""Methods whose clients learn from those that resemble them: the server tells each something of its own."""

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
    """Every client has a model of its own, pulled to a mean in which models near it count more.

    There is no shared model. Each client's whole model goes to the server: that is how it finds who is near. Meant
    for few clients that mostly take part; a round mixes its own clients alone.

    Args:
        strength: of the pull; 0 is training alone.
        others: how much of a client's mean belongs to others if all have the same weights.
        sigma: squared distance at which another's weight has fallen to 1 / e of that; None takes the median.
    """
    return Method((share(nothing), attention(strength, others, sigma)), "FedAMP")


@carded("FedCAC", 2023, "label skew", "Wu et al., ICCV 2023")
def fedcac(top: float = 0.5, rounds: int = 100, weighting: Weighting = "samples") -> Method:
    """FedAvg whose clients start the values that matter to them from a mean over those to whom the same ones matter.

    Args:
        top: share of each tensor's values that are critical.
        rounds: until a client's critical values are its own alone; the authors take 100 to 200.
        weighting: mean over clients by training examples, or uniform; partners always count equally.
    """
    return Method((share(everything), critical_mix(top, rounds)), "FedCAC", weighting)


@carded("FedFomo", 2021, "label skew", "Zhang et al., ICLR 2021")
def fedfomo(others: int = 5, explore: float = 0.3, decay: float = 0.05) -> Method:
    """Every client starts from a mean of models of its own choice: those that lower its validation loss.

    There is no shared model. Clients are sent models of others whole, and give the server their own. Give clients
    validation examples: where a client has none, its training examples decide, on which its own model looks best.

    Args:
        others: how many models of others a client is sent in a round.
        explore: how likely each of them is one at random, in the first round.
        decay: what is taken off that in every round. The authors take 0.05 off 0.3.
    """
    return Method((share(nothing), first_order_mix(others, explore, decay)), "FedFomo")


@carded("pFedSim", 2023, "label skew", "Tan et al., 2023")
def pfedsim(warmup: int = 10, weighting: Weighting = "samples") -> Method:
    """FedAvg at first; then each client keeps its head, on a body mixed from clients with similar heads.

    Args:
        warmup: rounds of FedAvg. The authors take half of all rounds: give half of yours.
        weighting: of FedAvg: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), similar_bodies(warmup)), "pFedSim", weighting)


@carded("FedPAC", 2023, "label skew", "Xu et al., ICLR 2023")
def fedpac(
    strength: float = 1.0,
    head_epochs: int = 1,
    head_lr: float | None = None,
    names: Scope = head,
    weighting: Weighting = "samples",
) -> Method:
    """Share a body whose features are aligned by class; each client's head is mixed from those that suit it.

    Every client's head goes to the server, which mixes them. For classes: targets are labels.

    Args:
        strength: of the pull of features to the cohort's mean of their class.
        head_epochs: passes that train the head before the body.
        head_lr: learning rate of the head; None takes the round's. The authors take 0.1.
        names: the head.
        weighting: of bodies: mean over clients by training examples, or uniform.
    """
    parts = (
        share(~names),
        mixed_heads(names),
        aligned_features(strength, names),
        head_first(names, head_epochs, head_lr, freeze_statistics=True),
        freeze(names),
    )
    return Method(parts, "FedPAC", weighting)
