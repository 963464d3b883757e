"""The app of a Ray actor: a message comes in, a client is trained or scored, and the result goes out."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.utils._pytree import tree_map

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.nest import mapped
from idiolect.core.tree import Tree, layout
from idiolect.core.types import Trees
from idiolect.data import ClientData, Examples
from idiolect.engines.base import Score, Source
from idiolect.flower.protocol.arrays import read_trees, write_trees
from idiolect.flower.protocol.messages import EVALUATE, TRAIN
from idiolect.rounds.batches import RngKey, assign
from idiolect.rounds.client import Assignment, Worker

ASSIGNMENT, NUMBERS, FAILED = "assignment", "numbers", "failed"
"""Records of a message: client and round; of a reply: numbers, or the reason for a failure."""

ClientArrays = Mapping[str, tuple[Any, Any]]
"""A client's inputs and targets by split, as arrays in memory that all actors of a machine share."""


class ActorSetup(NamedTuple):
    """What all actors of a federation have; its trees give the layouts of what messages hold."""

    worker: Worker
    seed: int
    received: Trees
    memory: Trees
    messages: Trees


class Actor(ClientApp):
    """Train and score any client of a federation.

    Args:
        setup: what all actors of a federation have.
        data: the examples of every client.
        score: the function that scores a client.
    """

    def __init__(self, setup: ActorSetup, data: Mapping[str, ClientArrays], score: Score | None) -> None:
        super().__init__()
        self._setup, self._data, self._score = setup, data, score
        self.train()(lambda message, _: Message(self.answer(TRAIN, message.content), reply_to=message))
        self.evaluate()(lambda message, _: Message(self.answer(EVALUATE, message.content), reply_to=message))

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the reply to a message; an exception is returned as a reply too."""
        client = str(content.config_records[ASSIGNMENT]["client"])
        try:
            data = from_arrays(self._data[client], self._setup.worker.model)
            work = self._assignment(kind, client, data, content)
            return self._train(work) if kind == TRAIN else self._evaluate(data, work)
        except UsageError as error:
            return RecordDict({FAILED: ConfigRecord({"usage": str(error)})})
        except Exception as error:
            line = " ".join(f"client {client!r} failed in an actor: {type(error).__name__}: {error}".split())
            return RecordDict({FAILED: ConfigRecord({"line": line, "traceback": traceback.format_exc()})})

    def _assignment(self, kind: str, client: str, data: ClientData, content: RecordDict) -> Assignment:
        """Return the inputs of a client's round from a message."""
        setup, fields = self._setup, content.config_records[ASSIGNMENT]
        played, lr = int(fields["round"]), float(fields["lr"])  # type: ignore[arg-type]
        key = RngKey(setup.seed, "train" if kind == TRAIN else "deploy", client, played)
        layouts = (("received", setup.received), ("memory", setup.memory), ("messages", setup.messages))
        received, memory, messages = (read_rows(content, name, like) for name, like in layouts)
        return assign(setup.worker.model, setup.worker.training, data, key, received, memory, messages, lr)

    def _train(self, work: Assignment) -> RecordDict:
        outcome = self._setup.worker.train(work)
        reply = _numbers([outcome.steps.item(), outcome.loss.item(), outcome.gradients.item()])
        write_rows(reply, "upload", outcome.uploads)
        write_rows(reply, "memory", outcome.memory)
        return reply

    def _evaluate(self, data: ClientData, work: Assignment) -> RecordDict:
        assert self._score
        worker = self._setup.worker
        return _numbers(self._score(worker, data, worker.deploy(work), work.received["share"]))


def write_rows(content: RecordDict, kind: str, trees: Trees) -> None:
    """Add trees to a message as one array each; the receiver has the same layouts."""
    write_trees(content, kind, {part: _row(tree) for part, tree in trees.items()})


def read_rows(content: RecordDict, kind: str, like: Trees) -> Trees:
    """Return the trees that `write_rows` has added, with the layouts of `like`."""
    rows = read_trees(content, kind, {part: _row(tree) for part, tree in like.items()})
    return {part: Tree(like[part].layout, row.flat) for part, row in rows.items()}


def _row(tree: Tree) -> Tree:
    return Tree(layout(("row",), (tree.flat.shape,)), tree.flat)


def setup_of(source: Source) -> ActorSetup:
    """Return what every actor of a federation has."""
    memory, messages = source.inputs_of(next(iter(source.clients)))
    return ActorSetup(source.worker, source.seed, source.sent("train"), memory, messages)


def to_arrays(data: ClientData) -> ClientArrays:
    """Return a client's examples as nests of arrays; NumPy has no bfloat16, so that travels as float32.

    Raises:
        UsageError: if they are not in memory.
    """
    return {s: (mapped(_array, e.x), mapped(_array, e.y)) for s, e in data.held().items()}


def _array(values: Tensor) -> Any:  # noqa: ANN401 - an array takes the place of a tensor
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def from_arrays(arrays: ClientArrays, model: Model) -> ClientData:
    """Return a client's examples as tensors for a model; they are copies: shared memory must not be written to."""

    def tensor(values: Any) -> Tensor:  # noqa: ANN401
        return torch.tensor(values, device=model.device, dtype=model.dtype if values.dtype.kind == "f" else None)

    found = {s: Examples(tree_map(tensor, x), tree_map(tensor, y)) for s, (x, y) in arrays.items()}
    return ClientData(found["train"], found.get("val"), found.get("test"))


def _numbers(numbers: list[float]) -> RecordDict:
    return RecordDict({NUMBERS: ConfigRecord({NUMBERS: [float(number) for number in numbers]})})
