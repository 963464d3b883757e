"""What must hold of weights that a network of the server generates, whatever the numbers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from idiolect import Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.rng import derive, normal_hash
from idiolect.core.structure import Private
from idiolect.core.tree import Tree, zeros_like
from idiolect.core.types import Central, Setup
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts._hypernetwork import first_network, generate
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network

NAME = "hypernetwork"
PLAIN = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": None}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def federated(method, rounds=0, participation=1.0, **training):
    """Play rounds on a network without statistics; by default a client takes one step on all of its examples."""
    clients = {name: ClientData(train=examples(name, n)) for name, n in SIZES.items()}
    settings = Training(**({"lr": 0.3, "batch_size": None} | training))
    made = Federation(Model(small()), method, settings, 4, participation, 0, clients)
    for _ in range(rounds):
        made.play()
    return made


def network_of(made):
    """Return the network on the server, without its momentum."""
    return Tree.of({n: t for n, t in made.server[NAME].items() if not n.startswith("momentum/")})


def learned(made, client):
    return made.rows.get(client)[NAME]["learned"]


def vector(made, client):
    seed = torch.tensor(derive(0, "client vector", made.place(client)))
    return normal_hash(seed, len(learned(made, client)), torch.float64) + learned(made, client)


def own(made, client):
    return made.messages(client)[NAME]


def central(made, clients):
    """Return the server as the part sees it when the uploads of these clients have arrived."""
    rows = [made.rows.get(c)[NAME] for c in clients]
    stack = Tree(rows[0].layout, torch.stack([row.flat for row in rows]))
    shared, places = made.server["share"], tuple(made.place(c) for c in clients)
    return Central(made.model.structure, shared, shared, 0.1, 1.0, state=made.server[NAME], clients=places, rows=stack)


def moves_like(made, clients, scale=1.0):
    trees = [own(made, c) for c in clients]
    generator = torch.Generator().manual_seed(3)
    return Tree(trees[0].layout, scale * torch.randn(len(trees), trees[0].layout.total, generator=generator).double())


def test_a_plain_step_is_propagated_back_through_the_network():
    """Where clients take one step, the server descends the mean of their losses by the product of the rates."""
    made = federated(methods.pfedhn(**PLAIN, width=20), rounds=1)
    before = network_of(made)
    phi = Tree(before.layout, before.flat.clone().requires_grad_())
    vectors = {c: vector(made, c).requires_grad_() for c in made.clients}
    losses = []
    for client, data in made.clients.items():
        theta = Tree(own(made, client).layout, generate(phi, vectors[client]))
        losses.append(F.cross_entropy(functional_call(small(), dict(theta), data.train.x), data.train.y))
    slope, *pulls = torch.autograd.grad(sum(losses) / len(losses), [phi.flat, *vectors.values()])
    ends = {c: v.detach() - 0.3 * pull for (c, v), pull in zip(vectors.items(), pulls, strict=True)}
    made.play()
    assert torch.allclose(network_of(made).flat, before.flat - 0.3 * slope, rtol=0, atol=1e-14)
    for client, end in ends.items():
        assert torch.allclose(vector(made, client), end, rtol=0, atol=1e-14)
    assert min(pull.norm() for pull in (slope, *pulls)) > 1e-4


def test_losses_fall():
    def loss(made):
        model = made.model
        each = [F.cross_entropy(model.predict(made.personal(c), d.train.x), d.train.y) for c, d in made.clients.items()]
        return float(sum(each))

    made = federated(methods.pfedhn(lr=0.1, width=20))
    before = loss(made)
    for _ in range(30):
        made.play()
    assert loss(made) < 0.9 * before


def test_biases_alone_are_uniform_averaging():
    """A network of zeros but for its last biases, which begin as the model: their step is the mean move."""
    made = federated(methods.pfedhn(**PLAIN, width=4), participation=0.5, batch_size=8)
    state = zeros_like(made.server[NAME])
    state["layer 4/bias"].copy_(made.model.initial.flat)
    made.server[NAME] = state
    other = federated(methods.fedavg("uniform"), participation=0.5, batch_size=8)
    for _ in range(4):
        made.play()
        other.play()
        for client in made.clients:
            same({"": made.personal(client)}, {"": other.personal(client)}, 1e-12)


def test_clients_that_did_not_move_change_nothing():
    made = federated(methods.pfedhn(**PLAIN, width=20), rounds=1)
    part, clients = made.method.parts[1], list(made.clients)
    update = part.aggregate(central(made, clients), moves_like(made, clients, scale=0.0))
    size = network_of(made).layout.total
    assert torch.equal(update.state.flat[:size], made.server[NAME].flat[:size])
    assert not update.state.flat[size:].any()
    assert torch.equal(update.rows["learned"], central(made, clients).rows["learned"])


def test_the_order_of_arrival_does_not_matter():
    """Vectors and moves are those of a client, not of a place in the cohort; also where the caller keeps no graph."""
    made = federated(methods.pfedhn(width=20, clip=0.5), rounds=1)
    part, clients = made.method.parts[1], list(made.clients)
    moves = moves_like(made, clients)
    one = part.aggregate(central(made, clients), moves)
    with torch.no_grad():
        other = part.aggregate(central(made, clients[::-1]), Tree(moves.layout, moves.flat.flip(0)))
    same({"": one.state}, {"": other.state}, 1e-13)
    same({"": one.rows}, {"": Tree(other.rows.layout, other.rows.flat.flip(0))}, 1e-13)
    assert not one.state.flat.requires_grad
    assert not one.rows.flat.requires_grad


def test_the_bound_is_on_network_and_vectors_together():
    settings = PLAIN | {"clip": 0.5}
    made = federated(methods.pfedhn(**settings, width=20))
    clients = list(made.clients)
    update = made.method.parts[1].aggregate(central(made, clients), moves_like(made, clients, scale=100.0))
    moved = torch.cat(
        [(update.state - made.server[NAME]).flat[: network_of(made).layout.total], update.rows["learned"].flatten()]
    )
    assert moved.norm() == pytest.approx(0.5, abs=1e-6)


def test_absent_clients_keep_their_vectors():
    """Also the momentum of these; but their weights move with the network."""
    made = federated(methods.pfedhn(width=20), rounds=2, participation=0.5)
    before = {c: (made.rows.get(c)[NAME].clone(), own(made, c)) for c in made.clients}
    cohort = made.play().cohort
    assert len(cohort) == 2
    for client, (row, weights) in before.items():
        assert torch.equal(made.rows.get(client)[NAME].flat, row.flat) == (client not in cohort)
        assert not torch.equal(own(made, client).flat, weights.flat)


def test_clients_start_apart_and_as_pytorch_starts():
    made = federated(methods.pfedhn())
    weights = torch.stack([own(made, c).flat for c in made.clients])
    assert torch.pdist(weights).min() > 0.1
    again, other = federated(methods.pfedhn()), federated(methods.pfedhn(seed=1))
    same({"": own(made, "ada")}, {"": own(again, "ada")})
    assert not torch.equal(network_of(made).flat, network_of(other).flat)
    for name, tensor in first_network(9, 100, 400, 0, torch.zeros(0)).items():
        bound = (9 if "layer 0" in name else 100) ** -0.5
        assert tensor.abs().max() <= bound
        if tensor.numel() >= 400:
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(float(tensor.mean())) < 0.1 * bound
    drawn = torch.cat([normal_hash(torch.tensor(derive(0, "client vector", k)), 4, torch.float64) for k in range(500)])
    assert abs(float(drawn.mean())) < 0.1
    assert drawn.std() == pytest.approx(1, abs=0.1)


def test_the_network_has_the_size_of_the_authors():
    """With 50 clients, and their model of 121,182 values."""
    net = nn.Linear(121_181, 1)
    made = Model(net)
    setup = Setup(made.structure, made.initial, Tree.of({}), population=50)
    part = parts.hypernetwork()
    size = part.rows(setup)["learned"].numel()
    assert size == 13
    network = part.server(setup).flat.numel() // 2
    assert network + 50 * size == 12_271_732


def test_what_the_server_keeps_is_not_sent():
    """A client is sent its weights, and sends back how they moved."""
    made = federation(methods.pfedhn(~scope.head, width=5))
    body = sum(
        t.numel() for n, t in made.model.initial.items() if n in (scope.weights - scope.head)(made.model.structure)
    )
    counted = made.play()
    assert counted.bytes_down == counted.bytes_up == len(SIZES) * body * 8
    assert len(made.sent("train")[NAME]) == 0


def test_statistics_and_what_is_private_are_not_generated():
    net = network()
    net.own = Private()
    net.own.shift = nn.Parameter(torch.zeros(2).double())
    clients = {name: ClientData(train=examples(name, n)) for name, n in SIZES.items()}
    made = Federation(Model(net), methods.pfedhn(width=5), Training(), 4, 1.0, 0, clients)
    expected = [n for n, _ in network().named_parameters()]
    assert list(own(made, "ada")) == expected
    made.play()
    kept = made.memory.get("ada")["share"]
    assert torch.equal(made.personal("ada")["1.running_mean"], kept["1.running_mean"])
    assert not torch.equal(kept["1.running_mean"], made.memory.get("ben")["share"]["1.running_mean"])


def test_heads_stay_with_their_clients():
    made = played(methods.pfedhn(~scope.head, width=5), rounds=1)
    for client in made.clients:
        kept = made.memory.get(client)["share"]
        assert all(torch.equal(made.personal(client)[n], kept[n]) for n in ("6.weight", "6.bias"))
        assert not torch.equal(made.personal(client)["4.weight"], kept["4.weight"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.hypernetwork(lr=0.0), "lr must be above 0, got 0"),
        (lambda: parts.hypernetwork(momentum=1.0), r"momentum must be in \[0, 1\), got 1"),
        (lambda: parts.hypernetwork(weight_decay=-0.1), "weight_decay must be at least 0, got -0"),
        (lambda: parts.hypernetwork(clip=0.0), "clip must be above 0, or None, got 0"),
        (lambda: parts.hypernetwork(width=0), "width must be at least 1, got 0"),
        (lambda: federation(methods.pfedhn(scope.statistics)), "no trainable tensor among statistics"),
        (
            lambda: federation(methods.fedbn() + parts.hypernetwork(scope.head)),
            "6.weight is generated and exchanged as well: leave it out of share",
        ),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(UsageError, match=f"^hypernetwork: {said}"):
        make()
