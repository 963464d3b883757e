"""Arguments of parts, methods, splits and shifts: numbers of any library, and one line for a value of another type."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from idiolect import UsageError, methods, parts, scope
from idiolect.core.part import Part, part
from idiolect.core.values import fits, plain
from idiolect.data import Blur, Dirichlet, Iid, Noise, Pathological, PermuteLabels, Rotation, federate, load

NUMBERS = [np.float64, np.float32, torch.tensor, lambda v: np.array(v), lambda v: torch.tensor(v, dtype=torch.bfloat16)]


@pytest.mark.parametrize("made", NUMBERS)
@pytest.mark.parametrize(
    ("make", "value"),
    [
        (parts.sam, 0.5),
        (parts.proximal, 0.25),
        (methods.fedsam, 0.125),
        (methods.mofedsam, 0.5),
        (lambda v: methods.fedfsa(rho_larger=v), 0.5),
        (Rotation, 45.0),
        (Dirichlet, 0.5),
        (Noise, 0.25),
    ],
)
def test_a_number_of_any_library_makes_the_same(make, value, made):
    assert make(made(value)) == make(value)
    assert repr(make(made(value))) == repr(make(value))


@pytest.mark.parametrize("made", [np.int64, np.uint8, torch.tensor, lambda v: np.array(v)])
@pytest.mark.parametrize(
    ("make", "value"),
    [
        (Pathological, 2),
        (PermuteLabels, 3),
        (lambda v: methods.fedavg_ft(epochs=v), 2),
        (lambda v: methods.fedfsa(top=v), 2),
        (lambda v: {c: d.train.y.tolist() for c, d in federate(load("digits"), Iid(), v, seed=v).items()}, 3),
    ],
)
def test_a_whole_number_of_any_library_makes_the_same(make, value, made):
    assert make(made(value)) == make(value)
    assert repr(make(made(value))) == repr(make(value))


def test_equal_calls_print_alike():
    assert repr(parts.sam(1)) == repr(parts.sam(1.0)) == "sam(rho=1.0, names=None)"
    assert repr(Rotation(30)) == "Rotation(degrees=30.0)"


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: parts.sam(True), "sam: rho=True is not a number"),
        (lambda: parts.sam(np.bool_(True)), "sam: rho=True is not a number"),
        (lambda: parts.sam("0.1"), "sam: rho='0.1' is not a number"),
        (lambda: parts.sam(float("nan")), "sam: rho=nan is not a finite number"),
        (lambda: Dirichlet(np.float32("inf")), "Dirichlet: alpha=inf is not a finite number"),
        (lambda: parts.sam(1j), "sam: rho=1j is not a number"),
        (lambda: parts.sam(Fraction(1, 2)), "sam: rho=Fraction(1, 2) is not a number"),
        (lambda: parts.sam(torch.ones(2)), "sam: rho=tensor([1., 1.]) is not a number"),
        (lambda: parts.sam(0.1, names="head"), "sam: names='head' is not a scope or None"),
        (lambda: methods.fedavg_ft(epochs=2.5), "fedavg_ft: epochs=2.5 is not a whole number or None"),
        (lambda: methods.fedavg_ft(epochs=torch.tensor(2.0)), "fedavg_ft: epochs=2.0 is not a whole number or None"),
        (lambda: methods.fedavg(weighting="some"), "fedavg: weighting='some' is not 'samples' or 'uniform'"),
        (lambda: Dirichlet(True), "Dirichlet: alpha=True is not a number"),
        (lambda: Dirichlet(0.5, 2.5), "Dirichlet: minimum=2.5 is not a whole number"),
        (lambda: Pathological(2.0), "Pathological: classes_per_client=2.0 is not a whole number"),
        (lambda: Blur("much"), "Blur: sigma='much' is not a number"),
        (lambda: PermuteLabels(None), "PermuteLabels: groups=None is not a whole number"),
        (lambda: federate(load("digits"), Iid(), 2.5), "clients must be a whole number, at least 1, got 2.5"),
        (lambda: federate(load("digits"), Iid(), seed=True), "seed must be a whole number, at least 0, got True"),
        (lambda: federate(load("digits"), Iid(), val="0.1"), "val must be a number 0 … 1, got '0.1'"),
    ],
)
def test_what_is_no_such_number_is_one_line(act, line):
    with pytest.raises(UsageError) as caught:
        act()
    assert str(caught.value) == line


def test_a_part_of_your_own_is_compared_with_its_annotations_where_it_has_any():
    @part
    def own(factor: float, scopes: tuple[scope.Scope, ...] = (), more=None) -> Part:
        """Do nothing."""
        return Part()

    assert own(float("inf")) == own(np.float64("inf"))
    assert repr(own(np.float32(2), more=np.int8(3))) == "own(factor=2.0, scopes=(), more=3)"
    with pytest.raises(UsageError, match="own: scopes=\\('head',\\) is not a tuple, each a scope"):
        own(1.0, ("head",))


def test_only_scalars_are_made_plain():
    array, vector = np.ones(1), torch.ones(1)
    assert plain(array) is array
    assert plain(vector) is vector
    assert fits(plain(np.str_("a")), str)
    assert plain((np.int64(1), [torch.tensor(2.0)])) == (1, [2.0])
