"""A method as a table: what each part shares, keeps, sends and computes on a given model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.core.scope import Scope
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.rounds.batches import NoBatches
from idiolect.rounds.check import checked
from idiolect.rounds.client import Assignment, client_round
from idiolect.rounds.server_state import ServerState
from idiolect.rounds.training import Training


class Cost(NamedTuple):
    """The cost of a method for a client in a round, in values (four bytes each in float32)."""

    keeps: int
    receives: int
    sends: int
    gradients: int
    """Gradients that one local step takes."""


def describe(method: Method, model: Model) -> list[dict[str, str]]:
    """Return one row per part: its idea, what it keeps on a client, what goes down and up, gradients per step.

    Sizes are those of this model.

    Example:
        >>> from torch import nn
        >>> from idiolect.methods import fedbn
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> row = describe(fedbn(), Model(net))[0]
        >>> row["part"], row["keeps"], row["sends"]
        ('share', '17 values in 5 tensors', '26 values in 4 tensors')
    """
    return [
        {
            "part": p.name,
            "what it does": p.idea.rstrip("."),
            "arguments": ", ".join(f"{k}={v!r}" for k, v in p.arguments),
            "keeps": _size(kept),
            "receives": _size(received),
            "sends": _size(sent),
            "extra gradients a step": str(p.gradients) if p.gradients else "",
        }
        for p, (kept, received, sent) in zip(method.parts, _by_part(method, model), strict=True)
    ]


def cost(method: Method, model: Model) -> Cost:
    """Return what all parts together cost on this model.

    Example:
        >>> from torch import nn
        >>> from idiolect.methods import mofedsam
        >>> cost(mofedsam(), Model(nn.Linear(4, 2)))
        Cost(keeps=0, receives=20, sends=10, gradients=2)
    """
    keeps, receives, sends = (sum(map(_values, column)) for column in zip(*_by_part(method, model), strict=True))
    return Cost(keeps, receives, sends, 1 + sum(p.gradients for p in method.parts))


def chosen(method: Method, model: Model) -> dict[str, list[str]]:
    """Return which tensors of this model the scopes in a method's parts name.

    Example:
        >>> from torch import nn
        >>> from idiolect.methods import fedala
        >>> chosen(fedala(), Model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))["head"]
        ['2.weight', '2.bias']
    """
    scopes = [value for p in method.parts for _, value in p.arguments if isinstance(value, Scope)]
    return {str(s): [n for n in model.structure.layout.names if n in s(model.structure)] for s in scopes}


def uploads(method: Method, model: Model) -> Trees:
    """Return the form of what a client sends: one tree a part, as a round without a single step makes them."""
    return _exchanged(method, model).uploads


class _Exchange(NamedTuple):
    """What a client remembers, receives and sends, by part."""

    memory: Trees
    received: Trees
    messages: Trees
    uploads: Trees


def _exchanged(method: Method, model: Model) -> _Exchange:
    """Return the forms of an exchange, found by playing a round without a single step."""
    state = ServerState(model, method, Training(), rounds=1, participation=1.0, seed=0)
    state.method = checked(state.method, state.model.structure)
    memory, received, messages = state.fresh(), state.sent("train"), state.first_messages
    work = Assignment(received, memory, messages, NoBatches(), NoBatches(), 1.0, torch.tensor(0), 0)
    return _Exchange(memory, received, messages, client_round(state.method, state.model, Training(), work).uploads)


def _by_part(method: Method, model: Model) -> list[tuple[list[Tree], list[Tree], list[Tree]]]:
    """Return what each part keeps, receives and sends."""
    found = _exchanged(method, model)
    return [([found.memory[n]], [found.received[n], found.messages[n]], [tree]) for n, tree in found.uploads.items()]


def _values(trees: list[Tree]) -> int:
    return sum(tree.flat.numel() for tree in trees)


def _size(trees: list[Tree]) -> str:
    tensors = sum(map(len, trees))
    values = _values(trees)
    return f"{values:,} value{'s' * (values != 1)} in {tensors} tensor{'s' * (tensors != 1)}" if tensors else ""
