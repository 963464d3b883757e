"""Workers that are processes: forked once, fed through shared memory, nothing pickled."""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.engines.explicit import explicit
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Score
from idiolect.rounds.batches import NoBatches
from idiolect.rounds.client import Assignment, Outcome, client_round
from idiolect.storage.memory import AtHand
from idiolect.storage.shared_memory import keep_freed_memory, shared


class Processes:
    """Train clients side by side in forked processes, each with one thread.

    The workers are forked from this process at the first call, and hold its clients and model as they are then. What
    changes from round to round, the server's slots and the client's memory, lies in memory that all share; results come
    back the same way. A client is named by a line of text.

    Args:
        workers: how many, at least 1.

    Raises:
        RuntimeError: if a worker fails, with its traceback, or dies.
    """

    width = 1

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._crew: _Pool | None = None

    def __repr__(self) -> str:
        return f"{self.workers} processes"

    def learner(self, model: Model) -> Learner:
        """Return explicit kernels, or the model."""
        return explicit(model)

    def train(self, federation: Federation, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        for desk, numbers in self._each(federation, clients, None):
            steps, loss, gradients = desk.received["share"].flat.new_tensor(numbers)
            yield Outcome(desk.uploads, desk.after, steps[None], loss, gradients[None])

    def measure(self, federation: Federation, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        for _, numbers in self._each(federation, clients, score):
            yield numbers

    def close(self) -> None:
        """See `Engine`."""
        if self._crew:
            self._crew.dismiss()
        self._crew = None

    def _each(
        self, federation: Federation, clients: Sequence[str], score: Score | None
    ) -> Iterator[tuple[_Buffers, list[float]]]:
        known = self._crew and self._crew.federation is federation
        if not self._crew or not known or (score is not None and score not in self._crew.scores):
            scores = [*(self._crew.scores if self._crew and known else ()), *([score] if score else ())]
            self.close()
            self._crew = _Pool(federation, self.workers, scores)
        try:
            yield from self._crew.work(clients, -1 if score is None else self._crew.scores.index(score))
        except BaseException:  # work is under way whose results nobody waits for
            self.close()
            raise


class _Buffers(NamedTuple):
    """Where one client's work lies: views of shared memory."""

    received: Trees
    before: Trees
    after: Trees
    uploads: Trees


class _Worker(NamedTuple):
    process: BaseProcess
    line: Connection
    jobs: deque[int]
    """What it was given and has not answered, oldest first."""


class _Pool:
    """The processes of one federation."""

    def __init__(self, federation: Federation, workers: int, scores: list[Score]) -> None:
        self.federation = federation
        self.scores = scores
        self._buffers = _buffers(federation, 2 * workers + 2)
        self._workers: list[_Worker] = []
        gc.freeze()  # a collection would write to every object, and so copy all that is shared with the workers
        fork = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = fork.Pipe()
            others = [ours, *(w.line for w in self._workers)]
            serve = fork.Process(target=_serve, args=(theirs, others, federation, self._buffers, scores), daemon=True)
            serve.start()
            theirs.close()
            self._workers.append(_Worker(serve, ours, deque()))

    def dismiss(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.line.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        gc.unfreeze()

    def work(self, clients: Sequence[str], score: int) -> Iterator[tuple[_Buffers, list[float]]]:
        """Have all clients worked on; give each result in order, good until the next is asked for."""
        for part, tree in self.federation.sent("train" if score < 0 else "deploy").items():
            self._buffers[0].received[part].flat.copy_(tree.flat)
        free, given = list(range(len(self._buffers))), iter(range(len(clients)))
        desk_of: dict[int, int] = {}
        answers: dict[int, list[float]] = {}
        coming = next(given, None)
        for wanted in range(len(clients)):
            while wanted not in answers:
                idle = min(self._workers, key=lambda w: len(w.jobs))
                while coming is not None and free and len(idle.jobs) < 2:
                    desk_of[coming] = free.pop()
                    self._send(idle, coming, clients[coming], desk_of[coming], score)
                    coming = next(given, None)
                    idle = min(self._workers, key=lambda w: len(w.jobs))
                for worker in self._ready():
                    answers[worker.jobs.popleft()] = self._receive(worker, clients)
            place = desk_of.pop(wanted)
            yield self._buffers[place], answers.pop(wanted)
            free.append(place)

    def _send(self, worker: _Worker, job: int, client: str, desk: int, score: int) -> None:
        for part, tree in self.federation.memory.get(client).items():
            self._buffers[desk].before[part].flat.copy_(tree.flat)
        worker.jobs.append(job)
        worker.line.send_bytes(json.dumps([score, desk, self.federation.round, client]).encode())

    def _ready(self) -> list[_Worker]:
        found = wait([w.line for w in self._workers])
        return [w for w in self._workers if w.line in found]

    def _receive(self, worker: _Worker, clients: Sequence[str]) -> list[float]:
        try:
            answer = json.loads(worker.line.recv_bytes())
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode or 0
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            doing = f"client {clients[worker.jobs[0]]!r}" if worker.jobs else "nothing"
            raise RuntimeError(f"a worker process {how} at {doing}; SIGKILL often means too little memory") from None
        if isinstance(answer, dict):
            raise UsageError(answer["usage"]) if "usage" in answer else RuntimeError(answer["traceback"])
        return [float(number) for number in answer]


def _buffers(federation: Federation, count: int) -> list[_Buffers]:
    """Lay out shared memory: what is sent to all once, and for each desk memory before, memory after and uploads."""
    memory, sent = federation.memory.get(""), federation.sent("train")
    nothing = Assignment(sent, memory, NoBatches(), 1.0, torch.tensor(0), 0)
    empty = client_round(federation.method, federation.learner, federation.training, nothing)
    received = _shared(sent)
    return [_Buffers(received, _shared(memory), _shared(empty.memory), _shared(empty.uploads)) for _ in range(count)]


def _shared(like: Trees) -> Trees:
    """Return slots of the same form in memory that forked processes share; their values are not set."""
    return {part: Tree(tree.layout, shared(tree.flat)) for part, tree in like.items()}


def _serve(
    line: Connection, others: list[Connection], federation: Federation, desks: list[_Buffers], scores: list[Score]
) -> None:
    """Work on clients until the line closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    torch.set_num_threads(1)
    keep_freed_memory()
    for other in others:
        other.close()  # else this process would hold open the lines of its siblings
    memory = AtHand({})
    federation.memory = memory  # type: ignore[assignment]
    federation.sent = lambda purpose: desks[0].received  # type: ignore[method-assign]
    while True:
        try:
            score, desk, federation.round, client = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        memory.slots = desks[desk].before
        line.send_bytes(json.dumps(_answer(federation, client, desks[desk], scores, score)).encode())


def _answer(
    federation: Federation, client: str, desk: _Buffers, scores: Sequence[Callable[..., list[float]]], score: int
) -> list[float] | dict[str, str]:
    try:
        if score >= 0:
            return scores[score](federation, client, federation.personal(client))
        out = federation.train(federation.assignment(client, "train"))
        for places, trees in ((desk.uploads, out.uploads), (desk.after, out.memory)):
            for part, tree in trees.items():
                places[part].flat.copy_(tree.flat)
        return [float(out.steps), float(out.loss), float(out.gradients)]
    except UsageError as error:
        return {"usage": str(error)}
    except BaseException:
        return {"traceback": f"a worker process failed at client {client!r}\n{traceback.format_exc()}"}
