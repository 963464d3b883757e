"""A growing mask of the values of a model that are personal."""

from __future__ import annotations

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, overlay, pick, where
from idiolect.core.types import Arrival, Central, Local, Setup, Update

MASK, BEFORE, COUNT = "mask", "before", "flag/participations"


@part
def grown_mask(growth: float = 0.25, limit: float = 0.8, every: int = 1) -> Part:
    r"""Make those values personal that training changes most, and train them before the shared values.

    .. math::  s_i = m_i \odot \varphi_i + (1 - m_i) \odot w^t, \qquad
               d = m_i \odot g \text{ in a first pass}, \qquad  d = (1 - m_i) \odot g \text{ in a second}

    .. math::  w^{t+1} = \frac{\sum_i (1 - m_i) \odot w_i^{t+}}{\sum_i (1 - m_i)}
               \text{, where nobody shares } w^t, \qquad
               m_i \leftarrow 1 \text{ for the largest } \lvert w_i^{t+} - a_i \rvert \text{ still shared}

    tensor by tensor: of G shared values all but :math:`(1 - p)\, G`, rounded, become personal. :math:`\varphi_i` are
    the client's values as last trained, :math:`a_i` those of the last growth step (initially the initial values), and
    :math:`m_i` is initially zero. A client also trains its personal values before it predicts; these values are not
    kept.

    Tensors with two or more axes have masks. Biases, scales and shifts stay shared, and so do running statistics,
    unless `share` excludes them.

    Args:
        growth: p in [0, 1]: share of the shared values that become personal at each growth step; 0 is averaging.
        limit: in [0, 1]: a tensor whose personal share exceeds it stops growing.
        every: participations of the client between growth steps, at least 1.

    Memory:    :math:`\varphi_i`, :math:`a_i`, :math:`m_i`, and participations since the last growth step.
    Sends:     :math:`m_i`. `share` also sends personal values; the server excludes them from the mean.
    Receives:  nothing.
    Cost:      twice the passes of local training once a client has personal values, and as many passes as local
        training for each personal model; one more value per weight up, although a mask needs one bit per value; on
        the server a second sum of these tensors.
    Raises:    UsageError: if an argument is out of range, or no tensor with two axes or more is exchanged.

    Example:
        >>> grown_mask()
        grown_mask(growth=0.25, limit=0.8, every=1)

    Reference: Tamirisa et al., FedSelect, CVPR 2024.
    Differs:   with several local epochs all passes over the personal values come first; the authors alternate. They
        test a model directly after its training. In their code values that have just been overwritten by the mean
        become personal, all tied values become personal, a value that no client shares becomes 0, scales of
        normalization also have masks, and growth depends on the number of the round. Weight decay changes the values
        that a pass holds only within that pass. A client without personal values has no first pass.
    """
    require(0 <= growth <= 1, f"grown_mask: growth must be in [0, 1], got {growth}")
    require(0 <= limit <= 1, f"grown_mask: limit must be in [0, 1], got {limit}")
    require(every >= 1, f"grown_mask: every must be at least 1, got {every}")

    def memory(setup: Setup) -> Tree:
        own = _masked(setup.structure, setup.shared)
        require(len(own) > 0, "grown_mask: no weight with two axes or more is exchanged: share some")
        mask = {f"{MASK}/{name}": torch.zeros_like(tensor) for name, tensor in own.items()}
        before = {f"{BEFORE}/{name}": tensor for name, tensor in own.items()}
        return Tree.of({**own, **mask, **before, COUNT: own.flat.new_zeros(1)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        own, mask = _masked(local.structure, local.memory), _part(local, MASK)
        personal = mask.flat > 0
        start = overlay(weights, where(personal, own, pick(weights, own)))
        if not personal.any():
            return start, local.memory

        def direct(direction: Tree, at: Tree) -> Tree:
            return pick(direction, mask) * mask

        end = local.train(start, direct=direct)
        end = overlay(end, where(personal, pick(end, own), pick(start, own)))
        return where(personal.any(dim=-1, keepdim=True), end, start), local.memory

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        near = pick(direction, _part(local, MASK))
        return overlay(direction, near * (1 - pick(_part(local, MASK), near).flat))

    def finish(local: Local) -> tuple[Tree, Tree]:
        mask, before = _part(local, MASK), _part(local, BEFORE)
        end = where(mask.flat > 0, pick(local.start, mask), pick(local.end, mask))
        count = local.memory[COUNT] + 1
        due = count >= every
        grown = where(due, _grown(mask, abs(end - before), growth, limit), mask)
        kept = [end.flat, grown.flat, where(due, end, before).flat, torch.where(due, 0.0, count)]
        return Tree(local.memory.layout, torch.cat(kept, dim=-1)), mask

    def contribute(central: Central, arrival: Arrival) -> tuple[Tree, Tree]:
        return pick(arrival.weights, arrival.own), arrival.own * -1.0 + 1.0

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(shared=overlay(central.new, mean))

    return Part(
        memory=memory,
        begin=begin,
        direction=direction,
        finish=finish,
        contribute=contribute,
        aggregate=aggregate,
        neutral={"growth": 0.0},
    )


def _masked(structure: ModelStructure, tree: Tree) -> Tree:
    """Return the tensors that have masks, as far as a tree holds them."""
    names = structure.names("weight") & structure.exchangeable
    return pick(tree, {n for n, shape in tree.layout.shape_of.items() if n in names and len(shape) > 1})


def _part(local: Local, which: str) -> Tree:
    """Return the mask, or another copy in the client's memory, under the names of the weights."""
    like = _masked(local.structure, local.memory).layout
    return Tree(like, pick(local.memory, {f"{which}/{name}" for name in like.names}).flat)


def _grown(mask: Tree, moved: Tree, growth: float, limit: float) -> Tree:
    """Return a mask in which a share of each tensor's zeros, where values changed most, are ones; ties by position."""
    return Tree(
        mask.layout,
        torch.cat([_grow(mask.stretch(name), moved.stretch(name), growth, limit) for name in mask], dim=-1),
    )


def _grow(mask: Tensor, moved: Tensor, growth: float, limit: float) -> Tensor:
    shared = (mask == 0).sum(dim=-1, keepdim=True)
    count = shared - ((1 - growth) * shared.double()).round()
    order = torch.where(mask > 0, -1.0, moved).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(mask.shape[-1], device=mask.device).expand_as(order)
    )
    grows = (mask.shape[-1] - shared <= limit * mask.shape[-1]) & (rank < count)
    return torch.where(grows, 1.0, mask)
