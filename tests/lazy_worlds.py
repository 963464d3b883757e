"""Data sets that are read when a batch is needed, and the engines that must read the same."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import idiolect
from idiolect import Machine, Training, methods
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads

SIZES = {"ada": 14, "ben": 5, "cleo": 9}
ENGINES = [Sequential(), *(kind(n) for kind in (Threads, Processes) for n in (1, 2, 3)), Stacked(2), Stacked(3)]


def rows(client, count=None):
    generator = torch.Generator().manual_seed(sum(map(ord, client)))
    x = torch.randn(count or SIZES[client], 4, generator=generator, dtype=torch.float64)
    return x, (x.sum(dim=1) > 0).long()


class Augmented(Dataset):
    """Adds noise of three libraries to an example each time it is read."""

    def __init__(self, client):
        self.x, self.y = rows(client)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, k):
        noise = torch.randn(4, dtype=torch.float64) + np.random.normal() + random.gauss(0, 1)  # noqa: NPY002
        return self.x[k] + 0.1 * noise, int(self.y[k])


class Passing(IterableDataset):
    """Gives its examples in an order of its own, with noise; has no length."""

    def __init__(self, client, noise=0.1):
        self.x, self.y = rows(client)
        self.noise = noise

    def __iter__(self):
        for x, y in zip(self.x, self.y, strict=True):
            yield x + self.noise * torch.randn(4, dtype=torch.float64), y


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 2)).double()


def run(clients, engine="sequential", module=None, method=None, rounds=2, seed=0, **more):
    training = Training(lr=0.1, batch_size=4, local_epochs=2)
    machine = Machine(engine=engine, device="cpu")
    method = method or methods.fedper()
    return idiolect.fit(
        module or net(), clients, method, rounds=rounds, training=training, seed=seed, machine=machine, **more
    )


def personal(done):
    """Return all that clients predict with as one row."""
    return torch.cat([done.federation.personal(client).flat for client in sorted(done.federation.clients)])


def assert_engines_agree(make, engines=ENGINES, rounding=1e-12, **more):
    """Every engine reads and trains the same: to the last bit, in stacks to rounding."""
    expected = run(make(), engines[0], **more)
    for engine in engines[1:]:
        found = personal(run(make(), engine, **more))
        tolerance = rounding if "stack" in str(engine) else 0
        assert torch.allclose(found, personal(expected), rtol=0, atol=tolerance), engine
    return expected
