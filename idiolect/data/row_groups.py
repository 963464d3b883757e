"""Examples in Parquet files, of which one row group at a time is in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.nest import Nest, joined
from idiolect.data.examples import LazyExamples, Transform
from idiolect.data.reading import Arrays

if TYPE_CHECKING:
    import pyarrow as pa


@called
def parquet(path: str | Path, label: str = "label", client: str | None = None) -> dict[str, LazyExamples]:
    """Return the examples of each client in Parquet files, which are read in row groups when batches are needed.

    A file has one row per example: the label, a number, and in all other columns the features. If these are numbers,
    inputs are one vector of them, float32. If there is a column of lists, inputs are a dict of columns; the lists of
    one column have one length, and may hold lists. In each epoch the row groups are shuffled, and the rows of each:
    files whose row groups are sorted by label give batches of one label.

    Args:
        path: a file, or a folder of files with the ending ``.parquet``.
        label: name of the column of labels.
        client: name of the column of clients; None: each file is a client with the file's name.

    Returns:
        Client to its examples, in the order in which they are found; give them to `ClientData`.

    Raises:
        UsageError: if a file is missing or cannot be read, a column is missing or holds no numbers, a value is
            missing, or columns differ between files.

    Example:
        >>> import tempfile, polars, torch, idiolect
        >>> file = Path(tempfile.mkdtemp()) / "wards.parquet"
        >>> table = polars.DataFrame({"age": [61, 38, 50], "ward": ["n", "s", "n"], "label": [1, 0, 0]})
        >>> table.write_parquet(file, row_group_size=2)
        >>> wards = parquet(file, client="ward")
        >>> idiolect.ClientData(train=wards["n"])
        ClientData(train=2 examples, read from rowgroups)
        >>> wards["n"].take(torch.tensor([1]))
        (tensor([[50.]]), tensor([0]))
    """
    folder = Path(path)
    paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    if not paths or not paths[0].is_file():
        raise UsageError(f"there is no {'.parquet file in' if folder.is_dir() else 'file'} {path}; check the path")
    files = [_File(each, label, client) for each in paths]
    if odd := next((f for f in files if f.features != files[0].features), None):
        raise UsageError(f"{odd.path}: columns {odd.features}, but {files[0].path}: {files[0].features}")
    blocks: dict[str, list[_Block]] = {}
    for file in files:
        for group in range(file.groups):
            for name, rows in file.clients(group):
                blocks.setdefault(name, []).append(_Block(file, group, rows))
    return {name: LazyExamples(RowGroups(own)) for name, own in blocks.items()}


class _File:
    """A Parquet file. The row group that was read last is kept, for all clients."""

    def __init__(self, path: Path, label: str, client: str | None) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UsageError("reading row groups needs pyarrow: pip install 'idiolect[data]'") from None
        self.path, self._label, self._client = path, label, client
        try:
            self._reader = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as problem:
            raise UsageError(f"cannot read {path}: {str(problem).splitlines()[0]}") from problem
        names = self._reader.schema_arrow.names
        for column in (label, client):
            if column is not None and column not in names:
                close = did_you_mean(column, names)
                raise UsageError(f"{path}: no column {column!r}{close}; columns: {', '.join(names)}")
        self.features = [name for name in names if name not in (label, client)]
        if not self.features:
            raise UsageError(f"{path}: no columns of features")
        self.groups = self._reader.num_row_groups
        self._lock, self._last = threading.Lock(), (-1, Arrays((), ()))

    def clients(self, group: int) -> list[tuple[str, NDArray[np.int64]]]:
        """Return the clients that have rows in a group, and these rows."""
        if self._client is None:
            return [(self.path.stem, np.arange(self._reader.metadata.row_group(group).num_rows))]
        column = self._reader.read_row_group(group, [self._client], use_threads=False)[self._client]
        if column.null_count:
            raise UsageError(f"{self.path}: column {self._client!r} has no value in a row of row group {group}")
        names, first, places = np.unique(
            np.array([str(name) for name in column.to_pylist()]), return_index=True, return_inverse=True
        )
        return [(str(names[k]), np.flatnonzero(places == k)) for k in np.argsort(first)]

    def read(self, group: int) -> Arrays:
        """Return the examples of a row group."""
        with self._lock:
            if self._last[0] != group:
                table = self._reader.read_row_group(group, [*self.features, self._label], use_threads=False)
                columns = {name: self._numbers(table[name], name, group) for name in table.column_names}
                y = columns.pop(self._label)
                plain = all(column.ndim == 1 for column in columns.values())
                vectors = np.stack([*columns.values()], axis=1, dtype=np.float32, casting="unsafe") if plain else None
                self._last = group, Arrays(columns if vectors is None else vectors, y)
            return self._last[1]

    def _numbers(self, column: pa.ChunkedArray, name: str, group: int) -> NDArray[Any]:
        """Return a column as an array, ``(n, ...)``."""
        import pyarrow as pa

        where, kinds = f"{self.path}: column {name!r}, row group {group}", pa.types
        values, shape = column.combine_chunks(), [len(column)]
        lists, numbers = (
            (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list),
            (kinds.is_integer, kinds.is_floating, kinds.is_boolean),
        )
        while any(kind(values.type) for kind in lists):
            if values.null_count:
                raise UsageError(f"{where}: a value is missing; fill it in or drop the row")
            lengths = set(values.value_lengths().to_pylist())
            if len(lengths) != 1:
                raise UsageError(f"{where}: lists of {min(lengths)} to {max(lengths)} values; give them one length")
            shape.append(lengths.pop())
            values = values.flatten()
        if values.null_count:
            raise UsageError(f"{where}: a value is missing; fill it in or drop the row")
        if not any(kind(values.type) for kind in numbers):
            raise UsageError(f"{where}: {values.type} is no number; encode it or drop the column")
        array: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
        return array


class _Block(NamedTuple):
    """A client's rows in one row group of a file."""

    file: _File
    group: int
    rows: NDArray[np.int64]


class RowGroups:
    """The examples of a client in row groups of Parquet files.

    Args:
        blocks: its rows in each of them.
    """

    draws = False
    ordered = False

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self._own, self.blocks = blocks, [len(block.rows) for block in blocks]
        self._ends = np.cumsum(self.blocks)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int], transform: Transform | None) -> tuple[Nest, Nest]:
        """See `Source`."""
        pieces = []
        for which, run in groupby(rows, lambda row: int(np.searchsorted(self._ends, row, "right"))):
            block, start = self._own[which], int(self._ends[which]) - self.blocks[which]
            places = block.rows[[row - start for row in run]]
            pieces.append(block.file.read(block.group).read(places, transform))
        return pieces[0] if len(pieces) == 1 else joined(pieces, torch.cat)
