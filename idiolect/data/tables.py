"""Your own data from a file: arrays in ``.npz``, or a table in ``.csv`` or ``.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.data.archives import read_npz
from idiolect.data.pool import Pool

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".npz", ".csv", ".parquet")


@called
def read_table(path: str | Path, label: str | None = None, client: str | None = None, unit: str | None = None) -> Pool:
    r"""Read your own examples from a file.

    A ``.csv`` or ``.parquet`` file has one row per example: a label column, a client column if there is one,
    and all other columns are features, which must be numbers. An ``.npz`` file has arrays ``x`` (n, …), the
    labels (n,) and if there are any the clients (n,). 8-bit ``x`` is scaled to −1 … 1 like an image,
    x / 127.5 − 1; images of shape (n, height, width) or (n, height, width, 1 or 3) become (n, channels, height,
    width).
    Labels that are fractional numbers make a regression; text, whole numbers and truth values make classes,
    sorted.

    Args:
        path: the file; its ending says the format.
        label: name of the label column or array; None: ``label``, in an ``.npz`` ``y``.
        client: name of the client column or array; None: ``client`` if there is one.
        unit: name of the column or array of what is not divided between training and test (a patient, a recording),
            for :class:`ByGroup`; None for none. It is no feature.

    Returns:
        A pool whose groups are the clients; split it with :class:`ByClient`.

    Raises:
        UsageError: if the file is missing or cannot be read, a column is missing or holds no numbers, or a
            value is missing; rows are counted from 0.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "wards.csv"
        >>> _ = file.write_text("client,age,label\nnorth,61,ill\nsouth,38,well\n")
        >>> pool = read_table(file)
        >>> pool.x.tolist(), pool.y.tolist(), pool.classes, pool.group.tolist()
        ([[61.0], [38.0]], [0, 1], ('ill', 'well'), ['north', 'south'])
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: cannot tell its format; give a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}; check the path")
    if path.suffix == ".npz":
        return _from_arrays(path, label or "y", client, unit)
    import polars as pl

    try:
        frame = pl.read_csv(path, infer_schema_length=None) if path.suffix == ".csv" else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as problem:
        raise UsageError(f"cannot read {path}: {str(problem).splitlines()[0]}") from problem
    return from_frame(frame, path.stem, label or "label", client, unit)


def from_frame(frame: pl.DataFrame, name: str, label: str, client: str | None = None, unit: str | None = None) -> Pool:
    """Make a pool of a table; see :func:`read_table`."""
    import polars as pl

    client = "client" if client is None and "client" in frame.columns else client
    for column in (label, client, unit):
        if column is not None and column not in frame.columns:
            close = did_you_mean(column, frame.columns)
            raise UsageError(f"{name}: no column {column!r}{close}; columns: {', '.join(frame.columns)}")
    features = frame.drop({column for column in (label, client, unit) if column is not None})
    if not frame.height:
        raise UsageError(f"{name} has a header and no rows; give one row per example")
    if not features.width:
        raise UsageError(
            f"{name} has no feature column beside {', '.join(frame.columns)}; give at least one, of numbers"
        )
    for column, kind in features.schema.items():
        if not (kind.is_numeric() or kind == pl.Boolean):
            raise UsageError(f"{name}: feature column {column!r} is {kind}; make it numbers or drop it")
    for values in frame.get_columns():
        missing = values.is_null() | (values.is_nan() if values.dtype.is_float() else False)
        if missing.any():
            row = missing.arg_true()[0]
            raise UsageError(f"{name}: column {values.name!r} row {row}: no value; fill it in or drop the row")
    y, classes = _labels(_plain(frame[label]), name)
    group, units = (None if c is None else frame[c].cast(pl.String).to_numpy().astype(str) for c in (client, unit))
    x = torch.from_numpy(features.cast(pl.Float32).to_numpy(writable=True))
    return Pool(name, x, y, classes, group, unit=units)


def _plain(column: pl.Series) -> NDArray[Any]:
    import polars as pl

    kind = column.dtype
    if (kind.is_numeric() and not kind.is_decimal()) or kind == pl.Boolean:
        return column.to_numpy()
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return column.cast(pl.String).to_numpy().astype(str)
    raise UsageError(f"label column {column.name!r} is {kind}; give numbers or text")


def _from_arrays(path: Path, label: str, client: str | None, unit: str | None) -> Pool:
    arrays = read_npz(path)
    client = "client" if client is None and "client" in arrays else client
    for needed in ("x", label, client, unit):
        if needed is not None and needed not in arrays:
            held = ", ".join(arrays) or "nothing"
            raise UsageError(f"{path}: no array {needed!r}{did_you_mean(needed, arrays)}; it holds {held}")
    x = arrays["x"]
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise UsageError(f"{path}: x has shape {x.shape} and type {x.dtype}; give numbers, one row per example")
    if x.dtype == np.uint8:
        x = _channels_first(x) / np.float32(127.5) - 1
    elif x.dtype != np.float32:
        x = x.astype(np.float32 if x.dtype.kind in "fb" else np.int64)
    group, units = (None if name is None else arrays[name].astype(str) for name in (client, unit))
    labels, classes = _labels(arrays[label], str(path))
    return Pool(path.stem, torch.from_numpy(x), labels, classes, group, unit=units)


def _channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images as (n, channels, height, width); arrays of other shapes as they are."""
    if pixels.ndim == 3:
        return pixels[:, None]
    last = pixels.ndim == 4 and pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if last else pixels


def _labels(values: NDArray[Any], name: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Number the classes in sorted order, or keep the numbers of a regression."""
    if values.dtype.kind == "f" and values.ndim:
        return torch.from_numpy(values.astype(np.float32)), None
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise UsageError(f"{name}: labels of shape {values.shape} and type {values.dtype}; give one per example")
    classes, y = np.unique(values, return_inverse=True)
    return torch.from_numpy(y.astype(np.int64)), tuple(map(str, classes.tolist()))
