"""Connections to sites by client name: a site may leave and come back under another node id."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from idiolect.flower.protocol.arrays import WireError, array_bytes
from idiolect.flower.protocol.messages import REFUSED, REGISTER, Registration, read_message

REGISTRATION_TIMEOUT = 3600.0
"""Seconds in which a site must answer a registration request: it may load its data first."""

REGISTRATION_RETRY = 30.0
"""Seconds after which a site that refused or failed to register is asked again: the cause may have been fixed."""


@dataclass
class Connection:
    """The present connection to a client."""

    node: int
    registration: Registration
    online: bool = True
    last_seen: float = 0.0
    """Seconds since the epoch."""
    bytes_up: int = 0
    bytes_down: int = 0


class PendingRequest(NamedTuple):
    """A request without a reply yet."""

    node: int
    client: str
    """Empty for a node that has not registered yet."""
    kind: str


class Reply(NamedTuple):
    """The result of a request."""

    client: str
    kind: str
    content: RecordDict | None
    """None if the site refused or failed, or the request was lost."""
    reason: str = ""
    """The reason why there is no content."""
    refused: bool = False


class Connections:
    """The connections to all sites.

    Args:
        grid: Flower's grid.
        registration_request: makes the message that asks a node which client it is.
        log: takes a line for people, and a client name.

    Attributes:
        by_client: client name to connection.
    """

    def __init__(
        self, grid: Grid, registration_request: Callable[[], RecordDict], log: Callable[[str, str], None]
    ) -> None:
        self._grid, self._registration_request, self._log = grid, registration_request, log
        self.by_client: dict[str, Connection] = {}
        self._activated: dict[int, str] = {}
        self._retry_at: dict[int, float] = {}
        self._pending: dict[str, PendingRequest] = {}
        self._refreshed = -inf

    def refresh(self, interval: float) -> None:
        """Update which nodes are online, at most once per interval; ask new and restarted nodes to register.

        Args:
            interval: seconds.
        """
        now = time.monotonic()
        if now - self._refreshed < interval:
            return
        self._refreshed = now
        activated = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        for client, connection in self.by_client.items():
            if connection.online and connection.node not in activated:
                connection.online = False
                self._log("offline", client)
        for node, since in activated.items():
            if self._activated.get(node) != since or self._retry_at.get(node, inf) <= now:
                self._retry_at.pop(node, None)
                for key in [key for key, request in self._pending.items() if request.node == node]:
                    del self._pending[key]  # lost with the node's previous process
                self._push(PendingRequest(node, "", REGISTER), self._registration_request(), REGISTRATION_TIMEOUT)
        self._activated = activated

    def is_pending(self, client: str) -> bool:
        """Return whether a request to this client has no reply yet."""
        return any(request.client == client for request in self._pending.values())

    def is_online(self, client: str) -> bool:
        """Return whether this client can be reached."""
        return client in self.by_client and self.by_client[client].online

    def send(self, client: str, kind: str, content: RecordDict, timeout: float) -> None:
        """Send a request to a client; Flower drops it after `timeout` seconds."""
        connection = self.by_client[client]
        connection.bytes_down += array_bytes(content)
        self._push(PendingRequest(connection.node, client, kind), content, timeout)

    def drop_pending(self) -> None:
        """Ignore the replies to all requests sent so far, except registrations."""
        self._pending = {key: request for key, request in self._pending.items() if request.kind == REGISTER}

    def receive(self) -> Iterator[Reply]:
        """Yield the replies that have arrived; a site that registers gets a connection."""
        for message in self._grid.pull_messages(list(self._pending)) if self._pending else ():
            request = self._pending.pop(message.metadata.reply_to_message_id, None)
            if request is not None:
                yield self._reply(request, message)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes of tensors received and sent so far."""
        connections = self.by_client.values()
        return sum(c.bytes_up for c in connections), sum(c.bytes_down for c in connections)

    def _push(self, request: PendingRequest, content: RecordDict, timeout: float) -> None:
        message = Message(content, request.node, request.kind, ttl=timeout)
        for key in self._grid.push_messages([message]):
            if key:
                self._pending[key] = request

    def _reply(self, request: PendingRequest, message: Message) -> Reply:
        if message.has_error():
            self._refreshed = -inf  # the node may be gone: refresh before the next message to it
            self._schedule_retry(request)
            return Reply(request.client, request.kind, None, str(message.error.reason))
        content = message.content
        refusal = content.config_records.get(REFUSED)
        if refusal is not None:
            self._schedule_retry(request)
            client = request.client or self._unless_elsewhere(request.node, str(refusal.get("client", "")))
            return Reply(client, request.kind, None, str(refusal.get("reason", "")), True)
        if request.kind != REGISTER:
            connection = self.by_client[request.client]
            connection.last_seen, connection.bytes_up = time.time(), connection.bytes_up + array_bytes(content)
            return Reply(request.client, request.kind, content)
        try:
            registration = read_message(content, Registration)
        except WireError as error:
            self._schedule_retry(request)
            return Reply("", REGISTER, None, str(error), True)
        self._connect(request.node, registration)
        return Reply(registration.client, REGISTER, content)

    def _schedule_retry(self, request: PendingRequest) -> None:
        if request.kind == REGISTER:
            self._retry_at[request.node] = time.monotonic() + REGISTRATION_RETRY

    def _unless_elsewhere(self, node: int, client: str) -> str:
        """Return the client name in a node's refusal; empty if that client is online at another node."""
        connection = self.by_client.get(client)
        return "" if connection and connection.online and connection.node != node else client

    def _connect(self, node: int, registration: Registration) -> None:
        client = registration.client
        connection = self.by_client.get(client)
        if connection is None:
            self.by_client[client] = Connection(node, registration, last_seen=time.time())
            return
        if connection.online and connection.node != node and connection.node in self._activated:
            self._log("joined from another node: the site was restarted, or two sites use this name", client)
        for key in [key for key, r in self._pending.items() if r.client == client and r.node != node]:
            del self._pending[key]
        connection.node, connection.registration = node, registration
        connection.online, connection.last_seen = True, time.time()
