"""Methods that read the inputs to predict against textbook loops: the weights, and what each client predicts."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, ROUNDS, SIZES, close, federation, given

from idiolect import methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import transductive
from idiolect.testing.worlds import examples, network

INPUTS = [examples(f"{name}, to predict", n)[0] for name, n in zip(NAMES, (7, 2, 12, 5, 9), strict=True)]
NOT_NORMAL = sorted((~scope.batch_norm)(Model(network()).structure))
NO_STATISTICS = sorted((~scope.statistics)(Model(network()).structure))
OWN = {"own.weight": "6.head_ensemble.weight", "own.bias": "6.head_ensemble.bias"}


def assert_predicts(method, oracle, **shared):
    """Play a federation and compare what is shared, what each client has, and what it predicts, after each round."""
    made = federation(method)
    expected = oracle(inputs=INPUTS, **given(made), **shared)
    for t in range(ROUNDS):
        made.play()
        close(made.server["share"], expected.shared[t], f"shared, round {t}")
        for i, name in enumerate(NAMES):
            own, theirs = made.deployed(name), expected.deployed[t][i]
            close(made.model.tensors(own.weights), {OWN.get(n, n): v for n, v in theirs.items()}, (name, t))
            outputs = made.model.predict(own.at(INPUTS[i]), INPUTS[i])
            close({"": outputs}, {"": expected.outputs[t][i]}, f"{name}'s predictions, round {t}")
            plain = made.model.predict(own.weights, INPUTS[i])
            assert (outputs - plain).abs().max() > 1e-4, "nothing was adapted"
    return made, expected


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_adabn(weighting):
    assert_predicts(methods.adabn(weighting), transductive.adabn)


@pytest.mark.parametrize(("base", "names"), [(methods.fedbn, NOT_NORMAL), (methods.silobn, NO_STATISTICS)])
def test_adapted_statistics_with_personal_normalization(base, names):
    assert_predicts(base() + parts.adapted_statistics(), transductive.adabn, shared=names)


def head_batches(made, epochs):
    """Return the batches of the first epochs of a client's round, to train or to deploy."""

    def of(purpose, t, i):
        before, made.round = made.round, t
        batches = [(b.x, b.y) for b in made.assignment(NAMES[i], purpose).stream.epochs(epochs)]
        made.round = before
        return batches

    return of


def fedthe(method, epochs, *mixing):
    made = federation(method)
    train = [examples(name, n)[0] for name, n in SIZES.items()]
    return partial(
        transductive.fedthe, examples=train, head_batches=head_batches(made, epochs), epochs=2, mixing=mixing
    )


@pytest.mark.parametrize(
    ("epochs", "steps", "lr", "momentum", "alone", "weighting"),
    [
        (2, 7, 0.3, 0.6, 0.4, "uniform"),
        (1, 3, 0.2, 1.0, 0.0, "samples"),
        pytest.param(1, 20, 0.1, 0.1, 0.1, "samples", marks=pytest.mark.slow),
    ],
)
def test_fedthe(epochs, steps, lr, momentum, alone, weighting):
    method = methods.fedthe(epochs, steps, lr, momentum, alone, weighting)
    made, expected = assert_predicts(method, fedthe(method, epochs, steps, lr, momentum, alone))
    assert torch.allclose(made.server["head_ensemble"]["mean"], expected.means[-1], rtol=0, atol=1e-11)


def test_fedthe_with_personal_normalization():
    method = methods.fedbn() + parts.balanced_softmax(added=1) + parts.head_ensemble()
    assert_predicts(method, fedthe(method, 1, 20, 0.1, 0.1, 0.1), shared=NOT_NORMAL)
