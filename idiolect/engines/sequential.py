"""What an engine is; the reference engine: a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.tree import Tree
from idiolect.rounds.client import Outcome

if TYPE_CHECKING:
    from idiolect.engines.federation import Federation

Score = Callable[["Federation", str, Tree], list[float]]
"""(federation, client, the weights that predict for it) -> numbers."""


class Engine(Protocol):
    """How many clients are trained and measured: in which order, where, how many at once."""

    @property
    def width(self) -> int:
        """How many clients share a gradient's kernels."""
        ...

    def learner(self, model: Model) -> Learner:
        """Return how this engine differentiates a model."""
        ...

    def train(self, federation: Federation, clients: Sequence[str]) -> Iterator[Outcome]:
        """Train clients from the federation's present state; one outcome each, in the same order.

        An outcome may live in memory that is used again: it is good until the next one is asked for.
        """
        ...

    def measure(self, federation: Federation, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """Score clients under the weights that predict for them now, in the same order."""
        ...

    def close(self) -> None:
        """Let go of threads, processes and shared memory; the next call starts them anew."""
        ...


class Sequential:
    """Train one client after the other through ordinary autograd; every other engine must agree with this one."""

    width = 1

    def __repr__(self) -> str:
        return "sequentially, by autograd"

    def learner(self, model: Model) -> Learner:
        """Return the model itself."""
        return model

    def train(self, federation: Federation, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        return (federation.train(federation.assignment(client, "train")) for client in clients)

    def measure(self, federation: Federation, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        return (score(federation, client, federation.personal(client)) for client in clients)

    def close(self) -> None:
        """See `Engine`."""
