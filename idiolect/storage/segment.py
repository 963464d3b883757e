"""A segment: one file of memories with a row per client, written once, read a row at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import torch
from safetensors.torch import save
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import write_whole

_DAMAGED = (OSError, ValueError, LookupError, TypeError, ArithmeticError)
"""Exceptions that reading a damaged file may raise."""


def write_segment(path: Path, memories: RamStore) -> int:
    """Write memories as one safetensors file, atomically; return the CRC-32 of the clients' names.

    The file has the tensors of `RamStore.save`, and ``crc32`` (clients,) over each client's name and values.
    """
    sums = torch.tensor([_checksum(client, memories.get(client)) for client in memories])
    tensors = memories.save()
    write_whole(path, save({**tensors, "crc32": sums}))
    return crc32(tensors["clients"].numpy().data)


def read_names(path: Path, check: int) -> list[str]:
    """Return the clients of a segment, by row.

    Raises:
        UsageError: if the file is missing, truncated or altered, or is not the one with this checksum.
    """
    try:
        with path.open("rb") as file:
            stored = _stretch(file, "clients")
        if crc32(stored) != check:
            raise ValueError("the checksum of its names differs")
        names: list[str] = json.loads(stored)
    except _DAMAGED as error:
        raise UsageError(f"{path} is missing or damaged: go back to a whole copy of the run ({error})") from None
    return names


def read_memory(path: Path, row: int, client: str, fresh: Trees) -> Trees:
    """Return a client's memory, on the CPU.

    Raises:
        UsageError: if the file is missing, truncated or altered, or the row is not this client's.
    """
    try:
        with path.open("rb") as file:
            memory = {p: Tree(t.layout, _values(file, p, row, t.flat.dtype)) for p, t in fresh.items()}
            known = int.from_bytes(_stretch(file, "crc32", row), "little")
        if _checksum(client, memory) != known:
            raise ValueError("its checksum differs")
    except _DAMAGED as error:
        raise UsageError(
            f"the memory of client {client!r} in {path} is missing or damaged: "
            f"go back to a whole copy of the run ({error})"
        ) from None
    return memory


def _checksum(client: str, memory: Trees) -> int:
    found = crc32(json.dumps(client).encode())
    for tree in memory.values():
        found = crc32(tree.flat.view(torch.uint8).numpy().data, found)
    return found


def _values(file: BinaryIO, part: str, row: int, dtype: torch.dtype) -> Tensor:
    found = _stretch(file, f"part/{part}", row)
    return torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)


def _stretch(file: BinaryIO, name: str, row: int | None = None) -> bytearray:
    """Return the bytes of a tensor of a safetensors file, or of one row of it, without mapping the file."""
    length = int.from_bytes(_exactly(file, 0, 8), "little")
    entry = json.loads(_exactly(file, 8, length))[name]
    start, end = entry["data_offsets"]
    if row is not None:
        size = (end - start) // entry["shape"][0]
        start, end = start + row * size, start + (row + 1) * size
    return _exactly(file, 8 + length + start, end - start)


def _exactly(file: BinaryIO, start: int, size: int) -> bytearray:
    if not 0 <= start <= start + size <= os.fstat(file.fileno()).st_size:
        raise ValueError("it ends too soon")
    file.seek(start)
    return bytearray(file.read(size))
