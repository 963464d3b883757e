"""Data sets of the Hugging Face hub; needs the extra ``idiolect[data]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idiolect.core.errors import UsageError, did_you_mean
from idiolect.data.archives import to_images
from idiolect.data.pool import Pool
from idiolect.data.tables import from_frame

_LABELS = ("label", "labels", "fine_label", "target", "y")
_CLIENTS = ("client", "client_id", "writer_id", "user_id", "domain")


def from_hub(name: str, label: str | None = None, client: str | None = None, unit: str | None = None) -> Pool:
    """Load a data set of images or numbers from the hub, or from a local folder of Parquet files.

    By default the label is the column ``label`` (or ``labels``, ``fine_label``, ``target``, ``y``), else the only
    column of classes; clients come from a column ``client``, ``client_id``, ``writer_id``, ``user_id`` or
    ``domain``. With an image column the images become x, scaled to −1 … 1, and other columns are not read;
    otherwise all other columns are features, which must be numbers. The splits are pooled; ``part`` tells the
    split ``test`` from the others.

    Args:
        name: ``hf:`` and the name on the hub, or the path of a folder.
        label: name of the label column; None: see above.
        client: name of the client column; None: see above.
        unit: name of the column of what is not divided between training and test; None for no such column.

    Raises:
        UsageError: if the extra is not installed, the set cannot be loaded, or its columns are not as above.
    """
    try:
        import datasets
    except ImportError as problem:
        raise UsageError("hf: data sets need the extra: pip install 'idiolect[data]'") from problem
    try:
        splits = datasets.load_dataset(name.removeprefix("hf:"))
    except Exception as problem:  # the library raises network, file and format errors of many kinds
        first = (str(problem) or type(problem).__name__).splitlines()[0]
        hint = "check the name on huggingface.co/datasets and the network; hf: also takes a folder of Parquet files"
        raise UsageError(f"cannot load {name}: {first}; {hint}") from problem
    whole = datasets.concatenate_datasets(list(splits.values()))
    columns = whole.features
    label = label or _label_column(name, columns)
    client = client or next((column for column in _CLIENTS if column in columns), None)
    for column in (label, client, unit):
        if column is not None and column not in columns:
            raise UsageError(
                f"{name}: no column {column!r}{did_you_mean(column, columns)}; columns: {', '.join(columns)}"
            )
    image = next((column for column, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    kept = list(columns) if image is None else [column for column in (label, client, unit) if column]
    frame = whole.select_columns(kept).to_polars()
    if image is not None:
        frame = frame.with_row_index("row")
    pool = from_frame(frame, name, label, client, unit)
    y, classes = pool.y, pool.classes
    if isinstance(columns[label], datasets.ClassLabel):
        y, classes = torch.from_numpy(frame[label].to_numpy().astype(np.int64)), tuple(columns[label].names)
        if int(y.min()) < 0:
            raise UsageError(f"{name}: label {label!r} is hidden (−1) for some examples; use another set")
    part = np.repeat(["test" if split == "test" else "train" for split in splits], list(splits.num_rows.values()))
    x = pool.x if image is None else to_images(_pixels(name, whole[image]))
    return Pool(name, x, y, classes, pool.group, part if "test" in splits else None, pool.unit)


def _label_column(name: str, columns: Mapping[str, Any]) -> str:
    classes = [column for column, kind in columns.items() if type(kind).__name__ == "ClassLabel"]
    named = [column for column in _LABELS if column in columns]
    if named or len(classes) == 1:
        return (named or classes)[0]
    raise UsageError(f"{name}: no label column among {', '.join(columns)}; rename yours to 'label'")


def _pixels(name: str, images: Sequence[Any]) -> NDArray[np.uint8]:
    """Stack images to (n, height, width) if the first is gray, else to (n, height, width, 3)."""
    mode = "L" if images[0].mode in ("1", "L") else "RGB"
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise UsageError(f"{name}: images of different sizes, such as {sorted(sizes)[:2]}; resize them first")
    return np.stack([np.asarray(image.convert(mode)) for image in images])
