"""Gaussian features: means and standard deviations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.rng import normal_hash
from idiolect.core.scope import Scope
from idiolect.core.structure import Attached, Private
from idiolect.core.tree import Tree, combine, overlay
from idiolect.core.types import GradFn, Gradient, Local, Pass, Step
from idiolect.parts.common.classes import Classifier, classifier, layer_in

SMALLEST = 1e-4
"""Smallest standard deviation of a feature."""

KEY_BITS = 24
"""Number of bits of a client's seed that a float of 32 bits represents exactly."""

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
        layer.noise = Private()
        layer.noise.register_buffer("steps", layer.weight.detach().new_zeros(1), persistent=False)


def normal(seen: Pass, found: Classifier) -> Normal:
    """Return the means and standard deviations of each example's features, ``(b, d)`` each."""
    weight, bias = (seen.weights[found.tensor(f"spread.{name}")] for name in ("weight", "bias"))
    return seen.features, F.softplus(F.linear(seen.features, weight, bias)).clamp(min=SMALLEST)


def key_of(local: Local) -> Tensor:
    """Return the key of the noise of a client's round, ``(..., 1)``, as a fact for an objective."""
    return (local.seed % (1 << KEY_BITS))[..., None].to(local.start.flat.dtype)


def noise(seen: Pass, found: Classifier, key: Tensor, samples: int) -> Tensor:
    """Return ``(samples, b, d)`` standard normal numbers, a hash of the key and of the count of steps."""
    steps = seen.weights[found.tensor("noise.steps")]
    seed = key.long() + (steps.long() << KEY_BITS)
    drawn = normal_hash(seed[0], samples * seen.features.numel(), seen.features.dtype)
    return drawn.view(samples, *seen.features.shape)


def count_steps(names: Scope, grad: GradFn, local: Local) -> GradFn:
    """Return a gradient function that also counts its steps."""
    steps = local.structure.layout.only({classifier(names, local.structure).tensor("noise.steps")})

    def counted(at: Tree, step: Step) -> Gradient:
        out = grad(at, step)
        return out._replace(buffers=overlay(out.buffers, combine(steps, at) + 1.0))

    return counted


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
