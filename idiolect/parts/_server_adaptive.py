"""An adaptive optimizer on the server: Adagrad, Adam or Yogi."""

from __future__ import annotations

from typing import Literal

import torch

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, overlay, pick, wide
from idiolect.core.types import Central, Setup, Update


@part
def server_adaptive(
    rule: Literal["adagrad", "adam", "yogi"],
    lr: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Part:
    r"""Apply an adaptive optimizer on the server, with the clients' mean update as its gradient.

    .. math::  m \leftarrow \beta_1 m + (1 - \beta_1) \bar\Delta^t, \qquad
               w^{t+1} = w^t + \eta_g \frac{m}{\sqrt V + \tau}

    without bias correction, with :math:`\bar\Delta^t` the clients' mean update and, by rule,

    .. math::  V \leftarrow V + \bar\Delta^2 \text{ (adagrad)}, \quad
               V \leftarrow \beta_2 V + (1 - \beta_2) \bar\Delta^2 \text{ (adam)}, \quad
               V \leftarrow V - (1 - \beta_2) \bar\Delta^2 \operatorname{sign}(V - \bar\Delta^2) \text{ (yogi)}

    from :math:`m = 0` and :math:`V = \tau^2`. This applies to trainable tensors that are exchanged; statistics take
    the plain mean. The mean update includes changes by the parts listed before.

    Args:
        rule: update rule of V.
        lr: learning rate :math:`\eta_g` of the server, above 0.
        beta1: decay of the mean m, in [0, 1).
        beta2: decay of V, in [0, 1); not used by adagrad.
        tau: degree of adaptivity, above 0: updates below it are scaled equally.

    Memory:    none; only the server has m and V.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient, no bytes.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> server_adaptive("yogi", lr=0.1)
        server_adaptive(rule='yogi', lr=0.1, beta1=0.9, beta2=0.99, tau=0.001)

    Reference: Reddi et al., ICLR 2021.
    Differs:   some public code starts from V = 0, or corrects the bias as Adam does.
    """
    require(rule in ("adagrad", "adam", "yogi"), f"server_adaptive: no rule {rule!r}: adagrad, adam or yogi")
    require(lr > 0 and tau > 0, f"server_adaptive: lr and tau must be above 0, got {lr} and {tau}")
    require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"server_adaptive: betas must be in [0, 1), got {beta1} and {beta2}")

    def server(setup: Setup) -> Tree:
        moving = wide(pick(setup.shared, setup.structure.names("weight")))
        first = {f"mean/{n}": torch.zeros_like(t) for n, t in moving.items()}
        return Tree.of({**first, **{f"square/{n}": torch.full_like(t, tau**2) for n, t in moving.items()}})

    def aggregate(central: Central, mean: Tree) -> Update:
        m, v = central.state.flat.chunk(2)
        old = pick(central.old, central.structure.names("weight"))
        delta = pick(central.new, old).flat - old.flat
        square = delta**2
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + square
        elif rule == "adam":
            v = beta2 * v + (1 - beta2) * square
        else:
            v = v - (1 - beta2) * square * torch.sign(v - square)
        moved = Tree(old.layout, old.flat + lr * m / (v.sqrt() + tau))
        return Update(Tree(central.state.layout, torch.cat([m, v])), shared=overlay(central.new, moved))

    return Part(server=server, aggregate=aggregate, server_only=True)
