"""How workers differentiate: by explicit kernels where a model allows it, by autograd otherwise."""

from __future__ import annotations

import threading
from collections.abc import Container

from torch import Tensor

from idiolect.anatomy import Anatomy
from idiolect.client import Learner
from idiolect.kernels import Kernels, NotAChainError
from idiolect.model import Model
from idiolect.tree import Tree
from idiolect.words import Gradient, Step


def explicit(model: Model) -> Learner:
    """Return the faster of the two ways that a model allows."""
    try:
        return Kernels(model)
    except NotAChainError:
        return PerThread(model)


class PerThread:
    """A model that several threads may use: each has its own copy of the module, whose forward is not shared."""

    descend = None

    def __init__(self, model: Model) -> None:
        self.anatomy: Anatomy = model.anatomy
        self.way = model.way
        self._model = model
        self._local = threading.local()

    def grad(self, weights: Tree, step: Step, only: Container[str] | None = None) -> Gradient:
        """See `Model.grad`."""
        return self._own().grad(weights, step, only)

    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """See `Model.predict`."""
        return self._own().predict(weights, x)

    def _own(self) -> Model:
        own: Model | None = getattr(self._local, "model", None)
        if own is None:
            own = self._local.model = self._model.copy()
        return own
