"""Stores of client memories: the protocol, and the store in RAM."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.shared_memory import shared

BLOCK_BYTES = 16 * 2**20
"""Size of the blocks that hold memories in RAM."""


class Store(Protocol):
    """The memories of a population, by the client's name; a client that never trained has the initial memory."""

    def get(self, client: str) -> Trees:
        """Return a client's memory; the initial one if the client never trained."""
        ...

    def put(self, client: str, memory: Trees) -> None:
        """Replace a client's memory by a copy of this one."""
        ...

    def __contains__(self, client: str) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients that have trained."""
        ...

    def save(self) -> dict[str, Tensor]:
        """Return the tensors from which `load` restores every memory as it is now."""
        ...

    def saved(self) -> None:
        """Note that a checkpoint with the result of the last `save` is on disk and has replaced the one before it."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the memories that `save` returned; an empty mapping is the initial state."""
        ...


class RamStore:
    """A store in RAM. A client's memory is a row of a block, copied in and out, so its storage is never shared.

    On a CPU the blocks are in memory that is shared with processes forked later, so that a worker keeps no old copy of
    a row. Such a process may read memories, and must not replace them.

    Args:
        fresh: the memory of a client that has not trained yet.
        block_bytes: size of a block; RAM is allocated a block at a time.

    Example:
        >>> store = RamStore({"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
        >>> {name: tuple(tensor.shape) for name, tensor in store.save().items()}
        {'clients': (10,), 'part/share': (1, 1)}
    """

    def __init__(self, fresh: Trees, block_bytes: int = BLOCK_BYTES) -> None:
        self._fresh = fresh
        self._each = nbytes(fresh)
        self._rows = max(1, block_bytes // max(1, self._each))
        self._blocks: list[Trees] = []
        self._places: dict[str, int] = {}
        self._owner = os.getpid()

    @property
    def nbytes(self) -> int:
        """Bytes of the memories that were stored with `put`."""
        return len(self._places) * self._each

    def get(self, client: str) -> Trees:
        """See `Store`."""
        if client not in self._places:
            return dict(self._fresh)
        return {part: row.clone() for part, row in self._at(self._places[client]).items()}

    def put(self, client: str, memory: Trees) -> None:
        """See `Store`."""
        if os.getpid() != self._owner:
            raise RuntimeError(f"the memory of {client!r} belongs to the process that this one was forked from")
        place = self._places.get(client, len(self._places))
        if place == len(self._blocks) * self._rows:
            self._blocks.append({p: Tree(t.layout, shared(t.flat, self._rows)) for p, t in self._fresh.items()})
        for part, row in self._at(place).items():
            if memory[part].layout is not row.layout:
                raise ValueError(f"{part}: the memory of a client changed from {row} to {memory[part]}")
            row.flat.copy_(memory[part].flat)
        self._places[client] = place

    def _at(self, place: int) -> Trees:
        block, row = divmod(place, self._rows)
        return {part: Tree(t.layout, t.flat[row]) for part, t in self._blocks[block].items()}

    def __contains__(self, client: str) -> bool:
        return client in self._places

    def __iter__(self) -> Iterator[str]:
        """See `Store`."""
        return iter(self._places)

    def save(self) -> dict[str, Tensor]:
        """See `Store`; ``part/NAME`` (clients, values), and ``clients``, their names as JSON bytes."""
        names = bytearray(json.dumps(list(self._places)).encode())
        saved = {"clients": torch.frombuffer(names, dtype=torch.uint8)}
        for part in self._fresh if self._blocks else ():
            rows = [b[part].flat[: len(self._places) - i * self._rows] for i, b in enumerate(self._blocks)]
            saved[f"part/{part}"] = torch.cat(rows)
        return saved

    def saved(self) -> None:
        """See `Store`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Store`.

        Raises:
            UsageError: if the memories are in segments on disk.
        """
        if "segments" in tensors:
            raise UsageError("this run keeps its memories on disk: resume it with memory='disk', or 'auto'")
        self._blocks, self._places = [], {}
        for client, memory in unpack(tensors, self._fresh):
            self.put(client, memory)


def keep_in_ram(name: str, fresh: Trees) -> Store:
    """Return a store in RAM; the name is not used."""
    return RamStore(fresh)


def unpack(saved: Mapping[str, Tensor], fresh: Trees) -> Iterator[tuple[str, Trees]]:
    """Iterate over clients and memories in the result of `RamStore.save`, in the form of `fresh`; views."""
    for row, client in enumerate(json.loads(saved["clients"].numpy().tobytes()) if saved else []):
        yield client, {part: Tree(tree.layout, saved[f"part/{part}"][row]) for part, tree in fresh.items()}


def nbytes(memory: Trees) -> int:
    """Return the bytes of one memory."""
    return sum(tree.nbytes for tree in memory.values())
