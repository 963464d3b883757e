"""Convert trees to Flower's records and back; names, dtypes, shapes and sizes are checked before a tensor is made."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees

_MAGIC = np.lib.format.magic(1, 0)


class WireError(UsageError):
    """An invalid message, described in one line that names the tensor or field."""


def write_trees(content: RecordDict, kind: str, trees: Mapping[str, Tree]) -> None:
    """Add trees to a message: one record per part, one array per tensor; a part without tensors is not sent."""
    for part, tree in trees.items():
        if len(tree):
            content[f"{kind}/{part}"] = ArrayRecord({n: Array(_values(t.detach())) for n, t in tree.items()})


def read_trees(content: RecordDict, kind: str, like: Trees) -> Trees:
    """Return the trees of one kind in a message, with the names, shapes, dtype and device of `like`.

    Raises:
        WireError: if the trees in the message have other names, dtypes, shapes or sizes.

    Example:
        >>> import torch
        >>> trees, message = {"share": Tree.of({"bias": torch.ones(2)})}, RecordDict()
        >>> write_trees(message, "upload", trees)
        >>> read_trees(message, "upload", trees)["share"]["bias"]
        tensor([1., 1.])
        >>> read_trees(message, "upload", {"share": Tree.of({"bias": torch.ones(3)})})
        Traceback (most recent call last):
        idiolect.flower.protocol.arrays.WireError: upload/share: bias: expected shape (3,), got (2,)
    """
    expected = {f"{kind}/{part}": part for part, tree in like.items() if len(tree)}
    found = [key for key in content.array_records if key.startswith(f"{kind}/")]
    _check_names("parts", kind, list(expected), found)
    read = {part: _read_tree(content.array_records[key], like[part], key) for key, part in expected.items()}
    return {part: read.get(part, tree) for part, tree in like.items()}


def has_tree(content: RecordDict, kind: str, part: str) -> bool:
    """Return whether a message has a tree of this kind for a part."""
    return f"{kind}/{part}" in content.array_records


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _check_names(what: str, where: str, expected: list[str], found: list[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        differences = [
            f"{label} {', '.join(f'{name!r:.80}' for name in names[:4])}"
            for label, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise WireError(f"{where}: the {what} differ: {'; '.join(differences)}")


def _values(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a tensor as an array; NumPy has no bfloat16, so its bits travel as int16, which no other tree has."""
    cpu = tensor.cpu()
    return (cpu.view(torch.int16) if cpu.dtype == torch.bfloat16 else cpu).numpy()


def _read_tree(record: ArrayRecord, like: Tree, where: str) -> Tree:
    dtype = _values(like.flat[:0]).dtype
    _check_names("tensors", where, list(like), list(record))
    shapes = like.layout.shape_of.items()
    values = [_read_values(record[n], dtype, tuple(shape), f"{where}: {n}") for n, shape in shapes]
    flat = torch.from_numpy(np.concatenate([np.frombuffer(array_values, dtype) for array_values in values]))
    return Tree(like.layout, flat.view(like.flat.dtype).to(like.flat.device))


def _read_values(array: Array, dtype: np.dtype[np.generic], shape: tuple[int, ...], where: str) -> memoryview:
    """Return the values of an array as bytes, without a copy; its header is compared and never evaluated."""
    if array.dtype != str(dtype):
        raise WireError(f"{where}: expected {dtype}, got {array.dtype!r:.80}")
    if tuple(array.shape) != shape:
        raise WireError(f"{where}: expected shape {shape}, got {tuple(array.shape)!s:.80}")
    header = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = 10 + int.from_bytes(array.data[8:10], "little")
    if array.data[:8] != _MAGIC or array.data[10:start].strip() != header:
        raise WireError(f"{where}: invalid NumPy header for {dtype} {shape}: {array.data[:99]!r:.150}")
    values, size = memoryview(array.data)[start:], dtype.itemsize * prod(shape)
    if len(values) != size:
        raise WireError(f"{where}: expected {size:,} bytes of values, got {len(values):,}")
    return values
