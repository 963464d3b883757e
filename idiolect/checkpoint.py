"""A federation's state as named tensors, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from idiolect.engine.federation import Federation
from idiolect.errors import UsageError
from idiolect.report import RunDirectory, read_run
from idiolect.tree import Tree

_NAME = "checkpoint"


def save(store: RunDirectory, federation: Federation) -> None:
    """Write round, server slots and every client's memory as one file, whole or not at all."""
    tensors = {"round": torch.tensor(federation.round)}
    for part, tree in federation.server.items():
        tensors |= {f"server/{part}/{name}": t for name, t in tree.items()}
    for client in federation.memory:
        tensors[_place(client)] = torch.tensor(1)
        for part, tree in federation.memory.get(client).items():
            tensors |= {f"{_place(client)}/{part}/{name}": t for name, t in tree.items()}
    store.save_tensors(_NAME, tensors)


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
        store.rewind(0)
        return []
    tensors = store.load_tensors(_NAME)
    device = federation.model.device
    federation.server = {p: _tree(t, tensors, f"server/{p}", device) for p, t in federation.server.items()}
    fresh = federation.memory.get("")
    for client in federation.clients:
        if _place(client) in tensors:
            slots = {p: _tree(t, tensors, f"{_place(client)}/{p}", device) for p, t in fresh.items()}
            federation.memory.put(client, slots)
    federation.round = int(tensors["round"])
    store.rewind(federation.round)
    return read_run(store.path)[1]


def _place(client: str) -> str:
    """Return where a client's tensors are, whatever characters its name has."""
    return f"client/{quote(client, safe='')}"


def _tree(like: Tree, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tree:
    rows = [tensors[f"{prefix}/{name}"].reshape(-1) for name in like]
    return Tree(like.layout, torch.cat(rows).to(device)) if rows else like
