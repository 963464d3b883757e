"""Methods for low-rank adapters against textbook loops."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, ROUNDS, assert_follows, close, federation, given

from idiolect import methods, scope
from idiolect.core.rng import uniform_hash
from idiolect.testing.oracles import adapters
from idiolect.testing.worlds import adapted, examples, network

A = ["0.lora_A.default.weight", "4.lora_A.default.weight"]
B = ["0.lora_B.default.weight", "4.lora_B.default.weight"]


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedit(weighting):
    made, _ = assert_follows(methods.fedit(weighting), adapters.fedit)
    assert {*A, *B, "1.weight", "1.running_var", "6.weight"} <= set(made.server["share"])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_ffa_lora(weighting):
    made, _ = assert_follows(methods.ffa_lora(weighting=weighting), partial(adapters.ffa_lora, constant=A))
    assert {*B, "1.weight", "1.running_var", "6.weight"} <= set(made.server["share"])
    for name in NAMES:
        close(made.memory.get(name)["share"], {n: adapted(network()).state_dict()[n] for n in A}, "A has moved")


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedsa_lora(weighting):
    made, _ = assert_follows(methods.fedsa_lora(weighting=weighting), partial(adapters.fedsa_lora, common=A))
    assert set(made.server["share"]) == set(A)


def test_fedsa_lora_with_a_shared_head():
    common = [*A, "6.weight", "6.bias"]
    method = methods.fedsa_lora(scope.lora_a | scope.head)
    assert_follows(method, partial(adapters.fedsa_lora, common=common))


INPUTS = [examples(f"{name}, to predict", n)[0] for name, n in zip(NAMES, (7, 2, 12, 5, 9), strict=True)]


def references(made, count):
    """Return (round, client) -> the examples with the smallest numbers that the client draws in that round."""
    found = {}
    for t in range(ROUNDS):
        made.round = t
        for i, name in enumerate(NAMES):
            work = made.assignment(name, "train")
            x = torch.cat([b.x for b in work.stream.epochs(1)])
            found[t, i] = x[uniform_hash(work.seed, len(x), torch.float64).argsort()[:count]]
    made.round = 0
    return lambda t, i: found[t, i]


def own_name(name):
    """Return the name of an own factor in the model, or of any other tensor."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.local_adapter.{leaf}.weight" if leaf in ("down", "up") else name


@pytest.mark.parametrize(
    ("share", "largest", "count", "weighting"),
    [(0.5, 0.5, 5, "samples"), (0.3, 0.9, 2, "uniform"), pytest.param(1.0, 1.0, 8, "samples", marks=pytest.mark.slow)],
)
def test_feddpa(share, largest, count, weighting):
    made = federation(methods.feddpa(share, largest, count, weighting=weighting))
    settings = {"share": share, "largest": largest, "last": "6", "references": references(made, count)}
    expected = adapters.feddpa(inputs=INPUTS, **settings, **given(made))
    shares = []
    for t in range(ROUNDS):
        made.play()
        close(made.server["share"], expected.shared[t], f"shared, round {t}")
        for i, name in enumerate(NAMES):
            own, theirs = made.deployed(name), expected.deployed[t][i]
            close(made.model.tensors(own.weights), {own_name(n): v for n, v in theirs.items()}, (name, t))
            weights = own.at(INPUTS[i])
            close({"": made.model.predict(weights, INPUTS[i])}, {"": expected.outputs[t][i]}, (name, t))
            shares += weights["4.local_adapter.share"].tolist() if name in made.memory else []
    assert min(shares) < 0.5 * max(shares)
    assert 0 < max(shares) <= largest
