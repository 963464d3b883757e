"""Control variates that correct client drift."""

from __future__ import annotations

from idiolect.core.part import Part, part
from idiolect.core.tree import Tree, axpy, pick, wide, zeros_like
from idiolect.core.types import Central, Local, Setup, Update


@part
def control_variates() -> Part:
    r"""Correct each local step by the difference between the client's and the cohort's mean gradient.

    .. math::  d = g - c_i + c, \qquad c_i^+ = c_i - c + \frac{w^t - w_i^{t+}}{\eta_t K_i}, \qquad
               c \leftarrow c + \frac{1}{N} \sum_{i \in S_t} (c_i^+ - c_i)

    on trainable tensors that are exchanged. The mean of variates is uniform over clients, whatever the method's
    weighting: with N in the denominator, c stays the mean of all c_i.

    Memory:    c_i, one tensor per exchanged weight.
    Sends:     the change of c_i.      Receives: c.
    Cost:      bytes double, both ways; no extra gradient.

    Example:
        >>> control_variates()
        control_variates()

    Reference: Karimireddy et al., SCAFFOLD, ICML 2020, option II.
    Differs:   the number of steps and the learning rate are the client's own. With momentum, weight decay or clipping
        the new variate is the mean update per step instead of the mean gradient.
    """

    def zeros(setup: Setup) -> Tree:
        return zeros_like(wide(pick(setup.shared, setup.structure.names("weight"))))

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        correction = pick(local.received - local.memory, direction)
        return axpy(1.0, correction, direction)

    def finish(local: Local) -> tuple[Tree, Tree]:
        moved = pick(local.start, local.memory) - pick(local.end, local.memory)
        own = local.memory - local.received + moved / (local.lr * local.steps)
        return own, own - local.memory

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(central.state + central.participation * mean)

    return Part(memory=zeros, server=zeros, direction=direction, finish=finish, aggregate=aggregate, uniform=True)
