"""What must hold of batch normalization by mixed statistics, whatever the numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect import Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, pick
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts._hybrid_norm import Hybrid
from idiolect.rounds.client import client_round
from idiolect.testing.worlds import SIZES, examples, federation, network

NAME = "hybrid_norm"
STILL = Training(lr=1e-300, batch_size=None)  # a step that moves nothing


def deep():
    """Return a network with two layers of batch normalization, of other widths and dimensions, one without scale."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.BatchNorm1d(5, affine=False),
    )
    return nn.Sequential(*net, nn.Tanh(), nn.Linear(5, 3)).double()


def clients(**sizes):
    return {name: ClientData(train=examples(name, n)) for name, n in sizes.items()}


def with_factor(made, factor):
    """Return a federation whose clients begin with this factor."""
    state = made.server[NAME]
    made.server = made.server | {NAME: Tree.of({**state, "factor": torch.full_like(state["factor"], factor)})}
    return made


def given(net, x):
    """Return mean and biased variance of what each layer of batch normalization is given, in training mode."""
    net, seen = copy.deepcopy(net).train(), []
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            over = [axis for axis in range(x.dim()) if axis != 1]
            seen.append((x.mean(over), x.var(over, correction=0)))
        x = layer(x)
    return [torch.cat(moment) for moment in zip(*seen, strict=True)]


def prepared(factor):
    """Return a plain network with uncommon tensors, and the one that trains, with this factor."""
    plain = deep()
    plain.train()(examples("ada", 24)[0])
    model = Model(plain).extended(methods.hbn().attach)
    twin = model.training
    for layer in twin:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            own = layer.hybrid_norm
            assert isinstance(own, Hybrid)
            with torch.no_grad():
                own.factor.fill_(factor)
                own.mean.copy_(layer.running_mean)
                own.variance.copy_(layer.running_var)
    return plain, twin


def test_without_the_batch_training_normalizes_by_constants():
    plain, twin = prepared(-1000.0)
    x = examples("ben", 8)[0]
    assert torch.allclose(twin.train()(x), plain.eval()(x), rtol=0, atol=1e-13)


def test_with_the_batch_alone_training_is_batch_normalization():
    plain, twin = prepared(1000.0)
    x = examples("ben", 8)[0]
    assert torch.allclose(twin.train()(x), plain.train()(x), rtol=0, atol=1e-13)


def test_predictions_are_those_of_ordinary_layers():
    plain, twin = prepared(0.3)
    x = examples("ben", 8)[0]
    assert torch.equal(twin.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("predict", ["last", "smoothed"])
def test_renewed_at_once_the_statistics_are_those_of_all_examples(predict):
    """Of the first layer exactly, whatever the factor and the batches: its input does not depend on them."""
    sizes = {"ada": 24, "ben": 7, "cleo": 2}
    for training in (Training(lr=0.1, batch_size=None), Training(lr=0.1, batch_size=3)):
        made = Federation(Model(deep()), methods.hbn(1.0, predict), training, 2, 1.0, 0, clients(**sizes))
        x = torch.cat([data.train.x for data in made.clients.values()])
        mean, variance = given(deep(), x)
        made.play()
        for name, expected in (("mean", mean), ("var", variance)):
            assert torch.allclose(made.server["share"][f"1.running_{name}"], expected[:3], rtol=0, atol=1e-13)


def test_one_client_that_stands_still_predicts_as_it_trains():
    """All its examples in one batch, the batch's statistics alone, renewed at once: in both layers."""
    made = Federation(Model(deep()), methods.hbn(1.0), STILL, 2, 1.0, 0, clients(ada=24))
    with_factor(made, 1000.0).play()
    x, plain = made.clients["ada"].train.x, deep()
    mean, variance = given(plain, x)
    assert torch.allclose(made.server[NAME]["mean"], mean, rtol=0, atol=1e-13)
    assert torch.allclose(made.server[NAME]["variance"], variance, rtol=0, atol=1e-13)
    model = made.model.module(made.general())
    assert torch.allclose(model.eval()(x), plain.train()(x), rtol=0, atol=1e-12)


def test_shared_statistics_move_by_their_step_from_those_of_the_model():
    """The first ones are those that the user's model came with."""
    net = deep()
    net[1].running_mean += 2.0
    net[5].running_var *= 3.0
    made = Federation(Model(net), methods.hbn(0.25, "smoothed"), STILL, 2, 1.0, 0, clients(ada=24))
    once = Federation(Model(net), methods.hbn(1.0), STILL, 2, 1.0, 0, clients(ada=24))
    before = made.server[NAME]
    assert before["mean"].tolist() == [2.0] * 3 + [0.0] * 5
    assert before["variance"].tolist() == [1.0] * 3 + [3.0] * 5
    made.play()
    once.play()
    for name in ("mean", "variance"):
        mixed = 0.75 * before[name] + 0.25 * once.server[NAME][name]
        assert torch.allclose(made.server[NAME][name], mixed, rtol=0, atol=1e-14)
    assert torch.equal(made.server["share"]["5.running_mean"], made.server[NAME]["mean"][3:])


def test_training_leaves_running_statistics_as_they_were_received():
    made = federation(methods.hbn(0.5))
    made.play()
    work = made.assignment("dan", "train")
    sent = client_round(made.method, made.model, made.training, work).uploads["share"]
    names = {"1.running_mean", "1.running_var"}
    assert torch.equal(pick(sent, names).flat, pick(made.server["share"], names).flat)
    assert (sent["0.weight"] - made.server["share"]["0.weight"]).abs().max() > 1e-3


def test_factors_stay_with_their_clients_and_a_new_client_begins_with_the_mean():
    made = federation(methods.hbn(), participation=0.5)
    cohort = made.play().cohort
    own = {name: made.personal(name)["1.hybrid_norm.factor"] for name in SIZES}
    mean = sum(SIZES[name] * own[name] for name in cohort) / sum(SIZES[name] for name in cohort)
    assert mean.abs().max() > 1e-4
    for name in SIZES:
        gap = (own[name] - mean).abs().max()
        assert gap > 1e-5 if name in cohort else gap < 1e-15


def test_a_client_with_one_example_sends_the_shared_statistics_back():
    made = federation(methods.hbn(0.5), clients=clients(one=1, more=20))
    made.play()
    sent = client_round(made.method, made.model, made.training, made.assignment("one", "train")).uploads[NAME]
    for name in ("mean", "variance"):
        assert torch.equal(sent[name], made.server[NAME][name])


def test_adaptation_to_inputs_normalizes_by_their_statistics_alone():
    """As without mixing, in both layers: the part that adapts sees ordinary layers."""
    method, training = methods.hbn(0.5) + parts.adapted_statistics(), Training(lr=0.1, batch_size=8)
    made = Federation(Model(deep()), method, training, 2, 1.0, 0, clients(ada=24, dan=32))
    made.play()
    x, own, plain = examples("unseen", 9)[0], made.deployed("dan"), deep()
    plain.load_state_dict({n: t for n, t in made.model.tensors(own.weights).items() if NAME not in n})
    adapted, (mean, variance) = own.at(x), given(plain, x)
    for name, expected in (("mean", mean), ("var", variance)):
        found = torch.cat([adapted[f"{layer}.running_{name}"] for layer in (1, 5)])
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)


def test_the_gradient_passes_through_the_statistics_of_the_batch():
    """Against finite differences, in all weights and factors."""
    made = federation(methods.hbn())
    made.play()
    row, (x, y) = made.personal("ben"), made.clients["ben"].train
    found = made.model.grad(row, Batch(x, y)).gradient

    def loss(weights):
        module = made.model.training
        return F.cross_entropy(torch.func.functional_call(module, made.model.tensors(weights), x), y)

    for name in ("0.weight", "0.bias", "1.weight", "1.hybrid_norm.factor"):
        place = row.layout.starts[name]
        moved = torch.zeros_like(row.flat)
        moved[place] = 1e-6
        slope = (loss(Tree(row.layout, row.flat + moved)) - loss(Tree(row.layout, row.flat - moved))) / 2e-6
        assert abs(float(slope.detach()) - float(found[name].flatten()[0])) < 1e-8


@pytest.mark.parametrize(
    ("net", "method", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), methods.hbn(), "has no batch normalization"),
        (
            nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, 3)),
            methods.hbn(),
            "keeps running statistics",
        ),
        (network(), methods.fedbn() + parts.hybrid_norm(), "share them too"),
        (network(), Method((parts.share(~scope.statistics), parts.hybrid_norm())), "share them too"),
    ],
)
def test_what_cannot_be_mixed_is_refused(net, method, why):
    with pytest.raises(UsageError, match=why):
        Federation(Model(net.double()), method, Training(), 1, 1.0, 0, clients(ada=4))


def test_a_wrong_step_is_one_line():
    with pytest.raises(UsageError, match=r"renewal must be in \(0, 1\], got 0"):
        methods.hbn(renewal=0)
