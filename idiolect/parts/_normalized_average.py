"""A mean of updates that are normalized by each client's number of steps."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part
from idiolect.core.tree import Tree, layout, overlay, pick
from idiolect.core.types import Arrival, Central, Local, Update

_COUNT = layout(("effective steps",), (torch.Size([1]),))


@part
def normalized_average() -> Part:
    r"""Average the clients' updates per step, so that clients with more steps do not have larger weights.

    .. math::  w^{t+1} = w^t + \tau \sum_{i \in S_t} p_i \frac{w_i^{t+} - w^t}{a_i}, \qquad
               \tau = \sum_{i \in S_t} p_i a_i

    :math:`a_i` is the client's effective number of steps: K for plain gradient descent, and with momentum
    :math:`\mu`, which repeats earlier gradients, :math:`\sum_{k=1}^{K} (1 - \mu^k) / (1 - \mu)`. This applies to
    trainable tensors that are exchanged; statistics take the plain mean. If all clients take the same number of
    steps, the result is the plain mean.

    Memory:    none.       Sends: one number, :math:`a_i`.       Receives: nothing.
    Cost:      no extra gradient.

    Example:
        >>> normalized_average()
        normalized_average()

    Reference: Wang et al., FedNova, NeurIPS 2020.
    Differs:   with a proximal term the paper's :math:`a_i` discounts earlier steps, and the authors' code takes the
        mean number of steps for :math:`\tau`; here that term changes neither. Nesterov's momentum has its own
        :math:`a_i`; their code uses that of plain momentum. With Adam :math:`a_i` is the number of
        steps; the first steps of RMSprop are longer.
    """

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.memory, Tree(_COUNT, local.effective_steps)

    def contribute(central: Central, arrival: Arrival) -> Tree:
        moved = pick(arrival.weights - central.old, central.structure.names("weight"))
        return Tree.of({**(moved / arrival.own.flat), **arrival.own})

    def aggregate(central: Central, mean: Tree) -> Update:
        moved = pick(mean, central.old) * mean["effective steps"]
        return Update(shared=overlay(central.new, pick(central.old, moved) + moved))

    return Part(finish=finish, contribute=contribute, aggregate=aggregate)
