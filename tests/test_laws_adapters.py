"""What must hold of methods for low-rank adapters, whatever the numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect import SGD, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, overlay
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.rounds.client import client_round
from idiolect.rounds.server import Upload
from idiolect.rounds.training import Group
from idiolect.testing.checks import same, same_state
from idiolect.testing.worlds import LowRank, adapted, examples, network, population

TRAINING = Training(lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5, weight_decay=0.01), clip=5.0)
FROZEN_A = Training(**{**vars(TRAINING), "groups": (Group(scope.lora_a, lr=0.0),)})
ONE_STEP = Training(lr=0.1, batch_size=None)


def world(method, training=TRAINING, clients=None, participation=1.0, net=None):
    model = Model(net or adapted(network()))
    return Federation(model, method, training, 4, participation, 0, clients or population())


def played(*args, rounds=3, **kwargs):
    made = world(*args, **kwargs)
    for _ in range(rounds):
        made.play()
    return made


def moved(tree, names, noise):
    """Return a tree whose named tensors are random."""
    generator = torch.Generator().manual_seed(noise)
    return overlay(tree, Tree.of({n: torch.randn(tree[n].shape, generator=generator).to(tree[n]) for n in names}))


def update(tree, layer, scaling=1.5):
    """Return what the factors of a layer stand for."""
    a, b = (tree[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
    return scaling * (b.flatten(1) @ a.flatten(1))


def closed(method, uploads):
    """Return the shared tensors after a round with these uploads of `share` and the population's examples."""
    made = world(method)
    steps = torch.ones(1, dtype=torch.float64)
    others = {p.name: Tree.of({}) for p in method.parts[1:]}
    rows = zip(uploads, made.clients.values(), strict=True)
    made.end_round([Upload(k, {"share": u, **others}, len(data.train.y), steps) for k, (u, data) in enumerate(rows)])
    return made.server["share"]


def test_fedit_is_fedavg_of_the_tensors_that_are_trained():
    same_state(played(methods.fedit(), participation=0.5), played(methods.fedavg(), participation=0.5))


def test_fedit_with_a_factor_that_does_not_move_is_ffa_lora():
    one, other = played(methods.fedit(), FROZEN_A), played(methods.ffa_lora(), TRAINING)
    for client in population():
        same({"": one.personal(client)}, {"": other.personal(client)}, 1e-12)


@pytest.mark.parametrize("method", [methods.fedit(), methods.ffa_lora()])
def test_the_mean_of_one_adapter_is_that_adapter(method):
    made = world(method)
    sent = moved(made.server["share"], set(made.server["share"]) - {"1.running_var"}, noise=1)
    same({"": closed(method, [sent] * 4)}, {"": sent}, 1e-12)


def test_ffa_lora_averages_updates_and_fedit_does_not():
    weights = torch.tensor([24.0, 8.0, 16.0, 32.0], dtype=torch.float64) / 80
    gaps = []
    for method, names in ((methods.ffa_lora(), scope.lora_b), (methods.fedit(), scope.lora_a | scope.lora_b)):
        made = world(method)
        names = names(made.model.structure)
        uploads = [moved(made.server["share"], names, noise) for noise in range(4)]
        mean = sum(w * update(overlay(made.model.initial, u), "4") for w, u in zip(weights, uploads, strict=True))
        found = update(overlay(made.model.initial, closed(method, uploads)), "4")
        gaps.append(float((mean - found).abs().max()))
    assert gaps[0] < 1e-12
    assert gaps[1] > 0.1


def test_fedit_of_equal_models_may_be_the_frozen_model():
    """(B, A) and (-B, -A) are one model; the mean of their factors is zero."""
    made = world(methods.fedit(weighting="uniform"))
    names = sorted((scope.lora_a | scope.lora_b)(made.model.structure))
    one = moved(made.server["share"], names, noise=1)
    other = overlay(one, Tree.of({n: -one[n] for n in names}))
    x = examples("unseen", 6)[0]
    outputs = [made.model.predict(overlay(made.model.initial, tree), x) for tree in (one, other)]
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    mean = overlay(made.model.initial, closed(methods.fedit(weighting="uniform"), [one, other, one, other]))
    frozen = made.model.predict(made.model.initial, x)
    assert torch.allclose(made.model.predict(mean, x), frozen, rtol=0, atol=1e-12)
    assert (outputs[0] - frozen).abs().max() > 0.1


@pytest.mark.parametrize("times", [0.5, 3.0])
def test_ffa_lora_needs_no_tuning_of_the_scaling(times):
    """A scaling c times as large with rates 1 / c^2 and decay c^2 of B gives the same updates."""

    def after(scaling, lr, decay):
        net = adapted(network())
        for layer in (net[0], net[4]):
            layer.scaling["default"] = scaling
        group = Group(scope.lora_b, lr=lr, weight_decay=decay)
        training = Training(lr=0.1, batch_size=8, optimizer=SGD(momentum=0.5), groups=(group,))
        made = played(methods.ffa_lora(), training, net=net)
        return made.personal("dan"), scaling

    (one, s), (other, c) = after(1.5, 1.0, 0.01), after(1.5 * times, times**-2, 0.01 * times**2)
    assert update(one, "4", s).abs().max() > 1e-3
    for layer in "04":
        assert torch.allclose(update(one, layer, s), update(other, layer, c), rtol=0, atol=1e-12)


def test_a_of_ffa_lora_stays_as_it_is():
    made = played(methods.ffa_lora() + parts.control_variates(), TRAINING, participation=0.5)
    for client in population():
        for name in scope.lora_a(made.model.structure):
            assert torch.equal(made.personal(client)[name], made.model.initial[name])


def test_a_client_of_fedsa_lora_that_has_not_trained_predicts_as_the_frozen_model():
    made = world(methods.fedsa_lora(), participation=0.25)
    x = examples("unseen", 6)[0]
    frozen = made.model.predict(made.model.initial, x)
    for _ in range(3):
        made.play()
        absent = set(population()) - set(made.memory)
        assert absent
        for client in absent:
            assert torch.equal(made.model.predict(made.personal(client), x), frozen)
    assert not torch.equal(made.personal(sorted(absent)[0]).flat, made.model.initial.flat), "A has not moved"


def test_the_first_step_moves_no_factor_a():
    made = world(methods.fedsa_lora(), ONE_STEP)
    sent = client_round(made.method, made.model, made.training, made.assignment("ada", "train")).uploads["share"]
    assert torch.equal(sent.flat, made.server["share"].flat)
    made.play()
    sent = client_round(made.method, made.model, made.training, made.assignment("ada", "train")).uploads["share"]
    assert not torch.equal(sent.flat, made.server["share"].flat)


def test_clients_of_fedsa_lora_meet_in_the_factor_a_alone():
    one, other = played(methods.fedsa_lora(), FROZEN_A), played(methods.local(), FROZEN_A)
    for client in population():
        same({"": one.personal(client)}, {"": other.personal(client)})
    apart = played(methods.fedsa_lora()).personal("ada")
    assert not torch.allclose(apart.flat, played(methods.local()).personal("ada").flat)


def test_one_client_alone_is_central_training():
    """The optimizer begins anew in each round."""
    alone = {"ada": population()["ada"]}
    runs = [played(m, clients=alone) for m in (methods.fedit(), methods.fedsa_lora(), methods.local())]
    for run in runs[1:]:
        same({"": run.personal("ada")}, {"": runs[0].personal("ada")}, 1e-12)


def test_two_clients_of_fedsa_lora_keep_their_own_b():
    """Opposite targets and one input: the factors B become opposite, which no common B can be."""
    torch.manual_seed(0)
    net = nn.Sequential(LowRank(nn.Linear(3, 1, bias=False), scaling=1.0)).double()
    x = torch.eye(3, dtype=torch.float64)
    frozen = net[0].base_layer(x)
    clients = {c: ClientData(train=(x, (frozen + sign).detach())) for c, sign in (("up", 1.0), ("down", -1.0))}
    training = Training(lr=0.3, local_epochs=200, batch_size=None)
    made = Federation(Model(net, F.mse_loss), methods.fedsa_lora(), training, 2, 1.0, 0, clients)
    for _ in range(2):
        made.play()
    found = {c: made.model.predict(made.personal(c), x) - frozen for c in clients}
    for client, sign in (("up", 1.0), ("down", -1.0)):
        assert bool((found[client] * sign > 0.5).all()), client


NO_CLIP = Training(lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5, weight_decay=0.01))
X = examples("unseen", 6)[0]


def predicted(made, client):
    return made.model.predict(made.deployed(client).at(X), X)


def test_the_shared_adapter_of_feddpa_is_that_of_fedit():
    """Bit by bit: the own adapter touches neither its gradient nor its batches."""
    one, other = played(methods.feddpa(), NO_CLIP), played(methods.fedit("uniform"), NO_CLIP)
    assert torch.equal(one.server["share"].flat, other.server["share"].flat)


@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_feddpa_predicts_as_fedit_without_a_share_or_without_training(largest):
    made = played(methods.feddpa(largest=largest), NO_CLIP, participation=0.25)
    shared = played(methods.fedit("uniform"), NO_CLIP, participation=0.25)
    assert set(made.memory) != set(population())
    for client in population():
        gap = (predicted(made, client) - predicted(shared, client)).abs().max()
        assert gap > 1e-5 if largest and client in made.memory else gap == 0, client


def test_equal_adapters_predict_alike_in_any_mixture():
    made = played(methods.feddpa(largest=0.9))
    weights = made.deployed("dan").weights
    pairs = {
        f"{k}.local_adapter.{n}.weight": f"{k}.lora_{x}.default.weight"
        for k in "04"
        for n, x in (("down", "A"), ("up", "B"))
    }
    equal = overlay(weights, Tree.of({own: weights[shared] for own, shared in pairs.items()}))
    plain = made.model.predict(equal, X)
    for share in (0.3, 1.0):
        mixed = overlay(equal, Tree.of({f"{k}.local_adapter.share": torch.full((1,), share).double() for k in "04"}))
        assert torch.allclose(made.model.predict(mixed, X), plain, rtol=0, atol=1e-12)
        moved = overlay(mixed, Tree.of({n: 2 * equal[n] for n in pairs}))
        assert not torch.allclose(made.model.predict(moved, X), plain)


def test_an_adapter_that_trains_alone_is_local_training():
    """With the whole share and nothing else that trains, no client sees another."""

    def net():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3)
        frozen = nn.Sequential(*layers).double().requires_grad_(False)
        frozen[1] = LowRank(frozen[1]).double()
        return frozen

    one, other = (played(m, NO_CLIP, net=net()) for m in (methods.feddpa(share_of_own=1.0), methods.local()))
    for client in population():
        own, alone = one.personal(client), other.personal(client)
        for name, twin in (("down", "lora_A"), ("up", "lora_B")):
            gap = own[f"1.local_adapter.{name}.weight"] - alone[f"1.{twin}.default.weight"]
            assert gap.abs().max() < 1e-12
        assert (own["1.local_adapter.up.weight"] - own["1.lora_B.default.weight"]).abs().max() > 1e-3


def test_an_input_is_mixed_by_itself():
    """Predictions do not depend on what is predicted together, and the own adapter counts for its own examples."""
    made = played(methods.feddpa(largest=1.0))
    own = made.deployed("dan")
    together = predicted(made, "dan")
    alone = torch.cat([made.model.predict(own.at(x[None]), x[None]) for x in X])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    assert len(own.at(X)["4.local_adapter.share"].unique()) == len(X)


def test_the_frozen_adapter_drops_nothing():
    """A frozen product has no dropout while the own one trains: with its own product zero, no random number is left."""
    net = adapted(network())
    net[4] = LowRank(net[4].base_layer, dropout=0.5).double()
    made = world(methods.feddpa(), net=net)
    names = made.model.structure.layout.only({f"{k}.local_adapter.share" for k in "04"})
    start = moved(made.model.initial, ["4.lora_B.default.weight"], noise=1)
    step = made.assignment("dan", "train").stream.epochs(1)[0]

    def losses(share):
        at = overlay(start, Tree(names, torch.full((2,), share).double()))
        return {float(made.model.grad(at, step._replace(key=key)).loss) for key in range(4)}

    assert len(losses(0.5)) == 1
    assert len(losses(0.0)) == 4
