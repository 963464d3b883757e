"""What a client that never trained gets, against plain loops over the clients that did."""

import pytest
import torch
from torch import nn

import idiolect
from idiolect import methods
from idiolect.compute.autograd import Model
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.models import small_cnn
from idiolect.rounds.training import Training
from idiolect.running.new_client import new_client
from idiolect.storage.memory import RamStore
from idiolect.testing.oracles.averaging import pooled_statistics
from idiolect.testing.worlds import SIZES, examples, federation

RULES = ("average", "pooled", "reestimate")
STATISTICS = {"1.running_mean", "1.running_var"}
X = examples("a new client", 50)[0]


def played(method, rounds=2, **how):
    made = federation(method, **how)
    for _ in range(rounds):
        made.play()
    return made


def given(made, rule, x=X, **how):
    return new_client(made, rule, x if rule == "reestimate" else None, **how).state_dict()


def same(ours, theirs, names=None):
    for name in theirs if names is None else names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("make", [methods.fedbn, methods.silobn])
def test_means_over_the_clients_that_trained(make, weighting):
    """Three of four clients trained, two of them in one round only; the fourth must not count."""
    made = played(make(), participation=0.5, seed=3)
    known = [name for name in SIZES if name in made.memory]
    states = [made.model.tensors(made.personal(name)) for name in known]
    counters = [int(state["1.num_batches_tracked"]) for state in states]
    assert (len(known), len(set(counters))) == (3, 3)
    sizes = [SIZES[name] if weighting == "samples" else 1 for name in known]
    expected = {}
    for name, tensor in states[0].items():
        expected[name] = torch.zeros_like(tensor)
        for state, size in zip(states, sizes, strict=True):
            expected[name] = expected[name] + size / sum(sizes) * state[name]
    expected["1.num_batches_tracked"] = torch.tensor(max(counters))
    same(given(made, "average", weighting=weighting), expected)
    pooled = pooled_statistics(states, sizes)
    assert set(pooled) == STATISTICS
    same(given(made, "pooled", weighting=weighting), {**expected, **pooled})
    same(given(made, "reestimate", weighting=weighting), expected, set(expected) - STATISTICS)


def test_defaults():
    made = played(methods.fedbn())
    same(new_client(made).state_dict(), given(made, "pooled", weighting="samples"))


def test_pooled_variance_counts_the_spread_of_means():
    made = played(methods.fedbn())
    average, pooled = given(made, "average"), given(made, "pooled")
    assert (pooled["1.running_var"] > average["1.running_var"] + 1e-4).all()
    same(average, pooled, set(pooled) - {"1.running_var"})


@pytest.mark.parametrize("rule", RULES)
def test_identical_clients_give_their_own_normalization(rule):
    """Normalization comes first and keeps its last batch, all examples: its statistics are those of the client."""
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double() * 3 + 2, torch.arange(20) % 2
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 2)).double()
    clients = {name: ClientData(train=(x, y)) for name in "abc"}
    made = Federation(Model(net), methods.fedbn(), Training(batch_size=None), 3, 1.0, 0, clients)
    made.play()
    made.play()
    same(given(made, rule, x), made.model.tensors(made.personal("b")))


def two_layers():
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh()),
        *(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2)),
    ).double()


def deep():
    """A federation of two clients whose network has two layers of normalization and dropout, and a new client's x."""
    torch.manual_seed(4)
    x, y = torch.randn(3, 30, 4).double() * torch.tensor([1.0, 2.0, 5.0]).reshape(3, 1, 1) + 1, torch.arange(30) % 2
    clients = {name: ClientData(train=(x[i], y)) for i, name in enumerate("ab")}
    made = Federation(Model(two_layers()), methods.fedbn(), Training(lr=0.5, batch_size=10), 3, 1.0, 0, clients)
    made.play()
    return made, x[2]


def test_reestimated_statistics_by_hand():
    """Every layer normalizes by all examples (biased variance) and keeps their unbiased variance; no dropout."""
    made, x = deep()
    state = given(made, "reestimate", x)
    hidden = x
    for linear, norm in (("0", "1"), ("4", "5")):
        values = hidden @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]
        mean, square = values.sum(0) / 30, (values**2).sum(0) / 30
        biased = square - mean**2
        same(state, {f"{norm}.running_mean": mean, f"{norm}.running_var": biased * 30 / 29})
        scaled = (values - mean) / (biased + 1e-5).sqrt()
        hidden = torch.tanh(scaled * state[f"{norm}.weight"] + state[f"{norm}.bias"])


def test_reestimate_changes_the_statistics_alone():
    made, x = deep()
    reestimated, average = new_client(made, "reestimate", x), new_client(made, "average")
    moved = {n for n, t in reestimated.state_dict().items() if not torch.equal(t, average.state_dict()[n])}
    assert moved == {f"{layer}.{leaf}" for layer in (1, 5) for leaf in ("running_mean", "running_var")}
    assert (reestimated[1].momentum, reestimated[5].momentum) == (0.1, None)
    assert not any(module.training for module in reestimated.modules())
    same(given(made, "reestimate", x.flip(0)), reestimated.state_dict())


def test_where_all_is_shared():
    made = played(methods.fedavg())
    shared = dict(made.server["share"])
    for rule in ("average", "pooled"):
        same(given(made, rule), shared)
    reestimated = given(made, "reestimate")
    same(reestimated, shared, set(shared) - STATISTICS)
    values = nn.functional.conv2d(X, shared["0.weight"], shared["0.bias"])
    torch.testing.assert_close(reestimated["1.running_mean"], values.mean((0, 2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_federation_is_left_as_it_was(rule):
    made = played(methods.fedbn())
    rows = [*made.server.values(), *(t for c in SIZES for t in made.memory.get(c).values()), made.model.initial]
    before, generator = [row.flat.clone() for row in rows], torch.get_rng_state()
    with torch.no_grad():
        for tensor in new_client(made, rule, X if rule == "reestimate" else None).state_dict().values():
            tensor.zero_()
    assert all(torch.equal(row.flat, copy) for row, copy in zip(rows, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert made.round == 2


def test_order_of_clients_is_irrelevant():
    made = played(methods.fedbn())
    before = {rule: given(made, rule) for rule in RULES}
    store = RamStore(made.memory.get("nobody"))
    for name in reversed(list(made.memory)):
        store.put(name, made.memory.get(name))
    made.memory = store
    for rule in RULES:
        assert all(torch.equal(tensor, before[rule][name]) for name, tensor in given(made, rule).items())


def test_small_spread_far_from_zero():
    """In float32 Σ p (v + μ²) − μ̄² is all rounding error here: μ² is 10⁸."""
    net = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0), nn.Linear(1, 2))
    levels = {str(m): m for m in range(10000, 10007)}
    clients = {c: ClientData(train=([[m - 0.25], [m + 0.25]], [0, 1])) for c, m in levels.items()}
    made = Federation(Model(net), methods.fedbn(), Training(), 1, 1.0, 0, clients)
    made.play()
    norm = new_client(made)[0]
    assert norm.running_mean.item() == 10003
    assert norm.running_var.item() == pytest.approx(0.125 + 4, abs=1e-6)


TRACKING = nn.InstanceNorm2d(1, track_running_stats=True)
INSTANCE = nn.Sequential(TRACKING, nn.Flatten(), nn.Linear(36, 3))
FORGETFUL = nn.Sequential(TRACKING, nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("method", "net", "rounds", "arguments", "line"),
    [
        (methods.local(), None, 1, {}, "0.bias is personal .* new client of Local has to train first"),
        (methods.bn_only(), None, 1, {}, "0.bias is personal .* new client of BN-only has to train first"),
        (methods.silobn(), INSTANCE, 1, {}, "0.running_mean is personal and not of batch normalization"),
        (methods.fedbn(), None, 0, {}, "no client has trained yet; play a round"),
        (methods.fedbn(), None, 1, {"rule": "mean"}, "rule is one of 'pooled', 'average', 'reestimate', not 'mean'"),
        (methods.fedbn(), None, 1, {"weighting": "size"}, "weighting is 'samples' or 'uniform', not 'size'"),
        (methods.fedbn(), None, 1, {"x": X}, "rule 'pooled' reads no examples; leave x out"),
        (
            methods.fedbn(),
            FORGETFUL,
            1,
            {"rule": "reestimate", "x": X},
            "no batch normalization with running statistics",
        ),
        (methods.fedbn(), None, 1, {"rule": "reestimate"}, r"needs x .*NoneType; .*shape \(n, 1, 6, 6\), n above 1"),
    ],
)
def test_one_line_for_what_cannot_be(method, net, rounds, arguments, line):
    made = federation(method)
    if net:
        made = Federation(Model(net.double()), method, made.training, 4, 1.0, 0, made.clients)
    for _ in range(rounds):
        made.play()
    with pytest.raises(idiolect.UsageError, match=line) as caught:
        new_client(made, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (X.numpy(), "not ndarray; give its examples as one torch.float64 tensor"),
        (X[0], r"x is torch.float64 of shape \(1, 6, 6\); give"),
        (X[:, :, 1:], r"shape \(50, 1, 5, 6\); give .* shape \(n, 1, 6, 6\)"),
        (X[:1], r"shape \(1, 1, 6, 6\); .* n above 1"),
        (X.long(), "x is torch.int64"),
        (torch.where(torch.arange(50).reshape(50, 1, 1, 1) == 7, torch.nan, X), "not finite in row 7"),
    ],
)
def test_one_line_for_examples_that_cannot_be_used(x, line):
    with pytest.raises(idiolect.UsageError, match=line):
        new_client(played(methods.fedbn(), 1), "reestimate", x)


def test_examples_are_read_in_the_dtype_of_the_run():
    made = played(methods.fedbn(), 1)
    same(given(made, "reestimate", X.float()), given(made, "reestimate", X.float().double()))


def test_a_new_hospital_on_digits():
    """Four clients see digits at other levels and contrasts; the fifth never trained and sees them dim and bright."""
    pool = idiolect.load("digits")
    scanners = {"ada": (1.0, 0.0), "ben": (0.7, 0.3), "cleo": (1.3, -0.3), "dan": (1.0, 0.5), "new": (0.5, 0.8)}
    shares = torch.randperm(len(pool.y), generator=torch.Generator().manual_seed(0)).tensor_split(5)
    clients = {}
    for (name, (gain, offset)), rows in zip(scanners.items(), shares, strict=True):
        x, y = pool.x[rows] * gain + offset, pool.y[rows]
        clients[name] = ClientData(train=(x[:180], y[:180]), test=(x[180:], y[180:]))
    new = clients.pop("new")
    torch.manual_seed(0)
    run = idiolect.fit(
        small_cnn((1, 8, 8), 10),
        clients,
        methods.fedbn(),
        rounds=6,
        training=Training(lr=0.1, batch_size=30),
        evaluate_every=6,
    )
    right = {}
    for rule in RULES:
        model = new_client(run.federation, rule, new.train.x if rule == "reestimate" else None)
        right[rule] = (model(new.test.x).argmax(dim=1) == new.test.y).double().mean().item()
    known = run.records[-1]["personalized"]["test"]["accuracy"]["mean"]
    assert known > 0.9
    assert right["reestimate"] > known - 0.1
    assert max(right["average"], right["pooled"]) < right["reestimate"] - 0.3
