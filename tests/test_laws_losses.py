"""What must hold of losses of their own, whatever the numbers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from idiolect import ClientData, Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.rng import normal_hash
from idiolect.core.tree import Tree, combine, vectors
from idiolect.core.types import Batch
from idiolect.engines.federation import Federation
from idiolect.rounds.client import client_round
from idiolect.running.describe import describe
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, federation, network

ONE_STEP = Training(lr=0.3, local_epochs=1, batch_size=None)


def linear_world(method, y, rounds=1, training=ONE_STEP, classes=3):
    """Two clients with three features and these labels, and a linear model in two layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes)).double()
    clients = {name: ClientData(train=(torch.randn(len(y), 3).double(), torch.tensor(y))) for name in "ab"}
    made = Federation(Model(net), method, training, rounds, 1.0, 0, clients)
    for _ in range(rounds):
        made.play()
    return made


def objective_of(made, name, client="a"):
    """Return the objective of a part as a client would train on it now, and the client's whole batch."""
    seen = {}
    part = next(p for p in made.method.parts if p.name == name)

    def finish(local):
        seen["made"] = part.objective(local)
        return part.finish(local) if part.finish else (local.memory, Tree.of({}))

    spy = replace(part, finish=finish, objective=None)
    method = Method(tuple(spy if p is part else p for p in made.method.parts))
    client_round(method, made.learner, made.training, made.assignment(client, "train"))
    return seen["made"], Batch(*made.clients[client].train)


@pytest.mark.parametrize(
    "method", [methods.fedlc(), methods.fedntd(), methods.moon(), methods.fedrod(), methods.fedproto(), methods.fedcr()]
)
def test_a_method_describes_itself(method):
    assert describe(method, Model(network()))


@pytest.mark.parametrize("part", [parts.calibrated_logits(1.0), parts.balanced_softmax()])
def test_classes_as_frequent_as_each_other_need_no_calibration(part):
    training = Training(lr=0.3, local_epochs=2, batch_size=4)
    for y, alike in (([0, 1, 2] * 4, True), ([0] * 6 + [1] * 4 + [2] * 2, False)):
        plain = linear_world(methods.fedavg(), y, 2, training).server["share"]
        found = linear_world(methods.fedavg() + part, y, 2, training).server["share"]
        assert ((plain - found).flat.abs().max() < 1e-12) == alike


def test_margins_by_hand():
    """One example of class 0, sixteen of class 1: margins tau and tau / 2; outputs of 0 lose by their difference."""
    made = linear_world(Method((parts.share(), parts.calibrated_logits(0.6))), [0] + [1] * 16, 0)
    objective, batch = objective_of(made, "calibrated_logits")
    weights = made.model.initial.clone()
    weights.flat.zero_()
    of_class_0 = Batch(batch.x[:1], batch.y[:1])
    found = made.model.grad(weights, of_class_0, objectives=[objective]).loss
    assert found.item() == pytest.approx(math.log(1 + math.exp(0.6 - 0.3) + math.exp(0.6 - 60)), abs=1e-12)


def test_counts_by_hand():
    made = linear_world(Method((parts.share(), parts.balanced_softmax())), [0] + [1] * 3 + [2] * 4, 0)
    objective, batch = objective_of(made, "balanced_softmax")
    weights = made.model.initial.clone()
    weights.flat.zero_()
    found = made.model.grad(weights, Batch(batch.x[:1], batch.y[:1]), objectives=[objective]).loss
    assert found.item() == pytest.approx(math.log(8), abs=1e-12)


def test_the_received_model_teaches_nothing_to_itself():
    """One step from the received model is FedAvg's, two are not."""
    y = [0, 1, 2, 2, 1, 2]
    for epochs in (1, 2):
        training = Training(lr=0.3, local_epochs=epochs, batch_size=None)
        plain = linear_world(methods.fedavg(), y, 1, training).server["share"]
        found = linear_world(methods.fedntd(), y, 1, training).server["share"]
        assert ((plain - found).flat.abs().max() < 1e-12) == (epochs == 1)


def test_of_two_classes_one_is_not_true_for_certain():
    training = Training(lr=0.3, local_epochs=3, batch_size=2)
    plain, found = (linear_world(m, [0, 1, 1, 0, 1], 2, training, 2) for m in (methods.fedavg(), methods.fedntd(5.0)))
    same({"share": found.server["share"]}, {"share": plain.server["share"]}, 1e-12)


def test_distillation_by_hand():
    """Teacher (0, log 3, 0), student (0, 0, 0), label 0: KL of (3/4, 1/4) from (1/2, 1/2)."""
    made = linear_world(Method((parts.share(), parts.not_true_distillation(2.0))), [0], 0)
    objective, batch = objective_of(made, "not_true_distillation")
    weights = made.model.initial.clone()
    weights.flat.zero_()
    teacher = weights.clone()
    teacher["2.bias"][1] = math.log(3)
    found = made.model.grad(weights, batch, objectives=[objective._replace(facts=teacher)]).loss
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.item() == pytest.approx(math.log(3) + 2 * kl, abs=1e-12)


def test_the_first_time_there_is_nothing_to_contrast_with():
    one, plain = federation(methods.moon(5.0)), federation(methods.fedavg())
    assert one.play().loss == pytest.approx(plain.play().loss, abs=1e-12)
    same({"share": one.server["share"]}, {"share": plain.server["share"]}, 1e-12)
    one.play()
    plain.play()
    assert (one.server["share"] - plain.server["share"]).flat.abs().max() > 1e-4


def test_a_last_model_that_is_the_received_one_costs_log_2_and_pulls_nowhere():
    made = federation(methods.moon(3.0))
    for client in SIZES:
        memory = made.memory.get(client)
        row = made.model.initial.flat
        memory["model_contrast"] = vectors(last=row, trained=row.new_ones(1))
        made.memory.put(client, memory)
    objective, batch = objective_of(made, "model_contrast", "ada")
    found = made.model.grad(made.model.initial, batch, objectives=[objective])
    plain = made.model.grad(made.model.initial, batch)
    assert (found.loss - plain.loss).item() == pytest.approx(3 * math.log(2), abs=1e-12)
    assert (found.gradient - plain.gradient).flat.abs().max() < 1e-12


def test_the_private_head_leaves_the_shared_model_alone():
    training = Training(lr=0.3, local_epochs=2, batch_size=4)
    y = [0, 1, 2, 2, 1, 2]
    plain = linear_world(methods.fedavg(), y, 2, training)
    found = linear_world(methods.fedavg() + parts.private_head(), y, 2, training)
    same({"share": found.server["share"]}, {"share": plain.server["share"]}, 1e-12)
    assert found.personal("a")["2.private.weight"].abs().max() > 1e-3


def test_who_predicts_with_which_head():
    made = federation(methods.fedrod())
    made.play()
    plain = Model(network())
    x, _ = made.clients["ada"].test
    general, own = made.general(), made.personal("ada")
    shared = plain.predict(combine(plain.structure.layout, plain.initial, made.server["share"]), x)
    assert torch.equal(made.model.predict(general, x), shared)
    features = made.model.module(own)[:-1](x).detach()
    expected = shared + features @ own["6.private.weight"].T + own["6.private.bias"]
    assert torch.allclose(made.model.predict(own, x), expected, rtol=0, atol=1e-12)
    assert (expected - shared).abs().max() > 1e-3


def test_a_private_head_stands_beside_a_linear_layer_alone():
    net = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()).double()
    with pytest.raises(UsageError, match=r"named\('0'\) must be a linear layer"):
        Model(net).extended(Method((parts.share(), parts.private_head(scope.named("0")))).attach)


def test_without_prototypes_there_is_no_pull():
    found, plain = federation(methods.fedproto(9.0)), federation(methods.local())
    for rounds in (1, 2):
        found.play()
        plain.play()
        gap = max(float((found.personal(c) - plain.personal(c)).flat.abs().max()) for c in SIZES)
        assert (gap < 1e-12) == (rounds == 1)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_prototypes_by_hand(weighting):
    """Two clients with classes 0 and 0, 1: a class absent from both has no prototype, one absent now keeps its own."""
    made = linear_world(methods.fedproto(weighting=weighting), [0], 0)
    x = {name: torch.randn(n, 3).double() for name, n in (("a", 2), ("b", 4))}
    made.clients = {
        "a": ClientData(train=(x["a"], torch.tensor([0, 0]))),
        "b": ClientData(train=(x["b"], torch.tensor([0, 1, 1, 1]))),
    }
    made.play()
    z = {name: made.model.module(made.personal(name))[:-1](x[name]).detach() for name in "ab"}
    state = made.server["prototypes"]
    by = {"samples": (z["a"].sum(0) + z["b"][0]) / 3, "uniform": (z["a"].mean(0) + z["b"][0]) / 2}
    assert torch.allclose(state["prototypes"][0], by[weighting], rtol=0, atol=1e-12)
    assert torch.allclose(state["prototypes"][1], z["b"][1:].mean(0), rtol=0, atol=1e-12)
    assert state["known"].tolist() == [1, 1, 0]
    made.participation = 0.5
    while made.cohort() != ["a"]:
        made.round += 1
    made.play()
    assert torch.equal(made.server["prototypes"]["prototypes"][1], state["prototypes"][1])
    assert not torch.equal(made.server["prototypes"]["prototypes"][0], state["prototypes"][0])
    assert made.server["prototypes"]["known"].tolist() == [1, 1, 0]


def gaussian_world(**settings):
    method = Method((parts.share(~scope.head), parts.class_gaussians(**{"strength": 0.5, "samples": 3, **settings})))
    return linear_world(method, [0, 1, 1, 0], 0)


def test_features_with_hardly_any_spread_and_no_hold_are_plain():
    made = gaussian_world(strength=0.0)
    objective, batch = objective_of(made, "class_gaussians")
    losses = {}
    for bias in (-50.0, 0.0):
        weights = made.model.initial.clone()
        weights["2.spread.bias"].fill_(bias)
        plain = made.model.grad(weights, batch).loss
        losses[bias] = float((made.model.grad(weights, batch, objectives=[objective]).loss - plain).abs())
    assert losses[-50.0] < 1e-3 < losses[0.0]


def test_noise_is_of_the_client_and_the_step():
    made = gaussian_world()
    found = set()
    for client in "ab":
        objective, _ = objective_of(made, "class_gaussians", client)
        batch = Batch(*made.clients["a"].train)
        for steps in (0, 1):
            weights = made.model.initial.clone()
            weights["2.noise.steps"].fill_(steps)
            losses = [made.model.grad(weights, batch, objectives=[objective]).loss.item() for _ in range(2)]
            assert losses[0] == losses[1]
            found.add(losses[0])
    assert len(found) == 4
    for rounds in (1, 2):
        made.play()
        assert made.personal("a")["2.noise.steps"].item() == rounds


def test_hashed_normal_numbers():
    """Moments of a standard normal, in any form asked for: a row for each seed, odd counts, single precision."""
    seeds = torch.tensor([[5], [6]])
    rows = normal_hash(seeds, 20_001, torch.float64)
    assert rows.shape == (2, 1, 20_001)
    assert torch.equal(rows[1, 0], normal_hash(torch.tensor(6), 20_001, torch.float64))
    z = rows[0, 0]
    moments = [float(m) for m in (z.mean(), z.square().mean(), z.pow(3).mean(), z.pow(4).mean())]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.15)
    assert torch.corrcoef(torch.stack([z, rows[1, 0]]))[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([z[:10_000], z[10_001:]]))[0, 1].abs() < 0.03
    assert torch.isfinite(normal_hash(torch.arange(50), 1000, torch.float32)).all()


def test_both_passes_of_sam_see_the_same_noise():
    exchange, gaussians = parts.share(~scope.head), parts.class_gaussians(0.1, 2)
    plain = played(Method((exchange, gaussians)), rounds=2)
    for order in ((parts.sam(1e-9), gaussians), (gaussians, parts.sam(1e-9))):
        sharp = played(Method((exchange, *order)), rounds=2)
        assert (sharp.server["share"] - plain.server["share"]).flat.abs().max() < 1e-7
        assert sharp.personal("ada")["6.noise.steps"].item() == plain.personal("ada")["6.noise.steps"].item()


def test_gaussians_by_hand():
    """All deviations are softplus(0) where V stays zero; class 2 has no example and keeps N(0, 1)."""
    made = gaussian_world(renewal=0.25)
    made.training = replace(made.training, lr=1e-300)
    made.play()
    state, sigma = made.server["class_gaussians"], math.log(2)
    body = made.model.module(made.model.initial)[:-1]
    z = torch.cat([body(made.clients[name].train.x[[0, 3]]).detach() for name in "ab"])
    precision = 1 + 4 / sigma**2
    assert torch.allclose(state["mean"][0], 0.25 * z.sum(0) / sigma**2 / precision, rtol=0, atol=1e-12)
    assert torch.allclose(state["deviation"][0], torch.full((4,), 0.75 + 0.25 / precision**0.5).double(), atol=1e-12)
    assert not state["mean"][2].any()
    assert (state["deviation"][2] == 1).all()
    made.clients = {
        name: ClientData(train=(data.train.x[[0]], data.train.y[[0]])) for name, data in made.clients.items()
    }
    made.play()
    after = made.server["class_gaussians"]
    assert not torch.equal(after["mean"][0], state["mean"][0])
    assert all(torch.equal(after[name][1:], state[name][1:]) for name in ("mean", "deviation"))


def test_the_direction_of_the_divergence():
    """One dimension of many by hand: features at z with softplus(0), a class at 0 with deviation 1."""
    found = {}
    for kl in ("code", "bound"):
        made, free = gaussian_world(kl=kl), gaussian_world(strength=0.0)
        weights = made.model.initial.clone()
        weights.flat.zero_()
        held, _ = objective_of(made, "class_gaussians")
        alone, batch = objective_of(free, "class_gaussians")
        losses = [made.model.grad(weights, batch, objectives=[o]).loss.item() for o in (held, alone)]
        found[kl] = (losses[0] - losses[1]) / 0.5 / 4
    s = math.log(2)
    assert found["code"] == pytest.approx(math.log(s) + 1 / (2 * s**2) - 0.5, abs=1e-12)
    assert found["bound"] == pytest.approx(-math.log(s) + s**2 / 2 - 0.5, abs=1e-12)


def test_features_predict_by_their_means():
    made = federation(methods.fedcr(1e-3, 2))
    x, _ = made.clients["ada"].test
    assert torch.equal(made.model.predict(made.model.initial, x), Model(network()).predict(Model(network()).initial, x))


def test_losses_that_compare_classes_refuse_other_targets():
    made = federation(
        methods.fedntd(), clients={"a": ClientData(train=(torch.rand(4, 1, 6, 6).double(), torch.rand(4, 3)))}
    )
    with pytest.raises(UsageError, match="one class label per example"):
        made.play()
