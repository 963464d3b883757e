"""The weighted mean over a cohort's uploads, computed one upload at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import EMPTY, Layout, Tree
from idiolect.core.types import Weight


class Mean:
    r"""A running weighted mean of trees, :math:`\sum_i q_i x_i / \sum_i q_i`, summed in float64.

    A weight is one number, or a tree of one number per value. Memory does not grow with the number of trees.

    Example:
        >>> mean = Mean()
        >>> mean.add(Tree.of({"w": torch.tensor([1.0, 5.0])}), 1)
        >>> mean.add(Tree.of({"w": torch.tensor([4.0, 7.0])}), 2, Tree.of({"w": torch.tensor([1.0, 0.0])}))
        >>> mean.result()["w"].tolist()
        [3.0, 5.0]
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight: float | Tensor = 0.0
        self._layout: Layout = EMPTY.layout
        self._dtype = torch.float32

    def add(self, tree: Tree, weight: float, count: Weight = 1.0) -> None:
        """Add one tree with the weight `weight` times `count`.

        Raises:
            ValueError: if the tree or the count has another form than those before, or a count is negative or not
                finite.
        """
        if self._sum is None:
            self._layout, self._dtype = tree.layout, tree.flat.dtype
            self._sum = torch.zeros_like(tree.flat, dtype=torch.float64)
        if tree.layout is not self._layout:
            raise ValueError(f"cannot average {tree} with {Tree(self._layout, self._sum)}")
        if isinstance(count, Tree):
            values = _checked(count, self._layout)
            self._sum.add_(tree.flat * values, alpha=weight)
            self._weight = self._weight + weight * values
            return
        factor = weight * float(count)
        if not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(f"a weight in a mean must be finite and at least 0, got {float(count)}")
        block = 2**15 if tree.flat.is_cpu else max(1, len(tree.flat))  # on a CPU the float64 copy stays in the cache
        for total, part in zip(torch.split(self._sum, block), torch.split(tree.flat, block), strict=True):
            total.add_(part, alpha=factor)
        self._weight = self._weight + factor

    def result(self, default: Callable[[Layout], Tree] | None = None) -> Tree:
        """Return the mean; a value whose weights are all zero is that of `default`, or 0."""
        if self._sum is None:
            raise UsageError("a round needs at least one client's upload")
        if not isinstance(self._weight, Tensor) and self._weight > 0:
            return Tree(self._layout, (self._sum / self._weight).to(self._dtype))
        weight = torch.as_tensor(self._weight, dtype=torch.float64, device=self._sum.device)
        mean = (self._sum / weight).to(self._dtype)
        kept = torch.zeros_like(mean) if default is None else default(self._layout).flat
        return Tree(self._layout, torch.where(weight > 0, mean, kept))


def _checked(count: Tree, like: Layout) -> Tensor:
    if count.layout is not like:
        raise ValueError(f"weights per value must have the names and shapes of what they weigh, got {count}")
    values = count.flat.double()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("weights per value must be finite and at least 0")
    return values
