"""How many gradients a round took is counted, in every engine, whoever takes them."""

import sys
from collections import Counter

import pytest

from idiolect import Training, methods, parts
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.testing.worlds import federation

STEPS = 2 * (3 + 1 + 2 + 4)  # two epochs of batches of eight, all four clients


@pytest.mark.parametrize("engine", [Sequential(), Stacked(3), Processes(2)], ids=repr)
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (methods.fedavg(), STEPS),
        (methods.fedsam(), 2 * STEPS),
        (methods.ditto(), 2 * STEPS),
        (methods.per_fedavg(variant="hessian_free"), 4 * STEPS),
        (methods.fedrep(head_epochs=1), STEPS + STEPS // 2),
        (methods.fedbn() + parts.sam(0.1) + parts.model_contrast(0.5), 2 * STEPS),
        (methods.fedavg_ft(epochs=3), STEPS),  # tuning is for predicting alone
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_are_counted(method, expected, engine):
    made = federation(method, engine=engine)
    assert made.play().gradients == expected
    engine.close()


def calls_of_a_round(method, epochs):
    """Return how many Python functions a client's round calls."""
    made = federation(
        method, training=Training(lr=0.1, batch_size=8, local_epochs=epochs, clip=5.0), engine=Processes(1)
    )
    work, calls = made.assignment("dan", "train"), Counter()
    made.worker.train(work)  # what is made once is made here
    sys.setprofile(lambda frame, event, _: calls.update([event]) if event == "call" else None)
    try:
        made.worker.train(work)
    finally:
        sys.setprofile(None)
    return calls["call"]


@pytest.mark.parametrize(
    ("method", "most"),
    [(methods.fedavg(), 130), (methods.fedfsa(), 260), (methods.scaffold(), 140), (methods.ditto(), 305)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_step_calls_few_python_functions(method, most):
    """Settings, types and layouts are looked up once for a round, not at every step."""
    steps = 2 * 4  # two epochs more of four batches
    assert (calls_of_a_round(method, 3) - calls_of_a_round(method, 1)) / steps <= most
