"""The engine that stacks clients: one client round for many clients, with one row per client.

A step launches about as many kernels for a whole stack as for one client; on a GPU and with tiny networks, launches are
the limit. Clients keep their own batches. They are sorted by size, so that those with a step left are the first rows.
Neighbors whose batches have the same size are differentiated together, at this size, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Learner
from idiolect.core.nest import Nest, joined, mapped
from idiolect.core.tree import Tree
from idiolect.core.types import Batch, ClientRows, Lockstep, Stream, Trees
from idiolect.core.values import whole
from idiolect.data import Examples
from idiolect.engines.base import Score, Source
from idiolect.engines.sequential import Sequential
from idiolect.rounds.batches import Shuffled
from idiolect.rounds.client import Assignment, Deployed, Outcome

T = TypeVar("T")


@dataclass
class Stacked:
    """An engine that trains and deploys clients in stacks, with `torch.func.vmap`.

    Args:
        width: clients per stack, at least 1. Results depend on it only by rounding.
    """

    width: int

    def __post_init__(self) -> None:
        self.width = whole("width", self.width, 1)

    def __repr__(self) -> str:
        return f"stacks of {self.width}"

    def learner(self, model: Model) -> Learner:
        """Return the model itself, which also differentiates stacks."""
        return model

    def train(self, source: Source, clients: Sequence[str]) -> Iterator[Outcome]:
        """See `Engine`."""

        def trained(work: Assignment) -> Sequence[Outcome]:
            out = source.worker.train(work)
            count = len(work.seed)
            uploads, memory = _apart(out.uploads, count), _apart(out.memory, count)
            return [Outcome(*rows) for rows in zip(uploads, memory, out.steps, out.loss, out.gradients, strict=True)]

        return self._each(source, clients, "train", trained)

    def measure(self, source: Source, clients: Sequence[str], score: Score) -> Iterator[list[float]]:
        """See `Engine`; weights that depend on the inputs are computed client by client."""
        if source.worker.method.transductive:
            yield from Sequential().measure(source, clients, score)
            return

        def own(work: Assignment) -> Sequence[Tree]:
            weights = source.worker.deploy(work).weights
            return [trees["own"] for trees in _apart({"own": weights}, len(work.seed))]

        shared = source.sent("deploy")["share"]
        for client, weights in zip(clients, self._each(source, clients, "deploy", own), strict=True):
            yield score(source.worker, source.clients[client], Deployed(weights), shared)

    def close(self) -> None:
        """See `Engine`."""

    def _each(
        self, source: Source, clients: Sequence[str], purpose: str, do: Callable[[Assignment], Sequence[T]]
    ) -> Iterator[T]:
        """Apply a function to all clients, a stack at a time; yield the results in the order of the clients."""
        for start in range(0, len(clients), self.width):
            works = [source.assignment(client, purpose) for client in clients[start : start + self.width]]
            by_size = sorted(range(len(works)), key=lambda i: -len(source.clients[clients[start + i]].train))
            done = dict(zip(by_size, do(stack_of([works[i] for i in by_size])), strict=True))
            yield from (done[i] for i in range(len(works)))


def stack_of(works: Sequence[Assignment]) -> Assignment:
    """Return one assignment for several clients: `received` is common to all, the rest has one row per client."""
    seeds = torch.stack([w.seed for w in works])
    return works[0]._replace(
        memory=_rows([w.memory for w in works]),
        messages=_rows([w.messages for w in works]),
        stream=_together([w.stream for w in works]),
        validation=_together([w.validation for w in works]),
        seed=seeds,
    )


def _rows(trees: Sequence[Trees]) -> Trees:
    return {p: Tree(t.layout, torch.stack([own[p].flat for own in trees])) for p, t in trees[0].items()}


def _together(streams: Sequence[Stream]) -> Together:
    """Return the streams of a stack as one, sorted by size."""
    shuffled = [s for s in streams if isinstance(s, Shuffled)]
    order = sorted(range(len(shuffled)), key=lambda i: -len(shuffled[i].examples))
    arranged = None if order == sorted(order) else torch.tensor(order, device=shuffled[0].device)
    return Together([shuffled[i] for i in order], arranged)


def _apart(trees: Trees, count: int) -> list[Trees]:
    """Return each client's row; a tree without the axis of clients is the same for all of them."""
    rows = {p: tree.flat.expand(count, -1).unbind() for p, tree in trees.items()}
    return [{p: Tree(trees[p].layout, rows[p][i]) for p in trees} for i in range(count)]


class Together:
    """The streams of a stack of clients, which take their steps together.

    Args:
        streams: the clients' streams; the client with the most examples comes first.
        order: (K,) rows of the stack in the order of the streams; None if the order is that of the stack.
    """

    def __init__(self, streams: Sequence[Shuffled], order: Tensor | None = None) -> None:
        self._streams = streams
        self.order = order
        self.counts = [s.batches for s in streams]

    @cached_property
    def batches(self) -> Tensor:
        """``(K, 1)`` batches in one pass."""
        return torch.tensor(self.counts, device=self._streams[0].device)[:, None]

    @cached_property
    def examples(self) -> tuple[Nest, Nest] | None:
        """All examples, ``(K, n, ...)``; shorter clients are padded with zeros, which are in no batch.

        None if they are not in memory.
        """
        held = [s.examples for s in self._streams if isinstance(s.examples, Examples)]
        if len(held) < len(self._streams):
            return None
        pad = partial(pad_sequence, batch_first=True)
        return joined([e.x for e in held], pad), joined([e.y for e in held], pad)

    def batch(self, client: int, count: int, at: int) -> Batch:
        """Return a client's batch of a step, read by its own stream, of `count` passes."""
        own, longest = self._streams[client], self.counts[0]
        return own.epochs(count)[at // longest * own.batches + at % longest]

    def epochs(self, count: int) -> Sequence[Lockstep]:
        """Return the steps of the first `count` passes; all clients begin a pass together."""
        longest, widest = self.counts[0], max(max(s.sizes) for s in self._streams)
        rows = np.zeros((count * longest, len(self._streams), widest), np.int64)
        for client, stream in enumerate(self._streams):
            for epoch in range(count):
                batches = np.split(stream.permutation(epoch), np.cumsum(stream.sizes)[:-1])
                for k, batch in enumerate(batches):
                    rows[epoch * longest + k, client, : len(batch)] = batch
        return _Locksteps(self, torch.from_numpy(rows).to(self._streams[0].device), self._plan())

    def _plan(self) -> list[list[tuple[slice, int]]]:
        """Return, for each step of a pass, the runs of neighbors with the same batch size, and that size."""
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
        """Whether the model has batch normalization."""
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
            ClientRows(of, self._batch(of, rows[of, :size], size, at)) for of, size in self._plan[at % len(self._plan)]
        )
        return Lockstep(groups, groups[-1].rows.stop)

    def _batch(self, clients: slice, rows: Tensor, size: int, at: int) -> Batch:
        frozen = self._source.batch_norm and size == 1
        if self._source.examples is None:
            count = len(self) // len(self._plan)
            own = [self._source.batch(k, count, at) for k in range(*clients.indices(len(self._client)))]
            return Batch(joined([b.x for b in own]), joined([b.y for b in own]), frozen=frozen)
        x, y = self._source.examples
        chosen = self._client[clients], rows
        return Batch(mapped(lambda t: t[chosen], x), mapped(lambda t: t[chosen], y), frozen=frozen)
