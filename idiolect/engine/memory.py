"""What clients remember between rounds: the interface of a store, and the one in working memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from idiolect.client import Slots
from idiolect.tree import Tree


class Store(Protocol):
    """Each client's memory, copied at the boundary: no two clients, and no later step, share its storage."""

    def get(self, client: str) -> Slots:
        """Return a client's memory; that of a client which never trained is as at the start."""
        ...

    def put(self, client: str, memory: Slots) -> None:
        """Replace a client's memory."""
        ...

    def __contains__(self, client: object) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients that have trained."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold for `load` to bring every memory back."""
        ...

    def saved(self) -> None:
        """Take note that the checkpoint with the last `state` is on disk, in place of all earlier ones."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of a store of this kind."""
        ...


class RamStore:
    """All memories in working memory; a checkpoint holds them whole.

    Args:
        fresh: the memory of a client that has not trained yet.

    Example:
        >>> import torch
        >>> from idiolect.tree import Tree
        >>> store = RamStore({"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
    """

    def __init__(self, fresh: Slots) -> None:
        self._fresh = fresh
        self._kept: dict[str, Slots] = {}

    def get(self, client: str) -> Slots:
        """See `Store`."""
        return dict(self._kept.get(client, self._fresh))

    def put(self, client: str, memory: Slots) -> None:
        """See `Store`."""
        self._kept[client] = {name: tree.clone() for name, tree in memory.items()}

    def __contains__(self, client: object) -> bool:
        return client in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def state(self) -> dict[str, Tensor]:
        """See `Store`."""
        return pack(self._kept, self._fresh)

    def saved(self) -> None:
        """See `Store`."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Store`."""
        rows = {part: state[f"rows/{part}"] for part in kept_parts(self._fresh)}
        for i, client in enumerate(names_in(state["clients"])):
            self.put(client, filled(self._fresh, {part: matrix[i] for part, matrix in rows.items()}))


def pack(memories: Mapping[str, Slots], like: Slots) -> dict[str, Tensor]:
    """Return memories as matrices, one row a client.

    Args:
        memories: by client.
        like: trees of the layouts and dtypes that every memory has.

    Returns:
        On the CPU: ``rows/PART``, (clients, values), for each part that keeps anything; ``clients``, the names.
    """
    packed = {"clients": names_as_bytes(memories)}
    for part in kept_parts(like):
        tree = like[part]
        packed[f"rows/{part}"] = torch.empty(len(memories), tree.layout.total, dtype=tree.flat.dtype)
        for row, slots in zip(packed[f"rows/{part}"], memories.values(), strict=True):
            given = slots[part]
            if given.layout is not tree.layout or given.flat.dtype != tree.flat.dtype:
                raise ValueError(f"{part}: a client's memory changed from {tree} to {given}")
            row.copy_(given.flat)
    return packed


def filled(like: Slots, rows: Mapping[str, Tensor]) -> Slots:
    """Return slots like these with other values; parts that keep nothing are as they are."""
    return like | {p: Tree(like[p].layout, row.to(like[p].flat.device)) for p, row in rows.items()}


def kept_parts(like: Slots) -> list[str]:
    """Return the parts that keep anything."""
    return [part for part, tree in like.items() if len(tree)]


def names_as_bytes(clients: Mapping[str, object]) -> Tensor:
    """Return names of clients, whatever their characters, as one tensor: the bytes of a JSON list."""
    return torch.frombuffer(bytearray(json.dumps(list(clients)).encode()), dtype=torch.uint8)


def names_in(packed: Tensor) -> list[str]:
    """Return the names that `names_as_bytes` made one tensor of."""
    found: list[str] = json.loads(packed.numpy().tobytes())
    return found
