"""A session: one client in one run, with its model, data and personal state."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

from flwr.app import RecordDict

from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.flower.protocol.arrays import WireError, has_tree, read_trees, write_trees
from idiolect.flower.protocol.messages import Instruction, Registration, Report, write_message
from idiolect.flower.protocol.model_form import INITIAL, form_differences, model_form
from idiolect.flower.site.state import SiteState
from idiolect.rounds.batches import RngKey, assign
from idiolect.rounds.client import Assignment, Worker
from idiolect.rounds.server_state import ServerState
from idiolect.running.evaluation import held, measure
from idiolect.storage.run_directory import write_tensors


class Session:
    """One client in one run.

    Args:
        client: its name.
        server_state: method and training of the run on this site's model; its trees only give the layouts of what
            the site receives.
        data: the client's examples, in the dtype of the model.
        state: the client's memories on disk.
        metrics: metrics beside the loss.
        restored: if the state that the coordinator asks for is missing, continue from the newest one before it.
    """

    def __init__(
        self,
        client: str,
        server_state: ServerState,
        data: ClientData,
        state: SiteState,
        metrics: Sequence[Metric],
        restored: bool,
    ) -> None:
        self.client, self.server_state, self.data, self.state = client, server_state, data, state
        self.metrics, self.restored = metrics, restored
        model = server_state.model
        self.worker = Worker(server_state.method, model, model, server_state.training)

    def register(self, instruction: Instruction, content: RecordDict) -> RecordDict:
        """Return name, number of examples and versions; refuse if model or metrics differ from the coordinator's."""
        ours = model_form(self.server_state)
        theirs: dict[str, object] = dict(content.config_records.get("model", {}))
        differences = form_differences(theirs, ours)
        if differences:
            raise WireError(f"the models differ: {'; '.join(differences[:3])}")
        metrics = [m.name for m in self.metrics]
        if instruction.metrics != metrics:
            raise WireError(
                f"the coordinator has the metrics {instruction.metrics}, this site {metrics}: use the same metrics"
            )
        warning = ""
        if ours[INITIAL] != theirs.get(INITIAL):
            warning = "the initial weights differ from the coordinator's: personal tensors start from the site's own"
        versions = [f"{n} {version(n)}" for n in ("idiolect", "flwr", "torch")]
        versions.append(f"python {platform.python_version()}")
        return _reply(Registration(self.client, len(self.data.train), versions, warning))

    def train(self, instruction: Instruction, content: RecordDict) -> RecordDict:
        """Train for one round; if asked, first evaluate the models after the last round."""
        started = time.monotonic()
        base_round = self._base_round(instruction)
        memory = self.state.load(base_round)
        report = self._evaluated(instruction, content, memory) if instruction.evaluate else self._report()
        outcome = self.worker.train(self._assignment("train", instruction, content, memory))
        flaw = outcome.flaw()
        if flaw:
            raise UsageError(f"{flaw}; the site keeps its state from before this round")
        self.state.save(instruction.round + 1, base_round, outcome.memory)
        steps, loss, gradients = float(outcome.steps), float(outcome.loss), int(outcome.gradients)
        seconds = time.monotonic() - started
        reply = _reply(replace(report, steps=steps, loss=loss, gradients=gradients, seconds=seconds))
        write_trees(reply, "upload", outcome.uploads)
        return reply

    def evaluate(self, instruction: Instruction, content: RecordDict) -> RecordDict:
        """Evaluate the models after the last round, without training."""
        started = time.monotonic()
        report = self._evaluated(instruction, content, self.state.load(self._base_round(instruction)))
        return _reply(replace(report, seconds=time.monotonic() - started))

    def _received(self, purpose: str, content: RecordDict) -> Trees:
        """Return what the server sends to every client."""
        received = read_trees(content, "broadcast", self.server_state.sent("train"))
        if purpose == "deploy" and has_tree(content, "deploy", "share"):
            received |= read_trees(content, "deploy", {"share": received["share"]})
        return received

    def _messages(self, content: RecordDict) -> Trees:
        """Return what the server sends to this client alone; for a part without a message, the first one."""
        first = self.server_state.first_messages
        sent = {part: tree for part, tree in first.items() if has_tree(content, "message", part)}
        return first | read_trees(content, "message", sent)

    def _report(self) -> Report:
        return Report(self.client, len(self.data.train))

    def _base_round(self, instruction: Instruction) -> int:
        """Return the round after which the state was saved that this round starts from."""
        return self.state.newest(no_later=instruction.base_round) if self.restored else instruction.base_round

    def _evaluated(self, instruction: Instruction, content: RecordDict, memory: Trees) -> Report:
        """Evaluate and save the personal model; evaluate the shared model if there is one."""
        work = self._assignment("deploy", instruction, content, memory)
        personal = self.worker.deploy(work)
        self._save_personal_model(personal.weights, instruction)
        personalized, generalized = measure(self.worker, self.data, personal, work.received["share"], self.metrics)
        sizes = {split: len(examples) for split, examples in held(self.data).items()}
        report = replace(self._report(), splits=list(sizes), sizes=list(sizes.values()))
        return replace(report, personalized=personalized, generalized=generalized)

    def _assignment(self, purpose: str, instruction: Instruction, content: RecordDict, memory: Trees) -> Assignment:
        key = RngKey(instruction.seed, purpose, self.client, instruction.round)
        received, messages = self._received(purpose, content), self._messages(content)
        model, training = self.server_state.model, self.server_state.training
        return assign(model, training, self.data, key, received, memory, messages, instruction.lr)

    def _save_personal_model(self, weights: Tree, instruction: Instruction) -> None:
        """Write the tensors of the personal model under the names of the module's ``state_dict``."""
        about = {"client": self.client, "run": instruction.run, "round": str(instruction.round)}
        about["method"] = self.server_state.method.name
        path = self.state.folder / "personal.safetensors"
        write_tensors(path, self.server_state.model.tensors(weights), about, mode=0o600)


def _reply(message: Registration | Report) -> RecordDict:
    content = RecordDict()
    write_message(content, message)
    return content
