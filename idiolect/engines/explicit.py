"""The learner of workers: explicit kernels if the model allows it, autograd otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence

from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels, NotAChainError
from idiolect.compute.learner import Learner
from idiolect.core.nest import Nest
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree
from idiolect.core.types import Gradient, Objective, Query, Step


def explicit(model: Model) -> Learner:
    """Return the faster learner that the model allows."""
    general = PerThread(model)
    try:
        return _Either(Kernels(model), general)
    except NotAChainError:
        return general


class _Either:
    """Explicit kernels for the loss of the run, autograd for losses and queries of parts."""

    def __init__(self, kernels: Kernels, general: PerThread) -> None:
        self.structure: ModelStructure = kernels.structure
        self.way = kernels.way
        self.predict: Callable[[Tree, Nest], Nest] = kernels.predict
        self.descend: Callable[[Tree, Step, float], Tensor] = kernels.descend
        self.observe: Callable[[Tree, Step, Query], Tree] = general.observe
        self.statistics: Callable[[Tree, Nest], Tree] = general.statistics
        self._kernels, self._general = kernels, general

    def grad(
        self, weights: Tree, step: Step, only: Container[str] | None = None, objectives: Sequence[Objective] = ()
    ) -> Gradient:
        """See `Learner`."""
        if objectives:
            return self._general.grad(weights, step, only, objectives)
        return self._kernels.grad(weights, step, only)


class PerThread:
    """A model for several threads: each thread has its own copy of the module."""

    descend = None

    def __init__(self, model: Model) -> None:
        self.structure: ModelStructure = model.structure
        self.way = model.way
        self._model = model
        self._local = threading.local()

    def grad(
        self, weights: Tree, step: Step, only: Container[str] | None = None, objectives: Sequence[Objective] = ()
    ) -> Gradient:
        """See `Model.grad`."""
        return self._own().grad(weights, step, only, objectives)

    def observe(self, weights: Tree, step: Step, query: Query) -> Tree:
        """See `Model.observe`."""
        return self._own().observe(weights, step, query)

    def predict(self, weights: Tree, x: Nest) -> Nest:
        """See `Model.predict`."""
        return self._own().predict(weights, x)

    def statistics(self, weights: Tree, x: Nest) -> Tree:
        """See `Model.statistics`."""
        return self._own().statistics(weights, x)

    def _own(self) -> Model:
        own: Model | None = getattr(self._local, "model", None)
        if own is None:
            own = self._local.model = self._model.copy()
        return own
