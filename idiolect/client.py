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

from idiolect.anatomy import Anatomy
from idiolect.method import Method
from idiolect.optim import State
from idiolect.part import Part
from idiolect.scope import Scope
from idiolect.training import Training
from idiolect.tree import EMPTY, Tree, clip, clipping, pick, step_
from idiolect.words import Direct, GradFn, Gradient, Local, Lockstep, Slot, Step, Stream

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

    def grad(self, weights: Tree, step: Step, only: Container[str] | None = None) -> Gradient:
        """Differentiate the mean loss in all trainable weights, or in those named; pure."""
        ...

    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """Return the outputs in evaluation mode, without a graph."""
        ...

    @property
    def descend(self) -> Callable[[Tree, Step, float], Tensor] | None:
        """Plain gradient descent in place, (weights, step, rate) -> loss, if the learner has a faster way to it."""
        ...


class Outcome(NamedTuple):
    """What a client's round gives."""

    uploads: Slots
    memory: Slots
    steps: Tensor
    """(1,) local steps taken."""
    loss: Tensor
    """() mean training loss over those steps."""


class Assignment(NamedTuple):
    """What one client works from in one round."""

    received: Slots
    memory: Slots
    stream: Stream
    lr: float
    seed: Tensor
    """() int64; its axes, if any, are those of a stack."""


def client_round(method: Method, model: Learner, training: Training, work: Assignment) -> Outcome:
    """Train one client for one round. Nothing it is given is changed."""
    weights, memory, local = _begin(method, model, training, work)
    slots = {p.name: Slot(memory[p.name], work.received[p.name]) for p in method.parts}
    grad = reduce(lambda g, p: p.gradient(g, local, slots[p.name]), reversed(method.parts), local.grad)
    directing = [p for p in method.parts if p.direction is not Part.direction]

    def direct(direction: Tree, at: Tree) -> Tree:
        return reduce(lambda d, p: p.direction(d, at, local, slots[p.name]), directing, direction)

    batches = work.stream.epochs(training.local_epochs)
    wrapped = None if grad is local.grad else grad
    end, steps, loss = descend(model, training, weights, batches, work.lr, wrapped, direct if directing else None)
    local = replace(local, end=end, steps=steps)
    uploads: Slots = {}
    for part in method.parts:
        memory[part.name], uploads[part.name] = part.finish(local, slots[part.name])
    return Outcome(uploads, memory, steps, loss)


def deployed(method: Method, model: Learner, training: Training, work: Assignment) -> Tree:
    """Return the weights that predict for a client now: the start of its next round, then each `deploy`."""
    weights, memory, local = _begin(method, model, training, work)
    for part in method.parts:
        weights = part.deploy(local, weights, Slot(memory[part.name], work.received[part.name]))
    return weights


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
    ) -> Tree:
        steps = work.stream.epochs(training.local_epochs if epochs is None else epochs)
        names = model.anatomy.exchangeable if only is None else only(model.anatomy)
        some = not names >= model.anatomy.names("weight")

        def chosen(direction: Tree, at: Tree) -> Tree:
            return pick(direct(direction, at) if direct else direction, names)

        grad = partial(model.grad, only=names) if some and not direct else None
        rate = work.lr if lr is None else lr
        turn = chosen if some or direct else None
        weights = _stacked(weights, work)
        return descend(model, training, weights, steps, rate, grad, turn, freeze_statistics)[0]

    local = Local(
        anatomy=model.anatomy,
        shared=work.received["share"],
        start=EMPTY,
        end=EMPTY,
        stream=work.stream,
        steps=work.received["share"].flat.new_zeros(*work.seed.shape, 1),
        lr=work.lr,
        seed=work.seed,
        grad=model.grad,
        train=train,
    )
    for part in method.parts:
        slot = Slot(memory[part.name], work.received[part.name])
        weights, memory[part.name] = part.begin(replace(local, start=weights, end=weights), weights, slot)
    weights = _stacked(weights, work)
    return weights, memory, replace(local, start=weights, end=weights)


def _stacked(weights: Tree, work: Assignment) -> Tree:
    """Return weights with the axes of the stack, where they are the same for all of its clients."""
    return Tree(weights.layout, weights.flat.expand(*work.seed.shape, -1))


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
