"""Methods that cut a model in two: one part is exchanged, the other belongs to the client."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import finetune, freeze, grown_mask, head_first, share


@carded("FedPer", 2019, "label skew", "Arivazhagan et al., arXiv:1912.00818")
def fedper(names: Scope = head, weighting: Weighting = "samples") -> Method:
    """Share the body; the head stays with the client, and both train together.

    Args:
        names: what stays with the client; the last layers, of which the paper keeps one or more.
        weighting: mean over clients by training examples, or uniform.

    Example:
        >>> fedper().parts
        (share(names=~head, variance='mean'),)
    """
    return Method((share(~names),), "FedPer", weighting)


@carded("FedRep", 2021, "label skew", "Collins et al., ICML 2021")
def fedrep(names: Scope = head, head_epochs: int | None = None, weighting: Weighting = "samples") -> Method:
    """FedPer whose clients first fit their head to the received body, then train the body under that head.

    A client predicts with the newest body and its head refitted to it.

    Args:
        names: what stays with the client.
        head_epochs: passes that train the head, at every participation and before predicting; None takes the
            run's local epochs, which are those of the body. The authors take 10 and 1 for CIFAR-10.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(~names), head_first(names, head_epochs), freeze(names)), "FedRep", weighting)


@carded("LG-FedAvg", 2020, "communication", "Liang et al., arXiv:2001.01523")
def lg_fedavg(names: Scope = head, weighting: Weighting = "samples") -> Method:
    """Share the head; the body, with its normalization, stays with the client.

    Args:
        names: what is exchanged; the last layers.
        weighting: mean over clients by training examples, or uniform.

    Differs:   the authors' numbers start from a model that FedAvg has trained. Here training starts where the
        module given to `fit` stands: give it a trained one for theirs, a fresh one for training from scratch,
        which is another method in all but name.
    """
    return Method((share(names),), "LG-FedAvg", weighting)


@carded("FedBABU", 2022, "label skew", "Oh et al., ICLR 2022")
def fedbabu(
    names: Scope = head,
    tuned: Scope = everything,
    epochs: int | None = None,
    lr: float | None = None,
    weighting: Weighting = "samples",
) -> Method:
    """Train and share the body under a head that keeps its initial values; clients fine-tune before predicting.

    Args:
        names: what keeps its initial values, the same for all clients, while bodies are trained.
        tuned: what is fine-tuned.
        epochs: passes of fine-tuning; None takes the run's local epochs, 0 shows the model before it.
        lr: learning rate of fine-tuning; None takes the round's.
        weighting: mean over clients by training examples, or uniform (the authors').
    """
    return Method((share(~names), freeze(names), finetune(tuned, epochs, lr)), "FedBABU", weighting)


@carded("FedSelect", 2024, "label skew", "Tamirisa et al., CVPR 2024")
def fedselect(growth: float = 0.25, limit: float = 0.8, every: int = 1, weighting: Weighting = "uniform") -> Method:
    """FedAvg in which each client keeps more and more values to itself: those that its training moves most.

    A client trains its personal values first, then the shared ones, and predicts with the newest shared values and
    its personal ones refitted to them.

    Args:
        growth: share of the values still shared that turn personal at a time.
        limit: a tensor whose personal share is above this grows no more; the last growth may pass it.
        every: participations from one growth to the next; the authors take 3.
        weighting: mean over clients by training examples, or uniform as in the paper.
    """
    return Method((share(everything), grown_mask(growth, limit, every)), "FedSelect", weighting)
