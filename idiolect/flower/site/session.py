"""A client's place in one run: what it needs to take part in a round, and its personal state."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from flwr.app import RecordDict

from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.flower.protocol.arrays import WireError, holds, put, take
from idiolect.flower.protocol.messages import Brief, Introduction, Report, say
from idiolect.flower.site.state import SiteState
from idiolect.rounds.batches import RngKey, assignment
from idiolect.rounds.client import Assignment, client_round, deployed
from idiolect.rounds.server_state import ServerState, general
from idiolect.running.evaluation import held, measure
from idiolect.storage.run_directory import write_tensors


class Session:
    """What a client has in one run.

    Args:
        client: its name.
        center: the method and the training of the run on this site's model; its server slots give the form of what
            arrives and are otherwise unused.
        data: the client's examples, in the dtype of the model.
        state: where its memory is.
        metrics: what is measured beside the loss.
        restored: go on from the newest state at hand where the one asked for is not there.
    """

    def __init__(
        self,
        client: str,
        center: ServerState,
        data: ClientData,
        state: SiteState,
        metrics: Sequence[Metric],
        restored: bool,
    ) -> None:
        self.client, self.center, self.data, self.state = client, center, data, state
        self.metrics, self.restored = metrics, restored

    def introduce(self, told: Brief, content: RecordDict) -> RecordDict:
        """Say who this is, if its model is the coordinator's."""
        mine: dict[str, object] = dict(form_of(self.center))
        theirs: dict[str, object] = dict(content.config_records.get("model", {}))
        different = [
            f"{n} is {theirs.get(n, 'not there')!s} there, {mine.get(n, 'not there')} here"
            for n in {**theirs, **mine}
            if n != "initial" and mine.get(n) != theirs.get(n)
        ]
        if different:
            raise WireError(f"the models differ: {'; '.join(different[:3])}")
        names = [m.name for m in self.metrics]
        if told.metrics != names:
            raise WireError(f"the coordinator measures {told.metrics}, this site {names}: give both the same metrics")
        differs = ""
        if mine["initial"] != theirs.get("initial"):
            differs = "its initial weights are not the coordinator's: what is personal starts from its own"
        versions = [f"{n} {version(n)}" for n in ("idiolect", "flwr", "torch")] + [
            f"python {platform.python_version()}"
        ]
        return _reply(Introduction(self.client, len(self.data.train.y), versions, differs))

    def train(self, told: Brief, content: RecordDict) -> RecordDict:
        """Play one round, and before it measure what the last one has made."""
        began = time.monotonic()
        received, base = take(content, "slot", self.center.sent("train")), self._base(told)
        memory = self._memory(base, content)
        report = self._measured(told, content, received, memory) if told.evaluate else self._report()
        center, work = self.center, self._work("train", told, received, memory)
        outcome = client_round(center.method, center.model, center.training, work)
        flaw = outcome.flaw()
        if flaw:
            raise UsageError(f"{flaw}; its state stays as it was before this round")
        self.state.save(told.round + 1, base, outcome.memory)
        steps, loss, gradients = float(outcome.steps), float(outcome.loss), int(outcome.gradients)
        seconds = time.monotonic() - began
        reply = _reply(replace(report, steps=steps, loss=loss, gradients=gradients, seconds=seconds))
        put(reply, "upload", outcome.uploads)
        return reply

    def evaluate(self, told: Brief, content: RecordDict) -> RecordDict:
        """Measure what the rounds have made; nothing is trained."""
        began = time.monotonic()
        received = take(content, "slot", self.center.sent("train"))
        report = self._measured(told, content, received, self._memory(self._base(told), content))
        return _reply(replace(report, seconds=time.monotonic() - began))

    def _report(self) -> Report:
        return Report(self.client, len(self.data.train.y))

    def _base(self, told: Brief) -> int:
        """Return the round whose state this one starts from."""
        return self.state.newest(no_later=told.base) if self.restored else told.base

    def _memory(self, base: int, content: RecordDict) -> Trees:
        """Return the memory after a round, with what the coordinator tells this client alone."""
        memory = self.state.load(base)
        letters = {p.name: p.mail(self.center.start) for p in self.center.method.parts if p.confer}
        known = {name: tree for name, tree in letters.items() if holds(content, "mail", name)}
        return self.center.told(memory, take(content, "mail", known))

    def _measured(self, told: Brief, content: RecordDict, received: Trees, memory: Trees) -> Report:
        """Measure the weights that predict for this client, and keep them for its use."""
        if holds(content, "deploy", "share"):
            received = received | take(content, "deploy", {"share": received["share"]})
        model = self.center.model
        own = deployed(self.center.method, model, self.center.training, self._work("deploy", told, received, memory))
        self._keep(own, told)
        rows = measure(model, model.loss, self.data, own, general(model, received["share"]), self.metrics)
        sizes = {split: len(examples.y) for split, examples in held(self.data).items()}
        measured = replace(self._report(), splits=list(sizes), sizes=list(sizes.values()))
        return replace(measured, personalized=rows[0], generalized=rows[1])

    def _work(self, purpose: str, told: Brief, received: Trees, memory: Trees) -> Assignment:
        when = RngKey(told.seed, purpose, self.client, told.round)
        center = self.center
        return assignment(center.model, center.training, self.data.train, when, received, memory, told.lr)

    def _keep(self, weights: Tree, told: Brief) -> None:
        """Write this client's model as it would be loaded: the tensors of the module's ``state_dict``."""
        about = {"client": self.client, "run": told.run, "round": str(told.round), "method": self.center.method.name}
        write_tensors(self.state.folder / "personal.safetensors", self.center.model.tensors(weights), about, mode=0o600)


def form_of(center: ServerState) -> dict[str, str]:
    """Return what two models must have in common: dtype and shape by name; and ``initial``, a hash of the values."""
    layout, dtype = center.model.structure.layout, str(center.model.dtype).removeprefix("torch.")
    values = center.model.initial.flat.cpu().view(torch.uint8).numpy().data
    shapes = {name: f"{dtype} {tuple(shape)}" for name, shape in layout.shape_of.items()}
    return {**shapes, "initial": hashlib.sha256(values).hexdigest()}


def _reply(words: Introduction | Report) -> RecordDict:
    content = RecordDict()
    say(content, words)
    return content
