"""Per-FedAvg as a textbook loop; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Unpack

from torch import Tensor, nn

from idiolect.testing.oracles.averaging import averaging
from idiolect.testing.oracles.common import (
    Loss,
    OracleResult,
    State,
    World,
    copy_of,
    gradient,
    loss_of,
    receive,
    trainable,
)


def per_fedavg(
    rate: float,
    delta: float | None,
    steps: int,
    examples: Callable[[int], tuple[Tensor, Tensor]],
    **world: Unpack[World],
) -> OracleResult:
    """Per-FedAvg: FedAvg along :func:`meta_gradient`; a client takes plain steps on all its data to predict.

    These go by running statistics, which stay as they are.

    Args:
        rate: length a of the step that is looked ahead, and of those before predicting.
        delta: see :func:`meta_gradient`.
        steps: how many are taken before predicting.
        examples: ``examples(client)`` gives all its (x, y).
        world: see :class:`World`.

    Reference: Fallah et al., NeurIPS 2020.
    """
    loss = loss_of(world)
    result = averaging(lambda model, x, y, _: meta_gradient(model, x, y, loss, rate, delta), world)
    model = deepcopy(world["model"]).eval()
    for states in result.deployed:
        for i, state in enumerate(states):
            for _ in range(steps):
                model.load_state_dict(state)
                for name, g in gradient(model, *examples(i), loss).items():
                    state[name] = state[name] - rate * g
    return result


def meta_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, rate: float, delta: float | None) -> State:
    """Gradient of the loss of every second example after a step on the others.

    Weights come back from a copy; running statistics are those of the pass at w.

    Args:
        model: at w, in train mode.
        x: examples; the first, third, ... make the step.
        y: their targets.
        loss: of one batch.
        rate: length of the step.
        delta: distance δ of the two gradients whose difference stands for the Hessian; None leaves it out.
    """
    one, other = (x[::2], y[::2]), (x[1::2], y[1::2]) if len(y) > 1 else (x, y)
    before = copy_of(model, model.state_dict())
    g = _of_half(model, *one, loss)
    after = copy_of(model, [name for name in before if name not in trainable(model)])

    def at(shift: float, along: State, half: tuple[Tensor, Tensor]) -> State:
        receive(model, {**before, **{name: before[name] + shift * along[name] for name in along}})
        return _of_half(model, *half, loss)

    found = v = at(-rate, g, other)
    if delta is not None:
        up, down = at(delta, v, one), at(-delta, v, one)
        found = {name: v[name] - rate * (up[name] - down[name]) / (2 * delta) for name in v}
    receive(model, {**before, **after})
    return found


def _of_half(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> State:
    """Gradient of a half; one example alone is normalized by running statistics."""
    model.train(len(y) > 1)
    found = gradient(model, x, y, loss)
    model.train()
    return found
