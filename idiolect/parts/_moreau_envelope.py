"""Personal models from the Moreau envelope of the loss."""

from __future__ import annotations

from torch import nn

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, overlay, pick
from idiolect.core.types import GradFn, Gradient, Local, Step
from idiolect.parts.common.beside import attach_copy, begin_copy, copied, copy_in, put_copy
from idiolect.parts.common.first import trained, untrained

NAME = "moreau_envelope"


@part
def moreau_envelope(strength: float = 15.0, steps: int = 5, lr: float = 0.05) -> Part:
    r"""Minimize the Moreau envelope of the loss; its inner minimizer is the client's personal model.

    .. math::  \theta_i \approx \operatorname{argmin}_\theta F_i(\theta)
                   + \tfrac{\lambda}{2} \lVert \theta - w \rVert^2, \qquad
               d = \lambda\, (w - \theta_i)

    On each batch :math:`\theta` continues from the last batch, with several steps

    .. math::  \theta \leftarrow \theta - \eta_p \big( g_i(\theta) + \lambda\, (\theta - w) \big)

    The client predicts with :math:`\theta_i`, which starts from the first received weights. The run's learning rate
    times :math:`\lambda` should stay below 1, and so should :math:`\eta_p \lambda`.

    Args:
        strength: :math:`\lambda`, above 0: strength of the pull of the personal model toward the weights.
        steps: steps of :math:`\theta` on each batch, at least 1.
        lr: :math:`\eta_p`, learning rate of those steps, at least 0.

    Memory:    :math:`\theta_i` with its own statistics, and a flag that the client has trained.
    Sends:     nothing.       Receives: nothing.
    Cost:      `steps` gradients per step instead of one.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> moreau_envelope(steps=3)
        moreau_envelope(strength=15.0, steps=3, lr=0.05)

    Reference: Dinh et al., pFedMe, NeurIPS 2020.
    Differs:   in the authors' code all clients train in every round, and :math:`\theta` starts from the received
        weights each time, with weight decay; here it continues from the client's last round. Statistics are those of
        :math:`\theta`, from the first pass over each batch.
    """
    require(strength > 0 and lr >= 0, f"moreau_envelope: needs strength > 0 and lr >= 0, got {strength}, {lr}")
    require(steps >= 1, f"moreau_envelope: steps must be at least 1, got {steps}")

    def attach(module: nn.Module) -> None:
        if not hasattr(module, NAME):
            attach_copy(module, NAME, trains=False)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        return begin_copy(weights, NAME, local.structure, local.memory), local.memory

    def gradient(grad: GradFn, local: Local) -> GradFn:
        moving = copied(local.structure).only(local.structure.names("weight")).starts

        def toward(at: Tree, batch: Step) -> Gradient:
            own, center = copy_in(at, NAME, local.structure), pick(at, moving)
            first: Gradient | None = None
            for _ in range(steps):
                out = grad(overlay(at, own), batch)
                first = first or out
                slope = pick(out.gradient, moving) + strength * (pick(own, moving) - center)
                own = axpy(-lr, slope, own)
            assert first
            own = overlay(own, pick(first.buffers, own))
            pull = strength * (center - pick(own, moving))
            return Gradient(overlay(first.gradient, pull), put_copy(first.buffers, NAME, own), first.loss)

        return toward

    def finish(local: Local) -> tuple[Tree, Tree]:
        return trained(local.memory), Tree.of({})

    def deploy(local: Local, weights: Tree) -> Tree:
        return overlay(weights, copy_in(weights, NAME, local.structure))

    return Part(
        attach=attach,
        memory=untrained,
        begin=begin,
        gradient=gradient,
        finish=finish,
        deploy=deploy,
        gradients=steps - 1,
    )
