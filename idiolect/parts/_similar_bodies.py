"""A mix of the bodies of clients whose heads are similar."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import EMPTY, Tree, combine, overlay, pick, where
from idiolect.core.types import Arrival, Central, Local, Setup, Update
from idiolect.parts.common.classes import classifier

_ALIKE = 0.9999
"""The largest similarity, also of a client with itself, so that all weights are finite."""


@part
def similar_bodies(warmup: int = 10, names: Scope = head) -> Part:
    r"""Mix the bodies of clients whose heads are similar, after some rounds of averaging; keep each client's head.

    .. math::  \sigma_{ij} = \max\Big(0, \frac{1}{C} \sum_c \cos(h_{ic}, h_{jc})\Big) \text{, at most } 0.9999
               \text{, which is } \sigma_{ii}, \qquad
               a_{ij} = \frac{-\log(1 - \sigma_{ij})}{\sum_k -\log(1 - \sigma_{ik})}, \qquad
               u_i = \sum_j a_{ij}\, u_j

    over the clients of a round, where :math:`h_{ic}` is the row of the head's matrix for class c, and the body
    :math:`u` is all exchanged tensors except the head, with statistics. A client's first start after the warm-up
    is the shared model.

    Args:
        warmup: rounds of plain exchange, at least 0. The authors take half of all rounds.
        names: the head: the tensors of one layer.

    Memory:    the head as last trained.
    Sends:     nothing besides the exchange.      Receives: a body specific to this client, after the warm-up.
    Cost:      bytes down nearly double after the warm-up; no extra gradient.
    Raises:    UsageError: if `warmup` is negative, or the head is not one layer, with a matrix, that is exchanged.

    Example:
        >>> similar_bodies(warmup=50)
        similar_bodies(warmup=50, names=head)

    Reference: Tan et al., pFedSim, 2023.
    Differs:   a body is mixed from the clients of the round in which its client last took part. The public code keeps
        all models and all similarities between clients that were ever sampled together, and mixes again before
        training. It does not bound the similarity of two clients, which gives an infinite weight at 1. Here the
        shared model is still averaged after the warm-up, for clients that join late.
    """
    require(warmup >= 0, f"similar_bodies: warmup must be at least 0, got {warmup}")

    def rows(setup: Setup) -> Tree:
        return pick(setup.shared, frozenset(setup.shared) - names(setup.structure))

    def memory(setup: Setup) -> Tree:
        require(
            names(setup.structure) <= set(setup.shared), f"similar_bodies: compares {names}, which is not exchanged"
        )
        classifier(names, setup.structure)
        own = pick(setup.weights, names(setup.structure))
        return Tree.of({**own, "flag/told": own.flat.new_zeros(1)})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        mixed = overlay(weights, local.message, pick(local.memory, names(local.structure)))
        return where(local.memory["flag/told"] > 0, mixed, weights), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        told = pick(local.memory, {"flag/told"})
        if local.round >= warmup:
            told = Tree(told.layout, torch.ones_like(told.flat))
        return combine(local.memory.layout, pick(local.end, names(local.structure)), told), EMPTY

    def contribute(central: Central, arrival: Arrival) -> Tree:
        return arrival.weights

    def aggregate(central: Central, uploads: Tree) -> Update:
        if central.round < warmup:
            return Update()
        heads = central.structure.first_name(classifier(names, central.structure).tensor("weight"))
        rows = F.normalize(uploads[heads], dim=-1)
        alike = torch.einsum("icd,jcd->ij", rows, rows) / rows.shape[1]
        alike = alike.clamp(0, _ALIKE).fill_diagonal_(_ALIKE)
        shares = -torch.log1p(-alike)
        bodies = pick(uploads, frozenset(uploads) - names(central.structure))
        return Update(rows=Tree(bodies.layout, shares / shares.sum(dim=1, keepdim=True) @ bodies.flat))

    return Part(
        memory=memory,
        rows=rows,
        begin=begin,
        finish=finish,
        contribute=contribute,
        aggregate=aggregate,
        individual=True,
        neutral={"warmup": 2**31},
    )
