"""An engine that trains clients on Ray actors, on this machine or on a cluster, with Flower's simulation engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from flwr.app import ConfigRecord, RecordDict

from idiolect.core.errors import UsageError
from idiolect.core.tree import counting
from idiolect.core.values import real
from idiolect.engines.base import Score, Source
from idiolect.engines.sequential import Sequential
from idiolect.flower.protocol.messages import EVALUATE, TRAIN
from idiolect.flower.ray.actor import ASSIGNMENT, FAILED, NUMBERS, read_rows, write_rows
from idiolect.rounds.client import Outcome
from idiolect.running.describe import uploads

if TYPE_CHECKING:
    from idiolect.flower.ray.pool import Pool


class RayEngine(Sequential):
    """Train clients on actors of Ray: each assignment is a Flower message to the app of an actor.

    It uses the Ray cluster to which this process is connected; else the one that Ray finds, by ``RAY_ADDRESS``, ``ray
    job submit`` or ``ray start`` on this machine; else it starts Ray on this machine and stops it with the run. There
    are as many actors as the cluster has room for; if other programs use the cluster, actors wait. Model, method and
    all examples are put into Ray's object store once, and each machine fetches them once; an actor holds the model and
    the examples of one client. A message holds the server's broadcast and the client's memory; the reply holds the
    client's upload and its new memory, which is kept in this process.

    All machines need the same versions of Python, torch and idiolect, and the modules that define model and metrics.
    On equal processors, with the same number of threads, results equal those of the sequential engine, bit for bit.

    Args:
        cpus: cores of an actor, above 0; also its number of threads.
        gpus: GPUs of an actor, such as 0.25 if four actors share one; 0 if the run's device is a CPU.

    Raises:
        RuntimeError: if a client fails, in one line with the actor's traceback as a note; or if an actor dies.
        UsageError: if Ray has no room for an actor, or an object cannot be sent to one.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        cpus = real("cpus", cpus, lambda n: n > 0, "above 0, the cores of an actor")
        gpus = real("gpus", gpus, lambda n: n >= 0, "of at least 0, the GPUs of an actor")
        self.cpus, self.gpus = cpus, gpus
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"on Ray actors ({self.cpus:g} CPU{gpus}) by Flower's simulation engine, autograd"

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        worker, (memory, _) = source.worker, source.inputs_of(clients[0])
        layouts = uploads(worker.method, worker.model)
        for reply in self._request_all(source, clients, TRAIN):
            model = worker.model
            steps, loss, gradients = torch.tensor(_numbers(reply), dtype=counting(model.dtype), device=model.device)
            uploaded, kept = read_rows(reply, "upload", layouts), read_rows(reply, "memory", memory)
            yield Outcome(uploaded, kept, steps[None], loss, gradients[None])

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        return map(_numbers, self._request_all(source, clients, EVALUATE, score))

    def close(self) -> None:
        """See `Engine`."""
        if self._pool:
            self._pool.close()
        self._pool = None

    def _request_all(
        self, source: Source, clients: Sequence[str], kind: str, score: Score | None = None
    ) -> Iterator[RecordDict]:
        """Send one request per client, a few ahead of the reply that is waited for; yield the replies in order."""
        pool = self._pool_for(source)
        common = RecordDict()
        write_rows(common, "received", source.sent("train" if kind == TRAIN else "deploy"))
        pending: deque[Future[RecordDict]] = deque()
        try:
            if score is not None:
                pool.set_score(score)
            for client in clients:
                content = RecordDict(dict(common))
                memory, messages = source.inputs_of(client)
                write_rows(content, "memory", memory)
                write_rows(content, "messages", messages)
                content[ASSIGNMENT] = ConfigRecord({"client": client, "round": source.round, "lr": source.lr})
                pending.append(pool.send(kind, content))
                if len(pending) > 2 * pool.size:
                    yield _checked(pending.popleft().result())
            while pending:
                yield _checked(pending.popleft().result())
        except BaseException:  # other requests are still running, and nobody will read their replies
            self.close()
            raise

    def _pool_for(self, source: Source) -> Pool:
        """Return the pool of actors for a federation; a pool for another federation is closed."""
        from idiolect.flower.ray.pool import Pool  # needs Ray

        model = source.worker.model
        device = model.device
        if (device.type == "cpu") != (self.gpus == 0):
            raise UsageError(
                f"gpus must be above 0 if and only if the device is a GPU, got gpus={self.gpus:g} on {device}"
            )
        if model.dtype == torch.bfloat16:
            raise UsageError("messages cannot hold bfloat16: use a model in float32 with precision='bfloat16'")
        if not self._pool or self._pool.source is not source:
            self.close()
            self._pool = Pool(source, self.cpus, self.gpus)
        return self._pool


def _checked(reply: RecordDict) -> RecordDict:
    """Return a reply; raise the exception of one that failed."""
    if FAILED not in reply:
        return reply
    failure = reply.config_records[FAILED]
    if "usage" in failure:
        raise UsageError(str(failure["usage"]))
    error = RuntimeError(failure["line"])
    error.add_note(str(failure["traceback"]))
    raise error


def _numbers(reply: RecordDict) -> list[float]:
    numbers: list[float] = reply.config_records[NUMBERS][NUMBERS]  # type: ignore[assignment]
    return numbers
