"""The server's round: a weighted mean per part, one client at a time, then each part's own step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.core.tree import EMPTY, Layout, Tree
from idiolect.core.types import Arrival, Central, Trees


class Mean:
    r"""A running weighted mean of trees, :math:`\sum_i q_i x_i / \sum_i q_i`, summed in float64.

    Memory does not grow with the number of trees.

    Example:
        >>> mean = Mean()
        >>> mean.add(Tree.of({"w": torch.tensor([1.0])}), 1)
        >>> mean.add(Tree.of({"w": torch.tensor([4.0])}), 2)
        >>> mean.result()["w"].item()
        3.0
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0
        self._layout: Layout = EMPTY.layout
        self._dtype = torch.float32

    def add(self, tree: Tree, weight: float) -> None:
        """Add one tree."""
        if self._sum is None:
            self._layout, self._dtype = tree.layout, tree.flat.dtype
            self._sum = torch.zeros_like(tree.flat, dtype=torch.float64)
        if tree.layout is not self._layout:
            raise ValueError(f"cannot average {tree} with {Tree(self._layout, self._sum)}")
        block = 2**15 if tree.flat.is_cpu else max(1, len(tree.flat))  # a CPU first copies it to float64: in the cache
        for total, values in zip(torch.split(self._sum, block), torch.split(tree.flat, block), strict=True):
            total.add_(values, alpha=weight)
        self._weight += weight

    def result(self) -> Tree:
        """Return the mean of what was added."""
        if self._sum is None:
            raise UsageError("a round needs at least one client's upload")
        return Tree(self._layout, (self._sum / self._weight).to(self._dtype))


def broadcast(method: Method, server: Trees) -> Trees:
    """Return what clients that train are sent."""
    shared, sent = server["share"], {}
    for part in method.parts:
        shared, sent[part.name] = part.broadcast(shared, server[part.name])
    return {**sent, "share": shared}


class Aggregated(NamedTuple):
    """What a round leaves on the server."""

    server: Trees
    """One slot per part."""
    mail: list[Trees]
    """What each client of the round is told alone, by part, in the order of arrival; for parts that confer."""


def server_round(
    method: Method, server: Trees, arrivals: Iterable[Arrival], central: Central, population: int
) -> Aggregated:
    """Aggregate one round's uploads into the next server slots. Nothing it is given is changed.

    Args:
        method: whose parts aggregate.
        server: the slots of the server.
        arrivals: the cohort's uploads, consumed one by one, so that memory does not grow with the cohort unless a
            part confers.
        central: with `old` and `new` both the shared tensors as clients received them.
        population: number of clients there are.
    """
    means = {p.name: Mean() for p in method.parts if not p.confer}
    letters: dict[str, list[Tree]] = {p.name: [] for p in method.parts if p.confer}
    arrived = 0
    for arrived, arrival in enumerate(arrivals, 1):  # noqa: B007 - the count is used below
        for part in method.parts:
            tree = part.arrive(central, arrival) if part.arrive else arrival.uploads[part.name]
            if not isinstance(tree, Tree):
                raise TypeError(f"{part.name}: arrive and finish give a Tree to send, not {type(tree).__name__}")
            if part.confer:
                letters[part.name].append(tree.clone())  # what arrived may lie in memory that is used again
            else:
                equal = part.uniform or method.weighting == "uniform"
                means[part.name].add(tree, 1.0 if equal else float(arrival.examples))
    central = replace(central, participation=arrived / population, arrived=arrived)
    after: Trees = {}
    mail: list[Trees] = [{} for _ in range(arrived)]
    for part in method.parts:
        if part.confer:
            after[part.name] = server[part.name]
            for client, tree in zip(mail, _conferred(part, central, letters[part.name]), strict=True):
                client |= {part.name: tree} if len(tree) else {}
        else:
            after[part.name] = _aggregate(part, central, server[part.name], means[part.name].result())
        if part.name == "share":
            central = replace(central, new=after["share"])
        moved = part.advance(central, after[part.name])
        central = replace(central, new=same_layout(part, "the shared tensors", server["share"], moved))
    return Aggregated({**after, "share": central.new}, mail)


def _conferred(part: Part, central: Central, letters: list[Tree]) -> list[Tree]:
    """Return what a part tells each client; a tree without tensors is no message."""
    assert part.confer
    told = part.confer(central, Tree(letters[0].layout, torch.stack([tree.flat for tree in letters])))
    if not len(told):
        return [EMPTY] * len(letters)
    if told.flat.shape[:-1] != (len(letters),):
        raise ValueError(f"{part.name}: told {tuple(told.flat.shape[:-1])} clients something, not {len(letters)}")
    return [Tree(told.layout, row) for row in told.flat]


def _aggregate(part: Part, central: Central, slot: Tree, mean: Tree) -> Tree:
    return same_layout(part, "slot", slot, part.aggregate(central, slot, mean))


def same_layout(part: Part, what: str, before: Tree, after: Tree) -> Tree:
    """Return what a part made in place of something; names, shapes and dtype must be as they were."""
    if not isinstance(after, Tree):
        raise TypeError(f"{part.name}: a hook on the server must return a Tree, not {type(after).__name__}")
    if after.layout is not before.layout or after.flat.dtype != before.flat.dtype:
        raise ValueError(f"{part.name}: changed {what} from {_form(before)} to {_form(after)}")
    return after


def _form(tree: Tree) -> str:
    return f"{tree} of {tree.flat.dtype}"
