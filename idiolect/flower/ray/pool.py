"""The pool of Ray actors that Flower's simulation engine runs: how they start, get their data, and end."""

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
from idiolect.engines.base import Score, Source
from idiolect.flower.ray.actor import ASSIGNMENT, Actor, setup_of, to_arrays

MESSAGE_LIFETIME = 1e9
"""Seconds until a message expires: never, in practice."""


@dataclass
class ActorFactory:
    """Make the app of an actor. Flower sends this with every message: references to objects in Ray's store."""

    setup: Any
    data: Any
    score: Any
    threads: int

    def __call__(self) -> Actor:
        """Return the app of this actor; it is made for the first message, and again if the score changes."""
        return _actor(self.threads, self.setup, self.data, self.score)


@lru_cache(maxsize=1)
def _actor(threads: int, *references: Any) -> Actor:  # noqa: ANN401 - references of Ray
    torch.set_num_threads(threads)
    return Actor(*ray.get(list(references)))


class Pool:
    """The actors of one federation.

    Flower's backend is called directly, once per message, and not through `run_simulation`: that is deprecated, needs a
    thread of its own, checks for replies ten times a second, and turns exceptions into text.

    Args:
        source: the federation whose clients the actors train.
        cpus: cores of an actor.
        gpus: GPUs of an actor.

    Attributes:
        source: the same.
        size: number of actors.
    """

    def __init__(self, source: Source, cpus: float, gpus: float) -> None:
        self.source = source
        self._score: Score | None = None
        with ExitStack() as resources:
            self._backend = _backend(resources, cpus, gpus)
            data = _store({client: to_arrays(own) for client, own in source.clients.items()}, "data")
            rest = _store(setup_of(source), "the model or the method")
            self._app = ActorFactory(rest, data, _store(None, ""), max(1, int(cpus)))
            try:
                self._backend.build(self._app)
            except ValueError:
                available = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
                raise UsageError(f"no room for an actor of cpus={cpus:g}, gpus={gpus:g}: Ray has {available}") from None
            self.size = self._backend.num_workers
            self._threads = ThreadPoolExecutor(self.size, "idiolect")
            resources.callback(self._threads.shutdown, cancel_futures=True)
            for actor in self._backend.pool.pool if self._backend.pool else ():
                resources.callback(ray.kill, actor)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """End the actors, and Ray if it was started for them."""
        self._resources.close()

    def set_score(self, score: Score) -> None:
        """Set the function with which the actors score clients from now on."""
        if score != self._score:
            self._score, self._app.score = score, _store(score, "a metric")

    def send(self, kind: str, content: RecordDict) -> Future[RecordDict]:
        """Send a message to a free actor; return a future of its reply."""
        return self._threads.submit(self._process, kind, content)

    def _process(self, kind: str, content: RecordDict) -> RecordDict:
        metadata = Metadata(0, "", 0, 0, "", "", time.time(), MESSAGE_LIFETIME, kind)
        message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
        context = Context(0, 0, {"partition-id": 0}, RecordDict(), {})
        try:
            return self._backend.process_message(message, context)[0].content
        except ray.exceptions.RayError as error:
            client, lines = content.config_records[ASSIGNMENT]["client"], str(error).strip().splitlines()
            if isinstance(error, ray.exceptions.RayActorError):
                reason = f"the actor of client {client!r} died, often from too little memory: {lines[0]}"
            else:  # the error is from before our own code
                reason = f"an actor cannot train client {client!r}: {lines[-1]}"
            raise RuntimeError(reason) from error


def _backend(resources: ExitStack, cpus: float, gpus: float) -> RayBackend:
    """Return Flower's backend, without actors yet; start Ray if this process is not connected to it."""
    log = logging.getLogger("flwr")
    resources.callback(log.setLevel, log.level)
    log.setLevel(logging.CRITICAL)  # failures are raised as exceptions
    if not ray.is_initialized():
        resources.callback(ray.shutdown)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's tips
        return RayBackend({"init_args": quiet, "client_resources": {"num_cpus": cpus, "num_gpus": gpus}})


def _store(value: Any, what: str) -> Any:  # noqa: ANN401 - whatever actors need
    """Put a value into Ray's object store and return its reference."""
    try:
        return ray.put(value)
    except TypeError as error:
        raise UsageError(f"{what} cannot be sent to an actor: {error.__cause__ or error}") from error
