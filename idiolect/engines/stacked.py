"""Many clients at once: the same client round on rows of a matrix, one client a row.

A step costs about as many kernel launches for a whole stack as for one client, which is what a GPU and tiny networks
are short of. Clients keep their own batches: they are sorted by size, so that those which still have a step to take are
the first rows, and neighbors whose batches have one size are differentiated together, at their true size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.tree import Tree
from idiolect.core.types import Batch, Group, Lockstep, Trees
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Score
from idiolect.rounds.batches import Shuffled
from idiolect.rounds.client import Assignment, Outcome

T = TypeVar("T")


@dataclass
class Stacked:
    """Train and deploy clients in stacks, under `torch.func.vmap`.

    Args:
        width: clients per stack, at least 1. Results depend on it by rounding alone.
    """

    width: int

    def __repr__(self) -> str:
        return f"stacks of {self.width}"

    def learner(self, model: Model) -> Learner:
        """Return the model itself, which differentiates stacks too."""
        return model

    def train(self, federation: Federation, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""

        def trained(work: Assignment) -> Sequence[Outcome]:
            out = federation.train(work)
            count = len(work.seed)
            uploads, memory = _apart(out.uploads, count), _apart(out.memory, count)
            return [Outcome(*rows) for rows in zip(uploads, memory, out.steps, out.loss, out.gradients, strict=True)]

        return self._each(federation, clients, "train", trained)

    def measure(self, federation: Federation, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`."""

        def own(work: Assignment) -> Sequence[Tree]:
            return [slots["own"] for slots in _apart({"own": federation.deploy(work)}, len(work.seed))]

        personal = self._each(federation, clients, "deploy", own)
        return (score(federation, client, weights) for client, weights in zip(clients, personal, strict=True))

    def close(self) -> None:
        """See `Engine`."""

    def _each(
        self, federation: Federation, clients: Sequence[str], purpose: str, do: Callable[[Assignment], Sequence[T]]
    ) -> Iterator[T]:
        """Do something to all clients, a stack at a time; what it gives comes in the order of the clients."""
        for start in range(0, len(clients), self.width):
            works = [federation.assignment(client, purpose) for client in clients[start : start + self.width]]
            by_size = sorted(range(len(works)), key=lambda i: -len(federation.clients[clients[start + i]].train.y))
            done = dict(zip(by_size, do(_stack([works[i] for i in by_size])), strict=True))
            yield from (done[i] for i in range(len(works)))


def _stack(works: Sequence[Assignment]) -> Assignment:
    """Return one assignment for all: what was received is the same for everybody, the rest has a row for each."""
    first = works[0]
    memory = {p: Tree(t.layout, torch.stack([w.memory[p].flat for w in works])) for p, t in first.memory.items()}
    streams = [w.stream for w in works if isinstance(w.stream, Shuffled)]
    seeds = torch.stack([w.seed for w in works])
    return first._replace(memory=memory, stream=Together(streams), seed=seeds)


def _apart(slots: Trees, count: int) -> list[Trees]:
    """Return each client's row; a tree that does not differ between clients is everybody's."""
    rows = {p: tree.flat.expand(count, -1).unbind() for p, tree in slots.items()}
    return [{p: Tree(slots[p].layout, rows[p][i]) for p in slots} for i in range(count)]


class Together:
    """The streams of a stack of clients, in step. The client with the most examples comes first."""

    def __init__(self, streams: Sequence[Shuffled]) -> None:
        self._streams = streams
        self.counts = [s.batches for s in streams]

    @cached_property
    def batches(self) -> Tensor:
        """``(K, 1)`` batches in one pass."""
        return torch.tensor(self.counts, device=self._streams[0].x.device)[:, None]

    @cached_property
    def examples(self) -> tuple[Tensor, Tensor]:
        """All examples, ``(K, n, ...)``; shorter clients are padded with zeros that no batch holds."""
        x, y = ([getattr(s, axis) for s in self._streams] for axis in "xy")
        return pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True)

    def epochs(self, count: int) -> Sequence[Lockstep]:
        """Return the steps of the first `count` passes; passes begin together."""
        longest, widest = self.counts[0], max(max(s.sizes) for s in self._streams)
        rows = np.zeros((count * longest, len(self._streams), widest), np.int64)
        for client, stream in enumerate(self._streams):
            for epoch in range(count):
                batches = np.split(stream.order(epoch), np.cumsum(stream.sizes)[:-1])
                for k, batch in enumerate(batches):
                    rows[epoch * longest + k, client, : len(batch)] = batch
        return _Locksteps(self, torch.from_numpy(rows).to(self._streams[0].x.device), self._plan())

    def _plan(self) -> list[list[tuple[slice, int]]]:
        """Return for each step of a pass the neighbors whose batches have one size, and that size."""
        plan = []
        for k in range(self.counts[0]):
            live = [s.sizes[k] for s in self._streams if s.batches > k]
            groups, start = [], 0
            for size, same in groupby(live):
                stop = start + len(list(same))
                groups.append((slice(start, stop), size))
                start = stop
            plan.append(groups)
        return plan

    @property
    def batch_norm(self) -> bool:
        """Whether the model normalizes by batch."""
        return self._streams[0].batch_norm


class _Locksteps(Sequence[Lockstep]):
    def __init__(self, source: Together, rows: Tensor, plan: list[list[tuple[slice, int]]]) -> None:
        self._source = source
        self._rows = rows
        self._plan = plan
        self._client = torch.arange(rows.shape[1], device=rows.device)[:, None]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Lockstep: ...
    @overload
    def __getitem__(self, at: slice) -> list[Lockstep]: ...
    def __getitem__(self, at: int | slice) -> Lockstep | list[Lockstep]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        rows = self._rows[at]
        groups = tuple(
            Group(of, self._batch(of, rows[of, :size], size)) for of, size in self._plan[at % len(self._plan)]
        )
        return Lockstep(groups, groups[-1].rows.stop)

    def _batch(self, clients: slice, rows: Tensor, size: int) -> Batch:
        x, y = self._source.examples
        chosen = self._client[clients], rows
        return Batch(x[chosen], y[chosen], frozen=self._source.batch_norm and size == 1)
