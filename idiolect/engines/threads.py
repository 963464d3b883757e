"""The engine with one thread per core; each trains one client after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.values import whole
from idiolect.engines.base import Score, Source
from idiolect.engines.explicit import explicit
from idiolect.rounds.client import Assignment, Outcome
from idiolect.storage.shared_memory import keep_freed_memory

T = TypeVar("T")


class Threads:
    """An engine that trains clients in parallel in threads of this process; each computes on one core.

    Kernels of a millisecond release the interpreter long enough; for smaller ones use `Processes`. All threads share
    PyTorch's random stream, so a model that draws in its forward pass (dropout) needs processes, too.

    Args:
        workers: number of threads, at least 1.
    """

    width = 1

    def __init__(self, workers: int) -> None:
        self.workers = whole("workers", workers, 1)
        self._pool: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"{self.workers} threads"

    def learner(self, model: Model) -> Learner:
        """Return explicit kernels, or the model with a copy of its module for each thread."""
        return explicit(model)

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        return self._each(source, clients, "train", lambda client, work: source.worker.train(work))

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""

        def measured(client: str, work: Assignment) -> list[float]:
            own, shared = source.worker.deploy(work), work.received["share"]
            return score(source.worker, source.clients[client], own, shared)

        return self._each(source, clients, "deploy", measured)

    def close(self) -> None:
        """See `Engine`."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _each(
        self, source: Source, clients: Sequence[str], purpose: str, do: Callable[[str, Assignment], T]
    ) -> Iterator[T]:
        """Submit clients to the workers in order, a few ahead of the one whose result is next."""
        if not self._pool:
            keep_freed_memory()
            self._pool = ThreadPoolExecutor(self.workers, "idiolect")
        threads = torch.get_num_threads()
        ahead: deque[Future[T]] = deque()
        try:
            for client in clients:
                work = source.assignment(client, purpose)
                ahead.append(self._pool.submit(_alone, do, client, work))
                if len(ahead) > 2 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
            torch.set_num_threads(threads)


def _alone(do: Callable[[str, Assignment], T], client: str, work: Assignment) -> T:
    torch.set_num_threads(1)  # for this thread; MKL's number is global, and is restored at the end
    return do(client, work)
