"""What must hold of clients that learn from those that resemble them, whatever the numbers."""

import math

import pytest
import torch
from torch import nn

from idiolect import Method, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, layout
from idiolect.core.types import Central
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts._aligned_features import class_sums
from idiolect.parts._critical_mix import _largest, _partners
from idiolect.rounds.client import _begin
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, population


def rows(**columns):
    """Return a stack of trees from one list of values per client for each name."""
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    where = layout(tuple(tensors), tuple(t.shape[1:] for t in tensors.values()))
    return Tree(where, torch.cat([t.flatten(1) for t in tensors.values()], dim=1))


def told(part, uploads, round=0, structure=None, like=None):
    central = Central(structure, uploads, uploads, 0.1, 1.0, round=round, rows=like or uploads)
    return part.aggregate(central, uploads).rows


def row(made, client, at=1):
    return made.rows.get(client)[made.method.parts[at].name]


def same_models(one, other, tolerance=1e-12):
    for client in one.clients:
        same({"own": one.personal(client)}, {"own": other.personal(client)}, tolerance)


def small(method, rounds, training=None):
    """Play on a network in which every weight moves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    clients = {name: ClientData(train=examples(name, n)) for name, n in SIZES.items()}
    made = Federation(Model(net), method, training or Training(lr=0.1, batch_size=8), 4, 1.0, 0, clients)
    for _ in range(rounds):
        made.play()
    return made


def test_a_mean_of_ones_own_by_hand():
    """Squared distances 1, 4 and 9 between 0, 1 and 3: the median is 4."""
    far = {d: 0.8 / 2 * math.exp(-d / 4) for d in (1, 4, 9)}
    expected = [far[1] * 1 + far[9] * 3, (1 - far[1] - far[4]) * 1 + far[4] * 3, (1 - far[4] - far[9]) * 3 + far[4] * 1]
    found = told(parts.attention(others=0.8), rows(w=[[0.0], [1.0], [3.0]]))["w"].flatten()
    assert found.tolist() == pytest.approx(expected, abs=1e-14)


def test_near_models_count_more_and_equal_ones_alike():
    part = parts.attention(sigma=1.0)
    three = told(part, rows(w=[[0.0], [0.1], [100.0]]))["w"].flatten()
    assert 0.04 < three[0] < 0.05  # half of it is the near one's
    assert three[2] == 100.0
    for made in (part, parts.attention()):
        assert torch.equal(told(made, rows(w=[[2.0]] * 3)).flat, rows(w=[[2.0]] * 3).flat)
        assert told(made, rows(w=[[2.0]])).flat.item() == 2.0  # a cohort of one
    none = rows(w=[[0.0], [1.0], [5.0]])
    assert torch.equal(told(parts.attention(others=0.0), none).flat, none.flat)


def test_a_pull_of_full_length_lands_on_the_mean():
    """With lr times strength one, a step ends at what was told, less the gradient's own step."""
    settings = Training(lr=0.1, batch_size=None)
    made = small(methods.fedamp(strength=10.0), 2, settings)
    for client in made.clients:
        start = made.memory.get(client)["share"]
        gradient = made.model.grad(start, made.assignment(client, "train").stream.epochs(1)[0]).gradient
        target = row(made, client) - 0.1 * gradient
        out = made.worker.train(made.assignment(client, "train"))
        same({"w": out.memory["share"]}, {"w": target}, 1e-12)


def test_without_critical_values_it_is_averaging():
    same_models(played(methods.fedcac(top=0.0)), played(methods.fedavg()))


def test_where_everything_is_critical_to_all_it_is_the_plain_mean():
    """All overlaps are one, the bar as well: everybody is everybody's partner."""
    one, other = small(methods.fedcac(top=1.0, rounds=1, weighting="uniform"), 3), small(methods.fedavg("uniform"), 3)
    same_models(one, other)
    assert not torch.equal(one.server["share"].flat, small(methods.fedavg(), 3).server["share"].flat)


def test_partners_by_hand():
    """Overlaps 1/2 (of 0 and 1), 0 (of 0 and 2), 1/2 (of 1 and 2); the mean is 1/3."""
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.float64)
    near = [[True, True, False], [True, True, True], [False, True, True]]
    assert _partners(masks, 0.0).tolist() == _partners(masks, 1.0).tolist() == near
    assert _partners(masks, -2.0).all()
    assert _partners(masks, 1.01).tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert _partners(masks[:1], 1.0).tolist() == [[True]]


def test_a_client_ends_as_its_only_partner():
    method = methods.fedcac(rounds=2)
    made = played(method, rounds=2)
    made.play()
    for client in made.clients:
        mask = made.memory.get(client)["critical_mix"].flat > 0
        own = end_of_third(method, client)
        assert torch.equal(row(made, client).flat[mask], own[mask])


def end_of_third(method, client):
    """Return the weights a client ends its third round with."""
    made = played(method, rounds=2)
    end = made.worker.train(made.assignment(client, "train")).uploads["share"]
    return torch.cat([end.stretch(name) for name in made.model.structure.trainable.names])


def test_critical_values_are_the_largest_of_their_tensor():
    made = played(methods.fedcac(top=0.5), rounds=1)
    for client in made.clients:
        mask = made.memory.get(client)["critical_mix"]
        sums = {name: int(tensor.sum()) for name, tensor in mask.items()}
        halves = {name: tensor.numel() // 2 for name, tensor in mask.items()}
        assert {n: s for n, s in sums.items() if n != "0.bias"} == {n: h for n, h in halves.items() if n != "0.bias"}
        assert sums["0.bias"] <= 1  # before batch normalization: it moves by rounding, or not at all


def test_bodies_by_hand():
    """Heads of one row: cosines 0.6 between the first two, 0 and -0.8 to the third, which counts as none."""
    structure = Model(nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()).structure
    heads = [[[3.0, 0.0]], [[1.2, 1.6]], [[0.0, -5.0]]]
    uploads = rows(**{"0.weight": [[[10.0], [0.0]], [[20.0], [0.0]], [[40.0], [0.0]]], "1.weight": heads})
    own, near = -math.log(1 - 0.9999), -math.log(1 - 0.6)
    found = told(parts.similar_bodies(warmup=0), uploads, structure=structure)
    assert list(found) == ["0.weight"]
    expected = [(own * 10 + near * 20) / (own + near), (near * 10 + own * 20) / (own + near), 40]
    assert found["0.weight"][:, 0, 0].tolist() == pytest.approx(expected, abs=1e-9)


def test_equal_heads_give_the_plain_mean_of_bodies():
    structure = Model(nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()).structure
    uploads = rows(**{"0.weight": [[[1.0], [0.0]], [[3.0], [0.0]]], "1.weight": [[[2.0, 1.0]], [[4.0, 2.0]]]})
    assert told(parts.similar_bodies(0), uploads, structure=structure)["0.weight"][:, 0, 0].tolist() == [2.0, 2.0]


def test_a_warm_up_is_averaging_and_costs_no_more():
    one, other = played(methods.pfedsim(warmup=3), rounds=3), played(methods.fedavg(), rounds=3)
    same_models(one, other)
    cheap = other.play().bytes_down
    assert one.play().bytes_down > cheap
    assert federation(methods.pfedsim(warmup=1)).play().bytes_down == cheap


def test_after_the_warm_up_heads_are_their_clients_own():
    made = played(methods.pfedsim(warmup=1), rounds=2)
    ends = {c: made.worker.train(made.assignment(c, "train")).memory["similar_bodies"] for c in made.clients}
    made.play()
    for client, end in ends.items():
        own = made.personal(client)
        assert all(torch.equal(own[name], end[name]) for name in ("6.weight", "6.bias"))
        assert torch.equal(own["4.weight"], row(made, client)["4.weight"])


def heads_told(means, variances, heads=((1.0,), (2.0,), (4.0,))):
    """Return what clients are told of heads of one weight, given class means and variances of their features."""
    structure = Model(nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()).structure
    count = len(means)
    uploads = rows(**{"1.weight": [[h] for h in heads[:count]], "means": means, "variance": [[v] for v in variances]})
    return told(parts.mixed_heads(), uploads, structure=structure)["1.weight"].flatten().tolist()


def test_mixed_heads_by_hand():
    """Equal features: weights are the inverse variances. A distance of 1 costs client j alone: V_j + 1 for V_j."""
    assert heads_told([[0.3, 0.1]] * 3, [1.0, 2.0, 2.0]) == pytest.approx([0.5 * 1 + 0.25 * 2 + 0.25 * 4] * 3)
    first, second = heads_told([[1.0, 0.0], [1.0, 1.0]], [1.0, 3.0])
    assert first == pytest.approx(0.8 * 1 + 0.2 * 2)  # 1 to 3 + 1
    assert second == pytest.approx(0.6 * 1 + 0.4 * 2)  # 1 + 1 to 3
    assert heads_told([[0.0], [1e3]], [1.0, 1.0])[0] == 1.0  # far away: a weight below 0.001 is none, the rest is one


def test_a_head_in_a_cohort_of_one_is_its_own():
    assert heads_told([[5.0]], [0.0]) == [1.0]


def test_nothing_is_aligned_in_the_first_round_and_features_are_after_it():
    def spread(strength, rounds):
        made = played(methods.fedpac(strength=strength), rounds=rounds)
        look = class_sums(scope.head, made.model.structure)
        total = 0.0
        for client in made.clients:
            batch = made.assignment(client, "train").stream.epochs(1)
            for step in batch:
                z = made.model.observe(made.personal(client), step, look)
                total += float(z["squares"] - (z["sums"].square().sum(1) / z["counts"].clamp(min=1)).sum())
        return total

    assert spread(10.0, 1) == spread(0.0, 1)
    assert spread(10.0, 3) < 0.9 * spread(0.0, 3)


def test_means_are_of_all_examples_and_classes_without_any_are_zero():
    """Clients of one class each: what the server keeps is the mean of their sums, so its ratio is the class's mean."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    classes = {"a": ([0, 1, 2, 3, 4], 0), "b": ([5, 6, 7], 2), "c": ([8], 2)}
    clients = {n: ClientData(train=(x[at], torch.full((len(at),), y))) for n, (at, y) in classes.items()}
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)).double()
    training = Training(lr=1e-12, batch_size=None)  # bodies stay where they are
    made = Federation(Model(net), methods.fedpac(), training, 4, 1.0, 0, clients)
    made.play()
    kept, z = made.server["aligned_features"], net[0](x).detach()
    assert kept["counts"].tolist() == pytest.approx([5 / 3, 0, 4 / 3])
    assert kept["sums"][1].tolist() == [0, 0]
    assert torch.allclose(
        kept["sums"][[0, 2]] / kept["counts"][[0, 2], None], torch.stack([z[:5].mean(0), z[5:].mean(0)])
    )


def test_head_and_body_take_turns():
    """The head alone before, the body alone after; statistics stand still with the body."""
    method = Method((parts.share(), parts.head_first(epochs=2, lr=0.3, freeze_statistics=True), parts.freeze()))
    made = federation(method)
    head_names = scope.head(made.model.structure)
    before = made.server["share"]
    own = made.personal("ada")
    end = made.worker.train(made.assignment("ada", "train")).uploads["share"]
    for name in before:
        assert torch.equal(own[name], before[name]) == (name not in head_names)
    work = made.assignment("ada", "train")
    _, _, local = _begin(method, made.model, made.training, work)
    assert all(torch.equal(end[name], local.start[name]) for name in head_names)
    assert not any(torch.equal(end[name], local.start[name]) for name in ("0.weight", "1.running_mean", "4.bias"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.attention(strength=-1.0), "strength must be at least 0"),
        (lambda: parts.attention(others=1.5), r"others must be in \[0, 1\]"),
        (lambda: parts.attention(sigma=0.0), "sigma must be above 0"),
        (lambda: parts.critical_mix(top=1.5), r"top must be in \[0, 1\]"),
        (lambda: parts.critical_mix(rounds=0), "rounds must be at least 1"),
        (lambda: parts.similar_bodies(warmup=-1), "warmup must be at least 0"),
        (
            lambda: federation(Method((parts.share(~scope.head), parts.similar_bodies()))),
            "head, which is not exchanged",
        ),
        (
            lambda: federation(methods.fedavg() + parts.similar_bodies(names=scope.named("0"))),
            "linear layer from features",
        ),
        (lambda: federation(methods.fedavg() + parts.similar_bodies(names=scope.everything)), "tensors of one layer"),
    ],
)
def test_what_cannot_be_used_is_said(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def on_numbers():
    """Play FedPAC where targets are numbers."""
    x = torch.ones(4, 3).double()
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    clients = {"a": ClientData(train=(x, x[:, :1]))}
    Federation(Model(net, nn.MSELoss()), methods.fedpac(), Training(lr=0.1), 1, 1.0, 0, clients).play()


def test_clients_of_one_round_alone_are_mixed():
    """Who was absent tells nobody anything."""
    made = federation(methods.fedamp(others=1.0, sigma=1e9), participation=0.5, clients=population())
    cohort = made.play().cohort
    ends = {c: made.memory.get(c)["share"] for c in cohort}
    for client, other in (cohort, cohort[::-1]):
        for name in row(made, client):
            assert torch.allclose(row(made, client)[name], ends[other][name], atol=1e-8)


def test_what_did_not_move_is_not_critical():
    mask = _largest(Tree.of({"a": torch.tensor([0.0, 3.0, 0.0, 0.0]), "b": torch.ones(1)}), 0.5)
    assert mask.flat.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
