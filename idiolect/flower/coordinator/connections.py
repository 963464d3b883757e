"""Messages to sites and their replies, by client: sites come, go and come back under other node ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from idiolect.flower.protocol.arrays import WireError, nbytes
from idiolect.flower.protocol.messages import HELLO, Introduction, hear
from idiolect.flower.site.app import REFUSED

GREETING = 3600.0
"""Seconds that a site has to say who it is: it may load its data first."""

GREETED_AGAIN = 30.0
"""Seconds after which a site that refused, or failed, is asked again who it is: it may have been put right."""


@dataclass
class Line:
    """A site as it is reached now."""

    node: int
    introduction: Introduction
    online: bool = True
    last_seen: float = 0.0
    """Seconds since the epoch."""
    bytes_up: int = 0
    bytes_down: int = 0


class Call(NamedTuple):
    """A message that waits for its reply."""

    node: int
    client: str
    """Empty for a node that has not said yet who it is."""
    kind: str


class Reply(NamedTuple):
    """What came back."""

    client: str
    kind: str
    content: RecordDict | None
    """None if there is no reply and none will come."""
    why: str = ""
    """Why there is none, or why the site refuses."""
    refused: bool = False


class Connections:
    """The lines to all sites.

    Args:
        grid: Flower's.
        greeting: what a node is sent to learn which client it is.
        tell: takes a client's name, or an empty text, and a line for the people who run this.
    """

    def __init__(self, grid: Grid, greeting: Callable[[], RecordDict], tell: Callable[[str, str], None]) -> None:
        self._grid, self._greeting, self._tell = grid, greeting, tell
        self.lines: dict[str, Line] = {}
        self._nodes: dict[int, str] = {}
        self._again: dict[int, float] = {}
        self._open: dict[str, Call] = {}
        self._looked = -inf

    def look(self, every: float) -> None:
        """See who is there, at most once in `every` seconds; greet who is new or has come back."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        there = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        for client, line in self.lines.items():
            if line.online and line.node not in there:
                line.online = False
                self._tell(client, "offline")
        for node, since in there.items():
            if self._nodes.get(node) != since or self._again.get(node, inf) <= now:
                self._again.pop(node, None)
                for key in [key for key, call in self._open.items() if call.node == node]:
                    del self._open[key]  # went with the process that was to answer
                self._post(Call(node, "", HELLO), self._greeting(), GREETING)
        self._nodes = there

    def waits(self, client: str) -> bool:
        """Whether a message to this client has no reply yet."""
        return any(call.client == client for call in self._open.values())

    def online(self, client: str) -> bool:
        """Whether a client can be reached."""
        return client in self.lines and self.lines[client].online

    def send(self, client: str, kind: str, content: RecordDict, seconds: float) -> None:
        """Send a message that is void after some seconds."""
        line = self.lines[client]
        line.bytes_down += nbytes(content)
        self._post(Call(line.node, client, kind), content, seconds)

    def forget(self) -> None:
        """Do not wait for replies any longer, but for those of who says who it is."""
        self._open = {key: call for key, call in self._open.items() if call.kind == HELLO}

    def listen(self) -> Iterator[Reply]:
        """Yield the replies that are here; who says who it is gets a line."""
        for message in self._grid.pull_messages(list(self._open)) if self._open else ():
            call = self._open.pop(message.metadata.reply_to_message_id, None)
            if call is not None:
                yield from self._hear(call, message)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes of tensors that have come, and that have gone."""
        return sum(line.bytes_up for line in self.lines.values()), sum(line.bytes_down for line in self.lines.values())

    def _post(self, call: Call, content: RecordDict, seconds: float) -> None:
        message = Message(content, call.node, call.kind, ttl=seconds)
        for key in self._grid.push_messages([message]):
            if key:
                self._open[key] = call

    def _hear(self, call: Call, message: Message) -> Iterator[Reply]:
        if message.has_error():
            self._looked = -inf  # it may be that the node has gone: look before anything is sent there again
            self._greet_again(call)
            yield Reply(call.client, call.kind, None, str(message.error.reason))
            return
        content = message.content
        refused = content.config_records.get(REFUSED)
        if refused is not None:
            self._greet_again(call)
            client = call.client or self._claimed(call.node, str(refused.get("client", "")))
            yield Reply(client, call.kind, None, str(refused.get("why", "")), True)
            return
        if call.kind != HELLO:
            line = self.lines[call.client]
            line.last_seen, line.bytes_up = time.time(), line.bytes_up + nbytes(content)
            yield Reply(call.client, call.kind, content)
            return
        try:
            told_by = hear(content, Introduction)
        except WireError as error:
            self._greet_again(call)
            yield Reply("", HELLO, None, str(error), True)
            return
        self._place(call.node, told_by)
        yield Reply(told_by.client, HELLO, content)

    def _greet_again(self, call: Call) -> None:
        if call.kind == HELLO:
            self._again[call.node] = time.monotonic() + GREETED_AGAIN

    def _claimed(self, node: int, client: str) -> str:
        """Return the client that a node says it is, unless that one is at another node: nobody refuses for another."""
        line = self.lines.get(client)
        return "" if line and line.online and line.node != node else client

    def _place(self, node: int, told: Introduction) -> None:
        line = self.lines.get(told.client)
        if line is None:
            self.lines[told.client] = Line(node, told, last_seen=time.time())
        else:
            if line.online and line.node != node and line.node in self._nodes:
                self._tell(told.client, "here from another node: it has come back, or joined twice")
            for key in [key for key, call in self._open.items() if call.client == told.client and call.node != node]:
                del self._open[key]
            line.node, line.introduction, line.online, line.last_seen = node, told, True, time.time()
