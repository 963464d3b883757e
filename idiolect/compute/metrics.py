"""Metrics, and the evaluation of weights on a client's examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idiolect.compute.autograd import Loss
from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, counting

CHUNK = 1024
"""Examples per forward pass in an evaluation."""


@dataclass(frozen=True)
class Metric:
    """A number that measures a client's predictions.

    Args:
        name: its name in tables.
        compute: (outputs of all examples, targets) -> number.
        higher_is_better: True for a metric such as accuracy, False for an error.

    Raises:
        UsageError: if the name is no text, or `compute` no function.
    """

    name: str
    compute: Callable[[Tensor, Tensor], float | Tensor]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"Metric: name is text, not {self.name!r}")
        if isinstance(self.compute, type) or not callable(self.compute):
            raise UsageError(
                f"Metric {self.name!r}: compute is a function (outputs, targets) -> number, not {self.compute!r}"
            )


def _share_right(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(dim=1) == targets).to(torch.float64).mean()


accuracy = Metric("accuracy", _share_right)
"""Share of examples whose largest output is that of their label; 0 to 1."""


def evaluate(
    learner: Learner, loss: Loss, weights: Tree, x: Tensor, y: Tensor, metrics: Sequence[Metric], chunk: int = CHUNK
) -> dict[str, float]:
    """Return the mean loss and each metric over all examples, in evaluation mode.

    The results do not depend on `chunk`, the number of examples per pass.
    """
    with torch.inference_mode():
        outputs = torch.cat([learner.predict(weights, part) for part in torch.split(x, chunk)])
        error = float(loss(outputs, y))
        found = {"loss": math.inf if math.isnan(error) else error}  # a diverged model has the worst loss
        given = readable(outputs), readable(y)
        return found | {m.name: float(m.compute(*given)) for m in metrics}


def readable(values: Tensor) -> Tensor:
    """Return outputs or targets as metrics are given them: in float32 at least, since NumPy has no bfloat16."""
    return values.to(counting(values.dtype))
