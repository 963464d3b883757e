"""Methods with a loss of their own against textbook loops."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_oracles import NAMES, assert_follows, federation, given

from idiolect import Method, methods
from idiolect.core.rng import normal_hash
from idiolect.testing.oracles import losses

WEIGHTINGS = pytest.mark.parametrize("weighting", ["samples", "uniform"])


@WEIGHTINGS
@pytest.mark.parametrize(
    ("make", "oracle", "arguments"),
    [
        (methods.fedlc, partial(losses.fedlc, 0.8, epochs=2), {"tau": 0.8}),
        (methods.fedntd, partial(losses.fedntd, 0.7, 2.0), {"strength": 0.7, "temperature": 2.0}),
        (methods.fedrod, partial(losses.fedrod, epochs=2), {}),
        (methods.moon, partial(losses.moon, 0.9, 0.5), {"strength": 0.9}),
    ],
)
def test_method(make, oracle, arguments, weighting):
    assert_follows(replace(make(**arguments), weighting=weighting), oracle)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_fedproto(weighting):
    oracle = partial(losses.fedproto, 0.8, weighting == "samples", 2)
    made, expected = assert_follows(methods.fedproto(0.8, weighting), oracle)
    state = made.server["prototypes"]
    assert set(state["known"].nonzero().flatten().tolist()) == set(expected.prototypes[-1])
    for label, prototype in expected.prototypes[-1].items():
        assert torch.allclose(state["prototypes"][label], prototype, rtol=0, atol=1e-11)


def noise_of(method, samples):
    """Return the noise of each round, client and step: a hash of the seed of the round and all steps so far."""
    made = federation(method)
    world = given(made)
    seeds, taken, before = {}, dict.fromkeys(range(len(NAMES)), 0), {}
    for t, cohort in enumerate(world["cohorts"]):
        made.round = t
        for i in cohort:
            seeds[t, i] = int(made.assignment(NAMES[i], "train").seed) % 2**24
            before[t, i] = taken[i]
            taken[i] += len(world["batches"](t, i))

    def noise(t, i, step):
        batch = len(world["batches"](t, i)[step][1])
        key = torch.tensor(seeds[t, i] + 2**24 * (before[t, i] + step))
        return normal_hash(key, samples * batch * 6, torch.float64).view(samples, batch, 6)

    return noise


@WEIGHTINGS
@pytest.mark.parametrize(("kl", "renewal"), [("code", 1.0), ("bound", 0.6)])
def test_fedcr(kl, renewal, weighting):
    method = methods.fedcr(0.02, 3, renewal, kl, weighting)
    untuned = Method(method.parts[:-1], "FedCR", weighting)
    oracle = partial(losses.fedcr, 0.02, renewal, kl == "bound", 2, noise_of(untuned, 3))
    made, expected = assert_follows(untuned, oracle)
    state = made.server["class_gaussians"]
    for label, (mean, deviation) in expected.gaussians[-1].items():
        assert torch.allclose(state["mean"][label], mean, rtol=0, atol=1e-11)
        assert torch.allclose(state["deviation"][label], deviation, rtol=0, atol=1e-11)
