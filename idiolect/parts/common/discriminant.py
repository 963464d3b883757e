"""Gaussians of classes with one covariance, the linear classifier that follows from them, and mixes of two of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW = 2
"""Number of examples up to which a class has no mean of its own."""

SMALL = 1e-4
"""Share of the mean variance in the covariance of a classifier; also added to the share of each class."""

_STEPS, _CUTS = 12, 5
"""Steps of Newton's method, and how often a step that raises the loss is divided by four."""

_FLAT = 1e-6
"""Smallest curvature that a step divides by."""


class Gaussians(NamedTuple):
    """The mean features of each class, and the covariance of features within a class."""

    means: Tensor
    """``(..., classes, features)``."""
    covariance: Tensor
    """``(..., features, features)``, or only the variances, ``(..., features)``."""

    @property
    def full(self) -> bool:
        """Whether covariances are kept, not only variances."""
        return self.covariance.dim() == self.means.dim()

    @property
    def shrunk(self) -> Tensor:
        """The covariance with a small share of the mean variance on its diagonal."""
        if not self.full:
            return (1 - SMALL) * self.covariance + SMALL * self.covariance.mean(-1, keepdim=True)
        mean = self.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return (1 - SMALL) * self.covariance + SMALL * mean * torch.eye(self.covariance.shape[-1]).to(mean)


class _Folds(NamedTuple):
    """Halves of the examples, ``(2, ...)``, and Gaussians of the other half, where both covariances are diagonal."""

    features: Tensor
    own: Tensor
    prior: Tensor
    means: Tensor
    """Of all clients."""
    gap: Tensor
    """From there to the means of the other half."""
    excess: Tensor
    """Variances of the other half in units of those of all clients, minus 1."""


def log_prior(counts: Tensor) -> Tensor:
    """Return the logarithm of the share of each class, ``(..., classes)``; without examples all are equal."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1) + SMALL
    return (share / share.sum(-1, keepdim=True)).log()


def estimate(z: Tensor, own: Tensor, others: Gaussians, ridge: float) -> Gaussians:
    """Return the Gaussians of a client's features; a class with few examples has the mean of all clients.

    Args:
        z: ``(..., n, features)``.
        own: ``(..., n, classes)`` the class of each example, one-hot; zeros where there is no example.
        others: the Gaussians of all clients.
        ridge: added to each variance.
    """
    counts = own.sum(-2)
    means = torch.where(counts[..., None] > FEW, own.mT @ z / counts[..., None].clamp(min=1), others.means)
    off = (z - own @ means) * own.sum(-1, keepdim=True)
    freedom = (counts.sum(-1)[..., None] - 1).clamp(min=1)
    if not others.full:
        return Gaussians(means, off.square().sum(-2) / freedom + ridge)
    return Gaussians(means, off.mT @ off / freedom[..., None] + ridge * torch.eye(z.shape[-1]).to(z))


def mixed(shares: Tensor, own: Gaussians, others: Gaussians) -> Gaussians:
    """Return ``b own + (1 - b) others`` with the shares b of means and covariance, ``(..., 2)``."""
    of_means = shares[..., :1, None]
    of_covariance = shares[..., 1:, None] if own.full else shares[..., 1:]
    return Gaussians(
        of_means * own.means + (1 - of_means) * others.means,
        of_covariance * own.covariance + (1 - of_covariance) * others.covariance,
    )


def linear(gaussians: Gaussians, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight ``(..., classes, features)`` and bias ``(..., classes)`` of the classifier of these Gaussians."""
    means, within = gaussians.means, gaussians.shrunk
    weight = torch.linalg.solve(within, means.mT).mT if gaussians.full else means / within[..., None, :]
    return weight, prior - 0.5 * (means * weight).sum(-1)


def best_shares(z: Tensor, own: Tensor, others: Gaussians, prior: Tensor, ridge: float) -> Tensor:
    """Return the shares of a client's own means and covariance with the smallest loss in two-fold cross-validation.

    The folds divide the examples of each class in turn; a class with one example is left out. Without any class left
    the shares are 0. Starting at one half, Newton's method with absolute curvatures stays in [0, 1].

    Args:
        z: ``(..., n, features)`` in float64.
        own: ``(..., n, classes)``, as for `estimate`.
        others: the Gaussians of all clients.
        prior: ``(..., classes)`` logarithms of the shares of classes.
        ridge: as for `estimate`.

    Returns:
        ``(..., 2)``.
    """
    own = own * (own.sum(-2, keepdim=True) > 1)
    turn = own.cumsum(-2) % 2
    halves = torch.stack([own * turn, own * (1 - turn)])
    folds = _folds(z, halves, prior, estimate(z, halves.flip(0), others, ridge), others)
    found = _smallest(folds, z.new_full((*z.shape[:-2], 2), 0.5))
    return found * (own.sum((-2, -1)) > 0)[..., None]


def _folds(z: Tensor, own: Tensor, prior: Tensor, rest: Gaussians, others: Gaussians) -> _Folds:
    """Return the folds in coordinates in which the covariance of all clients is the unit."""
    gap = rest.means - others.means
    if not others.full:
        root = others.shrunk.sqrt()[..., None, :]
        excess = rest.shrunk / others.shrunk - 1
        return _Folds(z / root, own, prior, others.means / root, gap / root, excess)
    factor = torch.linalg.cholesky(others.shrunk)
    half = torch.linalg.solve_triangular(factor, rest.shrunk, upper=False)
    ratio, turned = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    into = torch.linalg.solve_triangular(factor.mT, turned, upper=True)
    return _Folds(z @ into, own, prior, others.means @ into, gap @ into, ratio - 1)


def _scores(folds: _Folds, weight: Tensor, center: Tensor) -> Tensor:
    """Return ``weight . (features - center)``, ``(2, ..., n, classes)``."""
    return folds.features @ weight.mT - (weight * center).sum(-1)[..., None, :]


def _loss(shares: Tensor, folds: _Folds) -> Tensor:
    """Return the sum of the mean cross-entropy of both folds under the mixed Gaussians, ``(...)``."""
    means = folds.means + shares[..., :1, None] * folds.gap
    scale = 1 / (1 + shares[..., 1:] * folds.excess)[..., None, :]
    scores = _scores(folds, scale * means, means / 2) + folds.prior[..., None, :]
    there = folds.own.sum(-1)
    total = (scores.logsumexp(-1) * there).sum(-1) - (scores * folds.own).sum((-2, -1))
    return (total / there.sum(-1).clamp(min=1)).sum(0)


def _derivatives(shares: Tensor, folds: _Folds) -> tuple[Tensor, Tensor]:
    """Return the gradient ``(..., 2)`` and the matrix of second derivatives ``(..., 2, 2)`` of `_loss`."""
    excess, gap = folds.excess[..., None, :], folds.gap
    means = folds.means + shares[..., :1, None] * gap
    scale = 1 / (1 + shares[..., 1:, None] * excess)
    slope, bend = -excess * scale**2, 2 * excess**2 * scale**3
    first = [_scores(folds, scale * gap, means), _scores(folds, slope * means, means / 2)]
    mixed = _scores(folds, slope * gap, means)
    second = [[-(scale * gap**2).sum(-1)[..., None, :], mixed], [mixed, _scores(folds, bend * means, means / 2)]]
    there = folds.own.sum(-1, keepdim=True)
    chance = there * (_scores(folds, scale * means, means / 2) + folds.prior[..., None, :]).softmax(-1)
    off, count = chance - folds.own, there.sum((-2, -1)).clamp(min=1)
    along = [(chance * one).sum(-1) for one in first]

    def curve(j: int, k: int) -> Tensor:
        inner = (off * second[j][k] + chance * first[j] * first[k]).sum((-2, -1))
        return ((inner - (along[j] * along[k]).sum(-1)) / count).sum(0)

    gradient = torch.stack([((off * one).sum((-2, -1)) / count).sum(0) for one in first], -1)
    return gradient, torch.stack([torch.stack([curve(j, k) for k in (0, 1)], -1) for j in (0, 1)], -2)


def _smallest(folds: _Folds, at: Tensor) -> Tensor:
    """Return the shares near `at` with the smallest loss; each row of a stack on its own."""
    for _ in range(_STEPS):
        value, (gradient, curve) = _loss(at, folds), _derivatives(at, folds)
        free = ~((at <= 0) & (gradient > 0) | (at >= 1) & (gradient < 0))
        curve = torch.where(free[..., None] & free[..., None, :], curve, torch.eye(2).to(at))
        bends, along = torch.linalg.eigh(curve)
        downhill = along.mT @ (gradient * free)[..., None] / bends.abs().clamp(min=_FLAT)[..., None]
        step = -(along @ downhill)[..., 0]
        for _ in range(_CUTS):
            rises = _loss((at + step).clamp(0, 1), folds) > value + 1e-10 * (1 + value.abs())
            if not rises.any():
                break
            step = torch.where(rises[..., None], step / 4, step)
        at = (at + step).clamp(0, 1)
    return at
