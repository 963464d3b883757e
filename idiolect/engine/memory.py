"""What clients remember between rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from idiolect.client import Slots


class MemoryStore:
    """Each client's memory, copied at the boundary: no two clients, and no later step, share its storage.

    Args:
        fresh: makes the memory of a client that has not trained yet.

    Example:
        >>> import torch
        >>> from idiolect.tree import Tree
        >>> store = MemoryStore(lambda: {"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
    """

    def __init__(self, fresh: Callable[[], Slots]) -> None:
        self._fresh = fresh
        self._kept: dict[str, Slots] = {}

    def get(self, client: str) -> Slots:
        """Return a client's memory; that of a client which never trained is as at the start."""
        return dict(self._kept[client]) if client in self._kept else self._fresh()

    def put(self, client: str, memory: Slots) -> None:
        """Replace a client's memory."""
        self._kept[client] = {name: tree.clone() for name, tree in memory.items()}

    def __contains__(self, client: str) -> bool:
        return client in self._kept

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients that have trained."""
        return iter(self._kept)
