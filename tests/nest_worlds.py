"""Models with several inputs and outputs, and clients for them; used by the tests of nests and of lazy data."""

import torch
from torch import nn
from torch.nn import functional as F

from idiolect import ClientData, Machine, Output, Training, fit

SIZES = {"ada": 11, "ben": 7, "cleo": 4}
ENGINES = ("sequential", "threads", "processes", "stacked")


class TwoBranches(nn.Module):
    """A network for an image-like row and a number; it returns a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.out = nn.Linear(10, 3)
        self.wide, self.norm, self.narrow = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(1, 4)
        self.double()

    def forward(self, row, number):
        features = torch.cat([torch.relu(self.norm(self.wide(row))), torch.tanh(self.narrow(number))], dim=1)
        return {"logits": self.out(features), "features": features}


def loss_of(outputs, target):
    return F.cross_entropy(outputs["logits"], target) + 0.01 * outputs["features"].square().mean()


def rows(client, count=None):
    """Return the two inputs and the labels of a client."""
    stream = torch.Generator().manual_seed(sorted(SIZES).index(client) + 40)
    count = count or SIZES[client]
    row = torch.randn(count, 4, generator=stream, dtype=torch.float64)
    number = torch.rand(count, 1, generator=stream, dtype=torch.float64)
    return row, number, torch.randint(0, 3, (count,), generator=stream)


def clients(form=dict):
    """Return clients whose inputs are a dict or a tuple."""
    found = {}
    for client in SIZES:
        row, number, y = rows(client)
        x = {"row": row, "number": number} if form is dict else (row, number)
        found[client] = ClientData(train=(x, y), test=(x, y))
    return found


def run(model, data, method, engine="sequential", rounds=3, loss=F.cross_entropy, **more):
    training = more.pop("training", Training(lr=0.1, batch_size=4, local_epochs=2))
    machine = Machine(engine=engine)
    return fit(
        model, data, method, rounds=rounds, training=training, loss=loss, machine=machine, output=Output(), **more
    )


def personal(done):
    """Return the personal tensors of all clients as one row."""
    return torch.cat([done.federation.personal(client).flat for client in sorted(done.federation.clients)])
