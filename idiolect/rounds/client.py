"""One round of one client: pure functions that run in any process.

The same lines run a stack of clients: trees then have a leading axis of clients, and a step is a `Lockstep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.compute.learner import Counted, Learner
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.nest import Nest
from idiolect.core.part import Part
from idiolect.core.scope import Scope
from idiolect.core.tree import EMPTY, Tree, counting, pick, rounded, stacked
from idiolect.core.types import Direct, GradFn, Gradient, Local, Objective, Step, Stream, Trees
from idiolect.rounds.descent import descend
from idiolect.rounds.queries import Queries
from idiolect.rounds.training import Training


class Outcome(NamedTuple):
    """The result of a client's round."""

    uploads: Trees
    memory: Trees
    steps: Tensor
    """(1,) local steps taken."""
    loss: Tensor
    """() mean training loss over those steps."""
    gradients: Tensor
    """(1,) gradients taken in the round, in local training and in queries."""

    def flaw(self) -> str:
        """Return a message about values that are not finite, or an empty string."""
        return not_finite("upload", self.uploads) or not_finite("memory", self.memory)


class Assignment(NamedTuple):
    """The inputs of one client's round."""

    received: Trees
    """What every client is sent: the shared tensors, and the state of each part."""
    memory: Trees
    """What the client keeps between rounds, by part."""
    messages: Trees
    """What the server sends to this client alone, by part."""
    stream: Stream
    """Training examples."""
    validation: Stream
    """Validation examples, or the training examples if there are none."""
    lr: float
    seed: Tensor
    """() int64; leading axes, if any, are those of a stack."""
    round: int


class Deployed(NamedTuple):
    """The weights that predict for a client."""

    weights: Tree
    adapt: Callable[[Tree, Nest], Tree] | None = None
    """(weights, unlabeled inputs) -> the weights that predict for them; None if they do not depend on the inputs."""

    def at(self, inputs: Nest) -> Tree:
        """Return the weights that predict for these inputs."""
        return self.adapt(self.weights, inputs) if self.adapt else self.weights


@dataclass(frozen=True)
class Worker:
    """Everything that is needed to run assignments, in this process, a thread, a forked process or an actor.

    Args:
        method: the method.
        model: the model and its loss.
        learner: computes gradients and predictions of the model.
        training: settings of local training.
    """

    method: Method
    model: Model
    learner: Learner
    training: Training

    def train(self, work: Assignment) -> Outcome:
        """Train one client, or a stack of clients, for one round."""
        return client_round(self.method, self.learner, self.training, work)

    def deploy(self, work: Assignment) -> Deployed:
        """Return the weights that predict for a client, or for a stack of clients."""
        return deployed(self.method, self.learner, self.training, work)


def client_round(method: Method, model: Learner, training: Training, work: Assignment) -> Outcome:
    """Train one client, or a stack of clients, for one round. The inputs are not changed."""
    model = Counted(model, _none(work))
    weights, memory, local = _begin(method, model, training, work)
    views = {p.name: _view(p, local, memory, work) for p in method.parts}
    objectives = [p.objective(views[p.name]) for p in method.parts if p.objective]
    grad: GradFn = partial(model.grad, objectives=objectives) if objectives else local.grad
    for part in reversed(method.parts):
        grad = part.gradient(grad, views[part.name]) if part.gradient else grad
    directing = [(p.direction, views[p.name]) for p in method.parts if p.direction]

    def direct(direction: Tree, at: Tree) -> Tree:
        for change, view in directing:
            direction = change(direction, at, view)
        return direction

    batches = work.stream.epochs(training.local_epochs)
    wrapped = None if grad is local.grad else grad
    end, steps, loss = descend(model, training, weights, batches, work.lr, wrapped, direct if directing else None)
    effective = training.optimizer.effective_steps(steps)
    uploads: Trees = {}
    for part in method.parts:
        uploads[part.name] = EMPTY
        if part.finish:
            kept, uploads[part.name] = part.finish(
                replace(views[part.name], end=end, steps=steps, effective_steps=effective)
            )
            memory[part.name] = rounded(kept, work.memory[part.name])
    return Outcome(uploads, memory, steps, loss, model.gradients)


def deployed(method: Method, model: Learner, training: Training, work: Assignment) -> Deployed:
    """Return the weights that predict for a client now: the start of its next round, after each part's `deploy`."""
    weights, memory, local = _begin(method, model, training, work)
    deploying = [(p, p.deploy, _view(p, local, memory, work)) for p in method.parts if p.deploy]
    for part, deploy, view in deploying:
        if not part.transductive:
            weights = deploy(view, _whole(part, model, weights))
    late = [item for item in deploying if item[0].transductive]
    if late and weights.layout is not model.structure.layout:
        raise UsageError(f"{late[0][0].name} reads the inputs to predict: no other part can fill buffers before it")

    def adapt(weights: Tree, inputs: Nest) -> Tree:
        for part, deploy, view in late:
            weights = deploy(replace(view, inputs=inputs), _whole(part, model, weights))
        return weights

    return Deployed(weights, adapt if late else None)


def _whole(part: Part, model: Learner, weights: Tree) -> Tree:
    """Return the weights; raise if a part before this one has filled buffers that only predictions need."""
    if weights.layout is not model.structure.layout:
        raise UsageError(f"list {part.name} before the part that fills buffers to predict: it works on weights alone")
    return weights


def not_finite(kind: str, trees: Trees) -> str:
    """Return a message about values that are not finite, or an empty string."""
    for part, tree in trees.items():
        if not (torch.isfinite(tree.flat.sum()) or torch.isfinite(tree.flat).all()):  # a finite sum is enough
            name = next(n for n in tree if not torch.isfinite(tree[n]).all())
            bad = int((~torch.isfinite(tree[name])).sum())
            return f"{bad} values of {name} are not finite in its {kind} ({part})"
    return ""


def _view(part: Part, local: Local, memory: Trees, work: Assignment) -> Local:
    """Return the round as one part sees it."""
    name = part.name
    return replace(local, memory=memory[name], received=work.received[name], message=work.messages[name])


def _begin(method: Method, model: Learner, training: Training, work: Assignment) -> tuple[Tree, Trees, Local]:
    """Return the weights to start from, the memory after `begin`, and the round as parts see it."""
    memory, weights = dict(work.memory), EMPTY
    local = _local(model, training, work)
    for part in method.parts:
        if part.begin:
            view = _view(part, replace(local, start=weights, end=weights), memory, work)
            weights, kept = part.begin(view, weights)
            weights, memory[part.name] = rounded(weights, local.shared), rounded(kept, work.memory[part.name])
    weights = stacked(weights, work.seed.shape)
    return weights, memory, replace(local, start=weights, end=weights)


def _none(work: Assignment) -> Tensor:
    """Return a zero for each client, ``(..., 1)``, to count in."""
    share = work.received["share"].flat
    return share.new_zeros(*work.seed.shape, 1, dtype=counting(share.dtype))


def _local(model: Learner, training: Training, work: Assignment) -> Local:
    """Return the round as parts see it, before `begin`."""

    def plain(weights: Tree, step: Step, *, only: Scope | None = None) -> Gradient:
        return model.grad(weights, step, None if only is None else only(model.structure))

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

    none = _none(work)
    queries = Queries(model, {"train": work.stream, "val": work.validation}, none)
    return Local(
        structure=model.structure,
        shared=work.received["share"],
        start=EMPTY,
        end=EMPTY,
        stream=work.stream,
        steps=none,
        effective_steps=none,
        lr=work.lr,
        seed=work.seed,
        round=work.round,
        grad=plain,
        train=train,
        total=queries.total,
        each=queries.each,
        counts=queries.counts,
        whole=queries.whole,
        statistics=model.statistics,
    )
