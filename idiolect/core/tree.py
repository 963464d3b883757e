"""Trees: named tensors in one flat row, and the operations that methods are written with.

A model's weights, a client's memory and an upload are each a `Tree`. Its tensors are views of one buffer, so an
operation on a tree is one kernel, whatever the number of tensors. A row may have leading axes: a stack of clients.
Arithmetic then broadcasts, and reductions run along the last axis only, so the same lines serve one client and many.
Nothing here changes its inputs, except `step_`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Names and shapes of the tensors in a row, in order; equal layouts are one object (see `layout`)."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    @cached_property
    def starts(self) -> dict[str, int]:
        """First position of each tensor in the row."""
        return dict(zip(self.names, accumulate(self.sizes, initial=0), strict=False))

    @cached_property
    def shape_of(self) -> dict[str, torch.Size]:
        """Shape by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    @cached_property
    def total(self) -> int:
        """Number of values in the row."""
        return sum(self.sizes)

    def only(self, names: Container[str]) -> Layout:
        """Return the layout of the named tensors, in this layout's order."""
        kept = [(n, s) for n, s in self.shape_of.items() if n in names]
        return layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to copy or unpickle it: `layout` gives the one object of that process."""
        return layout, (self.names, self.shapes)


@lru_cache(maxsize=4096)
def layout(names: tuple[str, ...], shapes: tuple[torch.Size, ...]) -> Layout:
    """Return the one `Layout` of these names and shapes."""
    return Layout(names, shapes)


class Tree(Mapping[str, Tensor]):
    """Named tensors of one floating dtype, stored as views of a flat row.

    Args:
        layout: names and shapes.
        flat: ``(..., layout.total)`` values; leading axes, if any, are those of a stack.

    Example:
        >>> tree = Tree.of({"w": torch.ones(2, 2), "b": torch.zeros(2)})
        >>> (2 * tree + tree)["w"].sum().item(), list(tree)
        (12.0, ['w', 'b'])
    """

    __slots__ = ("_tensors", "flat", "layout")

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self._tensors: tuple[Tensor, ...] | None = None

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Tree:
        """Return a tree of named tensors, which are copied into one row; they must have one dtype and one device."""
        if isinstance(tensors, Tree):
            return tensors
        dtypes = {t.dtype for t in tensors.values()}
        if len(dtypes) > 1:
            raise TypeError(f"a tree has one dtype, got {sorted(map(str, dtypes))} in {list(tensors)[:4]}")
        where = layout(tuple(tensors), tuple(t.shape for t in tensors.values()))
        rows = [t.reshape(-1) for t in tensors.values()]
        return Tree(where, torch.cat(rows) if rows else torch.zeros(0))

    def __getitem__(self, name: str) -> Tensor:
        return self.stretch(name).view(self.flat.shape[:-1] + self.layout.shape_of[name])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in order; the views are made once, and stay valid while the row changes in place."""
        if self._tensors is None:
            pieces: tuple[Tensor, ...] = self.flat.split_with_sizes(self.layout.sizes, -1)
            lead, shapes = self.flat.shape[:-1], self.layout.shapes
            self._tensors = tuple(p if len(s) == 1 else p.view(lead + s) for p, s in zip(pieces, shapes, strict=True))
        return self._tensors

    def stretch(self, name: str) -> Tensor:
        """Return the values of a tensor as ``(..., size)``, so that reductions run along the last axis."""
        return self.flat.narrow(-1, self.layout.starts[name], self.layout.shape_of[name].numel())

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to copy or unpickle it: the row, without its views."""
        return Tree, (self.layout, self.flat)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.starts

    def __repr__(self) -> str:
        return f"Tree({', '.join(f'{n} {tuple(s)}' for n, s in self.layout.shape_of.items())})"

    @property
    def nbytes(self) -> int:
        """Bytes of the row, and so of sending it."""
        return self.flat.numel() * self.flat.element_size()

    def clone(self) -> Tree:
        """Return a copy that shares no storage."""
        return Tree(self.layout, self.flat.clone())

    def _other(self, other: Tree | Tensor | float) -> Tensor | float:
        if not isinstance(other, Tree):
            return other
        if other.layout is not self.layout:
            odd = sorted(set(self.layout.names) ^ set(other.layout.names))[:4]
            raise ValueError(f"trees differ in {odd or 'shapes or order'}: pick the names they share first")
        return other.flat

    def __add__(self, other: Tree | Tensor | float) -> Tree:
        return Tree(self.layout, self.flat + self._other(other))

    def __sub__(self, other: Tree | Tensor | float) -> Tree:
        return Tree(self.layout, self.flat - self._other(other))

    def __mul__(self, other: Tree | Tensor | float) -> Tree:
        return Tree(self.layout, self.flat * self._other(other))

    def __truediv__(self, other: Tree | Tensor | float) -> Tree:
        return Tree(self.layout, self.flat / self._other(other))

    __radd__ = __add__
    __rmul__ = __mul__

    def __abs__(self) -> Tree:
        return Tree(self.layout, self.flat.abs())


EMPTY = Tree.of({})


def vectors(**named: Tensor) -> Tree:
    """Return a tree of vectors, each ``(..., n)`` with its own n; leading axes broadcast.

    Example:
        >>> vectors(a=torch.zeros(2), b=torch.ones(3, 1))["a"].shape
        torch.Size([3, 2])
    """
    where = layout(tuple(named), tuple(vector.shape[-1:] for vector in named.values()))
    return Tree(where, _join(list(named.values())))


@lru_cache(maxsize=4096)
def _plan(target: Layout, sources: tuple[Layout, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return runs (source, start, length) that fill `target`; a name is taken from the last source that has it."""
    runs: list[tuple[int, int, int]] = []
    for name, shape in target.shape_of.items():
        owner = next((i for i in reversed(range(len(sources))) if name in sources[i].starts), None)
        if owner is None:
            raise KeyError(f"no tensor named {name!r} among {[s.names for s in sources]}")
        if sources[owner].shape_of[name] != shape:
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(sources[owner].shape_of[name])}")
        start, size = sources[owner].starts[name], shape.numel()
        if runs and runs[-1][0] == owner and runs[-1][1] + runs[-1][2] == start:
            runs[-1] = (owner, runs[-1][1], runs[-1][2] + size)
        else:
            runs.append((owner, start, size))
    return tuple(runs)


@lru_cache(maxsize=4096)
def _places(part: Layout, whole: Layout) -> tuple[tuple[int, int, int], ...]:
    """Return runs (start in `part`, start in `whole`, length) that map the tensors of `part` to those of `whole`."""
    runs: list[tuple[int, int, int]] = []
    for name, shape in part.shape_of.items():
        if whole.shape_of.get(name) != shape:
            expected = tuple(whole.shape_of[name]) if name in whole.starts else "no such tensor"
            raise KeyError(f"{name} {tuple(shape)} has no place in the tree: {expected}")
        start, place, size = part.starts[name], whole.starts[name], shape.numel()
        if runs and runs[-1][0] + runs[-1][2] == start and runs[-1][1] + runs[-1][2] == place:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + size)
        else:
            runs.append((start, place, size))
    return tuple(runs)


def combine(target: Layout, *trees: Tree) -> Tree:
    """Return a tree of this layout, filled from trees; a name is taken from the last tree that has it.

    The result is a view, not a copy, where its values are one run of one tree.
    """
    plan = _plan(target, tuple(t.layout for t in trees))
    pieces = [trees[i].flat.narrow(-1, start, size) for i, start, size in plan]
    if not pieces:
        return Tree(target, trees[0].flat.narrow(-1, 0, 0))
    return Tree(target, pieces[0] if len(pieces) == 1 else _join(pieces))


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """Return rows joined along the last axis; leading axes broadcast."""
    lead = _lead(pieces)
    return torch.cat([piece if piece.shape[:-1] == lead else piece.expand(*lead, -1) for piece in pieces], dim=-1)


def _lead(rows: Iterable[Tensor]) -> torch.Size:
    """Return the broadcast leading axes of rows."""
    axes = {row.shape[:-1] for row in rows}
    return axes.pop() if len(axes) == 1 else torch.broadcast_shapes(*axes)  # type: ignore[no-untyped-call]


def pick(tree: Tree, names: Container[str]) -> Tree:
    """Return the named tensors of a tree, in its order; names that it does not have are ignored."""
    where = _common(tree.layout, names.layout) if isinstance(names, Tree) else tree.layout.only(names)
    return tree if where is tree.layout else combine(where, tree)


@lru_cache(maxsize=4096)
def _common(one: Layout, other: Layout) -> Layout:
    return one.only(other.starts)


def overlay(base: Tree, *tops: Tree) -> Tree:
    """Return `base` with the tensors of `tops` in place of its own; `base` must have all their names.

    Example:
        >>> base = Tree.of({"a": torch.zeros(2), "b": torch.zeros(1)})
        >>> overlay(base, Tree.of({"b": torch.ones(1)})).flat.tolist()
        [0.0, 0.0, 1.0]
    """
    for top in tops:
        _places(top.layout, base.layout)  # raises if a name or shape differs
    return rounded(combine(base.layout, base, *tops), base)


def axpy(a: Tensor | float, x: Tree, y: Tree) -> Tree:
    r"""Return :math:`y + a x` on the names of `x`, and the other tensors of `y`.

    Example:
        >>> y = Tree.of({"w": torch.ones(2), "mean": torch.ones(1)})
        >>> axpy(-0.5, Tree.of({"w": torch.ones(2)}), y).flat.tolist()
        [0.5, 0.5, 1.0]
    """
    return step(y, a, x)


def step(y: Tree, a: Tensor | float, x: Tree, *tops: Tree) -> Tree:
    """Return ``overlay(axpy(a, x, y), *tops)`` in one pass: an optimizer's step, and new statistics."""
    if x.layout is y.layout and not tops:
        moved = y.flat.addcmul(x.flat, a) if isinstance(a, Tensor) else y.flat.add(x.flat, alpha=a)
        return Tree(y.layout, moved.to(y.flat.dtype))
    after = _own(y, x, *tops)
    step_(after, a, x, *tops)
    return after


def _own(tree: Tree, *others: Tree) -> Tree:
    """Return a copy of a tree with the broadcast leading axes of all these trees."""
    lead = _lead(t.flat for t in (tree, *others) if len(t))
    flat = tree.flat if tree.flat.shape[:-1] == lead else tree.flat.expand(*lead, -1)
    return Tree(tree.layout, flat.clone())


def step_(y: Tree, a: Tensor | float, x: Tree, *tops: Tree) -> None:
    """Do the same as `step`, in place on `y`."""
    for new, old in _meetings(x, y):
        old.addcmul_(new, a) if isinstance(a, Tensor) else old.add_(new, alpha=a)
    for top in tops:
        for new, old in _meetings(top, y):
            old.copy_(new)


def _meetings(part: Tree, whole: Tree) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of views: a run of `part`, and the same values in `whole`."""
    for start, place, size in _places(part.layout, whole.layout):
        yield _run(part.flat, start, size), _run(whole.flat, place, size)


def _run(flat: Tensor, start: int, size: int) -> Tensor:
    return flat if size == flat.shape[-1] else flat.narrow(-1, start, size)


def mix(share: float, x: Tree, y: Tree) -> Tree:
    r"""Return :math:`s\,x + (1 - s)\,y` on the names of `y`, and the other tensors of `x`.

    Example:
        >>> x = Tree.of({"w": torch.ones(2), "own": torch.ones(1)})
        >>> mix(0.25, x, Tree.of({"w": torch.zeros(2)})).flat.tolist()
        [0.25, 0.25, 1.0]
    """
    if x.layout is y.layout:
        return Tree(x.layout, torch.lerp(y.flat, x.flat, share))
    after = _own(x, y)
    for new, old in _meetings(y, after):
        old.lerp_(new, 1 - share)
    return after


def stacked(tree: Tree, lead: torch.Size) -> Tree:
    """Return a view of a tree with these leading axes; a tree without them is repeated."""
    return Tree(tree.layout, tree.flat.expand(*lead, -1))


def zeros_like(tree: Tree) -> Tree:
    """Return a tree of zeros with the same names."""
    return Tree(tree.layout, torch.zeros_like(tree.flat))


_NARROW = (torch.float16, torch.bfloat16)


def counting(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and counts of values: float32 for bfloat16, which counts to 256, and for float16."""
    return torch.float32 if dtype in _NARROW else dtype


def wide(tree: Tree) -> Tree:
    """Return a tree in float32 if it is in bfloat16 or float16, else the tree: for sums, moments and small constants.

    Example:
        >>> half, double = (Tree.of({"w": torch.ones(1, dtype=t)}) for t in (torch.float16, torch.float64))
        >>> wide(half).flat.dtype, wide(double) is double
        (torch.float32, True)
    """
    return Tree(tree.layout, tree.flat.float()) if tree.flat.dtype in _NARROW else tree


def rounded(tree: Tree, like: Tree) -> Tree:
    """Return a tree in bfloat16 or float16 if `like` is: what is computed `wide` goes back into what it came from."""
    dtype = like.flat.dtype
    return Tree(tree.layout, tree.flat.to(dtype)) if dtype in _NARROW and tree.flat.dtype != dtype else tree


def norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm of all values together, `wide`, shape ``(1,)``, or ``(..., 1)`` for a stack."""
    found: Tensor = torch.linalg.vector_norm(wide(tree).flat, dim=-1, keepdim=True)
    return found


def clip(tree: Tree, largest: float) -> Tree:
    r"""Return a tree scaled by :math:`\min(1, c / (\lVert x\rVert + 10^{-6}))`, as PyTorch clips gradients."""
    return tree * clipping(tree, largest)


def clipping(tree: Tree, largest: float) -> Tensor:
    """Return the factor that `clip` scales by, shape ``(1,)``, or ``(..., 1)`` for a stack."""
    return (largest / (norm(tree) + 1e-6)).clamp(max=1.0)


def where(condition: Tensor, yes: Tree, no: Tree) -> Tree:
    """Return the values of one of two trees of the same layout; NaN in the other tree has no effect."""
    return Tree(yes.layout, torch.where(condition, yes.flat, no.flat))


def spread(values: Tensor, like: Layout) -> Tree:
    """Return a tree whose i-th tensor is filled with ``values[..., i]``.

    Example:
        >>> where_to = Tree.of({"a": torch.zeros(2), "b": torch.zeros(1)}).layout
        >>> spread(torch.tensor([3.0, 5.0]), where_to).flat.tolist()
        [3.0, 3.0, 5.0]
    """
    lead = values.shape[:-1]
    return Tree(like, torch.cat([values[..., i : i + 1].expand(*lead, n) for i, n in enumerate(like.sizes)], dim=-1))
