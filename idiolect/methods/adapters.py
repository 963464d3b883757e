"""Methods for large frozen models of which clients train low-rank adapters (LoRA)."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, lora_a
from idiolect.parts import freeze, local_adapter, share

_ALL = lora_a | ~lora_a
"""Everything that is trained; unlike `everything`, an error where a model has no adapter."""


@carded("FedIT", 2024, "communication", "Zhang et al., ICASSP 2024")
def fedit(weighting: Weighting = "samples") -> Method:
    r"""FedAvg of low-rank adapters: average both factors, and everything else that is trained, such as a new head.

    The mean of the factors is not the mean of the updates that they stand for:
    :math:`\sum_i p_i B_i A_i = \bar B \bar A + \sum_i p_i (B_i - \bar B)(A_i - \bar A)`. The second term is lost. Two
    clients with (B, A) and (-B, -A) have equal models, and their mean is the frozen model.

    Args:
        weighting: mean over clients by training examples, or uniform.

    Raises:
        UsageError: if the model has no LoRA layer. Any other model trains with `fedavg`.
    """
    return Method((share(_ALL),), "FedIT", weighting)


@carded("FFA-LoRA", 2024, "convergence", "Sun et al., ICLR 2024")
def ffa_lora(names: Scope = lora_a, weighting: Weighting = "samples") -> Method:
    """Share the factors B of low-rank adapters and the head; the factors A keep their initial values.

    All clients have the same A, so the mean of the factors is the mean of the updates that they stand for, and A is not
    sent. A is that of the module given to `fit`; real sites make theirs with the coordinator's seed.

    Args:
        names: tensors that keep their initial values, which must not be zero.
        weighting: mean over clients by training examples, or uniform.

    Differs:   the authors' code freezes what is called A, which for an embedding is the factor that starts at zero.
    """
    return Method((share(~names), freeze(names)), "FFA-LoRA", weighting)


@carded("FedSA-LoRA", 2025, "label skew", "Guo et al., ICLR 2025")
def fedsa_lora(names: Scope = lora_a, weighting: Weighting = "uniform") -> Method:
    """Share the factors A of low-rank adapters; the factors B and the head stay with the client.

    So does everything else that is trained, such as normalization. A client that has not trained has B = 0, and
    predicts as the frozen model with the initial head.

    Args:
        names: tensors that are shared; ``lora_a | head`` shares the head too.
        weighting: mean over clients by training examples, or uniform (the authors': equal numbers of steps).

    Differs:   in the authors' published setting all clients of a simulation train one module, of which only the shared
        tensors are set back, so B and the head go from client to client; here each client has its own, as in the paper.
    """
    return Method((share(names),), "FedSA-LoRA", weighting)


@carded("FedDPA", 2024, "feature shift", "Yang et al., NeurIPS 2024")
def feddpa(
    share_of_own: float = 0.5,
    largest: float = 0.5,
    references: int = 5,
    layer: str | None = None,
    weighting: Weighting = "uniform",
) -> Method:
    """FedIT whose clients also train an adapter of their own, which counts more for inputs like their own examples.

    Args:
        share_of_own: share of the own adapter while it trains beside the shared one.
        largest: largest share of the own adapter in predictions; 0 predicts as FedIT.
        references: number of training examples that an input is compared with.
        layer: name of the layer whose inputs are compared; None takes the layer that makes the output.
        weighting: mean over clients by training examples, or uniform (the authors').
    """
    parts = share(_ALL), local_adapter(share_of_own, largest, references, layer)
    return Method(parts, "FedDPA", weighting)
