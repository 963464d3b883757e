"""What happens in an actor of Ray: a message in, a client's round or its scores out."""

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
from idiolect.flower.protocol.arrays import put, take
from idiolect.flower.protocol.messages import EVALUATE, TRAIN
from idiolect.storage.memory import AtHand

FAILED = "failed"
"""The record of a reply that says why there is nothing else in it."""

Packed = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
"""A client's examples, split by split, as arrays that the actors of a machine read from the same memory."""


class Actor(ClientApp):
    """Trains and measures any client of a federation.

    Args:
        federation: without what changes from round to round, see `light`.
        data: every client's examples.
        score: what a client is measured by.
    """

    def __init__(self, federation: Federation, data: Mapping[str, Packed], score: Score | None) -> None:
        super().__init__()
        self._federation, self._data, self._score = federation, data, score
        self._received, self._memory = federation.sent("train"), federation.memory.get("")
        self.train()(lambda message, _: Message(self.answer(TRAIN, message.content), reply_to=message))
        self.evaluate()(lambda message, _: Message(self.answer(EVALUATE, message.content), reply_to=message))

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the reply to a message; a failure is a reply too."""
        client = str(content.config_records["told"]["client"])
        try:
            self._go_to(client, content)
            return self._trained(client) if kind == TRAIN else self._measured(client)
        except UsageError as error:
            return RecordDict({FAILED: ConfigRecord({"usage": str(error)})})
        except Exception as error:
            line = " ".join(f"client {client!r} failed in an actor: {type(error).__name__}: {error}".split())
            return RecordDict({FAILED: ConfigRecord({"line": line, "traceback": traceback.format_exc()})})

    def _go_to(self, client: str, content: RecordDict) -> None:
        """Bring the federation to the state that a message tells of, as far as a client sees it."""
        federation, received = self._federation, take_rows(content, "received", self._received)
        federation.sent = lambda purpose: received  # type: ignore[method-assign]
        federation.memory = AtHand(take_rows(content, "memory", self._memory))  # type: ignore[assignment]
        federation.clients = {client: _unpacked(self._data[client], federation.model.device)}
        federation.round = int(content.config_records["told"]["round"])  # type: ignore[arg-type]

    def _trained(self, client: str) -> RecordDict:
        out = self._federation.train(self._federation.assignment(client, "train"))
        reply = _numbers([out.steps.item(), out.loss.item(), out.gradients.item()])
        put_rows(reply, "upload", out.uploads)
        put_rows(reply, "memory", out.memory)
        return reply

    def _measured(self, client: str) -> RecordDict:
        assert self._score
        return _numbers(self._score(self._federation, client, self._federation.personal(client)))


def put_rows(content: RecordDict, kind: str, slots: Trees) -> None:
    """Add trees to a message, one array each: who reads them has the same layouts."""
    put(content, kind, {part: _row(tree) for part, tree in slots.items()})


def take_rows(content: RecordDict, kind: str, like: Trees) -> Trees:
    """Return the trees that `put_rows` added, in the form of `like`."""
    rows = take(content, kind, {part: _row(tree) for part, tree in like.items()})
    return {part: Tree(like[part].layout, row.flat) for part, row in rows.items()}


def _row(tree: Tree) -> Tree:
    return Tree(layout(("row",), (tree.flat.shape,)), tree.flat)


def light(federation: Federation) -> Federation:
    """Return a federation without clients, their memories and its engine: what every actor has."""
    twin = copy.copy(federation)
    twin.clients, twin.memory = {}, AtHand(federation.memory.get(""))  # type: ignore[assignment]
    twin.engine = Sequential()
    return twin


def packed(data: ClientData) -> Packed:
    """Return a client's examples as arrays."""
    return {split: (x.cpu().numpy(), y.cpu().numpy()) for split, (x, y) in data.splits().items()}


def _unpacked(arrays: Packed, device: torch.device) -> ClientData:
    """Return copies: what is read from common memory must not be written to."""
    return ClientData(
        **{s: (torch.tensor(x, device=device), torch.tensor(y, device=device)) for s, (x, y) in arrays.items()}
    )


def _numbers(numbers: list[float]) -> RecordDict:
    return RecordDict({"numbers": ConfigRecord({"numbers": [float(number) for number in numbers]})})
