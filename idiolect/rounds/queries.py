"""Queries of parts over all of a client's examples; in a stack the result has one row per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from idiolect.compute.learner import Learner
from idiolect.compute.metrics import CHUNK
from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest, rows_in
from idiolect.core.scope import Scope
from idiolect.core.tree import Tree, counting, layout, pick, stacked, vectors
from idiolect.core.types import Batch, ClientRows, Gradient, Lockstep, Query, Split, Step, Stream
from idiolect.data import Examples


@dataclass(frozen=True)
class Queries:
    """Queries over all of a client's examples.

    Args:
        model: evaluates and differentiates the model.
        streams: the examples of each split.
        none: (..., 1) zeros with the leading axes of the stack.
    """

    model: Learner
    streams: Mapping[Split, Stream]
    none: Tensor

    @property
    def lead(self) -> torch.Size:
        """The leading axes of the stack."""
        return self.none.shape[:-1]

    def total(self, weights: Tree, query: Query, split: Split = "train") -> Tree:
        """Return the sums of a query over all examples; zero if there are none."""
        stream = self.streams[split]
        where = layout(tuple(query.shapes), tuple(map(torch.Size, query.shapes.values())))
        weights = _arranged(stacked(weights, self.lead), stream.order)
        query = query._replace(facts=_arranged(query.facts, stream.order))
        total = Tree(where, weights.flat.new_zeros(*self.lead, where.total, dtype=counting(weights.flat.dtype)))
        for step in stream.epochs(1):
            total = total + self.model.observe(weights, step, query)
        return _arranged(total, stream.order, back=True)

    def each(self, weights: Tree, query: Query, inputs: Nest | None = None) -> Tree:
        """Return the values of a query for each training example or input; zeros follow a client's last example."""
        if inputs is not None:
            return self._each_input(weights, query, inputs)
        weights, alone, taken = stacked(weights, self.lead), not self.lead, [0] * self.none.numel()
        pieces: list[tuple[slice, slice, Tree]] = []
        for step in self.streams["train"].epochs(1):
            for group in step.groups if isinstance(step, Lockstep) else [ClientRows(slice(1), step)]:
                count, at = rows_in(group.batch.y, len(self.lead)), taken[group.rows.start or 0]
                part = step._replace(groups=(group,)) if isinstance(step, Lockstep) else step
                shapes = {name: (count, *shape) for name, shape in query.shapes.items()}
                seen = self.model.observe(weights, part, query._replace(shapes=shapes))
                own = seen if alone else Tree(seen.layout, seen.flat[group.rows])
                pieces.append((group.rows, slice(at, at + count), own))
                taken[group.rows] = [at + count] * len(taken[group.rows])
        whole = {name: weights.flat.new_zeros(len(taken), max(taken), *shape) for name, shape in query.shapes.items()}
        for rows, examples, seen in pieces:
            for name, tensor in seen.items():
                whole[name][rows, examples] = tensor
        where = layout(tuple(whole), tuple(t.shape[1:] for t in whole.values()))
        return Tree(where, torch.cat([t.reshape(*self.lead, t[0].numel()) for t in whole.values()], dim=-1))

    def _each_input(self, weights: Tree, query: Query, inputs: Nest) -> Tree:
        """Return the values of a query for each unlabeled input of one client."""
        pieces = []
        for x, _ in Examples(inputs, inputs).chunks(CHUNK):
            shapes = {name: (rows_in(x), *shape) for name, shape in query.shapes.items()}
            step = Batch(x, self.none.new_zeros(rows_in(x), 0))
            pieces.append(self.model.observe(weights, step, query._replace(shapes=shapes)))
        return Tree.of({name: torch.cat([piece[name] for piece in pieces]) for name in query.shapes})

    def counts(self, classes: int) -> Tensor:
        """Return the number of training examples of each class, ``(..., classes)``, in the dtype of the weights.

        Raises:
            UsageError: if targets are not one class label per example.
        """
        total = self.none.new_zeros(*self.lead, classes)
        for step in self.streams["train"].epochs(1):
            for rows, batch in step.groups if isinstance(step, Lockstep) else [(..., step)]:
                y = batch.y
                if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != total.dim():
                    raise UsageError(
                        "the method counts examples by class: it needs one class label per example as target"
                    )
                total[rows] += one_hot(y, classes).sum(-2)
        return total

    def whole(self, weights: Tree, *, only: Scope | None = None, split: Split = "train") -> Gradient:
        """Return the mean loss of all examples and its gradient, batch by batch; zero if there are none."""
        structure, stream = self.model.structure, self.streams[split]
        weights = _arranged(stacked(weights, self.lead), stream.order)
        names = None if only is None else only(structure)
        where = structure.trainable if names is None else structure.trainable.only(names)
        gradient = weights.flat.new_zeros(*self.lead, where.total, dtype=counting(weights.flat.dtype))
        loss, seen = torch.zeros_like(self.none), torch.zeros_like(self.none)
        for step in stream.epochs(1):
            out = self.model.grad(weights, step._replace(frozen=True), only=names)
            count = _examples(step, self.none)
            gradient += count * out.gradient.flat
            loss += count * out.loss[..., None]
            seen += count
        seen = seen.clamp(min=1)
        results = Tree(where, gradient / seen), pick(weights, structure.buffers.starts), vectors(loss=loss / seen)
        slope, buffers, mean = (_arranged(tree, stream.order, back=True) for tree in results)
        return Gradient(slope, buffers, mean["loss"][..., 0])


def _arranged(tree: Tree, order: Tensor | None, back: bool = False) -> Tree:
    """Return the rows of a stack in the order of a stream, or with `back` in the order of the stack."""
    if order is None or tree.flat.dim() == 1:
        return tree
    return Tree(tree.layout, tree.flat[order.argsort() if back else order])


def _examples(step: Step, like: Tensor) -> Tensor:
    """Return the number of examples of each client in a step, ``(..., 1)``."""
    if not isinstance(step, Lockstep):
        return torch.full_like(like, rows_in(step.y))
    counts = torch.zeros_like(like)
    for rows, batch in step.groups:
        counts[rows] = rows_in(batch.y, 1)
    return counts
