"""Methods with a loss of their own against textbook loops."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_oracles import assert_follows

from idiolect import methods
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
    slot = made.server["prototypes"]
    assert set(slot["known"].nonzero().flatten().tolist()) == set(expected.prototypes[-1])
    for label, prototype in expected.prototypes[-1].items():
        assert torch.allclose(slot["prototypes"][label], prototype, rtol=0, atol=1e-11)
