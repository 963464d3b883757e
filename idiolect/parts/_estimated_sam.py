"""Sharpness-aware minimization with a perturbation that is estimated without a gradient."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, norm, overlay, pick
from idiolect.core.types import GradFn, Gradient, Local, Setup, Step
from idiolect.parts.common.ascent import EPSILON
from idiolect.parts.common.first import TRAINED, trained, untrained


@part
def estimated_sam(rho: float) -> Part:
    r"""Take the gradient at weights perturbed along the change of the shared model since the client last received it.

    .. math::  \delta_i = \rho\, \frac{w_i^{old} - w^t}{\lVert w_i^{old} - w^t \rVert + 10^{-7}}, \qquad
               \tilde g = \nabla F_i(w + \delta_i)

    with :math:`w_i^{old}` as received at the client's last participation. The perturbation is fixed for the round,
    and zero the first time. It covers trainable tensors that are exchanged, with the norm over all of them together;
    personal tensors are not perturbed.

    Args:
        rho: radius, at least 0; 0 is the plain gradient.

    Memory:    the exchanged weights as last received, and a flag that they exist.
    Sends:     nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `rho` is negative.

    Example:
        >>> estimated_sam(0.5)
        estimated_sam(rho=0.5)

    Reference: Fan et al., FedLESAM, ICML 2024.
    Differs:   the authors' code takes the last round's update for every client, shifts all values of a tensor by one
        of its entries, and divides by a sum of absolute values; this part follows the equations of the paper.
    """
    require(rho >= 0, f"estimated_sam: rho must be at least 0, got {rho}")

    def memory(setup: Setup) -> Tree:
        return Tree.of({**pick(setup.shared, setup.structure.names("weight")), **untrained(setup)})

    def gradient(grad: GradFn, local: Local) -> GradFn:
        old = pick(local.memory, local.shared)
        back = old - pick(local.shared, old)
        radius = rho * local.memory[TRAINED] / (norm(back) + EPSILON)

        def uphill(at: Tree, batch: Step) -> Gradient:
            return grad(axpy(radius, back, at), batch)

        return uphill if rho else grad

    def finish(local: Local) -> tuple[Tree, Tree]:
        return overlay(trained(local.memory), pick(local.shared, local.memory)), Tree.of({})

    return Part(memory=memory, gradient=gradient, finish=finish, neutral={"rho": 0.0})
