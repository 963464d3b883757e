"""The engine with forked worker processes: inputs and results are in shared memory, without pickling."""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, counting
from idiolect.core.types import Trees
from idiolect.core.values import whole
from idiolect.data import ClientData
from idiolect.engines.base import Score, Source
from idiolect.engines.explicit import explicit
from idiolect.rounds.batches import NoBatches, RngKey, assign
from idiolect.rounds.client import Assignment, Outcome, Worker
from idiolect.storage.shared_memory import keep_freed_memory, shared


class Processes:
    """An engine that trains clients in parallel in forked processes, each with one thread.

    The workers are forked from this process at the first call, so they have its clients and model. What changes from
    round to round is in shared memory: the server's state, the memory and messages of the client, and its results. A
    worker is told over a pipe which client to train.

    Args:
        workers: number of processes, at least 1.

    Raises:
        RuntimeError: if a worker fails, with its traceback, or dies.
    """

    width = 1

    def __init__(self, workers: int) -> None:
        self.workers = whole("workers", workers, 1)
        self._pool: _Pool | None = None

    def __repr__(self) -> str:
        return f"{self.workers} processes"

    def learner(self, model: Model) -> Learner:
        """Return explicit kernels, or the model."""
        return explicit(model)

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        for buffers, numbers in self._each(source, clients, None):
            share = buffers.received["share"].flat
            steps, loss, gradients = torch.tensor(numbers, dtype=counting(share.dtype), device=share.device)
            yield Outcome(buffers.uploads, buffers.after, steps[None], loss, gradients[None])

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        for _, numbers in self._each(source, clients, score):
            yield numbers

    def close(self) -> None:
        """See `Engine`."""
        if self._pool:
            self._pool.dismiss()
        self._pool = None

    def _each(
        self, source: Source, clients: Sequence[str], score: Score | None
    ) -> Iterator[tuple[_Buffers, list[float]]]:
        pool = self._pool if self._pool and self._pool.source is source else None
        if pool is None or (score and score not in pool.scores):  # forked processes know only what existed before
            scores = [*(pool.scores if pool else ()), *([score] if score else ())]
            self.close()
            self._pool = pool = _Pool(source, self.workers, scores)
        try:
            yield from pool.work(clients, pool.scores.index(score) if score else TRAIN)
        except BaseException:  # the workers may still compute results that nobody reads
            self.close()
            raise


TRAIN = -1
"""Sent to a worker in place of the index of a score: train the client."""


class _Buffers(NamedTuple):
    """One client's inputs and results, in shared memory."""

    received: Trees
    messages: Trees
    before: Trees
    after: Trees
    uploads: Trees


class _Process(NamedTuple):
    process: BaseProcess
    line: Connection
    jobs: deque[int]
    """Jobs that it has not answered yet, oldest first."""


class _Pool:
    """The processes of one federation."""

    def __init__(self, source: Source, workers: int, scores: list[Score]) -> None:
        self.source = source
        self.scores = scores
        self._buffers = _buffers(source, 2 * workers + 2)
        self._workers: list[_Process] = []
        gc.freeze()  # a collection would write to every object, and so copy the pages shared with the workers
        fork = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = fork.Pipe()
            others = [ours, *(w.line for w in self._workers)]
            serve = fork.Process(target=_serve, args=(theirs, others, source, self._buffers, scores), daemon=True)
            serve.start()
            theirs.close()
            self._workers.append(_Process(serve, ours, deque()))

    def dismiss(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.line.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        gc.unfreeze()

    def work(self, clients: Sequence[str], score: int) -> Iterator[tuple[_Buffers, list[float]]]:
        """Train all clients, or score them; yield the results in the order of `clients`.

        A result is in a buffer that is used again when the next result is requested. Each worker has at most two jobs,
        the one that it computes and the next one, so that it does not wait for this process.

        Args:
            clients: names of the clients.
            score: index of a score, or `TRAIN`.
        """
        for part, tree in self.source.sent("train" if score == TRAIN else "deploy").items():
            self._buffers[0].received[part].flat.copy_(tree.flat)
        free, given = list(range(len(self._buffers))), iter(range(len(clients)))
        buffer_of: dict[int, int] = {}
        answers: dict[int, list[float]] = {}
        coming = next(given, None)
        for wanted in range(len(clients)):
            while wanted not in answers:
                idle = min(self._workers, key=lambda w: len(w.jobs))
                while coming is not None and free and len(idle.jobs) < 2:
                    buffer_of[coming] = free.pop()
                    self._send(idle, coming, clients[coming], buffer_of[coming], score)
                    coming = next(given, None)
                    idle = min(self._workers, key=lambda w: len(w.jobs))
                for worker in self._ready():
                    answers[worker.jobs.popleft()] = self._receive(worker, clients)
            place = buffer_of.pop(wanted)
            yield self._buffers[place], answers.pop(wanted)
            free.append(place)

    def _send(self, worker: _Process, job: int, client: str, buffer: int, score: int) -> None:
        memory, messages = self.source.inputs_of(client)
        for places, trees in ((self._buffers[buffer].before, memory), (self._buffers[buffer].messages, messages)):
            for part, tree in trees.items():
                places[part].flat.copy_(tree.flat)
        worker.jobs.append(job)
        worker.line.send_bytes(json.dumps([score, buffer, self.source.round, self.source.lr, client]).encode())

    def _ready(self) -> list[_Process]:
        found = wait([w.line for w in self._workers])
        return [w for w in self._workers if w.line in found]

    def _receive(self, worker: _Process, clients: Sequence[str]) -> list[float]:
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


def _buffers(source: Source, count: int) -> list[_Buffers]:
    """Return buffers in shared memory: one for what is sent to all, and the rest for each client at work."""
    (memory, messages), sent = source.inputs_of(next(iter(source.clients))), source.sent("train")
    nothing = Assignment(sent, memory, messages, NoBatches(), NoBatches(), 1.0, torch.tensor(0), 0)
    empty, received = source.worker.train(nothing), _shared(sent)
    return [
        _Buffers(received, _shared(messages), _shared(memory), _shared(empty.memory), _shared(empty.uploads))
        for _ in range(count)
    ]


def _shared(like: Trees) -> Trees:
    """Return trees of the same form in shared memory; their values are not set."""
    return {part: Tree(tree.layout, shared(tree.flat)) for part, tree in like.items()}


def _serve(
    line: Connection, others: list[Connection], source: Source, buffers: list[_Buffers], scores: list[Score]
) -> None:
    """Train or score clients until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    keep_freed_memory()
    for other in others:
        other.close()  # inherited by the fork; an open copy would hide that the parent has closed its own
    worker, clients, seed = source.worker, source.clients, source.seed
    while True:
        try:
            score, buffer, played, lr, client = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        key, own = RngKey(seed, "train" if score == TRAIN else "deploy", client, played), buffers[buffer]
        work = assign(worker.model, worker.training, clients[client], key, own.received, own.before, own.messages, lr)
        answer = _answer(worker, clients[client], work, own, None if score == TRAIN else scores[score], client)
        line.send_bytes(json.dumps(answer).encode())


def _answer(
    worker: Worker, data: ClientData, work: Assignment, own: _Buffers, score: Score | None, client: str
) -> list[float] | dict[str, str]:
    try:
        if score:
            return score(worker, data, worker.deploy(work), work.received["share"])
        out = worker.train(work)
        for places, trees in ((own.uploads, out.uploads), (own.after, out.memory)):
            for part, tree in trees.items():
                places[part].flat.copy_(tree.flat)
        return [float(out.steps), float(out.loss), float(out.gradients)]
    except UsageError as error:
        return {"usage": str(error)}
    except BaseException:
        return {"traceback": f"a worker process failed at client {client!r}\n{traceback.format_exc()}"}
