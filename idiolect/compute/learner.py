"""The protocol of learners: a model with gradients, predictions and queries, however they are computed."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol

from torch import Tensor

from idiolect.core.nest import Nest
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree
from idiolect.core.types import Gradient, Lockstep, Objective, Query, Step


class Learner(Protocol):
    """A model that can be trained."""

    @property
    def structure(self) -> ModelStructure:
        """The tensors of the model."""
        ...

    @property
    def way(self) -> str:
        """How gradients are computed, for the record: two runs that differ in this differ by rounding."""
        ...

    def grad(
        self,
        weights: Tree,
        step: Step,
        only: Container[str] | None = None,
        objectives: Sequence[Objective] = (),
    ) -> Gradient:
        """Return the gradient of the mean loss in all trainable weights, or in those named; pure.

        Objectives change the loss; the first is the outermost.
        """
        ...

    def observe(self, weights: Tree, step: Step, query: Query) -> Tree:
        """Return the sums of a query over a batch, in evaluation mode."""
        ...

    def predict(self, weights: Tree, x: Nest) -> Nest:
        """Return the outputs in evaluation mode, without autograd."""
        ...

    def statistics(self, weights: Tree, x: Nest) -> Tree:
        """Return mean and variance of the inputs of each layer of batch normalization, with x as one batch."""
        ...

    @property
    def descend(self) -> Callable[[Tree, Step, float], Tensor] | None:
        """A plain step of gradient descent in place, (weights, step, rate) -> loss; None if there is no fast one."""
        ...


class Counted:
    """A learner that counts its gradients.

    Args:
        model: the learner.
        none: (..., 1) zeros; a stack has one row per client.
    """

    def __init__(self, model: Learner, none: Tensor) -> None:
        self.structure, self.way, self.statistics = model.structure, model.way, model.statistics
        self.predict, self.observe = model.predict, model.observe
        self.descend = self._descend if model.descend else None
        self._model, self._in_stack, self._alone = model, none, 0

    @property
    def gradients(self) -> Tensor:
        """(..., 1) number of gradients of each client."""
        return self._in_stack + self._alone

    def grad(
        self, weights: Tree, step: Step, only: Container[str] | None = None, objectives: Sequence[Objective] = ()
    ) -> Gradient:
        """See `Learner`."""
        self._count(step)
        return self._model.grad(weights, step, only, objectives)

    def _descend(self, row: Tree, step: Step, rate: float) -> Tensor:
        assert self._model.descend
        self._count(step)
        return self._model.descend(row, step, rate)

    def _count(self, step: Step) -> None:
        if isinstance(step, Lockstep):
            self._in_stack[: step.live] += 1
        else:
            self._alone += 1
