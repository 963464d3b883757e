"""Losses: what they are, and which of them are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest

Loss = Callable[[Nest, Nest], Tensor]
"""(output, target) -> () mean over the batch."""


def own_loss(output: Nest, target: Nest) -> Tensor:
    """Return the loss that the model itself returns: ``output.loss`` or ``output["loss"]``.

    Example:
        >>> own_loss({"loss": torch.tensor(0.5), "logits": torch.zeros(1, 2)}, None)
        tensor(0.5000)
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError("own_loss needs a model that returns its loss: give it labels, or give fit(loss=...)")
    return loss


def is_plain_cross_entropy(loss: Loss) -> bool:
    """Return whether a loss is cross-entropy with all options at their defaults."""
    if type(loss) is nn.CrossEntropyLoss:
        options = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        return options == (None, -100, "mean", 0.0) and "forward" not in vars(loss)
    return loss is F.cross_entropy


def stacked_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Return the same as `F.cross_entropy`, which launches four times as many kernels under `vmap`."""
    return -torch.log_softmax(output, 1).gather(1, y[:, None]).mean()
