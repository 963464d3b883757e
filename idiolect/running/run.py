"""A run: a record of each round, and the models trained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError, did_you_mean, kind_of
from idiolect.core.method import Weighting
from idiolect.core.nest import Nest
from idiolect.core.values import whole
from idiolect.data import countable, holdings
from idiolect.engines.federation import Federation
from idiolect.report import RunSummary
from idiolect.rounds.schedule import written
from idiolect.running.adapting import Adapting
from idiolect.running.fingerprint import data_of, described, model_of
from idiolect.running.new_client import Rule, new_client
from idiolect.running.options import Output
from idiolect.running.playing import play_all
from idiolect.running.run_report import summary_of, write_run_report

if TYPE_CHECKING:
    import polars as pl

MOST_VALUES = 16
"""Tensors of a memory with more values than this are not shown."""


@dataclass
class Run:
    """A run, finished or under way: `fit` returns it, and passes it to `on_round` after each round.

    Attributes:
        federation: the state: server, memories, round.
        metrics: measured besides the loss; the first leads the tables.
        notes: messages from before training, such as clients left out.
        about: more entries for config.json, such as the command.
        records: one mapping per round, as written to metrics.jsonl.
        directory: where it is written, if it is.
    """

    federation: Federation
    metrics: tuple[Metric, ...]
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    directory: str | Path | None = None

    @property
    def round(self) -> int:
        """Rounds played so far."""
        return self.federation.round

    @property
    def weights(self) -> dict[str, Tensor]:
        """The shared tensors by name."""
        return {name: t.clone() for name, t in self.federation.server["share"].items()}

    def personal(self, client: str) -> nn.Module:
        """Return the module that predicts for a client: a copy of its own, in evaluation mode.

        If a part of the method is transductive it is an `Adapting`, which adapts to each batch it is given.

        Raises:
            UsageError: if there is no such client.
        """
        self._known(client)
        with torch.random.fork_rng(devices=[]):
            model, own = self.federation.model, self.federation.deployed(client)
            if own.adapt:
                return Adapting(model, own.weights, own.adapt)
            return model.module(own.weights).to(model.home)

    def new_client(self, rule: Rule = "pooled", x: Nest | None = None, weighting: Weighting = "samples") -> nn.Module:
        """Return a model for a client that never trained; see `idiolect.running.new_client.new_client`."""
        return new_client(self.federation, rule, x, weighting)

    def memory(self, client: str) -> dict[str, dict[str, Tensor]]:
        """Return what a client remembers: tensors by name, by part."""
        self._known(client)
        trees = self.federation.memory.get(client)
        return {part: {name: t.clone() for name, t in tree.items()} for part, tree in trees.items()}

    def inspect(self, client: str) -> dict[str, Any]:
        """Return the small tensors of a client's memory: for FedFSA the sensitivity of layers, and who was chosen.

        Tensors of the model are left out. A name such as ``sensitivity/0.weight`` is found under ``sensitivity``.
        """
        self._known(client)
        names = set(self.federation.model.structure.layout.names)
        found: dict[str, Any] = {}
        for tree in self.federation.memory.get(client).values():
            for name, tensor in tree.items():
                if name not in names and tensor.numel() <= MOST_VALUES:
                    group, _, rest = name.partition("/")
                    value = float(tensor) if tensor.numel() == 1 else tensor.tolist()
                    found |= {group: {**found.get(group, {}), rest: value}} if rest else {name: value}
        return found

    @property
    def lead(self) -> str:
        """Name of the metric that leads the tables."""
        return self.metrics[0].name if self.metrics else "loss"

    def table(self) -> pl.DataFrame:
        """Return one row per evaluated round: the leading metric over clients on test examples, and bytes.

        A number that no client could measure, since none has test examples, is null. For pandas, without pyarrow:
        ``pandas.DataFrame(run.table().to_dict(as_series=False))``.
        """
        import polars as pl

        rows = []
        for record in (r for r in self.records if "personalized" in r):
            own = record["personalized"]["test"][self.lead]
            shared = record["generalized"] and record["generalized"]["test"][self.lead]["mean"]
            rows.append(
                {
                    "round": record["round"],
                    f"personalized {self.lead}": own["mean"],
                    "by samples": own["by_samples"],
                    "std": own["std"],
                    "worst decile": own["worst_decile"],
                    f"generalized {self.lead}": shared,
                    "train loss": record["train_loss"],
                    "bytes up": record["bytes_up"],
                    "bytes down": record["bytes_down"],
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None).fill_nan(None)

    def summary(self, label: str | None = None) -> RunSummary:
        """Return the data for tables and reports of several runs; the label says if predictions are transductive."""
        name = label or self.federation.method.name
        if self.federation.method.transductive:
            name += " (transductive)"
        return summary_of(name, self.federation.seed, self.records, self.metrics)

    def report(self, path: str | Path, title: str | None = None) -> None:
        """Write the run as one HTML file that needs nothing else.

        Args:
            path: of the file.
            title: heading of the page; None for the method and the number of clients.

        Raises:
            UsageError: if the file cannot be written.
        """
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"path is text such as 'report.html', not {kind_of(path)}")
        federation = self.federation
        write_run_report(
            path,
            federation.method,
            federation.model,
            self.summary(),
            title=title or f"{federation.method.name}, {len(federation.clients)} clients",
            config={name: value for name, value in self.config().items() if name != "data"},
            holdings=self.holdings(),
        )

    def holdings(self) -> dict[str, dict[str, int]]:
        """Return how many training examples of each label each client has; empty where labels are no classes."""
        clients = self.federation.clients
        if not all(countable(data.train) for data in clients.values()):
            return {}
        return {c: {str(label): n for label, n in h.items()} for c, h in holdings(clients).items()}

    def play(
        self,
        rounds: int,
        evaluate_every: int = 1,
        progress: bool = False,
        on_round: Callable[[Run, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Play more rounds; a run that has a directory is continued there.

        Args:
            rounds: number of rounds, in addition to those that have been played.
            evaluate_every: rounds between evaluations of all clients; the last round is always evaluated.
            progress: show a progress bar with the time left.
            on_round: called after each round with the run and the round's record.

        Raises:
            UsageError: if the schedule would have given the rounds that were played other learning rates.
        """
        more, evaluate_every = whole("rounds", rounds, 0), whole("evaluate_every", evaluate_every, 1)
        self.federation.extend(self.round + more)
        output = Output(self.directory, resume=self.directory is not None, progress=progress)
        play_all(self, evaluate_every, output, on_round)

    def config(self, rounds: int | None = None) -> dict[str, Any]:
        """Return the settings that decide the run, or its first rounds."""
        federation = self.federation
        rounds = federation.rounds if rounds is None else rounds
        return {
            "method": repr(federation.method),
            "rounds": rounds,
            "participation": federation.participation,
            "seed": federation.seed,
            "training": repr(federation.training),
            "rates": written(federation.rates[: max(rounds, 1)]),
            "loss": described(federation.model.loss),
            "model": model_of(federation.model.training),
            "initial": hashlib.sha256(
                federation.model.initial.flat.cpu().view(torch.uint8).numpy().tobytes()
            ).hexdigest()[:16],
            "dtype": str(federation.model.dtype),
            "gradients": f"{federation.learner.way}, width {federation.engine.width}",
            "metrics": [metric.name for metric in self.metrics],
            "values": federation.model.structure.trainable.total,
            "clients": len(federation.clients),
            "examples": sum(len(data.train) for data in federation.clients.values()),
            "data": self._data,
            **({"transductive": list(federation.method.transductive)} if federation.method.transductive else {}),
            **self.about,
        }

    @cached_property
    def _data(self) -> dict[str, dict[str, str]]:
        """The fingerprint of each client's data."""
        return {client: data_of(data) for client, data in self.federation.clients.items()}

    def _known(self, client: object) -> None:
        if not isinstance(client, str):
            some = ", ".join(map(repr, list(self.federation.clients)[:3]))
            raise UsageError(f"client names are text, such as {some}, not {kind_of(client)}")
        if client not in self.federation.clients:
            hint = did_you_mean(client, self.federation.clients)
            raise UsageError(f"no client {client!r}{hint}; there are {len(self.federation.clients)}")
