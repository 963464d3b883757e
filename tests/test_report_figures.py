"""Figures: that what is drawn are the numbers of the records."""

from __future__ import annotations

import math

import pytest
from report_worlds import World, make_run, plain_record

from idiolect.report import RunSummary, comparison_rows
from idiolect.report.figures import curves, distribution, gain, styles, traffic
from idiolect.report.heatmaps import chosen_layers, holding, sensitivity_by_client, sensitivity_by_round
from idiolect.report.tables import by_label


def named(figure, name):
    [trace] = [trace for trace in figure.data if trace.name == name]
    return trace


def test_colors_are_fixed_unlike_and_gray_for_local():
    labels = [f"m{i}" for i in range(12)]
    looks = styles(["Local", *labels])
    assert len({look.color for look in looks.values()}) == 13
    assert styles(labels)["m3"] == looks["m3"]  # whether or not the baseline is there
    figure = curves(by_label([make_run("Local", generalized=False), make_run("FedBN", generalized=False)]))
    assert [trace.line.color for trace in figure.data] == [looks["Local"].color, looks["m0"].color]


def test_curves_are_means_with_bands():
    runs = [
        RunSummary("FedBN", 0, [plain_record(1, 0.2, generalized=0.1), plain_record(3, 0.6)]),
        RunSummary("FedBN", 1, [plain_record(1, 0.4, generalized=0.3), plain_record(3, 0.9)]),
    ]
    shared_band, generalized, band, personalized = curves(by_label(runs)).data  # solid lines lie on top
    assert personalized.line.dash == "solid"
    assert list(personalized.x) == [1, 3]
    assert list(personalized.y) == pytest.approx([30, 75])
    assert list(band.x) == [1, 3, 3, 1]
    assert list(band.y) == pytest.approx([40, 90, 60, 20])
    assert generalized.line.dash == "dash"
    assert list(generalized.y) == pytest.approx([20])
    assert list(shared_band.y) == pytest.approx([30, 10])


def test_one_seed_has_no_band_and_no_shared_model_no_dashes():
    figure = curves(by_label([make_run(generalized=False)]))
    assert [trace.line.dash for trace in figure.data] == ["solid"]


def test_nothing_to_draw_is_no_figure():
    methods = by_label(
        [RunSummary("FedBN", 0, [{"round": 1, "cohort": [], "bytes_up": 0, "bytes_down": 0, "gradients": 0}])]
    )
    assert [draw(methods) for draw in (curves, distribution, gain, traffic)] == [None] * 4
    assert holding({}, None) is None
    assert chosen_layers([make_run()]) is None
    assert distribution(by_label([make_run(clients=1)])) is None


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_distribution_marks_the_worst_decile_of_the_table(higher_is_better):
    metric = "accuracy" if higher_is_better else "mae"
    scale = 100 if higher_is_better else 1
    runs = [
        make_run(label, seed, clients=20, metric=metric, higher_is_better=higher_is_better)
        for label in ("FedAvg", "FedBN")
        for seed in (0, 1)
    ]
    figure = distribution(by_label(runs))
    mark = named(figure, "worst decile")
    assert list(figure.layout.xaxis.ticktext) == ["FedAvg", "FedBN"]
    assert [trace.x[0] for trace in figure.data[:2]] == list(figure.layout.xaxis.tickvals) == [0, 1]
    assert list(mark.x) == pytest.approx([-0.35, 0.35, 0, 0.65, 1.35, 1])
    assert mark.y[2] is mark.y[5] is None, "a gap between two bars"
    deciles = [scale * row["worst_decile"] for row in comparison_rows(runs) for _ in range(2)]
    assert [y for y in mark.y if y is not None] == pytest.approx(deciles)
    assert [len(trace.y) for trace in figure.data[:2]] == [40, 40]
    assert figure.data[0].y[0] == pytest.approx(scale * runs[0].records[-1]["clients"]["c0"]["personalized"][metric])


def test_gain_is_signed_so_that_more_is_better():
    alone = RunSummary("Local", 0, [plain_record(clients={"a": 0.5, "b": 0.5, "c": 0.1, "e": 0.2})])
    other = RunSummary("FedBN", 0, [plain_record(clients={"a": 0.7, "b": 0.4, "d": 1.0, "e": 0.3})])
    [trace] = gain(by_label([alone, other])).data
    assert dict(zip(trace.x, trace.y, strict=True)) == pytest.approx({"a": 20, "b": -10, "e": 10})
    assert trace.name == "FedBN (1 of 3 lose)"
    low = [RunSummary(r.label, 0, r.records, "accuracy", higher_is_better=False) for r in (alone, other)]
    assert list(gain(by_label(low)).data[0].y) == pytest.approx([-20, 10, -10])
    assert gain(by_label([other])) is None


def test_gain_of_many_clients_is_sorted():
    runs = [make_run("Local", clients=40, final=0.7), make_run("FedBN", clients=40, final=0.8)]
    [trace] = gain(by_label(runs)).data
    assert list(trace.x) == list(range(1, 41))
    assert list(trace.y) == sorted(trace.y)
    last = [run.records[-1]["clients"] for run in runs]
    client = trace.text[0]
    own, alone = (views[client]["personalized"]["accuracy"] for views in reversed(last))
    assert trace.y[0] == pytest.approx(100 * (own - alone))


def test_traffic_is_cumulative_over_rounds_that_were_not_evaluated_too():
    world = World(clients=4, rounds=6, every=3, participation=0.5, bytes_up=1_000_000)
    records = world.records()
    up, down = traffic(by_label([RunSummary("FedBN", seed, records) for seed in (0, 1)])).data
    assert list(up.x) == pytest.approx([2 * 3, 2 * 6])  # MB: two clients a round
    assert list(down.x) == pytest.approx([2 * 2 * 3, 2 * 2 * 6])
    assert list(up.customdata) == [3, 6]
    assert list(up.y) == [100 * r["personalized"]["test"]["accuracy"]["mean"] for r in records if "clients" in r]


def test_holdings_are_sorted_by_group_and_natural_label_order():
    holdings = {"c0": {"10": 5, "2": 1}, "c1": {"2": 3}, "c2": {"9": 4}}
    figure = holding(holdings, {"c0": "x", "c1": "y", "c2": "x"})
    [trace] = figure.data
    assert list(trace.x) == ["2", "9", "10"]
    assert list(trace.y) == ["c0", "c2", "c1"]
    assert [list(row) for row in trace.z] == [[1, 0, 5], [0, 4, 0], [3, 0, 0]]
    assert (trace.zmin, trace.zmax) == (0, 5)
    assert [(a.text, a.y) for a in figure.layout.annotations] == [("x", 0.5), ("y", 2)]
    assert list(holding(holdings, None).data[0].y) == ["c0", "c1", "c2"]


def inspected(round, **clients):
    show = {c: {"sensitivity": s, "chosen": {n: float(n == max(s, key=s.get)) for n in s}} for c, s in clients.items()}
    return {"round": round, "cohort": list(clients), "inspect": show}


@pytest.fixture
def sensitive_runs():
    records = [
        inspected(1, c10={"conv": 0.01, "fc": 0.1}, c2={"conv": 0.03, "fc": 0.0}),
        inspected(2, c10={"conv": 1.0, "fc": 0.1}, c3={}),
    ]
    return [RunSummary("FedFSA", 0, records)]


def values(figure):
    [trace] = figure.data
    logs = {(y, x): v for y, row in zip(trace.y, trace.z, strict=True) for x, v in zip(trace.x, row, strict=True)}
    return {cell: None if v is None or math.isnan(v) else 10**v for cell, v in logs.items()}


def test_sensitivity_by_round_is_the_mean_of_the_cohort(sensitive_runs):
    assert values(sensitivity_by_round(sensitive_runs)) == {
        ("conv", "1"): pytest.approx(0.02),
        ("conv", "2"): pytest.approx(1.0),
        ("fc", "1"): pytest.approx(0.05),
        ("fc", "2"): pytest.approx(0.1),
    }


def test_sensitivity_by_client_is_of_the_last_participation(sensitive_runs):
    figure = sensitivity_by_client(sensitive_runs)
    assert list(figure.data[0].x) == ["c2", "c10"]
    assert values(figure) == {
        ("conv", "c2"): pytest.approx(0.03),
        ("conv", "c10"): pytest.approx(1.0),
        ("fc", "c2"): None,  # zero has no logarithm
        ("fc", "c10"): pytest.approx(0.1),
    }


def test_chosen_layers_are_counted_over_participations(sensitive_runs):
    [bars] = chosen_layers(sensitive_runs).data
    assert dict(zip(bars.y, bars.x, strict=True)) == pytest.approx({"conv": 200 / 3, "fc": 100 / 3})
