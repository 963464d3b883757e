"""A step of the server with momentum along the mean move of its clients."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, overlay, pick, zeros_like
from idiolect.core.types import Central, Setup, Update


@part
def server_sgd(lr: float = 1.0, momentum: float = 0.9) -> Part:
    r"""Let the server take a step with momentum along the mean move of its clients.

    .. math::  v \leftarrow \mu v + \bar\Delta^t, \qquad w^{t+1} = w^t + \eta_g v, \qquad
               \bar\Delta^t = \sum_{i \in S_t} p_i\, w_i^{t+} - w^t

    On trainable tensors that are exchanged; statistics are averaged plainly. The mean move is what the parts
    listed before make of it.

    Args:
        lr: step :math:`\eta_g` of the server, above 0; 1 with no momentum is the mean itself.
        momentum: :math:`\mu` in [0, 1).

    Memory:    none; the server keeps v to itself.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient, no bytes.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> server_sgd(momentum=0.5)
        server_sgd(lr=1.0, momentum=0.5)

    Reference: Hsu et al. 2019 (FedAvgM).
    """
    require(lr > 0, f"server_sgd: lr must be above 0, got {lr}")
    require(0 <= momentum < 1, f"server_sgd: momentum must be in [0, 1), got {momentum}")

    def server(setup: Setup) -> Tree:
        return zeros_like(pick(setup.shared, setup.structure.names("weight")))

    def aggregate(central: Central, mean: Tree) -> Update:
        v = momentum * central.state + pick(central.new - central.old, central.state)
        return Update(v, shared=overlay(central.new, pick(central.old, v) + lr * v))

    return Part(
        server=server,
        aggregate=aggregate,
        server_only=True,
        neutral={"lr": 1.0, "momentum": 0.0},
    )
