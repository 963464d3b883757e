"""SGD with momentum on the server."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, overlay, pick, wide, zeros_like
from idiolect.core.types import Central, Setup, Update


@part
def server_sgd(lr: float = 1.0, momentum: float = 0.9) -> Part:
    r"""Apply SGD with momentum on the server, with the clients' mean update as its step direction.

    .. math::  v \leftarrow \mu v + \bar\Delta^t, \qquad w^{t+1} = w^t + \eta_g v, \qquad
               \bar\Delta^t = \sum_{i \in S_t} p_i\, w_i^{t+} - w^t

    on trainable tensors that are exchanged; statistics take the plain mean. The mean update includes changes by the
    parts listed before.

    Args:
        lr: learning rate :math:`\eta_g` of the server, above 0; 1 without momentum is the plain mean.
        momentum: :math:`\mu` in [0, 1).

    Memory:    none; only the server has v.       Sends: nothing.       Receives: nothing.
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
        return zeros_like(wide(pick(setup.shared, setup.structure.names("weight"))))

    def aggregate(central: Central, mean: Tree) -> Update:
        v = momentum * central.state + pick(central.new - central.old, central.state)
        return Update(v, shared=overlay(central.new, pick(central.old, v) + lr * v))

    return Part(
        server=server,
        aggregate=aggregate,
        server_only=True,
        neutral={"lr": 1.0, "momentum": 0.0},
    )
