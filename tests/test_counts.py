"""How many gradients a round took is counted, in every engine, whoever takes them."""

import pytest

from idiolect import methods, parts
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
