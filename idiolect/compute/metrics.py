"""Metrics, and the evaluation of weights on a client's examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from idiolect.compute.learner import Learner
from idiolect.compute.losses import Loss
from idiolect.core.calls import called, takes
from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest, joined, logits, mapped, rows_in, tensors
from idiolect.core.tree import Tree, counting
from idiolect.core.values import arguments
from idiolect.data import Examples, LazyExamples

CHUNK = 1024
"""Examples per forward pass in an evaluation."""

CHUNK_READ = 64
"""The same for examples that are read, of which no more should be in memory."""


@called
@dataclass(frozen=True)
class Metric:
    """A number that measures a client's predictions.

    Args:
        name: its name in tables.
        compute: (outputs of all examples, targets) -> number; outputs and targets as the loss takes them.
        higher_is_better: True for a metric such as accuracy, False for an error.

    Raises:
        UsageError: if the name is no text, or `compute` no function.
    """

    name: str
    compute: Callable[[Nest, Nest], float | Tensor]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"Metric: name is text, not {self.name!r}")
        takes(f"Metric {self.name!r}: compute", self.compute, "outputs, targets")
        arguments(f"Metric {self.name!r}", {"higher_is_better": self.higher_is_better}, {"higher_is_better": bool})


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
    chunk: int | None = None,
) -> dict[str, float]:
    """Return the mean loss and each metric over all examples, in evaluation mode.

    If examples are in memory and every tensor of the outputs has one row per example, the loss is that of all outputs
    together, and results do not depend on `chunk`, the number of examples per pass (None: 1024, or 64 if they are
    read). Otherwise, as with a model that returns its own loss, the loss is the mean over passes by examples, and
    metrics are given the tensors that have one row per example.

    Raises:
        UsageError: if a tensor of the outputs has one row per example in some passes only.
    """
    with torch.inference_mode():
        total, done, error = len(examples), 0, 0.0
        outputs: Nest = None
        targets: Nest = None
        apart = isinstance(examples, LazyExamples)
        for x, y in examples.chunks(chunk or (CHUNK_READ if apart else CHUNK)):
            found, size = learner.predict(weights, x), rows_in(y)
            odd = any(not t.dim() or len(t) != size for t in tensors(found))
            if odd and done and not apart:
                raise UsageError(
                    "an output has one row per example in some passes only: give it another number of rows"
                )
            apart = apart or odd
            if apart:
                error += float(loss(found, y)) * size / total
                found = mapped(partial(with_rows, size), found)
            outputs, targets = _kept(outputs, found, done, total), _kept(targets, y, done, total)
            done += size
        if not apart:
            error = float(loss(outputs, targets))
        numbers = {"loss": math.inf if math.isnan(error) else error}  # a diverged model has the worst loss
        given = readable(outputs), readable(targets)
        return numbers | {m.name: float(m.compute(*given)) for m in metrics}


def readable(nest: Nest) -> Nest:
    """Return outputs or targets as metrics are given them: in float32 at least, since NumPy has no bfloat16."""
    return mapped(lambda values: values.to(counting(values.dtype)), nest)


def with_rows(size: int, tensor: Tensor) -> Tensor | None:
    """Return a tensor that has one row per example, or None."""
    return tensor if tensor.dim() and len(tensor) == size else None


def _kept(whole: Nest, part: Nest, start: int, total: int) -> Nest:
    """Return what is kept of all passes with the rows of one more; `whole` is None before the first.

    Sequences that differ in length are padded at the end: outputs with 0, whole-number targets with -100. There is one
    tensor from the first pass on: small ones that stay between the large ones of each pass would break up the memory.
    """
    if whole is None:
        kept = tensors(part)
        if not kept or len(kept[0]) == total:
            return part
        whole = mapped(lambda t: _empty(t, [total, *t.shape[1:]]), part)
    return joined([whole, part], partial(_written, start))


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_full(shape, 0 if like.is_floating_point() or like.dtype == torch.bool else -100)


def _written(start: int, pair: Sequence[Tensor]) -> Tensor:
    whole, part = pair
    shape = [len(whole), *map(max, whole.shape[1:], part.shape[1:])]
    if shape != list(whole.shape):
        wider = _empty(whole, shape)
        wider[tuple(map(slice, whole.shape))] = whole
        whole = wider
    whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
    return whole
