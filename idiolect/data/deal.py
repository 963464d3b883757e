"""Which of a client's examples train, validate and test: at random, in blocks of time, or by whole groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from idiolect.core.errors import UsageError
from idiolect.core.values import settings
from idiolect.data.partition import Names, Rows, Split
from idiolect.data.shift import stream


class Parts(NamedTuple):
    """The row numbers of one client; those for training are listed with the most wanted first."""

    train: Rows
    val: Rows
    test: Rows


@runtime_checkable
class Deal(Protocol):
    """A rule that divides each client's rows among training, validation and test."""

    def parts(
        self, held: Mapping[str, Rows], split: Split, units: Names | None, test: float, val: float, seed: int
    ) -> dict[str, Parts]:
        """Return the parts of each client.

        Args:
            held: client to its row numbers, sorted.
            split: the rule that gave the clients their rows.
            units: the unit of each row of the pool, shape (n,), which `ByGroup` does not divide; or None.
            test: share of a client's rows for its test, 0 … 1.
            val: share for validation; the sum of both is below 1.
            seed: of the experiment.

        Raises:
            UsageError: if the rule cannot be kept; one line that names the client.
        """


@settings
class Shuffled:
    """At random. A client's last example stays in training.

    Example:
        >>> from idiolect.data import Iid
        >>> Shuffled().parts({"a": np.arange(4)}, Iid(), None, 0.25, 0.0, seed=0)["a"].train.tolist()
        [3, 0, 2]
    """

    def parts(
        self, held: Mapping[str, Rows], split: Split, units: Names | None, test: float, val: float, seed: int
    ) -> dict[str, Parts]:
        """See :meth:`Deal.parts`."""
        return {name: self.cut(stream(seed, "deal", name).permutation(rows), test, val) for name, rows in held.items()}

    def cut(self, rows: Rows, test: float, val: float) -> Parts:
        """Cut rows in this order into test, validation and training."""
        tests = min(_rounded(test * len(rows)), max(len(rows) - 1, 0))
        validations = min(_rounded(val * len(rows)), max(len(rows) - tests - 1, 0))
        return Parts(rows[tests + validations :], rows[tests : tests + validations], rows[:tests])


@settings
class TimeBlocks:
    r"""In blocks of time: the first rows of a client train, later ones validate, and the last ones test.

    The rows of the pool are in the order of time. ``gap`` rows are left out between one block and the next, so that no
    window reaches from one block into another: windows of :math:`w` values that start :math:`s` values apart overlap up
    to a distance of :math:`\lceil w / s \rceil - 1` rows. A limit on the number of training examples keeps the latest.

    Args:
        gap: rows left out between two blocks, at least 0.

    Example:
        >>> from idiolect.data import ByClient
        >>> parts = TimeBlocks(gap=1).parts({"a": np.arange(10)}, ByClient(), None, 0.2, 0.2, seed=0)
        >>> [rows.tolist() for rows in parts["a"]]
        [[3, 2, 1, 0], [5, 6], [8, 9]]
    """

    gap: int = 0

    def __post_init__(self) -> None:
        if self.gap < 0:
            raise UsageError(f"TimeBlocks: gap is {self.gap}; give a number of rows, 0 or above")

    def parts(
        self, held: Mapping[str, Rows], split: Split, units: Names | None, test: float, val: float, seed: int
    ) -> dict[str, Parts]:
        """See :meth:`Deal.parts`."""
        if not split.in_order:
            raise UsageError(
                f"TimeBlocks: {split} takes neighbors in time apart, so that clients train on what others test; "
                "split by ByClient(), ByDomain() or Contiguous()"
            )
        return {name: self._cut(name, rows, test, val) for name, rows in held.items()}

    def _cut(self, client: str, rows: Rows, test: float, val: float) -> Parts:
        tests, validations = _rounded(test * len(rows)), _rounded(val * len(rows))
        tested = len(rows) - tests
        validated = tested - (self.gap if tests else 0) - validations
        trained = validated - (self.gap if validations else 0)
        if trained < 1 and len(rows):
            raise UsageError(
                f"TimeBlocks: client {client!r} has {len(rows)} rows; test={test}, val={val} and gap={self.gap} leave "
                "none to train; lower them, or leave small clients out"
            )
        return Parts(rows[:trained][::-1].copy(), rows[validated : validated + validations], rows[tested:])


@settings
class ByGroup:
    """By whole groups (patients, recordings, writers): no group is in two parts, of one client or of several.

    Groups are the units of the pool, and where it has none its own groups. Those of a client are drawn in random order,
    for the test until they come as close to its share as they can, at least one, then for validation; the others train.
    A group that several clients hold is in the same part everywhere; so a client may be left without a part.

    Example:
        >>> from idiolect.data import Iid
        >>> patient = np.array(["p", "p", "q", "q", "r", "r", "s", "s"])
        >>> [rows.tolist() for rows in ByGroup().parts({"a": np.arange(8)}, Iid(), patient, 0.25, 0.0, 0)["a"]]
        [[0, 1, 4, 5, 6, 7], [], [2, 3]]
    """

    def parts(
        self, held: Mapping[str, Rows], split: Split, units: Names | None, test: float, val: float, seed: int
    ) -> dict[str, Parts]:
        """See :meth:`Deal.parts`."""
        if units is None:
            raise UsageError("ByGroup needs a column that says which rows belong together: name it as the unit")
        chosen: dict[str, str] = {}
        for client, rows in held.items():
            _choose(chosen, stream(seed, "deal", client).permutation(units[rows]).tolist(), {"test": test, "val": val})
        for part, share in (("test", test), ("val", val), ("train", 1.0)):
            if share and part not in chosen.values():
                raise UsageError(
                    f"ByGroup: {len(chosen)} groups for {len(held)} clients leave none for {part}: name a finer unit, "
                    "or take another split"
                )
        where = {name: np.array([chosen[unit] for unit in units[rows].tolist()]) for name, rows in held.items()}
        return {n: Parts(*(rows[where[n] == part] for part in Parts._fields)) for n, rows in held.items()}


def _choose(chosen: dict[str, str], drawn: list[str], shares: Mapping[str, float]) -> None:
    """Choose the part of each group of a client that has none yet; `drawn` are the units of its rows, shuffled."""
    size = Counter(drawn)
    free = [unit for unit in size if unit not in chosen]
    for part, share in shares.items():
        have = sum(n for unit, n in size.items() if chosen.get(unit) == part)
        for unit in list(free):
            if abs(have + size[unit] - share * len(drawn)) < abs(have - share * len(drawn)):
                chosen[unit], have = part, have + size[unit]
                free.remove(unit)
        if share and not have and len(free) > 1:
            chosen[free.pop(int(np.argmin([size[unit] for unit in free])))] = part
    chosen.update(dict.fromkeys(free, "train"))


def official(held: Mapping[str, Rows], part: Names, val: float, seed: int) -> dict[str, Parts]:
    """Return the parts of each client where the pool's authors have chosen the rows for the test; see :class:`Deal`."""
    found = {}
    for name, rows in held.items():
        shuffled = stream(seed, "deal", name).permutation(rows)
        rest = shuffled[part[shuffled] != "test"]
        validations = min(_rounded(val * len(rows)), max(len(rest) - 1, 0))
        found[name] = Parts(rest[validations:], rest[:validations], shuffled[part[shuffled] == "test"])
    return found


def _rounded(number: float) -> int:
    return int(number + 0.5)
