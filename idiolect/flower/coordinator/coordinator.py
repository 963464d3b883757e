"""The coordinator: the server of the simulation, whose clients are sites that may be slow, faulty or offline."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from idiolect.compute.metrics import Metric
from idiolect.core.tree import counting
from idiolect.core.types import Trees
from idiolect.flower.coordinator.clients import Client, Clients
from idiolect.flower.coordinator.connections import Connections
from idiolect.flower.coordinator.events import Events, pluralize
from idiolect.flower.coordinator.requests import Requests, WaitPolicy
from idiolect.flower.coordinator.results import Expected, Result, read_result
from idiolect.flower.protocol.arrays import write_trees
from idiolect.flower.protocol.messages import EVALUATE, TRAIN, Instruction, write_message
from idiolect.flower.protocol.model_form import INITIAL, model_form
from idiolect.flower.system.files import lock_file
from idiolect.rounds.schedule import Constant, written
from idiolect.rounds.server import Upload
from idiolect.rounds.server_state import ServerState
from idiolect.running.describe import uploads
from idiolect.running.evaluation import Measured, over_clients
from idiolect.running.fingerprint import described, model_of
from idiolect.running.run_report import summary_of, write_run_report
from idiolect.storage import checkpoint
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import CONFIG, LOCK, RunDirectory, read_run


@dataclass
class Coordinator(ServerState):
    """A server whose clients are sites. The arguments of `ServerState` come before the following.

    Args:
        grid: Flower's grid.
        directory: directory of the run; a run that is there is resumed.
        metrics: metrics that sites compute beside the loss; reports show the first one.
        evaluate_every: rounds between two evaluations.
        wait_policy: how many sites and results are required, and how long to wait for them.
        clients: the clients that have joined.
        records: one mapping per round, as in metrics.jsonl.
    """

    grid: Grid
    directory: Path
    metrics: Sequence[Metric]
    evaluate_every: int
    wait_policy: WaitPolicy
    clients: Clients = field(init=False)
    records: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.clients = Clients()
        super().__post_init__()
        rows = self.first_rows
        self.rows = RamStore(rows) if rows else None
        self._model_form, self._upload_layouts = model_form(self), uploads(self.method, self.model)
        self._has_shared_model = self.general() is not None

    @property
    def population(self) -> Sequence[str]:
        """The clients in the order of their places."""
        return self.clients.population()

    @property
    def capacity(self) -> int:
        """The number of clients with which parts start: those that must join before the first round."""
        return self.wait_policy.sites

    @property
    def memory(self) -> Clients:
        """The clients. A checkpoint stores the attribute `memory` of a federation or coordinator."""
        return self.clients

    def config(self) -> dict[str, Any]:
        """Return the settings that determine the run."""
        return {
            "run": self._run_name,
            "method": repr(self.method),
            "training": repr(self.training),
            "rates": written(self.rates),
            "loss": described(self.model.loss),
            "model": model_of(self.model.training),
            "rounds": self.rounds,
            "participation": self.participation,
            "seed": self.seed,
            "initial": self._model_form[INITIAL][:16],
            "dtype": str(self.model.dtype),
            "metrics": [m.name for m in self.metrics],
            "evaluate_every": self.evaluate_every,
            "values": self.model.structure.trainable.total,
            **({"transductive": list(self.method.transductive)} if self.method.transductive else {}),
        }

    def open(self) -> None:
        """Lock the directory for this process, and start a run there or resume the one that is there.

        Raises:
            UsageError: if the directory holds another run or other files, or another process uses it.
        """
        if not (self.directory / CONFIG).exists():
            RunDirectory(self.directory)  # raises if the folder has other files; no lock file is created then
        self._lock = lock_file(self.directory / LOCK)
        resumed = (self.directory / CONFIG).exists()
        self._run_directory = RunDirectory(self.directory, resume=resumed)
        config = read_run(self.directory)[0]["config"] if resumed else {}
        self._run_name: str = config.get("run") or secrets.token_hex(8)
        if resumed:
            self.records = checkpoint.restore(self._run_directory, self, self.config())
        else:
            self._run_directory.write_config(self.config())
        self._events = Events(self.directory, self.rounds)
        self._events.round = self.round
        connections = Connections(self.grid, self._registration_request, self._events.log)
        self._requests = Requests(connections, self.clients, self._events, self.wait_policy)
        if resumed:
            self._events.log(f"resuming the run in {self.directory}")

    def play_all(self) -> None:
        """Open the run, play the rounds that are left, and have every site evaluate its final model.

        Raises:
            TooFewSitesError: if there has been no progress for too long.
            UsageError: if the directory cannot be used.
        """
        self.open()
        self._requests.wait_for_sites()
        while self.round < self.rounds:
            self._play_round()
        population = list(self.clients)
        read = self._reader(upload_layouts={}, evaluate=True)
        results = self._requests.collect(population, EVALUATE, self._instructions(evaluate=True), read)
        self._add_evaluation(results)
        self._write_report()
        final = f"{len(results)} of {pluralize(len(population), 'site')} have their final models"
        self._events.log(f"done: {final}; the report is {self.directory.resolve() / 'report.html'}")
        self._requests.write_status("done")

    def _play_round(self) -> None:
        """Play one round. If there are too few results, nothing changes, and the same round is played again."""
        started, lr, traffic = time.monotonic(), self.lr, self._requests.connections.traffic()
        if self.round == 0:
            self.clients.sort()
        cohort = self.draw(list(self.clients))
        evaluate = self.round > 0 and self.round % self.evaluate_every == 0
        read = self._reader(self._upload_layouts, evaluate)
        results = self._requests.collect(cohort, TRAIN, self._instructions(evaluate), read)
        required = self.wait_policy.required_results(len(cohort))
        if len(results) < required:
            missing = f"round {self.round + 1} got {len(results)} of {pluralize(required, 'required result')}"
            self._requests.wait(missing, polls=40)
            return
        if evaluate:
            self._add_evaluation(results)
        reports = [result.report for result in self._aggregate(results)]
        up, down = (now - before for now, before in zip(self._requests.connections.traffic(), traffic, strict=True))
        record = {
            "round": self.round,
            "cohort": cohort,
            "lr": lr,
            "seconds": time.monotonic() - started,
            "train_loss": sum(report.loss for report in reports) / len(reports),
            "bytes_up": up,
            "bytes_down": down,
            "gradients": sum(report.gradients for report in reports),
        }
        self.records.append(record | ({"dropped": dict(self._requests.failures)} if self._requests.failures else {}))
        self._run_directory.put(self.records[-1])
        checkpoint.save(self._run_directory, self)
        self._events.round = self.round
        self._requests.round_completed()
        count = f"{len(reports)} of {pluralize(len(cohort), 'site')}"
        self._events.log(f"{count}, loss {record['train_loss']:.4g}, {record['seconds']:.1f} s")

    def _aggregate(self, results: Mapping[str, Result]) -> list[Result]:
        """Aggregate the uploads of a round, and return its results, in the order in which the simulation adds them."""
        longest_first = sorted(results, key=lambda client: (-results[client].report.examples, client))
        self.end_round(self._upload(client, results[client]) for client in longest_first)
        for client in longest_first:
            self.clients[client] = Client(results[client].report.examples, self.round)
        return [results[client] for client in longest_first]

    def _upload(self, client: str, result: Result) -> Upload:
        steps = torch.tensor([result.report.steps], dtype=counting(self.model.dtype))
        return Upload(self.place(client), result.uploads, result.report.examples, steps)

    def _instruction(self, round: int, evaluate: bool) -> Instruction:
        return Instruction(
            run=self._run_name,
            method=repr(self.method),
            training=repr(replace(self.training, schedule=Constant())),  # sites are sent the rate of each round as lr
            seed=self.seed,
            round=round,
            lr=self.lr,
            base_round=0,
            evaluate=evaluate,
            metrics=[m.name for m in self.metrics],
        )

    def _registration_request(self) -> RecordDict:
        """Return the message that asks a site which client it is."""
        content = RecordDict({"model": ConfigRecord(dict(self._model_form))})
        write_message(content, self._instruction(round=0, evaluate=False))
        return content

    def _instructions(self, evaluate: bool) -> Callable[[str], RecordDict]:
        """Return the function that makes a client's message for this round."""
        instruction, common = self._instruction(self.round, evaluate), RecordDict()
        sent, share = self.sent("train"), self.sent("deploy")["share"]
        write_trees(common, "broadcast", sent)
        if evaluate and not torch.equal(share.flat, sent["share"].flat):
            write_trees(common, "deploy", {"share": share})

        def message(name: str) -> RecordDict:
            content, client = RecordDict(dict(common)), self.clients[name]
            write_message(content, replace(instruction, base_round=client.base_round))
            write_trees(content, "message", self.messages(name))
            return content

        return message

    def _reader(self, upload_layouts: Trees, evaluate: bool) -> Callable[[str, RecordDict], Result]:
        """Return the function that reads and checks a client's result."""
        expected = Expected(upload_layouts, evaluate, len(self.metrics), self._has_shared_model)

        def read(client: str, content: RecordDict) -> Result:
            examples = self._requests.connections.by_client[client].registration.examples
            return read_result(content, client, examples, expected)

        return read

    def _add_evaluation(self, results: Mapping[str, Result]) -> None:
        """Add the evaluations of sites to the record of the last completed round."""
        measured = {}
        for client, (report, _) in sorted(results.items()):
            sizes = dict(zip(report.splits, report.sizes, strict=True))
            measured[client] = Measured(sizes, report.personalized, report.generalized)
        evaluation = over_clients(measured, self.metrics)
        self.records[-1] |= evaluation
        self._run_directory.put(self.records[-1])
        metrics = {client: scores["personalized"] or {} for client, scores in evaluation["clients"].items()}
        self._events.metrics = {**self._events.metrics, **metrics}

    def _write_report(self) -> None:
        """Write the report of the run."""
        name = self.method.name + (" (transductive)" if self.method.transductive else "")
        write_run_report(
            self.directory / "report.html",
            self.method,
            self.model,
            summary_of(name, self.seed, self.records, self.metrics),
            title=f"{self.method.name}, {pluralize(len(self.clients), 'site')}",
            config=self.config(),
        )
