"""HBN against a textbook loop that shares no code with it."""

from functools import partial

import pytest
from test_oracles import assert_follows, federation
from test_oracles_represent import passes

from idiolect import methods
from idiolect.testing.oracles import hybrid


@pytest.mark.parametrize(
    ("renewal", "predict", "weighting"),
    [(0.3, "last", "samples"), (0.3, "smoothed", "uniform"), (1.0, "smoothed", "samples")],
)
def test_hbn(renewal, predict, weighting):
    method = methods.hbn(renewal, predict, weighting)
    once = partial(passes(federation(method), 1), "train")

    def oracle(**world):
        expected = hybrid.hbn("1", renewal, predict == "smoothed", once, **world)
        for states in expected.deployed:
            for state in states:
                state["1.hybrid_norm.factor"] = state.pop("1.factor")
        return expected

    made, expected = assert_follows(method, oracle)
    factors = [state["1.hybrid_norm.factor"] for state in expected.personal]
    assert min(f.abs().max() for f in factors) > 1e-3
    gap = (made.server["hybrid_norm"]["mean"] - made.server["share"]["1.running_mean"]).abs().max()
    assert gap > 1e-3 if predict == "last" else gap == 0
