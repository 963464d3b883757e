"""The app of a Ray actor: a message comes in, a client is trained or scored, and the result goes out."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, layout
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Score, Sequential
from idiolect.flower.protocol.arrays import read_trees, write_trees
from idiolect.flower.protocol.messages import EVALUATE, TRAIN
from idiolect.storage.memory import AtHand

ASSIGNMENT, NUMBERS, FAILED = "assignment", "numbers", "failed"
"""Records of a message: client and round; of a reply: numbers, or the reason for a failure."""

ClientArrays = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
"""A client's inputs and targets by split, as arrays in memory that all actors of a machine share."""


class Actor(ClientApp):
    """Train and score any client of a federation.

    Args:
        federation: a federation from `without_clients`.
        data: the examples of every client.
        score: the function that scores a client.
    """

    def __init__(self, federation: Federation, data: Mapping[str, ClientArrays], score: Score | None) -> None:
        super().__init__()
        self._federation, self._data, self._score = federation, data, score
        self._received, self._memory = federation.sent("train"), federation.memory.get("")
        self.train()(lambda message, _: Message(self.answer(TRAIN, message.content), reply_to=message))
        self.evaluate()(lambda message, _: Message(self.answer(EVALUATE, message.content), reply_to=message))

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the reply to a message; an exception is returned as a reply too."""
        client = str(content.config_records[ASSIGNMENT]["client"])
        try:
            self._load_state(client, content)
            return self._train(client) if kind == TRAIN else self._evaluate(client)
        except UsageError as error:
            return RecordDict({FAILED: ConfigRecord({"usage": str(error)})})
        except Exception as error:
            line = " ".join(f"client {client!r} failed in an actor: {type(error).__name__}: {error}".split())
            return RecordDict({FAILED: ConfigRecord({"line": line, "traceback": traceback.format_exc()})})

    def _load_state(self, client: str, content: RecordDict) -> None:
        """Set the state of the federation, as far as one client needs it, to that in a message."""
        federation, received = self._federation, read_rows(content, "received", self._received)
        federation.sent = lambda purpose: received  # type: ignore[method-assign]
        federation.memory = AtHand(read_rows(content, "memory", self._memory))  # type: ignore[assignment]
        federation.clients = {client: from_arrays(self._data[client], federation.model.device)}
        federation.round = int(content.config_records[ASSIGNMENT]["round"])  # type: ignore[arg-type]

    def _train(self, client: str) -> RecordDict:
        outcome = self._federation.train(self._federation.assignment(client, "train"))
        reply = _numbers([outcome.steps.item(), outcome.loss.item(), outcome.gradients.item()])
        write_rows(reply, "upload", outcome.uploads)
        write_rows(reply, "memory", outcome.memory)
        return reply

    def _evaluate(self, client: str) -> RecordDict:
        assert self._score
        return _numbers(self._score(self._federation, client, self._federation.personal(client)))


def write_rows(content: RecordDict, kind: str, trees: Trees) -> None:
    """Add trees to a message as one array each; the receiver has the same layouts."""
    write_trees(content, kind, {part: _row(tree) for part, tree in trees.items()})


def read_rows(content: RecordDict, kind: str, like: Trees) -> Trees:
    """Return the trees that `write_rows` has added, with the layouts of `like`."""
    rows = read_trees(content, kind, {part: _row(tree) for part, tree in like.items()})
    return {part: Tree(like[part].layout, row.flat) for part, row in rows.items()}


def _row(tree: Tree) -> Tree:
    return Tree(layout(("row",), (tree.flat.shape,)), tree.flat)


def without_clients(federation: Federation) -> Federation:
    """Return a copy of a federation without clients, their memories and its engine, to be sent to all actors."""
    twin = copy.copy(federation)
    twin.clients, twin.memory = {}, AtHand(federation.memory.get(""))  # type: ignore[assignment]
    twin.engine = Sequential()
    return twin


def to_arrays(data: ClientData) -> ClientArrays:
    """Return a client's examples as arrays."""
    return {split: (x.cpu().numpy(), y.cpu().numpy()) for split, (x, y) in data.splits().items()}


def from_arrays(arrays: ClientArrays, device: torch.device) -> ClientData:
    """Return a client's examples as tensors; they are copies, since shared memory must not be written to."""
    return ClientData(
        **{s: (torch.tensor(x, device=device), torch.tensor(y, device=device)) for s, (x, y) in arrays.items()}
    )


def _numbers(numbers: list[float]) -> RecordDict:
    return RecordDict({NUMBERS: ConfigRecord({NUMBERS: [float(number) for number in numbers]})})
