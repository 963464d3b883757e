"""Label skew: rules that give each client some classes and withhold others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from idiolect.core.errors import UsageError
from idiolect.core.values import settings
from idiolect.data.partition import Names, Numbered, Rows, by_class, cut, enough, positive, top_up


@settings
class Dirichlet(Numbered):
    """Label skew: the examples of each class are shared out by Dir(alpha) over the clients.

    For each class, shares p ~ Dir(alpha · 1) over the clients; a client that already holds n / clients
    examples gets nothing of the classes that follow, which keeps sizes from running apart. Every example
    finds a client.

    Args:
        alpha: concentration, above 0; 0.1 leaves a client about two classes, 100 is almost iid.
        minimum: fewest examples of a client; the largest clients give up what is missing, so that one draw is
            enough.

    Reference: Hsu, Qi, Brown, 2019 (arXiv 1909.06335); the rule per class: Yurochkin et al., ICML 2019.

    Example:
        >>> y = np.repeat([0, 1, 2], 100)
        >>> rows = Dirichlet(0.1).indices(y, None, 3, np.random.default_rng(0))
        >>> sum(len(r) for r in rows)
        300
    """

    alpha: float
    minimum: int = 10

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        enough(len(y), clients, self.minimum)
        held: list[list[Rows]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients)
        for rows in by_class(y, rng):
            shares = rng.dirichlet(np.full(clients, self.alpha)) * (sizes < len(y) / clients)
            if shares.sum() == 0:
                shares = (sizes < len(y) / clients).astype(float)
            for client, piece in enumerate(cut(rows, shares / shares.sum())):
                held[client].append(piece)
                sizes[client] += len(piece)
        return top_up([np.concatenate(pieces) for pieces in held], self.minimum, rng)


@settings
class DirichletEqual(Numbered):
    """Label skew at equal sizes: each client draws its own class mix from Dir(alpha), as in FedFSA.

    Every client gets n // clients examples. Until all have them, a random client that still wants some draws
    a class from its mix p_i ~ Dir(alpha · 1) among the classes that have examples left; a client whose whole
    mix is used up draws from what is left.

    Args:
        alpha: concentration, above 0.
        as_published: draw the class as the authors' code does, from the cumulative mix but never below its
            first entry: class 0 then comes only when the rest of a mix is used up, so that it is spread
            almost evenly over the clients, whatever alpha is. For reproducing their numbers.

    Reference: Xing et al., Flexible Sharpness-Aware Personalized Federated Learning, AAAI 2025.
    Differs: the authors' code redraws until it hits a class with examples, which need not end, and its last
        client loses examples; this does not.

    Example:
        >>> y = np.repeat([0, 1], 50)
        >>> rows = DirichletEqual(0.5).indices(y, None, 4, np.random.default_rng(0))
        >>> [len(r) for r in rows]
        [25, 25, 25, 25]
    """

    alpha: float
    as_published: bool = False

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        enough(len(y), clients, 1)
        stock = [rows.tolist() for rows in by_class(y, rng)]
        mix = rng.dirichlet(np.full(len(stock), self.alpha), size=clients)
        ladder = mix.cumsum(axis=1)
        quota = len(y) // clients
        held: list[list[int]] = [[] for _ in range(clients)]
        waiting = list(range(clients))
        luck = rng.random((quota * clients, 2))
        for who, which in luck:
            place = int(who * len(waiting))
            client = waiting[place]
            label = self._draw(ladder[client], which, stock)
            held[client].append(stock[label].pop())
            if not stock[label]:
                mix[:, label] = 0
                ladder = mix.cumsum(axis=1)
            if len(held[client]) == quota:
                waiting[place] = waiting[-1]
                waiting.pop()
        return [np.array(rows, dtype=np.int64) for rows in held]

    def _draw(self, ladder: NDArray[np.float64], luck: float, stock: list[list[int]]) -> int:
        """Draw a class from a cumulative mix; a mix without examples left gives way to the stock."""
        if self.as_published:
            label = int(np.searchsorted(ladder, ladder[0] + luck * (ladder[-1] - ladder[0]), side="left"))
        else:
            label = int(np.searchsorted(ladder, luck * ladder[-1], side="right"))
        if label < len(stock) and stock[label]:
            return label
        left = np.cumsum([len(rows) for rows in stock])
        return int(np.searchsorted(left, luck * left[-1], side="right"))


@settings
class Pathological(Numbered):
    """Each client holds examples of a fixed number of classes only.

    Every class is cut into as many equal shards as clients will hold it; a client gets one shard of each of
    its classes, which are drawn at random so that all shards find a holder.

    Args:
        classes_per_client: how many classes each client holds, exactly.

    Reference: McMahan et al., AISTATS 2017 (two shards per client); drawn by class as in FedFSA's code.

    Example:
        >>> y = np.repeat([0, 1, 2, 3], 30)
        >>> rows = Pathological(2).indices(y, None, 6, np.random.default_rng(0))
        >>> [len(np.unique(y[r])) for r in rows], [len(r) for r in rows]
        ([2, 2, 2, 2, 2, 2], [20, 20, 20, 20, 20, 20])
    """

    classes_per_client: int

    def __post_init__(self) -> None:
        positive("classes_per_client", self.classes_per_client)

    def indices(self, y: NDArray[Any], group: Names | None, clients: int, rng: np.random.Generator) -> list[Rows]:
        """Return each client's row numbers; see :meth:`Split.indices`."""
        enough(len(y), clients, 1)
        stock = by_class(y, rng)
        each = self.classes_per_client
        if each > len(stock):
            raise UsageError(f"classes_per_client is {each}, but there are only {len(stock)} classes")
        left = np.full(len(stock), clients * each // len(stock))
        left[rng.permutation(len(stock))[: clients * each % len(stock)]] += 1
        if any(len(rows) < parts for rows, parts in zip(stock, left, strict=True)):
            raise UsageError(f"a class has too few examples for {clients} clients with {each} classes each")
        shards = [np.array_split(rows, max(parts, 1)) for rows, parts in zip(stock, left, strict=True)]
        held = []
        for to_come in range(clients, 0, -1):
            forced = np.flatnonzero(left == to_come)
            free = np.flatnonzero((left > 0) & (left < to_come))
            chosen = np.concatenate([forced, rng.choice(free, each - len(forced), replace=False)])
            left[chosen] -= 1
            held.append(np.concatenate([shards[label].pop() for label in chosen]))
        return held
