"""A federation's state as named tensors, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.run_directory import RunDirectory, read_run

_NAME, _MEMORY = "checkpoint", "memory/"


class Remembered(Protocol):
    """What is known of clients, as the stores of memories are."""

    def save(self) -> dict[str, Tensor]:
        """Return what `load` needs."""
        ...

    def saved(self) -> None:
        """Take note that the last `save` is on disk."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `save` returned; an empty mapping is the start."""
        ...


class Kept(Protocol):
    """A server that can be stopped and go on: what `save` writes of it."""

    round: int
    server: Trees

    @property
    def model(self) -> Model:
        """Its model."""
        ...

    @property
    def memory(self) -> Remembered:
        """What is known of its clients."""
        ...


def save(store: RunDirectory, center: Kept) -> None:
    """Write round, server slots and what the store of memories needs as one file, whole or not at all."""
    tensors = {"round": torch.tensor(center.round)}
    for part, tree in center.server.items():
        tensors |= {f"server/{part}/{name}": t for name, t in tree.items()}
    tensors |= {f"{_MEMORY}{name}": t for name, t in center.memory.save().items()}
    store.save_tensors(_NAME, tensors)
    center.memory.saved()


def restore(store: RunDirectory, center: Kept, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load a federation's state; return the records of the rounds it has played.

    Raises:
        UsageError: if the run was started with other settings, or its file is damaged.
    """
    known = read_run(store.path)[0]["config"]
    asked = json.loads(json.dumps(config, default=str))
    differ = [f"{k} was {known.get(k)!r}, is {v!r}" for k, v in asked.items() if known.get(k) != v]
    if differ:
        settings = "; ".join(differ)
        raise UsageError(
            f"{store.path} was started with other settings: {settings}; give another run another directory"
        )
    if not (store.path / f"{_NAME}.safetensors").exists():
        center.memory.load({})
        store.rewind(0)
        return []
    tensors = store.load_tensors(_NAME)
    device = center.model.device
    center.server = {p: _tree(t, tensors, f"server/{p}", device) for p, t in center.server.items()}
    center.memory.load({k.removeprefix(_MEMORY): t for k, t in tensors.items() if k.startswith(_MEMORY)})
    center.round = int(tensors["round"])
    store.rewind(center.round)
    return read_run(store.path)[1]


def _tree(like: Tree, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tree:
    rows = [tensors[f"{prefix}/{name}"].reshape(-1) for name in like]
    return Tree(like.layout, torch.cat(rows).to(device)) if rows else like
