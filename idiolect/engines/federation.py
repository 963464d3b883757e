"""A federation in one process: a server, clients and an engine, one round after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.engines.base import Engine
from idiolect.engines.sequential import Sequential
from idiolect.rounds.batches import RngKey, assign
from idiolect.rounds.client import Assignment, Deployed, Worker
from idiolect.rounds.server import Upload
from idiolect.rounds.server_state import ServerState
from idiolect.storage.memory import Store, keep_in_ram


class Round(NamedTuple):
    """The record of one round."""

    cohort: list[str]
    lr: float
    loss: float
    """Mean training loss over the clients whose upload counted."""
    bytes_up: int
    bytes_down: int
    gradients: int
    """Gradients taken by the clients whose upload counted."""
    dropped: dict[str, str]
    """Reasons why uploads did not count, by client."""


@dataclass
class Federation(ServerState):
    """A server and its clients in one process, after some rounds.

    The arguments of `ServerState` come before these.

    Args:
        clients: the population.
        engine: trains and scores clients.
        keep: (name of the store, trees) -> store. It makes the store of memories from the memory of a client that has
            not trained yet, and the store of the server's rows from the row of such a client.
        memory: the memory of each client.
        learner: the engine's learner for the model.
    """

    clients: Mapping[str, ClientData]
    engine: Engine = field(default_factory=Sequential)
    keep: Callable[[str, Trees], Store] = keep_in_ram
    memory: Store = field(init=False)
    learner: Learner = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory, rows = self.keep("memory", self.fresh()), self.first_rows
        self.rows = self.keep("rows", rows) if rows else None
        self.learner = self.engine.learner(self.model)

    @property
    def worker(self) -> Worker:
        """Runs assignments."""
        return Worker(self.method, self.model, self.learner, self.training)

    def cohort(self) -> list[str]:
        """Draw the clients of the next round, without replacement; at least one."""
        return self.draw(self.population)

    @cached_property
    def population(self) -> Sequence[str]:
        """The names of the clients, sorted once."""
        return sorted(self.clients)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {client: place for place, client in enumerate(self.population)}

    def place(self, client: str) -> int:
        """Return a client's place in the population."""
        return self._places[client]

    def inputs_of(self, client: str) -> tuple[Trees, Trees]:
        """Return a client's memory and its messages."""
        return self.memory.get(client), self.first_messages | self.messages(client)

    def assignment(self, client: str, purpose: str) -> Assignment:
        """Return the inputs of a client's round, for the purpose ``"train"`` or ``"deploy"``."""
        key, data = RngKey(self.seed, purpose, client, self.round), self.clients[client]
        return assign(self.model, self.training, data, key, self.sent(purpose), *self.inputs_of(client), self.lr)

    def play(self) -> Round:
        """Play one round: train the cohort, store memories and aggregate uploads, one client at a time."""
        cohort, sent = self.cohort(), self.sent("train")
        down = len(cohort) * _nbytes(sent) + sum(_nbytes(self.messages(client)) for client in cohort)
        played = Round(cohort, self.lr, 0.0, 0, down, 0, {})
        longest_first = sorted(cohort, key=lambda client: -len(self.clients[client].train))
        losses: list[float] = []
        gradients: list[int] = []
        ups: list[int] = []

        def arrivals() -> Iterator[Upload]:
            for client, outcome in zip(longest_first, self.engine.train(self, longest_first), strict=True):
                ups.append(_nbytes(outcome.uploads))
                reason = outcome.flaw()
                if reason:
                    played.dropped[client] = reason
                    continue
                self.memory.put(client, outcome.memory)
                losses.append(float(outcome.loss))
                gradients.append(int(outcome.gradients))
                examples = len(self.clients[client].train)
                yield Upload(self.place(client), outcome.uploads, examples, outcome.steps)
            if not losses:
                client, reason = next(iter(played.dropped.items()))
                raise UsageError(
                    f"round {self.round + 1}: no client's result is finite (client {client!r}: {reason}): "
                    "lower lr, or set clip"
                )

        self.end_round(arrivals())
        mean = sum(losses) / len(losses)
        return played._replace(loss=mean, bytes_up=sum(ups), gradients=sum(gradients))

    def deployed(self, client: str) -> Deployed:
        """Return the weights that predict for a client now."""
        return self.worker.deploy(self.assignment(client, "deploy"))

    def personal(self, client: str) -> Tree:
        """Return the weights that predict for a client now, before they adapt to any input."""
        return self.deployed(client).weights


def _nbytes(trees: Trees) -> int:
    return sum(tree.nbytes for tree in trees.values())
