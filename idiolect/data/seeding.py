"""Calls of user code whose random numbers depend on a key alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

_LOCK = threading.Lock()


def seed_pass(key: int) -> None:
    """Start torch's random stream on the CPU from a key, but not while another thread is in a `seeded_call`."""
    with _LOCK:
        torch.default_generator.manual_seed(key)


def seeded_call(key: int, call: Callable[[], T]) -> T:
    """Return the result of a call during which the random streams of torch, NumPy and Python start from a key.

    The streams are then as they were before. One thread at a time does this.

    Example:
        >>> one, other = (seeded_call(3, lambda: (random.random(), float(torch.rand(())))) for _ in range(2))
        >>> one == other
        True
    """
    with _LOCK:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - user code draws from it
        random.seed(key)
        np.random.seed(key % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(key)
        try:
            return call()
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])
