"""Sites agree with the coordinator, which has no examples: head, constants, and buffers that stay at each site."""

import pytest

pytest.importorskip("flwr")

import flower_worlds
import torch
from flower_worlds import World, assert_same
from structure_worlds import Net
from torch import nn

from idiolect import methods, scope


def forward(m, x):
    return m.head((m.body(x.flatten(1)) + m.mask.isnan()).tanh())


def structured():
    """Return a network whose head is registered first, with a layer that nobody calls, a constant and own buffers."""
    torch.manual_seed(3)
    mask = torch.full((6,), torch.nan)
    body = nn.utils.parametrizations.spectral_norm(nn.Linear(36, 6))
    return Net(forward, head=nn.Linear(6, 3), body=body, aux=nn.Linear(6, 3), mask=mask)


OWN = {f"body.parametrizations.weight.0.{leaf}" for leaf in ("_u", "_v")}


@pytest.mark.parametrize(
    "method",
    [methods.fedavg(), methods.fedper(), methods.fedrod(), methods.ditto(), methods.fedper(scope.named("head"))],
)
def test_sites_and_simulation_are_the_same(tmp_path, monkeypatch, method):
    monkeypatch.setattr(flower_worlds, "tiny", structured)
    world = World(tmp_path, method, participation=0.67, rounds=3, sizes={"ada": 9, "ben": 3, "cleo": 6})
    coordinator, run = world.play(), world.simulated()
    sent = set(coordinator.server["share"])
    assert "mask" not in sent
    assert not OWN & sent
    assert ("head.weight" in sent) == (method.name != "FedPer")
    assert set(run.weights) == sent
    for client in world.clients:
        assert set(run.memory(client)["share"]) >= OWN
        assert set(world.personal(client)) >= OWN
    vectors = [world.personal(client)[min(OWN)] for client in world.clients]
    assert not torch.allclose(vectors[0], vectors[1])
    assert_same(world, coordinator, run.federation)
