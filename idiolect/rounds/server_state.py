"""The state of the server, what it sends to clients, and how it aggregates their uploads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part, run_hook
from idiolect.core.rng import derive, stream
from idiolect.core.tree import EMPTY, Tree, combine
from idiolect.core.types import Central, Setup, Trees
from idiolect.rounds.schedule import rates
from idiolect.rounds.server import Upload, broadcast, message, server_round, tree_of
from idiolect.rounds.training import Training
from idiolect.storage.memory import Store


@dataclass
class ServerState:
    """A server after some rounds. Its clients are in this process (`Federation`) or on real sites.

    Args:
        model: the model and its loss.
        method: the method.
        training: settings of local training.
        rounds: number of rounds that the learning-rate schedule spans.
        participation: share of the population that takes part in a round, in (0, 1].
        seed: seed of cohorts, batches and all other randomness.
        round: rounds played.
        server: the state of each part; that of `share` is the shared tensors.
        rows: the rows of each client, by part that has rows.
    """

    model: Model
    method: Method
    training: Training
    rounds: int
    participation: float
    seed: int
    round: int = field(default=0, init=False)
    server: Trees = field(init=False)
    rows: Store | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.model = self.model.extended(self.method.attach)
        _ = self.model.structure.makers  # found before threads run modules
        setup = self.setup
        self.server = {
            p.name: tree_of(p, "server", run_hook(p, "server", setup)) if p.server else EMPTY for p in self.method.parts
        }

    @property
    def population(self) -> Sequence[str]:
        """The names of all clients; a client's place in it never changes."""
        return ("",)

    @property
    def capacity(self) -> int:
        """Number of clients that parts are prepared for (`Setup.population`)."""
        return len(self.population)

    def place(self, client: str) -> int:
        """Return a client's place in the population."""
        return self.population.index(client)

    @property
    def setup(self) -> Setup:
        """The inputs of the functions that make memories, states and rows."""
        share = self.method.parts[0].server
        setup = Setup(self.model.structure, self.model.initial, EMPTY, self.capacity)
        return replace(setup, shared=share(setup)) if share else setup

    def fresh(self) -> Trees:
        """Return the memory of a client that has not trained yet; raise if the method does not fit the model."""
        setup = self.setup
        return {
            p.name: tree_of(p, "memory", run_hook(p, "memory", setup)) if p.memory else EMPTY for p in self.method.parts
        }

    @cached_property
    def first_rows(self) -> Trees:
        """The server's row of a client that has not trained yet, by part that has rows."""
        setup = self.setup
        return {p.name: tree_of(p, "rows", run_hook(p, "rows", setup)) for p in self.method.parts if p.rows}

    @cached_property
    def rates(self) -> list[float]:
        """Learning rate of every round; raise if the schedule does not give one."""
        return rates(self.training.schedule, self.training.lr, max(self.rounds, 1))

    def extend(self, rounds: int) -> None:
        """Change the number of rounds.

        Raises:
            UsageError: if the schedule would have given the rounds that were played other learning rates.
        """
        played = self.rates[: self.round]
        longer = rates(self.training.schedule, self.training.lr, max(rounds, 1))
        if longer[: len(played)] != played:
            raise UsageError(
                f"schedule {self.training.schedule!r} depends on the number of rounds: with {rounds}, those that were "
                "played would have had other learning rates; start another run"
            )
        self.rounds, self.rates = rounds, longer

    @property
    def lr(self) -> float:
        """Learning rate of the next round; after the last round, that of the last."""
        return self.rates[min(self.round, len(self.rates) - 1)]

    def draw(self, names: Sequence[str]) -> list[str]:
        """Draw the clients of the next round from sorted names, without replacement; at least one."""
        size = max(1, round(self.participation * len(names)))
        drawn = stream(self.seed, "cohort", self.round).choice(len(names), size, replace=False)
        return [names[i] for i in sorted(drawn.tolist())]

    def sent(self, purpose: str) -> Trees:
        """Return what the server sends now to every client, for the purpose ``"train"`` or ``"deploy"``."""
        sent = broadcast(self.method, self.server, self._central(self.server["share"]))
        return sent if purpose == "train" else {**sent, "share": self.server["share"]}

    def messages(self, client: str) -> Trees:
        """Return what the server sends now to one client alone, by part; parts without a message are left out.

        Before a client's first round its row is not sent, since the client can make it (`first_messages`).
        """
        parts = [p for p in self.method.parts if p.rows]
        if not parts or self.rows is None:
            return {}
        known, rows = client in self.rows, self.rows.get(client)
        return {p.name: self._message(p, client, rows[p.name]) for p in parts if known or p.message}

    @cached_property
    def first_messages(self) -> Trees:
        """The messages that a client makes itself where it was sent none, by part: from the initial row."""
        rows = self.first_rows
        return {p.name: self._message(p, "", rows[p.name]) if p.rows else EMPTY for p in self.method.parts}

    def end_round(self, arrivals: Iterable[Upload]) -> None:
        """Aggregate a round's uploads, and go on to the next round.

        Args:
            arrivals: the uploads, consumed one by one.
        """
        central = self._central(self.sent("train")["share"])
        done = server_round(self.method, self.server, arrivals, central, len(self.population), self._rows_of)
        for k, client in enumerate(done.clients if done.rows else ()):
            assert self.rows is not None
            own = {part: Tree(rows.layout, rows.flat[k]) for part, rows in done.rows.items()}
            self.rows.put(self.population[client], own)
        self.server = done.server
        self.round += 1

    def general(self) -> Tree | None:
        """Return the complete shared model, or None if the method keeps tensors personal."""
        return general(self.model, self.server["share"])

    def _central(self, shared: Tree) -> Central:
        seed = derive(self.seed, "server", self.round)
        return Central(self.model.structure, shared, shared, self.lr, seed=seed, round=self.round)

    def _message(self, part: Part, client: str, row: Tree) -> Tree:
        place = self.place(client) if client else 0
        central = self._central(self.server["share"])
        view = replace(central, state=self.server[part.name], clients=(place,), rows=row)
        return message(part, replace(view, rows_of=lambda places: self._rows_of(places)[part.name]))

    def _rows_of(self, clients: Sequence[int]) -> Trees:
        first = self.first_rows
        rows = [self.rows.get(self.population[client]) if self.rows else first for client in clients] if first else []
        return {
            part: Tree(tree.layout, torch.stack([row[part].flat for row in rows]) if rows else tree.flat[None][:0])
            for part, tree in first.items()
        }


def general(model: Model, shared: Tree) -> Tree | None:
    """Return the complete model made of shared tensors, or None if some exchangeable tensor is not shared."""
    if not model.structure.exchangeable <= set(shared):
        return None
    return combine(model.structure.layout, model.initial, shared)
