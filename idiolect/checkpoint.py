"""A federation's state as named tensors, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from idiolect.engine.federation import Federation
from idiolect.errors import UsageError
from idiolect.report import RunDirectory, read_run
from idiolect.tree import Tree

_NAME, _MEMORY = "checkpoint", "memory/"


def save(store: RunDirectory, federation: Federation) -> None:
    """Write round, server slots and what the store of memories needs as one file, whole or not at all."""
    tensors = {"round": torch.tensor(federation.round)}
    for part, tree in federation.server.items():
        tensors |= {f"server/{part}/{name}": t for name, t in tree.items()}
    tensors |= {f"{_MEMORY}{name}": t for name, t in federation.memory.save().items()}
    store.save_tensors(_NAME, tensors)
    federation.memory.saved()


def restore(store: RunDirectory, federation: Federation, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load a federation's state; return the records of the rounds it has played.

    Raises:
        UsageError: if the run was started with other settings, or its file is damaged.
    """
    known = read_run(store.path)[0]["config"]
    asked = json.loads(json.dumps(config, default=str))
    differ = [f"{k} was {known.get(k)!r}, is {v!r}" for k, v in asked.items() if known.get(k) != v]
    if differ:
        raise UsageError(f"{store.path} was started with other settings: {'; '.join(differ)}")
    if not (store.path / f"{_NAME}.safetensors").exists():
        federation.memory.load({})
        store.rewind(0)
        return []
    tensors = store.load_tensors(_NAME)
    device = federation.model.device
    federation.server = {p: _tree(t, tensors, f"server/{p}", device) for p, t in federation.server.items()}
    federation.memory.load({k.removeprefix(_MEMORY): t for k, t in tensors.items() if k.startswith(_MEMORY)})
    federation.round = int(tensors["round"])
    store.rewind(federation.round)
    return read_run(store.path)[1]


def _tree(like: Tree, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tree:
    rows = [tensors[f"{prefix}/{name}"].reshape(-1) for name in like]
    return Tree(like.layout, torch.cat(rows).to(device)) if rows else like
