"""The same client round on a client axis, by `vmap`: what the reference engine is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from idiolect.client import Assignment, Outcome, Slots, client_round
from idiolect.method import Method
from idiolect.model import Model
from idiolect.training import Training
from idiolect.tree import Tree
from idiolect.words import Batch

Flats = dict[str, Tensor]


class _Steps:
    def __init__(self, x: Tensor, y: Tensor, valid: Tensor) -> None:
        self._steps = [Batch(x[k], y[k], valid=valid[k]) for k in range(len(valid))]

    def epochs(self, count: int) -> Sequence[Batch]:
        """Return all steps: they were laid out for the round's epochs."""
        return self._steps


def stacked(
    method: Method, model: Model, training: Training, cohort: Sequence[Assignment], padding: int = 0
) -> Iterator[Outcome]:
    """Train a whole cohort at once; clients with fewer steps are padded with NaN steps that are undone.

    Args:
        method: as for the reference engine.
        model: as for the reference engine.
        training: as for the reference engine.
        cohort: whose batches must all have one size.
        padding: this many more NaN steps for everybody.
    """
    x, y, valid = _padded([list(w.stream.epochs(training.local_epochs)) for w in cohort], padding)
    lr, shapes = cohort[0].lr, cohort[0]
    received = {p: t.flat.expand(len(cohort), -1) for p, t in shapes.received.items()}
    memory = {p: torch.stack([w.memory[p].flat for w in cohort]) for p in shapes.memory}
    seeds = torch.stack([w.seed for w in cohort])
    layouts: dict[str, dict[str, Tree]] = {}

    def one(received: Flats, memory: Flats, x: Tensor, y: Tensor, valid: Tensor, seed: Tensor) -> tuple[Flats, ...]:
        given = {p: Tree(shapes.received[p].layout, flat) for p, flat in received.items()}
        kept = {p: Tree(shapes.memory[p].layout, flat) for p, flat in memory.items()}
        out = client_round(method, model, training, Assignment(given, kept, _Steps(x, y, valid), lr, seed))
        layouts.update(uploads=out.uploads, memory=out.memory)
        return _flats(out.uploads), _flats(out.memory), {"steps": out.steps, "loss": out.loss}

    uploads, memories, rest = vmap(one)(received, memory, x, y, valid, seeds)
    for i in range(len(cohort)):
        up = {p: Tree(layouts["uploads"][p].layout, flat[i]) for p, flat in uploads.items()}
        kept = {p: Tree(layouts["memory"][p].layout, flat[i]) for p, flat in memories.items()}
        yield Outcome(up, kept, rest["steps"][i], rest["loss"][i])


def _flats(slots: Slots) -> Flats:
    return {p: tree.flat for p, tree in slots.items()}


def _padded(batches: list[list[Batch]], more: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(map(len, batches)) + more
    like = batches[0][0]
    nothing = Batch(torch.full_like(like.x, torch.nan), torch.zeros_like(like.y))
    rows = [client + [nothing] * (longest - len(client)) for client in batches]
    valid = [[k < len(client) for k in range(longest)] for client in batches]
    x = torch.stack([torch.stack([b.x for b in row]) for row in rows])
    y = torch.stack([torch.stack([b.y for b in row]) for row in rows])
    return x, y, torch.tensor(valid)
