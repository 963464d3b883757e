"""A site: messages in, the same client round as in a simulation, messages out; what is personal stays in its folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from idiolect.compute.autograd import Loss, Model, seeded
from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.data import ClientData
from idiolect.flower.protocol.messages import EVALUATE, HELLO, TRAIN, Brief, hear, named
from idiolect.flower.site.session import Session
from idiolect.flower.site.state import SiteState
from idiolect.registry.expression import evaluate
from idiolect.registry.names import METHODS, OPTIMIZERS, SCHEDULES
from idiolect.rounds.server_state import ServerState
from idiolect.rounds.training import Group, Training
from idiolect.running.validate import prepare

REFUSED = "refused"
"""The record of a reply that says why there is nothing else in it."""


class Site(ClientApp):
    """Flower's app of a site; see `idiolect.flower.client_app`, which makes it.

    It may serve many messages, and keeps model and data meanwhile; or one, as in a process of Flower's own.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        data: Callable[..., ClientData],
        loss: Loss,
        metrics: Sequence[Metric],
        parts: Sequence[Callable[..., Part]],
    ) -> None:
        super().__init__()
        self._make, self._load, self._loss, self._metrics, self._parts = model, data, loss, metrics, parts
        self._seat: Session | None = None
        self._sits: tuple[object, ...] = ()
        for register, kind in ((self.query, HELLO), (self.train, TRAIN), (self.evaluate, EVALUATE)):
            register()(self._handler(kind))

    def answer(self, kind: str, content: RecordDict, config: Mapping[str, object]) -> RecordDict:
        """Return the reply to a message.

        Args:
            kind: Flower's name for it: ``"query"``, ``"train"`` or ``"evaluate"``.
            content: what it holds.
            config: the site's own settings, ``client-id`` and ``state-dir``.

        Returns:
            The reply; a refusal says in one line what does not fit, and nothing of the site has changed then.
        """
        try:
            told = hear(content, Brief)
            with torch.random.fork_rng(devices=[]):
                seat = self._take_seat(told, config)
                act = {HELLO: seat.introduce, TRAIN: seat.train, EVALUATE: seat.evaluate}[kind]
                return act(told, content)
        except UsageError as error:
            why, client = " ".join(str(error).split()), str(config.get("client-id", ""))
            return RecordDict({REFUSED: ConfigRecord({"why": why, "client": client})})

    def _handler(self, kind: str) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            return Message(self.answer(kind, message.content, context.node_config), reply_to=message)

        return handle

    def _take_seat(self, told: Brief, config: Mapping[str, object]) -> Session:
        wanted = (told.run, told.method, told.training, told.seed, *sorted(config.items()))
        if self._seat is None or self._sits != wanted:
            if self._seat:
                self._seat.state.close()
            self._seat = None
            self._seat, self._sits = self._new_seat(told, config), wanted
        return self._seat

    def _new_seat(self, told: Brief, config: Mapping[str, object]) -> Session:
        client, folder = place(config)
        model = Model(seeded(self._make, told.seed), self._loss)
        method, training = told_method(told.method, self._parts), told_training(told.training)
        center = ServerState(model, method, training, rounds=1, participation=1.0, seed=told.seed)
        given = self._load(client) if inspect.signature(self._load).parameters else self._load()
        if not isinstance(given, ClientData):
            raise UsageError(f"data must give a ClientData, it gives a {type(given).__name__}")
        data = prepare(model, {client: given}, training)[0][client]
        state = SiteState(folder / client, told.run, center.fresh())
        return Session(client, center, data, state, self._metrics, config.get("restored") is True)


def place(config: Mapping[str, object]) -> tuple[str, Path]:
    """Return a site's client and its folder of states.

    Raises:
        UsageError: if they are not among its settings, or cannot be used.
    """
    client, folder = (str(config.get(key, "")) for key in ("client-id", "state-dir"))
    if not (client and folder):
        raise UsageError(
            "this site has no client-id and state-dir: start it with `idiolect join`, or set them in --node-config"
        )
    return named(client), Path(folder).expanduser()


def told_method(text: str, parts: Sequence[Callable[..., Part]]) -> Method:
    """Return the method that a coordinator names; parts that are not idiolect's must have been given to the site."""
    found = evaluate(text, METHODS | {make.__name__: make for make in parts}, "method")
    if not isinstance(found, Method):
        raise UsageError(f"method: {text[:80]!r} is none")
    return found


def told_training(text: str) -> Training:
    """Return the local training that a coordinator names."""
    found = evaluate(text, METHODS | OPTIMIZERS | SCHEDULES | {"Training": Training, "Group": Group}, "training")
    if not isinstance(found, Training):
        raise UsageError(f"training: {text[:80]!r} is none")
    return found
