"""PyTorch's initialization of a linear layer, from a hash: alike on all sites, and without PyTorch's random stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from idiolect.core.rng import derive, uniform_hash


def linear_start(shape: Sequence[int], inputs: int, like: Tensor, *words: int | str) -> Tensor:
    """Return a weight or bias, uniform within one over the root of the layer's inputs.

    Args:
        shape: its shape.
        inputs: number of inputs of the layer.
        like: a tensor of the dtype and device of the result.
        words: the words of the seed.

    Example:
        >>> bias = linear_start((1000,), 4, torch.zeros(1), 0, "an example")
        >>> bool((bias.abs() <= 0.5).all() and bias.std() > 0.25)
        True
    """
    uniform = uniform_hash(torch.tensor(derive(*words), device=like.device), math.prod(shape), like.dtype)
    return ((2 * uniform - 1) / math.sqrt(inputs)).view(shape)
