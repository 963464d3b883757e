"""A run on disk: settings (config.json), records of rounds (metrics.jsonl), and tensors with checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from idiolect.core.errors import UsageError, writing

_FORMAT = "idiolect run 1"
CONFIG, _METRICS = "config.json", "metrics.jsonl"

LOCK = "lock"
"""The file that the only process that may write a run has locked; it may exist before the run does."""


class RunDirectory:
    """The directory of one run. It is created if it does not exist, and holds no other files and no other run.

    Files: `config.json`, `metrics.jsonl` (one JSON line per round, written after each) and `NAME.safetensors`.

    Args:
        path: the directory.
        resume: continue the run in the directory.

    Raises:
        UsageError: if the directory is not empty (and no run to be resumed), or has no run to resume.

    Example:
        >>> import tempfile
        >>> run = RunDirectory(Path(tempfile.mkdtemp()) / "fedbn")
        >>> run.write_config({"method": "FedBN", "seed": 0})
        >>> run.append({"round": 1, "train_loss": float("nan")})
        >>> run.save_tensors("server", {"fc.weight": torch.ones(2)})
        >>> run.load_tensors("server")
        {'fc.weight': tensor([1., 1.])}
        >>> config, records = read_run(run.path)
        >>> config["config"]["method"], records
        ('FedBN', [{'round': 1, 'train_loss': None}])
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: give a directory for the run")
        ours = holds_run(self.path)
        if resume:
            if not ours:
                raise UsageError(f"{self.path} holds no run to resume: it has no {CONFIG}")
            _read_config(self.path)
        elif ours:
            raise UsageError(f"{self.path} already holds a run: resume it, or choose another directory")
        elif self.path.exists() and any(file.name not in (LOCK, f".{CONFIG}.tmp") for file in self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and holds no run of idiolect: choose another directory")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if resume:
            self.rewind(math.inf)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json: the resolved config, the seed, versions and platform of this run."""
        card = {
            "format": _FORMAT,
            "config": config,
            "seed": config.get("seed"),
            "versions": {
                "idiolect": _own_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "platform": platform.platform(),
        }
        write_whole(self.path / CONFIG, (as_json(card, indent=2) + "\n").encode())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one round to metrics.jsonl and flush the file; NaN and infinities are written as null."""
        line, file = as_json(record) + "\n", self.path / _METRICS
        try:
            with file.open("a", encoding="ascii") as metrics:
                metrics.write(line)
        except OSError as error:
            raise UsageError(
                f"cannot add a line to {file} ({error.strerror or error}): make room, then resume"
            ) from None

    def put(self, record: Mapping[str, Any]) -> None:
        """Write one round to metrics.jsonl in place of its record there, atomically and durably."""
        records = {r["round"]: r for r in _read_metrics(self.path)} | {record["round"]: record}
        lines = (as_json(records[number]) + "\n" for number in sorted(records))
        write_whole(self.path / _METRICS, "".join(lines).encode())

    def rewind(self, last_round: float) -> None:
        """Remove the rounds after `last_round` (such as that of the checkpoint), which a resumed run plays again."""
        records = [r for r in _read_metrics(self.path) if r["round"] <= last_round]
        write_whole(self.path / _METRICS, "".join(as_json(r) + "\n" for r in records).encode())

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `NAME.safetensors` atomically; see `write_tensors`."""
        write_tensors(self._tensor_file(name), tensors)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that `save_tensors` wrote, on the CPU.

        Raises:
            UsageError: if the file is missing, truncated or altered.
        """
        path = self._tensor_file(name)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: nothing was saved as {name!r} in this run")
        return read_tensors(path)[0]

    def _tensor_file(self, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UsageError(f"{name!r} cannot name a file of tensors: use letters, digits, '_', '-' and '.'")
        return self.path / f"{name}.safetensors"


def holds_run(path: str | Path) -> bool:
    """Return whether a run was started in a directory."""
    return (Path(path) / CONFIG).is_file()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None, mode: int = 0o666
) -> None:
    """Write a safetensors file atomically, with metadata `about` it and file permissions `mode`.

    The SHA-256 over metadata, names, types, shapes and bytes is stored in the file and compared when it is read.
    """
    own = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    words = dict(about or {})
    write_whole(path, save(own, metadata={**words, "sha256": _digest(own, words)}), mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and its metadata.

    Raises:
        UsageError: if the file is missing, truncated or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            words = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is truncated or damaged, use an older copy: {error}") from None
    expected = words.pop("sha256", None)
    if _digest(tensors, words) != expected:
        raise UsageError(f"{path} was altered after it was written (SHA-256 differs): use an older copy")
    return tensors, words


def read_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return all of config.json (the resolved config is under "config"), and one record per round.

    An incomplete last line of metrics.jsonl (the process was killed while writing) is left out with a warning.

    Raises:
        UsageError: if this is no run directory, or if a file of it is damaged.
    """
    return _read_config(Path(path)), _read_metrics(Path(path))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{path} is no run directory: it has no {CONFIG}")
    try:
        card = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise UsageError(f'{file} was not written by this version of idiolect: expected "format": "{_FORMAT}"')
    return card


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    file = path / _METRICS
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    records = []
    for number, line in numbered:
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "round" not in record:
                raise ValueError("not the record of a round")
        except ValueError as error:
            if number != numbered[-1][0]:
                raise UsageError(f"line {number} of {file} is damaged: {error}") from None
            warnings.warn(f"left out the torn last line {number} of {file}", stacklevel=3)
        else:
            records.append(record)
    return records


def as_json(value: object, indent: int | None = None) -> str:
    """Return standard JSON: NaN and infinities become null, scalars of NumPy and torch become numbers."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: object) -> object:
    """Return a value as plain JSON values; scalars of NumPy and torch become numbers, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise UsageError(f"cannot write a {type(value).__name__} as JSON: give numbers, text, lists and mappings")


def _digest(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode() if words else b"")
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file atomically and durably (it survives a power failure), with file permissions `mode`.

    Raises:
        UsageError: if it cannot be written, such as on a full disk; the old file then stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {len(content):,} bytes to {path} ({error.strerror or error}): make room, then resume; "
            "what was written before is intact"
        ) from None


def _own_version() -> str:
    try:
        return metadata.version("idiolect")
    except metadata.PackageNotFoundError:
        return "not installed"
