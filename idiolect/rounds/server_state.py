"""The server's half of a federation: what is sent to whom, and what the uploads of a round become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.core.rng import stream
from idiolect.core.tree import EMPTY, Tree, combine
from idiolect.core.types import Arrival, Central, Start, Trees
from idiolect.rounds.client import mail_of
from idiolect.rounds.server import broadcast, same_layout, server_round
from idiolect.rounds.training import Training


@dataclass
class ServerState:
    """A server at some round. Its clients may be here (`Federation`) or far away.

    Args:
        model: the model and its loss.
        method: what is exchanged and how clients train.
        training: local training.
        rounds: how many rounds the learning-rate schedule spans.
        participation: share of the population that takes part in a round, in (0, 1].
        seed: decides cohorts and the order of examples.
        round: rounds played.
        server: one slot per part.
    """

    model: Model
    method: Method
    training: Training
    rounds: int
    participation: float
    seed: int
    round: int = field(default=0, init=False)
    server: Trees = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.model.extended(self.method.attach)
        start = self.start
        self.server = {p.name: p.server(start) for p in self.method.parts}

    @property
    def start(self) -> Start:
        """What memories and server slots are made from."""
        start = Start(self.model.structure, self.model.initial, EMPTY)
        return Start(start.structure, start.weights, self.method.parts[0].server(start))

    def fresh(self) -> Trees:
        """Return the memory of a client that has not trained yet; a method that does not fit the model says so."""
        start = self.start
        memory = {p.name: p.memory(start) for p in self.method.parts}
        return memory | {mail_of(p): p.mail(start) for p in self.method.parts if p.confer}

    @property
    def lr(self) -> float:
        """Learning rate of the coming round; after the last one, that of the last."""
        return self.training.schedule(self.training.lr, min(self.round, self.rounds - 1), self.rounds)

    def draw(self, names: Sequence[str]) -> list[str]:
        """Draw the clients of the coming round from these, which are sorted, without replacement; at least one."""
        size = max(1, round(self.participation * len(names)))
        drawn = stream(self.seed, "cohort", self.round).choice(len(names), size, replace=False)
        return [names[i] for i in sorted(drawn.tolist())]

    def sent(self, purpose: str) -> Trees:
        """Return what the server sends now to a client that is to train, or to one that is to deploy."""
        sent = broadcast(self.method, self.server)
        return sent if purpose == "train" else {**sent, "share": self.server["share"]}

    def close(self, arrivals: Iterable[Arrival], share: float, population: int) -> list[Trees]:
        """Aggregate a round's uploads, consumed one by one; the next round begins.

        Args:
            arrivals: the uploads.
            share: clients of the cohort / population.
            population: number of clients there are.

        Returns:
            What each of the clients that arrived is told alone, by part.
        """
        shared = self.sent("train")["share"]
        central = Central(self.model.structure, shared, shared, self.lr, share, self.round)
        self.server, mail = server_round(self.method, self.server, arrivals, central, population)
        self.round += 1
        return mail

    def told(self, memory: Trees, letters: Trees) -> Trees:
        """Return a client's memory with what the server told it alone."""
        return memory | {mail_of(p): _letter(p, memory, letters) for p in self.method.parts if p.name in letters}

    def general(self) -> Tree | None:
        """Return the complete shared model, or None where the method keeps a part of every model personal."""
        return general(self.model, self.sent("deploy")["share"])


def general(model: Model, shared: Tree) -> Tree | None:
    """Return the complete model that shared tensors make, or None where they are not all that is exchangeable."""
    if not model.structure.exchangeable <= set(shared):
        return None
    return combine(model.structure.layout, model.initial, shared)


def _letter(part: Part, memory: Trees, letters: Trees) -> Tree:
    return same_layout(part, "mail", memory[mail_of(part)], letters[part.name])
