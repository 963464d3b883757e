"""A pool of examples, and how it is dealt out to clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.data.clients import ClientData
from idiolect.data.examples import Examples
from idiolect.data.partition import Names, Rows, Split
from idiolect.data.shift import Shift, stream


@dataclass(frozen=True, eq=False)
class Pool:
    """All examples of a data set, before they belong to clients.

    Args:
        name: of the data set.
        x: features, shape (n, …).
        y: labels, shape (n,): class numbers (int64), or floats for a regression.
        classes: name of each class, in the order of the class numbers; None for a regression.
        group: the domain, speaker or site of each example, shape (n,); None where there is none.
        part: ``"train"`` or ``"test"`` for each example, shape (n,), where there is an official split; else
            None.

    Raises:
        UsageError: if the columns differ in length.

    Example:
        >>> import torch
        >>> pool = Pool("toy", torch.zeros(3, 2), torch.tensor([0, 1, 0]), classes=("cat", "dog"))
        >>> len(pool)
        3
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...] | None = None
    group: Names | None = None
    part: Names | None = None

    def __post_init__(self) -> None:
        for what, rows in (("y", self.y), ("group", self.group), ("part", self.part)):
            if rows is not None and len(rows) != len(self.x):
                raise UsageError(f"pool {self.name!r}: {len(self.x)} examples in x, {len(rows)} in {what}")

    def __len__(self) -> int:
        return len(self.y)


def federate(
    pool: Pool,
    split: Split,
    clients: int = 20,
    test: float | Literal["official"] = 0.25,
    val: float = 0.0,
    shift: Shift | None = None,
    size: int | None = None,
    seed: int = 0,
) -> dict[str, ClientData]:
    """Deal a pool out to clients, and each client's examples out to training, validation and test.

    Args:
        pool: the examples.
        split: who holds which.
        clients: how many clients; :class:`ByDomain` and :class:`ByClient` take their number from the pool
            instead.
        test: share of each client's examples kept for its test, 0 … 1; or ``"official"``: those of its
            examples that the data set's authors put into the test part. FedFSA: 0.3; FedBN: ``"official"``.
        val: share of each client's examples kept for validation.
        shift: what to do to each client's data.
        size: training examples of a client, at most; the rest is not used. FedBN: 743.
        seed: decides the split, the dealing and the shift.

    Returns:
        Clients by name. Each has at least one training example, unless it holds none, or only official tests.

    Raises:
        UsageError: if the shares leave nothing to train, or split or shift do not fit the pool.

    Example:
        >>> from idiolect.data import Iid, load
        >>> people = federate(load("digits"), Iid(), clients=10, test=0.3)
        >>> list(people)[0], len(people["client-0"].train.y), len(people["client-0"].test.y)
        ('client-0', 126, 54)
    """
    if isinstance(test, str) and test != "official":
        raise UsageError(f"test={test!r} is no share; give a number 0 … 1, or 'official'")
    share = 0.0 if test == "official" else test
    if not (0 <= share <= 1 and 0 <= val <= 1 and share + val < 1):
        raise UsageError(f"test={test} and val={val} leave nothing to train; give shares whose sum is below 1")
    if test == "official" and pool.part is None:
        raise UsageError(f"pool {pool.name!r} has no official test part; give test as a share, such as 0.25")
    if size is not None and size < 1:
        raise UsageError(f"size is {size}; give at least 1 training example per client")
    official = pool.part if test == "official" else None
    rows = split.indices(pool.y.numpy(), pool.group, clients, stream(seed, "split"))
    people = {}
    for name, held in zip(split.names(pool.group, clients), rows, strict=True):
        shuffled = stream(seed, "deal", name).permutation(np.sort(held))
        train, validated, tested = _deal(shuffled, official, share, val)
        parts = (train[:size], validated, tested)
        data = ClientData(*(Examples(pool.x[part], pool.y[part]) for part in parts))
        classes = None if pool.classes is None else len(pool.classes)
        people[name] = data if shift is None else shift.apply(data, name, seed, classes)
    return people


def _deal(rows: Rows, official: Names | None, test: float, val: float) -> tuple[Rows, Rows, Rows]:
    """Cut one client's rows into training, validation and test; the last row stays in training."""
    if official is None:
        tests = min(_rounded(test * len(rows)), max(len(rows) - 1, 0))
        tested, rest = rows[:tests], rows[tests:]
    else:
        tested, rest = rows[official[rows] == "test"], rows[official[rows] != "test"]
    validations = min(_rounded(val * len(rows)), max(len(rest) - 1, 0))
    return rest[validations:], rest[:validations], tested


def _rounded(number: float) -> int:
    return int(number + 0.5)
