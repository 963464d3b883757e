"""Clients and a server, one round after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Arrival, Trees
from idiolect.data import ClientData
from idiolect.engines.sequential import Engine, Sequential
from idiolect.rounds.batches import RngKey, assignment
from idiolect.rounds.client import Assignment, Outcome, client_round, deployed
from idiolect.rounds.server_state import ServerState
from idiolect.storage.memory import RamStore, Store


class Round(NamedTuple):
    """What one round was."""

    cohort: list[str]
    lr: float
    loss: float
    """Training loss, mean over the clients whose upload counted."""
    bytes_up: int
    bytes_down: int
    gradients: int
    """Gradients that the clients took whose upload counted."""
    dropped: dict[str, str]
    """Client to the reason its upload did not count."""


@dataclass
class Federation(ServerState):
    """Clients and a server in one process, at some round.

    Args:
        clients: the population.
        engine: how clients are trained and measured.
        keep: makes the store of memories from the memory of a client that has not trained yet.
        memory: what each client remembers.
        learner: the model as the engine differentiates it.

    The other arguments are those of `ServerState`, and come before these.
    """

    clients: Mapping[str, ClientData]
    engine: Engine = field(default_factory=Sequential)
    keep: Callable[[Trees], Store] = RamStore
    memory: Store = field(init=False)
    learner: Learner = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory = self.keep(self.fresh())
        self.learner = self.engine.learner(self.model)

    def cohort(self) -> list[str]:
        """Draw the clients of the coming round, without replacement; at least one."""
        return self.draw(self.names)

    @cached_property
    def names(self) -> list[str]:
        """Names of the clients, sorted once."""
        return sorted(self.clients)

    def assignment(self, client: str, purpose: str) -> Assignment:
        """Return what a client works from now, to train or to deploy."""
        where = RngKey(self.seed, purpose, client, self.round)
        data, memory = self.clients[client].train, self.memory.get(client)
        return assignment(self.model, self.training, data, where, self.sent(purpose), memory, self.lr)

    def train(self, work: Assignment) -> Outcome:
        """Train from an assignment; nothing is stored."""
        return client_round(self.method, self.learner, self.training, work)

    def deploy(self, work: Assignment) -> Tree:
        """Return the weights that predict, from an assignment made to deploy."""
        return deployed(self.method, self.learner, self.training, work)

    def play(self) -> Round:
        """Play one round: train the cohort, store what its clients remember, aggregate, one client at a time."""
        cohort, sent, population = self.cohort(), self.sent("train"), len(self.clients)
        played = Round(cohort, self.lr, 0.0, 0, len(cohort) * sum(tree.nbytes for tree in sent.values()), 0, {})
        longest_first = sorted(cohort, key=lambda client: -len(self.clients[client].train.y))
        losses: list[float] = []
        gradients: list[int] = []
        counted: list[str] = []
        ups: list[int] = []

        def arrivals() -> Iterator[Arrival]:
            for client, outcome in zip(longest_first, self.engine.train(self, longest_first), strict=True):
                ups.append(sum(tree.nbytes for tree in outcome.uploads.values()))
                reason = outcome.flaw()
                if reason:
                    played.dropped[client] = reason
                    continue
                self.memory.put(client, outcome.memory)
                losses.append(float(outcome.loss))
                gradients.append(int(outcome.gradients))
                counted.append(client)
                yield Arrival(outcome.uploads, len(self.clients[client].train.y), outcome.steps)
            if not losses:
                client, reason = next(iter(played.dropped.items()))
                raise UsageError(
                    f"round {self.round + 1}: no client's result is finite (client {client!r}: {reason}): "
                    "lower lr, or set clip"
                )

        mail = self.close(arrivals(), len(cohort) / population, population)
        told = sum(self._deliver(client, letters) for client, letters in zip(counted, mail, strict=True))
        return played._replace(
            loss=sum(losses) / len(losses),
            bytes_up=sum(ups),
            bytes_down=played.bytes_down + told,
            gradients=sum(gradients),
        )

    def _deliver(self, client: str, letters: Trees) -> int:
        """Put what the server tells a client alone with the client's memory; return its bytes."""
        if letters:
            self.memory.put(client, self.told(self.memory.get(client), letters))
        return sum(tree.nbytes for tree in letters.values())

    def personal(self, client: str) -> Tree:
        """Return the weights that predict for a client now."""
        return self.deploy(self.assignment(client, "deploy"))
