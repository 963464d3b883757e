"""A learned start of local training between the received model and the client's last model."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Names, Scope, head
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, combine, overlay, pick, where
from idiolect.core.types import Local, Setup


@part
def adaptive_mix(names: Scope = head, share: float = 0.8, lr: float = 1.0, first_epochs: int = 10) -> Part:
    r"""Start local training from an elementwise weighted mix of the client's last model and the received one.

    .. math::  s_i = w_i^{old} + (w^t - w_i^{old}) \odot M_i, \qquad
               M_i \leftarrow \mathrm{clip}_{[0,1]}\big( M_i - \eta_M\, \nabla L_i(s_i) \odot (w^t - w_i^{old}) \big)

    on the named tensors; the others start from the received values. :math:`M_i` is learned on a share of the
    client's batches before local training, with frozen statistics, and is kept. The client predicts with
    :math:`s_i`.

    Args:
        names: weights that are mixed; the paper mixes the last layer.
        share: share of one pass on which the mask is learned, in (0, 1].
        lr: step size :math:`\eta_M` of the mask, at least 0; 0 leaves it at ones, which means no mixing.
        first_epochs: passes over that share the first time, at least 1; later there is one pass.

    Memory:    the named tensors as last trained, and their mask.       Sends: nothing.       Receives: nothing.
    Cost:      `share` of a pass more gradients per round.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> adaptive_mix()
        adaptive_mix(names=head, share=0.8, lr=1.0, first_epochs=10)

    Reference: Zhang et al., FedALA, AAAI 2023.
    Differs:   the first time the authors continue until the last losses vary little, which may never happen; here
        the number of passes is fixed. The batches are the first in the round's order instead of a window of the
        list. Only clients that take part change their state; the authors mix for every client in every round.
    """
    require(0 < share <= 1, f"adaptive_mix: share must be in (0, 1], got {share}")
    require(
        lr >= 0 and first_epochs >= 1, f"adaptive_mix: needs lr >= 0 and first_epochs >= 1, got {lr}, {first_epochs}"
    )

    def mixed_names(structure: ModelStructure) -> Names:
        return names(structure) & structure.names("weight")

    def memory(setup: Setup) -> Tree:
        own = pick(setup.weights, mixed_names(setup.structure))
        mask = {f"mask/{n}": torch.ones_like(t) for n, t in own.items()}
        return Tree.of({**own, **mask, "flag/trained": own.flat.new_zeros(1), "flag/mixed": own.flat.new_zeros(1)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        old = pick(local.memory, mixed_names(local.structure))
        gap = pick(weights, old) - old
        mask = Tree(old.layout, pick(local.memory, {f"mask/{n}" for n in old}).flat)
        trained, mixed = local.memory["flag/trained"], local.memory["flag/mixed"]
        used = share * local.stream.batches
        for epoch in range(first_epochs):
            for k, batch in enumerate(local.stream.epochs(1)):
                due = (trained > 0) & (k < used) & (mixed == 0 if epoch else True)
                if not due.any():
                    break
                at = overlay(weights, old + gap * mask)
                slope = pick(local.grad(at, batch._replace(frozen=True)).gradient, old) * gap
                learned = Tree(mask.layout, (mask - lr * slope).flat.clamp(0, 1))
                mask = where(due, learned, mask)
        mixed_in = overlay(weights, where(trained > 0, old + gap * mask, pick(weights, old)))
        flags = Tree(local.memory.layout.only({"flag/trained", "flag/mixed"}), torch.cat([trained, trained], dim=-1))
        masks = Tree(local.memory.layout.only({f"mask/{n}" for n in old}), mask.flat)
        return mixed_in, combine(local.memory.layout, old, masks, flags)

    def finish(local: Local) -> tuple[Tree, Tree]:
        own = pick(local.end, mixed_names(local.structure))
        trained = Tree(local.memory.layout.only({"flag/trained"}), torch.ones_like(local.memory["flag/trained"]))
        return overlay(local.memory, own, trained), Tree.of({})

    return Part(memory=memory, begin=begin, finish=finish, neutral={"lr": 0.0})
