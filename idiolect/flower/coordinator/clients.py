"""What a coordinator remembers of its clients, and must find again after a restart."""

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
    """One client, as the coordinator knows it."""

    examples: int
    base: int = 0
    """The round after which its result counted last: it starts from its state of then."""
    mail: Trees = field(default_factory=dict)
    """What it is to be told alone, with its next message, by part."""


class Clients:
    """The clients of a run by name; a store that a checkpoint writes.

    Args:
        letters: the form of what a client may be told alone, by part.

    Example:
        >>> known = Clients({})
        >>> known["ward-a"] = Client(120, base=3)
        >>> other = Clients({})
        >>> other.load(known.save())
        >>> list(other), other["ward-a"].base
        (['ward-a'], 3)
    """

    def __init__(self, letters: Trees) -> None:
        self._letters = letters
        self._clients: dict[str, Client] = {}

    def __setitem__(self, name: str, client: Client) -> None:
        self._clients[name] = client

    def __getitem__(self, name: str) -> Client:
        return self._clients[name]

    def __contains__(self, name: str) -> bool:
        return name in self._clients

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients, sorted by name."""
        return iter(sorted(self._clients))

    def __len__(self) -> int:
        return len(self._clients)

    def save(self) -> dict[str, Tensor]:
        """Return all of it as tensors: ``clients`` as JSON bytes, and a row for each message that waits."""
        table = {name: [c.examples, c.base, sorted(c.mail)] for name, c in self._clients.items()}
        text = bytearray(json.dumps(table).encode())
        rows = {f"mail/{name}/{p}": t.flat for name, c in self._clients.items() for p, t in c.mail.items()}
        return {"clients": torch.frombuffer(text, dtype=torch.uint8), **rows}

    def saved(self) -> None:
        """Nothing waits for a checkpoint."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `save` returned; an empty mapping is the start."""
        table = json.loads(tensors["clients"].numpy().tobytes()) if tensors else {}
        self._clients = {}
        for name, (examples, base, parts) in table.items():
            mail = {p: Tree(self._letters[p].layout, tensors[f"mail/{name}/{p}"]) for p in parts}
            self._clients[name] = Client(examples, base, mail)
