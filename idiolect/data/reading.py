"""Sources of examples: arrays, map-style data sets and lists, and iterable data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from idiolect.core.errors import UsageError, raised
from idiolect.core.nest import Nest, joined, plain
from idiolect.data.examples import Transform
from idiolect.data.seeding import seeded_call

Collate = Callable[[list[Any]], Any]
"""A list of examples -> a batch: a pair (inputs, targets), or a mapping with the targets under ``labels``."""

LABELS = ("labels", "label")
"""Names of the targets in a mapping."""


class Arrays:
    """Inputs and targets in arrays: tensors, or NumPy arrays, which may be mapped from a file.

    Args:
        x: inputs, arrays with one row per example.
        y: targets.
    """

    draws = False
    ordered = False
    blocks = None

    def __init__(self, x: Nest, y: Nest) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self._y)[0])

    def read(self, rows: Sequence[int] | NDArray[np.int64], transform: Transform | None) -> tuple[Nest, Nest]:
        """See `Source`."""
        x, y = (pytree.tree_map(lambda array: as_tensor(array[rows]), nest) for nest in (self._x, self._y))
        if transform:
            x = joined([transform(pytree.tree_map(lambda t, k=k: t[k], x)) for k in range(len(rows))])
        return x, as_targets(y)


class Rows:
    """A map-style data set, or a list of examples.

    Args:
        dataset: has a length, and gives an example for a position.
        collate: makes a batch of a list of examples; by default their tensors are stacked.
    """

    draws = True
    ordered = False
    blocks = None

    def __init__(self, dataset: Any, collate: Collate | None = None) -> None:  # noqa: ANN401 - whatever has rows
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: Sequence[int], transform: Transform | None) -> tuple[Nest, Nest]:
        """See `Source`."""
        many = getattr(self._dataset, "__getitems__", None)
        examples = many(list(rows)) if many else [self._example(k) for k in rows]
        return batch_of(examples, transform, self._collate)

    def _example(self, row: int) -> Any:  # noqa: ANN401
        try:
            return self._dataset[row]
        except Exception as error:  # a user's data set may raise anything
            raise _failed(row, error) from error


class InOrder:
    """An iterable data set: one pass over it is an epoch. Its length is counted by one pass if it has none.

    Args:
        dataset: gives examples one after the other.
        collate: makes a batch of a list of examples; by default their tensors are stacked.
    """

    draws = True
    ordered = True
    blocks = None

    def __init__(self, dataset: Iterable[Any], collate: Collate | None = None) -> None:
        self._dataset, self._collate = dataset, collate
        self._length: int = len(dataset) if isinstance(dataset, Sized) else seeded_call(0, lambda: _count(dataset))
        self._position = self._length + 1  # the next read starts a pass
        self._iterator: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self._length

    def read(self, rows: Sequence[int], transform: Transform | None) -> tuple[Nest, Nest]:
        """Return the examples at these positions, which follow each other; an earlier one starts a new pass."""
        if rows[0] < self._position:
            self._position, self._iterator = 0, iter(self._dataset)
        examples = [self._next() for _ in range(rows[-1] + 1 - self._position)][-len(rows) :]
        return batch_of(examples, transform, self._collate)

    def _next(self) -> Any:  # noqa: ANN401 - an example
        try:
            found = next(self._iterator)
        except StopIteration:
            raise UsageError(
                f"an iterable data set has given {self._position} examples in a pass, and {self._length} in another"
            ) from None
        except Exception as error:  # a user's data set may raise anything
            raise _failed(self._position, error) from error
        self._position += 1
        return found


def _count(dataset: Iterable[Any]) -> int:
    count = 0
    try:
        for _ in dataset:
            count += 1
    except Exception as error:  # a user's data set may raise anything
        raise _failed(count, error) from error
    return count


def _failed(row: int, error: Exception) -> UsageError:
    return UsageError(f"reading row {row} failed: {raised(error)}")


def batch_of(examples: list[Any], transform: Transform | None, collate: Collate | None) -> tuple[Nest, Nest]:
    """Return inputs and targets of a list of examples.

    Raises:
        UsageError: if an example is neither a pair nor a mapping with labels, or examples cannot be stacked.
    """
    if transform:
        examples = [_transformed(example, transform) for example in examples]
    if collate:
        x, y = split(tensors_of(plain(collate(examples))))
        return x, as_targets(y)
    pairs = [split(tensors_of(plain(example))) for example in examples]
    try:
        x, y = joined([x for x, _ in pairs]), joined([y for _, y in pairs])
    except (RuntimeError, ValueError, TypeError) as problem:
        reason = str(problem).partition("\n")[0]
        raise UsageError(
            f"examples cannot be stacked to a batch ({reason}): give ClientData(..., collate=...)"
        ) from None
    return x, as_targets(y)


def split(batch: Any) -> tuple[Nest, Nest]:  # noqa: ANN401 - the point of this function is to judge it
    """Return inputs and targets of an example or a batch.

    Example:
        >>> split({"ids": 1, "labels": 0})
        ({'ids': 1, 'labels': 0}, 0)
    """
    if isinstance(batch, Mapping):
        name = next((name for name in LABELS if name in batch), None)
        if name is None:
            raise UsageError(
                f"an example has {', '.join(map(repr, batch))} and no 'labels': add them, or give pairs (x, y)"
            )
        return dict(batch), batch[name]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise UsageError(f"the data set must give pairs (x, y) or mappings with 'labels', not a {type(batch).__name__}")


def _transformed(example: Any, transform: Transform) -> Any:  # noqa: ANN401
    if isinstance(example, Mapping):
        return transform(example)
    x, y = split(example)
    return transform(x), y


def tensors_of(nest: Any) -> Nest:  # noqa: ANN401
    """Return an example or a batch with tensors in place of arrays, numbers and lists of numbers."""
    if isinstance(nest, Mapping):
        return {key: tensors_of(inner) for key, inner in nest.items()}
    if isinstance(nest, tuple) or (isinstance(nest, list) and nest and not _numbers(nest)):
        return tuple(map(tensors_of, nest))
    return nest if nest is None else as_tensor(nest)


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(v, int | float | np.generic) or (isinstance(v, list) and _numbers(v)) for v in values)


def as_tensor(values: Any) -> Tensor:  # noqa: ANN401
    """Return values as a tensor; NumPy's float64 becomes float32.

    Raises:
        UsageError: if they are no numbers.
    """
    if isinstance(values, Tensor) and values.layout == torch.strided:
        return values.detach()
    if isinstance(values, Tensor) or hasattr(values, "toarray"):
        cure = "x.to_dense()" if isinstance(values, Tensor) else "x.toarray()"
        raise UsageError(f"a sparse {type(values).__name__}: give {cure}")
    try:
        array = np.asarray(values)
        if array.dtype.kind in "US":
            raise UsageError("text is no number: give class numbers 0, 1, … for labels, tokens for text")
        return torch.from_numpy(np.array(array, np.float32 if array.dtype == np.float64 else array.dtype))
    except UsageError:
        raise
    except (TypeError, ValueError) as problem:
        raise UsageError(
            f"a {type(values).__name__} cannot be read as numbers ({problem}): tokenize or encode it"
        ) from None


def as_targets(nest: Nest) -> Nest:
    """Return targets whose whole numbers are int64; booleans are kept."""

    def target(values: Tensor) -> Tensor:
        return values if values.is_floating_point() or values.dtype == torch.bool else values.long()

    return pytree.tree_map(target, nest)
