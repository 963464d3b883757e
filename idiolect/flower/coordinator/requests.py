"""Requests to sites: send, wait, check the replies, and stop waiting when too few sites are left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from flwr.app import RecordDict

from idiolect.flower.coordinator.clients import Client, Clients
from idiolect.flower.coordinator.connections import Connections, Reply
from idiolect.flower.coordinator.events import Events, one_line, pluralize
from idiolect.flower.protocol.arrays import WireError
from idiolect.flower.protocol.messages import REGISTER

MAX_ATTEMPTS = 3
"""The same request is sent to a client at most this often in a round."""

RECONNECT_TIME = 120.0
"""After a restart, wait this many seconds for known clients to reconnect."""

T = TypeVar("T")


class TooFewSitesError(RuntimeError):
    """The run made no progress for too long."""


@dataclass(frozen=True)
class WaitPolicy:
    """The numbers of sites and results a coordinator waits for, and its time limits.

    Args:
        sites: number of sites that must join before the first round.
        quorum: number of results that complete a round; None for more than half of the cohort.
        deadline: maximum seconds of a round while enough sites are online.
        give_up: seconds without progress after which the run ends with an error.
        poll: seconds between two checks for replies.
    """

    sites: int = 2
    quorum: int | None = None
    deadline: float = 3600.0
    give_up: float = 3600.0
    poll: float = 0.25

    def required_results(self, cohort: int) -> int:
        """Return the number of results that complete a round of a cohort of this size."""
        return min(cohort, cohort // 2 + 1 if self.quorum is None else self.quorum)


class Requests:
    """Send requests to sites and collect their replies.

    Args:
        connections: to the sites.
        clients: clients of the run; a site that registers under a new name is added.
        events: log and status for people.
        policy: how long to wait, and for how many.

    Attributes:
        failures: reason by client, for each client without a result in the last `collect`.
    """

    def __init__(self, connections: Connections, clients: Clients, events: Events, policy: WaitPolicy) -> None:
        self.connections, self.failures = connections, dict[str, str]()
        self._clients, self._events, self._policy = clients, events, policy
        self._refusals: dict[str, str] = {}
        self._started = self._last_progress = time.monotonic()
        self._most_results = 0

    def wait_for_sites(self) -> None:
        """Wait until enough sites have joined for the first round."""
        while len(self._clients) < self._policy.sites:
            self.wait(f"{len(self._clients)} of {pluralize(self._policy.sites, 'site')} joined")

    def collect(
        self,
        clients: Sequence[str],
        kind: str,
        content: Callable[[str], RecordDict],
        read: Callable[[str, RecordDict], T],
    ) -> dict[str, T]:
        """Send a request to each client and return the results that arrive before the deadline, by client.

        While there are too few results, offline clients are waited for. A request that is lost with the site's process
        is sent again, to the node where the client is then. `failures` gets a reason for each client without a result.

        Args:
            clients: client names.
            kind: kind of the request.
            content: makes the request for a client.
            read: checks and returns the result in a client's reply; raises `WireError` if the reply is invalid.
        """
        required, self.failures = self._policy.required_results(len(clients)), {}
        results: dict[str, T] = {}
        attempts = dict.fromkeys(clients, 0)

        def unfinished() -> list[str]:
            return [c for c in clients if c not in results and c not in self.failures]

        end = time.monotonic() + self._policy.deadline
        while (waiting := unfinished()) and time.monotonic() < end:
            self.connections.refresh(4 * self._policy.poll)
            self._send(waiting, kind, content, attempts, end)
            self._receive(waiting, kind, read, results)
            left = max(0, end - time.monotonic())
            self.write_status(f"{len(results)} of {pluralize(len(clients), 'result')}, {left:.0f} s left")
            waiting = unfinished()
            if len(results) >= required and not any(map(self._may_reply, waiting)):
                break
            if waiting and len(results) < required and not any(map(self.connections.is_online, waiting)):
                self.wait(f"{len(results)} of {pluralize(required, 'required result')}")
                end = time.monotonic() + self._policy.deadline
            elif waiting:
                time.sleep(self._policy.poll)
        self.connections.drop_pending()
        for client in unfinished():
            reason = "deadline passed" if self.connections.is_online(client) else "offline"
            self._fail(client, self._refusals.get(client, reason))
        return results

    def wait(self, reason: str, polls: int = 1) -> None:
        """Wait for sites to join, and say what is missing.

        Args:
            reason: what is missing.
            polls: number of poll intervals to wait.

        Raises:
            TooFewSitesError: if there has been no progress for too long.
        """
        for _ in range(polls):
            left = self._policy.give_up - (time.monotonic() - self._last_progress)
            if left <= 0:
                self.write_status(f"gave up: {reason}")
                raise TooFewSitesError(f"{reason}; no progress for {self._policy.give_up:.0f} s")
            step = 10 if left < 100 else 60
            self._events.log(f"waiting: {reason}; giving up in {step * ceil(left / step)} s")
            self.write_status(f"waiting: {reason}; giving up in {left:.0f} s")
            self.connections.refresh(4 * self._policy.poll)
            for _ in self._replies():
                pass
            time.sleep(self._policy.poll)

    def write_status(self, phase: str) -> None:
        """Update the status file: the phase, and the state and traffic of each site."""
        sites: dict[str, dict[str, Any]] = {}
        for client in self._clients:
            sites[client] = {"state": self._state(client), "examples": self._clients[client].examples}
            if connection := self.connections.by_client.get(client):
                sites[client] |= {
                    "last_seen": connection.last_seen,
                    "bytes_up": connection.bytes_up,
                    "bytes_down": connection.bytes_down,
                }
        for client in self._refusals.keys() - sites.keys():
            sites[client] = {"state": self._refusals[client], "examples": 0}
        self._events.write_status(phase, sites)

    def round_completed(self) -> None:
        """Record progress: a round is complete."""
        self._last_progress, self._most_results = time.monotonic(), 0

    def _send(
        self,
        waiting: Sequence[str],
        kind: str,
        content: Callable[[str], RecordDict],
        attempts: dict[str, int],
        end: float,
    ) -> None:
        """Send the request to each client that is online and has no request pending."""
        for client in waiting:
            if not self.connections.is_online(client) or self.connections.is_pending(client):
                continue
            if client in self._refusals or attempts[client] == MAX_ATTEMPTS:
                self._fail(client, self._refusals.get(client, f"no reply to {MAX_ATTEMPTS} requests"))
            else:
                attempts[client] += 1
                self.connections.send(client, kind, content(client), max(1.0, end - time.monotonic()))

    def _receive(
        self, waiting: Sequence[str], kind: str, read: Callable[[str, RecordDict], T], results: dict[str, T]
    ) -> None:
        """Add the results that have arrived; a refusal or an invalid reply is a failure."""
        for reply in self._replies():
            failed = reply.content is None and not reply.refused  # the request may be sent again
            if reply.kind != kind or reply.client not in waiting or failed:
                continue
            try:
                if reply.content is None:
                    raise WireError(reply.reason)
                results[reply.client] = read(reply.client, reply.content)
                self._record_progress(len(results))
            except WireError as error:
                self._fail(reply.client, str(error))

    def _record_progress(self, results: int) -> None:
        """Record progress within a round, which may be repeated: more results than in all attempts before."""
        if results > self._most_results:
            self._last_progress, self._most_results = time.monotonic(), results

    def _replies(self) -> Iterator[Reply]:
        """Yield the replies to requests other than registrations, which are handled here."""
        for reply in self.connections.receive():
            if reply.kind == REGISTER:
                self._register(reply)
            else:
                if reply.content is None and not reply.refused:
                    self._events.log(f"no reply: {reply.reason}", reply.client)
                yield reply

    def _register(self, reply: Reply) -> None:
        if reply.content is None:
            if reply.refused and reply.client:
                self._refusals[reply.client] = one_line(reply.reason)
            self._events.log(f"{'refused' if reply.refused else 'no reply'}: {reply.reason}", reply.client)
            return
        registration = self.connections.by_client[reply.client].registration
        self._refusals.pop(reply.client, None)
        if reply.client not in self._clients:
            self._last_progress = time.monotonic()
            self._clients[reply.client] = Client(registration.examples)
        versions = ", ".join(registration.versions)
        self._events.log(f"joined with {pluralize(registration.examples, 'example')}; {versions}", reply.client)
        if registration.warning:
            self._events.log(registration.warning, reply.client)

    def _state(self, client: str) -> str:
        """Return the state of a client in a word, or the reason of its last failure."""
        if reason := self._refusals.get(client) or self.failures.get(client):
            return reason
        if not self.connections.is_online(client):
            return "offline"
        return "working" if self.connections.is_pending(client) else "ready"

    def _may_reply(self, client: str) -> bool:
        """Return whether a client is online, or may still reconnect after a restart of the coordinator."""
        restarted = time.monotonic() < self._started + RECONNECT_TIME and client not in self.connections.by_client
        return self.connections.is_online(client) or (restarted and client not in self._refusals)

    def _fail(self, client: str, reason: str) -> None:
        self.failures[client] = one_line(reason)
        self._events.log(f"no result: {reason}", client)
