"""The words of the contract: what passes between engine, client, part and server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from idiolect.core.scope import Scope
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import EMPTY, Tree


class Batch(NamedTuple):
    """One mini-batch of one client.

    Attributes:
        x: ``(b, ...)`` inputs.
        y: ``(b, ...)`` targets.
        key: seed of this step's randomness (dropout), the same for every pass over the batch.
        frozen: normalize by running statistics instead of the batch's (a client with one example).
    """

    x: Tensor
    y: Tensor
    key: int = 0
    frozen: bool = False


class ClientRows(NamedTuple):
    """Neighboring clients of a stack whose batches have one size."""

    rows: slice
    """Which clients."""
    batch: Batch
    """Theirs, with the axis of clients first: x is ``(k, b, ...)``."""


class Lockstep(NamedTuple):
    """One step of a stack of K clients, which have different numbers of steps: the first `live` take it.

    Attributes:
        groups: the batches; together they cover the first `live` clients.
        live: how many clients take the step.
        frozen: normalize by running statistics, whatever the batches say.
    """

    groups: tuple[ClientRows, ...]
    live: int
    frozen: bool = False


Step = Batch | Lockstep
"""What a gradient is taken on. Parts hand it on and do not look inside."""


def halves(step: Step) -> tuple[Step, Step]:
    """Split a step's examples in two, every other one to each half; a batch of one example is both halves.

    A half of a single example is normalized by running statistics, since one value has no variance.

    Example:
        >>> one, other = halves(Batch(torch.arange(5.0), torch.arange(5)))
        >>> one.y.tolist(), other.y.tolist()
        ([0, 2, 4], [1, 3])
    """
    if isinstance(step, Batch):
        return _half(step, 0, axis=0), _half(step, 1, axis=0)
    one, other = (tuple(ClientRows(g.rows, _half(g.batch, k, axis=1)) for g in step.groups) for k in (0, 1))
    return step._replace(groups=one), step._replace(groups=other)


def _half(batch: Batch, which: int, axis: int) -> Batch:
    count = batch.y.shape[axis]
    rows = torch.arange(min(which, count - 1), count, 2, device=batch.y.device)
    x, y = batch.x.index_select(axis, rows), batch.y.index_select(axis, rows)
    return batch._replace(x=x, y=y, frozen=batch.frozen or len(rows) == 1)


class Gradient(NamedTuple):
    """What one pass over a batch gives."""

    gradient: Tree
    """Gradient of the mean loss in the trainable weights."""
    buffers: Tree
    """Statistics and counters after the pass."""
    loss: Tensor
    """() mean loss of the batch."""


GradFn = Callable[[Tree, Step], Gradient]
"""Weights and a batch to a gradient; pure. In a stack, rows that do not take the step have gradient zero."""


class Seen(NamedTuple):
    """What a model makes of a batch."""

    outputs: Tensor
    """``(b, ...)`` of the model."""
    features: Tensor
    """``(b, d)`` what the layer in question is given: for the head, what the body makes of the examples."""


class Pass(NamedTuple):
    """A pass of the model over one client's batch, as a part's own loss sees it; differentiable."""

    outputs: Tensor
    """``(b, ...)`` of the model."""
    features: Tensor
    """``(b, d)`` what the layer in question is given: for the head, what the body makes of the examples."""
    weights: Mapping[str, Tensor]
    """The tensors of the pass by name, buffers as they were before it."""
    layer: Callable[[Tensor], Tensor]
    """The layer in question: features to what it gives."""
    under: Callable[[Mapping[str, Tensor]], Seen]
    """The same examples under other weights, in evaluation mode; tensors that are not named are those of the pass."""


Term = Callable[[Pass, Tensor], Tensor]
"""A pass and targets to the mean loss, ()."""


class Objective(NamedTuple):
    """A loss of a part's own, in local training.

    Attributes:
        layer: name of the layer whose input are the features, such as that of the head.
        loss: (loss without this part, pass, targets, facts) -> () mean over the batch. It sees one client's batch at
            a time and draws no random numbers.
        facts: what it needs beside the pass. In a stack it has a row for each client, of which `loss` sees one.
    """

    layer: str
    loss: Callable[[Term, Pass, Tensor, Tree], Tensor]
    facts: Tree = EMPTY


class Query(NamedTuple):
    """What is to be seen of a client's examples in evaluation mode: sums over them, or something of each.

    Attributes:
        layer: name of the layer whose input are the features.
        sums: (pass, targets, facts) -> tensors by name, summed over the batch; for `Local.each` not summed, with an
            axis of examples first.
        shapes: the shapes of these tensors by name, in the same order, without the axis of examples.
        facts: as for an `Objective`.
    """

    layer: str
    sums: Callable[[Pass, Tensor, Tree], Mapping[str, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    facts: Tree = EMPTY


Trees = dict[str, Tree]
"""One tree per part, by the name of the part."""

Direct = Callable[[Tree, Tree], Tree]
"""Gradient and weights to the direction that is descended along."""


class Stream(Protocol):
    """A client's examples as mini-batches in this round's order."""

    @property
    def batches(self) -> int | Tensor:
        """Number of batches in one pass; ``(K, 1)`` in a stack."""
        ...

    @property
    def order(self) -> Tensor | None:
        """(K,) the clients of a stack in the order in which this stream has them; None where it is the stack's."""
        ...

    def epochs(self, count: int) -> Sequence[Step]:
        """Return the batches of the first `count` passes; the same at every call."""
        ...


class Train(Protocol):
    """Local training as parts may call it: the run's optimizer, fresh, on the plain gradient."""

    def __call__(
        self,
        weights: Tree,
        *,
        only: Scope | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        freeze_statistics: bool = False,
        direct: Direct | None = None,
        objective: Objective | None = None,
    ) -> Tree:
        """Return the weights after training those in `only` (all by default) along `direct` (the gradient).

        The loss is the run's, or an objective's.
        """
        ...


Split = Literal["train", "val"]
"""Which of a client's examples: ``"val"`` is its validation examples, or the training ones where it has none."""


class TotalQuery(Protocol):
    """Sums over all of a client's examples."""

    def __call__(self, weights: Tree, query: Query, split: Split = "train") -> Tree:
        """Return the sums of a query, in evaluation mode."""
        ...


class EachQuery(Protocol):
    """Values of each of a client's training examples, or of each of one client's unlabelled inputs."""

    def __call__(self, weights: Tree, query: Query, inputs: Tensor | None = None) -> Tree:
        """Return the values of a query, in evaluation mode; of inputs it is given targets ``(b, 0)`` without values."""
        ...


class Whole(Protocol):
    """The mean loss over all of a client's examples, normalized by running statistics.

    Whatever else is random or different in training (dropout) is as in training.
    """

    def __call__(self, weights: Tree, *, only: Scope | None = None, split: Split = "train") -> Gradient:
        """Differentiate it in the weights of `only` (all by default); with `nothing` the loss costs no pass back."""
        ...


@dataclass(frozen=True)
class Setup:
    """What the first memory, server state and rows are made from."""

    structure: ModelStructure
    weights: Tree
    """The initial weights, statistics and counters."""
    shared: Tree
    """Those of them that are exchanged."""
    population: int = 1
    """Number of clients that the run is set up for. Over Flower more may join later; a site itself sees 1."""


@dataclass(frozen=True)
class Local:
    """One client in one round, as one part sees it.

    Where an engine stacks clients, trees and `steps` have leading axes and `seed` has theirs.

    Attributes:
        structure: the tensors of the model, by kind and layer.
        shared: the exchanged tensors as they were received (the anchor of proximal terms).
        start: weights that local training starts from.
        end: weights it ended with (equal to `start` before training).
        stream: the client's batches.
        steps: (..., 1) number of steps taken (0 before training).
        effective_steps: (..., 1) how many plain steps they are worth under the run's optimizer: more with momentum.
        lr: learning rate of this round.
        seed: (...) int64, this client's own randomness in this round.
        round: rounds played before this one.
        grad: the plain gradient of the loss.
        train: local training for parts that need a second one.
        total: weights and a query -> its sums over all of the client's examples of a split.
        each: weights and a query -> its values for each training example, ``(..., n, *shape)`` in the order of a
            pass; in a stack, zeros follow where a client has fewer than n. Also for unlabelled inputs, in their order.
        counts: number of classes C -> (..., C) how many training examples the client has of each.
        whole: the loss of all examples of a split at once, and its gradient.
        statistics: weights and unlabelled inputs, at least two -> mean and (biased) variance of what each layer of
            batch normalization is given, where the inputs are one batch, by the names of its running statistics.
        memory: what this part keeps on the client between rounds; it never leaves the client.
        received: this part's server state, as it was sent.
        message: what the server sent to this client alone for this part.
        inputs: the unlabelled inputs to predict, for the `deploy` of a part that is `transductive`; else None.
    """

    structure: ModelStructure
    shared: Tree
    start: Tree
    end: Tree
    stream: Stream
    steps: Tensor
    effective_steps: Tensor
    lr: float
    seed: Tensor
    round: int
    grad: GradFn
    train: Train
    total: TotalQuery
    each: EachQuery
    counts: Callable[[int], Tensor]
    whole: Whole
    statistics: Callable[[Tree, Tensor], Tree]
    memory: Tree = field(default_factory=lambda: EMPTY)
    received: Tree = field(default_factory=lambda: EMPTY)
    message: Tree = field(default_factory=lambda: EMPTY)
    inputs: Tensor | None = None


Weight = float | Tensor | Tree
"""How much an upload counts in a mean: one number, or a tree of one number per value."""


class Arrival(NamedTuple):
    """One client's upload as one part's `contribute` sees it.

    Attributes:
        own: what this part's `finish` sent.
        weights: the exchanged tensors that the client sent.
        examples: training examples of the client.
        steps: (1,) local steps that it took.
    """

    own: Tree
    weights: Tree
    examples: int
    steps: Tensor


@dataclass(frozen=True)
class Central:
    """The server in one round, as one part sees it.

    Attributes:
        structure: the tensors of the model, by kind and layer.
        old: shared tensors as the clients of this round received them.
        new: shared tensors after it (equal to `old` until `share` has aggregated), as parts have changed them so far.
        lr: learning rate of this round.
        participation: clients whose upload counts / population; while they arrive, the cohort / population.
        seed: decides what the server draws in this round.
        round: rounds played before this one.
        state: this part's server state.
        clients: whose uploads count, by their place in the population; while they arrive, nobody. In `message`, the
            one client that is addressed.
        rows: this part's rows of these clients, ``(n, ...)`` in their order; in `message`, the row of that client.
        rows_of: places of any clients -> this part's rows of them, ``(n, ...)``, as they were when the round began.
    """

    structure: ModelStructure
    old: Tree
    new: Tree
    lr: float
    participation: float
    seed: int = 0
    round: int = 0
    state: Tree = field(default_factory=lambda: EMPTY)
    clients: tuple[int, ...] = ()
    rows: Tree = field(default_factory=lambda: EMPTY)
    rows_of: Callable[[Sequence[int]], Tree] = lambda places: EMPTY

    @property
    def arrived(self) -> int:
        """Number of clients whose upload counts."""
        return len(self.clients)


class Update(NamedTuple):
    """What a part's `aggregate` changes on the server; what is None stays as it is.

    Attributes:
        state: this part's server state.
        shared: the shared tensors.
        rows: this part's rows of the clients that arrived, ``(n, ...)`` in the order of `Central.clients`.
    """

    state: Tree | None = None
    shared: Tree | None = None
    rows: Tree | None = None
