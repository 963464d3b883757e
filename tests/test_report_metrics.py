"""Summaries over clients and the choice of rounds, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_worlds import World, plain_record

from idiolect.core.errors import UsageError
from idiolect.report import rounds_to, select, summarize
from idiolect.report.metrics import evaluated


def test_summary_by_hand():
    # Unequal sizes, so that uniform and by_samples differ: (1*10 + 3*0.5) / 4 is not (10 + 0.5) / 2.
    summary = summarize({"a": 10.0, "b": 0.5}, {"a": 1, "b": 3})
    assert summary == {
        "mean": 5.25,
        "by_samples": (1 * 10.0 + 3 * 0.5) / 4,
        "std": 4.75,  # population: both are 4.75 from the mean; the sample deviation would be 6.72
        "worst_decile": 0.5,
        "min": 0.5,
        "max": 10.0,
    }


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (30, 3), (31, 4)])
def test_worst_decile_takes_a_tenth_rounded_up(clients, worst):
    values = {f"c{i}": float(i) for i in range(clients)}
    sizes = dict.fromkeys(values, 7)
    assert summarize(values, sizes)["worst_decile"] == (worst - 1) / 2
    assert summarize(values, sizes, higher_is_better=False)["worst_decile"] == clients - 1 - (worst - 1) / 2


def test_clients_without_a_value_are_left_out():
    kept = summarize({"a": 1.0, "b": 0.0}, {"a": 3, "b": 1})
    assert summarize({"a": 1.0, "b": 0.0, "c": None, "d": math.nan}, {"a": 3, "b": 1, "d": 9}) == kept


def test_nobody_left_is_nan_and_infinite_losses_stay():
    assert all(math.isnan(v) for v in summarize({"a": None}, {}).values())
    diverged = summarize({"a": math.inf, "b": 1.0}, {"a": 1, "b": 1}, higher_is_better=False)
    assert diverged["mean"] == diverged["worst_decile"] == diverged["max"] == math.inf
    assert diverged["min"] == 1.0
    assert math.isnan(diverged["std"])


def test_a_client_without_a_size_is_named():
    with pytest.raises(UsageError, match="'b' has a value but no number of test examples"):
        summarize({"a": 1.0, "b": 0.5}, {"a": 3})


@given(st.dictionaries(st.text(), st.tuples(st.floats(0, 1), st.integers(1, 999)), min_size=1))
def test_summary_agrees_with_numpy(clients):
    values = {c: v for c, (v, _) in clients.items()}
    sizes = {c: n for c, (_, n) in clients.items()}
    summary = summarize(values, sizes)
    array = np.array(list(values.values()))
    assert summary["mean"] == pytest.approx(array.mean(), abs=1e-12)
    assert summary["std"] == pytest.approx(np.sqrt(((array - array.mean()) ** 2).mean()), abs=1e-12)
    assert summary["by_samples"] == pytest.approx(np.average(array, weights=list(sizes.values())), abs=1e-12)
    assert summary["min"] - 1e-12 <= summary["worst_decile"] <= summary["mean"] + 1e-12


def test_selection_by_hand():
    records = [
        plain_record(1, test=0.5, val=0.4),
        plain_record(2, test=0.9, val=0.6),
        {"round": 3, "cohort": []},  # not evaluated
        plain_record(4, test=0.7, val=0.8),
        plain_record(5, test=0.6, val=0.8),  # a tie on validation: the earlier round is quoted
    ]
    selection = select(records, "accuracy")
    chosen = (selection.last, selection.best_by_val, selection.best_on_test)
    assert [c.round for c in chosen] == [5, 4, 2]
    assert [c.personalized["mean"] for c in chosen] == [0.6, 0.7, 0.9]
    low = select(records, "accuracy", higher_is_better=False)
    assert (low.last.round, low.best_by_val.round, low.best_on_test.round) == (5, 1, 1)


def test_selection_without_validation_or_evaluation():
    assert select([plain_record(1)], "accuracy").best_by_val is None
    nothing = select([{"round": 1, "cohort": []}], "accuracy")
    assert (nothing.last, nothing.best_by_val, nothing.best_on_test) == (None, None, None)


def test_a_run_that_diverged_is_quoted_as_nan_at_its_last_round():
    selection = select([plain_record(1, test=0.5), plain_record(2, test=None)], "accuracy")
    assert selection.last.round == 2
    assert math.isnan(selection.last.personalized["mean"])
    assert selection.best_on_test.round == 1


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'acuracy' \(did you mean accuracy\?\): this run has accuracy"):
        select([plain_record(1)], "acuracy")


def test_rounds_to_a_target():
    records = [plain_record(t, test=v) for t, v in ((2, 0.3), (4, 0.8), (6, 0.7), (8, 0.9))]
    assert rounds_to(records, "accuracy", 0.8) == 4
    assert rounds_to(records, "accuracy", 0.85) == 8
    assert rounds_to(records, "accuracy", 0.95) is None
    assert rounds_to(records, "accuracy", 0.3, higher_is_better=False) == 2
    assert rounds_to(records, "accuracy", 0.2, higher_is_better=False) is None


def test_only_evaluated_rounds_count():
    records = World(rounds=7, every=3).records()
    assert [c.round for c in evaluated(records, "accuracy")] == [3, 6, 7]
