"""Methods whose clients learn from those that resemble them, against textbook loops."""

from functools import partial

import pytest
from test_oracles import NAMES, ROUNDS, assert_follows, federation

from idiolect import methods, scope
from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.parts import critical_mix, share
from idiolect.testing.oracles import collaboration
from idiolect.testing.worlds import network


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_fedamp(sigma):
    settings = {"strength": 0.8, "others": 0.9, "sigma": sigma}
    assert_follows(methods.fedamp(**settings), collaboration.fedamp, **settings, shared=[])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedcac(weighting):
    """The bar passes the largest overlap within the rounds: with partners at first, alone at last."""
    assert_follows(methods.fedcac(top=0.4, rounds=3, weighting=weighting), collaboration.fedcac, top=0.4, beta=3)


def test_fedcac_with_personal_batch_norm():
    shared = sorted((~scope.batch_norm)(Model(network()).structure))
    method = Method((share(~scope.batch_norm), critical_mix(0.5, 8)))
    assert_follows(method, collaboration.fedcac, top=0.5, beta=8, shared=shared)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_pfedsim(warmup, weighting):
    assert_follows(methods.pfedsim(warmup, weighting), collaboration.pfedsim, warmup=warmup, head="6")


@pytest.mark.parametrize(
    ("weighting", "settings"), [("samples", {"strength": 0.7}), ("uniform", {"strength": 5.0, "head_lr": 0.5})]
)
def test_fedpac(weighting, settings):
    """Also what each client predicts with: its head, trained anew on the newest body."""
    method = methods.fedpac(**settings, weighting=weighting)
    made = federation(method)

    def epoch(purpose, t, i):
        made.round = t
        return [(b.x, b.y) for b in made.assignment(NAMES[i], purpose).stream.epochs(1)]

    first = {(t, i): epoch("train", t, i) for t in range(ROUNDS) for i in range(len(NAMES))}
    last = {(t, i): epoch("deploy", t + 1, i) for t in range(ROUNDS) for i in range(len(NAMES))}
    body = sorted((~scope.head)(made.model.structure))
    oracle = partial(
        collaboration.fedpac,
        classes=3,
        first_epoch=lambda t, i: first[t, i],
        deploy_epoch=lambda t, i: last[t, i],
        shared=body,
    )
    assert_follows(method, oracle, **settings)
