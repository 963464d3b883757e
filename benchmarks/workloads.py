"""What is trained: networks, synthetic data and settings, the same for every contestant."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

CLIP = 10.0
"""Largest norm of a gradient under FedFSA, before the ascent and after."""
RHO, RHO_LARGER, TOP, ALPHA = 0.1, 0.2, 2, 0.1
"""FedFSA's settings for Fashion-MNIST."""


@dataclass(frozen=True)
class Workload:
    """Settings of a round; every client has the same number of examples, so all means are uniform."""

    name: str
    shape: tuple[int, ...]
    classes: int
    clients: int
    examples: int
    per_round: int
    epochs: int
    batch: int
    lr: float

    @property
    def steps_per_client(self) -> int:
        return self.epochs * -(-self.examples // self.batch)

    @property
    def steps_per_round(self) -> int:
        return self.per_round * self.steps_per_client

    @property
    def batch_norm(self) -> bool:
        return len(self.shape) == 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload("w1", (1, 28, 28), 10, clients=100, examples=420, per_round=10, epochs=10, batch=48, lr=0.1),
        Workload("w2", (1, 28, 28), 10, clients=100, examples=60, per_round=100, epochs=1, batch=10, lr=0.1),
        Workload("bn", (561,), 6, clients=30, examples=288, per_round=30, epochs=5, batch=32, lr=0.01),
        Workload("w1all", (1, 28, 28), 10, clients=100, examples=420, per_round=100, epochs=10, batch=48, lr=0.1),
        Workload("bn1000", (561,), 6, clients=1000, examples=288, per_round=1000, epochs=5, batch=32, lr=0.01),
        Workload("tiny", (20,), 3, clients=4, examples=22, per_round=4, epochs=2, batch=8, lr=0.01),
    )
}


def network(work: Workload) -> nn.Sequential:
    """Return the network with the same initial weights in every process."""
    torch.manual_seed(0)
    if work.batch_norm:
        wide = work.shape[0]
        return nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(wide, 100), bn1=nn.BatchNorm1d(100), relu1=nn.ReLU(), fc3=nn.Linear(100, work.classes)
            )
        )
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 4, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 12, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
            fc1=nn.Linear(192, 1024), relu3=nn.ReLU(), fc2=nn.Linear(1024, 1024), relu4=nn.ReLU(),
            fc3=nn.Linear(1024, work.classes),
        )
    )  # fmt: skip


def normalization(net: nn.Module) -> set[str]:
    """Return the names of all tensors of batch normalization."""
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.BatchNorm1d)]
    return {f"{name}.{own}" for name, layer in layers for own in layer.state_dict()}


def examples(work: Workload) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return features ``(clients, examples, ...)`` and labels: noisy copies of one template per class."""
    rng = np.random.default_rng(0)
    templates = rng.normal(scale=0.5, size=(work.classes, *work.shape)).astype(np.float32)
    y = rng.integers(0, work.classes, (work.clients, work.examples))
    x = templates[y]
    x += rng.normal(scale=0.35, size=x.shape).astype(np.float32)
    return np.clip(x, -1, 1), y
