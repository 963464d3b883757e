"""SCAFFOLD, Ditto and FedALA as textbook loops: cases small enough to follow by hand, and laws they must keep.

By hand there is one weight w with loss (w - target)²/2, so that g = w - target; it starts at 0.
"""

import pytest
import torch
from test_golden_oracles import one_weight, values
from torch import nn

from idiolect.testing.oracles.averaging import fedavg, local
from idiolect.testing.oracles.common import outside_batch_norm
from idiolect.testing.oracles.personal import ditto, fedala, mix, scaffold
from idiolect.testing.worlds import examples, network

HEAD = ["6.weight", "6.bias"]


def normalized(**given):
    """Three unequal clients with batch normalization, two of them a round, momentum and clipping."""
    data = [examples(name, 8) for name in ("ada", "ben", "cleo")]
    steps = [[(x[:4], y[:4]), (x[4:], y[4:])] * (1 + i % 2) for i, (x, y) in enumerate(data)]
    world = {
        "model": network(),
        "batches": lambda t, i: steps[i],
        "clients": 3,
        "rounds": 4,
        "lr": [0.3, 0.2, 0.2, 0.1],
        "weights": [1, 2, 5],
        "cohorts": [[0, 1], [1, 2], [0, 2], [0, 1]],
        "momentum": 0.5,
        "clip": 1.0,
    }
    return {**world, **given}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-12)


def test_variates_by_hand():
    world = one_weight([0, 4], steps=[2, 2], rounds=3, weights=[1, 3], cohorts=[[0, 1], [0], [0, 1]])
    result = scaffold(**world)
    # c = c₀ = c₁ = 0. client 0 stays at 0. client 1: 2, 3; c₁ = (0 - 3)/(.5·2). w = 3·3/4, c = -3/2
    # round 2, client 0: d = 2.25 - 0 - 1.5, w = 1.875; d = .375, w = 1.6875; c₀ = 1.5 + (2.25 - 1.6875)/1
    # c = -1.5 + 2.0625/2: half of the change, since there are two clients
    # round 3, client 0: d = 1.6875 - 2.0625 - .46875 = -.84375, w = 2.109375; d = -.421875, w = 2.3203125
    # client 1: d = 1.6875 - 4 + 3 - .46875 = .21875, w = 1.578125; d = .109375, w = 1.5234375
    assert values(result.shared) == [2.25, 1.6875, (2.3203125 + 3 * 1.5234375) / 4]
    own = [values(states) for states in result.variates]
    assert own[:2] == [[0, -3], [2.0625, -3]]
    assert own[2] == [2.0625 + 0.46875 + 1.6875 - 2.3203125, -3 + 0.46875 + 1.6875 - 1.5234375]
    assert values(result.variate) == [-1.5, -0.46875, sum(own[2]) / 2]
    assert values(result.personal) == [result.shared[2]["weight"].item()] * 2


def test_variates_count_each_clients_own_steps_and_the_rate_of_the_round():
    result = scaffold(**one_weight([8, 8], steps=[1, 2], rounds=2, lr=[0.5, 0.25], cohorts=[[0, 1], [0]]))
    # 4 and 6: c₀ = -4/.5, c₁ = -6/(.5·2). w = 5, c = -7: d = -3 + 8 - 7, w = 5.5, c₀ = -8 + 7 - .5/.25
    assert [values(states) for states in result.variates] == [[-8, -6], [-3, -6]]
    assert values(result.shared) == [5, 5.5]
    assert values(result.variate) == [-7, -4.5]


def test_variates_find_the_optimum_that_averaging_misses():
    """Unequal numbers of steps pull the average to 8; the sum of the losses is least at 4."""
    world = one_weight([0, 8], steps=[1, 20], lr=0.1, rounds=200)
    assert abs(values(fedavg(**world).shared)[-1] - 4) > 2
    assert values(scaffold(**world).shared)[-1] == pytest.approx(4, abs=1e-9)


def test_the_servers_variate_is_the_mean_of_all_clients():
    result = scaffold(**normalized())
    for server, clients in zip(result.variate, result.variates, strict=True):
        assert_same([server], [{name: sum(c[name] for c in clients) / 3 for name in server}])
    assert set(server) == {name for name, _ in network().named_parameters()}
    assert all(server[name].abs().max() > 1e-3 for name in ("0.weight", "1.weight", *HEAD))


def test_first_round_of_scaffold_is_averaging():
    world = normalized(rounds=2, lr=[0.3, 0.2], cohorts=[[0, 1], [1, 2]])
    corrected, plain = scaffold(**world), fedavg(**world)
    assert_same(corrected.shared[:1], plain.shared[:1])
    assert not torch.allclose(corrected.shared[1]["6.weight"], plain.shared[1]["6.weight"])


def test_personal_tensors_have_no_variates():
    names = outside_batch_norm(network())
    assert set(scaffold(**normalized(shared=names)).variate[-1]) == set(names)
    assert_same(scaffold(**normalized(shared=[])).personal, local(**normalized()).personal)


def test_private_model_by_hand():
    result = ditto(1.0, **one_weight([4, 0], steps=[2, 1], rounds=2, cohorts=[[0, 1], [0]]))
    # client 0: w = 2, 3; v = 2, then d = (2 - 4) + (2 - 0) = 0. client 1 stays at 0
    # round 2 from 1.5: w = 2.75, 3.375; v: d = (2 - 4) + (2 - 1.5), v = 2.75; d = -1.25 + 1.25
    assert values(result.shared) == [1.5, 3.375]
    assert [values(states) for states in result.deployed] == [[2, 0], [2.75, 0]]


def test_private_models_pull_nothing_back():
    """The shared model is that of averaging, and without a pull the private ones are trained alone."""
    world = normalized()
    for lam in (0.0, 0.7):
        assert_same(ditto(lam, **world).shared, fedavg(**world).shared)
    alone = local(**world)
    for ours, theirs in zip(ditto(0.0, **world).deployed, alone.deployed, strict=True):
        assert_same(ours, theirs)
    pulled = ditto(0.7, **world).personal[0]
    assert all((pulled[name] - alone.personal[0][name]).abs().max() > 1e-4 for name in ("0.weight", *HEAD))
    assert_same(ditto(0.7, **normalized(shared=[])).personal, alone.personal)


def test_mask_by_hand():
    model = nn.Linear(1, 1).double()
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 2.0)
    one = torch.ones(1, 1, dtype=torch.float64)
    old, mask = {"bias": torch.zeros(1).double()}, {"bias": torch.tensor([0.5]).double()}
    learned = mix(model, old, mask, [(one, 6 * one), (one, 0 * one)], 0.0625, lambda z, y: ((z - y) ** 2).mean() / 2)
    # b = 0 + 2·.5, z = 2, g = -4: M = .5 + .0625·8 = 1, b = 2, z = 3, g = 3: M = 1 - .0625·6
    assert (learned["bias"].item(), model.bias.item(), model.weight.item()) == (0.625, 1.25, 1.0)
    assert mask["bias"].item() == 0.5
    for target, edge in ((100, 1.0), (-100, 0.0)):
        assert mix(model, old, mask, [(one, target * one)], 1.0, nn.MSELoss())["bias"].item() == edge


def test_mask_leaves_statistics_alone_and_goes_by_them():
    model, (x, y) = network(), examples("ada", 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = {name: before[name] - 1 for name in HEAD}
    ones = {name: torch.ones_like(old[name]) for name in HEAD}
    learned = mix(model, old, ones, [(x, y)], 0.1, nn.functional.cross_entropy)
    net = network().eval()
    nn.functional.cross_entropy(net(x), y).backward()
    expected = {f"6.{name}": (1 - 0.1 * p.grad).clamp(0, 1) for name, p in net[6].named_parameters()}
    assert_same([learned], [expected])
    assert_same([model.state_dict()], [{**before, **{name: old[name] + learned[name] for name in HEAD}}])


def with_mixing(world, **given):
    """What FedALA is given beside a world: masks are learned on the first half of a client's batches."""
    whole = {"lr_mix": 1 / 32, "rounds_first": 2, "share": 0.5, "names": ["weight"]}
    return {**world, **whole, "first_epoch": world["batches"], "deploy_epoch": world["batches"], **given}


def test_mixing_by_hand():
    world = one_weight([8, 0, 5], rounds=2, cohorts=[[0, 1], [0, 1]])
    result = fedala(**with_mixing(world))
    # round 1, plain: 4 and 0, w = 2. To predict, two passes. client 0: gap = 2 - 4, s = 2, g = -6, M = 1 - 12/32 and
    # s = 2.75, g = -5.25, M = .625 - 10.5/32. client 1: gap = 2, g = 2, M = 1 - 4/32, s = g = 1.75, M = .875 - 3.5/32
    assert values(result.deployed[0]) == [4 - 2 * 0.296875, 2 * 0.765625, 2]
    # round 2 learns the same from the same, starts at 3.40625 and 1.53125, and ends half way to the targets
    assert values(result.shared) == [2, (5.703125 + 0.765625) / 2]
    # the masks were kept, and from now on one pass refines them
    gaps = 3.234375 - 5.703125, 3.234375 - 0.765625
    starts = 5.703125 + gaps[0] * 0.296875, 0.765625 + gaps[1] * 0.765625
    masks = 0.296875 - (starts[0] - 8) * gaps[0] / 32, 0.765625 - starts[1] * gaps[1] / 32
    expected = [5.703125 + gaps[0] * masks[0], 0.765625 + gaps[1] * masks[1], 3.234375]
    assert values(result.personal) == pytest.approx(expected, abs=1e-12)


def test_mixing_goes_over_a_share_of_the_batches_rounded_up():
    """Of three batches the first two count, in order; predicting has its own."""
    one = torch.ones(1, 1, dtype=torch.float64)
    epochs = {"first_epoch": (2, 10, -1000), "deploy_epoch": (4, 4, -1000)}
    given = {k: lambda t, i, targets=v: [(one, y * one) for y in targets] for k, v in epochs.items()}
    settings = {"lr_mix": 1 / 8, "rounds_first": 1, "share": 0.4}
    result = fedala(**with_mixing(one_weight([8, 0], rounds=2), **settings, **given))
    # client 0, gap = 2 - 4. to predict: g = -2, M = 1 - 4/8, s = 3; g = -1, M = .5 - 2/8, s = 4 - .5
    assert values(result.deployed[0])[0] == 3.5
    # to train: g = 0; g = -8, M < 0, s = 4, which ends at 6. client 1, gap = 2: g = 0; g = -8, M > 1, s = 2, ends at 1
    assert values(result.shared) == [2, 3.5]


def test_mixing_nothing_is_averaging():
    """Without a step of the mask, in the first round, and for a client that never trained."""
    world = normalized()
    extra = {"names": HEAD, "share": 1.0}
    result, plain = fedala(**with_mixing(world, **extra, lr_mix=0.0)), fedavg(**world)
    assert_same(result.shared, plain.shared)
    for ours, theirs in zip(result.deployed, plain.deployed, strict=True):
        assert_same(ours, theirs)
    result = fedala(**with_mixing(world, **extra, lr_mix=0.5))
    assert_same(result.shared[:1], plain.shared[:1])
    assert_same(result.deployed[0][2:], plain.deployed[0][2:])
    assert not torch.allclose(result.shared[1]["6.weight"], plain.shared[1]["6.weight"])


def test_only_the_named_tensors_are_mixed():
    result = fedala(**with_mixing(normalized(), names=HEAD, share=1.0, lr_mix=0.5))
    for i, state in enumerate(result.personal):
        mixed = {name for name, tensor in result.shared[-1].items() if not torch.equal(tensor, state[name])}
        assert mixed == set(HEAD), i


def test_predicting_leaves_no_trace():
    """Other batches to predict with change no later round."""
    world = normalized()
    nowhere = with_mixing(world, names=HEAD, lr_mix=0.5, deploy_epoch=lambda t, i: [])
    somewhere = with_mixing(world, names=HEAD, lr_mix=0.5)
    assert_same(fedala(**nowhere).shared, fedala(**somewhere).shared)
