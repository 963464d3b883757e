"""The types of the contract: what the functions of parts get and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from idiolect.core.nest import Nest, rows_in, taken, tensors
from idiolect.core.scope import Scope
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import EMPTY, Tree


class Batch(NamedTuple):
    """One mini-batch of one client.

    Attributes:
        x: ``(b, ...)`` inputs: a tensor, or a nest of tensors.
        y: ``(b, ...)`` targets, likewise.
        key: random seed of this step (dropout), the same for every pass over the batch.
        frozen: normalize by running statistics instead of those of the batch (a client with one example).
    """

    x: Nest
    y: Nest
    key: int = 0
    frozen: bool = False


class ClientRows(NamedTuple):
    """Neighboring clients of a stack whose batches have the same size."""

    rows: slice
    """The clients, as rows of the stack."""
    batch: Batch
    """Their batches, with the axis of clients first: x is ``(k, b, ...)``."""


class Lockstep(NamedTuple):
    """One step of a stack of K clients, of which the first `live` take it: clients have different numbers of steps.

    Attributes:
        groups: the batches of the first `live` clients.
        live: number of clients that take the step.
        frozen: normalize by running statistics, whatever the batches say.
    """

    groups: tuple[ClientRows, ...]
    live: int
    frozen: bool = False


Step = Batch | Lockstep
"""The examples of one gradient. Parts pass it on, and do not look inside."""


def halves(step: Step) -> tuple[Step, Step]:
    """Return a step's examples split in two, alternating; both halves of a single example are that example.

    A half with a single example is normalized by running statistics, since one value has no variance.

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
    count = rows_in(batch.y, axis)
    rows = torch.arange(min(which, count - 1), count, 2, device=tensors(batch.y)[0].device)
    x, y = taken(batch.x, rows, axis), taken(batch.y, rows, axis)
    return batch._replace(x=x, y=y, frozen=batch.frozen or len(rows) == 1)


class Gradient(NamedTuple):
    """The result of one forward and backward pass over a batch."""

    gradient: Tree
    """Gradient of the mean loss with respect to the trainable weights."""
    buffers: Tree
    """Statistics and counters after the pass."""
    loss: Tensor
    """(...) mean loss of the batch; the axes, if any, are those of a stack."""


GradFn = Callable[[Tree, Step], Gradient]
"""(weights, step) -> gradient; pure. In a stack, clients that do not take the step have gradient zero."""


class PlainGrad(Protocol):
    """The gradient of the loss of the run, a `GradFn`."""

    def __call__(self, weights: Tree, step: Step, *, only: Scope | None = None) -> Gradient:
        """Return it in the weights of `only` (all by default); `nothing` saves the backward pass."""
        ...


class Seen(NamedTuple):
    """Outputs and features of a batch."""

    outputs: Tensor
    """``(b, ...)`` outputs of the model; if it returns several tensors, its `logits`."""
    features: Tensor
    """``(b, d)`` input of the layer that was asked for; for the head, the output of the body."""


class Pass(NamedTuple):
    """A forward pass over one client's batch, as the loss of a part sees it; differentiable."""

    outputs: Tensor
    """``(b, ...)`` outputs of the model; if it returns several tensors, its `logits`."""
    features: Tensor
    """``(b, d)`` input of the layer that was asked for; for the head, the output of the body."""
    weights: Mapping[str, Tensor]
    """The tensors of the pass by name, buffers as they were before it."""
    layer: Callable[[Tensor], Tensor]
    """The layer that was asked for: features -> its output."""
    under: Callable[[Mapping[str, Tensor]], Seen]
    """Other weights -> outputs and features of the same examples in evaluation mode; the rest is as in the pass."""


Term = Callable[[Pass, Nest], Tensor]
"""(pass, targets) -> () mean loss."""


class Objective(NamedTuple):
    """A loss that a part defines for local training.

    Attributes:
        layer: name of the layer whose input is `Pass.features`, such as the head.
        loss: (loss without this part, pass, targets, facts) -> () mean over the batch. It sees one client's batch at
            a time and draws no random numbers.
        facts: other values that the loss needs. In a stack it has one row per client, and `loss` sees one of them.
    """

    layer: str
    loss: Callable[[Term, Pass, Nest, Tree], Tensor]
    facts: Tree = EMPTY


class Query(NamedTuple):
    """A function of a client's examples in evaluation mode: sums over them, or values for each of them.

    Attributes:
        layer: name of the layer whose input is `Pass.features`.
        sums: (pass, targets, facts) -> tensors by name, summed over the batch; for `Local.each` not summed, with an
            axis of examples first.
        shapes: the shapes of these tensors by name, in the same order, without the axis of examples.
        facts: as for an `Objective`.
    """

    layer: str
    sums: Callable[[Pass, Nest, Tree], Mapping[str, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    facts: Tree = EMPTY


Trees = dict[str, Tree]
"""One tree per part, by the name of the part."""

Direct = Callable[[Tree, Tree], Tree]
"""(gradient, weights) -> the direction that the optimizer descends along."""


class Stream(Protocol):
    """A client's examples as mini-batches, in the order of this round."""

    @property
    def batches(self) -> int | Tensor:
        """Number of batches in one pass; ``(K, 1)`` in a stack."""
        ...

    @property
    def order(self) -> Tensor | None:
        """(K,) rows of the stack in the order of this stream's clients; None if the order is that of the stack."""
        ...

    def epochs(self, count: int) -> Sequence[Step]:
        """Return the batches of the first `count` passes; the same at every call."""
        ...


class Train(Protocol):
    """Local training that parts may call: the run's optimizer with a fresh state, on the plain gradient."""

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
        """Return the weights after training.

        Args:
            weights: the weights to start from.
            only: the weights that are trained; None for all.
            epochs: passes over the examples; None for those of the run.
            lr: learning rate; None for that of the round.
            freeze_statistics: normalize by running statistics, and leave them as they are.
            direct: the direction that the optimizer descends along; None for the gradient.
            objective: the loss; None for that of the run.
        """
        ...


Split = Literal["train", "val"]
"""The training or the validation examples of a client; ``"val"`` means the training ones if it has no others."""


class TotalQuery(Protocol):
    """Sums over all of a client's examples."""

    def __call__(self, weights: Tree, query: Query, split: Split = "train") -> Tree:
        """Return the sums of a query, in evaluation mode."""
        ...


class EachQuery(Protocol):
    """Values of a query for each training example of a client, or for each of the unlabeled inputs of one client."""

    def __call__(self, weights: Tree, query: Query, inputs: Nest | None = None) -> Tree:
        """Return the values of a query, in evaluation mode; with `inputs`, the query gets empty targets, ``(b, 0)``."""
        ...


class Whole(Protocol):
    """The mean loss over all of a client's examples, normalized by running statistics.

    Layers other than batch normalization are in training mode (dropout).
    """

    def __call__(self, weights: Tree, *, only: Scope | None = None, split: Split = "train") -> Gradient:
        """Return it with its gradient in the weights of `only` (all by default); `nothing` saves the backward pass."""
        ...


@dataclass(frozen=True)
class Setup:
    """The inputs of the functions that make memories, states and rows."""

    structure: ModelStructure
    weights: Tree
    """The initial weights, statistics and counters."""
    shared: Tree
    """Those of them that are exchanged."""
    population: int = 1
    """Number of clients that the run is prepared for. Over Flower more may join later, and a site sees 1."""


@dataclass(frozen=True)
class Local:
    """One client in one round, as one part sees it.

    Where an engine stacks clients, trees, `steps` and `seed` have a leading axis of clients.

    Attributes:
        structure: the tensors of the model, by kind and layer.
        shared: the exchanged tensors as the client received them (the anchor of proximal terms).
        start: the weights that local training starts from; in `begin`, the weights so far.
        end: the weights that it ended with; equal to `start` before training.
        stream: the client's training examples in batches.
        steps: (..., 1) number of steps taken; 0 before training.
        effective_steps: (..., 1) the number of plain steps that these are worth: more with momentum.
        lr: learning rate of this round.
        seed: (...) int64 random seed of this client in this round.
        round: rounds played before this one.
        grad: the plain gradient of the loss, in the weights of `only`.
        train: local training, for parts that train a second time.
        total: (weights, query, split) -> sums over all of the client's examples of a split.
        each: (weights, query) -> values for each training example, ``(..., n, *shape)`` in the order of a pass; in a
            stack, zeros follow where a client has fewer than n. Also for unlabeled inputs, in their order.
        counts: number of classes C -> (..., C) training examples of each class.
        whole: (weights) -> the mean loss of all examples of a split, and its gradient.
        statistics: (weights, at least two unlabeled inputs) -> mean and biased variance of the inputs of each layer of
            batch normalization, with these inputs as one batch, by the names of its running statistics.
        memory: what this part keeps on the client between rounds; it never leaves the client.
        received: this part's state on the server, as it was sent.
        message: what the server sent to this client alone for this part.
        inputs: the unlabeled inputs to predict, in the `deploy` of a part that is `transductive`; else None.
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
    grad: PlainGrad
    train: Train
    total: TotalQuery
    each: EachQuery
    counts: Callable[[int], Tensor]
    whole: Whole
    statistics: Callable[[Tree, Nest], Tree]
    memory: Tree = field(default_factory=lambda: EMPTY)
    received: Tree = field(default_factory=lambda: EMPTY)
    message: Tree = field(default_factory=lambda: EMPTY)
    inputs: Nest | None = None


Weight = float | Tensor | Tree
"""The weight of an upload in a mean: one number, or a tree of one number per value."""


class Arrival(NamedTuple):
    """One client's upload, as the `contribute` of one part sees it.

    Attributes:
        own: the upload that this part's `finish` returned.
        weights: the exchanged tensors that the client sent.
        examples: number of training examples of the client.
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
        old: the shared tensors that the clients of this round received; in `broadcast`, those so far.
        new: in `aggregate`, the shared tensors as the parts so far have changed them; else equal to `old`.
        lr: learning rate of this round.
        participation: in `aggregate`, clients whose upload counts / population; else 1.
        seed: random seed of the server in this round.
        round: rounds played before this one.
        state: this part's state.
        clients: in `aggregate`, the clients whose uploads count, by their place in the population; in `message`, the
            client that it is for; else empty.
        rows: in `aggregate`, this part's rows of these clients, ``(n, ...)`` in their order; in `message`, the row of
            the client; else empty.
        rows_of: places of any clients -> this part's rows of them, ``(n, ...)``, as they were when the round began.
    """

    structure: ModelStructure
    old: Tree
    new: Tree
    lr: float
    participation: float = 1.0
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
    """The changes that a part's `aggregate` makes on the server; what is None stays as it is.

    Attributes:
        state: this part's state.
        shared: the shared tensors.
        rows: this part's rows of the clients that arrived, ``(n, ...)`` in the order of `Central.clients`.
    """

    state: Tree | None = None
    shared: Tree | None = None
    rows: Tree | None = None
