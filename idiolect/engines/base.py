"""What an engine is, and what it needs to know of a federation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.rounds.client import Assignment, Deployed, Outcome, Worker

Score = Callable[[Worker, ClientData, Deployed, Tree], list[float]]
"""(worker, a client's examples, the weights that predict for it, the shared tensors) -> numbers."""


class Source(Protocol):
    """Where an engine gets its work from; a `Federation` is one."""

    @property
    def worker(self) -> Worker:
        """What runs an assignment."""
        ...

    @property
    def clients(self) -> Mapping[str, ClientData]:
        """The population."""
        ...

    @property
    def seed(self) -> int:
        """The seed of the run."""
        ...

    @property
    def round(self) -> int:
        """Rounds played."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of the coming round."""
        ...

    def sent(self, purpose: str) -> Trees:
        """Return what the server sends to every client, to ``"train"`` or to ``"deploy"``."""
        ...

    def received(self, client: str) -> tuple[Trees, Trees]:
        """Return a client's memory, and what the server sends to it alone."""
        ...

    def assignment(self, client: str, purpose: str) -> Assignment:
        """Return the inputs of a client's round."""
        ...


class Engine(Protocol):
    """How many clients are trained and measured: in which order, where, how many at once."""

    @property
    def width(self) -> int:
        """How many clients share a gradient's kernels."""
        ...

    def learner(self, model: Model) -> Learner:
        """Return how this engine differentiates a model."""
        ...

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """Train clients from the present state; one outcome each, in the same order.

        An outcome may live in memory that is used again: it is good until the next one is asked for.
        """
        ...

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """Score clients under the weights that predict for them now, in the same order."""
        ...

    def close(self) -> None:
        """Let go of threads, processes and shared memory; the next call starts them anew."""
        ...
