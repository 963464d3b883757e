"""A fake of Flower's network in one process: a clock that is set by sleeping, and sites that fail as planned."""

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

from idiolect.flower.protocol.messages import Instruction, read_message
from idiolect.flower.site.app import Site
from idiolect.flower.system.files import lock_file

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # else Flower makes no message outside a run


class Killed(BaseException):
    """The process ends here: the library never catches this."""


class Clock:
    """A replacement of the module `time`; planned actions happen while the code under test sleeps."""

    def __init__(self):
        self.now, self._planned, self._order = 1e6, [], itertools.count()

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        end = self.now + max(seconds, 1e-3)
        while self._planned and min(self._planned)[0] <= end:
            first = min(self._planned)
            self._planned.remove(first)
            self.now = max(self.now, first[0])
            first[2]()
        self.now = end

    def after(self, seconds, act):
        self._planned.append((self.now + seconds, next(self._order), act))


@dataclass
class Node:
    """A site's process, as the network sees it."""

    client: str
    site: Site
    activated_at: str


@dataclass
class Request:
    """A message that was sent, and its reply."""

    message: Message
    expires: float
    reply: Message | None = None
    ready: float = float("inf")


class Locks:
    """The locks that processes hold; when a process ends, its locks are released."""

    def __init__(self):
        self._held = {}

    def lock(self, path):
        self._held[path] = lock = lock_file(path)
        return lock

    def release(self, end):
        for path in [path for path in self._held if str(path).endswith(end)]:
            lock = self._held.pop(path)
            with suppress(OSError):  # it may be closed already, and the number may belong to another file
                if os.path.samestat(os.fstat(lock), path.stat()):
                    os.close(lock)


class FakeGrid(Grid):
    """A fake of Flower's grid: each reply is returned once; an offline node or an expired message gives an error.

    Attributes:
        nodes: the nodes that are online, by id.
        faults: (client, kind, completed rounds) to the faults for such messages, one per message.
        delivered: (client, kind, completed rounds, base round) of every message that a site has received.
        tracer: traces the lines that sites run, and may kill them.
        kill_coordinator: whether the coordinator is killed when it next asks for replies.
    """

    tracer, kill_coordinator = None, False

    def __init__(self, clock, make_site):
        self.clock, self._make_site = clock, make_site
        self.nodes, self.faults, self.delivered = {}, defaultdict(list), []
        self.locks = Locks()
        self._requests, self._ids, self._activations = {}, itertools.count(1), itertools.count(1)

    def start(self, client, node=None):
        """Start a site's process, under a new id unless one is given."""
        node = next(self._ids) if node is None else node
        self.nodes[node] = Node(client, self._make_site(client), f"activated {next(self._activations)}")
        return node

    def stop(self, client):
        """Kill a site's process; return its ids."""
        stopped = [number for number, node in self.nodes.items() if node.client == client]
        for number in stopped:
            del self.nodes[number]
        self.locks.release(f"/{client}/lock")
        return stopped

    def get_nodes(self):
        return [SimpleNamespace(node_id=i, last_activated_at=node.activated_at) for i, node in self.nodes.items()]

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        number = f"message {next(self._ids)}"
        message.metadata.__dict__["_message_id"] = number
        node = self.nodes.get(message.metadata.dst_node_id)
        request = self._requests[number] = Request(message, self.clock.now + message.metadata.ttl)
        if node:
            self._deliver(node, request)
        return number

    def _deliver(self, node, request):
        kind, content = request.message.metadata.message_type, serialized(request.message.content)
        instruction = read_message(content, Instruction)
        self.delivered.append((node.client, kind, instruction.round, instruction.base_round))
        faults = self.faults[node.client, kind, instruction.round]
        fault = faults.pop(0) if faults else lambda delivery: delivery.answer()
        delivery = Delivery(self, node, kind, content)
        try:
            found = fault(delivery)
        except Killed:
            found = site_dies()(delivery)
        except Exception as error:  # as Flower does
            found = Error(1, f"{type(error).__name__}: {error}")
        if found is not None:
            found = serialized(found) if isinstance(found, RecordDict) else found
            request.reply = Message(found, reply_to=request.message)
            request.ready = self.clock.now + delivery.seconds

    def pull_messages(self, numbers):
        if self.kill_coordinator:
            self.kill_coordinator = False
            raise Killed
        return [reply for number in numbers if (reply := self._pull(number))]

    def _pull(self, number):
        request = self._requests[number]
        reason = None
        if request.message.metadata.dst_node_id not in self.nodes:
            reason = "Node Unavailable"
        elif self.clock.now > request.expires:
            reason = "Message Unavailable"
        elif request.ready > self.clock.now:
            return None
        del self._requests[number]
        return Message(Error(3, reason), reply_to=request.message) if reason else request.reply

    def set_run(self, run):
        raise NotImplementedError

    run = property(set_run)
    create_message = send_and_receive = set_run


def serialized(content):
    """Return a message's content after a round trip through Flower's bytes."""
    return recorddict_from_proto(recorddict_to_proto(content))


@dataclass
class Delivery:
    """A message that has arrived at a site; a fault decides what happens to it."""

    grid: FakeGrid
    node: Node
    kind: str
    content: RecordDict
    seconds: float = 0.0
    """Time until the reply is there."""

    def answer(self):
        """Have the site's app answer without a fault."""
        message = Message(self.content, 1, self.kind)
        config = self.grid.config(self.node.client)
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        before = sys.gettrace()
        sys.settrace(self.grid.tracer and self.grid.tracer.enter)
        try:
            return self.node.site(message, context).content
        finally:
            sys.settrace(before)


def site_dies(back=1.0, *, trained=False, new_node=False):
    """The site's process dies before it replies, having trained or not, and is back after some seconds."""

    def fault(delivery):
        if trained:
            delivery.answer()
        [node] = delivery.grid.stop(delivery.node.client)
        if back is not None:
            client = delivery.node.client
            delivery.grid.clock.after(back, lambda: delivery.grid.start(client, None if new_node else node))

    return fault


def replies_late(seconds):
    """The reply takes some seconds."""

    def fault(delivery):
        delivery.seconds = seconds
        return delivery.answer()

    return fault


def after(act, fault=None):
    """Something else happens first, then the message is answered, or another fault happens."""

    def both(delivery):
        act()
        return fault(delivery) if fault else delivery.answer()

    return both


def coordinator_dies(delivery):
    """The coordinator is killed before it receives the reply."""
    delivery.grid.kill_coordinator = True
    return delivery.answer()


def app_fails(delivery):
    """The site's app raises an exception."""
    return Error(1, "ZeroDivisionError:\n  somewhere")


def replies_with(change):
    """The site's reply is changed, or replaced by what `change` returns."""

    def fault(delivery):
        content = delivery.answer()
        changed = change(content)
        return changed if isinstance(changed, RecordDict) else content

    return fault


class LineTracer:
    """Record the lines that run in some functions of the package, and kill the process at one of them.

    Args:
        functions: such as ``"flower/coordinator/coordinator.py:_play_round"``, or whole files.
        kill: the number of the line at which the process is killed, counted as lines run.
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

    def sample(self):
        """Return one number to kill at for each line that ran."""
        numbers = defaultdict(list)
        for number, line in enumerate(self.seen, 1):
            numbers[line].append(number)
        generator = random.Random(0)
        return [generator.choice(choices) for _, choices in sorted(numbers.items())]
