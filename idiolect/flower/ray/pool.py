"""RayEngine of Ray that Flower's simulation engine runs: how they begin, what they are given, how they end."""

from __future__ import annotations

import logging
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

from idiolect.core.errors import UsageError
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Score
from idiolect.flower.ray.actor import Actor, light, packed

FOREVER = 1e9
"""Seconds that a message is good for."""


@dataclass
class App:
    """What Flower sends with every message: where in Ray's store an actor finds all that is not in messages."""

    federation: Any
    data: Any
    score: Any
    threads: int

    def __call__(self) -> Actor:
        """Return the app of this actor; it is made at the first message, and when the score is another."""
        return _actor(self.threads, self.federation, self.data, self.score)


@lru_cache(maxsize=1)
def _actor(threads: int, *places: Any) -> Actor:  # noqa: ANN401 - Ray's references
    torch.set_num_threads(threads)
    return Actor(*ray.get(list(places)))


class Pool:
    """The actors of one federation.

    Flower's engine is entered where its own loop enters it, one call a message, and not by `run_simulation`: that is
    deprecated, wants a thread for itself, looks for news ten times a second, and makes text of exceptions.

    Args:
        federation: whose clients they work on.
        cpus: cores of an actor.
        gpus: GPUs of an actor.

    Attributes:
        federation: the same.
        size: number of actors.
    """

    def __init__(self, federation: Federation, cpus: float, gpus: float) -> None:
        self.federation = federation
        self._score: Score | None = None
        with ExitStack() as opened:
            self._backend = _backend(opened, cpus, gpus)
            data = _stored({client: packed(own) for client, own in federation.clients.items()}, "data")
            rest = _stored(light(federation), "the model or the method")
            self._app = App(rest, data, _stored(None, ""), max(1, int(cpus)))
            try:
                self._backend.build(self._app)
            except ValueError:
                room = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
                raise UsageError(f"no room for an actor of cpus={cpus:g}, gpus={gpus:g}: Ray has {room}") from None
            self.size = self._backend.num_workers
            self._threads = ThreadPoolExecutor(self.size, "idiolect")
            opened.callback(self._threads.shutdown, cancel_futures=True)
            for actor in self._backend.pool.pool if self._backend.pool else ():
                opened.callback(ray.kill, actor)
            self._open = opened.pop_all()

    def dismiss(self) -> None:
        """End the actors, and Ray if it began with them."""
        self._open.close()

    def learn(self, score: Score) -> None:
        """Have the actors measure by a score from now on."""
        if score != self._score:
            self._score, self._app.score = score, _stored(score, "a metric")

    def send(self, kind: str, content: RecordDict) -> Future[RecordDict]:
        """Have an actor answer a message."""
        return self._threads.submit(self._ask, kind, content)

    def _ask(self, kind: str, content: RecordDict) -> RecordDict:
        about = Metadata(0, "", 0, 0, "", "", time.time(), FOREVER, kind)
        message = Message(content=content, metadata=about)  # type: ignore[call-overload]
        context = Context(0, 0, {"partition-id": 0}, RecordDict(), {})
        try:
            return self._backend.process_message(message, context)[0].content
        except ray.exceptions.RayError as error:
            client, lines = content.config_records["told"]["client"], str(error).strip().splitlines()
            if isinstance(error, ray.exceptions.RayActorError):
                what = f"the actor of client {client!r} is gone, often from too little memory: {lines[0]}"
            else:  # it has not come as far as our own code
                what = f"an actor cannot work on client {client!r}: {lines[-1]}"
            raise RuntimeError(what) from error


def _backend(opened: ExitStack, cpus: float, gpus: float) -> RayBackend:
    """Return Flower's engine without actors yet; start Ray if there is none."""
    log = logging.getLogger("flwr")
    opened.callback(log.setLevel, log.level)
    log.setLevel(logging.CRITICAL)  # what fails comes as an exception
    if not ray.is_initialized():
        opened.callback(ray.shutdown)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's tips
        return RayBackend({"init_args": quiet, "client_resources": {"num_cpus": cpus, "num_gpus": gpus}})


def _stored(value: Any, what: str) -> Any:  # noqa: ANN401 - whatever actors need
    """Put a value into Ray's store and return where it is."""
    try:
        return ray.put(value)
    except TypeError as error:
        raise UsageError(f"{what} cannot be sent to an actor: {error.__cause__ or error}") from error
