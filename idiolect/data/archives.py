"""Readers of the formats that the named data sets come in; every failure names the file."""

from __future__ import annotations

import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idiolect.core.errors import UsageError

_BROKEN = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def find(data_dir: str | Path | None, relative: str) -> Path:
    """Return the path of a file in the data folder: ``data_dir``, else the variable IDIOLECT_DATA.

    Raises:
        UsageError: if neither is given or the file is not there.
    """
    folder = data_dir or os.environ.get("IDIOLECT_DATA")
    hint = "set --data-dir or the environment variable IDIOLECT_DATA to the folder that holds it"
    if not folder:
        raise UsageError(f"this data set needs the file {relative}; {hint}")
    path = Path(folder).expanduser() / relative
    if not path.is_file():
        raise UsageError(f"there is no file {path}; {hint}")
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that names it."""
    try:
        yield
    except _BROKEN as problem:
        if isinstance(problem, UsageError):
            raise
        raise UsageError(f"cannot read {path}: {problem}") from problem


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of an ``.npz`` file; arrays of Python objects are refused."""
    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzip-compressed idx file of bytes, the format of MNIST."""
    with reading(path):
        raw = gzip.decompress(path.read_bytes())
        if len(raw) < 4 or raw[:3] != b"\0\0\x08":
            raise UsageError(f"cannot read {path}: it is no idx file of bytes")
        rank = raw[3]
        shape = np.frombuffer(raw, ">u4", rank, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_sheet(path: Path, side: int = 32) -> NDArray[np.uint8]:
    """Cut a sheet of square color images into (n, side, side, 3), row by row."""
    from PIL import Image

    with reading(path), Image.open(path) as sheet:
        if sheet.width % side or sheet.height % side:
            raise UsageError(f"cannot read {path}: {sheet.size} pixels are no sheet of {side} x {side} images")
        tiles = np.asarray(sheet.convert("RGB")).reshape(-1, side, sheet.width // side, side, 3)
        return tiles.swapaxes(1, 2).reshape(-1, side, side, 3)


def to_images(pixels: NDArray[np.uint8]) -> Tensor:
    """Scale pixels to float32 in −1 … 1, (x / 255 − 0.5) / 0.5, and put channels first.

    Args:
        pixels: shape (n, height, width) or (n, height, width, 3).

    Returns:
        Images of shape (n, 1 or 3, height, width).

    Example:
        >>> to_images(np.array([[[0, 255]]], np.uint8))
        tensor([[[[-1.,  1.]]]])
    """
    gray = pixels.ndim == 3
    first = pixels[:, None] if gray else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return torch.tensor(first, dtype=torch.float32).div_(255).sub_(0.5).div_(0.5)
