"""The protocol of engines, and the protocol of what they get their work from."""

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
    """The work of an engine: clients and their assignments; a `Federation` is one."""

    @property
    def worker(self) -> Worker:
        """Runs assignments."""
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
        """Learning rate of the next round."""
        ...

    def sent(self, purpose: str) -> Trees:
        """Return what the server sends to every client, for the purpose ``"train"`` or ``"deploy"``."""
        ...

    def inputs_of(self, client: str) -> tuple[Trees, Trees]:
        """Return a client's memory and its messages."""
        ...

    def assignment(self, client: str, purpose: str) -> Assignment:
        """Return the inputs of a client's round."""
        ...


class Engine(Protocol):
    """A way to train and score many clients: in which order, where, and how many at once."""

    @property
    def width(self) -> int:
        """Number of clients per gradient: the width of a stack."""
        ...

    def learner(self, model: Model) -> Learner:
        """Return the learner of this engine for a model."""
        ...

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """Train clients from the present state; yield one outcome each, in the same order.

        The memory of an outcome may be used again: it is valid until the next outcome is requested.
        """
        ...

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """Score clients under the weights that predict for them now; yield in the same order."""
        ...

    def close(self) -> None:
        """Release threads, processes and shared memory; the next call starts them again."""
        ...
