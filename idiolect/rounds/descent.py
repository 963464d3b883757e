"""Local training: one optimizer step per batch, in place."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from idiolect.compute.learner import Learner
from idiolect.core.tree import Tree, clip, clipping, counting, pick, step_
from idiolect.core.types import Direct, GradFn, Lockstep, Step
from idiolect.rounds.optim import OptimizerState
from idiolect.rounds.training import Training


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
        model: the model.
        training: optimizer, clipping, groups.
        weights: the weights to start from; they are not changed.
        steps: the batches.
        lr: learning rate.
        grad: gradient function; None for the model's own.
        direct: (gradient, weights) -> the direction for the optimizer; None for the gradient.
        frozen: normalize by running statistics in all steps.
    """
    row = weights.clone()  # from here on this copy changes in place
    total = torch.zeros_like(row.flat[..., 0], dtype=counting(row.flat.dtype))
    taken = torch.zeros_like(total)[..., None]
    plain = model.descend if training.plain and grad is None and direct is None else None
    gradient, state = grad or model.grad, OptimizerState()

    def take(step: Step, live: slice | EllipsisType) -> Tensor:
        """Take a step; its tensors are freed when it ends, so that the next step finds room in the cache."""
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

    with torch.inference_mode(model.descend is not None):  # without autograd each operation costs less
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
    """Return the stack `whole` with its first rows replaced by `first`."""
    if first.flat.shape == whole.flat.shape:
        return first
    return Tree(whole.layout, torch.cat([first.flat, whole.flat[len(first.flat) :]]))


def _move(
    model: Learner, training: Training, direction: Tree, weights: Tree, state: OptimizerState
) -> tuple[Tree, Tensor | float, OptimizerState]:
    """Return the optimizer's move, a factor on it, and the optimizer's next state."""
    if training.clip is not None:
        if training.bare:  # clipped within the step
            return direction, clipping(direction, training.clip), state
        direction = clip(direction, training.clip)
    decay, late = training.decay(model.structure, direction), training.optimizer.decoupled
    decays = isinstance(decay, Tree) or decay != 0
    if decays and not late:
        direction = direction + pick(weights, direction) * decay
    move, after = training.optimizer.move(direction, state)
    if decays and late:
        move = move + pick(weights, direction) * decay
    rate = training.rate(model.structure, direction)
    return (move * rate if isinstance(rate, Tree) or rate != 1 else move), 1.0, after
