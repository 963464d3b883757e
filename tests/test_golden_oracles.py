"""The oracles give the numbers of the authors' own programs, and those of cases done by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from golden_cases import GoldenCase, assert_summary, fedbn_case, fedfsa_case
from torch import nn
from torch.nn import functional as F

from idiolect.testing.oracles.averaging import (
    bn_only,
    fedavg,
    fedbn,
    fedprox,
    fine_tune,
    local,
    pooled_statistics,
    silobn,
)
from idiolect.testing.oracles.common import OracleResult, batch_norm_names
from idiolect.testing.oracles.dual import fedspeed
from idiolect.testing.oracles.sharpness import candidates, fedasam, fedfsa, fedsam, mofedsam, movement


@pytest.fixture(scope="module")
def fashion() -> GoldenCase:
    return fedfsa_case()


@pytest.fixture(scope="module")
def digits() -> GoldenCase:
    return fedbn_case()


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("FedAvg", "MoFedSAM", "FedSpeed")]


@pytest.fixture(scope="module", params=["FedFSA", *LONG])
def fashion_run(fashion: GoldenCase, request: pytest.FixtureRequest) -> tuple[str, OracleResult]:
    args, clients = fashion.settings["args"], fashion.settings["clients"]
    world = {
        "model": fashion.model,
        "batches": fashion.batches,
        "clients": clients,
        "rounds": fashion.settings["rounds"],
        "lr": args["lr"],
        "weights": [1] * clients,
        "clip": 10.0,
    }
    rho, alpha = args["rho_default"], args["alpha"]
    if request.param == "FedAvg":
        return "FedAvg", fedavg(**world)
    if request.param == "MoFedSAM":
        return "MoFedSAM", mofedsam(rho, alpha, **world)
    if request.param == "FedSpeed":
        return "FedSpeed", fedspeed(rho, args["lamb"], split=True, **world)
    return "FedFSA", fedfsa(rho, args["rho_larger"], args["TopC"], alpha, **world)


def test_fashion_server_weights_of_every_round(fashion, fashion_run):
    method, result = fashion_run
    names = list(result.shared[0])
    rounds = fashion.expected[method]["rounds"]
    assert len(rounds) == len(result.shared) == 8
    for t, (shared, expected) in enumerate(zip(result.shared, rounds, strict=True)):
        for name, gained, summary in zip(names, fashion.gain(shared, names), expected, strict=True):
            assert_summary(gained, summary, f"{method}, round {t}, {name}")


def test_fashion_layers_chosen_in_every_round(fashion, fashion_run):
    method, result = fashion_run
    if method in ("FedAvg", "FedSpeed"):
        assert result.top == []
        return
    names = list(result.shared[0])
    chosen = [[[names.index(name) for name in client] for client in clients] for clients in result.top]
    assert chosen == fashion.expected[method]["top"]


def test_fashion_head_tuning(fashion, fashion_run):
    method, result = fashion_run
    head = ["fc3.weight", "fc3.bias"]
    tuned = fine_tune(
        fashion.model,
        result.personal,
        lambda client: fashion.batches(0, client),
        fashion.settings["args"]["lr"],
        head,
        weight_decay=fashion.settings["args"]["lamb"] if method == "FedSpeed" else 0.0,  # that code leaves it on
        clip=10.0 if method in ("FedAvg", "FedSpeed") else math.inf,
    )
    model = fashion.model.__class__().double()
    for i, state in enumerate(tuned):
        expected = fashion.expected[method]["finetuned_clients"][i]
        for name, gained, summary in zip(head, fashion.gain(state, head), expected, strict=True):
            assert_summary(gained, summary, f"{method}, client {i}, {name}")
        model.load_state_dict(state)
        x, y = fashion.train[i]
        percent = 100 * (model(x).argmax(1) == y).double().mean().item()
        assert percent == pytest.approx(fashion.expected[method]["finetuned_train_accuracy_percent"][i])


@pytest.fixture(
    scope="module",
    params=[
        ("fedbn", 2),
        pytest.param(("fedavg", 8), marks=pytest.mark.slow),
        pytest.param(("fedbn", 8), marks=pytest.mark.slow),
    ],
    ids="{0[0]}-{0[1]}-rounds".format,
)
def digits_run(digits: GoldenCase, request: pytest.FixtureRequest) -> tuple[str, OracleResult]:
    method, rounds = request.param
    result = {"fedavg": fedavg, "fedbn": fedbn}[method](
        model=digits.model,
        batches=digits.batches,
        clients=3,
        rounds=rounds,
        lr=digits.settings["lr"],
        weights=[1, 1, 1],
    )
    return method, result


def test_digits_server_and_clients_of_every_round(digits, digits_run):
    method, result = digits_run
    norm_layers = batch_norm_names(digits.model)
    for t, (shared, deployed) in enumerate(zip(result.shared, result.deployed, strict=True)):
        expected = digits.expected[method][t]
        names = list(expected["server"])
        assert set(names) == set(shared)
        for name, gained in zip(names, digits.gain(shared, names), strict=True):
            assert_summary(gained, expected["server"][name], f"{method}, round {t}, {name}")
        for i, state in enumerate(deployed):
            assert set(expected["clients"][i]) == set(norm_layers)
            for name, gained in zip(norm_layers, digits.gain(state, norm_layers), strict=True):
                assert_summary(gained, expected["clients"][i][name], f"{method}, {t}, client {i}, {name}")
            counters = {int(v) for k, v in state.items() if k.endswith("num_batches_tracked")}
            assert counters == {expected["counters"][i]}


def test_digits_test_images_after_the_last_round(digits, digits_run):
    method, result = digits_run
    model = digits.model.__class__().double().eval()
    for i, (x, y) in enumerate(digits.test):
        model.load_state_dict(result.personal[i])
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(50)])
        expected = digits.expected[method][len(result.shared) - 1]["test"][i]
        assert F.cross_entropy(logits, y).item() == pytest.approx(expected["loss"], rel=1e-9)
        assert (logits.argmax(1) == y).double().mean().item() == pytest.approx(expected["accuracy"])


# The rest of this file: cases small enough to follow by hand. One weight w with loss (w - target)²/2, so
# that g = w - target; it starts at 0 unless said.


def half_square(z, y):
    return ((z - y) ** 2).mean() / 2


def one_weight(targets, steps=None, start=0.0, **given):
    """A world in which client i pulls w to ``targets[i]`` in ``steps[i]`` local steps."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, start)
    x = torch.ones(1, 1, dtype=torch.float64)
    steps = steps or [1] * len(targets)
    world = {
        "model": model,
        "batches": lambda t, i: [(x, x * targets[i])] * steps[i],
        "clients": len(targets),
        "rounds": 1,
        "weights": [1] * len(targets),
        "lr": 0.5,
        "loss": half_square,
    }
    return {**world, **given}


def values(states):
    return [state["weight"].item() for state in states]


def test_average_is_over_the_cohort_with_its_own_weights():
    world = one_weight([1, 3], lr=1.0, weights=[1, 3], rounds=3, cohorts=[[0], [0, 1], [1]])
    result = fedavg(**world)
    assert values(result.shared) == [1, 2.5, 3]
    assert values(result.personal) == [3, 3]
    assert world["model"].weight.item() == 0


def test_clients_alone_and_the_absent_one_untouched():
    result = local(**one_weight([1, 3], rounds=2, cohorts=[[0], [0]]))
    assert values(result.personal) == [0.75, 0]
    assert result.shared == [{}, {}]


def test_learning_rate_of_each_round():
    assert values(fedavg(**one_weight([8], rounds=2, lr=[0.5, 0.25])).shared) == [4, 5]


def test_clip_then_decay_then_momentum_which_ends_with_the_round():
    world = one_weight([10], steps=[2], lr=0.1, clip=1.0, weight_decay=1.0, momentum=0.5, rounds=2)
    # v = -1, w = .1; v = .5 (-1) + (-1 + .1) = -1.4, w = .24; v = -1 + .24, w = .316; v = -.38 - 1 + .316
    assert values(fedavg(**world).shared) == pytest.approx([0.24, 0.4224], abs=1e-6)
    assert values(fedavg(**one_weight([10], lr=0.1, clip=20.0)).shared) == [1.0]


def test_proximal_term_pulls_back_to_what_was_received():
    world = one_weight([1], steps=[2])
    assert values(fedprox(mu=1, **world).shared) == [0.5]
    assert values(fedprox(mu=0, **world).shared) == [0.75]
    assert values(fedprox(mu=1, shared=[], **world).personal) == [0.75]
    # round 2 from .5: g = -.5, w = .75; g = -.25 + 1 (.75 - .5) = 0
    assert values(fedprox(mu=1, **{**world, "rounds": 2}).shared) == [0.5, 0.75]


def test_adaptive_radius_scales_weights_and_not_biases():
    model = nn.Linear(1, 1, dtype=torch.float64)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    world = one_weight([0], model=model, batches=lambda t, i: [(x, 0 * x)], lr=0.1)
    # z = 2, g = (2, 2), T = (1 + 1, 1), T²g = (8, 2), ‖Tg‖ = √20: at w + ε with ρ = √20/10, z = 3
    shared = fedasam(rho=20**0.5 / 10, eta=1.0, **world).shared[0]
    assert shared["weight"].item() == pytest.approx(0.7, abs=1e-7)
    assert shared["bias"].item() == pytest.approx(0.7, abs=1e-7)
    # plain SAM: ε = ρ (1, 1)/√2, so with ρ = √2/2, z = 3 again
    assert fedsam(rho=2**-0.5, **world).shared[0]["bias"].item() == pytest.approx(0.7, abs=1e-7)


def test_server_direction_counts_each_clients_own_steps():
    cohorts = [[0, 1], [0]]
    world = one_weight([8, 16], steps=[1, 2], weights=[1, 3], rounds=2, cohorts=cohorts)
    result = mofedsam(rho=0, alpha=0.25, **world)
    # client 0: d = -2, w = 1. client 1: d = -4, w = 2; d = -3.5, w = 3.75. Δ = (-1/.5)/4 + 3/4 (-3.75/(.5·2))
    # round 2: d = (3.0625 - 8)/4 - 3/4 · 3.3125 = -3.71875, w = 3.0625 + 3.71875/2
    assert values(result.shared) == [3.0625, 4.921875]
    assert values(result.pseudo_gradient) == [-3.3125, -3.71875]
    assert values(mofedsam(rho=0, alpha=0.25, shared=[], **world).personal) == [6, 12]


def test_larger_radius_from_the_next_participation_on():
    world = one_weight([0, 0], start=1.0, lr=0.1, rounds=3, cohorts=[[0], [1], [0]], shared=[])
    calls = []

    def selection(*args):
        calls.append(args)
        return args[2] if args[0] == 0 else []

    result = fedfsa(rho=0.1, rho_larger=0.5, top=1, alpha=1.0, selection=selection, **world)
    # client 0: 1 - .1 (1 + .1) = .89, then .89 - .1 (.89 + .5); client 1: .89
    assert values(result.deployed[1]) == pytest.approx([0.89, 0.89])
    assert values(result.personal) == pytest.approx([0.751, 0.89])
    assert calls == [(0, 0, ["weight"]), (1, 1, ["weight"]), (2, 0, ["weight"])]
    assert result.top == [[["weight"], []], [["weight"], []], [[], []]]


def test_movement_of_a_tensor():
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 3.0])
    assert movement(before, after, "code") == pytest.approx(0.25 / 3)
    assert movement(before, after, "raw") == pytest.approx(1 / 3)
    assert movement(before, 5 * before + 7, "code") == 0
    assert math.isnan(movement(before, torch.ones(3), "code"))


def test_candidates_go_by_module_type():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm([3, 4]), nn.BatchNorm1d(3), nn.Linear(4, 4))
    assert candidates(model) == ["0.weight", "3.weight"]
    model[3].weight.requires_grad_(False)
    assert candidates(model) == ["0.weight"]


@pytest.fixture
def normalized():
    """A network with a BatchNorm layer, and two clients whose features differ in place and spread."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    data = [(torch.randn(6, 3).double() * (1 + i) + i, torch.tensor([0, 1] * 3)) for i in range(2)]
    return {
        "model": model,
        "batches": lambda t, i: [data[i]] * (i + 1),
        "clients": 2,
        "rounds": 2,
        "lr": 0.1,
        "weights": [1, 3],
    }


LINEAR = {"0.weight", "2.weight", "2.bias"}
AFFINE = {"1.weight", "1.bias"}
STATISTICS = {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (fedavg, LINEAR | AFFINE | STATISTICS),
        (fedbn, LINEAR),
        (silobn, LINEAR | AFFINE),
        (bn_only, AFFINE | STATISTICS),
        (partial(bn_only, kind="affine"), AFFINE),
        (partial(bn_only, kind="statistics"), STATISTICS),
        (local, set()),
    ],
)
def test_what_is_exchanged(normalized, method, shared):
    result = method(**normalized)
    assert set(result.shared[-1]) == shared
    first, second = result.personal
    assert {name for name in first if torch.equal(first[name], second[name])} == shared
    assert [int(state["1.num_batches_tracked"]) for state in result.personal] == [2, 4]


@pytest.mark.parametrize(
    ("selection", "sensitivity", "top"),
    [
        ("most", "raw", "0.weight"),
        ("least", "raw", "2.weight"),
        ("most", "code", "2.weight"),
        ("least", "code", "0.weight"),
    ],
)
def test_most_and_least_moved_tensor(normalized, selection, sensitivity, top):
    # A steep last layer moves the first one more; an entry of 100 on an input of 0 hides that in its range.
    with torch.no_grad():
        normalized["model"][2].weight *= 3
        normalized["model"][0].weight[0, 0] = 100
    for x, _ in normalized["batches"](0, 0) + normalized["batches"](0, 1):
        x[:, 0] = 0
    result = fedfsa(0.1, 0.2, 1, 1.0, selection=selection, sensitivity=sensitivity, **normalized)
    assert result.top[0] == [[top], [top]]


def test_statistics_come_from_the_first_pass(normalized):
    once = {**normalized, "rounds": 1, "batches": lambda t, i: normalized["batches"](t, i)[:1]}
    plain, sharp = fedavg(**once), fedsam(rho=1.0, **once)
    for name in STATISTICS:
        assert torch.equal(plain.shared[0][name], sharp.shared[0][name])
    assert not torch.allclose(plain.shared[0]["0.weight"], sharp.shared[0]["0.weight"])
    assert [int(state["1.num_batches_tracked"]) for state in sharp.personal] == [1, 1]


def test_tuning_the_head_leaves_the_body(normalized):
    states = fedbn(**normalized).personal
    head, whole = (
        fine_tune(normalized["model"], states, lambda i: normalized["batches"](0, i), 0.1, names)
        for names in (["2.weight", "2.bias"], None)
    )
    for before, tuned, retrained in zip(states, head, whole, strict=True):
        moved = {name for name in before if not torch.equal(before[name], tuned[name])}
        assert moved == {"2.weight", "2.bias", "1.num_batches_tracked", *STATISTICS}
        assert all(not torch.equal(before[name], retrained[name]) for name in before)


def test_pooled_statistics_are_those_of_the_union():
    data = [torch.randn(n, 3, dtype=torch.float64) * n + n for n in (2, 5, 9)]
    states = [{"n.running_mean": x.mean(0), "n.running_var": x.var(0, correction=0)} for x in data]
    pooled, union = pooled_statistics(states, [2, 5, 9]), torch.cat(data)
    torch.testing.assert_close(pooled["n.running_mean"], union.mean(0))
    torch.testing.assert_close(pooled["n.running_var"], union.var(0, correction=0))


def test_one_line_for_input_that_cannot_be_used():
    with pytest.raises(ValueError, match="weights has 1 entries: give 2"):
        fedavg(**one_weight([1, 3], weights=[1]))
    with pytest.raises(ValueError, match="no batches"):
        fedavg(**one_weight([1], batches=lambda t, i: []))
