"""Personal models that are a mixture of the shared model and a local model."""

from __future__ import annotations

import torch
from torch import nn

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, overlay, pick
from idiolect.core.types import GradFn, Gradient, Local, Step
from idiolect.parts.common.beside import attach_copy, begin_copy, copy_in, put_copy
from idiolect.parts.common.first import trained, untrained

NAME = "personal_mixture"
SHARE, DUE = f"{NAME}.share", f"{NAME}.due"


@part
def personal_mixture(share: float = 0.5, adaptive: bool = True) -> Part:
    r"""Predict with a mixture of the shared model and a local model, which is trained on the loss of the mixture.

    .. math::  \bar v = a\, v + (1 - a)\, w, \qquad  d_v = a\, \nabla F_i(\bar v), \qquad
               a \leftarrow \mathrm{clip}_{[0,1]}\big( a - \eta\, \langle v - w, \nabla F_i(\bar v) \rangle \big)

    while the training of w is unchanged. :math:`a` is updated once per round, on the first batch, when w is still the
    shared model. The client's local v is trained with the run's optimizer, in the same steps as w, and starts from the
    first received weights. The mixture for predictions uses the last received weights.

    Args:
        share: initial :math:`a`, in [0, 1]: weight of the local model.
        adaptive: learn :math:`a`; if False, it is constant.

    Memory:    v, statistics of the mixture, :math:`a`, and a flag that the client has trained.
    Sends:     nothing.       Receives: nothing.
    Cost:      one more gradient per step.
    Raises:    UsageError: if `share` is outside [0, 1].

    Example:
        >>> personal_mixture(0.75, adaptive=False)
        personal_mixture(share=0.75, adaptive=False)

    Reference: Deng et al., APFL, 2020.
    Differs:   the authors' code predicts with the mixture of the outputs of v and w; the paper, as here, mixes their
        weights. The code updates w before v, whose gradient then uses the new w; it scales the gradient of :math:`a`
        by :math:`a^2 + (1 - a)^2`, and decays :math:`a`. Other public code trains v on its own loss, or writes the
        mixture into v after each round. Clipping applies to w and v together.
    """
    require(0 <= share <= 1, f"personal_mixture: share must be in [0, 1], got {share}")

    def attach(module: nn.Module) -> None:
        if not hasattr(module, NAME):
            own = attach_copy(module, NAME, trains=True)
            one = own.get_buffer("statistics").new_ones(1)
            own.register_buffer("share", share * one, persistent=False)
            own.register_buffer("due", one, persistent=False)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        row = begin_copy(weights, NAME, local.structure, local.memory)
        return overlay(row, Tree(row.layout.only({DUE}), torch.ones_like(row[DUE]))), local.memory

    def mixture(row: Tree, local: Local) -> Tree:
        """Return a row whose model is the mixture, with the mixture's own statistics."""
        own, a = copy_in(row, NAME, local.structure), row[SHARE]
        v = pick(own, local.structure.names("weight"))
        return overlay(row, own, v * a + pick(row, v) * (1 - a))

    def gradient(grad: GradFn, local: Local) -> GradFn:
        def both(at: Tree, batch: Step) -> Gradient:
            here, there = grad(at, batch), grad(mixture(at, local), batch)
            own, a = copy_in(at, NAME, local.structure), at[SHARE]
            slope = pick(there.gradient, own)
            v = Tree(here.gradient.layout.only({f"{NAME}.weights"}), a * slope.flat)
            buffers = put_copy(here.buffers, NAME, pick(there.buffers, own))
            if adaptive:
                along = ((pick(own, slope) - pick(at, slope)) * slope).flat.sum(dim=-1, keepdim=True)
                learned = (a - at[DUE] * local.lr * along).clamp(0, 1)
                told = torch.cat([learned, torch.zeros_like(learned)], dim=-1)
                buffers = overlay(buffers, Tree(buffers.layout.only({SHARE, DUE}), told))
            return Gradient(overlay(here.gradient, v), buffers, here.loss)

        return both

    def finish(local: Local) -> tuple[Tree, Tree]:
        return trained(local.memory), Tree.of({})

    def deploy(local: Local, weights: Tree) -> Tree:
        return mixture(weights, local)

    return Part(
        attach=attach,
        memory=untrained,
        begin=begin,
        gradient=gradient,
        finish=finish,
        deploy=deploy,
        gradients=1,
    )
