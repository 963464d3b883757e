"""Random streams: an independent one for each purpose, client, round and epoch, so the order of work has no effect."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def derive(*words: int | str) -> int:
    """Return the seed of one stream: 63 bits that depend on all the words.

    Example:
        >>> derive(0, "shuffle", "ward-a", 3) == derive(0, "shuffle", "ward-a", 3)
        True
        >>> derive(0, "shuffle", "ward-a", 3) == derive(0, "shuffle", "ward-b", 3)
        False
    """
    text = "\x1f".join(f"{type(w).__name__}:{w}" for w in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(*words: int | str) -> np.random.Generator:
    """Return a NumPy generator whose seed depends on all the words."""
    return np.random.default_rng(derive(*words))


_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of the SplitMix64 finalizer, as signed 64-bit


def uniform_hash(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` uniform numbers in [0, 1) that depend only on an integer seed, shape ``(..., count)``.

    The SplitMix64 finalizer (Steele, Lea and Flood, OOPSLA 2014) applied to ``seed + i * golden``.

    Args:
        seed: () int64; or ``(...)``, one for each row of a stack.
        count: number of values per seed.
        dtype: floating dtype of the result.

    Example:
        >>> a = uniform_hash(torch.tensor(7), 1000, torch.float64)
        >>> bool((a >= 0).all() and (a < 1).all() and abs(a.mean() - 0.5) < 0.05)
        True
    """
    golden = torch.arange(1, count + 1, device=seed.device) * -0x61C8864680B583EB
    z = seed[..., None] + golden
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shift_right(z, shift)) * multiplier
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).to(torch.float64).mul(2.0**-53).to(dtype)


def normal_hash(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` standard normal numbers that depend only on an integer seed, shape ``(..., count)``.

    The Box-Muller transform of `uniform_hash`.

    Args:
        seed: () int64; or ``(...)``, one for each row of a stack.
        count: number of values per seed.
        dtype: floating dtype of the result.

    Example:
        >>> a = normal_hash(torch.tensor(7), 10_000, torch.float64)
        >>> bool(abs(a.mean()) < 0.05 and abs(a.var() - 1) < 0.05)
        True
    """
    half = (count + 1) // 2
    uniform = uniform_hash(seed, 2 * half, torch.float64)
    length, angle = (-2 * torch.log1p(-uniform[..., :half])).sqrt(), 2 * math.pi * uniform[..., half:]
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=-1)[..., :count].to(dtype)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # `>>` copies the sign bit: mask it out
