"""A number is a number whatever made it: the same bits as Python's own, and one line where it is none."""

import re

import numpy as np
import pytest
import torch

import idiolect
from idiolect import (
    SGD,
    Adam,
    Cosine,
    Exponential,
    Group,
    Output,
    RMSprop,
    StepDecay,
    Training,
    UsageError,
    Warmup,
    methods,
    scope,
)
from idiolect.core.tree import Tree
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.testing.worlds import network, population

INTS = [np.int64, np.int32, np.uint8, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32), np.array]
FLOATS = [np.float64, lambda x: torch.tensor(x, dtype=torch.float64), np.array]


def run(rounds=2, seed=3, participation=0.5, evaluate_every=2, output=None, **training):
    made = Training(**{"lr": 0.05, "local_epochs": 2, "batch_size": 8, **training})
    settings = {"rounds": rounds, "seed": seed, "participation": participation, "evaluate_every": evaluate_every}
    return idiolect.fit(network(), population(), methods.fedbn(), **settings, training=made, output=output or Output())


def bits(found):
    return Tree.of(found.weights).flat


@pytest.fixture(scope="module")
def plain():
    return run(optimizer=SGD(momentum=0.5), schedule=Exponential(0.5), clip=1.0)


@pytest.mark.parametrize("whole", INTS)
@pytest.mark.parametrize("real", FLOATS)
def test_numbers_of_numpy_and_torch_give_the_same_bits(whole, real, plain):
    other = run(
        rounds=whole(2),
        seed=whole(3),
        participation=real(0.5),
        evaluate_every=whole(2),
        lr=real(0.05),
        local_epochs=whole(2),
        batch_size=whole(8),
        optimizer=SGD(momentum=real(0.5)),
        schedule=Exponential(real(0.5)),
        clip=whole(1),
    )
    assert torch.equal(bits(other), bits(plain))
    assert other.config() == plain.config()


def test_a_run_is_resumed_with_the_same_number_of_another_kind(tmp_path):
    run(rounds=1, seed=3, output=Output(tmp_path / "a", report=False))
    resumed = run(rounds=np.int64(1), seed=torch.tensor(3), output=Output(tmp_path / "a", resume=True, report=False))
    assert resumed.round == 1
    with pytest.raises(UsageError, match="seed was 3, is 4"):
        run(rounds=1, seed=np.int64(4), output=Output(tmp_path / "a", resume=True, report=False))


def test_other_settings_become_plain():
    assert repr(Training(lr=np.float64(0.1), batch_size=np.int64(4), clip=np.int64(1))) == repr(
        Training(lr=0.1, batch_size=4, clip=1.0)
    )
    assert repr(Adam(np.float64(0.5), torch.tensor(0.5, dtype=torch.float64))) == repr(Adam(0.5, 0.5))
    assert repr(RMSprop(np.float64(0.5), momentum=0)) == repr(RMSprop(0.5))
    assert repr(Warmup(np.int64(2), StepDecay(np.int8(3), np.float64(0.5)))) == repr(Warmup(2, StepDecay(3, 0.5)))
    assert repr(Cosine(0)) == repr(Cosine(0.0))
    assert repr(Group(scope.head, np.float64(2), np.int64(0))) == repr(Group(scope.head, 2.0, 0.0))
    assert repr(Stacked(np.int64(4))) == repr(Stacked(4))
    assert repr(Threads(torch.tensor(2))) == repr(Threads(2))


@pytest.mark.parametrize("wrong", [True, 2.5, 2.0, np.float64(2.0), float("nan"), "3", None, torch.tensor([1, 2]), 1j])
@pytest.mark.parametrize("name", ["rounds", "seed", "evaluate_every", "local_epochs"])
def test_what_is_no_whole_number_is_one_line(name, wrong):
    with pytest.raises(UsageError, match=f"^{name} must be a whole number.*, got ") as caught:
        run(**{name: wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [True, float("nan"), float("inf"), -1.0, 0, "1", torch.tensor([1.0, 2.0]), 1j])
@pytest.mark.parametrize("name", ["lr", "participation", "clip"])
def test_what_is_no_number_in_range_is_one_line(name, wrong):
    with pytest.raises(UsageError, match=f"^{name} must be ") as caught:
        run(**{name: wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (
            lambda: Training(batch_size=True),
            "batch_size (or None for a whole set) must be a whole number, at least 1, got True",
        ),
        (lambda: Training(batch_size=np.float64(8.0)), "must be a whole number, at least 1, got 8.0"),
        (lambda: Training(local_epochs=np.bool_(True)), "local_epochs must be a whole number, at least 1, got True"),
        (lambda: SGD(momentum=torch.tensor(float("nan"))), "SGD: momentum=nan is not a finite number"),
        (lambda: SGD(momentum=True), "SGD: momentum=True is not a number"),
        (lambda: StepDecay(2.5), "StepDecay: every=2.5 is not a whole number"),
        (lambda: Stacked(2.5), "width must be a whole number, at least 1, got 2.5"),
        (lambda: Threads(0), "workers must be a whole number, at least 1, got 0"),
    ],
)
def test_settings_that_are_no_numbers_are_one_line(act, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_the_coordinators_numbers_are_plain_too():
    pytest.importorskip("flwr")
    from idiolect import flower

    given = {"model": network, "method": methods.fedavg(), "rounds": 2}
    for name in ("rounds", "sites", "quorum", "seed", "evaluate_every"):
        with pytest.raises(UsageError, match=f"^{name} must be a whole number"):
            flower.server_app(**{**given, name: 2.5})
    for name in ("deadline", "give_up", "participation"):
        with pytest.raises(UsageError, match=f"^{name} must be a number"):
            flower.server_app(**{**given, name: float("nan")})
    with pytest.raises(UsageError, match="quorum must be 1 to sites, got sites=2, quorum=3"):
        flower.server_app(**given, sites=np.int64(2), quorum=torch.tensor(3))
    assert flower.server_app(**given, sites=np.int64(2), quorum=torch.tensor(2), deadline=np.float32(5))
