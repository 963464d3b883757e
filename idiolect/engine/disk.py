"""Memories of more clients than fit in working memory: a log of files that are written once and never changed.

What is put waits in working memory until it fills a segment, or until a checkpoint is due; then it becomes one file,
one row a client. Working memory holds the index, which says for each client in which segment and row its newest memory
is. A checkpoint holds that index alone. As segments never change, each checkpoint on disk stays true whatever happens
after it: a segment that it names is deleted only when a newer checkpoint is there that does not name it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from idiolect.client import Slots
from idiolect.engine.memory import RamStore, Store, filled, kept_parts, names_as_bytes, names_in, pack
from idiolect.errors import UsageError
from idiolect.report import replace_file

Kind = Literal["auto", "ram", "disk"]

SEGMENT = 32 * 2**20
"""Bytes of a full segment, and of what may wait in working memory."""

MANY = 64
"""Segments less than half full that may be there before they are merged."""

FOLDER = "memory"
"""The place of the segments in the directory of a run."""


class Place(NamedTuple):
    """Where a client's newest memory is."""

    segment: int
    row: int
    check: int
    """CRC-32 of the row."""


class DiskStore:
    """Memories in files; see the module. It may be read by several threads while one writes.

    Rows that are no longer the newest of their client stay where they are until more than half of a segment is stale.
    Then its other rows move into the next segment that is written, and the file goes. So files hold at most about
    twice what is remembered, plus what the last checkpoint still names.

    Args:
        folder: where the segments are; it belongs to this store alone.
        fresh: the memory of a client that has not trained yet.

    Example:
        >>> from idiolect.tree import Tree
        >>> store = temporary({"share": Tree.of({"bias": torch.zeros(1)})})
        >>> store.put("ward-a", {"share": Tree.of({"bias": torch.ones(1)})})
        >>> store.state()["places"].shape  # writes what was waiting
        torch.Size([1, 3])
        >>> store.get("ward-a")["share"]["bias"].item(), store.get("ward-b")["share"]["bias"].item()
        (1.0, 0.0)
    """

    def __init__(self, folder: Path, fresh: Slots) -> None:
        self._folder = folder
        self._fresh = fresh
        self._parts = kept_parts(fresh)
        self._bytes = sum(fresh[part].nbytes for part in self._parts) + 1024  # with what Python needs for it
        self._index: dict[str, Place] = {}
        self._waiting: dict[str, Slots] = {}
        self._written: dict[int, int] = {}  # rows of each segment in use
        self._live: Counter[int] = Counter()  # how many of them are the newest of their client
        self._named: frozenset[int] = frozenset()  # segments of the checkpoint that is on disk
        self._next = 1 + max((int(file.stem) for file in folder.glob("[0-9]*.safetensors")), default=0)
        self._lock = Lock()

    def get(self, client: str) -> Slots:
        """See `Store`.

        Raises:
            UsageError: if the file that holds it is missing, truncated or altered.
        """
        with self._lock:
            return self._get(client)

    def put(self, client: str, memory: Slots) -> None:
        """See `Store`.

        Raises:
            UsageError: if a segment is due and cannot be written; nothing that was put before is lost.
        """
        with self._lock:
            self._waiting[client] = filled(memory, {part: memory[part].flat.cpu().clone() for part in self._parts})
            if self._full:
                self._write()

    def __contains__(self, client: object) -> bool:
        return client in self._waiting or client in self._index

    def __iter__(self) -> Iterator[str]:
        return iter([*self._index, *(client for client in self._waiting if client not in self._index)])

    def state(self) -> dict[str, Tensor]:
        """See `Store`: the index, after all that waited was written."""
        with self._lock:
            self._write()
            return {
                "clients": names_as_bytes(self._index),
                "places": torch.tensor(list(self._index.values()), dtype=torch.int64).reshape(-1, 3),
                "segments": torch.tensor(list(self._written.items()), dtype=torch.int64).reshape(-1, 2),
            }

    def saved(self) -> None:
        """See `Store`: files that the new checkpoint does not name are deleted."""
        with self._lock:
            self._named = frozenset(self._written)
            self._sweep()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Store`: what a killed run wrote after its last checkpoint is deleted.

        Raises:
            UsageError: if a segment is missing.
        """
        with self._lock:
            places = (Place(*row) for row in state["places"].tolist())
            self._index = dict(zip(names_in(state["clients"]), places, strict=True))
            self._written = dict(state["segments"].tolist())
            self._live = Counter(place.segment for place in self._index.values())
            self._named, self._waiting = frozenset(self._written), {}
            missing = [self._file(segment) for segment in self._written if not self._file(segment).is_file()]
            if missing:
                raise UsageError(f"{missing[0]} is missing, and with it what clients remember: put back a whole copy")
            self._sweep()

    @property
    def _full(self) -> bool:
        return len(self._waiting) * self._bytes >= SEGMENT

    def _file(self, segment: int) -> Path:
        return self._folder / f"{segment:08d}.safetensors"

    def _get(self, client: str) -> Slots:
        if client in self._waiting:
            waiting = self._waiting[client]
            return filled(self._fresh, {part: waiting[part].flat for part in self._parts})
        if client in self._index:
            return filled(self._fresh, self._read(client, self._index[client]))
        return dict(self._fresh)

    def _read(self, client: str, place: Place) -> dict[str, Tensor]:
        file = self._file(place.segment)
        try:
            with safe_open(file, framework="pt") as segment:
                rows = {part: segment.get_slice(f"rows/{part}")[place.row] for part in self._parts}
        except (SafetensorError, OSError, IndexError) as error:
            raise UsageError(
                f"{file}, with what client {client!r} remembers, is missing, truncated or damaged: "
                f"put back a whole copy ({error})"
            ) from None
        if _check(rows) != place.check:
            raise UsageError(
                f"{file} was altered after it was written: what client {client!r} remembers has another checksum; "
                "put back a whole copy"
            )
        return rows

    def _write(self) -> None:
        """Write what waits, and with it the live rows of segments that are not worth their file any more."""
        for segment in self._sparse():
            with safe_open(self._file(segment), framework="pt") as file:
                clients = names_in(file.get_tensor("clients"))
            live = [c for c in clients if self._index[c].segment == segment and c not in self._waiting]
            self._waiting |= {client: self._get(client) for client in live}
            if self._full:
                self._write_segment()
        self._write_segment()
        self._sweep()

    def _sparse(self) -> set[int]:
        stale = {s for s, rows in self._written.items() if 2 * self._live[s] < rows}
        small = {s for s in self._written if 2 * self._live[s] * self._bytes < SEGMENT}
        return stale | small if len(small) > MANY else stale

    def _write_segment(self) -> None:
        if not self._waiting:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        packed = pack(self._waiting, self._fresh)
        replace_file(self._file(self._next), save(packed))
        for row, client in enumerate(self._waiting):
            if client in self._index:
                self._live[self._index[client].segment] -= 1
            check = _check({part: packed[f"rows/{part}"][row] for part in self._parts})
            self._index[client] = Place(self._next, row, check)
        self._written[self._next] = self._live[self._next] = len(self._waiting)
        self._waiting = {}
        self._written = {s: rows for s, rows in self._written.items() if self._live[s]}
        self._next += 1

    def _sweep(self) -> None:
        """Delete the files that neither the index nor the checkpoint on disk names."""
        needed = {self._file(segment).name for segment in self._named | self._written.keys()}
        for file in self._folder.glob("*.safetensors*"):  # those of a write that was cut short among them
            if file.name not in needed:
                file.unlink(missing_ok=True)


def temporary(fresh: Slots) -> DiskStore:
    """Return a store in a temporary folder, which is removed with it."""
    folder = tempfile.mkdtemp(prefix="idiolect-")
    store = DiskStore(Path(folder), fresh)
    weakref.finalize(store, _remove, folder, os.getpid())
    return store


def choose(kind: Kind, directory: str | Path | None, population: int, fresh: Slots) -> Store:
    """Return the store of a run.

    Args:
        kind: ``"ram"``, ``"disk"``, or ``"auto"``: on disk where the memories of all clients would take more than
            an eighth of the working memory there is (writing a checkpoint, ``"ram"`` holds them four times).
        directory: of the run; None for a temporary folder.
        population: number of clients.
        fresh: the memory of a client that has not trained yet.

    Raises:
        UsageError: if there is no such kind.

    Example:
        >>> from idiolect.tree import Tree
        >>> type(choose("auto", None, 1000, {"share": Tree.of({"bias": torch.zeros(1)})})).__name__
        'RamStore'
    """
    if kind not in ("auto", "ram", "disk"):
        raise UsageError(f"memory is 'auto', 'ram' or 'disk', not {kind!r}")
    large = 8 * population * sum(tree.nbytes for tree in fresh.values()) > working_memory()
    if kind == "ram" or (kind == "auto" and not large):
        return RamStore(fresh)
    return temporary(fresh) if directory is None else DiskStore(Path(directory) / FOLDER, fresh)


def working_memory() -> int:
    """Return the bytes of RAM that this process may use: the machine's, or the container's limit where it is lower."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found)


def _check(rows: Mapping[str, Tensor]) -> int:
    found = 0
    for row in rows.values():
        found = zlib.crc32(row.view(torch.uint8).numpy(), found)
    return found


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
