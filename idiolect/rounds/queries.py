"""What a part may ask of all of a client's examples; in a stack every client is asked, and answers in its row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.scope import Scope
from idiolect.core.tree import Tree, layout, pick, stacked
from idiolect.core.types import Gradient, Group, Lockstep, Query, Step, Stream


@dataclass(frozen=True)
class Queries:
    """One pass over the examples.

    Args:
        model: what looks at them.
        stream: the examples.
        none: (..., 1) zeros, whose leading axes are those of the stack.
    """

    model: Learner
    stream: Stream
    none: Tensor

    @property
    def lead(self) -> torch.Size:
        """The axes of the stack."""
        return self.none.shape[:-1]

    def total(self, weights: Tree, query: Query) -> Tree:
        """Return the sums of a query over all examples; zero where there are none."""
        where, weights = (
            layout(tuple(query.shapes), tuple(map(torch.Size, query.shapes.values()))),
            stacked(weights, self.lead),
        )
        total = Tree(where, weights.flat.new_zeros(*self.lead, where.total))
        for step in self.stream.epochs(1):
            total = total + self.model.observe(weights, step, query)
        return total

    def each(self, weights: Tree, query: Query) -> Tree:
        """Return what a query sees of each example, and zeros after a client's last; no row where there are none."""
        weights, alone, taken = stacked(weights, self.lead), not self.lead, [0] * self.none.numel()
        pieces: list[tuple[slice, slice, Tree]] = []
        for step in self.stream.epochs(1):
            for group in step.groups if isinstance(step, Lockstep) else [Group(slice(1), step)]:
                count, at = group.batch.y.shape[len(self.lead)], taken[group.rows.start or 0]
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

    def counts(self, classes: int) -> Tensor:
        """Return how many examples of each class there are, ``(..., classes)``, in the dtype of the weights.

        Raises:
            UsageError: if targets are not one class label per example.
        """
        total = self.none.new_zeros(*self.lead, classes)
        for step in self.stream.epochs(1):
            for rows, batch in step.groups if isinstance(step, Lockstep) else [(..., step)]:
                if batch.y.is_floating_point() or batch.y.dim() != total.dim():
                    raise UsageError(
                        "the method counts examples by class: it needs one class label per example as target"
                    )
                total[rows] += one_hot(batch.y, classes).sum(-2)
        return total

    def whole(self, weights: Tree, *, only: Scope | None = None) -> Gradient:
        """Return the mean loss of all examples and its gradient, batch by batch; zero where there are none."""
        structure, weights = self.model.structure, stacked(weights, self.lead)
        names = None if only is None else only(structure)
        where = structure.trainable if names is None else structure.trainable.only(names)
        gradient = weights.flat.new_zeros(*self.lead, where.total)
        loss, seen = torch.zeros_like(self.none), torch.zeros_like(self.none)
        for step in self.stream.epochs(1):
            out = self.model.grad(weights, step._replace(frozen=True), only=names)
            count = _examples(step, self.none)
            gradient += count * out.gradient.flat
            loss += count * out.loss[..., None]
            seen += count
        seen = seen.clamp(min=1)
        return Gradient(Tree(where, gradient / seen), pick(weights, structure.buffers.starts), (loss / seen)[..., 0])


def _examples(step: Step, like: Tensor) -> Tensor:
    """Return how many examples each client has in a step, ``(..., 1)``."""
    if not isinstance(step, Lockstep):
        return torch.full_like(like, len(step.y))
    counts = torch.zeros_like(like)
    for rows, batch in step.groups:
        counts[rows] = batch.y.shape[1]
    return counts
