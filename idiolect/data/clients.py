"""What one client holds, and the check that all clients fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from idiolect.core.calls import called
from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest, named_tensors, plain
from idiolect.data.examples import Examples, LazyExamples, Transform
from idiolect.data.reading import Arrays, Collate, InOrder, Rows, as_targets, as_tensor
from idiolect.data.reading import split as divided

Given: TypeAlias = "Dataset[Any] | Iterable[Any] | Mapping[str, Any] | Examples | LazyExamples"
"""How examples may be given; see `ClientData`."""

Split: TypeAlias = "Examples | LazyExamples"
"""The examples of one split."""


@called
@dataclass(frozen=True, init=False, eq=False)
class ClientData:
    """The examples of one client: for training, and where there are any for validation and test.

    Each split is given in one of these forms. Inputs and targets may be nests: tuples or dicts of arrays. A model is
    called with an array alone, with the items of a tuple, or with the entries of a dict by name.

    - a pair ``(x, y)`` of arrays, tensors or nested lists, or of nests of them, with n rows each. They are kept in
      memory, except for arrays that NumPy maps from a file, which are read batch by batch.
    - a dict of arrays with an entry ``labels``, which are the targets; the model is given all entries.
    - a map-style :class:`torch.utils.data.Dataset`, a Hugging Face ``Dataset``, or a list of examples. An example is
      a pair ``(x, y)`` or a dict with ``labels``. It is read anew each time it is needed, so random augmentation in
      ``__getitem__`` is drawn anew in every epoch.
    - a :class:`torch.utils.data.IterableDataset`: one pass in its own order is an epoch. If it has no length, one
      pass counts its examples.

    NumPy's float64 becomes float32; a tensor of floats keeps its dtype. Whole-number targets become int64. Random
    numbers that are drawn while a batch is read depend only on the seed of the run, the client, the round and the step:
    the streams of torch, NumPy and Python are seeded for it, and are then as they were before.

    Args:
        train: the training examples.
        val: the same for validation; None, or no rows: the client has none.
        test: the same for the test.
        transform: a function of the inputs of one training example, called each time that it is read. If it has an
            argument ``generator`` it is given a `torch.Generator` to draw from.
        batch_transform: the same for the inputs of a batch of training examples, ``(b, ...)``.
        collate: makes a batch of a list of examples, such as padded sequences: ``collate(examples)`` returns
            ``(x, y)`` or a dict with ``labels``. By default examples are stacked.

    Raises:
        UsageError: if a split has none of these forms, cannot be read as numbers, or x and y differ in length.

    Example:
        >>> ward = ClientData(train=([[0.5, 1.0], [0.0, 2.0]], [1, 0]))
        >>> ward.train.x.dtype, ward.train.y.tolist(), ward.test
        (torch.float32, [1, 0], None)
        >>> ward
        ClientData(train=2 examples of (2,) float32)
        >>> image, age = torch.zeros(4, 3, 8, 8), torch.ones(4, 1)
        >>> ClientData(train=({"image": image, "age": age}, [0, 1, 1, 0]))
        ClientData(train=4 examples of image (3, 8, 8) float32, age (1,) float32)
    """

    train: Split
    val: Split | None
    test: Split | None

    def __init__(
        self,
        train: Given,
        val: Given | None = None,
        test: Given | None = None,
        *,
        transform: Transform | None = None,
        batch_transform: Transform | None = None,
        collate: Collate | None = None,
    ) -> None:
        for what, f in (("transform", transform), ("batch_transform", batch_transform), ("collate", collate)):
            if f is not None and not callable(f):
                raise UsageError(f"{what} must be a function, not {type(f).__name__}")
        for split, given in (("train", train), ("val", val), ("test", test)):
            examples = None if given is None and split != "train" else _examples(given, split, collate)
            if split == "train" and (transform or batch_transform):
                examples = _transformed(examples, transform, batch_transform)
            empty = split != "train" and examples is not None and len(examples) == 0
            object.__setattr__(self, split, None if empty else examples)

    def __repr__(self) -> str:
        shown = [f"{split}={_shown(examples)}" for split, examples in self.splits().items()]
        return f"ClientData({', '.join(shown)})"

    def splits(self) -> dict[str, Split]:
        """Return the splits that are there, by name: ``train`` always, ``val`` and ``test`` if given."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: examples for split, examples in named.items() if examples is not None}

    def changed(self, change: Callable[[Split], Split]) -> ClientData:
        """Return the client with each split changed."""
        splits = {split: change(examples) for split, examples in self.splits().items()}
        return ClientData(splits["train"], splits.get("val"), splits.get("test"))

    def held(self) -> dict[str, Examples]:
        """Return the splits by name.

        Raises:
            UsageError: if their examples are not in memory.
        """
        found = self.splits()
        if odd := next((split for split, examples in found.items() if not isinstance(examples, Examples)), None):
            raise UsageError(f"the examples of {odd!r} are read batch by batch: this needs them in memory, as arrays")
        return found  # type: ignore[return-value]


def countable(examples: Split) -> TypeGuard[Examples]:
    """Return whether targets are one whole number per example, in memory."""
    y = examples.y if isinstance(examples, Examples) else None
    return isinstance(y, Tensor) and (not len(y) or (y.dim() == 1 and not y.is_floating_point()))


def holdings(clients: Mapping[str, ClientData]) -> dict[str, dict[int, int]]:
    """Count the training labels of each client: ``{client: {label: examples}}``.

    Raises:
        UsageError: if a client's labels are not one whole number per example, or are not in memory.

    Example:
        >>> holdings({"a": ClientData(([[0.0], [0.0], [0.0]], [2, 2, 0]))})
        {'a': {0: 1, 2: 2}}
    """
    counts = {}
    for name, data in clients.items():
        if not countable(data.train):
            raise UsageError(f"client {name!r}: only one whole number per example in memory can be counted")
        labels, sizes = np.unique(data.train.y.cpu().numpy(), return_counts=True)
        counts[name] = dict(zip(labels.tolist(), sizes.tolist(), strict=True))
    return counts


def _examples(given: Any, split: str, collate: Collate | None) -> Split:  # noqa: ANN401 - this function judges it
    if isinstance(given, Examples | LazyExamples):
        return given
    if isinstance(given, DataLoader):
        raise UsageError(
            f"{split}: give the data set, not its DataLoader: loader.dataset, and its collate_fn as collate"
        )
    if isinstance(given, Iterator):
        raise UsageError(f"{split}: a {type(given).__name__} can be read once only: give a list or an IterableDataset")
    try:
        return (
            LazyExamples(InOrder(given, collate))
            if isinstance(given, IterableDataset)
            else _read(given, split, collate)
        )
    except UsageError as error:
        raise UsageError(f"{split}: {error}") from error.__cause__


def _read(given: Any, split: str, collate: Collate | None) -> Split:  # noqa: ANN401
    listed = isinstance(given, list) and bool(given) and all(isinstance(e, tuple | Mapping) for e in given)
    rows = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if listed or (rows and not isinstance(given, Mapping | tuple | list | str | np.ndarray | Tensor)):
        return LazyExamples(Rows(given, collate))
    if collate:
        raise UsageError(f"collate makes a batch of examples: give a Dataset or a list, not a {type(given).__name__}")
    if isinstance(given, Mapping):
        x, y = divided(plain(given))
    elif isinstance(given, tuple | list) and len(given) == 2:
        x, y = plain(given[0]), plain(given[1])
    else:
        raise UsageError(
            f"give a pair (x, y), a dict with 'labels', a Dataset or a list of examples, not {type(given).__name__}"
        )
    if any(isinstance(leaf, np.memmap) for leaf in _leaves((x, y))):
        return LazyExamples(Arrays(*_equally_long(_nested(lambda a, _: a, x, ""), _nested(lambda a, _: a, y, ""))))
    x, y = _nested(array_of, x, "x"), _nested(array_of, y, "y")
    return Examples(*_equally_long(x, as_targets(y)))


def _leaves(nest: Nest) -> list[Any]:
    found: list[Any] = []
    _nested(lambda leaf, _: found.append(leaf), nest, "")
    return found


def _nested(change: Callable[[Any, str], Any], nest: Nest, what: str) -> Nest:
    """Return a nest of arrays with each changed; a list is an array, a tuple or a dict is a nest."""
    if isinstance(nest, Mapping):
        return {key: _nested(change, inner, f"{what}[{key!r}]") for key, inner in nest.items()}
    if isinstance(nest, tuple):
        return tuple(_nested(change, inner, f"{what}[{k}]") for k, inner in enumerate(nest))
    return change(nest, what)


def _equally_long(x: Nest, y: Nest) -> tuple[Nest, Nest]:
    shapes = [tuple(array.shape) for array in _leaves((x, y))]
    if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        *inputs, last = shapes or [(), ()]
        raise UsageError(
            f"x has shape {inputs[0] if len(inputs) == 1 else inputs} and y {last}; "
            "both need one row per example, the same number in both"
        )
    return x, y


def array_of(values: Any, what: str) -> Tensor:  # noqa: ANN401
    """Return an array, a tensor or a nested list as a tensor.

    Raises:
        UsageError: if it is no array of numbers; one line that says what it is of the examples.
    """
    try:
        if isinstance(values, list) and values and all(isinstance(row, Tensor) for row in values):
            return torch.stack(values).detach()
        return as_tensor(values)
    except (RuntimeError, UsageError) as problem:
        raise UsageError(f"{what} cannot be read as one array of numbers ({problem})") from problem


def _transformed(examples: Split | None, each: Transform | None, whole: Transform | None) -> LazyExamples:
    if isinstance(examples, Examples):
        return LazyExamples(Arrays(examples.x, examples.y), each, whole)
    assert isinstance(examples, LazyExamples)
    return replace(examples, transform=each, batch_transform=whole)


def _shown(examples: Split) -> str:
    count = f"{len(examples)} example{'s' * (len(examples) != 1)}"
    if not isinstance(examples, Examples):
        return f"{count}, read from {type(examples.source).__name__.lower()}"
    shapes = [
        f"{place[1:].strip(chr(39) + '[]')} {tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}".strip()
        for place, t in named_tensors(examples.x, "x")
    ]
    return f"{count} of {', '.join(shapes)}"
