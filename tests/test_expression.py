"""Expressions: what they mean, and that everything else is refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idiolect import methods, parts, scope
from idiolect.core.errors import UsageError
from idiolect.data import Contrast, DirichletEqual, Rotation
from idiolect.registry.expression import evaluate
from idiolect.registry.names import METHODS, SHIFTS, SPLITS


def of(text):
    return evaluate(text, METHODS, "method")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("fedbn", methods.fedbn()),
        ("FedBN()", methods.fedbn()),
        (" FedAvg-FT ", methods.fedavg_ft()),
        ("fedfsa(rho_larger=0.9, top=1)", methods.fedfsa(rho_larger=0.9, top=1)),
        ("fedfsa(0.05, selection='least')", methods.fedfsa(0.05, selection="least")),
        ("fedavg_ft(names=head, epochs=None)", methods.fedavg_ft(names=scope.head, epochs=None)),
        ("fedavg_ft(~batch_norm - head)", methods.fedavg_ft(~scope.batch_norm - scope.head)),
        ("fedavg_ft(named('fc1', 'fc2'))", methods.fedavg_ft(scope.named("fc1", "fc2"))),
        ("fedavg_ft(freeze_statistics=True)", methods.fedavg_ft(freeze_statistics=True)),
        (
            "fedbn() + flexible_sam(rho=0.05, rho_larger=0.9, top=2) + server_momentum(1)",
            methods.fedbn() + parts.flexible_sam(rho=0.05, rho_larger=0.9, top=2) + parts.server_momentum(1),
        ),
    ],
)
def test_an_expression_is_what_python_would_make_of_it(text, method):
    assert of(text) == method


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_evaluates_from_its_repr(name):
    method = getattr(methods, name)()
    assert of(repr(method)) == method
    assert repr(of(repr(method))) == repr(method)


def test_splits_and_shifts_read_alike():
    assert evaluate("dirichlet_equal(0.3, as_published=True)", SPLITS, "split") == DirichletEqual(0.3, True)
    assert evaluate("Rotation(45) + contrast(amount=-0 + 0.5)", SHIFTS, "shift") == Rotation(45) + Contrast(0.5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("fedbm", "method: unknown name 'fedbm' (did you mean fedbn?)"),
        ("fedfsa(rho_large=1)", "fedfsa has no argument 'rho_large' (did you mean rho_larger?)"),
        ("fedfsa(rho='big')", "fedfsa: rho='big' is not a number"),
        ("fedfsa(rho=True)", "fedfsa: rho=True is not a number"),
        ("fedfsa(top=2.5)", "fedfsa: top=2.5 is not a whole number"),
        ("fedfsa(selection='mst')", "selection='mst' is not 'most' or 'least' or 'random'"),
        ("fedfsa(selection=most)", "unknown name 'most'; known: "),
        ("fedavg_ft(names=3)", "names=3 is not a scope"),
        ("fedavg_ft(named(3))", "named: names=3 is not text"),
        ("sam()", "sam: missing a required argument: 'rho'; it is sam(rho, names=None)"),
        ("sam(1, head, 2)", "sam: too many positional arguments"),
        ("fedavg + sam(-1)", "sam: rho must be at least 0"),
        ("head(2)", "head takes no arguments"),
        ("fedbn + 3", "method: FedBN + ...: what is added is a part, not an int"),
        ("fedbn + local", "method: FedBN + Local: a method has one share(...) and takes parts"),
        ("fedbn - sam(0.1)", "- does not go with a Method FedBN and sam(rho=0.1, names=None); parts are added with +"),
        ("head + 3", "+ does not go with head and 3"),
        ("fedbn.name", "'fedbn.name' is not allowed here"),
        ("().__class__", "is not allowed here"),
        ("fedbn if True else local", "is not allowed here"),
        ("[fedbn]", "is not allowed here"),
        ("sam(**{'rho': 1})", "is not allowed here"),
        ("sam(*(1, 2))", "is not allowed here"),
        ("(lambda: 1)()", "is not allowed here"),
        ("10 ** 10 ** 10", "is not allowed here"),
        ("f'{1}'", "is not allowed here"),
        ("1j", "is not allowed here"),
        ("__import__('os')", "unknown name '__import__'"),
        ("fedbn(", "cannot read 'fedbn('"),
        ("", "method: nothing is written; write it like"),
        ("  ", "method: nothing is written; write it like"),
        ("\0", "cannot read"),
        ("~" * 5000 + "head", "cannot read"),
        ("(" * 500 + "head" + ")" * 500, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, line):
    with pytest.raises(UsageError) as caught:
        of(text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="fedbnsam(),=.'01 +-~&|[]{}:_\"\\\n\0é", max_size=30))
def test_no_text_does_anything_but_a_usage_error(text):
    try:
        of(text)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


def test_names_with_an_underscore_in_front_are_not_reached():
    with pytest.raises(UsageError, match="unknown name '_hidden'"):
        evaluate("_hidden", {"_hidden": 1, "seen": 2}, "value")
