"""A method as a table: what each part shares, keeps, sends and computes on a given model."""

from __future__ import annotations

import torch

from idiolect.client import Assignment, client_round, mail_of
from idiolect.engine.stream import NoBatches
from idiolect.method import Method
from idiolect.model import Model
from idiolect.server import broadcast
from idiolect.training import Training
from idiolect.tree import EMPTY, Tree
from idiolect.words import Start


def describe(method: Method, model: Model) -> list[dict[str, str]]:
    """Return one row per part: its idea, what it keeps on a client, what goes down and up, gradients per step.

    Sizes are those of this model, found by playing a round without a single step.

    Example:
        >>> from torch import nn
        >>> from idiolect.methods import fedbn
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> row = describe(fedbn(), Model(net))[0]
        >>> row["part"], row["keeps"], row["sends"]
        ('share', '17 values in 5 tensors', '26 values in 4 tensors')
    """
    model = model.extended(method.attach)
    start = Start(model.anatomy, model.initial, EMPTY)
    start = Start(start.anatomy, start.weights, method.parts[0].server(start))
    server = {p.name: p.server(start) for p in method.parts}
    memory = {p.name: p.memory(start) for p in method.parts}
    memory |= {mail_of(p): p.mail(start) for p in method.parts if p.confer}
    received = broadcast(method, server)
    work = Assignment(received, memory, NoBatches(), 1.0, torch.tensor(0), 0)
    uploads = client_round(method, model, Training(), work).uploads
    return [
        {
            "part": p.name,
            "what it does": p.idea.rstrip("."),
            "arguments": ", ".join(f"{k}={v!r}" for k, v in p.arguments),
            "keeps": _size(memory[p.name]),
            "receives": _size(received[p.name], memory.get(mail_of(p), EMPTY)),
            "sends": _size(uploads[p.name]),
            "extra gradients a step": str(p.gradients) if p.gradients else "",
        }
        for p in method.parts
    ]


def _size(*trees: Tree) -> str:
    values, tensors = sum(t.flat.numel() for t in trees), sum(map(len, trees))
    return f"{values:,} values in {tensors} tensor{'s' * (tensors != 1)}" if tensors else ""
