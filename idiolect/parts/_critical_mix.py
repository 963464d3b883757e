"""A mix of critical values over clients with overlapping sets of critical values."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Layout, Tree, layout, overlay, pick, where
from idiolect.core.types import Arrival, Central, Local, Setup, Update


@part
def critical_mix(top: float = 0.5, rounds: int = 100) -> Part:
    r"""Start critical values from the mean over clients with overlapping critical values, the others from shared ones.

    .. math::  c_i = \lvert (w_i^{t+} - s_i) \odot w_i^{t+} \rvert, \qquad
               M_i = \text{the top values of } c_i \text{, tensor by tensor}, \qquad
               O_{ij} = 1 - \frac{\lVert M_i - M_j \rVert_1}{2\, \lVert M_i \rVert_1}

    .. math::  \bar w_i = \text{mean over } \{i\} \cup \{ j :
                   O_{ij} \geq \bar O + \tfrac{t+1}{\beta} (\max O - \bar O) \}, \qquad
               s_i = M_i \odot \bar w_i + (1 - M_i) \odot w^t

    :math:`\bar O` and the maximum are over pairs of the round's clients. The threshold rises: after :math:`\beta`
    rounds it exceeds every overlap, and critical values are no longer mixed. The client predicts with :math:`s_i`.

    Args:
        top: share of each tensor's values that are critical, in [0, 1], rounded down; 0 is no mixing.
        rounds: :math:`\beta`, at least 1: rounds until a client has no other partners.

    Memory:    :math:`M_i`, a value per exchanged weight.
    Sends:     :math:`M_i`.      Receives: :math:`\bar w_i`, specific to this client.
    Cost:      bytes double, both ways, although a mask needs one bit per value; no extra gradient.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> critical_mix()
        critical_mix(top=0.5, rounds=100)

    Reference: Wu et al., FedCAC, ICCV 2023.
    Differs:   all clients take part in the paper; here overlaps are between those of a round, and a client keeps its
        mask and mean until it takes part again. An unchanged value is never critical. Statistics are shared.
    """
    require(0 <= top <= 1, f"critical_mix: top must be in [0, 1], got {top}")
    require(rounds >= 1, f"critical_mix: rounds must be at least 1, got {rounds}")

    def rows(setup: Setup) -> Tree:
        return pick(setup.shared, setup.structure.names("weight"))

    def memory(setup: Setup) -> Tree:
        return 0.0 * rows(setup)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        mixed = where(local.memory.flat > 0, local.message, pick(weights, local.memory))
        return overlay(weights, mixed), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        end = pick(local.end, local.memory)
        mask = _largest(abs((end - pick(local.start, local.memory)) * end), top)
        return mask, mask

    def contribute(central: Central, arrival: Arrival) -> Tree:
        mask = arrival.own
        return Tree(_twice(mask.layout), torch.cat([pick(arrival.weights, mask).flat, mask.flat]))

    def aggregate(central: Central, uploads: Tree) -> Update:
        models, masks = uploads.flat.chunk(2, dim=-1)
        partners = _partners(masks, (central.round + 1) / rounds).to(models.dtype)
        mean = partners / partners.sum(dim=1, keepdim=True) @ models
        return Update(rows=Tree(central.rows.layout, mean))

    return Part(
        memory=memory,
        rows=rows,
        begin=begin,
        finish=finish,
        contribute=contribute,
        aggregate=aggregate,
        individual=True,
        neutral={"top": 0.0},
    )


def _largest(values: Tree, share: float) -> Tree:
    """Return ones where a value is above 0 and in the largest share of its tensor, else zeros."""
    masks = []
    for name, size in zip(values, values.layout.sizes, strict=True):
        own, count = values.stretch(name), int(share * size)
        least = own.topk(count).values[..., -1:] if count else torch.inf
        masks.append((own >= least) & (own > 0))
    return Tree(values.layout, torch.cat(masks, dim=-1).to(values.flat.dtype))


def _partners(masks: torch.Tensor, bar: float) -> torch.Tensor:
    """Return, for each client (a row), its partners; `bar` places the threshold between mean and largest overlap."""
    common = masks @ masks.T
    count = common.diagonal()
    overlap = 1 - (count + count[:, None] - 2 * common) / (2 * count[:, None].clamp(min=1))
    same = torch.eye(len(masks), dtype=torch.bool, device=masks.device)
    if len(masks) == 1:
        return same
    above = overlap - overlap[~same].mean()
    return (above >= bar * above[~same].max()) | same


def _twice(one: Layout) -> Layout:
    """Return the layout of weights followed by their masks."""
    return layout((*one.names, *(f"mask/{name}" for name in one.names)), one.shapes * 2)
