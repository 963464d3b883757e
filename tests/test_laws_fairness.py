"""What must hold of methods that make results even over clients, whatever the numbers."""

import pytest
import torch
from test_laws import half_squares
from torch import nn
from torch.nn import functional as F

from idiolect import SGD, Training, UsageError, methods, parts
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, pick
from idiolect.core.types import Arrival, Central
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network

STEEP = Training(lr=0.5, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5))


def weights_of(made):
    return pick(made.server["share"], made.model.structure.names("weight")).flat


def arrived(loss, move, q, lr=0.1, dtype=torch.float64):
    """Return what enters the mean of a client of one weight, which is 2 at first, and how much it counts."""
    model = Model(nn.Linear(1, 1, bias=False).to(dtype))
    old = Tree.of({"weight": torch.full((1, 1), 2.0, dtype=dtype)})
    own = Tree.of({"loss": torch.tensor([loss], dtype=dtype)})
    central = Central(model.structure, old, old, lr, 1.0)
    tree, weight = parts.loss_weights(q).contribute(central, Arrival(own, old + move, 1, torch.ones(1)))
    return float(tree["weight"] - 2.0), float(weight)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_without_q_it_is_averaging(weighting):
    one, other = played(methods.qfedavg(0.0, weighting)), played(methods.fedavg(weighting))
    same({"": one.server["share"]}, {"": other.server["share"]}, 1e-12)


@pytest.mark.parametrize("q", [0.2, 3.0])
def test_identical_clients_take_a_shortened_step(q):
    twins = {name: ClientData(train=examples("ada", 8)) for name in "abc"}
    made = federation(methods.qfedavg(q), clients=twins, training=Training(lr=0.3, batch_size=None))
    out = made.worker.train(made.assignment("a", "train"))
    before, move = weights_of(made), pick(out.uploads["share"], made.model.structure.names("weight")).flat
    move = move - before
    loss = float(out.uploads["loss_weights"]["loss"]) + 1e-10
    made.play()
    expected = before + move / (1 + q * float(move.square().sum()) / (0.3 * loss))
    assert torch.allclose(weights_of(made), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("q", [0.2, 1.0, 3.0])
def test_units_of_the_loss_do_not_matter(q):
    """A thousand times the loss at a thousandth of the learning rate is the same run."""

    def run(loss, lr):
        clients = {name: ClientData(train=examples(name, n)) for name, n in SIZES.items()}
        made = Federation(Model(network(), loss), methods.qfedavg(q), Training(lr=lr, batch_size=8), 4, 1.0, 0, clients)
        for _ in range(3):
            made.play()
        return weights_of(made)

    large = run(lambda output, target: 1e3 * F.cross_entropy(output, target), 0.5e-3)
    assert torch.allclose(large, run(F.cross_entropy, 0.5), rtol=0, atol=1e-8)


@pytest.mark.parametrize("q", [0.1, 1.0, 10.0])
def test_a_step_is_bounded(q):
    """Its length is at most half the root of lr F / q, for the largest F of the round."""
    made = federation(methods.qfedavg(q), training=STEEP)
    for _ in range(3):
        outs = [made.worker.train(made.assignment(c, "train")) for c in made.clients]
        largest = max(float(out.uploads["loss_weights"]["loss"]) for out in outs)
        before = weights_of(made)
        made.play()
        assert 0 < (weights_of(made) - before).norm() <= 0.5 * (0.5 * largest / q) ** 0.5


def test_moves_count_by_the_power_of_the_loss():
    """Of equal moves, in the ratio of the losses to the power of q."""
    (step, weight), (other_step, other) = arrived(3.0, 0.25, q=2.0), arrived(1.5, 0.25, q=2.0)
    assert step * weight / (other_step * other) == pytest.approx(4.0)
    assert weight == pytest.approx(9.0 * (1 + 2.0 * 0.25**2 / (0.1 * 3.0)))
    assert step * weight == pytest.approx(9.0 * 0.25)


def test_powers_have_room():
    """In float32 as well: a loss of 0.001 to the power of 20 counts, and one of 0 does not stop the round."""
    step, weight = arrived(1e-3, 0.25, q=20.0, dtype=torch.float32)
    assert step * weight == pytest.approx(0.25e-60, rel=0.01, abs=0)
    step, weight = arrived(0.0, 0.25, q=0.5)
    assert step * weight == pytest.approx(0.25e-5, rel=1e-5, abs=0)


def test_where_nobody_counts_the_weights_stay():
    """A power that is too small for any number is none."""
    clients = {name: ClientData(train=examples(name, 8)) for name in "ab"}
    model = Model(network(), lambda output, target: 0.01 * F.cross_entropy(output, target))
    made = Federation(model, methods.qfedavg(q=1e3), Training(), 4, 1.0, 0, clients)
    before = weights_of(made)
    made.play()
    assert torch.equal(weights_of(made), before)


def test_it_settles_where_the_gradients_count_by_their_losses():
    """With one plain step a round: Σ p F^q ∇F is 0 there. The mean, 0, leaves the worst client 4 away."""
    optimum, count = [4.0, -2.0, 1.0], [10, 30, 20]
    x = torch.ones(30, 1, dtype=torch.float64)
    clients = {
        f"{i}": ClientData(train=(x[:n], x[:n] * a)) for i, (a, n) in enumerate(zip(optimum, count, strict=True))
    }
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    training = Training(lr=0.5, batch_size=None)
    made = Federation(Model(net, half_squares), methods.qfedavg(2.0), training, 4, 1.0, 0, clients)
    for _ in range(150):
        made.play()
    gaps = [made.server["share"]["weight"].item() - a for a in optimum]
    pulls = [n * (0.5 * gap**2) ** 2 * gap for n, gap in zip(count, gaps, strict=True)]
    assert abs(sum(pulls)) < 1e-6 * max(map(abs, pulls))
    assert max(map(abs, gaps)) < 3.5


def test_the_loss_is_that_of_the_received_weights():
    """Of all examples, normalized by running statistics, before training; wherever training starts from."""
    made = played(methods.fedbn() + parts.relaxed_start(0.5) + parts.loss_weights(2.0), rounds=2)
    for client, data in made.clients.items():
        out = made.worker.train(made.assignment(client, "train"))
        assert list(out.uploads["loss_weights"]) == ["loss"]
        net = network()
        state = made.memory.get(client)["share"]
        net.load_state_dict(
            {**made.model.tensors(made.personal(client)), **state, **made.server["share"]}, strict=False
        )
        with torch.no_grad():
            expected = F.cross_entropy(net.eval()(data.train.x), data.train.y)
        assert float(out.uploads["loss_weights"]["loss"]) == pytest.approx(float(expected), abs=1e-13)


def test_statistics_are_averaged_plainly():
    """In the first round both start alike."""
    plain, made = played(methods.fedavg(), rounds=1), played(methods.qfedavg(3.0), rounds=1)
    for name in made.model.structure.names("statistic"):
        assert torch.equal(made.server["share"][name], plain.server["share"][name])


def test_it_costs_one_number():
    plain, made = federation(methods.fedavg()), federation(methods.qfedavg())
    one, other = plain.play(), made.play()
    assert (other.bytes_down, other.bytes_up) == (one.bytes_down, one.bytes_up + 8 * len(SIZES))


def test_a_negative_loss_is_refused():
    clients = {name: ClientData(train=examples(name, 8)) for name in "ab"}
    model = Model(network(), lambda output, target: F.cross_entropy(output, target) - 5.0)
    made = Federation(model, methods.qfedavg(), Training(), 4, 1.0, 0, clients)
    with pytest.raises(UsageError, match=r"loss_weights: a client's loss is -[\d.]+; take a loss that is never"):
        made.play()


def test_a_power_that_is_too_large_is_refused():
    with pytest.raises(UsageError, match=r"loss_weights: 100 to the power of q = 200\.0 is too large"):
        arrived(100.0, 0.1, q=200.0)


def test_q_is_at_least_zero():
    with pytest.raises(UsageError, match="q must be at least 0, got -1"):
        methods.qfedavg(-1)
