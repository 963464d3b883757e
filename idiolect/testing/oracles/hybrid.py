"""The textbook loop of hybrid batch normalization; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.testing.oracles.common import (
    Batches,
    OracleResult,
    World,
    average,
    cohort_of,
    copy_of,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
)
from idiolect.testing.oracles.personal import plain


class HybridLayer(nn.Module):
    """Batch normalization whose training mixes the batch's moments with constants; it knows what it was given."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, layer.get_buffer(name))
        self.factor = nn.Parameter(torch.zeros_like(layer.running_mean))
        self.register_buffer("mean", layer.running_mean.clone())
        self.register_buffer("variance", layer.running_var.clone())
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of images."""
        channels = x.transpose(0, 1).flatten(1)
        self.given.append(channels.detach())
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        if self.training:
            self.get_buffer("num_batches_tracked").add_(1)
            a = 1 / (1 + torch.exp(-self.factor))
            center = channels.mean(1)
            mean = (1 - a) * self.get_buffer("mean") + a * center
            spread = ((channels - center[:, None]) ** 2).mean(1)
            variance = (1 - a) * self.get_buffer("variance") + a * spread
        out = torch.stack([(x[:, c] - mean[c]) / (variance[c] + self.eps).sqrt() for c in range(len(mean))], 1)
        return out * self.weight[:, None, None] + self.bias[:, None, None]


def moments(model: nn.Module, name: str, batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean and variance of everything that a layer is given in one pass in training mode."""
    model = deepcopy(model).train()
    layer = model.get_submodule(name)
    assert isinstance(layer, HybridLayer)
    layer.given.clear()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    values = torch.cat(layer.given, 1)
    return values.mean(1), values.var(1, correction=0)


def hbn(
    name: str, renewal: float, smoothed: bool, passes: Callable[[int, int], Batches], **world: Unpack[World]
) -> OracleResult:
    """HBN of a network with one layer of batch normalization.

    Factors start at 0, stay with clients, and a client begins with the mean of those of the last cohort.

    Args:
        name: name of the layer.
        renewal: step of the constants toward the pooled moments of a round.
        smoothed: whether predictions use these constants, or the pooled moments.
        passes: ``passes(t, i)`` lists the batches of one epoch in round ``t``.
        world: see :class:`World`.

    Reference: Chen et al., ICML 2025.
    """
    models, shared = start(world)
    for model in models:
        layer = model.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        model.set_submodule(name, HybridLayer(layer))
    own = [f"{name}.{leaf}" for leaf in ("factor", "mean", "variance")]
    fixed = copy_of(models[0], own)
    trained: set[int] = set()
    result = OracleResult()

    def begin(i: int) -> None:
        receive(models[i], shared | {n: t for n, t in fixed.items() if n != own[0] or i not in trained})

    for t in range(world["rounds"]):
        cohort, seen = cohort_of(world, t), []
        for i in cohort:
            begin(i)
            seen.append(moments(models[i], name, passes(t, i)))
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(loss_of(world)), shared, world)
        trained |= set(cohort)
        p = [world["weights"][i] / sum(world["weights"][j] for j in cohort) for i in cohort]
        mean = torch.stack([w * m for w, (m, _) in zip(p, seen, strict=True)]).sum(0)
        variance = torch.stack([w * (v + (m - mean) ** 2) for w, (m, v) in zip(p, seen, strict=True)]).sum(0)
        fixed |= average([models[i] for i in cohort], p, own[:1])
        for n, new in zip(own[1:], (mean, variance), strict=True):
            fixed[n] = renewal * new + (1 - renewal) * fixed[n]
        used = (fixed[own[1]], fixed[own[2]]) if smoothed else (mean, variance)
        shared = average([models[i] for i in cohort], p, shared)
        shared |= {f"{name}.running_mean": used[0], f"{name}.running_var": used[1]}
        result.shared.append(shared)
        for i in range(len(models)):
            begin(i)
        result.deployed.append([copy_of(m, [n for n in m.state_dict() if n not in own[1:]]) for m in models])
    return result
