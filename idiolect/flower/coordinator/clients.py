"""The clients of a run as the coordinator knows them; they are part of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Client:
    """One client."""

    examples: int
    base_round: int = 0
    """The last round in which its result counted; its next round starts from its state after it."""


class Clients:
    """The clients of a run by name; a store that a checkpoint saves and loads.

    Example:
        >>> clients = Clients()
        >>> clients["ward-a"] = Client(120, base_round=3)
        >>> restored = Clients()
        >>> restored.load(clients.save())
        >>> list(restored), restored["ward-a"].base_round
        (['ward-a'], 3)
    """

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}

    def population(self) -> list[str]:
        """Return the names in the order of their places, which a client keeps for the whole run."""
        return list(self._clients)

    def sort(self) -> None:
        """Give the clients their places by name, as in a simulation: before the first round."""
        self._clients = dict(sorted(self._clients.items()))

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
        """Return all clients as a tensor that holds JSON, in the order of their places."""
        table = {name: [c.examples, c.base_round] for name, c in self._clients.items()}
        text = bytearray(json.dumps(table).encode())
        return {"clients": torch.frombuffer(text, dtype=torch.uint8)}

    def saved(self) -> None:
        """Do nothing after a checkpoint: no files depend on it."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `save` returned; an empty mapping removes all clients."""
        table = json.loads(tensors["clients"].numpy().tobytes()) if tensors else {}
        self._clients = {name: Client(examples, base_round) for name, (examples, base_round) in table.items()}
