"""Workers that are actors of Ray, under Flower's simulation engine: on this machine, or on those of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from flwr.app import ConfigRecord, RecordDict

from idiolect.core.errors import UsageError
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Score, Sequential
from idiolect.flower.protocol.messages import EVALUATE, TRAIN
from idiolect.flower.ray.actor import FAILED, put_rows, take_rows
from idiolect.rounds.client import Outcome
from idiolect.running.describe import uploads

if TYPE_CHECKING:
    from idiolect.flower.ray.pool import Pool


class RayEngine(Sequential):
    """Train clients on actors of Ray: an assignment is one of Flower's messages, to an app on one of them.

    Ray is what this process is connected to; or the cluster that it finds, by ``RAY_ADDRESS``, ``ray job submit`` or
    ``ray start`` on this machine; or one of its own on this machine, which ends with the run. There are as many actors
    as all of it has room for; where other programs are in the way, actors wait. Model, method and all examples are put
    into Ray's store once, and each machine fetches them once; an actor holds the model and the examples of one client.
    A message holds the server's slots and the client's memory, the reply its upload and its memory, which is kept here.

    All machines need the same versions of Python, torch and idiolect, and the modules that model and metrics come from.
    On equal processors, with as many threads, results are those of the sequential engine, bit for bit.

    Args:
        cpus: cores of an actor, above 0, and threads of its arithmetic.
        gpus: GPUs of an actor, such as 0.25 where four share one; 0 where the run's device is a CPU.

    Raises:
        RuntimeError: one line if a client fails, with the actor's traceback as a note, or if an actor dies.
        UsageError: if Ray has no room for an actor, or something cannot be sent to one.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        if not (cpus > 0 and gpus >= 0):
            raise UsageError(f"an actor has cpus above 0 and gpus of at least 0, got cpus={cpus!r}, gpus={gpus!r}")
        self.cpus, self.gpus = cpus, gpus
        self._crew: Pool | None = None

    def __repr__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"on Ray actors ({self.cpus:g} CPU{gpus}) by Flower's simulation engine, autograd"

    def train(self, federation: Federation, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""
        form, memory = uploads(federation.method, federation.model), federation.memory.get("")
        for reply in self._each(federation, clients, TRAIN):
            steps, loss, gradients = federation.model.initial.flat.new_tensor(_numbers(reply))
            sent, kept = take_rows(reply, "upload", form), take_rows(reply, "memory", memory)
            yield Outcome(sent, kept, steps[None], loss, gradients[None])

    def measure(self, federation: Federation, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""
        return map(_numbers, self._each(federation, clients, EVALUATE, score))

    def close(self) -> None:
        """See `Engine`."""
        if self._crew:
            self._crew.dismiss()
        self._crew = None

    def _each(
        self, federation: Federation, clients: Sequence[str], kind: str, score: Score | None = None
    ) -> Iterator[RecordDict]:
        """Give clients to the actors in their order, a few ahead of the one that is waited for."""
        crew = self._ready(federation)
        common = RecordDict()
        put_rows(common, "received", federation.sent("train" if kind == TRAIN else "deploy"))
        ahead: deque[Future[RecordDict]] = deque()
        try:
            if score is not None:
                crew.learn(score)
            for client in clients:
                content = RecordDict(dict(common))
                put_rows(content, "memory", federation.memory.get(client))
                content["told"] = ConfigRecord({"client": client, "round": federation.round})
                ahead.append(crew.send(kind, content))
                if len(ahead) > 2 * crew.size:
                    yield _checked(ahead.popleft().result())
            while ahead:
                yield _checked(ahead.popleft().result())
        except BaseException:  # work is under way whose results nobody waits for
            self.close()
            raise

    def _ready(self, federation: Federation) -> Pool:
        from idiolect.flower.ray.pool import Pool  # needs Ray

        device = federation.model.device
        if (device.type == "cpu") != (self.gpus == 0):
            raise UsageError(f"gpus is above 0 where the run's device is a GPU, got gpus={self.gpus:g} on {device}")
        if federation.model.dtype == torch.bfloat16:
            raise UsageError("messages to actors hold no bfloat16: give a model in float32, and precision='bfloat16'")
        if not self._crew or self._crew.federation is not federation:
            self.close()
            self._crew = Pool(federation, self.cpus, self.gpus)
        return self._crew


def _checked(reply: RecordDict) -> RecordDict:
    if FAILED not in reply:
        return reply
    told = reply.config_records[FAILED]
    if "usage" in told:
        raise UsageError(str(told["usage"]))
    error = RuntimeError(told["line"])
    error.add_note(str(told["traceback"]))
    raise error


def _numbers(reply: RecordDict) -> list[float]:
    numbers: list[float] = reply.config_records["numbers"]["numbers"]  # type: ignore[assignment]
    return numbers
