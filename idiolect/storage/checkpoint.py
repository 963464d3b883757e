"""Checkpoints: a federation's state as named tensors, so that a resumed run ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.run_directory import RunDirectory, read_run, read_tensors

_NAME, _MEMORY, _ROWS = "checkpoint", "memory/", "rows/"


class Remembered(Protocol):
    """State of clients that a checkpoint includes, such as a store of memories."""

    def save(self) -> dict[str, Tensor]:
        """Return the tensors that `load` needs."""
        ...

    def saved(self) -> None:
        """Note that the result of the last `save` is on disk."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `save` returned; an empty mapping is the initial state."""
        ...


class Kept(Protocol):
    """A server whose state can be saved and restored."""

    round: int
    server: Trees

    @property
    def model(self) -> Model:
        """The model."""
        ...

    @property
    def memory(self) -> Remembered:
        """The memories of its clients."""
        ...

    @property
    def rows(self) -> Remembered | None:
        """The server's rows of its clients, if the method has rows."""
        ...


def save(store: RunDirectory, state: Kept) -> None:
    """Write round, server state and the state of the stores as one file, atomically."""
    tensors = {"round": torch.tensor(state.round)}
    for part, tree in state.server.items():
        tensors |= {f"server/{part}/{name}": t for name, t in tree.items()}
    for prefix, kept in _stores(state).items():
        tensors |= {f"{prefix}{name}": t for name, t in kept.save().items()}
    store.save_tensors(_NAME, tensors)
    for kept in _stores(state).values():
        kept.saved()


def restore(store: RunDirectory, state: Kept, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load a server's state to go on with the run; return the records of the rounds that it has played.

    Raises:
        UsageError: if the run was started with other settings, or its file is damaged.
    """
    load(store.path, state, config)
    store.rewind(state.round)
    return read_run(store.path)[1]


def load(path: Path, state: Kept, config: Mapping[str, Any]) -> None:
    """Load a server's state from the directory of its run; nothing is written.

    Raises:
        UsageError: if the run was started with other settings, or its file is damaged.
    """
    known = read_run(path)[0]["config"]
    asked = json.loads(json.dumps(config, default=str))
    differ = list(_differences("", known, asked))
    if differ:
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise UsageError(
            f"{path} was started with other settings: {'; '.join(differ[:4])}{more}; give another run another directory"
        )
    file = path / f"{_NAME}.safetensors"
    if not file.exists():
        for kept in _stores(state).values():
            kept.load({})
        return
    tensors = read_tensors(file)[0]
    device = state.model.device
    state.server = {p: _tree(t, tensors, f"server/{p}", device) for p, t in state.server.items()}
    for prefix, kept in _stores(state).items():
        kept.load({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    state.round = int(tensors["round"])


def _differences(where: str, known: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Yield each setting that differs, by its place: ``data a train``."""
    for key, value in asked.items():
        before, here = known.get(key), f"{where}{key}"
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from (f"{here} {name} was there" for name in before if name not in value)
            yield from _differences(f"{here} ", before, value)
        elif before != value:
            yield f"{here} was {before!r}, is {value!r}"


def _stores(state: Kept) -> dict[str, Remembered]:
    """Return the stores of a server, by the prefix of their tensors in a checkpoint."""
    return {_MEMORY: state.memory} | ({_ROWS: state.rows} if state.rows is not None else {})


def _tree(like: Tree, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tree:
    rows = [tensors[f"{prefix}/{name}"].reshape(-1) for name in like]
    return Tree(like.layout, torch.cat(rows).to(device)) if rows else like
