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
    """Batches whose axes are epoch, step, example."""

    def __init__(self, x: Tensor, y: Tensor, valid: Tensor) -> None:
        self._x, self._y, self._valid = x, y, valid

    def epochs(self, count: int) -> Sequence[Batch]:
        """Return the steps of the first `count` passes."""
        epochs, steps = self._valid.shape
        if count > epochs:
            raise ValueError(f"{count} passes asked for, {epochs} were laid out")
        places = [(e, k) for e in range(count) for k in range(steps)]
        return [Batch(self._x[e, k], self._y[e, k], valid=self._valid[e, k]) for e, k in places]


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
    x, y, valid = _padded([w.stream.epochs(training.local_epochs) for w in cohort], training.local_epochs, padding)
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


def _padded(cohort: Sequence[Sequence[Batch]], epochs: int, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stack all clients' batches on the axes client, epoch, step, example."""
    counts = [len(batches) // epochs for batches in cohort]
    longest = max(counts) + more
    like = cohort[0][0]
    nothing = Batch(torch.full_like(like.x, torch.nan), torch.zeros_like(like.y))
    rows: list[Batch] = []
    for batches, count in zip(cohort, counts, strict=True):
        for epoch in range(epochs):
            rows += [*batches[epoch * count : (epoch + 1) * count], *[nothing] * (longest - count)]
    shape = (len(cohort), epochs, longest)
    x = torch.stack([b.x for b in rows]).reshape(*shape, *like.x.shape)
    y = torch.stack([b.y for b in rows]).reshape(*shape, *like.y.shape)
    steps = torch.arange(longest)[None, None] < torch.tensor(counts)[:, None, None]
    return x, y, steps.expand(shape)
