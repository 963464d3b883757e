"""Trees as Flower's records and back: nothing is taken from a message whose form is not known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees

_MAGIC = np.lib.format.magic(1, 0)


class WireError(UsageError):
    """What is wrong with a message, in one line that names the tensor."""


def put(content: RecordDict, kind: str, slots: Mapping[str, Tree]) -> None:
    """Add trees to a message: one record a part, one array a tensor; a part without tensors is not sent."""
    for part, tree in slots.items():
        if len(tree):
            content[f"{kind}/{part}"] = ArrayRecord({n: Array(t.detach().cpu().numpy()) for n, t in tree.items()})


def take(content: RecordDict, kind: str, like: Trees) -> Trees:
    """Return the trees of a message, in the form of `like`: its names, shapes, dtype and device.

    Names, dtypes, shapes and sizes in bytes are compared before a tensor is made.

    Raises:
        WireError: if the message holds anything else.

    Example:
        >>> import torch
        >>> sent, message = {"share": Tree.of({"bias": torch.ones(2)})}, RecordDict()
        >>> put(message, "slot", sent)
        >>> take(message, "slot", sent)["share"]["bias"]
        tensor([1., 1.])
        >>> take(message, "slot", {"share": Tree.of({"bias": torch.ones(3)})})
        Traceback (most recent call last):
        idiolect.flower.protocol.arrays.WireError: slot/share: bias: expected shape (3,), got (2,)
    """
    wanted = {f"{kind}/{part}": part for part, tree in like.items() if len(tree)}
    found = [key for key in content.array_records if key.startswith(f"{kind}/")]
    _same("parts", kind, list(wanted), found)
    taken = {part: _tree(content.array_records[key], like[part], key) for key, part in wanted.items()}
    return {part: taken.get(part, tree) for part, tree in like.items()}


def holds(content: RecordDict, kind: str, part: str) -> bool:
    """Return whether a message has a part's tree of a kind."""
    return f"{kind}/{part}" in content.array_records


def nbytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _same(what: str, where: str, wanted: list[str], found: list[str]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        said = [
            f"{word} {', '.join(f'{name!r:.80}' for name in names[:4])}"
            for word, names in (("without", missing), ("with", extra))
            if names
        ]
        raise WireError(f"{where}: the {what} differ: {' and '.join(said)}")


def _tree(record: ArrayRecord, like: Tree, where: str) -> Tree:
    dtype = like.flat.cpu().numpy().dtype
    _same("tensors", where, list(like), list(record))
    bodies = [_body(record[n], dtype, tuple(shape), f"{where}: {n}") for n, shape in like.layout.shape_of.items()]
    flat = np.concatenate([np.frombuffer(body, dtype) for body in bodies])
    return Tree(like.layout, like.flat.new_tensor(flat))


def _body(array: Array, dtype: np.dtype[np.generic], shape: tuple[int, ...], where: str) -> memoryview:
    """Return the values of an array as bytes, without a copy; its header is compared, and never evaluated."""
    if array.dtype != str(dtype):
        raise WireError(f"{where}: expected {dtype}, got {array.dtype!r:.80}")
    if tuple(array.shape) != shape:
        raise WireError(f"{where}: expected shape {shape}, got {tuple(array.shape)!s:.80}")
    header = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = 10 + int.from_bytes(array.data[8:10], "little")
    if array.data[:8] != _MAGIC or array.data[10:start].strip() != header:
        raise WireError(f"{where}: its bytes are not what NumPy writes of {dtype} {shape}: {array.data[:99]!r:.150}")
    body, size = memoryview(array.data)[start:], dtype.itemsize * prod(shape)
    if len(body) != size:
        raise WireError(f"{where}: its bytes hold {len(body):,} bytes of values, not {size:,}")
    return body
