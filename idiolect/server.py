"""The server's round: a weighted mean per part, one client at a time, then each part's own step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from idiolect.client import Slots
from idiolect.errors import UsageError
from idiolect.method import Method
from idiolect.part import Part
from idiolect.tree import EMPTY, Layout, Tree
from idiolect.words import Arrival, Central


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


def server_round(
    method: Method, server: Slots, arrivals: Iterable[Arrival], central: Central, population: int
) -> Slots:
    """Aggregate one round's uploads into the next server slots. Nothing it is given is changed.

    Args:
        method: whose parts aggregate.
        server: the slots that were broadcast.
        arrivals: the cohort's uploads, consumed one by one, so that memory does not grow with the cohort.
        central: with `old` and `new` both the shared tensors before this round.
        population: number of clients there are.
    """
    means = {p.name: Mean() for p in method.parts}
    arrived = 0
    for arrived, arrival in enumerate(arrivals, 1):  # noqa: B007 - the count is used below
        for part in method.parts:
            equal = part.uniform or method.weighting == "uniform"
            tree = part.arrive(central, arrival) if part.arrive else arrival.uploads[part.name]
            means[part.name].add(tree, 1.0 if equal else float(arrival.examples))
    central = replace(central, participation=arrived / population)
    after: Slots = {}
    for part in method.parts:
        after[part.name] = _aggregate(part, central, server[part.name], means[part.name].result())
        central = replace(central, new=after["share"])
    return after


def _aggregate(part: Part, central: Central, slot: Tree, mean: Tree) -> Tree:
    after = part.aggregate(central, slot, mean)
    if after.layout is not slot.layout:
        raise ValueError(f"{part.name}: aggregate changed its slot from {slot} to {after}")
    return after
