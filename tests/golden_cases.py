"""The two cases the authors' own programs were run on: models, initial weights, images, recorded results.

A test needs ``IDIOLECT_DATA``, the folder of the image sets; without it, it is skipped.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GoldenCase:
    """A federation in float64 in which nothing is random: one batch per client, all clients in every round.

    Attributes:
        model: the initial weights.
        train: images and labels of each client, one batch.
        test: held-out images and labels of each client (none in the FedFSA case).
        settings: rounds, learning rate and the methods' own settings, as in the file.
        expected: the file's ``methods``.
        steps: local steps of a round, all on the same batch.
    """

    model: nn.Module
    train: list[Examples]
    test: list[Examples]
    settings: dict[str, Any]
    expected: dict[str, Any]
    steps: int

    def batches(self, t: int, client: int) -> list[Examples]:
        """The batches of one client in one round (the same in every round)."""
        return [self.train[client]] * self.steps

    def gain(self, state: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        """What the named tensors gained over the initial weights."""
        start = self.model.state_dict()
        return [state[name] - start[name] for name in names]


def assert_summary(gained: Tensor, expected: Mapping[str, Any], what: str) -> None:
    """Compare a tensor's gain with its recorded norm, sum and entries: 1e-9 relative, 1e-13 absolute."""
    flat = gained.detach().flatten()
    at = flat[torch.linspace(0, flat.numel() - 1, 8).long()].tolist()
    near = 1e-13 + 1e-9 * expected["norm"]
    assert flat.norm().item() == pytest.approx(expected["norm"], rel=1e-9, abs=1e-13), what
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=1e-9, abs=near), what
    assert at == pytest.approx(expected["at"], rel=1e-9, abs=1e-13), what


def fedfsa_case() -> GoldenCase:
    """Six clients of 60 Fashion-MNIST images each."""
    record = _record("fedfsa_code_a.json")
    settings = record["settings"]
    first, n, clients = settings["first"], settings["n"], settings["clients"]
    with np.load(_data() / "fashion_mnist" / "fashion_mnist.npz", allow_pickle=False) as file:
        x, y = file["x_train"], file["y_train"]
    starts = [first + n * i for i in range(clients)]
    train = [_examples(x[a : a + n, None], y[a : a + n]) for a in starts]
    steps = settings["args"]["local_ep"]
    return GoldenCase(_initialized(FashionNet()), train, [], settings, record["methods"], steps)


def fedbn_case() -> GoldenCase:
    """Three clients of 64 images each: MNIST, USPS, MNIST-M."""
    record = _record("fedbn_code_a.json")
    settings = record["settings"]

    def rows(start: int, count: int) -> list[Examples]:
        return [_examples(x[start : start + count], y[start : start + count]) for x, y in domains]

    domains = [_mnist(), _usps(), _mnist_m()]
    train, test = rows(settings["first"], settings["n"]), rows(settings["test"], settings["ntest"])
    steps = settings["local_epochs"]
    return GoldenCase(_initialized(DigitModel()), train, test, settings, record["methods"], steps)


class FashionNet(nn.Module):
    """The network of the FedFSA code for Fashion-MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.conv2 = nn.Conv2d(4, 12, 5)
        self.fc1 = nn.Linear(192, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.fc3 = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.conv1(x).relu(), 2)
        x = torch.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


class DigitModel(nn.Module):
    """The network of the FedBN code for the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 5, padding=2)
        self.bn3 = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(6272, 2048)
        self.bn4 = nn.BatchNorm1d(2048)
        self.fc2 = nn.Linear(2048, 512)
        self.bn5 = nn.BatchNorm1d(512)
        self.fc3 = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = torch.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        x = self.bn3(self.conv3(x)).relu().flatten(1)
        return self.fc3(self.bn5(self.fc2(self.bn4(self.fc1(x)).relu())).relu())


def _initialized(model: nn.Module) -> nn.Module:
    """Float64 weights uniform on ±1/sqrt(fan-in) from one NumPy stream; normalization layers as they are."""
    model, stream = model.double(), np.random.default_rng(7)
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            for tensor in (layer.weight, layer.bias):
                drawn = stream.uniform(-1, 1, tensor.numel()) / np.sqrt(fan_in)
                tensor.data = torch.from_numpy(drawn).reshape(tensor.shape)
    return model


def _examples(x: np.ndarray, y: np.ndarray) -> Examples:
    """Images of 0…255, shape (n, channels, 28, 28), scaled to [-1, 1], and labels."""
    return torch.from_numpy((x.astype(np.float64) / 255 - 0.5) / 0.5), torch.from_numpy(y.astype(np.int64))


def _record(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / name).read_text())


def _data() -> Path:
    if "IDIOLECT_DATA" not in os.environ:
        pytest.skip("needs real images: set IDIOLECT_DATA to the folder of the image sets")
    return Path(os.environ["IDIOLECT_DATA"])


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    def idx(name: str, header: int) -> np.ndarray:
        content = gzip.decompress((_data() / "mnist" / name).read_bytes())
        return np.frombuffer(content, np.uint8, offset=header)

    x = idx("train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return x.repeat(3, axis=1), idx("train-labels-idx1-ubyte.gz", 8)


def _usps() -> tuple[np.ndarray, np.ndarray]:
    with np.load(_data() / "usps" / "usps.npz", allow_pickle=False) as file:
        x, y = file["x_train"], file["y_train"]
    return np.pad(x[:, None], ((0, 0), (0, 0), (6, 6), (6, 6))).repeat(3, axis=1), y


def _mnist_m() -> tuple[np.ndarray, np.ndarray]:
    """The first sheet: images of 32x32 in rows of 50, cropped to their middle."""
    with np.load(_data() / "mnist_m" / "labels.npz", allow_pickle=False) as file:
        y = file["y_train"]
    sheet = np.asarray(Image.open(_data() / "mnist_m" / "train_00.webp").convert("RGB"))
    x = sheet.reshape(-1, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    return x[:, 2:30, 2:30].transpose(0, 3, 1, 2), y
