"""pFedFDA against a textbook loop that shares no code with it."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, assert_follows, federation
from test_oracles_represent import passes

from idiolect import Method, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import discriminant
from idiolect.testing.worlds import network


def follow(method, own, diagonal, ridge, **shared):
    made = federation(method)
    means = made.server["discriminant_head"]["means"]
    assert means.min() >= 0
    assert 0.5 < means.max() < 1
    oracle = partial(discriminant.pfedfda, means, own, diagonal, ridge, passes(made, 1))
    made, _ = assert_follows(method, oracle, **shared)
    heads = torch.stack([made.personal(name)["6.weight"] for name in NAMES])
    assert (heads.std(0).max() > 1e-3) == (own != 0), "clients have one head where they use the shared Gaussians alone"
    return made


@pytest.mark.parametrize(("covariance", "weighting"), [("full", "samples"), ("diagonal", "uniform")])
def test_pfedfda(covariance, weighting):
    method = methods.pfedfda(covariance=covariance, ridge=0.01, weighting=weighting)
    made = follow(method, None, covariance == "diagonal", 0.01)
    assert made.server["discriminant_head"]["covariance"].shape == ((21,) if covariance == "full" else (6,))


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_pfedfda_with_a_fixed_share(own):
    follow(methods.pfedfda(own, ridge=0.05), own, False, 0.05)


@pytest.mark.slow
def test_pfedfda_with_personal_normalization():
    shared = ~(scope.batch_norm | scope.head)
    method = Method((parts.share(shared), parts.discriminant_head(ridge=0.01)), "FedBN + pFedFDA")
    follow(method, None, False, 0.01, shared=sorted(shared(Model(network()).structure)))
