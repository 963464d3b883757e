"""A federation over Flower in one process: sites, a coordinator, and the simulation that they must equal."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("flwr")

from flower_net import Clock, Killed, Net

import idiolect
from idiolect import SGD, ClientData, Machine, Training, fit
from idiolect.compute.autograd import Model, seeded
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Sequential
from idiolect.flower.coordinator import connections as board
from idiolect.flower.coordinator import coordinator
from idiolect.flower.coordinator import events as chronicle
from idiolect.flower.coordinator import requests as desk
from idiolect.flower.coordinator.coordinator import Coordinator
from idiolect.flower.coordinator.requests import Patience
from idiolect.flower.site import state
from idiolect.rounds.optim import Cosine
from idiolect.storage.run_directory import read_tensors
from idiolect.testing.worlds import network, population

TRAINING = Training(
    lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5), clip=5.0, schedule=Cosine(floor=0.1)
)
SMALL = {"ada": 9, "ben": 3, "cleo": 12, "dan": 5}


@dataclass
class World:
    """Sites and a coordinator; all that `server_app` and `client_app` are told, with defaults that suit a test.

    Attributes:
        net: Flower's grid.
        clock: the coordinator's time.
        make: client to the function that makes its network, where it is not everybody's.
        config: client to what its node's settings say beside name and folder.
    """

    folder: Path
    method: idiolect.Method
    rounds: int = 4
    participation: float = 1.0
    sizes: Mapping[str, int] = field(default_factory=lambda: SMALL)
    seed: int = 0
    training: Training = TRAINING
    evaluate_every: int = 1
    quorum: int | None = None
    deadline: float = 600.0
    give_up: float = 1200.0
    parts: tuple = ()
    sites: int | None = None
    report: bool = False

    def __post_init__(self):
        self.clock, self.metrics = Clock(), (idiolect.accuracy,)
        self.clients = {client: single(data) for client, data in population(dict(self.sizes)).items()}
        self.make, self.config = {}, defaultdict(dict)
        self.net = self._net()
        self.run = None

    def _net(self):
        net = Net(self.clock, self._site)
        net.config = lambda client: {"client-id": client, "state-dir": str(self.folder / "sites")} | self.config[client]
        for client in self.clients:
            net.start(client)
        return net

    def _site(self, client):
        app = idiolect.flower.client_app
        return app(model=self.make.get(client, tiny), data=lambda: self.clients[client], parts=self.parts)

    def coordinator(self):
        """Start a coordinator in the run's directory."""
        patience = Patience(self.sites or len(self.sizes), self.quorum, self.deadline, self.give_up)
        rest = (self.net, self.folder / "run", self.metrics, self.evaluate_every, patience)
        model = Model(seeded(tiny, self.seed))
        return Coordinator(model, self.method, self.training, self.rounds, self.participation, self.seed, *rest)

    def play(self):
        """Play to the end, or until a kill; return the coordinator, of whose process nothing is left."""
        made = None
        with self.timed(), suppress(Killed):
            made = self.coordinator()
            self.run = made._run
            made.play_all()
        return made

    def timed(self):
        """Run the coordinator's parts by this clock, and draw no report unless asked to."""
        patches = ExitStack()
        patches.callback(self.net.locks.release, "/run/lock")
        for module in (coordinator, state):
            patches.enter_context(mock.patch.object(module, "locked", self.net.locks.take))
        for module in (board, chronicle, coordinator, desk):
            patches.enter_context(mock.patch.object(module, "time", self.clock))
        if not self.report:
            patches.enter_context(mock.patch.object(Coordinator, "_report"))
        return patches

    def simulated(self, absent=()):
        """Return the run of `idiolect.fit`; results of (rounds played, client) in `absent` do not count."""
        settings = {"rounds": self.rounds, "participation": self.participation, "seed": self.seed}
        settings |= {"training": self.training, "evaluate_every": self.evaluate_every, "metrics": self.metrics}
        return fit(tiny(), self.clients, self.method, machine=Machine(Without(absent), memory="ram"), **settings)

    def federation(self, absent=()):
        """Return the same as `simulated` before its first round."""
        model = Model(seeded(tiny, self.seed))
        rest = (self.rounds, self.participation, self.seed, self.clients, Without(absent))
        return Federation(model, self.method, self.training, *rest)

    def rehearsed(self, absent=()):
        """Return that federation after all rounds."""
        federation = self.federation(absent)
        for _ in range(self.rounds):
            federation.play()
        return federation

    def state(self, client, after):
        """Return a client's memory after a round, as its folder has it; tensors by part and name."""
        return read_tensors(self.folder / "sites" / client / self.run / f"state-{after:06}.safetensors")[0]

    def personal(self, client):
        """Return a client's own model, as its folder has it."""
        return read_tensors(self.folder / "sites" / client / self.run / "personal.safetensors")[0]

    def events(self):
        """Return what events.jsonl says: pairs of client and line."""
        lines = (self.folder / "run" / "events.jsonl").read_text().splitlines()
        return [(event["client"], event["what"]) for event in map(json.loads, lines)]

    def said(self, client):
        """Return what was said about a client, but for how it joined."""
        return [what for who, what in self.events() if who == client and not what.startswith("here, with")]

    def status(self):
        """Return what status.json says."""
        return json.loads((self.folder / "run" / "status.json").read_text())

    def trained(self):
        """Return (client, rounds played, base) of every message to train."""
        return [(client, played, base) for client, kind, played, base in self.net.log if kind == "train"]


class Without(Sequential):
    """One by one; some results are made useless, so that the federation drops them."""

    def __init__(self, absent=()):
        self.absent = set(absent)

    def train(self, federation, clients):
        for client, outcome in zip(clients, super().train(federation, clients), strict=True):
            if (federation.round, client) in self.absent:
                outcome = outcome._replace(uploads={p: t * float("nan") for p, t in outcome.uploads.items()})
            yield outcome


def tiny():
    """Return the network of the small worlds in float32."""
    return network(0).float()


def single(data):
    """Return a client's examples in float32."""
    return ClientData(**{split: (x.float(), y) for split, (x, y) in data.splits().items()})


def same(world, made, federation, clients=None):
    """Assert that a deployment and a simulation have the same slots, memories and personal models, bit for bit."""
    assert made.round == federation.round
    for part, tree in federation.server.items():
        assert torch.equal(made.server[part].flat, tree.flat), f"the server's slot of {part} differs"
    for client in clients or world.clients:
        remembered, base = federation.memory.get(client), made.memory[client].base
        found = world.state(client, base) if base else flat(made.fresh())
        mailed = {
            f"mail to {part}/{name}": t for part, tree in made.memory[client].mail.items() for name, t in tree.items()
        }
        equal(found | mailed, flat(remembered), f"the memory of {client}")
        own = federation.model.tensors(federation.personal(client))
        equal(world.personal(client), own, f"the personal model of {client}")


def dropped(made):
    """Return the clients of each round whose results did not count."""
    return [sorted(record.get("dropped", {})) for record in made.records]


def absent(made):
    """Return these as (rounds played, client)."""
    return {(record["round"] - 1, client) for record in made.records for client in record.get("dropped", {})}


def flat(slots):
    """Return all tensors of trees by part, under the names that files give them."""
    return {f"{part}/{name}": t for part, tree in slots.items() for name, t in tree.items()}


def equal(found, wanted, what):
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, f"{what}: {name}"
        assert torch.equal(found[name], tensor), f"{what}: {name} differs"
