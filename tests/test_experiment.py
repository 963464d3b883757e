"""Experiments: settings in, objects out, everything from the seed; comparisons that go on where they stopped."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from idiolect.cli import compare as comparing
from idiolect.cli.compare import compare, labels
from idiolect.cli.experiment import build, load_pool, run, shift_of, split_of
from idiolect.cli.main import parse
from idiolect.cli.settings import Experiment, check, command, experiment_of, read_toml
from idiolect.core.errors import UsageError
from idiolect.data import ByClient, ByDomain, Contrast, Dirichlet, Iid, Pathological, Rotation
from idiolect.rounds.optim import SGD, Adam
from idiolect.rounds.schedule import Cosine
from idiolect.storage.run_directory import read_run

SMALL = Experiment(clients=3, rounds=2, size=16, lr=0.1)


@pytest.fixture
def wards(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{'north' if i % 3 else 'south'},{rng.normal():.3f},{i / 7:.3f},{i % 2}" for i in range(60)]
    file = tmp_path / "wards.csv"
    file.write_text("client,age,dose,label\n" + "\n".join(rows) + "\n")
    return file


def same(one, other):
    return all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_settings_become_objects():
    setup = build(
        check(
            {
                "clients": 5,
                "split": "pathological(2)",
                "shift": "rotation(45) + contrast(0.5)",
                "method": "fedbn + sam(0.1)",
                "model": "mlp(hidden=(9,))",
                "lr": 0.3,
                "local_epochs": 2,
                "batch_size": "all",
                "optimizer": "sgd(momentum=0.9)",
                "schedule": "cosine()",
                "clip": 10,
                "val": 0.1,
            }
        )
    )
    training = setup.training
    assert list(setup.clients) == [f"client-{i}" for i in range(5)]
    assert all(len(data.train.y.unique()) == 2 and data.val is not None for data in setup.clients.values())
    assert [p.name for p in setup.method.parts] == ["share", "sam"]
    assert setup.model.fc1.weight.shape == (9, 64)
    assert (training.lr, training.local_epochs, training.batch_size, training.clip) == (0.3, 2, None, 10.0)
    assert (training.optimizer, training.schedule) == (SGD(momentum=0.9), Cosine())
    assert setup.loss is F.cross_entropy


def test_adam_split_and_shift_by_name():
    pool = load_pool(SMALL)
    asked = SMALL.model_copy(
        update={"optimizer": "adam", "split": "pathological(3)", "shift": "rotation(9)+contrast(1)"}
    )
    assert build(asked, pool).training.optimizer == Adam()
    assert split_of(asked, pool) == Pathological(3)
    assert shift_of(asked) == Rotation(9) + Contrast(1)
    assert split_of(SMALL, pool) == Dirichlet(0.5)
    assert shift_of(SMALL) is None


def test_the_seed_alone_decides_weights_and_clients():
    pool = load_pool(SMALL)
    torch.manual_seed(1)
    one = build(SMALL.model_copy(update={"method": "fedavg"}), pool)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = build(SMALL.model_copy(update={"method": "fedfsa"}), pool)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one.model, other.model)
    assert all(torch.equal(one.clients[c].train.x, other.clients[c].train.x) for c in one.clients)
    unlike = build(SMALL.model_copy(update={"seed": 1}), pool)
    assert not same(one.model, unlike.model)
    assert any(not torch.equal(one.clients[c].train.y, unlike.clients[c].train.y) for c in one.clients)


def test_your_own_table_is_split_by_its_client_column(wards):
    setup = build(Experiment(data=str(wards)))
    assert list(setup.clients) == ["north", "south"]
    assert [len(data.train.y) + len(data.test.y) for data in setup.clients.values()] == [40, 20]
    assert setup.model.fc1.weight.shape == (128, 2)
    assert split_of(Experiment(), load_pool(Experiment(data=str(wards)))) == ByClient()


def test_fractional_labels_are_a_regression_that_runs(wards):
    done = run(Experiment(data=str(wards), label="dose", rounds=2, lr=0.01, method="fedavg"))
    assert done.lead == "loss"
    assert done.records[-1]["train_loss"] < done.records[0]["train_loss"]


def test_a_regression_takes_no_network_for_classes(wards):
    with pytest.raises(UsageError, match="unknown name 'small_cnn'; known: mlp"):
        build(Experiment(data=str(wards), label="dose", model="small_cnn", method="fedavg"))
    assert build(Experiment(data=str(wards), label="dose", model="mlp(hidden=(3,))")).model.fc1.out_features == 3


def test_run_writes_its_command(tmp_path):
    done = run(SMALL.model_copy(update={"directory": tmp_path / "one", "shift": "rotation(45)"}))
    config = read_run(tmp_path / "one")[0]["config"]
    assert len(done.records) == 2
    assert config["command"] == "idiolect run --clients 3 --shift 'rotation(45)' --size 16 --rounds 2 --lr 0.1"


def test_a_command_gives_back_its_experiment():
    asked = Experiment(
        split="dirichlet(0.3)", test="official", val=0.1, batch_size="all", data_dir="a b", directory="out", resume=True
    )
    line = shlex.split(command(asked, "run", places=True))
    assert experiment_of(parse(line[1:])) == asked


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"local_epoch": 5}, "unknown key local_epoch (did you mean local_epochs?)"),
        ({"rounds": "7"}, "rounds = '7' is not a whole number"),
        ({"rounds": True}, "rounds = True is not a whole number"),
        ({"rounds": 2.5}, "rounds = 2.5 is not a whole number"),
        ({"lr": [0.1]}, "lr = [0.1] is not a number"),
        ({"batch_size": "whole"}, "batch_size = 'whole' is not a whole number or 'all'"),
        ({"test": "offical"}, "test = 'offical' is not a number or 'official'"),
        ({"resume": "yes"}, "resume = 'yes' is not true or false"),
        ({"split": 3}, "split = 3 is not text"),
    ],
)
def test_wrong_settings_are_one_line(values, line):
    with pytest.raises(UsageError) as caught:
        check(values)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"method": "sam(0.1)"}, "'sam(0.1)' is a Part, not a method; put a method first"),
        ({"method": "head"}, "'head' is a Scope, not a method"),
        ({"split": "rotation(3)"}, "split: unknown name 'rotation'"),
        ({"split": "3"}, "'3' is an int, not a split"),
        ({"shift": "dirichlet(3)"}, "shift: unknown name 'dirichlet'"),
        ({"optimizer": "adagrad"}, "optimizer: unknown name 'adagrad'"),
        ({"schedule": "cosin"}, "did you mean Cosine?"),
        ({"model": "small_cmm"}, "model: unknown name 'small_cmm' (did you mean small_cnn?)"),
        ({"model": "fedfsa_cnn"}, "fedfsa_cnn needs images"),
        ({"data": "digit"}, "unknown data set 'digit' (did you mean digits?)"),
        ({"data": "nowhere.csv"}, "there is no file nowhere.csv"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"seed": -1}, "seed"),
        ({"clients": 0}, "clients must be a whole number, at least 1, got 0"),
        ({"split": "by_client"}, "needs a pool with groups"),
    ],
)
def test_settings_that_cannot_be_are_one_line(values, line):
    with pytest.raises(UsageError) as caught:
        build(check(values))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_that_cannot_be_read_is_one_line(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("rounds = \n")
    with pytest.raises(UsageError, match=r"x\.toml is no TOML: .*line 1"):
        read_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is no TOML"):
        read_toml(file)
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_toml(tmp_path / "y.toml")


def test_compared_methods_start_alike_and_run_as_alone():
    runs = compare(SMALL, ["local", "fedavg"], seeds=[0, 3])
    assert [(r.label, r.seed) for r in runs] == [("Local", 0), ("Local", 3), ("FedAvg", 0), ("FedAvg", 3)]
    alone = run(SMALL.model_copy(update={"method": "fedavg", "seed": 3}))
    assert alone.records[-1]["personalized"] == runs[3].records[-1]["personalized"]
    assert runs[0].records[0]["train_loss"] == runs[2].records[0]["train_loss"]
    assert runs[0].records[0]["train_loss"] != runs[1].records[0]["train_loss"]


def test_a_comparison_goes_on_where_it_stopped(tmp_path):
    methods = ["local", "fedavg"]
    whole = compare(SMALL, methods)
    halted = SMALL.model_copy(update={"directory": tmp_path / "c"})

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(halted, methods, on_run=stop)
    first = (tmp_path / "c/Local-seed0/metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="is not empty: add --resume"):
        compare(halted, methods)
    with pytest.raises(UsageError, match="started with other settings"):
        compare(halted.model_copy(update={"resume": True, "lr": 0.2}), methods)
    runs = compare(halted.model_copy(update={"resume": True}), methods)
    assert (tmp_path / "c/Local-seed0/metrics.jsonl").read_text() == first
    for one, other in zip(whole, runs, strict=True):
        assert one.records[-1]["personalized"] == other.records[-1]["personalized"]
    rows = json.loads((tmp_path / "c/comparison.json").read_text())
    assert [row["method"] for row in rows] == ["Local", "FedAvg"]
    assert rows[1]["personalized"] == whole[1].records[-1]["personalized"]["test"]["accuracy"]["mean"]
    line = "idiolect compare --clients 3 --size 16 --rounds 2 --lr 0.1 --methods local fedavg --seeds 0"
    assert line in (tmp_path / "c/comparison.md").read_text()
    assert line in (tmp_path / "c/report.html").read_text()


def test_a_method_that_does_not_fit_is_refused_before_any_training(tmp_path):
    asked = SMALL.model_copy(update={"directory": tmp_path / "c"})
    with pytest.raises(UsageError, match="lower top"):
        compare(asked, ["local", "fedfsa(top=99)"])
    assert not (tmp_path / "c").exists()


def test_labels():
    assert labels(["fedbn", "fedfsa(top=1)", "FedFSA(top=2)"]) == ["FedBN", "fedfsa(top=1)", "FedFSA(top=2)"]
    with pytest.raises(UsageError, match="'FedBN' occurs twice"):
        labels(["fedbn()", "FedBN"])
    with pytest.raises(UsageError, match="seeds 1, 1"):
        compare(SMALL, ["local"], seeds=[1, 1])
    with pytest.raises(UsageError, match="at least one method"):
        compare(SMALL, [])


def test_groups_are_the_domains_where_they_are_few():
    assert comparing._groups(Iid(), ["a", "b"]) is None
    assert comparing._groups(ByDomain(), ["mnist", "usps"]) == {"mnist": "mnist", "usps": "usps"}
    assert comparing._groups(ByDomain(2), ["mnist-m-0", "usps-1"]) == {"mnist-m-0": "mnist-m", "usps-1": "usps"}
    assert comparing._groups(ByClient(), [str(i) for i in range(13)]) is None
