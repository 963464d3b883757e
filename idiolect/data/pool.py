"""A pool of examples, and how it is dealt out to clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, kind_of
from idiolect.core.values import real, whole
from idiolect.data.clients import ClientData, array_of
from idiolect.data.deal import Deal, Parts, Shuffled, official
from idiolect.data.examples import Examples
from idiolect.data.partition import Names, Rows, Split
from idiolect.data.reading import as_targets
from idiolect.data.shift import Shift, stream


@called
@dataclass(frozen=True, eq=False)
class Pool:
    """All examples of a data set, before they belong to clients.

    Args:
        name: of the data set.
        x: features, shape (n, …): a tensor, an array or nested lists, kept as a tensor; float64 of NumPy is float32.
        y: labels, shape (n,), given likewise: class numbers (kept as int64), or floats for a regression.
        classes: name of each class, in the order of the class numbers; None for a regression.
        group: the domain, speaker or site of each example, shape (n,); None where there is none.
        part: ``"train"`` or ``"test"`` for each example, shape (n,), where there is an official split; else
            None.
        unit: what must not be divided between training and test (a patient, a recording), shape (n,), for
            :class:`ByGroup`; None where there is none.

    Raises:
        UsageError: if the columns differ in length, or x and y are no numbers.

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
    unit: Names | None = None

    def __post_init__(self) -> None:
        try:
            columns: dict[str, Any] = {"x": array_of(self.x, "x"), "y": as_targets(array_of(self.y, "y"))}
        except UsageError as error:
            raise UsageError(f"pool {self.name!r}: {error}") from error.__cause__
        for what in ("group", "part", "unit"):
            given = getattr(self, what)
            columns[what] = None if given is None else np.asarray(given).astype(np.str_, copy=False)
        for what, rows in columns.items():
            if rows is not None and not rows.ndim:
                raise UsageError(f"pool {self.name!r}: {what} is one value: give one for each example")
            if rows is not None and len(rows) != len(columns["x"]):
                raise UsageError(f"pool {self.name!r}: {len(columns['x'])} examples in x, {len(rows)} in {what}")
            object.__setattr__(self, what, rows)

    def __len__(self) -> int:
        return len(self.y)


@called
def federate(
    pool: Pool,
    split: Split,
    clients: int = 20,
    test: float | Literal["official"] = 0.25,
    val: float = 0.0,
    shift: Shift | None = None,
    size: int | None = None,
    seed: int = 0,
    deal: Deal = Shuffled(),
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
        deal: which of a client's examples are for training, validation and test: :class:`Shuffled`,
            :class:`TimeBlocks` or :class:`ByGroup`.

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
    _check_rules(pool, split, shift, deal)
    clients, seed = whole("clients", clients, 1), whole("seed", seed, 0)
    size = None if size is None else whole("size", size, 1)
    share, val = _shares(test, val)
    rows = split.indices(pool.y.numpy(), pool.group, clients, stream(seed, "split"))
    held = {name: np.sort(own) for name, own in zip(split.names(pool.group, clients), rows, strict=True)}
    people = {}
    for name, parts in _dealt(pool, held, split, deal, share, val, seed).items():
        chosen = (parts.train[:size], parts.val, parts.test)
        data = ClientData(*(Examples(pool.x[part], pool.y[part]) for part in chosen))
        classes = None if pool.classes is None else len(pool.classes)
        people[name] = data if shift is None else shift.apply(data, name, seed, classes)
    return people


def _check_rules(pool: object, split: object, shift: object, deal: object) -> None:
    """Raise unless the objects that `federate` is given are of their kinds, and not the classes themselves."""
    for name, given, kind, known in (
        ("pool", pool, Pool, "load('digits') and read_table(path) return pools"),
        ("split", split, Split, "there are Iid(), Dirichlet(0.5), Pathological(2), ByDomain(), ByClient() and others"),
        ("shift", shift, Shift | None, "there are Rotation(45), Noise(0.1), PermuteLabels(2) and others"),
        ("deal", deal, Deal, "there are Shuffled(), TimeBlocks(gap) and ByGroup()"),
    ):
        if isinstance(given, type) or not isinstance(given, kind):
            raise UsageError(f"federate: {name} is {kind_of(given)}; {known}")


def _shares(test: object, val: object) -> tuple[float | None, float]:
    """Return the shares for test (None: the official one) and validation."""
    official = isinstance(test, str) and test == "official"
    share = 0.0 if official else real("test", test, lambda share: 0 <= share <= 1, "0 … 1, or 'official'")
    val = real("val", val, lambda share: 0 <= share <= 1, "0 … 1")
    if share + val >= 1:
        raise UsageError(f"test={test} and val={val} leave nothing to train; give shares whose sum is below 1")
    return None if official else share, val


def _dealt(
    pool: Pool, held: Mapping[str, Rows], split: Split, deal: Deal, test: float | None, val: float, seed: int
) -> dict[str, Parts]:
    if test is not None:
        return deal.parts(held, split, pool.group if pool.unit is None else pool.unit, test, val, seed)
    if pool.part is None:
        raise UsageError(f"pool {pool.name!r} has no official test part; give test as a share, such as 0.25")
    if deal != Shuffled():
        raise UsageError(f"{deal} cannot keep to the official test part; give test as a share, such as 0.25")
    return official(held, pool.part, val, seed)
