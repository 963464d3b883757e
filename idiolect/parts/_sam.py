"""Sharpness-aware minimization."""

from __future__ import annotations

from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope
from idiolect.core.tree import Tree, norm, pick
from idiolect.core.types import GradFn, Local
from idiolect.parts.common.ascent import EPSILON, fits, uphill


@part
def sam(rho: float, names: Scope | None = None) -> Part:
    r"""Take the gradient at the point of largest loss in a ball around the weights, to first order.

    .. math::  \varepsilon = \rho\, \frac{g}{\lVert g \rVert + 10^{-7}}, \qquad  \tilde g = \nabla F_i(w + \varepsilon)

    The norm is over all perturbed tensors together. Both gradients use the same batch and the same dropout.
    Running statistics are those of the first pass, so they are updated once per step. Weights are not perturbed in
    place and restored, which avoids a second rounding.

    Args:
        rho: radius, at least 0; 0 is the plain gradient, without the second pass.
        names: weights that are perturbed, such as `normalization` (SAM-ON); None for all trained weights. The step
            follows the gradient of all trained weights.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      one more gradient per step.
    Raises:    UsageError: if `rho` is negative, or `names` means nothing in the model.

    Example:
        >>> sam(0.05)
        sam(rho=0.05, names=None)

    Reference: Foret et al., ICLR 2021; in federated learning Qu et al., ICML 2022, and Caldarola et al.,
        ECCV 2022; on normalization alone Müller et al., NeurIPS 2023.
    Differs:   public code updates running statistics in both passes; here only the first updates them.
    """
    require(rho >= 0, f"sam: rho must be at least 0, got {rho}")

    def gradient(grad: GradFn, local: Local) -> GradFn:
        only = names(local.structure) if names else None

        def ascent(g: Tree, at: Tree) -> tuple[Tensor, Tree]:
            up = g if only is None else pick(g, only)
            return rho / (norm(up) + EPSILON), up

        return uphill(grad, ascent) if rho else grad

    return Part(memory=fits(names), gradient=gradient, gradients=1 if rho else 0, neutral={"rho": 0.0})
