"""Noise in a loss: a hash of the client's seed and of a count of steps, which all engines draw alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idiolect.core.scope import Scope
from idiolect.core.structure import Private
from idiolect.core.tree import Tree, combine, counting, overlay
from idiolect.core.types import GradFn, Gradient, Local, Pass, Step
from idiolect.parts.common.classes import Classifier, classifier

KEY_BITS = 24
"""Number of bits of a client's seed that a float of 32 bits represents exactly."""


def add_count(layer: nn.Linear) -> None:
    """Add a private count of steps to a layer, unless it has one."""
    if not hasattr(layer, "noise"):
        layer.noise = Private()
        layer.noise.register_buffer("steps", layer.weight.detach().new_zeros(1), persistent=False)


def key_of(local: Local) -> Tensor:
    """Return the key of the noise of a client's round, ``(..., 1)``, as a fact for an objective."""
    return (local.seed % (1 << KEY_BITS))[..., None].to(counting(local.start.flat.dtype))


def seed_of(seen: Pass, found: Classifier, key: Tensor) -> Tensor:
    """Return the seed of the noise of a step, (), from the key and the count of steps."""
    steps = seen.weights[found.tensor("noise.steps")]
    seed = key.long() + (steps.long() << KEY_BITS)
    return seed[0]


def count_steps(names: Scope, grad: GradFn, local: Local) -> GradFn:
    """Return a gradient function that also counts its steps."""
    steps = local.structure.layout.only({classifier(names, local.structure).tensor("noise.steps")})

    def counted(at: Tree, step: Step) -> Gradient:
        out = grad(at, step)
        count = combine(steps, at) + 1.0
        exact = 2 / torch.finfo(count.flat.dtype).eps  # the largest count that is exact: 256 in bfloat16
        return out._replace(buffers=overlay(out.buffers, Tree(steps, count.flat % exact)))

    return counted
