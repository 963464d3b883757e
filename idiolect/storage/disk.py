"""Client memories on disk, in files that are written once and never changed.

Such a file, a *segment*, has one row per client. If several segments have a row of a client, the row in the newest one
is its memory, and the older rows are stale. A checkpoint lists the numbers of the segments. Their files do not change
afterwards, so the checkpoint stays valid.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.memory import RamStore, Store, nbytes, unpack
from idiolect.storage.segment import read_memory, read_names, write_segment

Kind = Literal["auto", "ram", "disk"]

SEGMENT_BYTES = 32 * 2**20
"""Memories wait in RAM until they are this many bytes together."""


@dataclass
class _Segment:
    rows: int
    check: int
    """CRC-32 of the names of its clients."""
    live: int
    """Number of rows that are the newest of their client."""


class DiskStore:
    """Memories in segments on disk. RAM holds an index, and memories that are not yet written.

    A row is *live* if it is the newest of its client. When less than half of a segment's rows are live, they are copied
    to the next segment, so the files take at most about twice the size of all memories. The files of the last
    checkpoint may take as much again. A file is removed when neither a memory nor the checkpoint uses it. Each row has
    a checksum of its client and values, which every `get` compares.

    Args:
        fresh: the memory of a client that has not trained yet.
        folder: folder of the segments, with no other files. None for a temporary folder under the environment's TMPDIR,
            which is removed with the store.
        segment_bytes: a segment is written when the memories that wait in RAM take this many bytes.

    Raises:
        UsageError: by `put` and `save`, if the disk is full; by `get` and `load`, if a file is damaged or missing.

    Example:
        >>> store = DiskStore({"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.save()["segments"].shape  # number and checksum of each segment
        torch.Size([1, 2])
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
    """

    def __init__(self, fresh: Trees, folder: Path | None = None, segment_bytes: int = SEGMENT_BYTES) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="idiolect-"))
            weakref.finalize(self, _remove, folder, os.getpid())
        self._fresh, self._folder, self._limit = fresh, folder, segment_bytes
        self._waiting = RamStore({p: Tree(t.layout, t.flat.cpu()) for p, t in fresh.items()}, segment_bytes)
        self._index: dict[str, tuple[int, int]] = {}
        self._segments: dict[int, _Segment] = {}
        self._saved: set[int] = set()
        self._checkpointed: set[int] = set()
        self._last = 0

    def get(self, client: str) -> Trees:
        """See `Store`."""
        memory = self._read(client) if client in self._index else self._waiting.get(client)
        return {p: Tree(t.layout, memory[p].flat.to(t.flat.device)) for p, t in self._fresh.items()}

    def put(self, client: str, memory: Trees) -> None:
        """See `Store`."""
        self._wait(client, memory)
        if self._waiting.nbytes >= self._limit:
            self._flush()

    def __contains__(self, client: str) -> bool:
        return client in self._index or client in self._waiting

    def __iter__(self) -> Iterator[str]:
        """See `Store`."""
        return chain(self._index, self._waiting)

    def save(self) -> dict[str, Tensor]:
        """See `Store`; the number of each segment and the checksum of its names."""
        self._flush()
        self._saved = set(self._segments)
        rows = [(number, segment.check) for number, segment in self._segments.items()]
        return {"segments": torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)}

    def saved(self) -> None:
        """See `Store`; segments that only the checkpoint before this one named are removed."""
        self._checkpointed = self._saved
        self._sweep()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Store`; also takes the result of `RamStore.save`."""
        self._waiting.load({})
        self._index, self._segments = {}, {}
        for number, check in tensors["segments"].tolist() if "segments" in tensors else []:
            names = read_names(self._path(number), check)
            self._place(number, check, names)
        self._last = max(self._segments, default=0)
        self._checkpointed = set(self._segments)
        for client, memory in unpack(tensors if "clients" in tensors else {}, self._fresh):
            self.put(client, memory)

    def _wait(self, client: str, memory: Trees) -> None:
        self._waiting.put(client, memory)
        self._forget(client)

    def _forget(self, client: str) -> None:
        if client in self._index:
            self._segments[self._index.pop(client)[0]].live -= 1

    def _flush(self) -> None:
        """Write the memories that wait, and with them the live rows of segments that are mostly stale."""
        for number, segment in self._segments.items():
            if 2 * segment.live < segment.rows and self._waiting.nbytes <= 2 * self._limit:
                for client in read_names(self._path(number), segment.check):
                    if client in self._index and self._index[client][0] == number:
                        self._wait(client, self._read(client))
        names = list(self._waiting)
        if names:
            number = self._last + 1
            self._folder.mkdir(parents=True, exist_ok=True)
            check = write_segment(self._path(number), self._waiting)
            self._place(number, check, names)
            self._waiting.load({})
            self._last = number
        self._sweep()

    def _place(self, number: int, check: int, names: list[str]) -> None:
        """Add a segment to the index as the newest."""
        for row, client in enumerate(names):
            self._forget(client)
            self._index[client] = (number, row)
        self._segments[number] = _Segment(len(names), check, len(names))

    def _sweep(self) -> None:
        """Remove the files that neither a memory nor the checkpoint on disk uses."""
        self._segments = {number: segment for number, segment in self._segments.items() if segment.live}
        needed = {self._path(number) for number in self._checkpointed | set(self._segments)}
        for path in set(self._folder.glob("*")) - needed:
            path.unlink()

    def _read(self, client: str) -> Trees:
        number, row = self._index[client]
        return read_memory(self._path(number), row, client, self._fresh)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08}.safetensors"


def store_for(kind: Kind, directory: str | Path | None, clients: int, name: str, fresh: Trees) -> Store:
    """Return the store of a run.

    Args:
        kind: ``"ram"``, ``"disk"`` or ``"auto"``. ``"auto"`` is ``"disk"`` if the directory has memories on disk, or
            if the memories of all clients would take more than an eighth of the RAM. With ``"ram"``, there are about
            five copies of all memories while a checkpoint is written.
        directory: directory of the run; segments are in a folder in it with the store's name. None for a temporary
            folder.
        clients: number of clients.
        name: name of the store, such as ``"memory"``.
        fresh: the memory of a client that has not trained yet.

    Raises:
        UsageError: if `kind` is none of these.

    Example:
        >>> type(store_for("auto", None, 1000, "memory", {"share": Tree.of({"bias": torch.zeros(1)})})).__name__
        'RamStore'
    """
    if kind not in ("auto", "ram", "disk"):
        raise UsageError(f"memory is 'auto', 'ram' or 'disk', got {kind!r}")
    folder = Path(directory) / name if directory is not None else None
    large = 8 * clients * nbytes(fresh) > ram()
    if kind == "disk" or (kind == "auto" and (large or (folder and folder.is_dir()))):
        return DiskStore(fresh, folder)
    return RamStore(fresh)


def ram() -> int:
    """Return the bytes of the machine's RAM, or of its container's limit if that is less."""
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    said = [Path(path).read_text().strip() for path in limits if os.path.exists(path)]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(n) for n in said if n.isdecimal())])


def _remove(folder: Path, owner: int) -> None:
    """Remove a temporary folder, unless this process was forked from its owner."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
