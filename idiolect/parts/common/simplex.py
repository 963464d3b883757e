"""Minimization of a quadratic form over the simplex."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_on_simplex(matrix: Tensor) -> Tensor:
    r"""Return :math:`\arg\min_\alpha \alpha^T P \alpha` over :math:`\alpha \geq 0, \sum \alpha = 1`.

    An active-set method in float64, exact up to rounding: it solves on the support, adds the index with the largest
    decrease, and removes indices that would become negative. For a matrix of at most a few hundred rows.

    Args:
        matrix: ``(m, m)`` P, symmetric, positive semi-definite up to rounding. Eigenvalues that are not clearly
            above 0 are raised, so that the solution is unique: about the one nearest to equal weights.

    Returns:
        ``(m,)`` in float64.

    Example:
        >>> smallest_on_simplex(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [0.75, 0.25]
    """
    p = _definite(matrix.double())
    precision = 1e-14 * p.diagonal().max()
    alpha = torch.zeros_like(p[0])
    alpha[p.diagonal().argmin()] = 1.0
    for _ in range(10 * len(p)):  # far more than it takes: each pass lowers the form
        slope = p @ alpha
        gain = torch.where(alpha > 0, -torch.inf, alpha @ slope - slope)
        enters = int(gain.argmax())
        if gain[enters] <= precision:
            break
        support = alpha > 0
        support[enters] = True
        alpha = _descend(p, alpha, support)
    return alpha


def _descend(p: Tensor, alpha: Tensor, support: Tensor) -> Tensor:
    """Return the minimizer on a support, without the indices that become negative on the way to it."""
    while True:
        best = torch.zeros_like(alpha)
        best[support] = torch.linalg.solve(p[support][:, support], torch.ones_like(alpha[support]))
        best /= best.sum()
        losing = support & (best <= 0)
        if not losing.any():
            return best
        reach = torch.where(losing, alpha / (alpha - best).clamp(min=1e-300), torch.inf)
        alpha = torch.where(support, alpha + reach.min() * (best - alpha), 0.0)
        support = support & (reach > reach.min())


def _definite(p: Tensor) -> Tensor:
    """Return the matrix with eigenvalues raised above 0 if rounding made them too small."""
    values, vectors = torch.linalg.eigh(p)
    least = (1e-12 * values[-1]).clamp(min=1e-100)
    return p if values[0] >= least else (vectors * values.clamp(min=least)) @ vectors.T
