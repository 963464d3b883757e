"""Methods that make results even over clients, against their textbook loops."""

import pytest
from test_oracles import assert_follows

from idiolect import methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.testing.oracles import fairness
from idiolect.testing.worlds import network


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 4.0])
def test_qfedavg(q, weighting):
    assert_follows(methods.qfedavg(q, weighting), fairness.qfedavg, q=q)


def test_qfedavg_with_personal_batch_norm():
    """A client's loss is that of its own normalization, whose weights are in no norm."""
    shared = sorted((~scope.batch_norm)(Model(network()).structure))
    method = Method((parts.share(~scope.batch_norm), parts.loss_weights(2.0)))
    assert_follows(method, fairness.qfedavg, q=2.0, shared=shared)
