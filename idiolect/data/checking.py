"""The check that all clients fit together, and fit the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest, named_tensors, tensors
from idiolect.data.clients import ClientData, Split
from idiolect.data.examples import Examples


def check_clients(
    clients: Mapping[str, ClientData], labels: Labels | None = None
) -> tuple[dict[str, ClientData], list[str]]:
    """Return the clients that can be trained, and one line about those that were left out.

    Of examples that are not in memory, the first two are checked.

    Args:
        clients: the population, by client name.
        labels: what the loss takes as targets; None for anything.

    Returns:
        The clients with training examples, in the given order, and notes (at most one line).

    Raises:
        UsageError: if no client has training examples; if shapes or dtypes differ between clients; if a
            feature or a target is NaN or infinite; if a label is none that the loss takes.

    Example:
        >>> good, empty = ClientData(([[0.5]], [1])), ClientData(([], []))
        >>> kept, notes = check_clients({"a": good, "b": empty}, Labels(2))
        >>> list(kept), notes
        (['a'], ["1 client without training examples left out: 'b'"])
    """
    kept = {name: data for name, data in clients.items() if len(data.train)}
    if not kept:
        raise UsageError("no client has training examples; give at least one client with train=(x, y)")
    first: tuple[str, Nest, Nest, bool] | None = None
    for name, data in kept.items():
        for split, examples in data.splits().items():
            where = f"client {name!r}, {split}"
            x, y = examples if isinstance(examples, Examples) else _read(examples, where)
            first = first or (where, x, y, isinstance(examples, Examples))
            fixed = first[3] and isinstance(examples, Examples)  # those that are read may differ in length
            _same_form("features", first[0], first[1], where, x, fixed)
            if labels:
                labels.check(y, where)
            _same_form("labels", first[0], first[2], where, y, fixed)
            _finite(x, where, "feature")
            _finite(y, where, "label")
    empty = [repr(name) for name in clients if name not in kept]
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    plural = "s" if len(empty) > 1 else ""
    line = f"{len(empty)} client{plural} without training examples left out: {', '.join(empty[:5])}{more}"
    return kept, [line] if empty else []


def first_of(examples: Split, count: int = 2) -> tuple[Nest, Nest]:
    """Return the first examples of a split."""
    return examples.take(torch.arange(min(count, len(examples))))


def _read(examples: Split, where: str) -> tuple[Nest, Nest]:
    """Return the first examples of a split; raise if reading fails."""
    try:
        return first_of(examples)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error.__cause__


class Labels(NamedTuple):
    """The targets that a cross-entropy takes.

    Attributes:
        classes: number of classes.
        places: axes of an example that have a class each: ``()`` for one class per example.
        ignored: a label that the loss leaves out; None if there is none.
    """

    classes: int
    places: tuple[int, ...] = ()
    ignored: int | None = None

    def check(self, y: Nest, where: str) -> None:
        """Raise if targets are neither class numbers nor probabilities of the classes."""
        if not isinstance(y, Tensor):
            raise UsageError(f"{where}: cross-entropy takes one tensor of labels, not a {type(y).__name__}")
        example = "example" if not self.places else f"place, shape (n, {', '.join(map(str, self.places))})"
        wanted = f"give one class number 0 … {self.classes - 1} per {example}"
        if y.is_floating_point() and y.shape[1:] == (self.classes, *self.places):
            return
        if y.dim() != 1 + len(self.places) or y.shape[1:] != self.places:
            suffix = "" if self.places else f", shape ({len(y)},)"
            raise UsageError(f"{where}: labels have shape {tuple(y.shape)}; {wanted}{suffix}")
        if y.is_floating_point():
            raise UsageError(f"{where} row 0: label is {y.flatten()[0].item()} ({y.dtype}); {wanted} as whole numbers")
        wrong = ((y < 0) | (y >= self.classes)) & (y != self.ignored if self.ignored is not None else True)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise UsageError(f"{where} row {at[0]}: label {int(y[at])} is out of range; {wanted}")


def _same_form(what: str, first: str, expected: Nest, where: str, found: Nest, fixed: bool) -> None:
    wanted, own = dict(named_tensors(expected, "x")), dict(named_tensors(found, "x"))
    if wanted.keys() != own.keys():
        odd = min(wanted.keys() ^ own.keys())
        raise UsageError(f"{first} has {what} {', '.join(wanted)}, {where} {', '.join(own)}: every client needs {odd}")
    for place, tensor in wanted.items():
        other = own[place]
        if tensor.dtype != other.dtype or (tensor.shape[1:] != other.shape[1:] and fixed):
            raise UsageError(
                f"{first} has {what} of shape {tuple(tensor.shape[1:])} {tensor.dtype}, {where} of shape "
                f"{tuple(other.shape[1:])} {other.dtype}; every client needs the same"
            )


def _finite(values: Nest, where: str, what: str) -> None:
    for tensor in tensors(values):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = int(torch.isfinite(tensor).logical_not().nonzero()[0, 0])
            found = "NaN" if bool(tensor[row].isnan().any()) else "infinite"
            raise UsageError(f"{where} row {row}: {what} is {found}; remove the example or fill the value in")
