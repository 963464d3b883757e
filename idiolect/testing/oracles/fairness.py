"""Textbook loops of methods that make results even over clients."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from idiolect.testing.oracles.common import (
    Batches,
    Loss,
    OracleResult,
    World,
    average,
    cohort_of,
    deployed,
    gradient,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
    trainable,
)


def mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    """Mean loss of all examples in evaluation mode."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in batches:
            total += len(y) * float(loss(model(x), y))
            count += len(y)
    return total / count


def qfedavg(q: float, **world: Unpack[World]) -> OracleResult:
    """q-FedAvg as its authors write it: w ← w − Σ p_i D_i / Σ p_i h_i, with g_i = (w − w_i) / lr.

    D_i = F_i^q g_i and h_i = q F_i^(q−1) ‖g_i‖² + F_i^q / lr, where F_i is 1e-10 more than the loss of all examples
    before training. Statistics are averaged plainly.

    Args:
        q: the power.
        world: see :class:`World`; each epoch of its batches must have every example once.

    Reference: Li et al., ICLR 2020, algorithm 2.
    """
    models, shared = start(world)
    moving = [name for name in trainable(world["model"]) if name in shared]
    loss = loss_of(world)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        top = {name: torch.zeros_like(shared[name]) for name in moving}
        bottom = 0.0
        for i in cohort:
            receive(models[i], shared)
            f = mean_loss(models[i], world["batches"](t, i), loss) + 1e-10
            local_training(
                models[i],
                world["batches"](t, i),
                lr,
                lambda model, x, y, _: gradient(model, x, y, loss),
                shared,
                world,
            )
            after, p = models[i].state_dict(), world["weights"][i]
            g = {name: (shared[name] - after[name]) / lr for name in moving}
            square = sum(float((tensor**2).sum()) for tensor in g.values())
            for name in moving:
                top[name] += p * f**q * g[name]
            bottom += p * (q * f ** (q - 1) * square + f**q / lr)
        mean = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        shared = mean | {name: shared[name] - top[name] / bottom for name in moving}
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result
