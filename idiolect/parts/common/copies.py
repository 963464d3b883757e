"""Layout of several models in one row."""

from __future__ import annotations

from functools import lru_cache

from idiolect.core.tree import Layout, layout


@lru_cache(maxsize=64)
def copies(one: Layout, count: int) -> Layout:
    """Return the layout of several consecutive models."""
    return layout(tuple(f"{j}/{name}" for j in range(count) for name in one.names), one.shapes * count)
