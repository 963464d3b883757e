"""What must hold of a server's step, normalized averages, other starts and second models, whatever the numbers."""

from types import SimpleNamespace

import pytest
import torch
from test_laws import PLAIN, half_squares, quadratics, same_state_of_share
from torch import nn

from idiolect import SGD, Adam, Method, Training, UsageError, methods, parts
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, norm, pick
from idiolect.core.types import Batch, Central, Setup
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network


def one_weight(value=0.0):
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, value)
    return net


def tree(**values):
    return Tree.of({name: torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()})


def server_plays(part, moves):
    """Return the only weight after each of these moves of the clients, from 0."""
    model = Model(one_weight())
    now, seen = model.initial, []
    state = part.server(Setup(model.structure, now, now))
    for move in moves:
        central = Central(model.structure, now, now + move, 0.1, 1.0, state=state)
        state, now, _ = part.aggregate(central, Tree.of({}))
        seen.append(now["weight"].item())
    return seen


def test_momentum_of_the_servers_step_by_hand():
    """v is 2, then 1 + 1; half of it is the step."""
    assert server_plays(parts.server_sgd(lr=0.5, momentum=0.5), [2.0, 1.0]) == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize(
    ("rule", "squares"), [("adagrad", [5.0, 5.25]), ("adam", [1.75, 1.375]), ("yogi", [2.0, 1.9375])]
)
def test_adaptive_steps_by_hand(rule, squares):
    """From V = 1 the clients move by 2, then by 1/2: m is 1, then 3/4."""
    part = parts.server_adaptive(rule, lr=3.0, beta1=0.5, beta2=0.75, tau=1.0)
    first = 3.0 * 1.0 / (squares[0] ** 0.5 + 1)
    assert server_plays(part, [2.0, 0.5]) == pytest.approx([first, first + 3.0 * 0.75 / (squares[1] ** 0.5 + 1)])


@pytest.mark.parametrize("rule", ["adagrad", "yogi"])
def test_adaptive_steps_with_a_large_tau_are_plain(rule):
    """V stays tau squared, so a step is lr / 2 tau times the move."""
    part = parts.server_adaptive(rule, lr=2e6, beta1=0.0, tau=1e6)
    adaptive = played(Method((parts.share(), part))).server["share"]
    same({"": adaptive}, {"": played(methods.fedavg()).server["share"]}, 1e-9)


def test_what_the_server_keeps_is_not_sent():
    for method in (methods.fedavgm(), methods.fedyogi(), methods.feddyn()):
        made = played(method, rounds=1)
        own = method.parts[1].name
        assert len(made.server[own])
        assert not len(made.sent("train")[own])


@pytest.mark.parametrize(
    "optimizer", [SGD(), SGD(momentum=0.9), SGD(momentum=0.5, nesterov=True), Adam(beta1=0.5, epsilon=0.0)]
)
def test_effective_steps_are_how_far_a_constant_direction_leads(optimizer):
    direction = Tree.of({"w": torch.ones(1, dtype=torch.float64)})
    state, way = optimizer.init(direction), 0.0
    for taken in range(1, 12):
        move, state = optimizer.move(direction, state)
        way += move["w"].item()
        found = optimizer.effective_steps(torch.tensor([float(taken)], dtype=torch.float64))
        assert found.item() == pytest.approx(way, abs=1e-12)


@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9), SGD(momentum=0.5, nesterov=True)])
def test_fednova_follows_the_mean_gradient_whoever_takes_more_steps(optimizer):
    """Where gradients are constant, the shared weight moves by lr times the mean step count times their mean."""
    slopes, counts = [3.0, -1.0], [8, 24]
    clients = {
        f"{i}": ClientData(train=(torch.full((n, 1), s, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)))
        for i, (s, n) in enumerate(zip(slopes, counts, strict=True))
    }
    training = Training(lr=0.1, batch_size=4, optimizer=optimizer)

    def moved(method):
        model = Model(one_weight(), lambda output, target: output.mean())
        made = Federation(model, method, training, 1, 1.0, 0, clients)
        made.play()
        return made.server["share"]["weight"].item()

    worth = [optimizer.effective_steps(torch.tensor(n / 4)).item() for n in counts]
    assert moved(methods.fednova()) == pytest.approx(0.0, abs=1e-6)  # a quarter of 3, three quarters of -1
    assert moved(methods.fedavg()) > 0.1  # the client with more steps has its way
    assert moved(methods.fednova("uniform")) == pytest.approx(-0.1 * sum(worth) / 2, rel=1e-6)  # half of 3, half of -1


def test_fednova_is_fedavg_where_all_take_equally_many_steps():
    clients = {name: ClientData(train=examples(name, 16)) for name in SIZES}
    one, other = (played(m, clients=clients).server["share"] for m in (methods.fednova(), methods.fedavg()))
    same({"": one}, {"": other}, 1e-12)
    assert not torch.allclose(
        played(methods.fednova()).server["share"].flat, played(methods.fedavg()).server["share"].flat
    )


def test_fedlesam_first_is_fedavg_and_then_looks_back_up_the_way_the_server_came():
    one, other = (played(m, rounds=1).server["share"] for m in (methods.fedlesam(0.3), methods.fedavg()))
    same({"": one}, {"": other})
    model = Model(one_weight(2.0), half_squares)
    x = torch.ones(4, 1, dtype=torch.float64)

    def slope(trained):
        memory = Tree.of({**tree(weight=5.0), "flag/trained": torch.tensor([trained], dtype=torch.float64)})
        local = SimpleNamespace(shared=tree(weight=2.0), memory=memory)
        grad = parts.estimated_sam(0.25).gradient(model.grad, local)
        return grad(model.initial, Batch(x, x * 0.0)).gradient["weight"].item()

    assert slope(0.0) == pytest.approx(2.0, abs=1e-6)  # (w - 0)
    assert slope(1.0) == pytest.approx(2.25, abs=1e-6)  # it was at 5, so uphill is back there


def test_fedlesam_where_the_server_did_not_move_is_fedavg():
    """Whatever the radius: there is no direction to look in."""
    made, plain = federation(methods.fedlesam(0.5)), federation(methods.fedavg())
    received = made.server
    for fed in (made, plain):
        fed.play()
        fed.server = {**fed.server, "share": received["share"]}
        fed.play()
    same({"": made.server["share"]}, {"": plain.server["share"]}, 1e-12)


def test_relaxed_start_by_hand():
    """The server is at 2, the client ended at 1: it starts half of that way further, and predicts from 2."""
    part = parts.relaxed_start(0.5)
    local = SimpleNamespace(shared=tree(weight=2.0), memory=tree(weight=1.0), end=tree(weight=3.0))
    weights = part.begin(local, tree(weight=2.0))[0]
    assert weights["weight"].item() == 2.5
    assert part.deploy(local, weights)["weight"].item() == 2.0
    memory, upload = part.finish(local)
    assert (memory["weight"].item(), upload["weight"].item()) == (3.0, 0.5)
    central = SimpleNamespace(new=tree(weight=3.0))
    assert part.aggregate(central, upload).shared["weight"].item() == 2.5  # 2 + (3 - 2.5)
    made = played(methods.fedinit(0.3))
    same({"": pick(made.personal("ada"), made.server["share"])}, {"": made.server["share"]})


def test_pfedme_descends_on_the_moreau_envelope():
    """On h (w - a)^2 / 2 the nearest minimizer is (h a + l w) / (h + l), the slope h l (w - a) / (h + l)."""
    h, a, strength, w = 3.0, -2.0, 2.0, 1.0
    part = parts.moreau_envelope(strength, steps=60, lr=0.15)
    model = Model(one_weight(w), half_squares).extended([part.attach])
    x = torch.full((4, 1), h**0.5, dtype=torch.float64)
    out = part.gradient(model.grad, SimpleNamespace(structure=model.structure))(model.initial, Batch(x, x * a))
    assert out.gradient["weight"].item() == pytest.approx(h * strength / (h + strength) * (w - a), abs=1e-10)
    assert out.buffers["moreau_envelope.weights"].item() == pytest.approx((h * a + strength * w) / (h + strength))


def test_pfedme_whose_own_model_takes_no_step_stays_where_it_began():
    made = played(methods.pfedme(2.0, lr=0.0))
    start = made.model.initial
    moving = made.model.structure.names("weight") & set(made.server["share"])
    for now in (made.server["share"], made.personal("ada")):
        assert torch.allclose(pick(now, moving).flat, pick(start, moving).flat, rtol=0, atol=1e-15)


def test_a_client_that_never_trained_predicts_with_what_it_receives():
    for method in (methods.pfedme(2.0, steps=2), methods.apfl()):
        made = federation(method, participation=0.25)
        seen = {client for _ in range(2) for client in made.play().cohort}
        for client in set(SIZES) - seen:
            same({"": pick(made.personal(client), made.server["share"])}, {"": made.server["share"]}, 1e-15)
        for client in seen:
            own = pick(made.personal(client), made.server["share"])
            assert not torch.allclose(own.flat, made.server["share"].flat)


def test_apfl_shares_fedavg_whatever_the_client_keeps():
    for share in (0.0, 0.6):
        mixed, plain = (played(m, training=PLAIN) for m in (methods.apfl(share), methods.fedavg()))
        same({"": mixed.server["share"]}, {"": plain.server["share"]}, 1e-12)


def test_apfl_of_nothing_its_own_is_the_shared_model_and_of_all_is_local_training():
    shared, alone = (played(methods.apfl(share, adaptive=False), training=PLAIN) for share in (0.0, 1.0))
    local = played(methods.local(), training=PLAIN)
    moving = Model(network()).structure.names("weight")
    for client in SIZES:
        same({"": pick(shared.personal(client), moving)}, {"": pick(shared.server["share"], moving)}, 1e-12)
        same({"": pick(alone.personal(client), local.personal(client))}, {"": local.personal(client)}, 1e-12)


@pytest.mark.parametrize(
    ("v", "lr", "mixture", "slope", "after"),
    [(3.0, 0.05, 2.0, 4.0, 0.1), (3.0, 0.2, 2.0, 4.0, 0.0), (0.5, 1.0, 0.75, 1.5, 1.0)],
)
def test_apfl_by_hand(v, lr, mixture, slope, after):
    """On (w)^2 from w = 1 with half of v: the share moves by -lr (v - w) times the slope, between 0 and 1."""
    part = parts.personal_mixture(0.5)
    model = Model(one_weight(1.0), half_squares).extended([part.attach])
    row = Tree.of({**model.initial, "personal_mixture.weights": torch.tensor([v], dtype=torch.float64)})
    x = torch.full((4, 1), 2**0.5, dtype=torch.float64)
    local = SimpleNamespace(structure=model.structure, lr=lr)
    out = part.gradient(model.grad, local)(row, Batch(x, x * 0.0))
    assert out.gradient["weight"].item() == pytest.approx(2.0)
    assert out.gradient["personal_mixture.weights"].item() == pytest.approx(0.5 * slope)
    assert out.buffers["personal_mixture.share"].item() == pytest.approx(after)
    assert part.deploy(local, row)["weight"].item() == mixture


def test_second_models_need_no_statistics():
    for method in (methods.pfedme(1.0, steps=2, lr=0.1), methods.apfl()):
        made, shared = quadratics(method, 30)
        own = [made.personal(client)["weight"].item() for client in made.clients]
        for optimum, weight in zip([4.0, -2.0, 1.0], own, strict=True):
            assert abs(weight - optimum) < abs(shared - optimum) + 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: parts.server_sgd(lr=0.0),
        lambda: parts.server_sgd(momentum=1.0),
        lambda: parts.server_adaptive("adamw"),
        lambda: parts.server_adaptive("adam", tau=0.0),
        lambda: parts.server_adaptive("adam", beta2=1.0),
        lambda: parts.estimated_sam(-0.1),
        lambda: parts.relaxed_start(-0.1),
        lambda: parts.moreau_envelope(strength=0.0),
        lambda: parts.moreau_envelope(steps=0),
        lambda: parts.personal_mixture(1.5),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_fedgamma_is_fedsam_in_its_first_round_and_its_variates_keep_their_mean():
    """Later it is not; the server's variate stays the mean over all clients, sampled or not."""
    made, plain = (
        federation(methods.fedgamma(0.2), participation=0.5),
        federation(methods.fedsam(0.2, "uniform"), participation=0.5),
    )
    for t in range(3):
        made.play()
        plain.play()
        gap = float(norm(made.server["share"] - plain.server["share"]))
        assert gap < 1e-12 if t == 0 else gap > 1e-4
        own = torch.stack([made.memory.get(client)["control_variates"].flat for client in made.population])
        assert torch.allclose(own.mean(dim=0), made.server["control_variates"].flat, atol=1e-12)


def test_reductions():
    same_state_of_share(methods.fedavgm(momentum=0.0), methods.fedavg())
    same_state_of_share(methods.fedinit(0.0), methods.fedavg())
    same_state_of_share(methods.fedgamma(0.0, "samples"), methods.scaffold())
    same_state_of_share(methods.pfedme(2.0, steps=2) + parts.server_sgd(1.0, 0.0), methods.pfedme(2.0, steps=2))
