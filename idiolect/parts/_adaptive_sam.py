"""Adaptive sharpness-aware minimization: the perturbation scales with the magnitude of each weight."""

from __future__ import annotations

from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope
from idiolect.core.tree import Tree, norm, pick, spread
from idiolect.core.types import GradFn, Local
from idiolect.parts.common.ascent import EPSILON, fits, uphill


@part
def adaptive_sam(rho: float, eta: float = 0.2, names: Scope | None = None) -> Part:
    r"""Apply adaptive SAM, whose perturbation scales with the magnitude of each weight.

    .. math::  \varepsilon = \rho\, \frac{T^2 g}{\lVert T g \rVert + 10^{-7}}, \qquad
               T = |w| + \eta \text{ on weights}, \; 1 \text{ on biases}

    Args:
        rho: radius, at least 0; 0 is the plain gradient.
        eta: constant added to the magnitude of a weight, at least 0.
        names: weights that are perturbed; None for all trained weights.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      one more gradient per step.
    Raises:    UsageError: if `rho` or `eta` is negative, or `names` means nothing in the model.

    Example:
        >>> adaptive_sam(0.7)
        adaptive_sam(rho=0.7, eta=0.2, names=None)

    Reference: Kwon et al., ICML 2021; in federated learning Caldarola et al., ECCV 2022 (rho 0.7, eta 0.2).
    Differs:   a tensor is a bias if its name within its layer is ``bias``, whatever the layer's name.
    """
    require(rho >= 0 and eta >= 0, f"adaptive_sam: rho and eta must be at least 0, got {rho} and {eta}")

    def gradient(grad: GradFn, local: Local) -> GradFn:
        where = local.structure.trainable.only(names(local.structure)) if names else local.structure.trainable
        is_weight = [float(n.rpartition(".")[2] != "bias") for n in where.names]
        mask = spread(local.start.flat.new_tensor(is_weight), where)
        rest = mask * -1.0 + 1.0

        def ascent(g: Tree, at: Tree) -> tuple[Tensor, Tree]:
            stretch = mask * (abs(pick(at, where.starts)) + eta) + rest
            scaled = stretch * pick(g, where.starts)
            return rho / (norm(scaled) + EPSILON), stretch * scaled

        return uphill(grad, ascent) if rho else grad

    return Part(memory=fits(names), gradient=gradient, gradients=1 if rho else 0, neutral={"rho": 0.0})
