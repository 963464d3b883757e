"""A client's examples as mini-batches, in an order that depends only on its name, the round and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.core.nest import tensors
from idiolect.core.rng import derive, stream
from idiolect.core.types import Batch, Trees
from idiolect.data import ClientData, Examples, LazyExamples
from idiolect.rounds.client import Assignment
from idiolect.rounds.training import Training


@dataclass(frozen=True)
class Shuffled:
    """Shuffled mini-batches; examples are gathered when a batch is read.

    The last batch may be smaller. Under batch normalization a last batch of one example joins the batch before it, and
    a client with a single example trains with the running statistics, since one value has no variance.

    Args:
        examples: of the client.
        batch_size: examples per batch; None for all at once.
        batch_norm: whether the model has batch normalization.
        words: seed, purpose, client and round: the order depends on these and the epoch.

    Example:
        >>> batches = Shuffled(Examples(torch.arange(5.0), torch.arange(5)), 2, True, (0, "train", "a", 1)).epochs(1)
        >>> [len(b.y) for b in batches], sorted(torch.cat([b.y for b in batches]).tolist())
        ([2, 3], [0, 1, 2, 3, 4])
    """

    examples: Examples | LazyExamples
    batch_size: int | None
    batch_norm: bool
    words: tuple[int | str, ...]
    order = None

    @cached_property
    def sizes(self) -> list[int]:
        """Examples in each batch of one pass."""
        n, size = len(self.examples), self.batch_size or len(self.examples)
        whole, rest = divmod(n, size)
        if rest == 1 and whole and self.batch_norm:
            return [size] * (whole - 1) + [size + 1]
        return [size] * whole + [rest] * (rest > 0)

    @property
    def batches(self) -> int:
        """Number of batches in one pass."""
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where the examples are taken from."""
        return tensors(self.examples.y)[0].device if isinstance(self.examples, Examples) else torch.device("cpu")

    def epochs(self, count: int) -> Sequence[Batch]:
        """Return the batches of the first `count` passes."""
        orders = [torch.from_numpy(self.permutation(epoch)).to(self.device) for epoch in range(count)]
        return _Batches(self, [rows for order in orders for rows in order.split_with_sizes(self.sizes)])

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions of the examples in the order of one pass."""
        n, blocks = len(self.examples), self.examples.blocks
        if self.batches == 1 or self.examples.ordered:
            return np.arange(n)
        random = stream(*self.words, "order", epoch)
        if blocks is None:
            return random.permutation(n)
        starts, order = np.cumsum([0, *blocks]), random.permutation(len(blocks))
        return np.concatenate([starts[k] + random.permutation(blocks[k]) for k in order])


class _Batches(Sequence[Batch]):
    def __init__(self, source: Shuffled, rows: list[Tensor]) -> None:
        self._source = source
        self._rows = rows
        self._key = derive(*source.words, "step")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Batch: ...
    @overload
    def __getitem__(self, at: slice) -> list[Batch]: ...
    def __getitem__(self, at: int | slice) -> Batch | list[Batch]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        rows, examples, key = self._rows[at], self._source.examples, (self._key + at) % 2**63
        if isinstance(examples, Examples) and len(rows) == len(examples):
            x, y = examples.x, examples.y  # in their order
        else:
            x, y = examples.take(rows, key)
        return Batch(x, y, key, frozen=self._source.batch_norm and len(rows) == 1)


class NoBatches:
    """A stream without examples: a round with it trains nothing, and shows the form of uploads and memory."""

    batches = 0
    order = None

    def epochs(self, count: int) -> Sequence[Batch]:
        """Return no batches."""
        return []


class RngKey(NamedTuple):
    """The values that all randomness in a client's round depends on."""

    seed: int
    purpose: str
    """``"train"`` or ``"deploy"``."""
    client: str
    round: int


def assign(
    model: Model,
    training: Training,
    data: ClientData,
    key: RngKey,
    received: Trees,
    memory: Trees,
    messages: Trees,
    lr: float,
) -> Assignment:
    """Return the inputs of a client's round, on the device of the model; simulator and sites both call this."""

    def stream_of(examples: Examples | LazyExamples, *words: str) -> Shuffled:
        return Shuffled(examples, training.batch_size, model.structure.has_batch_norm, (*key, *words))

    train = stream_of(data.train)
    validation = stream_of(data.val, "val") if data.val else train
    seed = torch.tensor(derive(*key, "dice"), device=model.device)
    return Assignment(received, memory, messages, train, validation, lr, seed, key.round)
