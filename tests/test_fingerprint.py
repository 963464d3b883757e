"""Fingerprints of losses, models and data: what changes them, what does not, and that resume compares them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Output, UsageError, methods
from idiolect.running import fingerprint
from idiolect.running.fingerprint import data_of, described, model_of
from idiolect.testing.worlds import network, population

SMOOTHING = 0.1
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


def by_global(output, y):
    return F.cross_entropy(output, y, label_smoothing=SMOOTHING)


def by_weights(output, y):
    return F.cross_entropy(output, y, weight=WEIGHTS)


def helper(output):
    return 2 * output


def by_helper(output, y):
    return helper(F.cross_entropy(output, y))


def by_default(output, y, smoothing=0.1):
    return F.cross_entropy(output, y, label_smoothing=smoothing)


def closing(value):
    def loss(output, y):
        return value * F.cross_entropy(output, y)

    return loss


class Own(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.inner = factor, nn.CrossEntropyLoss()

    def forward(self, output, y):
        return self.factor * self.inner(output, y)


@dataclass
class Called:
    factor: float

    def __call__(self, output, y):
        return self.factor * F.cross_entropy(output, y)

    def method(self, output, y):
        return self(output, y)


PAIRS = [
    (F.cross_entropy, F.mse_loss),
    (F.cross_entropy, nn.CrossEntropyLoss()),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (nn.CrossEntropyLoss(WEIGHTS), nn.CrossEntropyLoss(2 * WEIGHTS)),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(WEIGHTS)),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=255)),
    (nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=2.0)),
    (partial(F.cross_entropy, label_smoothing=0.1), partial(F.cross_entropy, label_smoothing=0.2)),
    (partial(F.cross_entropy, weight=WEIGHTS), partial(F.cross_entropy, weight=WEIGHTS + 1)),
    (partial(by_default, smoothing=0.2), partial(by_default, smoothing=0.3)),
    (closing(2.0), closing(3.0)),
    (closing(WEIGHTS), closing(WEIGHTS + 1)),
    (closing(closing(1)), closing(closing(2))),
    (lambda o, y: F.cross_entropy(o, y), lambda o, y: 2 * F.cross_entropy(o, y)),
    (lambda o, y: F.cross_entropy(o, y), lambda o, y: F.nll_loss(o, y)),
    (lambda o, y: 2.0 * F.cross_entropy(o, y), lambda o, y: 3.0 * F.cross_entropy(o, y)),
    (lambda o, y: (lambda k: k * 2.0)(F.mse_loss(o, y)), lambda o, y: (lambda k: k * 3.0)(F.mse_loss(o, y))),
    (Own(1.0), Own(2.0)),
    (Called(1.0), Called(2.0)),
    (Called(1.0).method, Called(2.0).method),
    (np.float32(2.0), np.float32(3.0)),
    ({"a": 1}, {"a": 2}),
    ([1, 2], [2, 1]),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda v: getattr(v, "__qualname__", type(v).__name__))
def test_another_setting_is_another_text_and_the_same_one_the_same(one, other):
    assert described(one) != described(other)
    for value in (one, other):
        assert described(value) == described(value)
        assert " at 0x" not in described(value)
        assert len(described(value)) <= fingerprint.MOST_LETTERS


@pytest.mark.parametrize(
    ("name", "value", "loss"),
    [
        ("SMOOTHING", 0.2, by_global),
        ("WEIGHTS", WEIGHTS + 1, by_weights),
        ("helper", closing(3.0), by_helper),
        ("SMOOTHING", 0.2, lambda o, y: (lambda: by_global(o, y) + SMOOTHING)()),
    ],
)
def test_globals_that_a_loss_reads_belong_to_it(name, value, loss, monkeypatch):
    before = described(loss)
    monkeypatch.setitem(globals(), name, value)
    assert described(loss) != before


def test_defaults_and_the_order_of_a_dict_and_what_recurs(monkeypatch):
    before = described(by_default)
    monkeypatch.setattr(by_default, "__defaults__", (0.5,))
    assert described(by_default) != before
    assert described({"b": 1, "a": {3, 1, 2}}) == described({"a": {2, 3, 1}, "b": 1})
    loop = [1]
    loop.append(loop)
    assert described(loop) == described(loop)
    assert len(described(closing(list(range(1000))))) <= fingerprint.MOST_LETTERS


def test_another_process_finds_the_same():
    """Addresses, and the order of sets of texts, differ there."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_fingerprint as t\n"
        "print(t.described(t.Own(2.0)), t.described(t.closing({'a', 'b', 'c'})), t.described(t.in_a_set))\n"
        "print(t.model_of(t.network()))"
    )
    here = f"{described(Own(2.0))} {described(closing({'a', 'b', 'c'}))} {described(in_a_set)}\n{model_of(network())}\n"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == here


def in_a_set(output, y):
    return F.cross_entropy(output, y, reduction="mean" if "a" in {"a", "b", "c", "d"} else "sum")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.relu(x))


class Tanh(Net):
    def forward(self, x):
        return self.fc(F.tanh(x))


def test_a_network_is_its_layers_and_its_own_code_not_its_weights():
    assert model_of(Net()) == model_of(Net())
    assert (
        len({model_of(m) for m in (Net(), Tanh(), nn.Linear(4, 3), nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 3)))})
        == 5
    )
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)) for p in (0.1, 0.2))
    assert model_of(one) != model_of(other)
    monkey, inner = nn.Sequential(Net()), nn.Sequential(Tanh())
    assert model_of(monkey).split()[1] != model_of(inner).split()[1]


def wards(change=lambda x, y: (x, y), **more):
    x, y = torch.arange(24.0).view(6, 4), torch.arange(6) % 3
    return ClientData(train=change(x, y), **{"test": (x[:2], y[:2]), **more})


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (100 * x, y),
        lambda x, y: (x.flip(0), y),
        lambda x, y: (x.double(), y),
        lambda x, y: (x.view(6, 2, 2), y),
        lambda x, y: (x, y.flip(0)),
        lambda x, y: (x, y.float()),
        lambda x, y: (x[:5], y[:5]),
        lambda x, y: (torch.where(x == 23, 23.001, x), y),
        lambda x, y: (x.bfloat16(), y),
    ],
)
def test_other_values_types_shapes_and_sizes_are_other_data(other):
    assert data_of(wards(other))["train"] != data_of(wards())["train"]
    assert data_of(wards(other))["test"] == data_of(wards())["test"]
    assert data_of(wards(lambda x, y: (x.t().contiguous().t(), y.clone()))) == data_of(wards())


def test_of_large_data_a_sample_of_rows_is_read(monkeypatch):
    monkeypatch.setattr(fingerprint, "MOST_BYTES", 400)
    x = torch.zeros(100, 4)
    read = {k for k in range(100) if described(x) != described(x.index_fill(0, torch.tensor(k), 1.0))}
    assert len(read) == 25
    assert max(np.diff(sorted(read))) > 1  # not a block
    assert described(x[:50]) != described(x)
    assert described(100 * (x + 1)) != described(x + 1)


def run(folder, resume=True, **more):
    clients = more.pop("clients", None) or population()
    given = {"rounds": 2, "loss": nn.CrossEntropyLoss(label_smoothing=0.1), **more}
    return idiolect.fit(
        more.pop("model", network()), clients, methods.fedavg(), **given, output=Output(folder, resume, report=False)
    )


def scaled(client, factor=100.0):
    people = population()
    data = people[client]
    splits = {name: (factor * part.x, part.y) for name, part in data.splits().items()}
    return {**people, client: ClientData(**splits)}


def without_test(client):
    people = population()
    return {**people, client: ClientData(train=people[client].train)}


def relabeled(client):
    people = population()
    data = people[client]
    splits = data.splits()
    return {**people, client: ClientData(**{**splits, "train": (splits["train"].x, splits["train"].y.flip(0))})}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
            'loss was "CrossEntropyLoss(ignore_index=-100, label_smooth',
        ),
        ({"loss": nn.CrossEntropyLoss(WEIGHTS.double(), label_smoothing=0.1)}, "loss was"),
        ({"loss": closing(1.0)}, "is 'closing.<locals>.loss("),
        ({"clients": lambda: scaled("ada")}, "data ada train was 'float64 ("),
        ({"clients": lambda: relabeled("ada")}, "data ada train was 'float64 ("),
        ({"clients": lambda: without_test("ada")}, "data ada test was there"),
        ({"training": idiolect.Training(lr=0.2)}, "training was"),
    ],
)
def test_resume_names_what_differs_in_one_line(more, line, tmp_path):
    run(tmp_path / "run", resume=False)
    given = {k: v() if k == "clients" else v for k, v in more.items()}
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "run", **given)
    assert line in str(caught.value)
    assert "give another run another directory" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_resume_with_the_same_objects_made_again_goes_on(tmp_path):
    run(tmp_path / "run", resume=False)
    assert run(tmp_path / "run").round == 2


def test_many_differences_are_counted(tmp_path):
    run(tmp_path / "run", resume=False)
    people = {c: ClientData(**{n: (p.x + 1, p.y) for n, p in d.splits().items()}) for c, d in population().items()}
    with pytest.raises(UsageError, match=r"; and \d+ more; give another run"):
        run(tmp_path / "run", clients=people)
