"""What stands in for Flower's network in one process: a clock that moves on demand, and sites that fail on cue."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from idiolect.flower.protocol.messages import Brief, hear
from idiolect.flower.site.app import Site
from idiolect.flower.site.state import locked

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # else Flower makes no message outside a run


class Killed(BaseException):
    """The process ends here: nothing of the library catches it."""


class Clock:
    """Stands in for the module `time`; what is due happens while somebody sleeps."""

    def __init__(self):
        self.now, self._due, self._order = 1e6, [], itertools.count()

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        end = self.now + max(seconds, 1e-3)
        while self._due and min(self._due)[0] <= end:
            first = min(self._due)
            self._due.remove(first)
            self.now = max(self.now, first[0])
            first[2]()
        self.now = end

    def after(self, seconds, act):
        self._due.append((self.now + seconds, next(self._order), act))


@dataclass
class Node:
    """A site's process, as the network knows it."""

    client: str
    site: Site
    stamp: str


@dataclass
class Box:
    """A message that was sent, and its reply, once there is one."""

    message: Message
    void: float
    reply: Message | None = None
    ready: float = float("inf")


class Locks:
    """What processes hold; the end of one lets go of it."""

    def __init__(self):
        self._held = {}

    def take(self, path):
        self._held[path] = lock = locked(path)
        return lock

    def release(self, end):
        for path in [path for path in self._held if str(path).endswith(end)]:
            lock = self._held.pop(path)
            with suppress(OSError):  # it may have been let go of, and the number be another file's
                if os.path.samestat(os.fstat(lock), path.stat()):
                    os.close(lock)


class Net(Grid):
    """What Flower's grid does: replies come once; a node that is offline, or a message that is void, gives an error.

    Attributes:
        nodes: those that are there, by id.
        plan: (client, kind, rounds played) to the faults that befall it when such a message comes, one a message.
        log: (client, kind, rounds played, base) of every message that a site has got.
        lines: counts the lines that sites run, and kills them.
        ends: whether the coordinator is killed when it listens next.
    """

    lines, ends = None, False

    def __init__(self, clock, start):
        self.clock, self._start = clock, start
        self.nodes, self.plan, self.log = {}, defaultdict(list), []
        self.locks = Locks()
        self._boxes, self._ids, self._stamps = {}, itertools.count(1), itertools.count(1)

    def start(self, client, node=None):
        """A site's process begins; without a node's id, under a new one."""
        node = next(self._ids) if node is None else node
        self.nodes[node] = Node(client, self._start(client), f"activated {next(self._stamps)}")
        return node

    def stop(self, client):
        """A site's process ends at once; return the ids that it had."""
        gone = [number for number, node in self.nodes.items() if node.client == client]
        for number in gone:
            del self.nodes[number]
        self.locks.release(f"/{client}/lock")
        return gone

    def get_nodes(self):
        return [SimpleNamespace(node_id=i, last_activated_at=node.stamp) for i, node in self.nodes.items()]

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        number = f"message {next(self._ids)}"
        message.metadata.__dict__["_message_id"] = number
        node = self.nodes.get(message.metadata.dst_node_id)
        box = self._boxes[number] = Box(message, self.clock.now + message.metadata.ttl)
        if node:
            self._deliver(node, box)
        return number

    def _deliver(self, node, box):
        kind, content = box.message.metadata.message_type, wired(box.message.content)
        told = hear(content, Brief)
        self.log.append((node.client, kind, told.round, told.base))
        faults = self.plan[node.client, kind, told.round]
        fault = faults.pop(0) if faults else lambda visit: visit.answer()
        visit = Visit(self, node, kind, content)
        try:
            found = fault(visit)
        except Killed:
            found = dies()(visit)
        except Exception as error:  # as Flower does
            found = Error(1, f"{type(error).__name__}: {error}")
        if found is not None:
            found = wired(found) if isinstance(found, RecordDict) else found
            box.reply, box.ready = Message(found, reply_to=box.message), self.clock.now + visit.seconds

    def pull_messages(self, numbers):
        if self.ends:
            self.ends = False
            raise Killed
        return [reply for number in numbers if (reply := self._pull(number))]

    def _pull(self, number):
        box = self._boxes[number]
        reason = None
        if box.message.metadata.dst_node_id not in self.nodes:
            reason = "Node Unavailable"
        elif self.clock.now > box.void:
            reason = "Message Unavailable"
        elif box.ready > self.clock.now:
            return None
        del self._boxes[number]
        return Message(Error(3, reason), reply_to=box.message) if reason else box.reply

    def set_run(self, run):
        raise NotImplementedError

    run = property(set_run)
    create_message = send_and_receive = set_run


def wired(content):
    """Return what is left of a message's content after Flower's bytes."""
    return recorddict_from_proto(recorddict_to_proto(content))


@dataclass
class Visit:
    """A message at a site: what a fault may do with it."""

    net: Net
    node: Node
    kind: str
    content: RecordDict
    seconds: float = 0.0
    """How long the answer takes."""

    def answer(self):
        """Let the site's app answer as ever."""
        message = Message(self.content, 1, self.kind)
        config = self.net.config(self.node.client)
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        before = sys.gettrace()
        sys.settrace(self.net.lines and self.net.lines.enter)
        try:
            return self.node.site(message, context).content
        finally:
            sys.settrace(before)


def dies(back=1.0, *, trained=False, anew=False):
    """The site's process ends before it replies, having trained or not, and is back after some seconds."""

    def fault(visit):
        if trained:
            visit.answer()
        [node] = visit.net.stop(visit.node.client)
        if back is not None:
            visit.net.clock.after(back, lambda: visit.net.start(visit.node.client, None if anew else node))

    return fault


def late(seconds):
    """The answer takes some seconds."""

    def fault(visit):
        visit.seconds = seconds
        return visit.answer()

    return fault


def after_which(act, fault=None):
    """Something happens at the site before the message is dealt with."""

    def first(visit):
        act()
        return fault(visit) if fault else visit.answer()

    return first


def ends(visit):
    """The coordinator is killed before it has the answer."""
    visit.net.ends = True
    return visit.answer()


def breaks(visit):
    """The site's app fails as no app of ours should."""
    return Error(1, "ZeroDivisionError:\n  somewhere")


def answers(make):
    """The site answers with whatever this makes of its reply."""

    def fault(visit):
        content = visit.answer()
        made = make(content)
        return made if isinstance(made, RecordDict) else content

    return fault


class Lines:
    """Notes the lines that run in some functions of the package, and kills the process at one of them.

    Args:
        functions: such as ``"flower/coordinator/coordinator.py:_play"``, or a whole file.
        kill: the how many-eth line it dies at.
    """

    def __init__(self, *functions, kill=None):
        self._functions, self._kill = functions, kill
        self.seen = []

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *error):
        sys.settrace(self._before)

    def enter(self, frame, event, arg):
        _, _, file = frame.f_code.co_filename.rpartition("/idiolect/")
        return self._line if {file, f"{file}:{frame.f_code.co_name}"} & set(self._functions) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) == self._kill:
                raise Killed
        return self._line

    def places(self):
        """Return for each line that ran one of the times that it did, as a number to kill at."""
        times = defaultdict(list)
        for number, place in enumerate(self.seen, 1):
            times[place].append(number)
        dice = random.Random(0)
        return [dice.choice(numbers) for _, numbers in sorted(times.items())]
