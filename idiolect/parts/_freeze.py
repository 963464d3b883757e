"""Tensors that are frozen in local training."""

from __future__ import annotations

from idiolect.core.part import Part, part
from idiolect.core.scope import Scope, head, nothing
from idiolect.core.tree import Tree, pick
from idiolect.core.types import Local


@part
def freeze(names: Scope = head) -> Part:
    r"""Freeze the named tensors during local training.

    .. math::  d = g \text{ without the named tensors}

    The gradient and weight decay do not change them, and the norm for clipping excludes them. Running statistics are
    not part of a direction: they are still updated. Parts with their own training (`head_first`, `finetune`) may
    train frozen tensors.

    Args:
        names: tensors to freeze; `nothing` freezes none.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `names` means nothing in the model.

    Example:
        >>> freeze()
        freeze(names=head)

    Reference: Oh et al., FedBABU, ICLR 2022; Collins et al., FedRep, ICML 2021.
    Differs:   the authors of FedRep turn off gradients, with which an optimizer with momentum may still change a
        tensor; here the tensor takes no step. Parts that perturb weights (`sam`) also perturb frozen ones.
    """

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pick(direction, frozenset(direction) - names(local.structure))

    return Part(direction=direction, neutral={"names": nothing})
