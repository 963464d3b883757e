"""What must hold of duals, of perturbations that are shared, and of SAM in any company."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import idiolect
from idiolect import Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, norm, overlay, pick
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.stacked import Stacked
from idiolect.running.describe import describe
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, federation, network, population, sensitive_layers

PLAIN = Training(lr=0.1, local_epochs=2, batch_size=8)


def half_squares(output, target):
    return 0.5 * (output - target).square().mean()


def on_a_line(method, targets, rounds, start=0.0, curvature=1.0, **training):
    """Play one full-batch step a round, or more, on h (w - a)^2 / 2; return the federation and each round's w."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, start)
    x = torch.full((1, 1), curvature**0.5, dtype=torch.float64)
    clients = {f"{i}": ClientData(train=(x, x * a)) for i, a in enumerate(targets)}
    settings = Training(**{"lr": 0.5, "batch_size": None, **training})
    made = Federation(Model(net, half_squares), method, settings, rounds, 1.0, 0, clients)
    return made, [made.play() and made.server["share"]["weight"].item() for _ in range(rounds)]


@cache
def bowls():
    """Eight clients with F_i(w) = (w - b_i)' A_i (w - b_i) / 2 in five dimensions, and the minimum of their sum."""
    generator = torch.Generator().manual_seed(0)
    clients, curvature, pull = {}, torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    for i in range(8):
        turned = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
        x = (5 * torch.linspace(0.5, 3.0, 5, dtype=torch.float64)).sqrt()[:, None] * turned
        own = 3 * torch.randn(5, 1, generator=generator, dtype=torch.float64)
        copies = x.repeat(1 + i % 2, 1)  # some clients have more examples, of the same mean loss
        clients[f"{i}"] = ClientData(train=(copies, copies @ own))
        curvature, pull = curvature + x.T @ x / 5, pull + x.T @ x @ own / 5
    return clients, torch.linalg.solve(curvature, pull).flatten()


def distance(method, rounds, participation=1.0):
    """How far the server is from that minimum after rounds of five exact steps."""
    clients, minimum = bowls()
    net = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    training = Training(lr=0.1, local_epochs=5, batch_size=None)
    made = Federation(Model(net, half_squares), method, training, rounds, participation, 0, clients, Stacked(8))
    for _ in range(rounds):
        made.play()
    return float((made.server["share"]["weight"].flatten() - minimum).norm())


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_duals_lead_to_the_minimum_of_the_sum_and_fedavg_stops_short(weighting):
    """Duals are averaged equally, so it is the minimum of the equal sum whatever the weighting."""
    assert distance(methods.fedavg(weighting), 50) > 0.1
    assert distance(methods.feddyn(2.0, weighting), 50) < 1e-11
    assert distance(methods.fedgloss(0.0, 2.0, 0.0, weighting), 50) < 1e-11


def test_the_minimum_is_reached_with_three_clients_of_eight():
    assert distance(methods.feddyn(2.0), 200, participation=3 / 8) < 1e-10
    assert distance(methods.fedavg(), 40, participation=3 / 8) > 0.1


def test_perturbations_shift_the_minimum_by_no_more_than_their_radius():
    for method in (methods.fedspeed(0.01, 2.0), methods.fedsmoo(0.01, 2.0), methods.fedgloss(0.01, 2.0, 0.01)):
        assert 1e-4 < distance(method, 30) < 0.02


QUIET = [
    methods.feddyn(0.3, "uniform"),
    methods.fedspeed(0.0, 0.3, weighting="uniform"),
    methods.fedspeed(0.0, 0.3, "participants", "uniform"),
    methods.fedsmoo(0.0, 0.3, weighting="uniform"),
    methods.fedgloss(0.0, 0.3, 0.0, "uniform"),
]


def test_the_first_round_goes_twice_as_far():
    """With all clients, for any strength: the server adds the mean move to the mean. Statistics are averaged only."""
    start = federation(methods.fedavg()).server["share"]
    once = played(methods.fedprox(0.3, "uniform"), rounds=1).server["share"]
    weights = Model(network()).structure.names("weight")
    twice = overlay(once, pick(start, weights) + 2 * (pick(once, weights) - pick(start, weights)))
    for method in QUIET:
        same({"": played(method, rounds=1).server["share"]}, {"": twice}, 1e-12)


def test_without_perturbation_all_are_feddyn():
    """FedSpeed with the duals of participants only where all take part."""
    for participation, others in ((1.0, QUIET), (0.5, [m for m in QUIET if "participants" not in repr(m)])):
        first, *rest = (played(m, participation=participation).server["share"] for m in others)
        for other in rest:
            same({"": first}, {"": other}, 1e-12)


def test_whose_duals_are_averaged_matters_where_not_all_take_part():
    everybody, cohort = (
        played(methods.fedspeed(0.1, 0.3, dual_mean, "uniform"), participation=0.5).server
        for dual_mean in ("all", "participants")
    )
    assert norm(everybody["share"] - cohort["share"]) > 1e-3


def test_the_servers_dual_is_the_mean_over_the_population():
    made = played(methods.feddyn(0.3), rounds=3, participation=0.5)
    own = [made.memory.get(client)["dynamic"].flat for client in SIZES]
    assert torch.allclose(sum(own) / len(own), made.server["dynamic"].flat, atol=1e-12)
    assert sum(bool(dual.any()) for dual in own) == 3  # one has not taken part, and counts


def test_a_pull_by_hand():
    """From 0 to 4, a step of 1/2 a round.

    g = -4: w_i = 2, h_i = 2, and the server has 2 + 2. Then g = 0, pull 2/2: w_i = 3.5, h_i = 1.5. Then g = 1, pull
    1.5/2: w_i = 5 - 1.75/2, h_i = 1.5 - 1.75/2.
    """
    assert on_a_line(methods.feddyn(0.5), [4.0], 3)[1] == [4.0, 5.0, 4.125 + 0.625]


def test_the_first_step_of_fedsmoo_is_sams():
    one_step = Training(lr=0.1, batch_size=None)
    smoo, speed = (
        [made.play() and made.server["share"] for _ in range(2)]
        for made in (federation(m(0.2, 0.3), training=one_step) for m in (methods.fedsmoo, methods.fedspeed))
    )
    assert torch.allclose(smoo[0].flat, speed[0].flat, atol=1e-12)
    assert norm(smoo[1] - speed[1]) > 1e-4
    frozen = federation(methods.fedsmoo(0.2, 0.3), training=one_step)
    frozen.play()
    forget(frozen)
    frozen.play()
    assert torch.allclose(frozen.server["share"].flat, speed[1].flat, atol=1e-12)


def forget(made):
    """Set all mu_i and s to zero."""
    made.server["consistent_sam"] = made.server["consistent_sam"] * 0.0
    for client in list(made.memory):
        slots = made.memory.get(client)
        duals = pick(slots["share"], {n for n in slots["share"] if "consistent_sam.mu/" in n})
        assert duals.flat.any()
        made.memory.put(client, slots | {"share": overlay(slots["share"], duals * 0.0)})


def test_clients_that_agree_leave_their_duals_alone():
    """Both go downhill to 4: every perturbation is -rho, hence so are s and each mu, which moves no further."""
    made, _ = on_a_line(methods.fedsmoo(0.1, 0.5), [4.0, 6.0], 2, lr=0.01)
    assert made.server["consistent_sam"]["weight"].item() == pytest.approx(-0.1, abs=1e-6)
    for client in "01":
        assert made.memory.get(client)["share"]["consistent_sam.mu/weight"].item() == pytest.approx(-0.1, abs=1e-6)
    made, _ = on_a_line(methods.fedsmoo(0.1, 0.5), [-5.0, 5.0], 2, lr=0.01)
    assert made.server["consistent_sam"]["weight"].item() == pytest.approx(0.0, abs=1e-6)
    duals = [made.memory.get(client)["share"]["consistent_sam.mu/weight"].item() for client in "01"]
    assert duals == pytest.approx([0.2, -0.2], abs=1e-6)  # a step of rho in each round, nothing shared to subtract


def test_the_dual_turns_the_perturbation():
    """q = g - mu - s: once mu outweighs a gradient of -0.05, the perturbation is uphill no longer."""
    part = parts.consistent_sam(0.1)
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, -0.05)
    model = Model(net, half_squares).extended([part.attach])
    batch = Batch(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    received = Tree.of({"weight": torch.full((1, 1), -0.02, dtype=torch.float64)})
    row, seen = model.initial, []
    sharp = part.gradient(model.grad, SimpleNamespace(received=received))
    for _ in range(3):
        out = sharp(row, batch)
        seen.append((out.gradient["weight"].item(), out.buffers["consistent_sam.mu/weight"].item()))
        row = overlay(row, out.buffers)
    # q = -.05 + .02 < 0: s^ = -.1, mu = -.08; q = -.03 + .08 > 0: s^ = .1, mu = .04; q = -.03 - .04 < 0
    assert [v for pair in seen for v in pair] == pytest.approx([-0.15, -0.08, 0.05, 0.04, -0.15, -0.04], abs=1e-5)


def test_the_server_looks_ahead_by_its_radius_and_comes_back():
    """From 1 to 0: w = 1 - lr; the next w~ is w + rho, for the last move was down, and w+ = w - lr w~."""
    method = Method((parts.share(), parts.server_sam(0.25)))
    made, ws = on_a_line(method, [0.0], 2, start=1.0, lr=0.1)
    assert ws == pytest.approx([0.9, 0.9 - 0.1 * 1.15], abs=1e-6)
    made = played(Method((parts.share(), parts.server_sam(0.25))), rounds=2)
    moved = made.sent("train")["share"] - made.server["share"]
    assert float(norm(moved)) == pytest.approx(0.25, rel=1e-6)
    statistics = pick(moved, made.model.structure.names("statistic"))
    assert len(statistics) == 2
    assert not statistics.flat.any()
    same({"": made.sent("deploy")["share"]}, {"": made.server["share"]})
    same({"": federation(method).sent("train")["share"]}, {"": federation(method).server["share"]})


def test_fedgamma_corrects_sams_gradient():
    """w = 1: g~ = 1 + rho. Then c_i = c = 1 + rho cancel for one client; for two, the second step by hand."""
    fedgamma = Method((parts.share(), parts.sam(0.5), parts.control_variates()))
    assert on_a_line(fedgamma, [0.0], 2, start=1.0, lr=0.1)[1] == pytest.approx([0.85, 0.715], abs=1e-6)
    # targets 0 and 3 from 1: g~ = 1.5 and -2.5, w = 1.05; c_i = g~, c = -.5; g~ = 1.55, -2.45 less c_i plus c
    steps = [1.55 - 1.5 - 0.5, -2.45 + 2.5 - 0.5]
    ws = on_a_line(fedgamma, [0.0, 3.0], 2, start=1.0, lr=0.1)[1]
    assert ws == pytest.approx([1.05, 1.05 - 0.1 * sum(steps) / 2], abs=1e-6)


def looked_at(method_part):
    """Return the row, and the rows at which a part takes the gradient of one batch."""
    model = Model(network())
    points = []

    def grad(at, batch):
        points.append(at)
        return model.grad(at, batch)

    class Here:
        structure, start = model.structure, model.initial

    x, y = population()["ada"].train
    method_part.gradient(grad, Here)(model.initial, Batch(x, y))
    return model.initial, points


@pytest.mark.parametrize("make", [parts.sam, parts.adaptive_sam])
def test_sam_on_normalization_moves_nothing_else(make):
    """So with FedBN the weights that are exchanged are never perturbed."""
    start, (first, second) = looked_at(make(0.3, names=scope.normalization))
    assert torch.equal(first.flat, start.flat)
    assert {n for n in start if not torch.equal(start[n], second[n])} == {"1.weight", "1.bias"}
    if make is parts.sam:
        assert float(norm(second - start)) == pytest.approx(0.3, rel=1e-5)
    _, (_, everywhere) = looked_at(make(0.3))
    _, (_, named) = looked_at(make(0.3, names=scope.weights))
    assert torch.equal(everywhere.flat, named.flat)


FLEXIBLE = parts.flexible_sam(0.05, 0.6, top=2)
BASES = [
    methods.fedavg(),
    methods.fedbn(),
    methods.fedala(),
    methods.mofedsam(0.05, 0.5),
    methods.fedspeed(0.05, 0.3),
    methods.fedgloss(0.05, 0.3, 0.05),
    methods.fedsmoo(0.05, 0.3),
]


def sharpened(method, sharp):
    """Put a SAM in the place of a method's own, or add it; `consistent_sam` keeps its own around it."""
    own = [sharp if p.name == "sam" else p for p in method.parts]
    return replace(method, parts=(*own, *([sharp] if sharp not in own else [])))


@pytest.mark.parametrize("base", BASES, ids=lambda m: m.name)
def test_flexible_sam_goes_with_anything(base):
    """It is SAM where its radii are equal, and something else where they are not."""
    made = played(sharpened(base, FLEXIBLE), 3)
    flexible, equal, plain = (
        made.server["share"],
        *(played(sharpened(base, sharp), 3).server["share"] for sharp in (FLEXIBLE_ALIKE, parts.sam(0.05))),
    )
    assert torch.isfinite(flexible.flat).all()
    assert torch.allclose(equal.flat, plain.flat, atol=1e-12)
    assert norm(flexible - plain) > 1e-3
    assert norm(flexible - played(base, 3).server["share"]) > 1e-3
    chosen = [sensitive_layers(made.memory.get(c)["flexible_sam"]) for c in SIZES]
    assert [len(layers) for layers in chosen] == [2] * len(SIZES)


FLEXIBLE_ALIKE = parts.flexible_sam(0.05, 0.05, top=2)


def test_what_is_kept_and_sent():
    """Sizes as the parts' docstrings have them."""
    weights = Model(network()).structure.trainable
    size = f"{weights.total} values in {len(weights.names)} tensors"

    def row(method, part):
        found = next(r for r in describe(method, Model(network())) if r["part"] == part)
        return [found[k] for k in ("keeps", "receives", "sends", "extra gradients a step")]

    assert row(methods.feddyn(), "dynamic") == [size, "", "", ""]
    assert row(methods.fedspeed(dual_mean="participants"), "dynamic") == [size, "", size, ""]
    assert row(methods.fedsmoo(), "consistent_sam") == ["", size, size, "1"]
    assert row(methods.fedgloss(), "server_sam") == ["", "", "", ""]
    for report, copies in (("code", 1), ("paper", 2)):
        values, tensors = copies * weights.total + 1, copies * len(weights.names) + 1  # and a counter of batches
        assert row(methods.fedsmoo(report=report), "share")[0] == f"{values} values in {tensors} tensors"


def test_duals_of_perturbations_are_in_no_model_that_is_handed_out():
    run = idiolect.fit(network(), population(), methods.fedsmoo(), rounds=2, training=PLAIN)
    assert set(run.personal("ada").state_dict()) == set(network().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parts.dynamic(0.0), "dynamic: strength must be above 0"),
        (lambda: parts.dynamic(0.1, "some"), "dynamic: dual_mean='some' is not 'all' or 'participants'"),
        (lambda: parts.consistent_sam(-0.1), "consistent_sam: rho must be at least 0"),
        (lambda: parts.consistent_sam(0.1, "mu"), "consistent_sam: report='mu' is not 'code' or 'paper'"),
        (lambda: parts.server_sam(-1.0), "server_sam: rho must be at least 0"),
        (lambda: federation(Method((parts.share(), parts.sam(0.1, scope.statistics)))), "names no weight"),
        (lambda: bare(methods.sam_on()), "no normalization layer"),
    ],
)
def test_what_cannot_be_is_one_line(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def bare(method):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    return Federation(Model(net), method, PLAIN, 1, 1.0, 0, population())
