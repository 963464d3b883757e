"""Methods whose clients learn from those that resemble them, against textbook loops."""

import pytest
from test_oracles import assert_follows

from idiolect import methods, scope
from idiolect.method import Method
from idiolect.model import Model
from idiolect.parts import critical_mix, share
from idiolect.testing.oracles import confer
from idiolect.testing.worlds import network


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_fedamp(sigma):
    settings = {"strength": 0.8, "others": 0.9, "sigma": sigma}
    assert_follows(methods.fedamp(**settings), confer.fedamp, **settings, shared=[])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedcac(weighting):
    """The bar passes the largest overlap within the rounds: with partners at first, alone at last."""
    assert_follows(methods.fedcac(top=0.4, rounds=3, weighting=weighting), confer.fedcac, top=0.4, beta=3)


def test_fedcac_with_personal_batch_norm():
    shared = sorted((~scope.batch_norm)(Model(network()).anatomy))
    method = Method((share(~scope.batch_norm), critical_mix(0.5, 8)))
    assert_follows(method, confer.fedcac, top=0.5, beta=8, shared=shared)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_pfedsim(warmup, weighting):
    assert_follows(methods.pfedsim(warmup, weighting), confer.pfedsim, warmup=warmup, head="6")
