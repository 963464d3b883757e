"""What must hold of the parts that look at features, whatever the numbers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect import Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import pick
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.stacked import Stacked
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network

ONE_STEP = Training(lr=0.1, batch_size=None)


def tiny(weight=1.0, loss=F.cross_entropy, outputs=2):
    """Return a model with one feature, w x, and a head without bias."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, outputs, bias=False)).double()
    nn.init.constant_(net[0].weight, weight)
    nn.init.constant_(net[1].weight, 1.0)
    return Model(net, loss)


def held(**clients):
    """Return clients that hold these (x, y)."""
    return {
        name: ClientData(train=(torch.tensor(x).double()[:, None], torch.tensor(y))) for name, (x, y) in clients.items()
    }


def world(method, clients, model=None, training=ONE_STEP):
    return Federation(model or tiny(), method, training, 4, 1.0, 0, clients)


def no_loss(outputs, y):
    return 0 * outputs.sum()


# FedDBE


def test_mean_features_are_pulled_together_as_known_by_hand():
    """With no loss but the regularizer a step is lr kappa (m - consensus) times the slope of m, momentum times x."""
    clients = held(a=([0.0, 2.0], [0, 1]), b=([3.0, 3.0], [0, 1]))
    for momentum, expected in ((1.0, [1 + 0.2, 1 - 0.6]), (0.5, [1 + 0.05, 1 - 0.15])):
        made = world(methods.feddbe(strength=2.0, momentum=momentum), clients, tiny(loss=no_loss))
        made.play()
        assert made.server["share"]["0.weight"].item() == 1.0
        assert made.server["domain_bias"]["mean"].item() == 2.0 * momentum
        made.play()
        assert made.server["share"]["0.weight"].item() == pytest.approx(sum(expected) / 2, abs=1e-12)
        assert made.server["domain_bias"]["mean"].item() == 2.0 * momentum


def test_the_first_round_of_feddbe_is_averaging_and_the_vectors_wait_for_it():
    made, plain = federation(methods.feddbe()), federation(methods.fedavg())
    for round_ in range(2):
        made.play()
        plain.play()
        vectors = [made.memory.get(c)["share"]["6.domain_bias.vector"] for c in SIZES]
        if round_ == 0:
            same({"": made.server["share"]}, {"": plain.server["share"]}, 1e-12)
            assert not any(v.any() for v in vectors)
    assert all(v.abs().min() > 0 for v in vectors)


def test_a_vector_on_features_is_a_bias_of_the_head():
    made = played(methods.feddbe(strength=0.0))
    own, x = made.personal("ada"), examples("ada", 6)[0]
    net = network()
    net.load_state_dict({n: t for n, t in made.model.tensors(own).items() if "domain_bias" not in n})
    with torch.no_grad():
        net[-1].bias += net[-1].weight @ own["6.domain_bias.vector"]
        assert torch.allclose(made.model.predict(own, x), net.eval()(x), atol=1e-12)
    assert (own["6.domain_bias.mean"] == 0).all()


def test_the_features_of_clients_settle_where_they_are_nearest_to_the_consensus():
    """Without a loss but the regularizer, w goes to the least squares of w x against the consensus."""
    clients = held(a=([0.0, 2.0], [0, 1]), b=([3.0, 3.0], [0, 1]))
    made = world(methods.feddbe(strength=0.5, momentum=1.0), clients, tiny(loss=no_loss))
    for _ in range(60):
        made.play()
    assert made.server["share"]["0.weight"].item() == pytest.approx(2.0 * (1 + 3) / (1 + 9), abs=1e-5)


# kNN-Per


def test_neighbors_alone_and_the_model_alone():
    alone = played(methods.knnper(1, share_of_neighbors=1.0))
    x, y = alone.clients["dan"].train
    found = alone.model.predict(alone.personal("dan"), x)
    assert torch.allclose(found.gather(1, y[:, None]), torch.zeros(1).double(), atol=1e-12)  # each is its own nearest
    assert (found.exp().sum(dim=1) - 1).abs().max() < 1e-12
    model = played(methods.knnper(share_of_neighbors=0.0))
    plain = played(methods.fedavg())
    same({"": model.server["share"]}, {"": plain.server["share"]})
    logits = plain.model.predict(plain.personal("dan"), x)
    found = model.model.predict(model.personal("dan"), x)
    assert torch.allclose(found, logits.log_softmax(1), atol=1e-12)
    training = [made.model.module(made.personal("dan")).train()(x) for made in (model, plain)]
    assert torch.equal(*training)


def test_votes_by_hand():
    """Features are 2x; squared distances 4 and 16, over d s = 4, are votes of e^-1 and e^-4; the third is too far."""
    clients = held(a=([0.0, 3.0, 9.0, 9.0], [0, 1, 1, 1]))
    made = world(methods.knnper(2, 0.75, capacity=50, scale=4.0), clients, tiny(weight=2.0))
    for x, far in (([[1.0]], (4.0, 16.0)), ([[-1.0]], (4.0, 64.0))):
        votes = [math.exp(-f / 4) for f in far]
        expected = [0.75 * v / sum(votes) + 0.25 * 0.5 for v in votes]  # the head gives both classes the same
        found = made.model.predict(made.personal("a"), torch.tensor(x).double()).exp()
        assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    lost = made.model.predict(made.personal("a"), torch.tensor([[1e6]]).double()).exp()
    assert lost[0].tolist() == pytest.approx([0.125, 0.875], abs=1e-12)


def test_what_is_kept_is_drawn_by_the_seed_even_from_a_single_batch():
    clients = held(a=([float(i) for i in range(1, 41)], [0] * 20 + [1] * 20))
    made = world(methods.knnper(capacity=10), clients)

    def kept():
        own = made.personal("a")
        return sorted(own["1.nearest_neighbors.features"][:, 0].tolist()), own["1.nearest_neighbors.labels"]

    first, labels = kept()
    assert len(set(first)) == 10
    assert set(labels.tolist()) == {0.0, 1.0}
    assert kept()[0] == first
    made.seed = 1
    assert kept()[0] != first


def test_neighbors_are_looked_for_among_features_without_a_clients_own_vector():
    made = federation(methods.feddbe() + parts.nearest_neighbors(1, 1.0))
    made.play()
    memory = made.memory.get("dan")
    memory["share"].flat[memory["share"].layout.starts["6.domain_bias.vector"]] = 50.0
    made.memory.put("dan", memory)
    x, y = made.clients["dan"].train
    own = made.personal("dan")
    assert own["6.domain_bias.vector"][0] == 50.0
    assert made.model.predict(own, x).argmax(1).tolist() == y.tolist()


def test_training_carries_no_kept_example():
    made = federation(methods.knnper(capacity=10_000))
    assert made.model.structure.layout.total == Model(network()).structure.layout.total
    assert made.memory.get("ada")["share"].nbytes == federation(methods.fedavg()).memory.get("ada")["share"].nbytes


def test_neighbors_need_labels():
    clients = held(a=([0.0, 1.0], [0.5, 1.5]))
    with pytest.raises(UsageError, match="class labels"):
        world(methods.knnper(), clients, tiny(loss=F.l1_loss)).personal("a")


# FedAS


def test_alignment_by_hand():
    """Features w x: class 0 (x = 1, twice) is to be at 3, class 1 (x = 2) at 0: the slope is 2 (w - 3) + 4 (2 w)."""
    clients = held(a=([1.0, 1.0, 2.0], [0, 0, 1]))
    made = world(Method((parts.share(~scope.head), parts.feature_alignment(lr=0.05))), clients)
    assert made.personal("a")["0.weight"].item() == 1.0  # nothing is known to align to
    memory = made.memory.get("a")
    memory["feature_alignment"].flat.copy_(torch.tensor([3.0, 0.0, 1.0]).double())
    made.memory.put("a", memory)
    assert made.personal("a")["0.weight"].item() == pytest.approx(1 - 0.05 * (2 * -2 + 8), abs=1e-12)
    assert torch.equal(made.personal("a")["1.weight"], torch.ones(2, 1).double())
    made.play()
    w = made.server["share"]["0.weight"].item()
    assert made.memory.get("a")["feature_alignment"].flat.tolist() == pytest.approx([w, 2 * w, 1.0], abs=1e-12)


def test_a_body_that_has_the_features_already_stays():
    """One client alone receives its own body; where a class has one example, its features are the class's mean."""
    clients = {"a": ClientData(train=(examples("ada", 3)[0], torch.tensor([0, 2, 1])))}
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    made = Federation(Model(net), methods.fedas(epochs=3), ONE_STEP, 4, 1.0, 0, clients)
    made.play()
    names = set(made.server["share"])
    assert torch.allclose(pick(made.personal("a"), names).flat, made.server["share"].flat, atol=1e-12)


def test_in_a_stack_too_a_client_that_has_not_trained_aligns_nothing():
    made = federation(methods.fedas(), participation=0.5, engine=Stacked(4))
    cohort = made.play().cohort
    bodies = {}

    def body(worker, data, own, shared):
        client = next(c for c in SIZES if made.clients[c] is data)
        bodies[client] = own.weights["0.weight"]
        return []

    list(made.engine.measure(made, list(SIZES), body))
    stayed = {c for c, body in bodies.items() if torch.equal(body, made.server["share"]["0.weight"])}
    assert stayed == set(SIZES) - set(cohort)


def squares(outputs, y):
    return 0.5 * (outputs - y).square().mean()


def test_fisher_weights_by_hand():
    """On (w - a)^2 / 2 a step of 1/2 from 0 goes to a / 2, where the gradient is -a / 2; examples do not count."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    clients = {n: ClientData(train=(torch.ones(k, 1).double(), torch.full((k, 1), a).double())) for n, k, a in _TARGETS}
    half = Training(lr=0.5, batch_size=None)
    made = Federation(Model(net, squares), Method((parts.share(), parts.fisher_weights())), half, 4, 1.0, 0, clients)
    made.play()
    assert made.server["share"]["weight"].item() == pytest.approx((4 * 2 - 0.25 * 0.5) / 4.25, abs=1e-12)


_TARGETS = [("a", 1, 4.0), ("b", 10, -1.0)]


def test_who_has_nothing_left_to_learn_does_not_count_unless_nobody_has():
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)

    def after(*targets):
        clients = {f"{a}": ClientData(train=(torch.ones(2, 1).double(), torch.full((2, 1), a))) for a in targets}
        method, full = Method((parts.share(), parts.fisher_weights())), Training(lr=1.0, batch_size=None)
        made = Federation(Model(net, steep), method, full, 4, 1.0, 0, clients)
        made.play()
        return made.server["share"]["weight"].item()

    def steep(outputs, y):
        """A step of 1 ends at the target, but for targets below 0."""
        return torch.where(y < 0, 0.5, 1.0).mean() * squares(outputs, y)

    assert after(4.0, -2.0) == pytest.approx(-1.0, abs=1e-9)
    assert after(4.0, 8.0) == pytest.approx(6.0, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: parts.domain_bias(-1.0), "strength must be at least 0"),
        (lambda: parts.domain_bias(momentum=0.0), "momentum must be in"),
        (lambda: parts.nearest_neighbors(0), "0 neighbors of 1000"),
        (lambda: parts.nearest_neighbors(share=1.5), "share must be in"),
        (lambda: parts.nearest_neighbors(scale=0.0), "scale must be above 0"),
        (lambda: parts.feature_alignment(-1), "epochs must be at least 0"),
        (lambda: parts.feature_alignment(lr=0.0), "lr must be above 0"),
        (
            lambda: federation(Method((parts.share(), parts.domain_bias(names=scope.batch_norm)))),
            "must be a linear layer",
        ),
    ],
)
def test_one_line_for_what_cannot_be(make, line):
    with pytest.raises(UsageError, match=line):
        make()
