"""Clients and a server, one round after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from idiolect.client import Assignment, Outcome, Slots, client_round, deployed, mail_of
from idiolect.data import ClientData
from idiolect.engine.memory import RamStore, Store
from idiolect.engine.one_by_one import Engine, OneByOne
from idiolect.engine.stream import Shuffled
from idiolect.errors import UsageError
from idiolect.learner import Learner
from idiolect.method import Method
from idiolect.model import Model
from idiolect.rng import derive, stream
from idiolect.server import broadcast, same_layout, server_round
from idiolect.training import Training
from idiolect.tree import EMPTY, Tree, combine
from idiolect.words import Arrival, Central, Start


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
class Federation:
    """Clients and a server in one process, at some round.

    Args:
        model: the model and its loss.
        method: what is exchanged and how clients train.
        training: local training.
        clients: the population.
        rounds: how many rounds the learning-rate schedule spans.
        participation: share of the population that takes part in a round, in (0, 1].
        seed: decides cohorts and the order of examples.
        engine: how clients are trained and measured.
        keep: makes the store of memories from the memory of a client that has not trained yet.
        round: rounds played.
        server: one slot per part.
        memory: what each client remembers.
        learner: the model as the engine differentiates it.
    """

    model: Model
    method: Method
    training: Training
    clients: Mapping[str, ClientData]
    rounds: int
    participation: float
    seed: int
    engine: Engine = field(default_factory=OneByOne)
    keep: Callable[[Slots], Store] = RamStore
    round: int = 0
    server: Slots = field(init=False)
    memory: Store = field(init=False)
    learner: Learner = field(init=False)

    def __post_init__(self) -> None:
        parts = self.method.parts
        self.model = self.model.extended(self.method.attach)
        start = Start(self.model.anatomy, self.model.initial, EMPTY)
        start = Start(start.anatomy, start.weights, parts[0].server(start))
        self.server = {p.name: p.server(start) for p in parts}
        fresh = {p.name: p.memory(start) for p in parts}  # a method that does not fit the model says so now
        fresh |= {mail_of(p): p.mail(start) for p in parts if p.confer}
        self.memory = self.keep(fresh)
        self.learner = self.engine.learner(self.model)

    @property
    def lr(self) -> float:
        """Learning rate of the coming round; after the last one, that of the last."""
        return self.training.schedule(self.training.lr, min(self.round, self.rounds - 1), self.rounds)

    def cohort(self) -> list[str]:
        """Draw the clients of the coming round, without replacement; at least one."""
        size = max(1, round(self.participation * len(self.clients)))
        drawn = stream(self.seed, "cohort", self.round).choice(len(self.names), size, replace=False)
        return [self.names[i] for i in sorted(drawn.tolist())]

    @cached_property
    def names(self) -> list[str]:
        """Names of the clients, sorted once."""
        return sorted(self.clients)

    def assignment(self, client: str, purpose: str) -> Assignment:
        """Return what a client works from now, to train or to deploy."""
        x, y = self.clients[client].train
        words = (self.seed, purpose, client, self.round)
        batches = Shuffled(x, y, self.training.batch_size, self.model.anatomy.has_batch_norm, words)
        dice = torch.tensor(derive(*words, "dice"), device=self.model.device)
        return Assignment(self.sent(purpose), self.memory.get(client), batches, self.lr, dice, self.round)

    def sent(self, purpose: str) -> Slots:
        """Return what the server sends now to a client that is to train, or to one that is to deploy."""
        sent = broadcast(self.method, self.server)
        return sent if purpose == "train" else {**sent, "share": self.server["share"]}

    def train(self, work: Assignment) -> Outcome:
        """Train from an assignment; nothing is stored."""
        return client_round(self.method, self.learner, self.training, work)

    def deploy(self, work: Assignment) -> Tree:
        """Return the weights that predict, from an assignment made to deploy."""
        return deployed(self.method, self.learner, self.training, work)

    def play(self) -> Round:
        """Play one round: train the cohort, store what its clients remember, aggregate, one client at a time."""
        cohort, lr, sent = self.cohort(), self.lr, self.sent("train")
        played = Round(cohort, lr, 0.0, 0, len(cohort) * sum(tree.nbytes for tree in sent.values()), 0, {})
        longest_first = sorted(cohort, key=lambda client: -len(self.clients[client].train.y))
        shared, population = sent["share"], len(self.clients)
        central = Central(self.model.anatomy, shared, shared, lr, len(cohort) / population, self.round)
        losses: list[float] = []
        gradients: list[int] = []
        counted: list[str] = []
        ups: list[int] = []

        def arrivals() -> Iterator[Arrival]:
            for client, outcome in zip(longest_first, self.engine.train(self, longest_first), strict=True):
                ups.append(sum(tree.nbytes for tree in outcome.uploads.values()))
                reason = _not_finite(outcome)
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

        self.server, mail = server_round(self.method, self.server, arrivals(), central, population)
        self.round += 1
        told = sum(self._deliver(client, letters) for client, letters in zip(counted, mail, strict=True))
        return played._replace(
            loss=sum(losses) / len(losses),
            bytes_up=sum(ups),
            bytes_down=played.bytes_down + told,
            gradients=sum(gradients),
        )

    def _deliver(self, client: str, letters: Slots) -> int:
        """Put what the server tells a client alone with the client's memory; return its bytes."""
        if letters:
            memory = self.memory.get(client)
            for part in (p for p in self.method.parts if p.name in letters):
                memory[mail_of(part)] = same_layout(part, "mail", memory[mail_of(part)], letters[part.name])
            self.memory.put(client, memory)
        return sum(tree.nbytes for tree in letters.values())

    def personal(self, client: str) -> Tree:
        """Return the weights that predict for a client now."""
        return self.deploy(self.assignment(client, "deploy"))

    def general(self) -> Tree | None:
        """Return the complete shared model, or None where the method keeps a part of every model personal."""
        shared = self.sent("deploy")["share"]
        if not self.model.anatomy.exchangeable <= set(shared):
            return None
        return combine(self.model.anatomy.layout, self.model.initial, shared)


def _not_finite(outcome: Outcome) -> str:
    """Return what is wrong with an outcome, or an empty string."""
    kinds: Sequence[tuple[str, Slots]] = (("upload", outcome.uploads), ("memory", outcome.memory))
    for kind, slots in kinds:
        for part, tree in slots.items():
            if not (torch.isfinite(tree.flat.sum()) or torch.isfinite(tree.flat).all()):  # a finite sum says it all
                name = next(n for n in tree if not torch.isfinite(tree[n]).all())
                bad = int((~torch.isfinite(tree[name])).sum())
                return f"{bad} values of {name} are not finite in its {kind} ({part})"
    return ""
