"""Gradients at perturbed weights, for sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from idiolect.core.part import require
from idiolect.core.scope import Scope
from idiolect.core.tree import EMPTY, Tree, axpy
from idiolect.core.types import GradFn, Gradient, Setup, Step

EPSILON = 1e-7
"""Constant added to the norm of the gradient, as in FedFSA's code; a zero gradient gives no perturbation."""


def uphill(grad: GradFn, ascent: Callable[[Tree, Tree], tuple[Tensor, Tree]]) -> GradFn:
    """Return the gradient at ``weights + scale * ascent``; buffers and loss are those of the first pass."""

    def sharp(at: Tree, batch: Step) -> Gradient:
        here = grad(at, batch)
        there = grad(axpy(*ascent(here.gradient, at), at), batch)
        return here._replace(gradient=there.gradient)

    return sharp


def fits(names: Scope | None) -> Callable[[Setup], Tree]:
    """Return an empty memory, which raises an error before the first round if no weight can be perturbed."""

    def memory(setup: Setup) -> Tree:
        some = names is None or names(setup.structure) & setup.structure.names("weight")
        require(bool(some), f"nothing to perturb: {names} names no weight of the model")
        return EMPTY

    return memory
