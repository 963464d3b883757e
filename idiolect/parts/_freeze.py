"""Tensors that do not move in local training."""

from __future__ import annotations

from idiolect.core.part import Part, part
from idiolect.core.scope import Scope, head, nothing
from idiolect.core.tree import Tree, pick
from idiolect.core.types import Local


@part
def freeze(names: Scope = head) -> Part:
    r"""Keep the named tensors where they are during local training.

    .. math::  d = g \text{ without the named tensors}

    So neither the gradient moves them nor weight decay, and clipping does not count them. Running statistics are
    no part of a direction: they go on moving. What trains tensors by itself (`head_first`, `finetune`) may train
    these.

    Args:
        names: which tensors; `nothing` freezes none.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `names` means nothing in the model.

    Example:
        >>> freeze()
        freeze(names=head)

    Reference: Oh et al., FedBABU, ICLR 2022; Collins et al., FedRep, ICML 2021.
    Differs:   the authors of FedRep switch gradients off, under which an optimizer with momentum may still move
        a tensor; here it has no step at all. What perturbs weights (`sam`) perturbs frozen ones too.
    """

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pick(direction, frozenset(direction) - names(local.structure))

    return Part(direction=direction, neutral={"names": nothing})
