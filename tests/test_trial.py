"""What is tried and said before training: metrics, images whose channels come last, clients without test examples."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Metric, Output, UsageError, accuracy, methods, models
from idiolect.compute.autograd import Model
from idiolect.running.trial import check_metrics, image_hint
from idiolect.storage.run_directory import read_run
from idiolect.testing.worlds import network, population


def fitted(metrics=None, clients=None, **more):
    played = []
    run = idiolect.fit(
        network(),
        clients or population(),
        methods.fedavg(),
        rounds=1,
        metrics=metrics,
        on_round=lambda run, record: played.append(record),
        **more,
    )
    assert played
    return run


def failing(outputs, targets):
    raise KeyError("no such class")


def on_numpy(outputs, targets):
    return float((outputs.numpy().argmax(1) == targets.numpy()).mean())


class NoNumber:
    def __repr__(self):
        return "<nothing>"


@pytest.mark.parametrize(
    ("compute", "line"),
    [
        (failing, "metric 'mine' fails on outputs (5, 3) and targets (5,): KeyError: 'no such class'"),
        (lambda o: 1.0, "Metric 'mine': compute is called with (outputs, targets), but takes (o)"),
        (lambda o, y: (o.argmax(1) == y).double(), "must return one number, not a Tensor of shape (5,): take its mean"),
        (lambda o, y: o.sum(1, keepdim=True)[:1], "must return one number, not a Tensor of shape (1, 1)"),
        (lambda o, y: o.numpy()[0], "must return one number, not a ndarray of shape (3,)"),
        (lambda o, y: None, "must return one number, not a NoneType, None"),
        (lambda o, y: "0.5", "must return one number, not a str, '0.5'"),
        (lambda o, y: NoNumber(), "must return one number, not a NoNumber, <nothing>"),
        (lambda o, y: {"f1": 0.5}, "must return one number, not a dict, {'f1': 0.5}"),
        (lambda o, y: (o.argmax(1) == y).all(), "must return one number, not a bool, False"),
        (lambda o, y: o.add_(1).mean(), "metric 'mine' changes the outputs it is given"),
        (lambda o, y: y.zero_().sum() + 0.0, "metric 'mine' changes the targets it is given"),
    ],
)
def test_a_metric_that_cannot_be_is_one_line_before_training(compute, line):
    with pytest.raises(UsageError) as caught:
        idiolect.fit(
            network(),
            population(),
            methods.fedavg(),
            rounds=1,
            metrics=[accuracy, Metric("mine", compute)],
            on_round=lambda run, record: pytest.fail("a round was played"),
        )
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: Metric("mine", 0.5), "Metric 'mine': compute must be a function (outputs, targets), not a float"),
        (
            lambda: Metric("mine", nn.MSELoss),
            "Metric 'mine': compute must be a function (outputs, targets), not the class MSELoss",
        ),
        (lambda: Metric(accuracy, "accuracy"), "Metric: name is text, not Metric("),
        (lambda: Metric("", on_numpy), "Metric: name is text, not ''"),
        (lambda: fitted([accuracy, accuracy]), "two metrics are called 'accuracy' (the loss is always measured)"),
        (lambda: fitted([Metric("loss", on_numpy)]), "two metrics are called 'loss'"),
    ],
)
def test_a_metric_has_a_function_and_a_name_of_its_own(act, line):
    with pytest.raises(UsageError) as caught:
        act()
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "compute",
    [
        on_numpy,
        lambda o, y: 3,
        nn.CrossEntropyLoss(),
        lambda o, y: torch.tensor(float("nan")),
        lambda o, y: F.mse_loss(o, o),
    ],
)
def test_numbers_of_all_kinds_are_numbers(compute):
    found = fitted([Metric("mine", compute)]).records[-1]["personalized"]["test"]["mine"]["mean"]
    assert isinstance(found, float)


def test_the_trial_sees_the_largest_test_set_or_training_examples():
    model, seen = Model(network()), []
    metric = Metric("mine", lambda o, y: seen.append(len(y)) or 0.0)
    people = population()
    check_metrics(model, people, [metric])
    more = ClientData(train=people["ada"].train, test=people["dan"].train)
    check_metrics(model, {**people, "ada": more}, [metric])
    check_metrics(model, {c: ClientData(train=d.train) for c, d in people.items()}, [metric])
    assert seen == [5, 32, 32]


CONV = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("module", "shape", "bytes", "code"),
    [
        (CONV, (2, 9, 8, 3), False, "x.permute(0, 3, 1, 2)"),
        (CONV, (2, 9, 8, 3), True, "x.permute(0, 3, 1, 2) / 127.5 - 1"),
        (CONV, (2, 3, 9, 8), True, "x / 127.5 - 1"),
        (CONV, (2, 3, 9, 8), False, None),
        (nn.Conv2d(1, 4, 3), (2, 9, 8), False, "x[:, None]"),
        (nn.Conv2d(1, 4, 3), (2, 9, 8), True, "x[:, None] / 127.5 - 1"),
        (nn.Conv1d(6, 4, 3), (2, 20, 6), False, "x.permute(0, 2, 1)"),
        (nn.Conv3d(2, 4, 3), (2, 5, 6, 7, 2), False, "x.permute(0, 4, 1, 2, 3)"),
        (nn.Sequential(nn.Identity(), nn.Sequential(CONV)), (2, 9, 8, 3), False, "x.permute(0, 3, 1, 2)"),
    ],
)
def test_the_code_of_a_hint_makes_the_features_fit(module, shape, bytes, code):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, shape, generator=generator, dtype=torch.uint8) if bytes else torch.randn(shape)
    hint = image_hint(module, x)
    if code is None:
        assert hint == ""
        return
    assert hint.endswith(f"x = {code}")
    module(eval(code, {"x": x}))
    net = nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)) if len(shape) < 5 else module
    with pytest.raises(UsageError, match=re.escape(code)):
        idiolect.fit(net, {"a": ClientData(train=(x, [0, 1]))}, methods.fedavg(), rounds=1)


def test_features_that_fit_no_hint_are_refused_without_one():
    x = torch.randn(2, 9, 8, 5)
    with pytest.raises(UsageError, match=r"cannot take client 'a''s features of shape \(9, 8, 5\)") as caught:
        idiolect.fit(
            nn.Sequential(CONV, nn.Flatten()), {"a": ClientData(train=(x, [0, 1]))}, methods.fedavg(), rounds=1
        )
    assert "permute" not in str(caught.value)


@pytest.mark.parametrize("make", [models.small_cnn, models.fedfsa_cnn])
def test_networks_for_images_say_how_to_put_channels_first(make):
    for shape, words in (
        ((32, 32, 3), "x.transpose(0, 3, 1, 2) of an array, x.permute(0, 3, 1, 2) of a tensor"),
        ((32, 32, 1), "put the channels first"),
        ((32, 32), "add the axis of channels: x[:, None]"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            make(shape, 10)
    assert make((3, 32, 32), 10)


def untested(*names):
    people = population()
    return {c: ClientData(train=d.train) if c in names else d for c, d in people.items()}


def test_clients_without_a_test_are_named_before_training(capsys):
    said = []
    idiolect.fit(
        network(),
        untested("ada", "cleo"),
        methods.fedavg(),
        rounds=1,
        on_round=lambda run, record: said.append(capsys.readouterr().err),
    )
    line = "2 of 4 clients have no test examples and do not count in tables: 'ada', 'cleo'"
    assert said == [f"idiolect: {line}\n"]
    run = fitted(clients=untested("ada", "cleo"))
    assert line in run.notes
    assert run.table()["personalized accuracy"].null_count() == 0


def test_where_nobody_has_a_test_tables_say_so_and_show_no_nan(capsys, tmp_path):
    from rich.console import Console

    run = fitted(clients=untested("ada", "ben", "cleo", "dan"), output=Output(tmp_path / "run"))
    line = "no client has test examples, so tables show n/a: give ClientData(train=..., test=(x, y))"
    assert capsys.readouterr().err == f"idiolect: {line}\n"
    assert line in run.notes
    console = Console(width=200, file=io.StringIO())
    console.print(idiolect.report.comparison([run.summary()]))
    text = console.file.getvalue()
    assert "n/a" in text
    assert "nan" not in text.lower()
    assert "nan" not in idiolect.report.comparison_markdown([run.summary()]).lower()
    assert run.table()["personalized accuracy"].to_list() == [None]
    assert read_run(tmp_path / "run")[1][-1]["personalized"]["test"]["accuracy"]["mean"] is None
    assert "NaN" not in json.dumps(read_run(tmp_path / "run")[1])


def test_everybody_with_a_test_nothing_is_said(capsys):
    run = fitted()
    assert capsys.readouterr().err == ""
    assert not [note for note in run.notes if "test" in note]


def test_a_table_becomes_a_data_frame_of_pandas_without_pyarrow():
    pytest.importorskip("pandas")
    code = (
        "import sys; sys.modules['pyarrow'] = None; sys.path.insert(0, 'tests')\n"
        "import pandas, test_trial as t\n"
        "table = t.fitted().table()\n"
        "frame = pandas.DataFrame(table.to_dict(as_series=False))\n"
        "print(list(frame.columns) == table.columns, frame.iloc[0].to_list() == list(table.row(0)), frame.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True True (1, 9)\n", done.stderr[-500:]
