"""The examples of one split: tensors in memory, or read from a source when a batch is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from idiolect.core.errors import UsageError, raised
from idiolect.core.nest import Nest, mapped, rows_in, taken
from idiolect.data.seeding import seeded_call

Transform = Callable[..., Nest]
"""(inputs) -> inputs, or (inputs, generator=...) -> inputs."""


class Placement(NamedTuple):
    """Where batches are needed: device, dtype of floating tensors, and whether whole-number targets become floats.

    The client by whose name a line begins if its examples cannot be read, is there too.
    """

    device: torch.device
    dtype: torch.dtype
    float_targets: bool = False
    client: str = ""

    def batch(self, x: Nest, y: Nest) -> tuple[Nest, Nest]:
        """Return a batch that is placed."""
        return mapped(self.tensor, x), mapped(self.target, y)

    def tensor(self, values: Tensor) -> Tensor:
        """Return a tensor that is placed."""
        return values.to(self.device, self.dtype if values.is_floating_point() else values.dtype)

    def target(self, values: Tensor) -> Tensor:
        """Return targets that are placed."""
        if self.float_targets or values.is_floating_point():
            return values.to(self.device, self.dtype)
        return values.to(self.device)


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory: inputs `x` and targets `y`, each a tensor or a nest of tensors with one row per example.

    Example:
        >>> some = Examples({"a": torch.arange(3), "b": torch.zeros(3, 2)}, torch.tensor([0, 1, 0]))
        >>> len(some), some.take(torch.tensor([2]))[0]["a"]
        (3, tensor([2]))
    """

    x: Nest
    y: Nest

    ordered: ClassVar[bool] = False
    blocks: ClassVar[Sequence[int] | None] = None

    def __len__(self) -> int:
        return rows_in(self.y)

    def __iter__(self) -> Iterator[Nest]:
        return iter((self.x, self.y))

    def take(self, rows: Tensor, key: int = 0) -> tuple[Nest, Nest]:
        """Return the inputs and targets at these positions."""
        return taken(self.x, rows), taken(self.y, rows)

    def chunks(self, size: int) -> Iterator[tuple[Nest, Nest]]:
        """Yield all examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            cut = partial(_part, start, start + size)
            yield mapped(cut, self.x), mapped(cut, self.y)

    def placed(self, where: Placement) -> Examples:
        """Return the examples where they are needed."""
        return Examples(*where.batch(self.x, self.y))


def _part(start: int, stop: int, values: Tensor) -> Tensor:
    return values[start:stop]


class Source(Protocol):
    """Where examples are read from."""

    @property
    def draws(self) -> bool:
        """Whether reading may draw random numbers."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether examples can only be read one after the other."""
        ...

    @property
    def blocks(self) -> Sequence[int] | None:
        """Numbers of examples that follow each other and are best read together; None if any are."""
        ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int], transform: Transform | None) -> tuple[Nest, Nest]:
        """Return a batch: the examples at these positions, each transformed."""
        ...


@dataclass(frozen=True, eq=False)
class LazyExamples:
    """Examples that are read when a batch is needed, and again in every epoch.

    Args:
        source: where they are read from.
        transform: a function of one example's inputs, applied each time it is read.
        batch_transform: a function of the inputs of a batch.
        where: where batches are needed; None leaves them as they are.
    """

    source: Source
    transform: Transform | None = None
    batch_transform: Transform | None = None
    where: Placement | None = None

    @property
    def ordered(self) -> bool:
        """Whether examples can only be read one after the other."""
        return self.source.ordered

    @property
    def blocks(self) -> Sequence[int] | None:
        """Numbers of examples that follow each other and are best read together; None if any are."""
        return self.source.blocks

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: Tensor, key: int = 0) -> tuple[Nest, Nest]:
        """Return the inputs and targets at these positions; random numbers depend on the key."""
        generator = torch.Generator().manual_seed(key)
        each, whole = _bound(self.transform, generator), _bound(self.batch_transform, generator)

        def read() -> tuple[Nest, Nest]:
            x, y = self.source.read(rows.tolist(), each)
            return (whole(x) if whole else x), y

        user_draws = self.source.draws or any(map(_draws, (self.transform, self.batch_transform)))
        whose = f"client {self.where.client!r}: " if self.where else ""
        try:
            x, y = seeded_call(key, read) if user_draws else read()
        except UsageError as error:
            raise UsageError(f"{whose}{error}") from error.__cause__
        except Exception as error:  # a user's data set or transform may raise anything
            raise UsageError(f"{whose}reading a batch of examples failed: {raised(error)}") from error
        return self.where.batch(x, y) if self.where else (x, y)

    def chunks(self, size: int) -> Iterator[tuple[Nest, Nest]]:
        """Yield all examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))

    def placed(self, where: Placement) -> LazyExamples:
        """Return the examples where they are needed."""
        return replace(self, where=where)


def _takes_generator(change: Transform) -> bool:
    try:
        return "generator" in inspect.signature(change).parameters
    except (TypeError, ValueError):  # a builtin
        return False


def _draws(change: Transform | None) -> bool:
    return change is not None and not _takes_generator(change)


def _bound(change: Transform | None, generator: torch.Generator) -> Transform | None:
    if change is None or not _takes_generator(change):
        return change
    return partial(change, generator=generator)
