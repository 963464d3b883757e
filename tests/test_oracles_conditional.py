"""FedCP and GPFL against textbook loops that share no code with them."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, SIZES, assert_follows, close, federation, given

from idiolect import methods
from idiolect.core.rng import derive, uniform_hash
from idiolect.testing.oracles import conditional
from idiolect.testing.worlds import examples, network


def added(made, name):
    """Return the first tensors of a module that a method attaches to the head."""
    start = f"6.{name}."
    return {n.removeprefix(start): t for n, t in made.server["share"].items() if n.startswith(start)}


def noise_of(method):
    """Return the noise of each round, client and step: a hash of the seed of the round and all steps so far."""
    made = federation(method)
    world = given(made)
    seeds, taken, before = {}, dict.fromkeys(range(len(NAMES)), 0), {}
    for t, cohort in enumerate(world["cohorts"]):
        made.round = t
        for i in cohort:
            seeds[t, i], before[t, i] = int(made.assignment(NAMES[i], "train").seed) % 2**24, taken[i]
            taken[i] += len(world["batches"](t, i))

    def noise(t, i, step):
        batch = len(world["batches"](t, i)[step][1])
        key = torch.tensor(seeds[t, i] + 2**24 * (before[t, i] + step)) + derive("gate")
        return uniform_hash(key, batch * 6, torch.float64).logit().view(batch, 6)

    return noise


@pytest.mark.parametrize(("strength", "weighting"), [(0.0, "samples"), (3.0, "samples"), (3.0, "uniform")])
def test_fedcp(strength, weighting):
    method = methods.fedcp(strength, weighting)
    gate = added(federation(method), "gate")
    made, expected = assert_follows(method, partial(conditional.fedcp, strength, gate, noise_of(method)))
    close(made.server["gated_heads"], expected.heads[-1], "shared head")
    x, net = examples("unseen", 5)[0], conditional.listed(network(), "gate", gate)
    for i, name in enumerate(NAMES):
        own = made.model.predict(made.personal(name), x)
        close({"": own}, {"": conditional.fedcp_predictions(net, expected.personal[i], expected.heads[-1], x)}, name)


@pytest.mark.parametrize(("strength", "decay", "weighting"), [(0.3, 0.2, "samples"), (0.01, 0.0, "uniform")])
def test_gpfl(strength, decay, weighting):
    method = methods.gpfl(strength, decay, weighting)
    valve = added(federation(method), "valve")
    counts = [[int((examples(name, n)[1] == c).sum()) for c in range(3)] for name, n in SIZES.items()]
    made, expected = assert_follows(method, partial(conditional.gpfl, strength, decay, counts, valve))
    x, net = examples("unseen", 5)[0], conditional.listed(network(), "valve", valve)
    for i, name in enumerate(NAMES):
        own = made.model.predict(made.personal(name), x)
        close({"": own}, {"": conditional.gpfl_predictions(net, expected.personal[i], counts[i], x)}, name)
