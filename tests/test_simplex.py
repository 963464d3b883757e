"""The quadratic program of mixed heads, against every support and against what marks a minimum."""

import pytest
import torch

from idiolect.parts.common.simplex import smallest_on_simplex
from idiolect.testing.oracles.collaboration import smallest_form


def problem(size, rank, seed, ridge=0.0):
    """Return a matrix like those of FedPAC: scattered points seen from one of them, and small variances."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    apart = points - points[seed % size]
    return apart @ apart.T + torch.diag(ridge * torch.rand(size, generator=generator, dtype=torch.float64))


def is_smallest(p, alpha, tolerance=1e-10):
    """No index promises a smaller value: for a convex form that is the minimum."""
    slope, scale = p @ alpha, p.diagonal().max().clamp(min=1e-100)
    assert alpha.min() >= 0
    assert alpha.sum() == pytest.approx(1, abs=1e-12)
    assert (alpha @ slope - slope).max() <= tolerance * scale


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_small_problems_against_every_support(ridge):
    inner = 0
    for seed in range(30):
        p = problem(1 + seed % 6, 4, seed, ridge)
        found, expected = smallest_on_simplex(p), smallest_form(p)
        assert torch.allclose(found, expected, atol=1e-11), seed
        inner += int((found > 0).sum() > 1)
    assert inner > 5


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 30.0])
@pytest.mark.parametrize("size", [20, 60])
def test_large_problems_are_at_their_minimum(size, ridge):
    for seed in range(3):
        p = problem(size, 10, seed, ridge)
        is_smallest(p, smallest_on_simplex(p))


def test_several_minima_give_the_one_nearest_to_equal_weights():
    assert torch.allclose(smallest_on_simplex(torch.zeros(4, 4)), torch.full((4,), 0.25).double(), atol=1e-6)
    assert torch.allclose(smallest_on_simplex(torch.ones(3, 3)), torch.full((3,), 1 / 3).double(), atol=1e-3)
    for seed in range(5):  # fewer directions than clients
        p = problem(8, 2, seed)
        is_smallest(p, smallest_on_simplex(p), 1e-9)


def test_what_rounding_made_negative_is_raised():
    p = problem(6, 3, 1)
    p -= 1e-13 * torch.eye(6)
    assert torch.linalg.eigvalsh(p)[0] < 0
    is_smallest(p, smallest_on_simplex(p), 1e-9)


def test_form_and_scale_change_nothing():
    p = problem(5, 4, 3, 1.0)
    found = smallest_on_simplex(p)
    assert torch.allclose(smallest_on_simplex(1e-9 * p), found, atol=1e-10)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(smallest_on_simplex(p[order][:, order]), found[order], atol=1e-11)
    assert smallest_on_simplex(torch.tensor([[2.0]])).tolist() == [1.0]
