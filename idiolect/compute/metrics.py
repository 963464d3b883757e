"""Metrics, and the evaluation of weights on a client's examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from idiolect.compute.autograd import Loss
from idiolect.compute.learner import Learner
from idiolect.core.nest import Nest, joined, logits, mapped, rows_in, tensors
from idiolect.core.tree import Tree
from idiolect.data import Examples, LazyExamples

CHUNK = 1024
"""Examples per forward pass in an evaluation."""


@dataclass(frozen=True)
class Metric:
    """A number that measures a client's predictions.

    Args:
        name: its name in tables.
        compute: (outputs of all examples, targets) -> number; outputs and targets as the loss takes them.
        higher_is_better: True for a metric such as accuracy, False for an error.
    """

    name: str
    compute: Callable[[Nest, Nest], float | Tensor]
    higher_is_better: bool = True


def _share_right(outputs: Nest, targets: Nest) -> Tensor:
    """Return the share of labels that have the largest output, without negative labels and those above all classes."""
    scores = logits(outputs)
    if targets.is_floating_point():  # probabilities of the classes
        targets = targets.argmax(dim=1)
    counted = (targets >= 0) & (targets < scores.shape[1])
    right: Tensor = (scores.argmax(dim=1) == targets)[counted]
    return right.to(torch.float64).mean()


accuracy = Metric("accuracy", _share_right)
"""Share of labels whose output is the largest, 0 to 1. Labels that are no class, such as -100, are left out."""


def evaluate(
    learner: Learner,
    loss: Loss,
    weights: Tree,
    examples: Examples | LazyExamples,
    metrics: Sequence[Metric],
    chunk: int = CHUNK,
) -> dict[str, float]:
    """Return the mean loss and each metric over all examples, in evaluation mode.

    If every tensor of the outputs has one row per example, the loss is that of all outputs together, and the results do
    not depend on `chunk`, the number of examples per pass. Otherwise, as with a model that returns its own loss, the
    loss is the mean over passes by examples, and metrics are given the tensors that have one row per example.
    """
    with torch.inference_mode():
        outputs, targets, losses, sizes = [], [], [], []
        apart = isinstance(examples, LazyExamples)
        for x, y in examples.chunks(chunk):
            found, size = learner.predict(weights, x), rows_in(y)
            apart = apart or any(not t.dim() or len(t) != size for t in tensors(found))
            if apart:
                losses.append(float(loss(found, y)))
                found = mapped(partial(_with_rows, size), found)
            outputs.append(found)
            targets.append(y)
            sizes.append(size)
        whole, all_targets = _joined(outputs), _joined(targets)
        if apart:
            error = sum(value * size for value, size in zip(losses, sizes, strict=True)) / sum(sizes)
        else:
            error = float(loss(whole, all_targets))
        numbers = {"loss": math.inf if math.isnan(error) else error}  # a diverged model has the worst loss
        return numbers | {m.name: float(m.compute(whole, all_targets)) for m in metrics}


def _with_rows(size: int, tensor: Tensor) -> Tensor | None:
    """Return a tensor that has one row per example, or None."""
    return tensor if tensor.dim() and len(tensor) == size else None


def _joined(nests: Sequence[Nest]) -> Nest:
    """Return the rows of several nests as one; if sequences differ in length, they are padded at the end.

    The padding of outputs is 0, that of whole-number targets -100.
    """
    return nests[0] if len(nests) == 1 else joined(nests, _padded)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    filler = 0 if parts[0].is_floating_point() else -100
    longest = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    wide = [part.new_full((len(part), *longest), filler) for part in parts]
    for target, part in zip(wide, parts, strict=True):
        target[tuple(slice(size) for size in part.shape)] = part
    return torch.cat(wide)
