from __future__ import annotations

import sys

import numpy as np
import pytest

from idiolect.core.errors import UsageError
from idiolect.data import load

datasets = pytest.importorskip("datasets", reason="needs the extra idiolect[data]")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that writes splits as a folder of Parquet files and gives its hf: name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(**splits):
        for split, columns in splits.items():
            features = columns.pop("features", None)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"set/{split}.parquet")
        return f"hf:{tmp_path / 'set'}"

    (tmp_path / "set").mkdir()
    return write


def photo_features(names=("cat", "dog", "owl")):
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})


def test_images_with_named_classes_and_official_parts(hub):
    gray = [np.full((2, 3), value, np.uint8) for value in (0, 255, 51)]
    name = hub(
        train={"image": gray[:2], "label": [2, 0], "features": photo_features()},
        test={"image": gray[2:], "label": [2], "features": photo_features()},
    )
    pool = load(name)
    assert pool.name == name
    assert tuple(pool.x.shape) == (3, 1, 2, 3)
    assert pool.x[:, 0, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert pool.y.tolist() == [2, 0, 2]
    assert pool.classes == ("cat", "dog", "owl")
    assert pool.part.tolist() == ["train", "train", "test"]
    assert pool.group is None


def test_color_images_put_channels_first_and_keep_their_client(hub):
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = 255
    features = photo_features() | {"writer_id": datasets.Value("string")}
    name = hub(train={"image": [red], "label": [1], "writer_id": ["w7"], "features": datasets.Features(features)})
    pool = load(name)
    assert tuple(pool.x.shape) == (1, 3, 4, 5)
    assert pool.x[0].mean((1, 2)).tolist() == [1, -1, -1]
    assert pool.group.tolist() == ["w7"]
    assert pool.part is None


def test_tables_take_all_other_columns_as_features(hub):
    pool = load(hub(train={"a": [1, 2], "b": [0.5, 1.5], "client": ["u", "v"], "target": [9, 4]}))
    assert pool.x.tolist() == [[1, 0.5], [2, 1.5]]
    assert pool.y.tolist() == [1, 0]
    assert pool.classes == ("4", "9")
    assert pool.group.tolist() == ["u", "v"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": [1], "b": [2]}, "no label column among a, b; rename yours to 'label'"),
        ({"text": ["to be"], "label": [0]}, "feature column 'text' is String"),
        (
            {"image": [np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)], "label": [0, 1]},
            "images of different sizes",
        ),
        ({"image": [np.zeros((2, 2), np.uint8)], "label": [-1]}, "label 'label' is hidden"),
    ],
)
def test_what_does_not_fit_is_named(hub, columns, words):
    features = {"features": photo_features()} if "image" in columns else {}
    with pytest.raises(UsageError, match=words) as refused:
        load(hub(train=columns | features))
    assert "\n" not in str(refused.value)


def test_a_set_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot load hf:") as refused:
        load(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(refused.value)


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'idiolect\[data\]'"):
        load("hf:owner/name")
