"""Methods whose clients receive weights that a network of the server generates, against their textbook loops."""

import pytest
import torch
from test_oracles import NAMES, assert_follows, close, federation

from idiolect import methods, parts, scope
from idiolect.core.rng import derive, normal_hash
from idiolect.testing.oracles import generated

SERVER = {"lr": 0.6, "momentum": 0.7, "weight_decay": 0.05}
THEIRS = {"lr_server": 0.6, "momentum_server": 0.7, "decay_server": 0.05}


def hypernetwork(made):
    """Return the oracle's network and vectors as those of a federation are at first, and theirs after."""
    state, where = made.server["hypernetwork"], made.model.structure.layout.shape_of
    names = made.messages("ada")["hypernetwork"]
    size, width = state["layer 0/weight"].shape[1], len(state["layer 0/bias"])
    net = generated.Hypernetwork(size, width, {name: where[name] for name in names}).double()
    fill(net, state)
    vectors = [normal_hash(torch.tensor(derive(0, "client vector", k)), size, torch.float64) for k in range(len(NAMES))]
    return net, vectors


def fill(net, state):
    """Give the oracle's network the weights of ours, whose last layer is one for all tensors."""
    sizes = [shape.numel() for shape in net.shapes.values()]
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            for k in range(4):
                getattr(net.mlp[2 * k], leaf).copy_(state[f"layer {k}/{leaf}"])
            for layer, rows in zip(net.outputs, state[f"layer 4/{leaf}"].split(sizes), strict=True):
                getattr(layer, leaf).copy_(rows)


def follow(method, clip, **shared):
    """Also the network and the vectors must end as the oracle's."""
    net, vectors = hypernetwork(federation(method))
    oracle = generated.pfedhn
    made, _ = assert_follows(method, oracle, hypernetwork=net, vectors=vectors, clip_server=clip, **THEIRS, **shared)
    ours = generated.Hypernetwork(len(vectors[0]), len(net.mlp[0].bias), net.shapes).double()
    fill(ours, made.server["hypernetwork"])
    assert all(made.rows.get(name)["hypernetwork"]["learned"].norm() > 1e-4 for name in NAMES)
    close(dict(ours.named_parameters()), dict(net.named_parameters()), "network")
    return made


@pytest.mark.parametrize("clip", [None, 0.05])
def test_pfedhn(clip):
    """With and without a bound that is passed."""
    follow(methods.pfedhn(**SERVER, clip=clip, width=20), clip, shared=[])


def test_pfedhn_pc():
    made = follow(methods.pfedhn(~scope.head, **SERVER, clip=None, width=20), None, shared=[])
    assert not {"6.weight", "6.bias"} & set(made.messages("ada")["hypernetwork"])


def test_generated_normalization_under_a_shared_body():
    method = methods.fedbn() + parts.hypernetwork(scope.batch_norm, **SERVER, clip=50.0, width=20)
    shared = sorted((~scope.batch_norm)(federation(method).model.structure))
    made = follow(method, 50.0, shared=shared)
    assert list(made.messages("ada")["hypernetwork"]) == ["1.weight", "1.bias"]
