"""Who holds which examples: rules that split a pool into clients.

Every rule is a frozen dataclass with ``indices(y, group, clients, rng)``: one array of row numbers per
client, no row twice. :class:`ByDomain` and :class:`ByClient` read the number of clients and their names from
the pool's groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from idiolect.core.errors import UsageError
from idiolect.core.values import settings

Rows: TypeAlias = NDArray[np.int64]
Names: TypeAlias = NDArray[np.str_]


@runtime_checkable
class Split(Protocol):
    """A rule that splits a pool into clients."""

    @property
    def in_order(self) -> bool:
        """Whether neighboring rows of the pool, or of one of its groups, stay with one client."""

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers into ``y``; no row is given twice.

        Args:
            y: labels, shape (n,).
            group: the group of each row (domain, speaker, site), shape (n,), or None.
            clients: how many clients to make; rules that follow the groups do not read it.
            rng: where the chance comes from.
        """

    def names(self, group: Names | None, clients: int) -> list[str]:
        """Return the clients' names, in the order of :meth:`indices`."""


class Numbered:
    """Clients without names of their own are numbered, so that sorting keeps their order."""

    in_order = False

    def names(self, group: Names | None, clients: int) -> list[str]:
        """Return ``client-0``, ``client-1``, … with leading zeros."""
        return [f"client-{i:0{len(str(clients - 1))}d}" for i in range(clients)]


@settings
class Iid(Numbered):
    """Spread the examples at random and evenly: sizes differ by at most one.

    Example:
        >>> [len(rows) for rows in Iid().indices(np.zeros(10), None, 3, np.random.default_rng(0))]
        [4, 3, 3]
    """

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        enough(len(y), clients, 1)
        return np.array_split(rng.permutation(len(y)), clients)


@settings
class Contiguous(Numbered):
    """Cut the pool into consecutive blocks of rows, one for each client: sizes differ by at most one.

    For one long recording in the order of time. Between two clients ``gap`` rows are left out, so that no window
    reaches from one client into another; see :class:`idiolect.data.TimeBlocks`.

    Args:
        gap: rows left out between two clients, at least 0.

    Example:
        >>> [rows.tolist() for rows in Contiguous(gap=1).indices(np.zeros(8), None, 3, np.random.default_rng(0))]
        [[0, 1], [3, 4], [6, 7]]
    """

    gap: int = 0
    in_order = True

    def __post_init__(self) -> None:
        if self.gap < 0:
            raise UsageError(f"gap is {self.gap}; give a number of rows, 0 or above")

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        positive("clients", clients)
        held = len(y) - self.gap * (clients - 1)
        if held < clients:
            raise UsageError(
                f"{len(y)} rows are too few for {clients} clients with gap={self.gap} rows between two of them; "
                "use fewer clients or a smaller gap"
            )
        blocks = np.array_split(np.arange(held), clients)
        return [rows + self.gap * place for place, rows in enumerate(blocks)]


@settings
class QuantitySkew(Numbered):
    """Spread the examples at random in unequal amounts: the shares are drawn from Dir(alpha).

    Args:
        alpha: concentration, above 0; small means very unequal sizes.
        minimum: fewest examples of a client; the largest clients give up what is missing.

    Reference: Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022.

    Example:
        >>> [len(rows) for rows in QuantitySkew(0.5).indices(np.zeros(99), None, 3, np.random.default_rng(0))]
        [30, 10, 59]
    """

    alpha: float
    minimum: int = 10

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        enough(len(y), clients, self.minimum)
        shares = rng.dirichlet(np.full(clients, self.alpha))
        return top_up(cut(rng.permutation(len(y)), shares), self.minimum, rng)


@settings
class ByDomain:
    """One or several clients per domain: the rows of each group are spread evenly over its clients.

    Args:
        clients_per_domain: how many clients share a domain.
        size: examples of each client, at most; None: all.

    Reference: Li et al., FedBN, ICLR 2021 (one client per domain).

    Example:
        >>> domain = np.array(["mnist", "usps", "usps", "mnist", "usps"])
        >>> ByDomain().names(domain, 0)
        ['mnist', 'usps']
        >>> [len(rows) for rows in ByDomain(size=2).indices(np.zeros(5), domain, 0, np.random.default_rng(0))]
        [2, 2]
    """

    clients_per_domain: int = 1
    size: int | None = None

    @property
    def in_order(self) -> bool:
        """See `Split`."""
        return self.clients_per_domain == 1

    def __post_init__(self) -> None:
        positive("clients_per_domain", self.clients_per_domain)
        positive("size", 1 if self.size is None else self.size)

    def names(self, group: Names | None, clients: int) -> list[str]:
        """Return the domains, sorted; several clients of one are ``domain-0``, ``domain-1`` and so on."""
        domains: list[str] = np.unique(_groups(group, "ByDomain")).tolist()
        if self.clients_per_domain == 1:
            return domains
        numbers = Numbered().names(None, self.clients_per_domain)
        return [f"{domain}-{number.removeprefix('client-')}" for domain in domains for number in numbers]

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        held: list[Rows] = []
        for rows in by_class(_groups(group, "ByDomain"), rng):
            enough(len(rows), self.clients_per_domain, 1)
            held += np.array_split(rows, self.clients_per_domain)
        return [rows[: self.size] for rows in held]


@settings
class ByClient:
    """Natural clients: each group of the pool (its client column, a speaker, a site) is one client.

    Args:
        minimum: groups with fewer examples are left out.

    Example:
        >>> ward = np.array(["b", "a", "b"])
        >>> ByClient().names(ward, 0), ByClient(minimum=2).names(ward, 0)
        (['a', 'b'], ['b'])
    """

    minimum: int = 1
    in_order = True

    def __post_init__(self) -> None:
        positive("minimum", self.minimum)

    def names(self, group: Names | None, clients: int) -> list[str]:
        """Return the groups that are large enough, sorted."""
        found, sizes = np.unique(_groups(group, "ByClient"), return_counts=True)
        if not (sizes >= self.minimum).any():
            raise UsageError(f"no client has {self.minimum} examples (the largest has {sizes.max()}); lower minimum")
        large: list[str] = found[sizes >= self.minimum].tolist()
        return large

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        return [rows for rows in by_class(_groups(group, "ByClient"), rng) if len(rows) >= self.minimum]


def by_class(y: NDArray[Any], rng: np.random.Generator) -> list[Rows]:
    """Return the rows of each class in random order, classes sorted."""
    if y.ndim != 1 or y.dtype.kind == "f":
        raise UsageError("this split needs one class number per example; for a regression use Iid or ByClient")
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(np.unique(y, return_inverse=True)[1][order])) + 1)


def cut(rows: Rows, shares: NDArray[np.float64]) -> list[Rows]:
    """Cut rows into consecutive pieces of the given shares, which sum to one; nothing is lost."""
    ends = np.round(shares.cumsum() * len(rows)).astype(int)
    return np.split(rows, ends[:-1])


def top_up(held: Sequence[Rows], minimum: int, rng: np.random.Generator) -> list[Rows]:
    """Move single rows from the largest clients to those below the minimum."""
    piles = [rng.permutation(rows).tolist() for rows in held]
    sizes = np.array([len(pile) for pile in piles])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            giver = int(sizes.argmax())
            piles[client].append(piles[giver].pop())
            sizes[client] += 1
            sizes[giver] -= 1
    return [np.array(pile, dtype=np.int64) for pile in piles]


def enough(examples: int, clients: int, minimum: int) -> None:
    """Refuse a split that would leave a client without its minimum."""
    positive("clients", clients)
    if examples < clients * minimum:
        raise UsageError(
            f"{examples} examples are too few for {clients} clients of at least {minimum}; use fewer clients"
        )


def _groups(group: Names | None, split: str) -> Names:
    if group is None:
        raise UsageError(f"{split} needs a pool with groups (a domain or client column); use another split")
    return group


def positive(name: str, value: float) -> None:
    """Refuse an argument that is not above 0, or not finite."""
    if not value > 0 or value == float("inf"):
        raise UsageError(f"{name} is {value}; give a number above 0")
