"""The textbook loop of a head that is computed from Gaussians of the features; see `averaging`.

The model is an `nn.Sequential` whose last layer, linear, is the head; the features are what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple, Unpack

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional as F

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
from idiolect.testing.oracles.represent import split


class Classes(NamedTuple):
    """Class means ``(C, D)`` and the covariance within classes ``(D, D)``."""

    means: Tensor
    within: Tensor


def scores(of: Classes, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of z ↦ z·S⁻¹m − ½ m·S⁻¹m + log π, with S = (1 − ε) Σ + ε tr Σ / D · I and ε = 0.0001."""
    size = len(of.within)
    inverse = torch.linalg.inv(0.9999 * of.within + 0.0001 * of.within.trace() / size * torch.eye(size).double())
    bias = [p.log() - 0.5 * m @ inverse @ m for m, p in zip(of.means, prior, strict=True)]
    return of.means @ inverse, torch.stack(bias)


def measured(z: Tensor, y: Tensor, others: Classes, ridge: float, diagonal: bool) -> Classes:
    """Mean of each class with more than two examples, else that of others; Σ (z − m_y)(z − m_y)ᵀ / (n − 1) + ridge."""
    means = others.means.clone()
    for c in range(len(means)):
        if (y == c).sum() > 2:
            means[c] = z[y == c].mean(0)
    off = [u - means[c] for u, c in zip(z, y.tolist(), strict=True)]
    within = sum((torch.outer(u, u) for u in off), torch.zeros_like(others.within)) / max(1, len(y) - 1)
    if diagonal:
        within = torch.diag(within.diag())
    return Classes(means, within + ridge * torch.eye(len(within)).double())


def between(shares: Tensor, own: Classes, others: Classes) -> Classes:
    """The mix of two with a share of the first for the means and one for the covariance."""
    return Classes(*(s * one + (1 - s) * other for s, one, other in zip(shares, own, others, strict=True)))


def halved(y: Tensor) -> tuple[list[int], list[int]]:
    """Examples of each class in turn; none of a class with one example."""
    halves: tuple[list[int], list[int]] = ([], [])
    for c in range(int(y.max()) + 1):
        there = torch.nonzero(y == c).flatten().tolist()
        for turn, k in enumerate(there if len(there) > 1 else []):
            halves[turn % 2].append(k)
    return halves


def chosen(z: Tensor, y: Tensor, others: Classes, prior: Tensor, ridge: float, diagonal: bool) -> Tensor:
    """The two shares in [0, 1] with the smallest cross-entropy over both folds, found by SciPy and made exact."""
    one, other = halved(y)
    if not one:
        return torch.zeros(2).double()
    folds = [(test, measured(z[rest], y[rest], others, ridge, diagonal)) for test, rest in ((one, other), (other, one))]

    def value(at: np.ndarray) -> tuple[float, np.ndarray]:
        shares = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        total = torch.zeros(()).double()
        for test, own in folds:
            weight, bias = scores(between(shares, own, others), prior)
            total = total + F.cross_entropy(z[test] @ weight.T + bias, y[test])
        (slope,) = torch.autograd.grad(total, shares)
        return total.item(), slope.numpy()

    found = optimize.minimize(value, np.full(2, 0.5), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 2).x
    free = [k for k in range(2) if 1e-6 < found[k] < 1 - 1e-6]
    found = np.where((found > 1e-6) & (found < 1 - 1e-6), found, found.round())

    def slopes(at: np.ndarray) -> np.ndarray:
        whole = found.copy()
        whole[free] = at
        return value(whole)[1][free]

    if free:
        found[free] = optimize.root(slopes, found[free], tol=1e-15).x
    return torch.tensor(found, dtype=torch.float64)


def pfedfda(
    means: Tensor,
    own: float | None,
    diagonal: bool,
    ridge: float,
    passes: Callable[[str, int, int], Batches],
    **world: Unpack[World],
) -> OracleResult:
    """pFedFDA: clients train the body under the head of the shared Gaussians, and send a mix of these with their own.

    The covariance starts as the unit. Predictions use the mix under the newest body, with the client's prior.

    Args:
        means: the shared means at first.
        own: both shares, or None for :func:`chosen` ones.
        diagonal: whether only variances count.
        ridge: see :func:`measured`.
        passes: ``passes(purpose, t, i)`` lists the batches of one epoch of round ``t``, ``"train"`` or ``"deploy"``.
        world: see :class:`World`; the head is not exchanged.

    Reference: McLaughlin and Su, NeurIPS 2024.
    """
    models, shared = start(world)
    last = list(world["model"].state_dict())[-2:]
    shared = {name: tensor for name, tensor in shared.items() if name not in last}
    others, result = Classes(means, torch.eye(means.shape[1]).double()), OracleResult()

    def put(model: nn.Module, of: Classes, y: Tensor) -> None:
        counts = torch.tensor([float((y == c).sum()) for c in range(len(means))]).double()
        prior = counts / len(y) + 0.0001
        receive(model, dict(zip(last, scores(of, prior / prior.sum()), strict=True)))

    def mix(model: nn.Module, purpose: str, t: int, i: int) -> tuple[Classes, Tensor]:
        pairs = passes(purpose, t, i)
        y = torch.cat([labels for _, labels in pairs])
        with torch.no_grad():
            z = split(model.eval())[0](torch.cat([x for x, _ in pairs]))
        prior = torch.stack([(y == c).double().mean() + 0.0001 for c in range(len(means))])
        prior = prior / prior.sum()
        shares = (
            chosen(z, y, others, prior, ridge, diagonal) if own is None else torch.full((2,), own, dtype=torch.float64)
        )
        return between(shares, measured(z, y, others, ridge, diagonal), others), y

    for t in range(world["rounds"]):
        cohort, sent = cohort_of(world, t), []
        for i in cohort:
            receive(models[i], shared)
            put(models[i], others, torch.cat([y for _, y in passes("train", t, i)]))
            split(models[i])[1].requires_grad_(False)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(loss_of(world)), {}, world)
            sent.append(mix(models[i], "train", t, i)[0])
        p = [world["weights"][i] / sum(world["weights"][j] for j in cohort) for i in cohort]
        shared = average([models[i] for i in cohort], p, shared)
        others = Classes(*(sum(w * one for w, one in zip(p, every, strict=True)) for every in zip(*sent, strict=True)))
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, model in enumerate(copies):
            receive(model, shared)
            put(model, *mix(model, "deploy", t + 1, i))
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result
