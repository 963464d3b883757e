"""What must hold of the parts that read the inputs to predict, whatever the numbers."""

import pytest
import torch
from torch import nn

from idiolect import SGD, Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import CHUNK
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts._head_ensemble import _running, _shares
from idiolect.rounds.client import _begin
from idiolect.testing.checks import played
from idiolect.testing.oracles import transductive
from idiolect.testing.worlds import examples, federation, network

X = examples("to predict", 9)[0]
DECAYING = Training(lr=0.1, batch_size=8, optimizer=SGD(momentum=0.5, weight_decay=0.1))
STATISTICS = {"1.running_mean", "1.running_var"}


def predictions(made, client="ada", x=X):
    return made.model.predict(made.deployed(client).at(x), x)


# AdaBN


@pytest.mark.parametrize("method", [methods.adabn(), methods.fedbn() + parts.adapted_statistics()])
def test_only_statistics_adapt_and_adapting_twice_is_adapting_once(method):
    own = played(method).deployed("ada")
    once = own.at(X)
    assert {n for n in once if not torch.equal(once[n], own.weights[n])} == STATISTICS
    assert torch.equal(own.adapt(once, X).flat, once.flat)


def test_predictions_are_those_of_a_batch_in_training():
    """Each layer normalizes by the batch; the network has no dropout."""
    made = played(methods.adabn())
    net = made.model.module(made.personal("ada")).train()
    assert torch.allclose(predictions(made), net(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "level"), [(3.0, -7.0), (40.0, 1e3)])
def test_another_scale_and_level_of_the_inputs_change_nothing(scale, level):
    """A convolution without padding, then normalization; without eps it would hold but for rounding."""
    made, plain = played(methods.adabn()), played(methods.fedavg())
    expected, away = (
        made.model.predict(plain.personal("ada"), scale * X + level),
        predictions(made, x=scale * X + level),
    )
    assert torch.allclose(away, predictions(made), rtol=0, atol=1e-4)
    assert (expected - plain.model.predict(plain.personal("ada"), X)).abs().max() > 0.1


def test_the_order_of_the_inputs_is_irrelevant():
    made = played(methods.adabn())
    assert torch.allclose(predictions(made, x=X.flip(0)), predictions(made).flip(0), rtol=0, atol=1e-12)


def test_a_single_input_is_predicted_by_the_running_statistics():
    made = played(methods.adabn())
    own = made.deployed("ada")
    assert torch.equal(own.at(X[:1]).flat, own.weights.flat)
    assert not torch.equal(own.at(X[:2]).flat, own.weights.flat)


class Unusual(nn.Module):
    """Dropout, a layer of normalization that is called twice, and one that is called in training alone."""

    def __init__(self):
        super().__init__()
        self.twice, self.aside = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        if self.training:
            x = self.aside(x)
        return self.head(self.twice(self.dropout(3 * self.twice(x) + 1)))


def test_layers_that_are_called_twice_or_not_at_all():
    torch.manual_seed(0)
    net = Unusual().double()
    nn.init.uniform_(net.twice.weight)
    nn.init.constant_(net.aside.running_mean, 5.0)
    x = torch.randn(8, 4).double() + 2
    clients = {"a": ClientData(train=(x, torch.arange(8) % 2))}
    made = Federation(Model(net), methods.adabn(), Training(), 1, 1.0, 0, clients)
    adapted = made.deployed("a").at(x)
    first = (x - x.mean(0)) / (x.var(0, correction=0) + net.twice.eps).sqrt() * net.twice.weight + net.twice.bias
    second = 3 * first + 1
    assert torch.allclose(adapted["twice.running_mean"], (x.mean(0) + second.mean(0)) / 2, rtol=0, atol=1e-12)
    variance = (x.var(0, correction=0) + second.var(0, correction=0)) / 2
    assert torch.allclose(adapted["twice.running_var"], variance, rtol=0, atol=1e-12)
    assert (adapted["aside.running_mean"] == 5).all()


def test_adapted_statistics_are_the_last_to_change_weights():
    """Wherever it is listed, fine-tuning comes before."""
    one = played(methods.fedavg() + parts.adapted_statistics() + parts.finetune(epochs=1))
    other = played(methods.fedavg_ft(epochs=1) + parts.adapted_statistics())
    assert torch.equal(predictions(one), predictions(other))
    assert not torch.equal(predictions(one), predictions(played(methods.adabn())))


# FedTHE


def heads(made, client="ada", x=X):
    """Return features and the outputs of both heads."""
    own = made.personal(client)
    net = made.model.module(own)
    z = net[:-1](x)
    g = nn.functional.linear(z, own["6.weight"], own["6.bias"])
    p = nn.functional.linear(z, own["6.head_ensemble.weight"], own["6.head_ensemble.bias"])
    return z.detach(), g, p


def test_without_steps_both_heads_count_alike():
    made = played(methods.fedthe(steps=0))
    _, g, p = heads(made)
    assert torch.allclose(predictions(made), (g + p) / 2, rtol=0, atol=1e-12)
    assert (g - p).abs().max() > 0.1


def test_a_client_that_never_trained_predicts_with_the_shared_head():
    """Its own head is the shared one, whatever their weights; here nobody's trains."""
    made = played(methods.fedthe(epochs=0), rounds=1, participation=0.5)
    absent = next(c for c in made.clients if c not in made.memory)
    general = made.model.predict(made.general(), X)
    assert torch.allclose(predictions(made, absent), general, rtol=0, atol=1e-12)
    seen = next(iter(made.memory))
    assert (predictions(made, seen) - general).abs().max() > 1e-3


def test_an_input_alone_is_predicted_alone():
    alone, among = (played(methods.fedthe(alone=beta)) for beta in (1.0, 0.1))
    assert torch.allclose(predictions(alone, x=X.flip(0)), predictions(alone).flip(0), rtol=0, atol=1e-12)
    assert torch.allclose(predictions(alone, x=X[4:5]), predictions(alone)[4:5], rtol=0, atol=1e-12)
    assert torch.allclose(predictions(among, x=X[:5]), predictions(among)[:5], rtol=0, atol=1e-12)  # those after it
    assert (predictions(among, x=X.flip(0)) - predictions(among).flip(0)).abs().max() > 1e-4


def test_before_the_first_round_features_do_not_decide():
    made = federation(methods.fedthe())
    own, (z, g, p) = made.personal("ada"), heads(made)
    shared, mine = network()[-1], nn.Linear(6, 3).double()
    mine.load_state_dict({n: own[f"6.head_ensemble.{n}"] for n in ("weight", "bias")})
    assert (g - p).abs().max() > 1e-3
    expected = transductive.mixed(z, (shared, mine), (None, z[0]), 20, 0.1, 0.1, 0.1)
    assert torch.allclose(predictions(made), expected, rtol=0, atol=1e-11)


SURE = 50 * torch.eye(2).double()


@pytest.mark.parametrize("apart", [-1.0, 1.0])
def test_where_heads_disagree_features_decide(apart):
    """The share of the own head grows with each step where the features are nearer to the client's mean."""
    shares = [_shares(SURE[:1], SURE[1:], torch.tensor([apart]).double(), steps, 0.1).item() for steps in range(8)]
    assert shares[0] == 0.5
    assert sorted(shares, key=lambda share: -apart * share) == shares
    assert len(set(shares)) == 8


def test_where_heads_agree_the_surer_one_counts():
    """The features, which are nearer to the cohort's mean, decide nothing."""
    shared, far = torch.tensor([[3.0, 0.0, 0.0]]).double(), torch.tensor([0.01]).double()
    for factor, surer in ((2.0, True), (0.8, False)):
        assert (_shares(shared, factor * shared, far, 5, 0.1).item() > 0.5) == surer


def test_the_first_step_of_adam_is_as_long_as_its_rate():
    share = _shares(SURE[:1], SURE[1:], torch.tensor([-3.0]).double(), 1, 0.2)
    assert share.item() == pytest.approx(1 / (1 + torch.tensor(-0.4).exp().item()), abs=1e-7)


def test_the_running_mean_begins_at_the_first_input():
    found = _running(torch.tensor([[1.0], [2.0], [4.0]]).double(), 0.25)
    assert found.flatten().tolist() == pytest.approx([1.0, 1.25, 1.9375])


def test_many_inputs_are_seen_in_their_order():
    """More than one pass looks at."""
    made = played(methods.fedthe(alone=1.0))
    x = examples("many", 2 * CHUNK + 7)[0]
    shares = made.deployed("ada").at(x)["6.head_ensemble.share"]
    for at in (0, CHUNK, 2 * CHUNK + 6):
        own = made.deployed("ada").at(x[at : at + 1])
        assert torch.allclose(own["6.head_ensemble.share"], shares[at], rtol=0, atol=1e-12)
    assert shares.std() > 1e-3


def test_the_own_head_waits_in_local_training_and_all_else_for_the_own_head():
    """Not even weight decay moves it then, nor momentum; and before, nothing but the own head moves."""
    made = federation(methods.fedthe(), training=DECAYING)
    made.play()
    made.play()
    work, before = made.assignment("ada", "train"), made.memory.get("ada")["share"]
    start = _begin(made.method, made.model, made.training, work)[0]
    end = made.worker.train(work).memory["share"]
    for name in ("6.head_ensemble.weight", "6.head_ensemble.bias"):
        assert torch.equal(end[name], start[name])
        assert not torch.equal(end[name], before[name])
    assert all(torch.equal(start[name], tensor) for name, tensor in made.server["share"].items())
    assert torch.equal(start["1.num_batches_tracked"], before["1.num_batches_tracked"])


def test_the_shared_model_is_the_shared_head_alone():
    made, plain = played(methods.fedthe()), played(Method((parts.share(), parts.balanced_softmax(added=1))))
    assert torch.equal(made.model.predict(made.general(), X), plain.model.predict(plain.general(), X))


def test_a_head_without_bias_has_an_own_head_without_bias():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False)).double()
    clients = {"a": ClientData(train=(torch.ones(4, 2).double(), torch.arange(4) % 2))}
    made = Federation(Model(net), methods.fedthe(), Training(), 1, 1.0, 0, clients)
    made.play()
    assert [n for n in made.personal("a") if "head_ensemble" in n] == [
        "1.head_ensemble.weight",
        "1.head_ensemble.share",
    ]
    assert made.deployed("a").at(torch.ones(5, 2).double())["1.head_ensemble.share"].shape == (5,)


def without_normalization():
    net = nn.Linear(2, 2)
    clients = {"a": ClientData(train=(torch.ones(4, 2), torch.arange(4) % 2))}
    Federation(Model(net), methods.adabn(), Training(), 1, 1.0, 0, clients)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (without_normalization, "no batch normalization layer"),
        (lambda: parts.head_ensemble(epochs=-1), "epochs and steps must be at least 0, got -1, 20"),
        (lambda: parts.head_ensemble(steps=-1), "epochs and steps must be at least 0, got 1, -1"),
        (lambda: parts.head_ensemble(lr=0.0), "lr must be above 0"),
        (lambda: parts.head_ensemble(momentum=0.0), r"momentum must be in \(0, 1\]"),
        (lambda: parts.head_ensemble(alone=1.5), r"alone must be in \[0, 1\]"),
        (lambda: parts.balanced_softmax(added=-1), "added must be at least 0"),
        (
            lambda: federation(methods.fedavg() + parts.head_ensemble(names=scope.batch_norm)),
            "must be a linear layer from features to classes",
        ),
        (
            lambda: federation(methods.knnper() + parts.adapted_statistics()).deployed("ada"),
            "adapted_statistics reads the inputs to predict: no other part can fill buffers before it",
        ),
        (
            lambda: federation(methods.fedthe() + parts.adapted_statistics()).deployed("ada").at(X),
            "list adapted_statistics before the part that fills buffers",
        ),
    ],
)
def test_one_line_for_what_cannot_be(make, line):
    with pytest.raises(UsageError, match=line):
        make()
