"""Comparisons: numbers worked out by hand, then how they look at 80 and 120 columns and in Markdown."""

from __future__ import annotations

import math

import pytest
from report_worlds import World, make_run, plain_record
from rich.console import Console

from idiolect.core.errors import UsageError
from idiolect.report import RunSummary, comparison, comparison_markdown, comparison_rows, round_table
from idiolect.report.tables import comparison_cells, group_cells, human_bytes, number


def shown(table, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def run(label="FedBN", seed=0, **last):
    """Return a run of two rounds with cohorts of one and three clients, so that means per client differ."""
    first = plain_record(1, test=0.95, val=0.5, cohort=("a",), bytes_up=100, bytes_down=1000, seconds=1.0)
    return RunSummary(label, seed, [first, plain_record(2, cohort=("a", "b", "c"), **last)])


def test_one_seed_by_hand():
    [row] = comparison_rows([run(test=0.8, val=0.7, generalized=0.4)])
    assert row == {
        "method": "FedBN",
        "seeds": 1,
        "rounds": 2,
        "personalized": 0.8,
        "std": pytest.approx(0.1),
        "std_over": "clients",
        "worst_decile": pytest.approx(0.6),
        "best_by_val": 0.8,  # the second round has the better validation
        "best_on_test": 0.95,  # the first round has the better test
        "generalized": 0.4,
        "bytes_up": (100 + 600) / 4,  # all bytes over all participations, not the mean of 100 and 200
        "bytes_down": (1000 + 800) / 4,
        "gradients": (30 + 30) / 4,
        "seconds": 1.5,
    }


def test_several_seeds_by_hand():
    rows = comparison_rows([run(test=0.8), run(seed=1, test=0.6), run("Local", test=0.5)])
    fedbn, local = rows
    assert fedbn["personalized"] == pytest.approx(0.7)
    assert fedbn["std"] == pytest.approx(math.sqrt(2 * 0.1**2 / 1))  # sample deviation: divided by n - 1
    assert [row["std_over"] for row in rows] == ["seeds", "seeds"]
    assert local["std"] is None  # one seed has no deviation over seeds, and must not show another one
    assert comparison_cells([run(test=0.8), run(seed=1, test=0.6), run("Local", test=0.5)])[1] == {
        "method": "Local",
        "personalized ± std over seeds": "50.00",
        "worst decile": "30.00",
        "best by val": "95.00",
        "best on test (optimistic)": "95.00",
        "generalized": "—",
        "up/down per client and round": "175/450 B",
        "gradients per client and round": "15.0",
        "s per round": "1.50",
    }


def test_a_column_with_a_gap_in_one_seed_is_empty():
    [row] = comparison_rows([run(test=0.8, generalized=0.4), run(seed=1, test=0.6)])
    assert row["generalized"] is None


def test_nothing_evaluated_and_nobody_there_is_a_dash():
    record = {"round": 1, "cohort": [], "seconds": 1.0, "bytes_up": 0, "bytes_down": 0, "gradients": 0}
    for records in ([], [record]):
        cells = comparison_cells([RunSummary("FedBN", 0, records)])[0]
        assert set(cells.values()) <= {"FedBN", "—", "1.00"}


def test_a_diverged_seed_shows():
    cells = comparison_cells([run(test=0.8), run(seed=1, test=None)])
    assert cells[0]["personalized ± std over seeds"] == "n/a"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match="there is no run"):
        comparison([])
    with pytest.raises(UsageError, match=r"two runs are called 'FedBN' with seed 0: give them different"):
        comparison([run(), run()])
    with pytest.raises(UsageError, match="'accuracy' and 'loss' cannot share a table"):
        comparison([run(), RunSummary("x", 0, [], "loss", higher_is_better=False)])


def test_lower_is_better():
    world = World(metric="mae", higher_is_better=False, rounds=6)
    [row] = comparison_rows([RunSummary("FedBN", 0, world.records(), "mae", higher_is_better=False)])
    means = [r["personalized"]["test"]["mae"]["mean"] for r in world.records()]
    assert row["best_on_test"] == min(means)
    assert row["worst_decile"] > row["personalized"] == means[-1]


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_fits_the_terminal(width):
    runs = [make_run(label, seed) for label in ("FedAvg", "Per-FedAvg") for seed in (0, 1)]
    text = shown(comparison(runs), width)
    assert all(len(line) <= width for line in text.splitlines())
    for header, cell in comparison_cells(runs)[1].items():
        assert cell in text or "optimistic" in header  # nothing is cut or folded, the name included
    assert "optimistic" not in text
    assert all(word in text for word in ("gradients", "± std over", "seeds", "decile", "generalized"))


@pytest.mark.parametrize("width", [80, 120])
def test_round_table_fits_the_terminal(width):
    text = shown(round_table(World(rounds=12, every=5).records()), width)
    assert all(len(line) <= width for line in text.splitlines())
    lines = text.splitlines()[-12:]
    assert [line.split()[0] for line in lines] == [str(t) for t in range(1, 13)]
    assert [line.split()[0] for line in lines if "±" in line] == ["5", "10", "12"]
    assert all(line.split()[-3:-1] == ["5.0/10", "MB"] for line in lines)


def test_names_are_never_markup():
    text = shown(comparison([make_run("[red]FedBN[/]")]), 120)
    assert "[red]FedBN[/]" in text


def test_markdown_by_hand():
    lines = comparison_markdown([run("Fed|BN <b>", test=0.8, val=0.7, generalized=0.4)]).splitlines()
    assert lines[0] == (
        "| method | personalized ± std over clients | worst decile | best by val | best on test (optimistic) "
        "| generalized | up/down per client and round | gradients per client and round | s per round |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == (r"| Fed\|BN &lt;b> | 80.00 ± 10.00 | 60.00 | 80.00 | 95.00 | 40.00 | 175/450 B | 15.0 | 1.50 |")
    assert len(lines) == 3


def test_groups_by_hand():
    early = plain_record(1, clients=dict.fromkeys("abc", 0.1))  # only the last evaluated round counts
    late = [plain_record(2, clients={"a": a, "b": 0.4, "c": 0.9}) for a in (0.2, 0.6)]
    runs = [RunSummary("FedBN", seed, [early, record]) for seed, record in enumerate(late)]
    assert group_cells(runs, {"a": "MNIST", "b": "MNIST", "c": "SVHN", "z": "USPS"}) == [
        {"method": "FedBN", "MNIST": "40.00", "SVHN": "90.00", "USPS": "—"}
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9949, "9.9 kB"), (9951, "10 kB"), (999_600, "1.0 MB")],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [(1.0, "accuracy", "100.00"), (0.5, "balanced_accuracy", "50.00"), (1234.56, "mse", "1235")],
)
def test_numbers(value, metric, text):
    assert number(value, metric) == text
