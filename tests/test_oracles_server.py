"""Methods with a server's step, normalized averages, other starts or a second model, against their textbook loops."""

from dataclasses import replace
from functools import partial

import pytest
from test_oracles import assert_follows

from idiolect import methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import server
from idiolect.testing.worlds import network

FEDBN = sorted((~scope.batch_norm)(Model(network()).structure))
ADAPTIVE = {"lr": 0.05, "beta1": 0.8, "beta2": 0.7, "tau": 0.01}


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (methods.fedavgm(0.6, lr=0.7), partial(server.fedavgm, 0.6, 0.7)),
        (methods.fedadagrad(0.05, tau=0.01), partial(server.fedopt, "adagrad", 0.05, 0.0, 0.0, 0.01)),
        (methods.fedadam(**ADAPTIVE), partial(server.fedopt, "adam", 0.05, 0.8, 0.7, 0.01)),
        (methods.fedyogi(**ADAPTIVE), partial(server.fedopt, "yogi", 0.05, 0.8, 0.7, 0.01)),
        (methods.fednova(), server.fednova),
        (methods.fedlesam(0.3), partial(server.fedlesam, 0.3)),
        (methods.fedinit(0.2), partial(server.fedinit, 0.2)),
        (methods.pfedme(2.0, steps=3, lr=0.1), partial(server.pfedme, 2.0, 3, 0.1)),
        (methods.apfl(0.4), partial(server.apfl, 0.4, True)),
        (methods.apfl(0.7, adaptive=False), partial(server.apfl, 0.7, False)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_method(method, oracle, weighting):
    assert_follows(replace(method, weighting=weighting), oracle)


@pytest.mark.parametrize(
    ("part", "oracle"),
    [
        (parts.server_sgd(0.7, 0.6), partial(server.fedavgm, 0.6, 0.7)),
        (parts.server_adaptive("yogi", **ADAPTIVE), partial(server.fedopt, "yogi", 0.05, 0.8, 0.7, 0.01)),
        (parts.normalized_average(), server.fednova),
        (parts.estimated_sam(0.3), partial(server.fedlesam, 0.3)),
        (parts.relaxed_start(0.2), partial(server.fedinit, 0.2)),
        (parts.moreau_envelope(2.0, steps=3, lr=0.1), partial(server.pfedme, 2.0, 3, 0.1)),
        (parts.personal_mixture(0.4), partial(server.apfl, 0.4, True)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_with_personal_normalization(part, oracle):
    """What is not exchanged is left alone: the compositions with FedBN have oracles too."""
    assert_follows(methods.fedbn() + part, oracle, shared=FEDBN)
