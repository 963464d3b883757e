"""Flower's app of a site: it answers the coordinator's messages; personal state stays in the site's folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from idiolect.compute.autograd import Model, seeded
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError
from idiolect.core.part import Part
from idiolect.data import ClientData
from idiolect.flower.protocol.messages import (
    EVALUATE,
    REFUSED,
    REGISTER,
    TRAIN,
    Instruction,
    client_name,
    read_message,
)
from idiolect.flower.site.session import Session
from idiolect.flower.site.state import SiteState
from idiolect.registry.printed import method_from, training_from
from idiolect.rounds.server_state import ServerState
from idiolect.running.trial import check_metrics
from idiolect.running.validate import prepare


class Site(ClientApp):
    """Flower's app of a site, created by `idiolect.flower.client_app`.

    In a process that stays, it keeps model and data between messages; in Flower's own processes, it answers one.
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
        self._make_model, self._load_data, self._loss, self._metrics, self._parts = model, data, loss, metrics, parts
        self._session: Session | None = None
        self._session_key: tuple[object, ...] = ()
        for register, kind in ((self.query, REGISTER), (self.train, TRAIN), (self.evaluate, EVALUATE)):
            register()(self._handler(kind))

    def answer(self, kind: str, content: RecordDict, config: Mapping[str, object]) -> RecordDict:
        """Return the reply to a message.

        Args:
            kind: kind of the message under Flower's name: ``"query"``, ``"train"`` or ``"evaluate"``.
            content: its content.
            config: the site's own settings, ``client-id`` and ``state-dir``.

        Returns:
            The reply. A refusal gives its reason in one line; the state of the site is then unchanged.
        """
        try:
            instruction = read_message(content, Instruction)
            with torch.random.fork_rng(devices=[]):
                session = self._session_for(instruction, config)
                act = {REGISTER: session.register, TRAIN: session.train, EVALUATE: session.evaluate}[kind]
                return act(instruction, content)
        except UsageError as error:
            reason, client = " ".join(str(error).split()), str(config.get("client-id", ""))
            return RecordDict({REFUSED: ConfigRecord({"reason": reason, "client": client})})

    def _handler(self, kind: str) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            return Message(self.answer(kind, message.content, context.node_config), reply_to=message)

        return handle

    def _session_for(self, instruction: Instruction, config: Mapping[str, object]) -> Session:
        """Return the present session if the run and the settings are the same, else a new one."""
        run = (instruction.run, instruction.method, instruction.training, instruction.seed)
        key = (*run, *sorted(config.items()))
        if self._session is None or self._session_key != key:
            if self._session:
                self._session.state.close()
            self._session = None
            self._session, self._session_key = self._open_session(instruction, config), key
        return self._session

    def _open_session(self, instruction: Instruction, config: Mapping[str, object]) -> Session:
        client, folder = site_settings(config)
        model = Model(seeded(self._make_model, instruction.seed), self._loss)
        method = method_from(instruction.method, self._parts)
        training = training_from(instruction.training)
        data = self._load_data(client) if inspect.signature(self._load_data).parameters else self._load_data()
        if not isinstance(data, ClientData):
            raise UsageError(f"data must return a ClientData, got {type(data).__name__}")
        model, clients, _ = prepare(model, {client: data}, training)
        check_metrics(model, clients, self._metrics)
        server_state = ServerState(model, method, training, rounds=1, participation=1.0, seed=instruction.seed)
        state = SiteState(folder / client, instruction.run, server_state.fresh())
        return Session(client, server_state, clients[client], state, self._metrics, config.get("restored") is True)


def site_settings(config: Mapping[str, object]) -> tuple[str, Path]:
    """Return the client name and the folder of states from a site's settings.

    Raises:
        UsageError: if a setting is missing or invalid.
    """
    client, folder = (str(config.get(key, "")) for key in ("client-id", "state-dir"))
    if not (client and folder):
        raise UsageError(
            "client-id or state-dir is not set: start the site with `idiolect join`, or set both in --node-config"
        )
    return client_name(client), Path(folder).expanduser()
