"""Asking sites and waiting for them: who is late, lost or refused, and when there are too few of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from flwr.app import RecordDict

from idiolect.flower.coordinator.clients import Client, Clients
from idiolect.flower.coordinator.connections import Connections, Reply
from idiolect.flower.coordinator.events import Events, counted, plain
from idiolect.flower.protocol.arrays import WireError
from idiolect.flower.protocol.messages import HELLO

TRIES = 3
"""A client's message is sent so often in a round before it is given up for that round."""

BACK = 120.0
"""Seconds after its start in which a coordinator does without nobody whom it knows and has not seen yet."""

T = TypeVar("T")


class TooFewSitesError(RuntimeError):
    """Nothing has moved for too long."""


@dataclass(frozen=True)
class Patience:
    """How long a coordinator waits, and for whom.

    Args:
        sites: so many must have joined before the first round.
        quorum: so many results complete a round; None for more than half of the cohort.
        deadline: seconds that a round may take while enough sites are there.
        give_up: seconds without progress, after which the coordinator ends with an error.
        poll: seconds between two looks at what has come.
    """

    sites: int = 2
    quorum: int | None = None
    deadline: float = 3600.0
    give_up: float = 3600.0
    poll: float = 0.25

    def enough(self, cohort: int) -> int:
        """Return how many results complete a round of so many clients."""
        return min(cohort, cohort // 2 + 1 if self.quorum is None else self.quorum)


class Requests:
    """Questions to sites and their answers.

    Args:
        board: the lines to them.
        known: the clients; who introduces himself becomes one.
        chronicle: what people see.
        patience: how long to wait.
    """

    def __init__(self, board: Connections, known: Clients, chronicle: Events, patience: Patience) -> None:
        self.board, self.lost = board, dict[str, str]()
        self._known, self._chronicle, self.patience = known, chronicle, patience
        self._refused: dict[str, str] = {}
        self._began = self._moved = time.monotonic()
        self._most = 0

    def gather(self) -> None:
        """Wait until enough sites have joined to begin."""
        while len(self._known) < self.patience.sites:
            self.wait(f"{len(self._known)} of {counted(self.patience.sites, 'site')} joined")

    def ask(
        self,
        clients: Sequence[str],
        kind: str,
        content: Callable[[str], RecordDict],
        check: Callable[[str, RecordDict], T],
    ) -> dict[str, T]:
        """Return the answers that come before the deadline, checked; `lost` says what became of the others.

        Who is offline is waited for as long as there are too few answers. A message that is lost with the process that
        was to answer is sent again, to the same client wherever it is now.
        """
        enough, self.lost = self.patience.enough(len(clients)), {}
        answers: dict[str, T] = {}
        tries = dict.fromkeys(clients, 0)
        end = time.monotonic() + self.patience.deadline
        while (todo := [c for c in clients if c not in answers and c not in self.lost]) and time.monotonic() < end:
            self.board.look(every=4 * self.patience.poll)
            for client in [c for c in todo if self.board.online(c) and not self.board.waits(c)]:
                if client in self._refused or tries[client] == TRIES:
                    self._lose(client, self._refused.get(client, f"no result after {TRIES} messages"))
                else:
                    tries[client] += 1
                    self.board.send(client, kind, content(client), max(1.0, end - time.monotonic()))
            for reply in self._replies():
                if reply.kind == kind and reply.client in todo and (reply.content is not None or reply.refused):
                    try:
                        answers[reply.client] = check(reply.client, _accepted(reply))
                        self._count(len(answers))
                    except WireError as error:
                        self._lose(reply.client, str(error))
            self.show(
                f"{len(answers)} of {counted(len(clients), 'result')}, {max(0, end - time.monotonic()):.0f} s left"
            )
            left = [c for c in todo if c not in answers and c not in self.lost]
            if len(answers) >= enough and not any(map(self._may_answer, left)):
                break
            if left and len(answers) < enough and not any(map(self.board.online, left)):
                self.wait(f"{len(answers)} of {counted(enough, 'result')} that a round needs")
                end = time.monotonic() + self.patience.deadline
            elif left:
                time.sleep(self.patience.poll)
        self.board.forget()
        for client in todo:
            if client not in answers and client not in self.lost:
                late = "past the deadline" if self.board.online(client) else "offline"
                self._lose(client, self._refused.get(client, late))
        return answers

    def wait(self, what: str, looks: int = 1) -> None:
        """Look who comes.

        Raises:
            TooFewSitesError: if nothing has moved for too long.
        """
        for _ in range(looks):
            left = self.patience.give_up - (time.monotonic() - self._moved)
            if left <= 0:
                self.show(f"gave up: {what}")
                raise TooFewSitesError(f"{what}; nothing has moved for {self.patience.give_up:.0f} s")
            step = 10 if left < 100 else 60
            self._chronicle.tell(f"waiting: {what}; ends in {step * ceil(left / step)} s")
            self.show(f"waiting: {what}; ends in {left:.0f} s")
            self.board.look(every=4 * self.patience.poll)
            for _ in self._replies():
                pass
            time.sleep(self.patience.poll)

    def show(self, phase: str) -> None:
        """Bring the status up to date."""
        sites: dict[str, dict[str, Any]] = {}
        for client in self._known:
            line = self.board.lines.get(client)
            state = (
                self._refused.get(client)
                or self.lost.get(client)
                or ("offline" if not self.board.online(client) else "at work" if self.board.waits(client) else "ready")
            )
            sites[client] = {"state": state, "examples": self._known[client].examples}
            if line:
                sites[client] |= {"last seen": line.last_seen, "up": line.bytes_up, "down": line.bytes_down}
        for client in self._refused.keys() - sites.keys():
            sites[client] = {"state": self._refused[client], "examples": 0}
        self._chronicle.show(phase, sites)

    def moved(self) -> None:
        """Take note of progress: a round is over."""
        self._moved, self._most = time.monotonic(), 0

    def _count(self, answers: int) -> None:
        """Take note of progress within a round that may be tried several times: more answers than ever."""
        if answers > self._most:
            self._moved, self._most = time.monotonic(), answers

    def _replies(self) -> Iterator[Reply]:
        """Yield the replies to questions; who introduces himself becomes a client."""
        for reply in self.board.listen():
            if reply.kind == HELLO:
                self._meet(reply)
            else:
                if reply.content is None and not reply.refused:
                    self._chronicle.tell(f"no reply: {reply.why}", reply.client)
                yield reply

    def _meet(self, reply: Reply) -> None:
        if reply.content is None:
            if reply.refused and reply.client:
                self._refused[reply.client] = plain(reply.why)
            self._chronicle.tell(f"{'refused' if reply.refused else 'no reply'}: {reply.why}", reply.client)
            return
        told = self.board.lines[reply.client].introduction
        self._refused.pop(reply.client, None)
        if reply.client not in self._known:
            self._moved = time.monotonic()
            self._known[reply.client] = Client(told.examples)
        versions = ", ".join(told.versions)
        self._chronicle.tell(f"here, with {counted(told.examples, 'example')}; {versions}", reply.client)
        if told.differs:
            self._chronicle.tell(told.differs, reply.client)

    def _may_answer(self, client: str) -> bool:
        """Whether a client is here, or may still find its way back to a coordinator that has just begun."""
        begun = time.monotonic() < self._began + BACK and client not in self.board.lines
        return self.board.online(client) or (begun and client not in self._refused)

    def _lose(self, client: str, why: str) -> None:
        self.lost[client] = plain(why)
        self._chronicle.tell(f"no result: {why}", client)


def _accepted(reply: Reply) -> RecordDict:
    if reply.content is None:
        raise WireError(reply.why)
    return reply.content
