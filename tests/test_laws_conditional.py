"""What must hold of the parts that condition features on the client, whatever the numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from idiolect import SGD, Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import EMPTY, pick
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts._gated_heads import discrepancy
from idiolect.rounds.client import client_round
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network, population

X = examples("unseen", 7)[0]
SETTINGS = Training(lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5), clip=5.0)


def unbiased():
    """Return the network with a head without bias."""
    net = network()
    net[-1] = nn.Linear(6, 3, bias=False).double()
    with torch.no_grad():
        net[-1].weight.copy_(network()[-1].weight)
    return net


def world(method, net=None):
    return Federation(Model(net or unbiased()), method, SETTINGS, 4, 1.0, 0, population())


def after(made, rounds=3):
    for _ in range(rounds):
        made.play()
    return made


def objective_of(made, client):
    """Return the objective of the last part as a client would train on it now."""
    *others, last = made.method.parts
    seen = []

    def finish(local):
        seen.append(last.objective(local))
        return local.memory, EMPTY

    method = Method((*others, replace(last, finish=finish, aggregate=None, deploy=None)))
    client_round(method, made.learner, made.training, made.assignment(client, "train"))
    return seen[0]


def outputs(made, client, x=X):
    return made.learner.predict(made.personal(client), x)


def follows(made, plain):
    """Assert that what both share is equal, and so are the predictions for every client."""
    same({"": pick(made.server["share"], plain.server["share"])}, {"": plain.server["share"]}, 1e-12)
    for client in SIZES:
        assert torch.allclose(outputs(made, client), outputs(plain, client), rtol=0, atol=1e-12)


# FedCP


def with_gate(personal):
    """Return a federation in which the gate gives all to one of two heads without bias."""
    made = world(methods.fedcp(strength=0.0))
    share = made.server["share"]
    share["6.gate.scale"].fill_(0.0)
    share["6.gate.shift"].fill_(0.0)[:6] = 200.0 if personal else 0.0
    share["6.gate.shift"][6:] = 0.0 if personal else 200.0
    return made


def test_a_gate_that_gives_all_to_the_personal_head_is_fedper():
    follows(after(with_gate(personal=True)), after(world(methods.fedper())))


def test_a_gate_that_gives_all_to_the_shared_head_trains_a_body_for_a_fixed_head():
    made = after(with_gate(personal=False))
    follows(made, after(world(Method((parts.share(~scope.head), parts.freeze(scope.head))))))
    assert torch.equal(made.server["gated_heads"]["weight"], network()[-1].weight)
    for client in SIZES:
        assert torch.equal(made.memory.get(client)["share"]["6.weight"], network()[-1].weight)


def test_a_client_that_has_not_trained_has_two_equal_heads_whatever_the_gate():
    """Then the outputs are H z + 2 b, with the newest shared head."""
    made = played(methods.fedcp(), rounds=2, participation=0.25)
    absent = [c for c in SIZES if c not in made.memory or not made.memory.get(c)["gated_heads"]["flag/trained"]]
    assert absent
    net, shared = network(), made.server["gated_heads"]
    assert (shared["weight"] - net[-1].weight).abs().max() > 1e-3
    own = made.model.tensors(made.personal(absent[0]))
    net.load_state_dict({n: own[n] for n in net.state_dict()})
    expected = net.eval()(X) + shared["bias"]
    with torch.no_grad():
        assert torch.allclose(outputs(made, absent[0]), expected, atol=1e-12)
        assert torch.equal(net[-1].weight, shared["weight"])


def test_noise_is_of_the_client_and_the_step_and_predictions_have_none():
    made, found, batch = federation(methods.fedcp()), set(), Batch(*examples("ada", 8))
    for client in ("ada", "ben"):
        objective = objective_of(made, client)
        for steps in (0, 1):
            weights = made.model.initial.clone()
            weights["6.noise.steps"].fill_(steps)
            weights["6.weight"].mul_(2)  # with equal heads no gate and no noise is seen
            losses = [made.model.grad(weights, batch, objectives=[objective]).loss.item() for _ in range(2)]
            assert losses[0] == losses[1]
            found.add(losses[0])
    assert len(found) == 4
    made.play()
    assert torch.equal(outputs(made, "ada"), outputs(made, "ada"))
    steps = {c: made.memory.get(c)["share"]["6.noise.steps"].item() for c in SIZES}
    assert steps == {c: 2 * n / 8 for c, n in SIZES.items()}


def test_noise_is_logistic():
    """The share of a gate without weights is then uniform on (0, 1)."""
    made = federation(methods.fedcp(strength=0.0))
    weights, batch, shares = made.model.initial.clone(), Batch(*examples("ada", 2000)), []
    weights["6.gate.scale"].zero_()
    objective = objective_of(made, "ada")
    gate = made.model.training[-1].gate
    before = gate.share
    gate.share = lambda *given: shares.append(before(*given)) or shares[-1]
    made.model.grad(weights, batch, objectives=[objective])
    uniform = shares[0].detach().flatten().sort().values
    assert (uniform - torch.linspace(0, 1, len(uniform))).abs().max() < 0.02


def test_features_of_the_received_body_do_not_differ_from_themselves():
    z = torch.randn(5, 4, dtype=torch.float64)
    other = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    assert discrepancy(z, z).item() == 0.0
    assert discrepancy(z, other).item() == pytest.approx(discrepancy(other, z).item(), abs=1e-15)
    assert discrepancy(z, other).item() > 0.01
    near = z.clone().requires_grad_()
    slopes = [torch.autograd.grad(discrepancy(v, z), v)[0].abs().max().item() for v in (near, other)]
    assert slopes[0] < 1e-15 < 1e-3 < slopes[1]


def test_the_pull_begins_at_zero_and_holds_the_distribution_of_features():
    """Without batch normalization the first step of a round is that without a pull."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    alone = {"ada": population()["ada"]}
    x, changes = alone["ada"].train.x, {}
    for epochs in (1, 40):
        training = Training(lr=0.5, local_epochs=epochs, batch_size=None)
        for strength in (0.0, 5.0):
            made = Federation(Model(net), methods.fedcp(strength), training, 4, 1.0, 0, alone)
            made.play()
            features = (m[:-1](x).detach() for m in (made.model.module(made.personal("ada")), net))
            changes[epochs, strength] = discrepancy(*features).item()
    assert changes[1, 0.0] == pytest.approx(changes[1, 5.0], rel=1e-9)
    assert changes[40, 5.0] < 0.5 * changes[40, 0.0]


def test_both_passes_of_sam_draw_the_same_noise():
    exchange, gated = parts.share(~scope.head), parts.gated_heads(1.0)
    plain = played(Method((exchange, gated)), rounds=1)
    for order in ((parts.sam(1e-9), gated), (gated, parts.sam(1e-9))):
        sharp = played(Method((exchange, *order)), rounds=1)
        assert (sharp.server["share"] - plain.server["share"]).flat.abs().max() < 1e-7


# GPFL


def valve(made, **leaves):
    """Fill tensors of the valve on the server."""
    for leaf, value in leaves.items():
        made.server["share"][f"6.valve.{leaf}"].copy_(torch.as_tensor(value, dtype=torch.float64))


def with_counts(counts):
    """Return a client with so many examples of each class."""
    x, _ = examples("ada", sum(counts))
    return ClientData(train=(x, torch.arange(3).repeat_interleave(torch.tensor(counts))))


def test_a_closed_valve_is_fedper_behind_a_kink():
    """gamma = beta = 0: the head gets the positive part of the features."""
    made, net = federation(methods.gpfl()), network()
    valve(made, scale=0.0)
    expected = nn.Sequential(*net[:-1], nn.ReLU(), net[-1]).eval()(X)
    assert torch.allclose(outputs(made, "ada"), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(outputs(federation(methods.gpfl()), "ada"), expected, rtol=0, atol=1e-3)


def test_clients_predict_by_their_shares_of_classes_alone():
    """Before they have trained, clients predict alike whose classes have the same proportions."""
    counts = {"one": (1, 2, 5), "two": (2, 4, 10), "three": (5, 2, 1)}
    made = federation(methods.gpfl(), clients={name: with_counts(n) for name, n in counts.items()})
    one, two, three = (outputs(made, name) for name in counts)
    assert torch.allclose(one, two, rtol=0, atol=1e-14)
    assert not torch.allclose(one, three, rtol=0, atol=1e-3)


def test_equal_counts_give_the_global_context():
    """Then both routes are one, at the newest embeddings."""
    made = federation(methods.gpfl(), clients={"even": with_counts((4, 4, 4)), "odd": with_counts((9, 1, 2))})
    for rounds in range(3):
        contexts = {c: made.personal(c)["6.context.own"] for c in ("even", "odd")}
        mean = made.server["share"]["6.valve.embeddings"].mean(0)
        assert torch.allclose(contexts["even"], mean, rtol=0, atol=1e-14), rounds
        assert not torch.allclose(contexts["odd"], mean, rtol=0, atol=1e-2), rounds
        made.play()


def test_cosines_know_no_length():
    """The loss is the same with embeddings of any length, if contexts and received embeddings stay."""
    made, batch = federation(methods.gpfl(strength=0.7)), Batch(*examples("ada", 8))
    objective = objective_of(made, "ada")
    losses = []
    for factors in ([1.0, 1.0, 1.0], [0.2, 3.0, 7.0], [1.0, -1.0, 1.0]):
        weights = made.model.initial.clone()
        weights["6.valve.embeddings"].mul_(torch.tensor(factors, dtype=torch.float64)[:, None])
        losses.append(made.model.grad(weights, batch, objectives=[objective]).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_features_are_pulled_and_received_embeddings_are_not():
    """The pull grows with strength times the norm of the gaps of a batch, and embeddings get no gradient from it."""
    batch, out = Batch(*examples("ada", 8)), []
    for strength in (0.0, 1.0, 3.0):
        made = federation(methods.gpfl(strength))
        out.append(made.model.grad(made.model.initial, batch, objectives=[objective_of(made, "ada")]))
    assert out[2].loss - out[0].loss == pytest.approx(3 * float(out[1].loss - out[0].loss), abs=1e-12)
    assert torch.equal(out[0].gradient["6.valve.embeddings"], out[2].gradient["6.valve.embeddings"])
    assert (out[0].gradient["6.valve.weight"] - out[2].gradient["6.valve.weight"]).abs().max() > 1e-3


def test_only_embeddings_and_valve_decay():
    made = federation(methods.gpfl(decay=0.5), training=Training(lr=0.1, batch_size=None))
    free = federation(methods.gpfl(decay=0.0), training=Training(lr=0.1, batch_size=None))
    for m in (made, free):
        m.play()
    for name, tensor in free.server["share"].items():
        expected = tensor - 0.1 * 0.5 * made.model.initial[name] * (".valve." in name)
        assert torch.allclose(made.server["share"][name], expected, rtol=0, atol=1e-12), name
    assert torch.equal(made.personal("ada")["6.weight"], free.personal("ada")["6.weight"])


@pytest.mark.parametrize("part", [parts.gated_heads, parts.conditional_valve])
def test_arguments_and_models_that_cannot_be_used(part):
    with pytest.raises(UsageError, match=f"{part().name}: strength must be at least 0, got -1"):
        part(-1.0)
    net = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()).double()
    with pytest.raises(UsageError, match=r"named\('0'\) must be a linear layer"):
        Model(net).extended(Method((parts.share(), part(names=scope.named("0")))).attach)


def test_gpfl_refuses_other_arguments_and_targets():
    with pytest.raises(UsageError, match="conditional_valve: decay must be at least 0, got -1"):
        parts.conditional_valve(decay=-1)
    clients = {"a": ClientData(train=(torch.rand(4, 1, 6, 6).double(), torch.rand(4, 3)))}
    with pytest.raises(UsageError, match="class"):
        federation(methods.gpfl(), clients=clients).play()
