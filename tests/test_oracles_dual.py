"""Methods with duals, and SAM on some layers, against textbook loops."""

from dataclasses import replace
from functools import partial

import pytest
from test_oracles import NAMES, assert_follows, close

from idiolect import Method, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import dual, sharpness
from idiolect.testing.worlds import network

SHARED_BY_FEDBN = sorted((~scope.batch_norm)(Model(network()).structure))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (methods.feddyn(0.3), partial(dual.feddyn, 0.3)),
        (methods.fedspeed(0.2, 0.3), partial(dual.fedspeed, 0.2, 0.3)),
        (methods.fedspeed(0.2, 0.3, "participants"), partial(dual.fedspeed, 0.2, 0.3, "participants")),
        (methods.fedsmoo(0.2, 0.3), partial(dual.fedsmoo, 0.2, 0.3)),
        (methods.fedsmoo(0.2, 0.3, "paper"), partial(dual.fedsmoo, 0.2, 0.3, "paper")),
        (methods.fedgloss(0.2, 0.3, 0.1), partial(dual.fedgloss, 0.2, 1 / 0.3, 0.1)),
        (methods.fedgloss(0.2, 0.3, 0.0), partial(dual.fedgloss, 0.2, 1 / 0.3, 0.0)),
        (methods.sam_on(0.2), partial(sharpness.sam_on, 0.2)),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_method(method, oracle, weighting):
    assert_follows(replace(method, weighting=weighting), oracle)


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (methods.feddyn(0.3), partial(dual.feddyn, 0.3)),
        (methods.fedsmoo(0.2, 0.3), partial(dual.fedsmoo, 0.2, 0.3)),
        (methods.fedgloss(0.2, 0.3, 0.1), partial(dual.fedgloss, 0.2, 1 / 0.3, 0.1)),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_personal_normalization_has_no_dual(method, oracle):
    """With FedBN's exchange: what stays with a client follows its gradient, perturbed with the rest by SAM."""
    method = Method((parts.share(~scope.batch_norm), *method.parts[1:]))
    assert_follows(method, oracle, shared=SHARED_BY_FEDBN)


def test_duals_are_those_of_the_papers():
    """And move only where their client takes part, which in four rounds not every one does every time."""
    for method, oracle, scale in (
        (methods.feddyn(0.3), partial(dual.feddyn, 0.3), -0.3),
        (methods.fedgloss(0.2, 0.4, 0.1), partial(dual.fedgloss, 0.2, 2.5, 0.1), -0.4),
    ):
        made, expected = assert_follows(method, oracle)
        for i, name in enumerate(NAMES):
            close(made.memory.get(name)["dynamic"] * scale, expected.dual[-1][i], name)


@pytest.mark.parametrize("report", ["code", "paper"])
def test_duals_of_perturbations(report):
    """The model's row holds mu_i, a tensor for each weight; the server's state is s."""
    made, expected = assert_follows(methods.fedsmoo(0.2, 0.3, report), partial(dual.fedsmoo, 0.2, 0.3, report))
    close(made.server["consistent_sam"], expected.perturbation[-1], "s")
    for i, name in enumerate(NAMES):
        row = made.memory.get(name)["share"]
        own = {n: row[f"consistent_sam.mu/{n.replace('.', '/')}"] for n in expected.dual[-1][i]}
        close(own, expected.dual[-1][i], name)


def test_adaptive_sam_on_normalization():
    method = Method((parts.share(), parts.adaptive_sam(0.4, 0.1, scope.normalization)))
    assert_follows(method, sharpness.fedasam, rho=0.4, eta=0.1, names=sharpness.normalizing(network()))


def test_fedcm_is_the_servers_momentum_alone():
    assert_follows(Method((parts.share(), parts.server_momentum(0.3))), sharpness.mofedsam, rho=0.0, alpha=0.3)
