"""The clients of a run as the coordinator knows them; they are part of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idiolect.core.tree import Tree
from idiolect.core.types import Trees


@dataclass
class Client:
    """One client."""

    examples: int
    base_round: int = 0
    """The last round in which its result counted; its next round starts from its state after it."""
    messages: Trees = field(default_factory=dict)
    """Trees that the server sends to this client alone with the next instruction, by part."""


class Clients:
    """The clients of a run by name; a store that a checkpoint saves and loads.

    Args:
        message_layouts: for each part that sends messages to single clients, a tree with the layout of a message.

    Example:
        >>> clients = Clients({})
        >>> clients["ward-a"] = Client(120, base_round=3)
        >>> restored = Clients({})
        >>> restored.load(clients.save())
        >>> list(restored), restored["ward-a"].base_round
        (['ward-a'], 3)
    """

    def __init__(self, message_layouts: Trees) -> None:
        self._message_layouts = message_layouts
        self._clients: dict[str, Client] = {}

    def __setitem__(self, name: str, client: Client) -> None:
        self._clients[name] = client

    def __getitem__(self, name: str) -> Client:
        return self._clients[name]

    def __contains__(self, name: str) -> bool:
        return name in self._clients

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the clients, sorted."""
        return iter(sorted(self._clients))

    def __len__(self) -> int:
        return len(self._clients)

    def save(self) -> dict[str, Tensor]:
        """Return all clients as tensors: ``clients`` holds JSON, and each message is a row of its own."""
        table = {name: [c.examples, c.base_round, sorted(c.messages)] for name, c in self._clients.items()}
        text = bytearray(json.dumps(table).encode())
        rows = {f"messages/{name}/{p}": t.flat for name, c in self._clients.items() for p, t in c.messages.items()}
        return {"clients": torch.frombuffer(text, dtype=torch.uint8), **rows}

    def saved(self) -> None:
        """Do nothing after a checkpoint: no files depend on it."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `save` returned; an empty mapping removes all clients."""
        table = json.loads(tensors["clients"].numpy().tobytes()) if tensors else {}
        self._clients = {}
        for name, (examples, base_round, parts) in table.items():
            rows = {p: tensors[f"messages/{name}/{p}"] for p in parts}
            messages = {p: Tree(self._message_layouts[p].layout, row) for p, row in rows.items()}
            self._clients[name] = Client(examples, base_round, messages)
