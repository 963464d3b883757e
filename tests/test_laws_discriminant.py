"""What must hold of a head that is computed from Gaussians of the features, whatever the numbers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect import UsageError, methods
from idiolect.compute.autograd import Model
from idiolect.core.scope import head
from idiolect.core.tree import Tree
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts.common.discriminant import Gaussians, best_shares, estimate, linear, log_prior, mixed
from idiolect.rounds.training import Training
from idiolect.testing.worlds import SIZES, examples, federation

NAME = "discriminant_head"
CLASSES, WIDTH = 3, 4


def gaussians(generator, full=True):
    means = torch.randn(CLASSES, WIDTH, generator=generator).double()
    root = torch.randn(WIDTH, WIDTH, generator=generator).double()
    within = root @ root.T + 0.1 * torch.eye(WIDTH).double()
    return Gaussians(means, within if full else within.diagonal().clone())


def client(generator, count, spread=1.0, classes=CLASSES):
    """Return features and one-hot classes of a client whose own Gaussians differ from those of all."""
    y = torch.randint(classes, (count,), generator=generator)
    own = gaussians(generator)
    z = own.means[y] + spread * torch.randn(count, WIDTH, generator=generator).double() @ own.covariance
    return z, F.one_hot(y, CLASSES).double()


def chances(z, of, prior):
    weight, bias = linear(of, prior)
    return (z @ weight.T + bias).softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_and_a_shift_of_features_change_nothing(seed):
    """Neither probabilities under given Gaussians, nor the shares that a client chooses."""
    g = torch.Generator().manual_seed(seed)
    of, (z, y) = gaussians(g), client(g, 20)
    q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g).double())[0]
    shift, prior = torch.randn(WIDTH, generator=g).double(), log_prior(y.sum(0))
    moved = Gaussians(of.means @ q.T + shift, q @ of.covariance @ q.T)
    there = z @ q.T + shift
    assert (chances(z, of, prior) - chances(there, moved, prior)).abs().max() < 1e-11
    shares = [best_shares(at, y, among, prior, 0.01) for at, among in ((z, of), (there, moved))]
    assert (shares[0] - shares[1]).abs().max() < 1e-9


@pytest.mark.parametrize("full", [True, False])
def test_the_shares_do_not_matter_if_both_gaussians_are_the_same(full):
    of = gaussians(torch.Generator().manual_seed(0), full)
    for shares in ([0.0, 1.0], [0.3, 0.6]):
        same = mixed(torch.tensor(shares).double(), of, of)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in zip(same, of, strict=True))


def test_unit_covariance_and_equal_classes_give_the_nearest_mean():
    g = torch.Generator().manual_seed(1)
    of = gaussians(g)._replace(covariance=torch.eye(WIDTH).double())
    z = 3 * torch.randn(200, WIDTH, generator=g).double()
    found = chances(z, of, torch.zeros(CLASSES).double()).argmax(1)
    assert torch.equal(found, torch.cdist(z, of.means).argmin(1))
    assert len(set(found.tolist())) == CLASSES


def test_without_examples_all_classes_are_equal_and_the_gaussians_those_of_all():
    of, z, y = gaussians(torch.Generator().manual_seed(1)), torch.zeros(0, WIDTH).double(), torch.zeros(0, 3).double()
    assert torch.allclose(log_prior(y.sum(0)).exp(), torch.ones(3).double() / 3, rtol=0, atol=1e-15)
    assert torch.equal(best_shares(z, y, of, log_prior(y.sum(0)), 0.1), torch.zeros(2).double())
    assert torch.equal(estimate(z, y, of, 0.1).means, of.means)


def test_full_and_diagonal_agree_where_features_are_independent():
    g = torch.Generator().manual_seed(2)
    of, prior = gaussians(g, full=False), torch.randn(CLASSES, generator=g).double()
    whole = of._replace(covariance=torch.diag(of.covariance))
    assert (torch.cat(linear(of, prior)[:1]) - linear(whole, prior)[0]).abs().max() < 1e-12
    assert (linear(of, prior)[1] - linear(whole, prior)[1]).abs().max() < 1e-12


def test_the_covariance_is_that_of_all_examples_about_their_classes():
    g = torch.Generator().manual_seed(3)
    of, (z, y) = gaussians(g), client(g, 12)
    own = estimate(z, y, of, 0.5)
    centers = torch.stack([z[y.argmax(1) == c].mean(0) for c in range(CLASSES)])
    off = (z - centers[y.argmax(1)]).numpy()
    assert np.allclose(own.covariance, off.T @ off / 11 + 0.5 * np.eye(WIDTH), rtol=0, atol=1e-12)
    few = estimate(z, torch.cat([y[:2, [1, 0, 2]] * 0 + torch.tensor([1.0, 0, 0]), 0 * y[2:]]), of, 0.5)
    assert torch.equal(few.means, of.means), "two examples give no mean of their own"


def loss(shares, z, y, others, prior, ridge):
    """Return the cross-validated loss of shares, fold by fold."""
    labels, halves = y.argmax(1), ([], [])
    for c in range(CLASSES):
        there = torch.nonzero(labels == c).flatten().tolist()
        for k, place in enumerate(there if len(there) > 1 else []):
            halves[k % 2].append(place)
    total = 0.0
    for test, rest in (halves, halves[::-1]):
        weight, bias = linear(mixed(shares, estimate(z[rest], y[rest], others, ridge), others), prior)
        total += float(F.cross_entropy(z[test] @ weight.T + bias, labels[test]))
    return total


@pytest.mark.parametrize("full", [True, False])
def test_no_shares_nearby_are_better(full):
    """Nor those of the start, over clients small and large, unlike the others and like them."""
    places, start = set(), torch.tensor([0.5, 0.5]).double()
    for seed in range(24):
        g = torch.Generator().manual_seed(seed)
        others, (z, y) = gaussians(g, full), client(g, 6 + 3 * (seed % 8), 0.2 + 0.4 * (seed % 3))
        if seed % 3 == 0:
            within = others.covariance if full else torch.diag(others.covariance)
            z = others.means[y.argmax(1)] + torch.randn(z.shape, generator=g).double() @ torch.linalg.cholesky(within).T
        prior = log_prior(y.sum(0))
        found = best_shares(z, y, others, prior, 0.05)
        assert ((found >= 0) & (found <= 1)).all()
        steps = [far * torch.tensor(way).double() for way in ((1, 0), (-1, 0), (0, 1), (0, -1)) for far in (1e-2, 1e-4)]
        near = [(found + step).clamp(0, 1) for step in steps]
        best = min(loss(at, z, y, others, prior, 0.05) for at in (*near, start))
        assert loss(found, z, y, others, prior, 0.05) <= best + 1e-12, (seed, found)
        places.add(tuple("inside" if 0 < s < 1 else int(s) for s in found.tolist()))
    assert len(places) >= 5, places


@pytest.mark.parametrize("full", [True, False])
def test_each_client_of_a_stack_is_on_its_own(full):
    g = torch.Generator().manual_seed(5)
    others, parts = gaussians(g, full), [client(g, n) for n in (1, 5, 19)]
    z, y = (torch.stack([F.pad(part[k], (0, 0, 0, 19 - len(part[k]))) for part in parts]) for k in (0, 1))
    prior = log_prior(y.sum(-2))
    together = mixed(best_shares(z, y, others, prior, 0.1), estimate(z, y, others, 0.1), others)
    for k, (own, classes) in enumerate(parts):
        shares = best_shares(own, classes, others, log_prior(classes.sum(0)), 0.1)
        alone = mixed(shares, estimate(own, classes, others, 0.1), others)
        for one, stacked in zip(linear(alone, prior[k]), linear(together, prior), strict=True):
            assert (one - stacked[k]).abs().max() < 1e-11


def test_without_own_gaussians_clients_differ_by_their_classes_alone():
    made = federation(methods.pfedfda(own=0.0))
    made.play()
    heads = {name: (made.personal(name)["6.weight"], made.personal(name)["6.bias"]) for name in SIZES}
    priors = {name: log_prior(made.clients[name].train.y.bincount(minlength=3).double()) for name in SIZES}
    for name in SIZES:
        assert torch.equal(heads[name][0], heads["ada"][0])
        gap = heads[name][1] - priors[name] - heads["ada"][1] + priors["ada"]
        assert gap.abs().max() < 1e-12
    assert (heads["dan"][1] - heads["ada"][1]).abs().max() > 0.1


def test_with_own_gaussians_alone_those_of_others_have_no_influence():
    """On a client with more than two examples of each class."""
    made = federation(methods.pfedfda(own=1.0))
    made.play()
    enough = [name for name in SIZES if made.clients[name].train.y.bincount(minlength=3).min() > 2]
    assert enough
    before = {name: made.personal(name).flat for name in enough}
    state = made.server[NAME]
    made.server = {**made.server, NAME: Tree(state.layout, state.flat + 0.5)}
    assert all(torch.allclose(made.personal(name).flat, before[name], rtol=0, atol=1e-12) for name in enough)


def test_a_client_without_two_examples_of_a_class_uses_the_shared_gaussians():
    clients = {"one": ClientData(train=examples("one", 1)), "more": ClientData(train=examples("more", 12))}
    made, shared = (federation(methods.pfedfda(own), clients=clients) for own in (None, 0.0))
    assert torch.equal(made.personal("one").flat, shared.personal("one").flat)
    assert not torch.equal(made.personal("more").flat, shared.personal("more").flat)


def test_the_body_trains_under_the_head_of_the_shared_gaussians():
    """One step without momentum is the gradient under that head, which does not move."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = ClientData(train=examples("dan", 32))
    made = Federation(Model(net), methods.pfedfda(own=0.0), Training(lr=0.3, batch_size=None), 2, 1.0, 0, {"dan": data})
    state, x, y = made.server[NAME], *data.train
    of = Gaussians(state["means"], torch.eye(4).double())
    weight, bias = linear(of, log_prior(y.bincount(minlength=3).double()))
    F.cross_entropy(net[:-1](x) @ weight.T + bias, y).backward()
    made.play()
    after = made.server["share"]
    assert set(after) == {"1.weight", "1.bias"}
    assert torch.allclose(after["1.weight"], net[1].weight - 0.3 * net[1].weight.grad, rtol=0, atol=1e-14)
    assert torch.equal(made.server[NAME].flat, state.flat)


def tied():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[4].weight = net[2].weight
    return net


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)), "no trainable bias"),
        (nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()), "must be a linear layer"),
        (tied(), "shares its weight with another layer"),
    ],
)
def test_a_head_that_cannot_be_computed_is_refused(net, why):
    with pytest.raises(UsageError, match=why):
        Federation(Model(net.double()), methods.pfedfda(), Training(), 1, 1.0, 0, {"a": ClientData(examples("a", 4))})


def test_wrong_arguments_are_one_line():
    for wrong in ({"own": 1.5}, {"covariance": "low-rank"}, {"ridge": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            methods.pfedfda(**wrong)
    assert methods.pfedfda(names=head) == methods.pfedfda()
