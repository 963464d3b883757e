"""Methods that split a model: one part is shared, the other is personal."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything, head
from idiolect.parts import finetune, freeze, grown_mask, head_first, share


@carded("FedPer", 2019, "label skew", "Arivazhagan et al., arXiv:1912.00818")
def fedper(names: Scope = head, weighting: Weighting = "samples") -> Method:
    """Share the body; the head stays with the client, and both are trained together.

    Args:
        names: tensors that stay with the client; the last layers, of which the paper keeps one or more.
        weighting: mean over clients by training examples, or uniform.

    Example:
        >>> fedper().parts
        (share(names=~head, variance='mean'),)
    """
    return Method((share(~names),), "FedPer", weighting)


@carded("FedRep", 2021, "label skew", "Collins et al., ICML 2021")
def fedrep(names: Scope = head, head_epochs: int | None = None, weighting: Weighting = "samples") -> Method:
    """FedPer whose clients first train their head on the received body, then train the body with that head frozen.

    A client predicts with the newest body and its head retrained on it.

    Args:
        names: tensors that stay with the client.
        head_epochs: passes that train the head, at every participation and before predicting; None takes the
            run's local epochs, which are those of the body. The authors take 10 and 1 for CIFAR-10.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(~names), head_first(names, head_epochs), freeze(names)), "FedRep", weighting)


@carded("LG-FedAvg", 2020, "communication", "Liang et al., arXiv:2001.01523")
def lg_fedavg(names: Scope = head, weighting: Weighting = "samples") -> Method:
    """Share the head; the body, including its normalization, stays with the client.

    Args:
        names: tensors that are shared; the last layers.
        weighting: mean over clients by training examples, or uniform.

    Differs:   the authors' numbers start from a model trained with FedAvg. Here training starts from the weights of
        the module given to `fit`: pass a trained one to reproduce theirs. A fresh one trains from scratch, which is
        in effect a different method.
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
    """Train and share the body with a frozen, untrained head; clients fine-tune before predicting.

    Args:
        names: tensors that keep their initial values, the same for all clients, while bodies are trained.
        tuned: tensors to fine-tune.
        epochs: passes of fine-tuning; None takes the run's local epochs, 0 evaluates the model without it.
        lr: learning rate of fine-tuning; None takes the round's.
        weighting: mean over clients by training examples, or uniform (the authors').
    """
    return Method((share(~names), freeze(names), finetune(tuned, epochs, lr)), "FedBABU", weighting)


@carded("FedSelect", 2024, "label skew", "Tamirisa et al., CVPR 2024")
def fedselect(growth: float = 0.25, limit: float = 0.8, every: int = 1, weighting: Weighting = "uniform") -> Method:
    """FedAvg in which a growing set of values per client becomes personal: those that its training changes most.

    A client trains its personal values first, then the shared ones. It predicts with the newest shared values and
    its personal values retrained on them.

    Args:
        growth: share of the still shared values that become personal at each growth step.
        limit: a tensor whose personal share exceeds this stops growing; the last growth step may exceed it.
        every: participations between growth steps; the authors take 3.
        weighting: mean over clients by training examples, or uniform as in the paper.
    """
    return Method((share(everything), grown_mask(growth, limit, every)), "FedSelect", weighting)
