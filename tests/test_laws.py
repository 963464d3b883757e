"""What must hold of each idea, whatever the numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from idiolect import SGD, Adam, Cosine, Group, Method, StepDecay, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, norm, pick
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.rounds.descent import descend
from idiolect.testing.checks import played, same, same_state
from idiolect.testing.worlds import SIZES, examples, federation, network, population

PLAIN = Training(lr=0.1, local_epochs=2, batch_size=8)


def half_squares(output, target):
    return 0.5 * (output - target).square().mean()


def quadratics(method, rounds, participation=1.0):
    """Play on F_i(w) = h_i (w - a_i)^2 / 2 with unequal h, a and numbers of examples; return the last w."""
    curvature, optimum, count = [1.0, 3.0, 0.5], [4.0, -2.0, 1.0], [10, 30, 20]
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    clients = {}
    for i, (h, a, n) in enumerate(zip(curvature, optimum, count, strict=True)):
        x = torch.full((n, 1), h**0.5, dtype=torch.float64)
        clients[f"{i}"] = ClientData(train=(x, x * a))
    training = Training(lr=0.1, local_epochs=5, batch_size=None)
    made = Federation(Model(net, half_squares), method, training, rounds, participation, 0, clients)
    for _ in range(rounds):
        made.play()
    return made, made.server["share"]["weight"].item()


def test_scaffold_reaches_the_optimum_and_fedavg_does_not():
    minimum = sum(h * a for h, a in [(1.0, 4.0), (3.0, -2.0), (0.5, 1.0)]) / 4.5
    assert quadratics(methods.scaffold("uniform"), 200)[1] == pytest.approx(minimum, abs=1e-10)
    assert quadratics(methods.scaffold("uniform"), 600, participation=0.7)[1] == pytest.approx(minimum, abs=1e-8)
    assert abs(quadratics(methods.fedavg("uniform"), 200)[1] - minimum) > 0.05


def test_the_mean_of_client_variates_is_the_servers():
    made, _ = quadratics(methods.scaffold(), 7, participation=0.7)
    own = [made.memory.get(c)["control_variates"]["weight"] for c in made.clients]
    assert torch.allclose(sum(own) / len(own), made.server["control_variates"]["weight"], atol=1e-12)


def test_weighting_is_by_training_examples_or_uniform():
    """One step from 0 on a quadratic lands on lr * h * a, so the mean is known by hand."""
    steps = [0.1 * 1.0 * 4.0, 0.1 * 3.0 * -2.0, 0.1 * 0.5 * 1.0]
    for weighting, weights in (("samples", [10, 30, 20]), ("uniform", [1, 1, 1])):
        made, _ = quadratics(methods.fedavg(weighting), 0)
        made.training = replace(made.training, local_epochs=1)
        made.play()
        expected = sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)
        assert made.server["share"]["weight"].item() == pytest.approx(expected, abs=1e-12)


def test_sam_on_a_quadratic_is_known_by_hand():
    """On h (w - a)^2 / 2 the gradient at w + rho sign(g) is h (w - a + rho sign(w - a))."""
    for w, a in ((0.0, 2.0), (5.0, 2.0)):
        net = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(net.weight, w)
        model = Model(net, half_squares)
        part = parts.sam(0.25)
        sharp = part.gradient(model.grad, None)
        x = torch.full((4, 1), 3.0**0.5, dtype=torch.float64)
        found = sharp(model.initial, Batch(x, x * a)).gradient["weight"].item()
        assert found == pytest.approx(3.0 * (w - a + 0.25 * (1 if w > a else -1)), abs=1e-6)


def test_adaptive_sam_with_a_large_eta_is_sam():
    """Where every weight is stretched alike, the ball is round: its radius is rho times eta."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    model, batch = Model(net), Batch(*examples("ada", 8))
    round_ball = parts.sam(0.2).gradient(model.grad, None)(model.initial, batch).gradient

    class Round:
        structure, start = model.structure, model.initial

    def stretched(rho, eta):
        return parts.adaptive_sam(rho, eta).gradient(model.grad, Round)(model.initial, batch).gradient

    assert torch.allclose(stretched(2e-7, 1e6).flat, round_ball.flat, atol=1e-6)
    assert not torch.allclose(stretched(0.2, 0.0).flat, round_ball.flat, atol=1e-3)


def test_momentum_of_the_server():
    same_state_of_share(methods.mofedsam(0.1, alpha=1.0), methods.fedsam(0.1))
    made = federation(methods.mofedsam(0.1, alpha=1e-9), training=PLAIN)
    delta = made.server["server_momentum"] + 0.05
    before = made.server["share"]
    made.server = {**made.server, "server_momentum": delta}
    made.play()
    steps = sum(n * 2 * n / 8 for n in SIZES.values()) / sum(SIZES.values())
    moved = pick(before - made.server["share"], delta)
    assert torch.allclose(moved.flat, delta.flat * 0.1 * steps, atol=1e-7)  # every step was lr times the direction
    assert torch.allclose(made.server["server_momentum"].flat, delta.flat, atol=1e-7)


def same_state_of_share(one, other):
    same({"share": played(one).server["share"]}, {"share": played(other).server["share"]}, 1e-12)


def test_fedfsa_reduces_to_mofedsam():
    flexible = parts.flexible_sam
    momentum = parts.server_momentum(0.3)
    share = parts.share()
    mofedsam = Method((share, parts.sam(0.1), momentum))
    same_state_of_share(Method((share, flexible(0.1, 0.1, top=2), momentum)), mofedsam)
    first = played(Method((share, flexible(0.1, 0.9, top=2), momentum)), rounds=1)
    same({"share": first.server["share"]}, {"share": played(mofedsam, rounds=1).server["share"]}, 1e-12)
    second = played(Method((share, flexible(0.1, 0.9, top=2), momentum)), rounds=2).server["share"]
    assert float(norm(second - played(mofedsam, rounds=2).server["share"])) > 1e-4


def test_fedfsa_with_all_layers_is_mofedsam_with_the_larger_radius():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()

    def after(sharp, rounds):
        method = Method((parts.share(), sharp))
        made = Federation(Model(net), method, PLAIN, 3, 1.0, 0, population())
        return [made.play() and made.server["share"] for _ in range(rounds)]

    flexible = after(parts.flexible_sam(0.1, 0.6, top=2), 2)
    small = after(parts.sam(0.1), 1)
    assert torch.allclose(flexible[0].flat, small[0].flat, atol=1e-12)
    start = Federation(Model(net), Method((parts.share(), parts.sam(0.6))), PLAIN, 3, 1.0, 0, population())
    start.server, start.round = {**start.server, "share": flexible[0]}, 1
    start.play()
    assert torch.allclose(flexible[1].flat, start.server["share"].flat, atol=1e-12)


def test_fedbn_and_its_dual_share_complementary_sets():
    structure = Model(network()).structure
    fedbn, dual = (~scope.batch_norm)(structure), scope.batch_norm(structure)
    assert fedbn | dual == structure.exchangeable
    assert not fedbn & dual
    assert fedbn < (~scope.statistics)(structure) < structure.exchangeable


def test_fedbn_on_identical_clients_is_fedavg():
    twins = {name: ClientData(train=examples("ada", 16), test=examples("ada!", 4)) for name in "abc"}
    training = Training(lr=0.1, batch_size=None)
    fedavg, fedbn = (played(m, clients=twins, training=training) for m in (methods.fedavg(), methods.fedbn()))
    for client in twins:
        same({"": fedavg.personal(client)}, {"": fedbn.personal(client)}, 1e-12)


def test_a_client_of_fedbn_never_sees_anothers_normalization():
    """Whatever the others hold, a client's normalization after its own training is the same."""
    loud = {**population(), "dan": ClientData(train=(examples("dan", 32)[0] * 100, examples("dan", 32)[1]))}
    quiet, changed = played(methods.fedbn(), rounds=1), played(methods.fedbn(), rounds=1, clients=loud)
    same({"": quiet.memory.get("ada")["share"]}, {"": changed.memory.get("ada")["share"]})


def test_proximal_holds_back_and_leaves_personal_tensors_alone():
    free, held = (played(methods.fedprox(mu), rounds=1, training=PLAIN).server["share"] for mu in (0.0, 4.0))
    start = federation(methods.fedavg()).server["share"]
    weights = Model(network()).structure.names("weight")
    assert norm(pick(held - start, weights)) < 0.7 * norm(pick(free - start, weights))
    direction = parts.proximal(1.0).direction
    made = federation(methods.fedbn() + parts.proximal(1.0))
    model = made.model
    moved = pick(model.initial, weights) + 1.0

    class AsReceived:
        shared = made.server["share"]

    found = direction(moved * 0.0, moved, AsReceived)
    assert torch.allclose(found["0.weight"], torch.ones(()).double(), atol=1e-12)
    assert torch.equal(found["1.weight"], torch.zeros(3).double())


def test_ditto_alone_is_local_training_and_strong_is_the_anchor():
    alone = played(methods.ditto(strength=0.0), training=PLAIN)
    local = played(methods.local(), training=PLAIN)
    for client in SIZES:
        same({"": alone.personal(client)}, {"": local.personal(client)}, 1e-12)
    one_step = Training(lr=0.1, batch_size=None)
    strong = federation(methods.ditto(strength=10.0), training=one_step)
    received, away = strong.server["share"], strong.memory.get("ada")
    away["personal_model"] = away["personal_model"] + 1.0
    strong.memory.put("ada", away)
    strong.play()
    weights = strong.model.structure.names("weight")
    gap = pick(strong.personal("ada"), weights) - pick(received, weights)
    assert gap.flat.abs().max() < 0.5  # lr times strength is 1: one step lands on the anchor, but for the gradient


def test_fedala_mask_stays_between_zero_and_one_and_mixes_nothing_at_first():
    made = federation(methods.fedala(scope.everything, lr=50.0), training=PLAIN)
    first = made.play()
    assert first.cohort == sorted(SIZES)
    same_after_one = played(methods.fedavg(), rounds=1, training=PLAIN)
    same({"": made.server["share"]}, {"": same_after_one.server["share"]}, 1e-12)
    for _ in range(3):
        made.play()
    masks = [t for c in SIZES for n, t in made.memory.get(c)["adaptive_mix"].items() if n.startswith("mask/")]
    assert all(((m >= 0) & (m <= 1)).all() for m in masks)
    assert any((m == 0).any() for m in masks)
    assert any((m == 1).any() for m in masks)


def test_fine_tuning_moves_what_it_names_and_nothing_that_is_kept():
    plain, head = played(methods.fedavg()), played(methods.fedavg_ft(scope.head, epochs=2, freeze_statistics=True))
    same({"share": plain.server["share"]}, {"share": head.server["share"]})
    for client in SIZES:
        same({"": plain.memory.get(client)["share"]}, {"": head.memory.get(client)["share"]})
    before, after = plain.personal("ada"), head.personal("ada")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"6.weight", "6.bias"}
    adapting = played(methods.fedavg_ft(scope.head, epochs=2)).personal("ada")
    assert not torch.equal(adapting["1.running_mean"], before["1.running_mean"])
    assert torch.equal(adapting["0.weight"], before["0.weight"])
    statistics = played(methods.fedavg_ft(scope.statistics, epochs=2)).personal("ada")
    moved = {n for n in before if not torch.equal(before[n], statistics[n])}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(momentum=0.9, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1)),
        (SGD(momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)),
        (Adam(weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1)),
        (Adam(beta1=0.5, beta2=0.9), lambda p: torch.optim.Adam(p, 0.05, betas=(0.5, 0.9))),
    ],
)
def test_optimizers_are_pytorchs(ours, theirs):
    net = network()
    model, expected = Model(net), network().train()
    optimizer = theirs(expected.parameters())
    batches = [Batch(*examples(f"{k}", 8)) for k in range(5)]
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(batch.x), batch.y).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    training = Training(lr=0.05, optimizer=ours, clip=0.5)
    end = descend(model, training, model.initial, batches, 0.05)[0]
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(end[name].reshape(tensor.shape), tensor.double(), atol=1e-12), name


def test_groups_are_pytorchs_parameter_groups():
    model, expected = Model(network()), network().train()
    head = [p for n, p in expected.named_parameters() if n.startswith("6.")]
    body = [p for n, p in expected.named_parameters() if not n.startswith("6.")]
    groups = [{"params": body}, {"params": head, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=0.1)
    batches = [Batch(*examples(f"{k}", 8)) for k in range(4)]
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(batch.x), batch.y).backward()
        optimizer.step()
    ours = SGD(momentum=0.9, weight_decay=0.1)
    training = Training(lr=0.05, optimizer=ours, groups=(Group(scope.head, lr=10.0, weight_decay=0.0),))
    end = descend(model, training, model.initial, batches, 0.05)[0]
    for name, parameter in expected.named_parameters():
        assert torch.allclose(end[name], parameter.detach(), atol=1e-12), name


def test_schedules():
    rates = [Cosine()(1.0, t, 4) for t in range(5)]
    assert rates == pytest.approx([1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5, 0.0])
    assert [StepDecay(2, 0.1)(1.0, t, 9) for t in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_dropout_is_the_same_in_both_passes_and_differs_between_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    model = Model(net)
    x, y = examples("ada", 8)
    once, again = (model.grad(model.initial, Batch(x, y, key=5)).gradient for _ in range(2))
    other = model.grad(model.initial, Batch(x, y, key=6)).gradient
    assert torch.equal(once.flat, again.flat)
    assert not torch.equal(once.flat, other.flat)
    made = Federation(model, methods.fedsam(), PLAIN, 2, 1.0, 0, population())
    twin = Federation(model, methods.fedsam(), PLAIN, 2, 1.0, 0, dict(reversed(population().items())))
    made.play()
    torch.rand(100)
    twin.play()
    same_state(made, twin)


def test_a_trees_norm_is_over_all_tensors():
    tree = Tree.of({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    assert float(norm(tree)) == 5.0
