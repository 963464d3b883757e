"""The reference engine: a loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.engines.base import Score, Source
from idiolect.rounds.client import Outcome


class Sequential:
    """An engine that trains one client after the other with ordinary autograd; all others must agree with it."""

    width = 1

    def __repr__(self) -> str:
        return "sequentially, by autograd"

    def learner(self, model: Model) -> Learner:
        """Return the model itself."""
        return model

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        return (source.worker.train(source.assignment(client, "train")) for client in clients)

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        for client in clients:
            work = source.assignment(client, "deploy")
            own, shared = source.worker.deploy(work), work.received["share"]
            yield score(source.worker, source.clients[client], own, shared)

    def close(self) -> None:
        """See `Engine`."""
