"""Parquet files whose row groups are read when batches are needed."""

import numpy as np
import polars as pl
import pytest
import torch
from lazy_worlds import assert_engines_agree, net, personal, run

from idiolect import ClientData, UsageError
from idiolect.data import parquet
from idiolect.rounds.batches import Shuffled

pytest.importorskip("pyarrow", reason="row groups are read by pyarrow, of the extra 'data'")

WARDS = np.array(["north", "south", "east"])


def table(count=50, seed=0):
    stream = np.random.default_rng(seed)
    x = stream.standard_normal((count, 4)).astype(np.float32)
    columns = {name: x[:, k] for k, name in enumerate("abcd")}
    return pl.DataFrame(
        {**columns, "ward": WARDS[stream.integers(0, 3, count)], "label": (x.sum(axis=1) > 0).astype(int)}
    )


@pytest.fixture
def file(tmp_path):
    table().write_parquet(tmp_path / "wards.parquet", row_group_size=8)
    return tmp_path / "wards.parquet"


def test_each_client_has_its_rows(file):
    found = parquet(file, client="ward")
    assert set(found) == set(WARDS)
    for ward, examples in found.items():
        own = table().filter(pl.col("ward") == ward)
        x, y = examples.take(torch.arange(len(examples)))
        assert np.array_equal(x.numpy(), own.select("a", "b", "c", "d").to_numpy())
        assert y.tolist() == own["label"].to_list()
        assert y.dtype == torch.int64
        assert sum(examples.blocks) == len(own)
        groups = [own for own in table().with_row_index().filter(pl.col("ward") == ward)["index"].to_numpy() // 8]
        assert list(examples.blocks) == np.unique(groups, return_counts=True)[1].tolist()


def test_an_epoch_has_each_row_once_and_reads_each_row_group_once(file, monkeypatch):
    table().drop("ward").write_parquet(file, row_group_size=8)
    examples = parquet(file)["wards"]
    source = examples.source._own[0].file
    groups, whole = [], source._reader.read_row_group
    reader = type("Reader", (), {"read_row_group": lambda self, k, *a, **m: groups.append(k) or whole(k, *a, **m)})
    monkeypatch.setattr(source, "_reader", reader())
    batches = Shuffled(examples, 8, False, (0, "train", "wards", 0)).epochs(2)
    seen = torch.cat([b.x for b in batches])
    rows = table().select("a", "b", "c", "d").to_numpy()
    for epoch in (seen[:50], seen[50:]):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, rows.tolist()))
        assert not np.array_equal(epoch.numpy(), rows)
    assert not torch.equal(seen[:50], seen[50:])
    assert sorted(groups[:7]) == list(range(7))
    assert 13 <= len(groups) <= 14  # the second epoch may begin with the row group that the first ended with
    assert groups[:7] != list(range(7))
    within = seen[:8].numpy() if groups[0] != 6 else seen[2:10].numpy()
    assert not any(np.array_equal(within, rows[k : k + 8]) for k in range(0, 48, 8))  # rows are shuffled too


def test_every_engine_reads_the_same(file):
    def clients():
        return {w: ClientData(train=e, test=e) for w, e in parquet(file, client="ward").items()}

    done = assert_engines_agree(clients, rounding=1e-6, module=net().float())
    assert personal(done).isfinite().all()
    other = personal(run(clients(), seed=1, module=net().float()))
    assert not torch.allclose(other, personal(done))


def test_a_folder_has_a_file_for_each_client_or_is_one_table(tmp_path):
    for k, name in enumerate(("b", "a")):
        table(10 + k, seed=k).write_parquet(tmp_path / f"{name}.parquet", row_group_size=4)
    found = parquet(tmp_path, client="ward")
    assert sum(len(e) for e in found.values()) == 21
    for name in "ab":
        pl.read_parquet(tmp_path / f"{name}.parquet").drop("ward").write_parquet(tmp_path / f"{name}.parquet")
    assert {name: len(e) for name, e in parquet(tmp_path).items()} == {"a": 11, "b": 10}


def test_columns_of_lists_are_inputs_by_name(tmp_path):
    image = np.arange(6 * 2 * 3, dtype=np.float32).reshape(6, 2, 3)
    pl.DataFrame({"image": image.tolist(), "age": range(6), "label": [0.5] * 6}).write_parquet(tmp_path / "a.parquet")
    x, y = parquet(tmp_path / "a.parquet")["a"].take(torch.tensor([4, 1]))
    assert torch.equal(x["image"], torch.from_numpy(image[[4, 1]]))
    assert x["age"].tolist() == [4, 1]
    assert y.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "asked", "says"),
    [
        (lambda t: t, {"label": "lable"}, "no column 'lable'.*label"),
        (lambda t: t, {"client": "site"}, "no column 'site'.*ward"),
        (lambda t: t, {}, "column 'ward', row group 0: .* is no number"),
        (
            lambda t: t.with_columns(a=pl.lit(None, pl.Float32)),
            {"client": "ward"},
            "column 'a', row group 0: a value is",
        ),
        (lambda t: t.with_columns(ward=pl.lit(None, pl.String)), {"client": "ward"}, "column 'ward' has no value"),
        (lambda t: t.with_columns(a=pl.Series([[1.0] * (1 + k % 2) for k in range(50)])), {"client": "ward"}, "1 to 2"),
        (lambda t: t.select("label"), {}, "no columns of features"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, change, asked, says):
    change(table()).write_parquet(tmp_path / "wards.parquet", row_group_size=8)
    with pytest.raises(UsageError, match=says) as raised:
        run({name: ClientData(train=e) for name, e in parquet(tmp_path / "wards.parquet", **asked).items()})
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.parquet").write_text("age\n3\n")
    with pytest.raises(UsageError, match=r"cannot read .*text\.parquet"):
        parquet(tmp_path / "text.parquet")
    with pytest.raises(UsageError, match="there is no file"):
        parquet(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.parquet file in"):
        parquet(tmp_path / "empty")


def test_files_with_different_columns(tmp_path):
    table().drop("ward").write_parquet(tmp_path / "a.parquet")
    table().drop("ward", "d").write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b.parquet: columns \['a', 'b', 'c'\], but .*a.parquet"):
        parquet(tmp_path)
