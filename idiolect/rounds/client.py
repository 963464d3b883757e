"""One client, one round: the only training loop of the project, pure, so that it runs anywhere.

The same lines run a stack of clients: trees then have an axis of clients first, and a step is a `Lockstep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from idiolect.compute.learner import Counted, Learner
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.core.scope import Scope
from idiolect.core.tree import EMPTY, Tree, clip, clipping, pick, stacked, step_
from idiolect.core.types import Direct, GradFn, Local, Lockstep, Objective, Slot, Step, Stream, Trees
from idiolect.rounds.optim import State
from idiolect.rounds.queries import Queries
from idiolect.rounds.training import Training


class Outcome(NamedTuple):
    """What a client's round gives."""

    uploads: Trees
    memory: Trees
    steps: Tensor
    """(1,) local steps taken."""
    loss: Tensor
    """() mean training loss over those steps."""
    gradients: Tensor
    """(1,) gradients taken in the round, in local training and beside it."""

    def flaw(self) -> str:
        """Return what is not finite in it, or an empty string."""
        return not_finite("upload", self.uploads) or not_finite("memory", self.memory)


class Assignment(NamedTuple):
    """What one client works from in one round."""

    received: Trees
    memory: Trees
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
    local = replace(local, end=end, steps=steps, effective_steps=training.optimizer.effective_steps(steps))
    uploads: Trees = {}
    for part in method.parts:
        memory[part.name], uploads[part.name] = part.finish(local, slots[part.name])
    return Outcome(uploads, memory, steps, loss, model.gradients)


def deployed(method: Method, model: Learner, training: Training, work: Assignment) -> Tree:
    """Return the weights that predict for a client now: the start of its next round, then each `deploy`."""
    weights, memory, local = _begin(method, model, training, work)
    for part in method.parts:
        if part.deploy is not Part.deploy and weights.layout is not model.structure.layout:
            raise UsageError(
                f"list {part.name} before the part that fills buffers to predict: it works on weights alone"
            )
        weights = part.deploy(local, weights, _slot(part, memory, work))
    return weights


def mail_of(part: Part) -> str:
    """Return the name under which a client's memory holds what the server told it alone for a part."""
    return f"mail to {part.name}"


def not_finite(kind: str, slots: Trees) -> str:
    """Return what is not finite in trees by part, or an empty string."""
    for part, tree in slots.items():
        if not (torch.isfinite(tree.flat.sum()) or torch.isfinite(tree.flat).all()):  # a finite sum says it all
            name = next(n for n in tree if not torch.isfinite(tree[n]).all())
            bad = int((~torch.isfinite(tree[name])).sum())
            return f"{bad} values of {name} are not finite in its {kind} ({part})"
    return ""


def _slot(part: Part, memory: Trees, work: Assignment) -> Slot:
    return Slot(memory[part.name], work.received[part.name], memory.get(mail_of(part), EMPTY))


def _begin(method: Method, model: Learner, training: Training, work: Assignment) -> tuple[Tree, Trees, Local]:
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
        trainable = model.structure.names("weight")
        names = trainable if only is None else only(model.structure)
        some = not names >= trainable

        def chosen(direction: Tree, at: Tree) -> Tree:
            return pick(direct(direction, at) if direct else direction, names)

        grad: GradFn | None = partial(model.grad, only=names) if some and not direct else None
        if objective:
            grad = partial(model.grad, only=None if direct else names, objectives=[objective])
        rate = work.lr if lr is None else lr
        turn = chosen if some or direct else None
        weights = stacked(weights, work.seed.shape)
        return descend(model, training, weights, steps, rate, grad, turn, freeze_statistics)[0]

    none = work.received["share"].flat.new_zeros(*work.seed.shape, 1)
    survey = Queries(model, work.stream, none)
    local = Local(
        structure=model.structure,
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
        total=survey.total,
        each=survey.each,
        counts=survey.counts,
        whole=survey.whole,
        round=work.round,
    )
    for part in method.parts:
        slot = _slot(part, memory, work)
        weights, memory[part.name] = part.begin(replace(local, start=weights, end=weights), weights, slot)
    weights = stacked(weights, work.seed.shape)
    return weights, memory, replace(local, start=weights, end=weights)


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
    """Take one optimizer step per batch; return the weights, the steps taken (..., 1) and the mean loss (...).

    Args:
        model: what is differentiated.
        training: optimizer, clipping, groups.
        weights: where it starts; they are not changed.
        steps: the batches.
        lr: learning rate.
        grad: another gradient than the model's own.
        direct: what is made of the gradient before the optimizer sees it.
        frozen: normalize by running statistics throughout.
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
        state = state or training.optimizer.init(direction)
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
    """Return what the optimizer takes off the weights, before the learning rate and a factor; the factor; its state."""
    if training.clip is not None:
        if training.bare:  # clipped within the step
            return direction, clipping(direction, training.clip), state
        direction = clip(direction, training.clip)
    decay = training.decay(model.structure, direction)
    if isinstance(decay, Tree) or decay != 0:
        direction = direction + pick(weights, direction) * decay
    move, after = training.optimizer.move(direction, state)
    rate = training.rate(model.structure, direction)
    return (move * rate if isinstance(rate, Tree) or rate != 1 else move), 1.0, after
