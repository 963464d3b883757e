"""One client, one round: the only training loop of the project, pure, so that it runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from idiolect.method import Method
from idiolect.model import Model
from idiolect.optim import State
from idiolect.scope import Scope
from idiolect.training import Training
from idiolect.tree import EMPTY, Tree, clip, pick, step, where
from idiolect.words import Batch, Direct, GradFn, Local, Slot, Stream

Slots = dict[str, Tree]
"""One tree per part, by its name."""


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
    """() int64."""


def client_round(method: Method, model: Model, training: Training, work: Assignment) -> Outcome:
    """Train one client for one round. Nothing it is given is changed."""
    weights, memory, local = _begin(method, model, training, work)
    slots = {p.name: Slot(memory[p.name], work.received[p.name]) for p in method.parts}
    grad = reduce(lambda g, p: p.gradient(g, local, slots[p.name]), reversed(method.parts), local.grad)

    def direct(direction: Tree, at: Tree) -> Tree:
        return reduce(lambda d, p: p.direction(d, at, local, slots[p.name]), method.parts, direction)

    batches = work.stream.epochs(training.local_epochs)
    end, steps, loss = descend(model, training, weights, batches, grad, work.lr, direct)
    local = replace(local, end=end, steps=steps)
    uploads: Slots = {}
    for part in method.parts:
        memory[part.name], uploads[part.name] = part.finish(local, slots[part.name])
    return Outcome(uploads, memory, steps, loss)


def deployed(method: Method, model: Model, training: Training, work: Assignment) -> Tree:
    """Return the weights that predict for a client now: the start of its next round, then each `deploy`."""
    weights, memory, local = _begin(method, model, training, work)
    for part in method.parts:
        weights = part.deploy(local, weights, Slot(memory[part.name], work.received[part.name]))
    return weights


def _begin(method: Method, model: Model, training: Training, work: Assignment) -> tuple[Tree, Slots, Local]:
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
        batches: Sequence[Batch] = work.stream.epochs(training.local_epochs if epochs is None else epochs)
        if freeze_statistics:
            batches = [b._replace(frozen=True) for b in batches]
        names = model.anatomy.exchangeable if only is None else only(model.anatomy)
        rate = work.lr if lr is None else lr

        def chosen(direction: Tree, at: Tree) -> Tree:
            return pick(direct(direction, at), names) if direct else direction

        grad = model.grad if direct else partial(model.grad, only=names)
        return descend(model, training, weights, batches, grad, rate, chosen)[0]

    local = Local(
        anatomy=model.anatomy,
        shared=work.received["share"],
        start=EMPTY,
        end=EMPTY,
        stream=work.stream,
        steps=model.initial.flat.new_zeros(1),
        lr=work.lr,
        seed=work.seed,
        grad=model.grad,
        train=train,
    )
    for part in method.parts:
        slot = Slot(memory[part.name], work.received[part.name])
        weights, memory[part.name] = part.begin(replace(local, start=weights, end=weights), weights, slot)
    return weights, memory, replace(local, start=weights, end=weights)


def descend(
    model: Model,
    training: Training,
    weights: Tree,
    batches: Sequence[Batch],
    grad: GradFn,
    lr: float,
    direct: Direct,
) -> tuple[Tree, Tensor, Tensor]:
    """Take one optimiser step per batch; return the weights, the steps taken (1,) and the mean loss ()."""
    steps = weights.flat.new_zeros(1)
    total = weights.flat.new_zeros(())
    state: State | None = None
    for batch in batches:
        out = grad(weights, batch)
        direction = direct(out.gradient, weights)
        if training.clip is not None:
            direction = clip(direction, training.clip)
        move, after = _move(model, training, direction, weights, state)
        moved = step(weights, -lr, move, out.buffers)
        if batch.valid is None:
            weights, state, steps, total = moved, after, steps + 1, total + out.loss
        else:
            valid = batch.valid
            first = training.optimiser.init(direction) if state is None else state
            state = {k: where(valid, v, first[k]) for k, v in after.items()}
            weights = where(valid, moved, weights)
            steps, total = steps + valid, total + torch.where(valid, out.loss, 0.0)
    return weights, steps, total / steps.clamp(min=1).squeeze(-1)


def _move(model: Model, training: Training, direction: Tree, weights: Tree, state: State | None) -> tuple[Tree, State]:
    decay = training.decay(model.anatomy, direction)
    if isinstance(decay, Tree) or decay != 0:
        direction = direction + pick(weights, direction) * decay
    move, after = training.optimiser.move(direction, training.optimiser.init(direction) if state is None else state)
    rate = training.rate(model.anatomy, direction)
    return (move * rate if isinstance(rate, Tree) or rate != 1 else move), after
