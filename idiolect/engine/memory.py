"""What clients remember between rounds: what a store of memories is, and the one in RAM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from idiolect.client import Slots
from idiolect.errors import UsageError
from idiolect.tree import Tree


class Store(Protocol):
    """The memories of a population, by the client's name; a client that never trained has the one of the start."""

    def get(self, client: str) -> Slots:
        """Return a client's memory; that of a client which never trained is as at the start."""
        ...

    def put(self, client: str, memory: Slots) -> None:
        """Replace a client's memory by a copy of this one."""
        ...

    def __contains__(self, client: str) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients that have trained."""
        ...

    def save(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold for `load` to find every memory as it is now."""
        ...

    def saved(self) -> None:
        """Take note that the checkpoint with what `save` returned last is on disk, and the one before it gone."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `save` returned; an empty mapping is the start."""
        ...


class RamStore:
    """Each client's memory, copied at the boundary: no two clients, and no later step, share its storage.

    Args:
        fresh: the memory of a client that has not trained yet.

    Example:
        >>> store = RamStore({"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
        >>> {name: tuple(tensor.shape) for name, tensor in store.save().items()}
        {'clients': (10,), 'part/share': (1, 1)}
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

    def __contains__(self, client: str) -> bool:
        return client in self._kept

    def __iter__(self) -> Iterator[str]:
        """See `Store`."""
        return iter(self._kept)

    def save(self) -> dict[str, Tensor]:
        """See `Store`: the memories themselves, by `pack`."""
        return pack(self._kept)

    def saved(self) -> None:
        """See `Store`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Store`.

        Raises:
            UsageError: if the memories are in segments on disk.
        """
        if "segments" in tensors:
            raise UsageError("this run keeps its memories on disk: resume it with memory='disk', or 'auto'")
        self._kept = {}
        for client, memory in unpack(tensors, self._fresh):
            self.put(client, memory)


def pack(memories: Mapping[str, Slots]) -> dict[str, Tensor]:
    """Return memories as few tensors: ``part/NAME`` (clients, values), and ``clients``, their names as JSON bytes."""
    rows: dict[str, list[Tensor]] = {}
    for memory in memories.values():
        for part, tree in memory.items():
            rows.setdefault(f"part/{part}", []).append(tree.flat)
    names = bytearray(json.dumps(list(memories)).encode())
    return {"clients": torch.frombuffer(names, dtype=torch.uint8)} | {
        p: torch.stack(flats) for p, flats in rows.items()
    }


def unpack(packed: Mapping[str, Tensor], fresh: Slots) -> Iterator[tuple[str, Slots]]:
    """Iterate over the clients and memories of `pack`, with the names, shapes and device of `fresh`; views."""
    for row, client in enumerate(json.loads(packed["clients"].numpy().tobytes()) if packed else []):
        flats = {part: packed[f"part/{part}"][row] for part in fresh}
        yield client, {part: Tree(tree.layout, flats[part].to(tree.flat.device)) for part, tree in fresh.items()}
