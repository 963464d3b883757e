"""Checks of a run before any training: clients, model, loss, device and numbers must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.compute.autograd import Loss, Model
from idiolect.compute.hidden import refuse_hidden_state
from idiolect.compute.trial import tried
from idiolect.core.errors import UsageError
from idiolect.core.types import Batch
from idiolect.core.values import real, whole
from idiolect.data import ClientData, check_clients
from idiolect.engines.federation import Federation
from idiolect.engines.stacked import stack_of
from idiolect.rounds.check import check_method, check_stack
from idiolect.rounds.training import Training
from idiolect.running.trial import image_hint


def prepare(
    model: Model, clients: Mapping[str, ClientData], training: Training
) -> tuple[Model, dict[str, ClientData], list[str]]:
    """Return the model as trial passes show it, the clients in its dtype and on its device, and notes about both.

    Raises:
        UsageError: if data, model, loss and batch size do not fit together; one line that names the client.
    """
    layers = model.module(model.initial).named_modules()
    blind = [n for n, m in layers if isinstance(m, _BatchNorm) and not m.track_running_stats]
    if blind:
        raise UsageError(f"layer {blind[0]!r} keeps no running statistics to predict by: set track_running_stats=True")
    if model.structure.has_batch_norm and training.batch_size == 1:
        raise UsageError("batch_size=1 with batch normalization: one example has no variance; use at least 2")
    if not clients:
        raise UsageError("no clients: give a dict of name to ClientData")
    odd = [client for client in clients if not isinstance(client, str)]
    if odd:
        raise UsageError(f"client names are text, got {odd[0]!r}: write {str(odd[0])!r}")
    kept, notes = check_clients(clients, None)
    moved = {name: _to(model, data) for name, data in kept.items()}
    name, first = next(iter(moved.items()))
    untried = model.copy()  # passes may change what a structure without a trial does not follow
    outputs = _outputs(untried, name, first)
    if is_cross_entropy(model.loss):
        if outputs.dim() != 2:
            raise UsageError(f"cross-entropy needs outputs (examples, classes), the model gives {tuple(outputs.shape)}")
        check_clients(kept, outputs.shape[1])
    y = first.train.y[:2]
    if y.is_floating_point() and outputs.shape != y.shape and outputs.numel() == y.numel():
        raise UsageError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(y.shape)} differ in shape: make them alike (y[:, None])"
        )
    _try_loss(untried, name, first)
    model = _tried(model, max(moved.values(), key=lambda data: min(len(data.train.y), 4)))
    if own := sorted(model.structure.own_state):
        some = ", ".join(own[:4]) + ", ..." * (len(own) > 4)
        notes.append(f"{len(own)} buffers that training changes stay with each client and are not averaged: {some}")
    return model, moved, notes + untested(moved)


def untested(clients: Mapping[str, ClientData]) -> list[str]:
    """Return a note about the clients that have no test examples, if there are any.

    Example:
        >>> untested({"a": ClientData(train=([[0.5]], [1]))})
        ['no client has test examples, so tables show n/a: give ClientData(train=..., test=(x, y))']
    """
    names = [repr(name) for name, data in clients.items() if data.test is None]
    if len(names) == len(clients):
        return ["no client has test examples, so tables show n/a: give ClientData(train=..., test=(x, y))"]
    some = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
    return (
        [f"{len(names)} of {len(clients)} clients have no test examples and do not count in tables: {some}"]
        if names
        else []
    )


def check_parts(federation: Federation) -> None:
    """Play a trial step of the method on one client, and on two in a stack where the engine stacks clients.

    Raises:
        UsageError: one line that names the part and the hook that does not do what it should.
    """
    by_size = sorted(federation.clients, key=lambda client: len(federation.clients[client].train.y))
    several = [c for c in by_size if len(federation.clients[c].train.y) > 1] or by_size
    work = federation.assignment(several[0], "train")
    check_method(federation, federation.worker, work)
    if federation.engine.width > 1 and len(by_size) > 1:
        pair = [federation.assignment(client, "train") for client in reversed(by_size[-2:])]
        check_stack(federation.worker, stack_of(pair), pair)


def is_cross_entropy(loss: Loss) -> bool:
    """Return whether a loss is cross-entropy, so that labels are classes."""
    named = loss.func if isinstance(loss, partial) else loss
    return named is F.cross_entropy or isinstance(named, nn.CrossEntropyLoss)


class Numbers(NamedTuple):
    """The numbers of a run, as Python's own."""

    rounds: int
    participation: float
    evaluate_every: int
    seed: int


def numbers_of(rounds: object, participation: object, evaluate_every: object, seed: object) -> Numbers:
    """Return the numbers of a run, whatever they are made of.

    Raises:
        UsageError: one line, if one is out of range.

    Example:
        >>> numbers_of(torch.tensor(3), 1, 1, 0)
        Numbers(rounds=3, participation=1.0, evaluate_every=1, seed=0)
    """
    return Numbers(
        whole("rounds", rounds, 1),
        real(
            "participation", participation, lambda share: 0 < share <= 1, "in (0, 1], the share of clients in a round"
        ),
        whole("evaluate_every", evaluate_every, 1),
        whole("seed", seed),
    )


def device_of(asked: str | torch.device, model: nn.Module) -> torch.device:
    """Return where a run takes place: what is asked for, or a GPU if there is one, or where the model is.

    Raises:
        UsageError: if there is no such device.
    """
    if asked == "auto":
        here = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.device("cuda") if here.type == "cpu" and torch.cuda.is_available() else here
    try:
        return torch.zeros(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {asked!r} cannot be used: {str(error).partition(chr(10))[0]}") from None


def _to(model: Model, data: ClientData) -> ClientData:
    def tensor(values: torch.Tensor) -> torch.Tensor:
        return values.to(model.device, model.dtype if values.is_floating_point() else values.dtype)

    return ClientData(**{split: (tensor(x), tensor(y)) for split, (x, y) in data.splits().items()})


def _outputs(model: Model, name: str, data: ClientData) -> torch.Tensor:
    try:
        with torch.no_grad():
            outputs = model.predict(model.initial, data.train.x[:2])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = tuple(data.train.x.shape[1:])
        reason = str(error).partition("\n")[0]
        hint = image_hint(model.training, data.train.x)
        raise UsageError(f"the model cannot take client {name!r}'s features of shape {shape}: {reason}{hint}") from None
    if not isinstance(outputs, torch.Tensor):
        raise UsageError(
            f"the model must return one tensor, it returns a {type(outputs).__name__}: wrap it in a module"
        )
    return outputs


def _tried(model: Model, data: ClientData) -> Model:
    """Return the model as passes over a client's first examples show it; refuse one that keeps hidden state."""
    x, y = data.train
    pairs = [torch.tensor(rows, device=y.device) % len(y) for rows in ([0, 1], [2, 3])]
    batch, other = (Batch(x[rows], y[rows]) for rows in pairs)
    model = tried(model, batch.x)
    refuse_hidden_state(model, batch, other)
    return model


def _try_loss(model: Model, name: str, data: ClientData) -> None:
    x, y = data.train.x[:2], data.train.y[:2]
    try:
        loss = model.grad(model.initial, Batch(x, y, frozen=len(y) == 1)).loss
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the loss cannot be computed and differentiated for client {name!r}: {reason}") from None
    if loss.dim() != 0:
        raise UsageError(f"the loss must be one number per batch, a mean, got shape {tuple(loss.shape)}")
