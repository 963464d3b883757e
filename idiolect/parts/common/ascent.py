"""A gradient taken where the loss is worse nearby."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from idiolect.core.part import require
from idiolect.core.scope import Scope
from idiolect.core.tree import EMPTY, Tree, axpy
from idiolect.core.types import GradFn, Gradient, Setup, Step

EPSILON = 1e-7
"""Added to the norm of the gradient, as in FedFSA's code; a client that has fitted its data is not shaken."""


def uphill(grad: GradFn, ascent: Callable[[Tree, Tree], tuple[Tensor, Tree]]) -> GradFn:
    """Return the gradient at ``weights + scale * ascent``; buffers and loss are of the first pass."""

    def sharp(at: Tree, batch: Step) -> Gradient:
        here = grad(at, batch)
        there = grad(axpy(*ascent(here.gradient, at), at), batch)
        return here._replace(gradient=there.gradient)

    return sharp


def fits(names: Scope | None) -> Callable[[Setup], Tree]:
    """Return a memory of nothing, which says before the first round if there is nothing to perturb."""

    def memory(setup: Setup) -> Tree:
        some = names is None or names(setup.structure) & setup.structure.names("weight")
        require(bool(some), f"nothing to perturb: {names} names no weight of the model")
        return EMPTY

    return memory
