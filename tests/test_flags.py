"""No setting is ignored: with every kind of data each flag changes something, or is refused in one line."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from idiolect.cli import experiment as experiments
from idiolect.cli import main as cli
from idiolect.cli.experiment import build
from idiolect.cli.settings import GROUPS, Experiment, check
from idiolect.core.errors import UsageError
from idiolect.running.options import Machine, Output


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("IDIOLECT_DATA", raising=False)


def source(kind, folder):
    """Write data of a kind; return the settings that name it."""
    rng = np.random.default_rng(0)
    n, wards = 240, np.repeat(["a", "b", "c"], 80)
    x, y = rng.normal(size=(n, 4)).astype(np.float32), np.arange(n) % 3
    patients = np.repeat(np.arange(60).astype(str), 4)
    if kind == "digits":
        return {"data": "digits"}
    if kind.startswith("npz"):
        arrays = {"x": x, "y": y, "grade": (y + 1) % 3, "subject": np.tile(["s", "t"], n // 2), "patient": patients}
        np.savez(folder / "own.npz", **arrays, **({"client": wards} if kind == "npz with clients" else {}))
        return {"data": str(folder / "own.npz")}
    columns = {f"x{k}": x[:, k] for k in range(4)} | {"label": y, "grade": (y + 1) % 3, "patient": np.arange(n) // 4}
    columns |= {"subject": np.tile([0, 1], n // 2)} | ({"client": wards} if kind == "csv with clients" else {})
    if kind == "hub":
        pl.DataFrame(columns).write_parquet(folder / "train.parquet")
        return {"data": f"hf:{folder}"}
    pl.DataFrame(columns).write_csv(folder / "own.csv")
    return {"data": str(folder / "own.csv")}


SOURCES = ("digits", "npz", "npz with clients", "csv", "csv with clients", "hub")
OWN = ("npz", "npz with clients", "csv", "csv with clients", "hub")
REFUSED = {
    "label": {"digits": "names a column of a table; digits has none"},
    "client": {
        "digits": "names a column of a table; digits has none",
        "csv with clients": "feature column 'client' is String",
    },
    "unit": {"digits": "names a column of a table; digits has none"},
    "data_dir": dict.fromkeys(OWN, "is for the named sets") | {"digits": "digits comes with scikit-learn"},
    "clients": dict.fromkeys(("npz with clients", "csv with clients"), "takes them from the data"),
    "test": dict.fromkeys(SOURCES, "has no official test part"),
}
GIVEN = {
    "label": {"label": "grade"},
    "client": {"client": "subject"},
    "unit": {"unit": "patient", "deal": "by_group()"},
    "data_dir": {"data_dir": "somewhere"},
    "split": {"split": "iid"},
    "clients": {"clients": 4},
    "shift": {"shift": "noise(0.5)"},
    "deal": {"deal": "time_blocks(2)", "split": "contiguous", "clients": 3},
    "test": {"test": "official"},
    "val": {"val": 0.2},
    "size": {"size": 5},
    "seed": {"seed": 7},
}
DATA = (*GROUPS["data"][1:], *GROUPS["clients"], "seed")


def told(setup):
    """What the clients of an experiment hold, and the initial weights."""
    rows = {c: {s: (e.x.tolist(), e.y.tolist()) for s, e in data.splits().items()} for c, data in setup.clients.items()}
    return rows, [p.flatten()[:3].tolist() for p in setup.model.parameters()]


def test_the_table_has_every_flag():
    assert set(GIVEN) == set(DATA)
    assert {*DATA, *TRAINING, *WHERE, "method", "model", "data"} == set(Experiment.model_fields)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("flag", DATA)
def test_every_flag_on_every_kind_of_data_is_used_or_refused(flag, kind, tmp_path):
    if kind == "hub":
        pytest.importorskip("datasets")
    base = source(kind, tmp_path)
    asked = check(base | GIVEN[flag])
    line = REFUSED.get(flag, {}).get(kind)
    if line:
        with pytest.raises(UsageError) as caught:
            build(asked)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    without = {k: v for k, v in GIVEN[flag].items() if k != flag and not (flag == "unit" and k == "deal")}
    assert told(build(asked)) != told(build(check(base | without)))


TRAINING = {
    "rounds": 3,
    "participation": 0.5,
    "lr": 0.2,
    "local_epochs": 2,
    "batch_size": 8,
    "optimizer": "adamw(weight_decay=0.1)",
    "schedule": "warmup(2)",
    "clip": 1.0,
    "evaluate_every": 2,
}
WHERE = {"engine": "sequential", "device": "cpu", "precision": "bfloat16", "directory": "out", "resume": True}


@pytest.mark.parametrize(("flag", "value"), [*TRAINING.items(), *WHERE.items()])
def test_every_other_flag_reaches_the_run(flag, value, monkeypatch, tmp_path):
    def passed(**settings):
        called = {}
        finished = SimpleNamespace(report=lambda *_: None)
        monkeypatch.setattr(experiments, "fit", lambda *args, **more: called.update(more) or finished)
        experiments.run(Experiment(clients=3, size=8, **settings))
        names = (*inspect.signature(Machine).parameters, *inspect.signature(Output).parameters)
        options = {
            n: getattr(o, n) for o in (called.pop("machine"), called.pop("output")) for n in names if hasattr(o, n)
        }
        return called | {n: v for n, v in options.items() if n != "about"}

    more = {"directory": str(tmp_path)} if flag == "resume" else {}
    with_it, without = passed(**{flag: value}, **more), passed(**more)
    changed = {name for name in with_it if with_it[name] != without[name]}
    expected = flag if flag in with_it else "training"
    assert changed == {expected}


@pytest.mark.parametrize("kind", ["csv", "npz", "csv with clients"])
def test_the_columns_that_are_named_are_no_features(kind, tmp_path):
    named = {"label": "grade", "client": "client" if "clients" in kind else "subject", "unit": "patient"}
    with_unit = experiments.load(source(kind, tmp_path)["data"], **named)
    without = experiments.load(source(kind, tmp_path)["data"], **{**named, "unit": None})
    assert without.x.shape[1] - with_unit.x.shape[1] == (0 if kind == "npz" else 1)
    assert (len(set(with_unit.unit)), without.unit) == (60, None)
    assert set(with_unit.group) == (
        {"a", "b", "c"} if "clients" in kind else {"s", "t"} if kind == "npz" else {"0", "1"}
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"unit": "patient"}, "unit = 'patient' is for deal = by_group(), not for shuffled()"),
        ({"unit": "patien", "deal": "by_group()"}, "no column 'patien' (did you mean patient?)"),
        ({"client": "nonsense"}, "no column 'nonsense'"),
        ({"label": "grde"}, "no column 'grde' (did you mean grade?)"),
        ({"split": "by_domain", "client": "subject", "clients": 3}, "takes them from the data"),
        ({"deal": "time_blocks(2)"}, "TimeBlocks: Dirichlet(alpha=0.5, minimum=10) takes neighbors in time apart"),
        ({"deal": "by_time"}, "deal: unknown name 'by_time'"),
        ({"deal": "iid"}, "deal: unknown name 'iid'"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings, line, tmp_path):
    for kind in ("csv", "npz"):
        with pytest.raises(UsageError) as caught:
            build(check(source(kind, tmp_path) | settings))
        assert line.replace("no column", "no array") in str(caught.value).replace("no column", "no array"), kind
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data", "--label", "x"], "--label is for the clients of one set: idiolect data NAME"),
        (["data", "--split", "iid"], "--split is for the clients of one set"),
        (["data", "digits", "--client", "x"], "client='x' names a column of a table; digits has none: leave it out"),
        (["describe", "fedbn", "--label", "x"], "label='x' names a column of a table; digits has none: leave it out"),
        (["run", "--resume"], "resume needs the directory of what to go on with: --resume --directory runs/NAME"),
        (["compare", "--resume"], "resume needs the directory of what to go on with: --resume --directory runs/NAME"),
        (["compare", "c.toml"], "c.toml: compare reads methods = [...], not method"),
        (["compare", "d.toml"], "d.toml: compare reads seeds = [...], not seed"),
        (["run", "e.toml"], "e.toml: unknown key methods (did you mean method?)"),
    ],
)
def test_commands_refuse_what_they_do_not_use(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('method = "fedbn"\n')
    (tmp_path / "d.toml").write_text("seed = 3\n")
    (tmp_path / "e.toml").write_text('methods = ["fedbn"]\n')
    assert cli.main(words) == 2
    assert line in capsys.readouterr().err


def test_images_of_bytes_are_recognized_in_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
    last = {"rows": pixels, "gray": pixels[..., 0], "one": pixels[..., :1], "first": pixels.transpose(0, 3, 1, 2)}
    found = {}
    for name, x in last.items():
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(6))
        found[name] = experiments.load(tmp_path / f"{name}.npz").x
    right = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    assert torch.equal(found["rows"], right)
    assert torch.equal(found["first"], right)
    assert torch.equal(found["gray"], right[:, :1])
    assert torch.equal(found["one"], right[:, :1])
