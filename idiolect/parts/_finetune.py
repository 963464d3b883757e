"""Fine-tuning of a client's model before it predicts."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, everything
from idiolect.core.tree import Tree
from idiolect.core.types import Local


@part
def finetune(
    names: Scope = everything,
    epochs: int | None = None,
    lr: float | None = None,
    freeze_statistics: bool = False,
) -> Part:
    r"""Train the deployed model on the client's own data before it predicts.

    The part can be added to any method: federated training is unchanged, and fine-tuned weights are not sent or kept.
    Fine-tuning follows the plain gradient of the loss, with the run's optimizer, batch size and clipping.

    Args:
        names: tensors to fine-tune: `everything`, or `head` for the layer that makes the output.
        epochs: passes over the training examples; None takes the run's local epochs, 0 skips fine-tuning.
        lr: learning rate; None takes the round's.
        freeze_statistics: normalize with the running statistics instead of the batch's. If False, the statistics
            adapt to the client even when only the head is fine-tuned, as in public code.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      `epochs` more passes for each personal model; none during training.
    Raises:    UsageError: if `epochs` is negative or `lr` is not above 0.

    Example:
        >>> from idiolect.core.scope import head
        >>> finetune(head, epochs=10)
        finetune(names=head, epochs=10, lr=None, freeze_statistics=False)

    Reference: the usual FedAvg-FT; head only in the code of FedRep, FedCR and FedFSA.
    """
    require(epochs is None or epochs >= 0, f"finetune: epochs must be at least 0, got {epochs}")
    require(lr is None or lr > 0, f"finetune: lr must be above 0, got {lr}")

    def deploy(local: Local, weights: Tree) -> Tree:
        return local.train(weights, only=names, epochs=epochs, lr=lr, freeze_statistics=freeze_statistics)

    return Part(deploy=deploy, neutral={"epochs": 0})
