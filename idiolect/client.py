"""One client, one round: the only training loop of the project, pure, so that it runs anywhere.

The same lines run a stack of clients: trees then have an axis of clients first, and a step is a `Lockstep`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial, reduce
from types import EllipsisType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from idiolect.anatomy import Anatomy
from idiolect.errors import UsageError
from idiolect.method import Method
from idiolect.optim import State
from idiolect.part import Part
from idiolect.scope import Scope
from idiolect.training import Training
from idiolect.tree import EMPTY, Tree, clip, clipping, layout, pick, step_
from idiolect.words import Direct, GradFn, Gradient, Group, Local, Lockstep, Look, Objective, Slot, Step, Stream

Slots = dict[str, Tree]
"""One tree per part, by its name."""


class Learner(Protocol):
    """A model as local training sees it: how it is differentiated is its own affair."""

    @property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        ...

    @property
    def way(self) -> str:
        """How gradients are made, for the record: two runs that differ in it differ by rounding."""
        ...

    def grad(
        self,
        weights: Tree,
        step: Step,
        only: Container[str] | None = None,
        objectives: Sequence[Objective] = (),
    ) -> Gradient:
        """Differentiate the mean loss in all trainable weights, or in those named; pure.

        Objectives change the loss, the first one last.
        """
        ...

    def observe(self, weights: Tree, step: Step, look: Look) -> Tree:
        """Return the sums of a look over a batch, in evaluation mode."""
        ...

    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """Return the outputs in evaluation mode, without a graph."""
        ...

    @property
    def descend(self) -> Callable[[Tree, Step, float], Tensor] | None:
        """Plain gradient descent in place, (weights, step, rate) -> loss, if the learner has a faster way to it."""
        ...


class Counted:
    """A learner that counts the gradients it takes.

    Args:
        model: the learner.
        none: (..., 1) zeros; a stack has a row for each client.
    """

    def __init__(self, model: Learner, none: Tensor) -> None:
        self.anatomy, self.way, self.predict, self.observe = model.anatomy, model.way, model.predict, model.observe
        self.descend = self._descend if model.descend else None
        self._model, self._in_stack, self._alone = model, none, 0

    @property
    def gradients(self) -> Tensor:
        """(..., 1) how many each client took."""
        return self._in_stack + self._alone

    def grad(
        self, weights: Tree, step: Step, only: Container[str] | None = None, objectives: Sequence[Objective] = ()
    ) -> Gradient:
        """See `Learner`."""
        self._count(step)
        return self._model.grad(weights, step, only, objectives)

    def _descend(self, row: Tree, step: Step, rate: float) -> Tensor:
        assert self._model.descend
        self._count(step)
        return self._model.descend(row, step, rate)

    def _count(self, step: Step) -> None:
        if isinstance(step, Lockstep):
            self._in_stack[: step.live] += 1
        else:
            self._alone += 1


class Outcome(NamedTuple):
    """What a client's round gives."""

    uploads: Slots
    memory: Slots
    steps: Tensor
    """(1,) local steps taken."""
    loss: Tensor
    """() mean training loss over those steps."""
    gradients: Tensor
    """(1,) gradients taken in the round, in local training and beside it."""


class Assignment(NamedTuple):
    """What one client works from in one round."""

    received: Slots
    memory: Slots
    stream: Stream
    lr: float
    seed: Tensor
    """() int64; its axes, if any, are those of a stack."""
    round: int


def client_round(method: Method, model: Learner, training: Training, work: Assignment) -> Outcome:
    """Train one client for one round. Nothing it is given is changed."""
    model = Counted(model, work.received["share"].flat.new_zeros(*work.seed.shape, 1))
    weights, memory, local = _begin(method, model, training, work)
    slots = {p.name: _slot(p, memory, work) for p in method.parts}
    objectives = [p.objective(local, slots[p.name]) for p in method.parts if p.objective]
    plain: GradFn = partial(model.grad, objectives=objectives) if objectives else local.grad
    grad = reduce(lambda g, p: p.gradient(g, local, slots[p.name]), reversed(method.parts), plain)
    directing = [p for p in method.parts if p.direction is not Part.direction]

    def direct(direction: Tree, at: Tree) -> Tree:
        return reduce(lambda d, p: p.direction(d, at, local, slots[p.name]), directing, direction)

    batches = work.stream.epochs(training.local_epochs)
    wrapped = None if grad is local.grad else grad
    end, steps, loss = descend(model, training, weights, batches, work.lr, wrapped, direct if directing else None)
    local = replace(local, end=end, steps=steps, effective_steps=training.optimiser.effective_steps(steps))
    uploads: Slots = {}
    for part in method.parts:
        memory[part.name], uploads[part.name] = part.finish(local, slots[part.name])
    return Outcome(uploads, memory, steps, loss, model.gradients)


def deployed(method: Method, model: Learner, training: Training, work: Assignment) -> Tree:
    """Return the weights that predict for a client now: the start of its next round, then each `deploy`."""
    weights, memory, local = _begin(method, model, training, work)
    for part in method.parts:
        if part.deploy is not Part.deploy and weights.layout is not model.anatomy.layout:
            raise UsageError(
                f"list {part.name} before the part that fills buffers to predict: it works on weights alone"
            )
        weights = part.deploy(local, weights, _slot(part, memory, work))
    return weights


def mail_of(part: Part) -> str:
    """Return the name under which a client's memory holds what the server told it alone for a part."""
    return f"mail to {part.name}"


def _slot(part: Part, memory: Slots, work: Assignment) -> Slot:
    return Slot(memory[part.name], work.received[part.name], memory.get(mail_of(part), EMPTY))


def _begin(method: Method, model: Learner, training: Training, work: Assignment) -> tuple[Tree, Slots, Local]:
    memory, weights = dict(work.memory), EMPTY

    def train(
        weights: Tree,
        *,
        only: Scope | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        freeze_statistics: bool = False,
        direct: Direct | None = None,
        objective: Objective | None = None,
    ) -> Tree:
        steps = work.stream.epochs(training.local_epochs if epochs is None else epochs)
        trainable = model.anatomy.names("weight")
        names = trainable if only is None else only(model.anatomy)
        some = not names >= trainable

        def chosen(direction: Tree, at: Tree) -> Tree:
            return pick(direct(direction, at) if direct else direction, names)

        grad: GradFn | None = partial(model.grad, only=names) if some and not direct else None
        if objective:
            grad = partial(model.grad, only=None if direct else names, objectives=[objective])
        rate = work.lr if lr is None else lr
        turn = chosen if some or direct else None
        weights = _stacked(weights, work)
        return descend(model, training, weights, steps, rate, grad, turn, freeze_statistics)[0]

    none = work.received["share"].flat.new_zeros(*work.seed.shape, 1)
    local = Local(
        anatomy=model.anatomy,
        shared=work.received["share"],
        start=EMPTY,
        end=EMPTY,
        stream=work.stream,
        steps=none,
        effective_steps=none,
        lr=work.lr,
        seed=work.seed,
        grad=model.grad,
        train=train,
        total=partial(_total, model, work),
        each=partial(_each, model, work),
        counts=partial(_counts, work),
        round=work.round,
        whole=partial(_whole, model, work),
    )
    for part in method.parts:
        slot = _slot(part, memory, work)
        weights, memory[part.name] = part.begin(replace(local, start=weights, end=weights), weights, slot)
    weights = _stacked(weights, work)
    return weights, memory, replace(local, start=weights, end=weights)


def _stacked(weights: Tree, work: Assignment) -> Tree:
    """Return weights with the axes of the stack, where they are the same for all of its clients."""
    return Tree(weights.layout, weights.flat.expand(*work.seed.shape, -1))


def _total(model: Learner, work: Assignment, weights: Tree, look: Look) -> Tree:
    """Return the sums of a look over all examples; zero where there are none."""
    where = layout(tuple(look.shapes), tuple(map(torch.Size, look.shapes.values())))
    total = Tree(where, weights.flat.new_zeros(*work.seed.shape, where.total))
    for step in work.stream.epochs(1):
        total = total + model.observe(_stacked(weights, work), step, look)
    return total


def _each(model: Learner, work: Assignment, weights: Tree, look: Look) -> Tree:
    """Return what a look sees of each example, and zeros after a client's last; no row where there are none."""
    weights, taken = _stacked(weights, work), [0] * work.seed.numel()
    pieces: list[tuple[slice, slice, Tree]] = []
    for step in work.stream.epochs(1):
        for group in step.groups if isinstance(step, Lockstep) else [Group(slice(1), step)]:
            count, at = group.batch.y.shape[work.seed.dim()], taken[group.rows.start or 0]
            part = step._replace(groups=(group,)) if isinstance(step, Lockstep) else step
            shapes = {name: (count, *shape) for name, shape in look.shapes.items()}
            seen = model.observe(weights, part, look._replace(shapes=shapes))
            pieces.append((group.rows, slice(at, at + count), _rows(seen, group.rows) if work.seed.dim() else seen))
            taken[group.rows] = [at + count] * len(taken[group.rows])
    whole = {name: weights.flat.new_zeros(len(taken), max(taken), *shape) for name, shape in look.shapes.items()}
    for rows, examples, seen in pieces:
        for name, tensor in seen.items():
            whole[name][rows, examples] = tensor
    where = layout(tuple(whole), tuple(t.shape[1:] for t in whole.values()))
    return Tree(where, torch.cat([t.reshape(*work.seed.shape, t[0].numel()) for t in whole.values()], dim=-1))


def _counts(work: Assignment, classes: int) -> Tensor:
    """Return how many examples of each class there are, ``(..., classes)``, in the dtype of the weights."""
    total = work.received["share"].flat.new_zeros(*work.seed.shape, classes)
    for step in work.stream.epochs(1):
        for rows, batch in step.groups if isinstance(step, Lockstep) else [(..., step)]:
            if batch.y.is_floating_point() or batch.y.dim() != total.dim():
                raise UsageError("the method counts examples by class: it needs one class label per example as target")
            total[rows] += one_hot(batch.y, classes).sum(-2)
    return total


def _whole(model: Learner, work: Assignment, weights: Tree, *, only: Scope | None = None) -> Gradient:
    """Return the mean loss of all examples and its gradient, batch by batch; zero where there are none."""
    weights, names = _stacked(weights, work), None if only is None else only(model.anatomy)
    where = model.anatomy.trainable if names is None else model.anatomy.trainable.only(names)
    gradient = weights.flat.new_zeros(*work.seed.shape, where.total)
    loss, seen = torch.zeros_like(weights.flat[..., :1]), torch.zeros_like(weights.flat[..., :1])
    for step in work.stream.epochs(1):
        out = model.grad(weights, step._replace(frozen=True), only=names)
        count = _examples(step, seen)
        gradient += count * out.gradient.flat
        loss += count * out.loss[..., None]
        seen += count
    seen = seen.clamp(min=1)
    return Gradient(Tree(where, gradient / seen), pick(weights, model.anatomy.buffers.starts), (loss / seen)[..., 0])


def _examples(step: Step, like: Tensor) -> Tensor:
    """Return how many examples each client has in a step, ``(..., 1)``."""
    if not isinstance(step, Lockstep):
        return torch.full_like(like, len(step.y))
    counts = torch.zeros_like(like)
    for rows, batch in step.groups:
        counts[rows] = batch.y.shape[1]
    return counts


def descend(
    model: Learner,
    training: Training,
    weights: Tree,
    steps: Sequence[Step],
    lr: float,
    grad: GradFn | None = None,
    direct: Direct | None = None,
    frozen: bool = False,
) -> tuple[Tree, Tensor, Tensor]:
    """Take one optimiser step per batch; return the weights, the steps taken (..., 1) and the mean loss (...).

    Args:
        model: what is differentiated.
        training: optimiser, clipping, groups.
        weights: where it starts; they are not changed.
        steps: the batches.
        lr: learning rate.
        grad: another gradient than the model's own.
        direct: what is made of the gradient before the optimiser sees it.
        frozen: normalise by running statistics throughout.
    """
    row = weights.clone()  # this descent's own: from here on it moves in place
    taken, total = torch.zeros_like(row.flat[..., :1]), torch.zeros_like(row.flat[..., 0])
    plain = model.descend if training.plain and grad is None and direct is None else None
    gradient, state = grad or model.grad, State()

    def take(step: Step, live: slice | EllipsisType) -> Tensor:
        """Take a step; what it makes is let go when it ends, so that the next one finds room in the cache."""
        nonlocal state
        out = gradient(row, step)
        direction = direct(out.gradient, row) if direct else out.gradient
        state = state or training.optimiser.init(direction)
        of_live = {name: _rows(tree, live) for name, tree in state.items()}
        here = _rows(row, live)
        move, factor, after = _move(model, training, _rows(direction, live), here, of_live)
        state = {name: _over(tree, state[name]) for name, tree in after.items()}
        step_(here, -lr * factor, move, _rows(out.buffers, live))
        return out.loss

    with torch.inference_mode(model.descend is not None):  # no graph is made: each operation costs less
        for batch in steps:
            step = batch._replace(frozen=True) if frozen else batch
            live = slice(step.live) if isinstance(step, Lockstep) else ...
            loss = plain(row, step, lr) if plain else take(step, live)
            if live is ...:
                taken.add_(1)
                total.add_(loss)
            else:
                taken[live].add_(1)
                total[live].add_(loss[live])
    return row, taken, total / taken[..., 0].clamp(min=1)


def _rows(tree: Tree, which: slice | EllipsisType) -> Tree:
    return tree if which is ... else Tree(tree.layout, tree.flat[which])


def _over(first: Tree, whole: Tree) -> Tree:
    """Return a stack with its first rows replaced."""
    if first.flat.shape == whole.flat.shape:
        return first
    return Tree(whole.layout, torch.cat([first.flat, whole.flat[len(first.flat) :]]))


def _move(
    model: Learner, training: Training, direction: Tree, weights: Tree, state: State
) -> tuple[Tree, Tensor | float, State]:
    """Return what the optimiser takes off the weights, before the learning rate and a factor; the factor; its state."""
    if training.clip is not None:
        if training.bare:  # clipped within the step
            return direction, clipping(direction, training.clip), state
        direction = clip(direction, training.clip)
    decay = training.decay(model.anatomy, direction)
    if isinstance(decay, Tree) or decay != 0:
        direction = direction + pick(weights, direction) * decay
    move, after = training.optimiser.move(direction, state)
    rate = training.rate(model.anatomy, direction)
    return (move * rate if isinstance(rate, Tree) or rate != 1 else move), 1.0, after
