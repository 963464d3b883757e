"""The gradient of the loss after one adaptation step."""

from __future__ import annotations

from typing import Literal

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy
from idiolect.core.types import GradFn, Gradient, Local, Step, halves


@part
def meta_gradient(
    rate: float,
    variant: Literal["first_order", "hessian_free"] = "first_order",
    delta: float = 1e-2,
    steps: int = 1,
) -> Part:
    r"""Minimize the loss after one gradient step; a client takes that step before it predicts.

    .. math::  \tilde w = w - a\, g(w; D), \qquad v = g(\tilde w; D'), \qquad
               d = v \;\text{(first order)}, \qquad
               d = v - a\, \frac{g(w + \delta v; D) - g(w - \delta v; D)}{2\delta} \;\text{(Hessian-free)}

    for the gradient of :math:`F_i(w - a \nabla F_i(w))`, whose factor :math:`I - a \nabla^2 F_i(w)` is omitted
    or computed from two gradients. D and D' are the two halves of a batch (every other example; a batch of one is
    both). Running statistics and the loss are those of the first pass, so statistics are updated once.

    To predict, a client takes `steps` steps :math:`w \leftarrow w - a \nabla F_i(w)` with all its examples at
    once, normalized with running statistics, as predictions are.

    Args:
        rate: :math:`a`, at least 0; 0 is the plain gradient of whole batches, and no step before predicting.
        variant: without second derivatives, or with a difference of gradients in place of the Hessian.
        delta: :math:`\delta`, above 0: distance between the points of those gradients, in lengths of v. If a network
            has kinks (ReLU, max pooling), a small delta crosses few of them, and scales each by :math:`1 / \delta`.
        steps: plain gradient steps before predicting, at least 0.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      two gradients of half a batch per step instead of one of a whole batch; Hessian-free four. `steps`
        passes for each personal model.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> meta_gradient(0.01)
        meta_gradient(rate=0.01, variant='first_order', delta=0.01, steps=1)

    Reference: Fallah et al., Per-FedAvg, NeurIPS 2020.
    Differs:   the paper draws three batches, D, D' and D'' for the Hessian; here D'' is D, and D and D' are from
        one batch, so that a local epoch is still one pass over the examples. Public code takes the step before
        predicting on one batch. Momentum, decay and clipping are the run's and apply to d only.
    """
    require(rate >= 0 and delta > 0, f"meta_gradient: needs rate >= 0 and delta > 0, got {rate} and {delta}")
    require(steps >= 0, f"meta_gradient: steps must be at least 0, got {steps}")
    known = ("first_order", "hessian_free")
    require(variant in known, f"meta_gradient: variant is 'first_order' or 'hessian_free', not {variant!r}")
    exact = variant == "hessian_free"

    def gradient(grad: GradFn, local: Local) -> GradFn:
        def ahead(at: Tree, step: Step) -> Gradient:
            one, other = halves(step)
            here = grad(at, one)
            v = grad(axpy(-rate, here.gradient, at), other).gradient
            if not exact:
                return here._replace(gradient=v)
            up, down = (grad(axpy(side * delta, v, at), one).gradient for side in (1, -1))
            return here._replace(gradient=axpy(-rate / (2 * delta), up - down, v))

        return ahead if rate else grad

    def deploy(local: Local, weights: Tree) -> Tree:
        for _ in range(steps if rate else 0):
            weights = axpy(-rate, local.whole(weights).gradient, weights)
        return weights

    extra = (3 if exact else 1) if rate else 0
    return Part(gradient=gradient, deploy=deploy, gradients=extra, neutral={"rate": 0.0})
