"""The coordinator: rounds over sites that may be slow, dead, wrong or new; the sums are the server's own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from idiolect.compute.metrics import Metric
from idiolect.core.types import Arrival, Trees
from idiolect.flower.coordinator.clients import Client, Clients
from idiolect.flower.coordinator.connections import Connections
from idiolect.flower.coordinator.events import Events, counted
from idiolect.flower.coordinator.requests import Patience, Requests
from idiolect.flower.protocol.arrays import WireError, put, take
from idiolect.flower.protocol.messages import EVALUATE, TRAIN, Brief, Report, hear, say
from idiolect.flower.site.session import form_of
from idiolect.flower.site.state import locked
from idiolect.report import RunSummary
from idiolect.rounds.client import not_finite
from idiolect.rounds.server_state import ServerState
from idiolect.running.describe import describe, uploads
from idiolect.running.evaluation import Measured, over_clients
from idiolect.storage import checkpoint
from idiolect.storage.run_directory import CONFIG, LOCK, RunDirectory, read_run


class Answer(NamedTuple):
    """A site's result, checked."""

    report: Report
    uploads: Trees


@dataclass
class Coordinator(ServerState):
    """A server whose clients are sites; the other arguments are those of `ServerState`, and come before these.

    Args:
        grid: Flower's.
        directory: the run is written there, and goes on from there.
        metrics: what sites measure beside the loss; the first leads.
        evaluate_every: rounds between two evaluations.
        patience: how long it waits, and for whom.
        memory: the clients.
        records: one mapping per round, as written to metrics.jsonl.

    Raises:
        UsageError: if the directory holds another run, or another coordinator is at work in it.
    """

    grid: Grid
    directory: Path
    metrics: Sequence[Metric]
    evaluate_every: int
    patience: Patience
    memory: Clients = field(init=False)
    records: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory = Clients({p.name: p.mail(self.start) for p in self.method.parts if p.confer})
        self._form, self._uploads = form_of(self), uploads(self.method, self.model)
        self._complete = self.general() is not None
        if not (self.directory / CONFIG).exists():
            RunDirectory(self.directory)  # a folder of other things is refused before there is a lock in it
        self._lock = locked(self.directory / LOCK)
        resumed = (self.directory / CONFIG).exists()
        self._store = RunDirectory(self.directory, resume=resumed)
        known = read_run(self.directory)[0]["config"] if resumed else {}
        self._run: str = known.get("run") or secrets.token_hex(8)
        if resumed:
            self.records = checkpoint.restore(self._store, self, self.config())
        else:
            self._store.write_config(self.config())
        self._chronicle = Events(self.directory, self.rounds)
        self._chronicle.round = self.round
        board = Connections(self.grid, self._greeting, lambda client, what: self._chronicle.tell(what, client))
        self._desk = Requests(board, self.memory, self._chronicle, self.patience)
        if resumed:
            self._chronicle.tell(f"going on with what {self.directory} holds")

    def config(self) -> dict[str, Any]:
        """Return the settings that decide the run."""
        return {
            "run": self._run,
            "method": repr(self.method),
            "training": repr(self.training),
            "rounds": self.rounds,
            "participation": self.participation,
            "seed": self.seed,
            "initial": self._form["initial"][:16],
            "dtype": str(self.model.dtype),
            "metrics": [m.name for m in self.metrics],
            "evaluate_every": self.evaluate_every,
            "values": self.model.structure.trainable.total,
        }

    def play_all(self) -> None:
        """Play the rounds that are left, then have every site measure its final model.

        Raises:
            TooFewSitesError: if nothing has moved for too long.
        """
        self._desk.gather()
        while self.round < self.rounds:
            self._play()
        everybody = list(self.memory)
        answers = self._desk.ask(everybody, EVALUATE, self._content(evaluate=True), partial(self._checked, {}, True))
        self._record(answers)
        self._report()
        held = f"{len(answers)} of {counted(len(everybody), 'site')} hold their final models"
        self._chronicle.tell(f"done: {held}; the report is {self.directory.resolve() / 'report.html'}")
        self._desk.show("done")

    def _play(self) -> None:
        """Play one round; it counts if enough results come."""
        began, lr, before = time.monotonic(), self.lr, self._desk.board.traffic()
        everybody = list(self.memory)
        cohort = self.draw(everybody)
        evaluate = self.round > 0 and self.round % self.evaluate_every == 0
        check = partial(self._checked, self._uploads, evaluate)
        answers = self._desk.ask(cohort, TRAIN, self._content(evaluate), check)
        enough = self.patience.enough(len(cohort))
        if len(answers) < enough:
            self._desk.wait(f"round {self.round + 1} had {len(answers)} of {counted(enough, 'result')} it needs", 40)
            return
        if evaluate:
            self._record(answers)
        longest_first = sorted(answers, key=lambda client: (-answers[client].report.examples, client))
        results = [answers[client] for client in longest_first]
        mail = self.close(map(self._arrival, results), len(cohort) / len(everybody), len(everybody))
        for client, result, letters in zip(longest_first, results, mail, strict=True):
            self.memory[client] = Client(result.report.examples, self.round, letters)
        up, down = (now - then for now, then in zip(self._desk.board.traffic(), before, strict=True))
        record = {
            "round": self.round,
            "cohort": cohort,
            "lr": lr,
            "seconds": time.monotonic() - began,
            "train_loss": sum(r.report.loss for r in results) / len(results),
            "bytes_up": up,
            "bytes_down": down,
            "gradients": sum(r.report.gradients for r in results),
        }
        self.records.append(record | ({"dropped": dict(self._desk.lost)} if self._desk.lost else {}))
        self._store.put(self.records[-1])
        checkpoint.save(self._store, self)
        self._chronicle.round = self.round
        self._desk.moved()
        said = f"{len(answers)} of {counted(len(cohort), 'site')}, loss {record['train_loss']:.4g}"
        self._chronicle.tell(f"{said}, {record['seconds']:.1f} s")

    def _content(self, evaluate: bool) -> Callable[[str], RecordDict]:
        """Return what each client is sent now."""
        names = [m.name for m in self.metrics]
        brief = Brief(
            self._run, repr(self.method), repr(self.training), self.seed, self.round, self.lr, 0, evaluate, names
        )
        common, slots, share = RecordDict(), self.sent("train"), self.sent("deploy")["share"]
        put(common, "slot", slots)
        if evaluate and not torch.equal(share.flat, slots["share"].flat):
            put(common, "deploy", {"share": share})

        def content(client: str) -> RecordDict:
            own, known = RecordDict(dict(common)), self.memory[client]
            say(own, replace(brief, base=known.base))
            put(own, "mail", known.mail)
            return own

        return content

    def _greeting(self) -> RecordDict:
        names = [m.name for m in self.metrics]
        content = RecordDict({"model": ConfigRecord(dict(self._form))})
        say(content, Brief(self._run, repr(self.method), repr(self.training), self.seed, 0, self.lr, 0, False, names))
        return content

    def _checked(self, form: Trees, measured: bool, client: str, content: RecordDict) -> Answer:
        """Return a result that can be used.

        Args:
            form: of what it uploads; empty where nothing is trained.
            measured: whether it was asked to measure.
            client: who was asked.
            content: what it says.

        Raises:
            WireError: if it cannot be used.
        """
        report = hear(content, Report)
        sent = take(content, "upload", form)
        known = self._desk.board.lines[client].introduction.examples
        if report.client != client:
            raise WireError(f"says that it is client {report.client!r:.80}: join again")
        if report.examples != known:
            raise WireError(f"has {report.examples} examples, and had {known} when it joined: join again")
        if form and not (report.steps >= 1 and all(map(isfinite, (report.steps, report.loss)))):
            raise WireError(f"a loss of {report.loss} after {report.steps} steps cannot be counted")
        splits = [split for split in ("val", "test") if measured and split in report.splits]
        own = len(splits) * (1 + len(self.metrics))
        lengths = len(report.sizes), len(report.personalized), len(report.generalized)
        if report.splits != splits or lengths != (len(splits), own, own if self._complete else 0):
            raise WireError("has not measured what it was asked to measure")
        if flaw := not_finite("upload", sent):
            raise WireError(flaw)
        return Answer(report, sent)

    def _arrival(self, answer: Answer) -> Arrival:
        steps = torch.tensor([answer.report.steps], dtype=self.model.dtype)
        return Arrival(answer.uploads, answer.report.examples, steps)

    def _record(self, answers: Mapping[str, Answer]) -> None:
        """Complete the last record with what the sites have measured."""
        measured = {}
        for client, (report, _) in sorted(answers.items()):
            sizes = dict(zip(report.splits, report.sizes, strict=True))
            measured[client] = Measured(sizes, report.personalized, report.generalized)
        found = over_clients(measured, self.metrics)
        self.records[-1] |= found
        self._store.put(self.records[-1])
        results = {client: scores["personalized"] or {} for client, scores in found["clients"].items()}
        self._chronicle.results = {**self._chronicle.results, **results}

    def _report(self) -> None:
        """Write the report of the run."""
        from idiolect.report.html import write_report  # draws with plotly, which takes its time to load

        lead = self.metrics[0] if self.metrics else None
        name, better = self.method.name, lead.higher_is_better if lead else False
        summary = RunSummary(name, self.seed, self.records, lead.name if lead else "loss", better)
        write_report(
            self.directory / "report.html",
            title=f"{name}, {counted(len(self.memory), 'site')}",
            runs=[summary],
            holdings={},
            groups=None,
            facts={name: str(value) for name, value in self.config().items()},
            describe={name: describe(self.method, self.model)},
        )
