"""What one client holds, and the check that all clients fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from idiolect.core.errors import UsageError

Given: TypeAlias = "Dataset[Any] | Sequence[Any]"
"""How examples may be handed in: a pair ``(x, y)`` of arrays, or a map-style data set of ``(x, y)``."""


class Examples(NamedTuple):
    """Examples of one split: features ``x`` of shape (n, …) and labels ``y`` of shape (n,) or (n, …)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, init=False, eq=False)
class ClientData:
    """The examples of one client: for training, and where there are any for validation and test.

    Args:
        train: a pair ``(x, y)`` of arrays, tensors or nested lists with n rows each, or a map-style
            :class:`torch.utils.data.Dataset` of ``(x, y)``, which is read once. NumPy's float64 becomes
            float32; a tensor of floats keeps its dtype. Whole-number labels become int64.
        val: the same for validation; None, or no rows: the client has none.
        test: the same for the test.

    Raises:
        UsageError: if a split is no such pair or data set, cannot be read as numbers, or x and y differ in
            length.

    Example:
        >>> ward = ClientData(train=([[0.5, 1.0], [0.0, 2.0]], [1, 0]))
        >>> ward.train.x.dtype, ward.train.y.tolist(), ward.test
        (torch.float32, [1, 0], None)
    """

    train: Examples
    val: Examples | None
    test: Examples | None

    def __init__(self, train: Given, val: Given | None = None, test: Given | None = None) -> None:
        for split, given in (("train", train), ("val", val), ("test", test)):
            examples = None if given is None and split != "train" else _examples(given, split)
            empty = split != "train" and examples is not None and len(examples.y) == 0
            object.__setattr__(self, split, None if empty else examples)

    def splits(self) -> dict[str, Examples]:
        """Return the splits that are there, by name: ``train`` always, ``val`` and ``test`` if given."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: examples for split, examples in named.items() if examples is not None}


def holdings(clients: Mapping[str, ClientData]) -> dict[str, dict[int, int]]:
    """Count the training labels of each client: ``{client: {label: examples}}``.

    Raises:
        UsageError: if a client's labels are not whole numbers, as in a regression.

    Example:
        >>> holdings({"a": ClientData(([[0.0], [0.0], [0.0]], [2, 2, 0]))})
        {'a': {0: 1, 2: 2}}
    """
    counts = {}
    for name, data in clients.items():
        if data.train.y.is_floating_point() and len(data.train.y):
            raise UsageError(f"client {name!r}: labels are {data.train.y.dtype}; only classes can be counted")
        labels, sizes = np.unique(data.train.y.cpu().numpy(), return_counts=True)
        counts[name] = dict(zip(labels.tolist(), sizes.tolist(), strict=True))
    return counts


def check_clients(clients: Mapping[str, ClientData], classes: int | None) -> tuple[dict[str, ClientData], list[str]]:
    """Return the clients that can be trained, and one line about those that were left out.

    Args:
        clients: the population, by client name.
        classes: how many classes the model tells apart (its number of outputs); None for a regression.

    Returns:
        The clients with training examples, in the given order, and notes (at most one line).

    Raises:
        UsageError: if no client has training examples; if shapes or dtypes differ between clients; if a
            feature or a regression label is NaN or infinite; if a label is not one of 0 … classes−1.

    Example:
        >>> good, empty = ClientData(([[0.5]], [1])), ClientData(([], []))
        >>> kept, notes = check_clients({"a": good, "b": empty}, classes=2)
        >>> list(kept), notes
        (['a'], ["1 client without training examples left out: 'b'"])
    """
    kept = {name: data for name, data in clients.items() if len(data.train.y)}
    if not kept:
        raise UsageError("no client has training examples; give at least one client with train=(x, y)")
    first: tuple[str, Examples] | None = None
    for name, data in kept.items():
        for split, examples in data.splits().items():
            where = f"client {name!r}, {split}"
            first = first or (where, examples)
            _same_form("features", first[0], first[1].x, where, examples.x)
            _finite(examples.x, where, "feature")
            if classes is None:
                _same_form("labels", first[0], first[1].y, where, examples.y)
                _finite(examples.y, where, "label")
            else:
                _labels(examples.y, classes, where)
    empty = [repr(name) for name in clients if name not in kept]
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    plural = "s" if len(empty) > 1 else ""
    line = f"{len(empty)} client{plural} without training examples left out: {', '.join(empty[:5])}{more}"
    return kept, [line] if empty else []


def _examples(given: Any, split: str) -> Examples:  # noqa: ANN401 - the point of this function is to judge it
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        rows = [given[i] for i in range(len(given))]  # type: ignore[arg-type]
        if any(not isinstance(row, Sequence) or len(row) != 2 for row in rows):
            raise UsageError(f"{split}: the data set must give pairs (x, y)")
        given = ([_tensor(x, f"{split} x") for x, _ in rows], [_tensor(y, f"{split} y") for _, y in rows])
    elif not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise UsageError(f"{split}: give a pair (x, y) or a map-style Dataset, not {type(given).__name__}")
    x, y = _tensor(given[0], f"{split} x"), _tensor(given[1], f"{split} y")
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise UsageError(
            f"{split}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; "
            "both need one row per example, the same number in both"
        )
    return Examples(x, y if y.is_floating_point() else y.long())


def _tensor(values: Any, what: str) -> Tensor:  # noqa: ANN401
    try:
        if isinstance(values, Tensor):
            return values.detach()
        if isinstance(values, list) and values and all(isinstance(row, Tensor) for row in values):
            return torch.stack(values).detach()
        array = np.asarray(values)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        return torch.from_numpy(np.array(array))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise UsageError(f"{what}: cannot be read as one array of numbers ({problem})") from problem


def _same_form(what: str, first: str, expected: Tensor, where: str, found: Tensor) -> None:
    if expected.shape[1:] != found.shape[1:] or expected.dtype != found.dtype:
        raise UsageError(
            f"{first} has {what} of shape {tuple(expected.shape[1:])} {expected.dtype}, {where} of shape "
            f"{tuple(found.shape[1:])} {found.dtype}; every client needs the same"
        )


def _finite(values: Tensor, where: str, what: str) -> None:
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return
    row = int(torch.isfinite(values).logical_not().nonzero()[0, 0])
    found = "NaN" if bool(values[row].isnan().any()) else "infinite"
    raise UsageError(f"{where} row {row}: {what} is {found}; remove the example or fill the value in")


def _labels(y: Tensor, classes: int, where: str) -> None:
    wanted = f"give one class number 0 … {classes - 1} per example"
    if y.dim() != 1:
        raise UsageError(f"{where}: labels have shape {tuple(y.shape)}; {wanted}, shape ({len(y)},)")
    if y.is_floating_point():
        raise UsageError(f"{where} row 0: label is {y[0].item()} ({y.dtype}); {wanted} as whole numbers")
    wrong = (y < 0) | (y >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UsageError(f"{where} row {row}: label {int(y[row])} is out of range; {wanted}")
