"""Sites whose examples are transformed or read when a batch is needed: those of the simulation, bit for bit."""

import pytest
import torch

pytest.importorskip("flwr")

from flower_worlds import World, assert_same
from torch.utils.data import TensorDataset

from idiolect import ClientData, methods


def jitter(x):
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: ClientData(data.train, test=data.test, transform=jitter),
        lambda data: ClientData(data.train, test=data.test, batch_transform=jitter),
        lambda data: ClientData(TensorDataset(*data.train), test=TensorDataset(*data.test), transform=jitter),
    ],
    ids=["examples", "batches", "dataset"],
)
def test_augmentation_on_sites_is_that_of_the_simulation(tmp_path, change):
    plain = World(tmp_path / "plain", methods.fedbn(), sizes={"ada": 9, "ben": 5}, rounds=2)
    world = World(tmp_path / "changed", methods.fedbn(), sizes={"ada": 9, "ben": 5}, rounds=2)
    world.clients = {client: change(data) for client, data in world.clients.items()}
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    assert not torch.equal(run.federation.server["share"].flat, plain.simulated().federation.server["share"].flat)
