"""Gaussian features: means and standard deviations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.rng import normal_hash
from idiolect.core.scope import Scope
from idiolect.core.structure import Attached
from idiolect.core.tree import counting
from idiolect.core.types import Pass
from idiolect.parts.common.classes import Classifier, layer_in
from idiolect.parts.common.noise import add_count, seed_of

SMALLEST = 1e-4
"""Smallest standard deviation of a feature."""

Normal = tuple[Tensor, Tensor]
"""Means and standard deviations."""


class Spread(Attached):
    """A linear map from features to raw standard deviations. It is initialized at zero, and exchanged like the body."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(len(like), len(like)))
        self.bias = nn.Parameter(like.new_zeros(len(like)))


def add_spread(names: Scope, module: nn.Module) -> None:
    """Add a `Spread` to the layer from features to classes, and a private count of steps for the noise.

    The layer does not use them: predictions are unchanged.
    """
    layer = layer_in(module, names)
    if not hasattr(layer, "spread"):
        layer.spread = Spread(layer.weight[0].detach())
        add_count(layer)


def normal(seen: Pass, found: Classifier) -> Normal:
    """Return the means and standard deviations of each example's features, ``(b, d)`` each."""
    weight, bias = (seen.weights[found.tensor(f"spread.{name}")] for name in ("weight", "bias"))
    deviations = F.softplus(F.linear(seen.features, weight, bias))
    dtype = counting(deviations.dtype)  # the square of the smallest is 0 in float16
    return seen.features.to(dtype), deviations.to(dtype).clamp(min=SMALLEST)


def noise(seen: Pass, found: Classifier, key: Tensor, samples: int) -> Tensor:
    """Return ``(samples, b, d)`` standard normal numbers, a hash of the key and of the count of steps."""
    drawn = normal_hash(seed_of(seen, found, key), samples * seen.features.numel(), seen.features.dtype)
    return drawn.view(samples, *seen.features.shape)


def divergence(p: Normal, q: Normal) -> Tensor:
    """Return the Kullback-Leibler divergence of p from q, summed over the last axis.

    Example:
        >>> import torch
        >>> unit, wide = [(torch.zeros(2), torch.full((2,), s)) for s in (1.0, 2.0)]
        >>> divergence(unit, unit).item(), round(divergence(unit, wide).item(), 4)
        (0.0, 0.6363)
    """
    (mean_p, p_), (mean_q, q_) = p, q
    return ((q_ / p_).log() + (p_.square() + (mean_p - mean_q).square()) / (2 * q_.square()) - 0.5).sum(-1)
