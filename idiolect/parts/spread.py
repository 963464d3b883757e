"""Features that are Gaussians instead of points."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.anatomy import Private
from idiolect.parts.classes import Classifier, layer_in
from idiolect.scope import Scope
from idiolect.words import Pass

SMALLEST = 1e-4
"""No standard deviation of a feature is below this."""

Normal = tuple[Tensor, Tensor]
"""Means and standard deviations."""


class Spread(nn.Module):
    """A linear map from features to raw standard deviations. It begins at zero, and is exchanged like the body."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(len(like), len(like)))
        self.bias = nn.Parameter(like.new_zeros(len(like)))


def add_spread(names: Scope, module: nn.Module) -> None:
    """List a `Spread` in the layer from features to classes, and a private count of steps for the noise.

    The layer does not use them: the module predicts as before.
    """
    layer = layer_in(module, names)
    if not hasattr(layer, "spread"):
        layer.spread = Spread(layer.weight[0].detach())
        layer.noise = Private()
        layer.noise.register_buffer("steps", layer.weight.detach().new_zeros(1), persistent=False)


def normal(seen: Pass, found: Classifier) -> Normal:
    """Return the Gaussian of each example's features, ``(b, d)`` twice."""
    weight, bias = (seen.weights[found.tensor(f"spread.{name}")] for name in ("weight", "bias"))
    return seen.features, F.softplus(F.linear(seen.features, weight, bias)).clamp(min=SMALLEST)


def divergence(p: Normal, q: Normal) -> Tensor:
    """Return the Kullback-Leibler divergence of p from q, summed over the last axis.

    Example:
        >>> unit, wide = [(torch.zeros(2), torch.full((2,), s)) for s in (1.0, 2.0)]
        >>> divergence(unit, unit).item(), round(divergence(unit, wide).item(), 4)
        (0.0, 0.6363)
    """
    (mean_p, p_), (mean_q, q_) = p, q
    return ((q_ / p_).log() + (p_.square() + (mean_p - mean_q).square()) / (2 * q_.square()) - 0.5).sum(-1)
