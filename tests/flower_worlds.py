"""A coordinator and sites in one process, over a fake of Flower's network; and the simulation they must equal."""

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
from torch.nn import functional as F

pytest.importorskip("flwr")

from flower_grid import Clock, FakeGrid, Killed

import idiolect
from idiolect import SGD, ClientData, Machine, Training, fit
from idiolect.compute.autograd import Model, seeded
from idiolect.compute.losses import Loss
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Sequential
from idiolect.flower.coordinator import connections, events, requests
from idiolect.flower.coordinator import coordinator as coordinator_module
from idiolect.flower.coordinator.coordinator import Coordinator
from idiolect.flower.coordinator.requests import WaitPolicy
from idiolect.flower.site import state
from idiolect.rounds.schedule import Cosine
from idiolect.running.evaluation import default_metrics
from idiolect.storage.run_directory import read_tensors
from idiolect.testing.worlds import fitted, network, population

TRAINING = Training(
    lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5), clip=5.0, schedule=Cosine(floor=0.1)
)
SMALL = {"ada": 9, "ben": 3, "cleo": 12, "dan": 5}


@dataclass
class World:
    """Sites and a coordinator, with the arguments of `server_app` and `client_app` and defaults for tests.

    Attributes:
        grid: the fake of Flower's grid.
        clock: the coordinator's time.
        models: client to the function that makes its network, if it differs from the coordinator's.
        config: client to the settings of its node, beside name and folder.
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
    loss: Loss = F.cross_entropy

    def __post_init__(self):
        self.clock, self.metrics = Clock(), default_metrics(self.loss)
        self.clients = {client: single(data) for client, data in population(dict(self.sizes)).items()}
        self.models, self.config = {}, defaultdict(dict)
        self.grid = self._grid()

    def _grid(self):
        grid, folder = FakeGrid(self.clock, self._site), str(self.folder / "sites")
        grid.config = lambda client: {"client-id": client, "state-dir": folder} | self.config[client]
        for client in self.clients:
            grid.start(client)
        return grid

    def _site(self, client):
        app = idiolect.flower.client_app
        model, data = self.models.get(client, self.network), lambda: self.clients[client]
        return app(model=model, data=data, loss=self.loss, metrics=self.metrics, parts=self.parts)

    def network(self):
        """Return the network of the coordinator."""
        return fitted(tiny(), self.method)

    def coordinator(self):
        """Return a coordinator for the run's directory."""
        policy = WaitPolicy(self.sites or len(self.sizes), self.quorum, self.deadline, self.give_up)
        rest = (self.grid, self.folder / "run", self.metrics, self.evaluate_every, policy)
        model = Model(seeded(self.network, self.seed), self.loss)
        return Coordinator(model, self.method, self.training, self.rounds, self.participation, self.seed, *rest)

    def play(self):
        """Play until the end of the run or a kill; return the coordinator, whose process has then ended."""
        coordinator = self.coordinator()
        with self.timed(), suppress(Killed):
            coordinator.play_all()
        return coordinator

    @property
    def run(self):
        """The name of the run."""
        return json.loads((self.folder / "run" / "config.json").read_text())["config"]["run"]

    def timed(self):
        """Have the coordinator use this clock, and write no report unless asked to."""
        patches = ExitStack()
        patches.callback(self.grid.locks.release, "/run/lock")
        for module in (coordinator_module, state):
            patches.enter_context(mock.patch.object(module, "lock_file", self.grid.locks.lock))
        for module in (connections, coordinator_module, events, requests):
            patches.enter_context(mock.patch.object(module, "time", self.clock))
        if not self.report:
            patches.enter_context(mock.patch.object(Coordinator, "_write_report"))
        return patches

    def simulated(self, absent=()):
        """Return the run of `idiolect.fit`; the results of (completed rounds, client) in `absent` do not count."""
        settings = {"rounds": self.rounds, "participation": self.participation, "seed": self.seed}
        settings |= {"training": self.training, "evaluate_every": self.evaluate_every, "metrics": self.metrics}
        settings["loss"] = self.loss
        machine, network = Machine(Without(absent), memory="ram"), seeded(self.network, self.seed)
        return fit(network, self.clients, self.method, machine=machine, **settings)

    def federation(self, absent=()):
        """Return the federation of `simulated` before its first round."""
        model = Model(seeded(self.network, self.seed), self.loss)
        rest = (self.rounds, self.participation, self.seed, self.clients, Without(absent))
        return Federation(model, self.method, self.training, *rest)

    def trained_federation(self, absent=()):
        """Return the same federation after all rounds."""
        federation = self.federation(absent)
        for _ in range(self.rounds):
            federation.play()
        return federation

    def state(self, client, after):
        """Return a client's memory after a round from its folder: tensors by part and name."""
        return read_tensors(self.folder / "sites" / client / self.run / f"state-{after:06}.safetensors")[0]

    def personal(self, client):
        """Return a client's personal model from its folder."""
        return read_tensors(self.folder / "sites" / client / self.run / "personal.safetensors")[0]

    def events(self):
        """Return the events in events.jsonl: pairs of client and text."""
        lines = (self.folder / "run" / "events.jsonl").read_text().splitlines()
        return [(event["client"], event["event"]) for event in map(json.loads, lines)]

    def events_of(self, client):
        """Return the events of a client, without those of joining."""
        return [text for name, text in self.events() if name == client and not text.startswith("joined with")]

    def status(self):
        """Return the status in status.json."""
        return json.loads((self.folder / "run" / "status.json").read_text())

    def trained(self):
        """Return (client, completed rounds, base round) of every message to train."""
        return [(client, played, base) for client, kind, played, base in self.grid.delivered if kind == "train"]


class Without(Sequential):
    """The sequential engine; some results are replaced by NaN, so that the federation drops them."""

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


def assert_same(world, coordinator, federation, clients=None):
    """Assert that sites and simulation have the same server state, memories and personal models, bit for bit."""
    assert coordinator.round == federation.round
    for part, tree in federation.server.items():
        assert torch.equal(coordinator.server[part].flat, tree.flat), f"the server's state of {part} differs"
    for client in clients or world.clients:
        known = coordinator.clients[client]
        found = world.state(client, known.base_round) if known.base_round else named_tensors(coordinator.fresh())
        assert_equal(found, named_tensors(federation.memory.get(client)), f"the memory of {client}")
        if federation.rows:
            rows = [named_tensors(server.rows.get(client)) for server in (coordinator, federation)]
            assert_equal(*rows, f"the row of {client}")
        personal = federation.model.tensors(federation.personal(client))
        assert_equal(world.personal(client), personal, f"the personal model of {client}")


def dropped(coordinator):
    """Return the clients whose results did not count, round by round."""
    return [sorted(record.get("dropped", {})) for record in coordinator.records]


def absent(coordinator):
    """Return the same as (completed rounds, client)."""
    return {(record["round"] - 1, client) for record in coordinator.records for client in record.get("dropped", {})}


def named_tensors(trees):
    """Return all tensors of trees by part, under their names in files."""
    return {f"{part}/{name}": t for part, tree in trees.items() for name, t in tree.items()}


def assert_equal(found, expected, what):
    assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{what}: {name}"
        assert torch.equal(found[name], tensor), f"{what}: {name} differs"
