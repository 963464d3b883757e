from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from idiolect.core.errors import UsageError
from idiolect.data import ByClient, federate, load, read_table

FRAME = pl.DataFrame(
    {
        "site": ["north", "south", "north", "east"],
        "age": [61, 38, 40, 55],
        "dose": [0.5, 1.5, 2.5, 3.5],
        "smoker": [True, False, False, True],
        "label": ["ill", "well", "ill", "dead"],
    }
)


def written(folder, frame, name="wards.csv"):
    path = folder / name
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    return path


@pytest.mark.parametrize("name", ["wards.csv", "wards.parquet"])
def test_a_table_becomes_features_classes_and_clients(tmp_path, name):
    pool = read_table(written(tmp_path, FRAME, name), client="site")
    assert pool.name == "wards"
    assert pool.x.tolist() == [[61, 0.5, 1], [38, 1.5, 0], [40, 2.5, 0], [55, 3.5, 1]]
    assert str(pool.x.dtype) == "torch.float32"
    assert pool.classes == ("dead", "ill", "well")
    assert pool.y.tolist() == [1, 2, 1, 0]
    assert pool.group.tolist() == ["north", "south", "north", "east"]
    people = federate(pool, ByClient(), test=0)
    assert {name: sorted(data.train.y.tolist()) for name, data in people.items()} == {
        "east": [0],
        "north": [1, 1],
        "south": [2],
    }


def test_the_client_column_is_found_by_its_usual_name_and_may_be_absent(tmp_path):
    with_clients = written(tmp_path, FRAME.rename({"site": "client"}))
    assert load(with_clients).group.tolist() == ["north", "south", "north", "east"]
    assert load(str(with_clients)).y.tolist() == [1, 2, 1, 0]
    without = written(tmp_path, FRAME.drop("site"), "plain.csv")
    assert load(without).group is None


def test_numbers_as_client_names_are_text(tmp_path):
    numbered = FRAME.with_columns(client=pl.Series([3, 1, 3, 2])).drop("site")
    assert read_table(written(tmp_path, numbered)).group.tolist() == ["3", "1", "3", "2"]


@pytest.mark.parametrize(
    ("labels", "y", "classes"),
    [
        ([7, 3, 7, 5], [2, 0, 2, 1], ("3", "5", "7")),
        ([True, False, True, True], [1, 0, 1, 1], ("False", "True")),
        ([1.0, 2.5, 0.0, -1.0], [1.0, 2.5, 0.0, -1.0], None),
    ],
)
def test_kinds_of_labels(tmp_path, labels, y, classes):
    frame = FRAME.drop("site").with_columns(label=pl.Series(labels))
    pool = read_table(written(tmp_path, frame, "t.parquet"))
    assert pool.y.tolist() == y
    assert pool.classes == classes
    np.savez(tmp_path / "t.npz", x=np.zeros((4, 2)), y=np.array(labels))
    pool = load(tmp_path / "t.npz")
    assert pool.y.tolist() == y
    assert pool.classes == classes


def test_categories_are_text_labels(tmp_path):
    frame = FRAME.drop("site").with_columns(pl.col("label").cast(pl.Categorical))
    pool = read_table(written(tmp_path, frame, "t.parquet"))
    assert pool.classes == ("dead", "ill", "well")
    assert pool.y.tolist() == [1, 2, 1, 0]


def test_arrays_with_clients(tmp_path):
    x = np.arange(12).reshape(3, 4) / 2
    np.savez(tmp_path / "own.npz", x=x, y=np.array(["b", "a", "b"]), client=np.array([1, 2, 1]))
    pool = read_table(tmp_path / "own.npz")
    assert pool.name == "own"
    assert pool.x.tolist() == x.tolist()
    assert str(pool.x.dtype) == "torch.float32"
    assert pool.y.tolist() == [1, 0, 1]
    assert pool.classes == ("a", "b")
    assert pool.group.tolist() == ["1", "2", "1"]


def test_bytes_are_images_and_other_whole_numbers_stay_whole(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([[[[0, 255]]]], np.uint8), y=[0])
    assert load(tmp_path / "a.npz").x.tolist() == [[[[-1.0, 1.0]]]]
    np.savez(tmp_path / "b.npz", x=np.array([[5, 300]], np.int16), y=[0])
    assert load(tmp_path / "b.npz").x.tolist() == [[5, 300]]
    assert str(load(tmp_path / "b.npz").x.dtype) == "torch.int64"


AGE = FRAME.drop("site")


@pytest.mark.parametrize(
    ("frame", "columns", "words"),
    [
        (FRAME, {"client": "site", "label": "Label"}, r"no column 'Label' \(did you mean label\?\); columns: site"),
        (FRAME, {"client": "ward"}, "no column 'ward'; columns: site, age, dose, smoker, label"),
        (FRAME, {}, "feature column 'site' is String; make it numbers or drop it"),
        (AGE.with_columns(age=pl.Series([1, None, 2, 3])), {}, "column 'age' row 1: no value"),
        (AGE.with_columns(dose=pl.Series([1.0, 2.0, float("nan"), 3.0])), {}, "column 'dose' row 2: no value"),
        (AGE.with_columns(label=pl.Series(["a", "b", "c", None])), {}, "column 'label' row 3: no value"),
        (FRAME.with_columns(site=None).cast({"site": pl.String}), {"client": "site"}, "'site' row 0: no value"),
        (AGE.select("label"), {}, "has no feature column beside"),
        (AGE.clear(), {}, "has a header and no rows"),
        (AGE.with_columns(label=pl.date(2020, 1, 1)), {}, "label column 'label' is Date; give numbers or text"),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path, frame, columns, words):
    path = written(tmp_path, frame, "t.parquet")
    with pytest.raises(UsageError, match=words) as refused:
        read_table(path, **columns)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((2, 1))}, "no array 'y'; it holds x"),
        ({"y": np.zeros(2)}, "no array 'x'; it holds y"),
        ({"x": np.zeros(2), "y": np.zeros(2)}, r"x has shape \(2,\)"),
        ({"x": np.array([["a"], ["b"]]), "y": np.zeros(2)}, "x has shape .* type <U1"),
        ({"x": np.zeros((2, 1)), "y": np.zeros((2, 2), int)}, r"labels of shape \(2, 2\)"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(3)}, "2 examples in x, 3 in y"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(2), "client": np.zeros(1, int)}, "2 examples in x, 1 in group"),
    ],
)
def test_what_an_npz_lacks_is_named(tmp_path, arrays, words):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "own.npz")


def test_objects_in_an_npz_are_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    np.savez(tmp_path / "own.npz", x=np.array([Trap(), Trap()], dtype=object), y=np.zeros(2))
    with pytest.raises(UsageError, match=r"cannot read .*own.npz"):
        load(tmp_path / "own.npz")


@pytest.mark.parametrize("name", ["own.npz", "own.csv", "own.parquet"])
def test_missing_and_broken_files_are_named(tmp_path, name):
    with pytest.raises(UsageError, match=f"there is no file .*{name}"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"" if name.endswith("csv") else b"PK\x03\x04 not really")
    with pytest.raises(UsageError, match=f"cannot read .*{name}") as refused:
        load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"give a file ending in .npz, .csv, .parquet"):
        read_table(tmp_path / "own.xls")
