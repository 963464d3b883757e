from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from idiolect.core.errors import UsageError
from idiolect.data import ClientData, Labels, check_clients, holdings


class Squares(torch.utils.data.Dataset):
    """Example i is ([i, i*i], i) as plain Python and NumPy values; counts how often each is read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 4

    def __getitem__(self, i):
        self.reads += 1
        return np.array([i, i * i], dtype=np.float64), i


def client(x, y, **splits):
    return ClientData(train=(x, y), **splits)


def test_arrays_lists_and_tensors_become_the_same_examples():
    x, y = [[0.5, 1.0], [2.0, -3.0]], [1, 0]
    tensors = [torch.tensor(x), torch.tensor(y, dtype=torch.uint8)]
    for given in ((x, y), (np.array(x), np.array(y, np.int32)), tensors):
        train = ClientData(given).train
        assert train.x.dtype == torch.float32
        assert train.y.dtype == torch.int64
        assert train.x.tolist() == x
        assert train.y.tolist() == y


def test_float64_is_kept_from_tensors_and_narrowed_from_numpy():
    values = [[0.1], [0.2]]
    assert client(torch.tensor(values, dtype=torch.float64), [0, 1]).train.x.dtype == torch.float64
    assert client(np.array(values), np.array([0.5, 1.5])).train.x.dtype == torch.float32
    assert client(np.array(values), np.array([0.5, 1.5])).train.y.dtype == torch.float32
    assert client(np.array([[1], [2]]), [0, 1]).train.x.dtype == torch.int64


def test_the_callers_array_is_not_shared():
    x = np.zeros((2, 1), np.float32)
    data = client(x, [0, 1])
    x[:] = 7
    assert data.train.x.tolist() == [[0.0], [0.0]]


def test_a_map_style_dataset_is_read_when_it_is_needed():
    dataset = Squares()
    data = ClientData(dataset, test=TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 2])))
    assert (dataset.reads, len(data.train), len(data.test)) == (0, 4, 3)
    x, y = data.train.take(torch.tensor([3, 1]))
    assert dataset.reads == 2
    assert (x.tolist(), x.dtype, y.tolist()) == ([[3, 9], [1, 1]], torch.float32, [3, 1])


def test_an_empty_split_is_none_and_splits_lists_what_is_there():
    data = client([[1.0]], [0], val=([], []), test=([[2.0]], [1]))
    assert data.val is None
    assert list(data.splits()) == ["train", "test"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([[1.0]], [0, 1]), r"train: x has shape \(1, 1\) and y \(2,\)"),
        ((1.0, [0]), "one row per example"),
        ("xy", "train: give a pair"),
        ([1, 2, 3], "train: give a pair"),
        (None, "train: give a pair"),
        (([["a"]], [0]), "train: x cannot be read"),
        (([[1.0], [1.0, 2.0]], [0, 1]), "train: x cannot be read"),
    ],
)
def test_bad_pairs_are_refused_in_one_line(given, words):
    with pytest.raises(UsageError, match=words) as refused:
        ClientData(given)
    assert "\n" not in str(refused.value)


def test_errors_name_the_split():
    with pytest.raises(UsageError, match="val: x has shape"):
        client([[1.0]], [0], val=([[1.0]], []))


def test_holdings_counts_training_labels_only():
    data = client([[0.0]] * 4, [3, 1, 3, 3], test=([[0.0]], [7]))
    assert holdings({"b": data, "a": client([[0.0]], [2])}) == {"b": {1: 1, 3: 3}, "a": {2: 1}}
    with pytest.raises(UsageError, match=r"client 'b': only one whole number per example"):
        holdings({"b": client([[0.0]], [0.5])})


def test_good_clients_pass_unchanged_and_in_order():
    clients = {"b": client([[0.0]], [0], test=([[1.0]], [9])), "a": client([[0.0]], [9])}
    kept, notes = check_clients(clients, Labels(10))
    assert list(kept) == ["b", "a"]
    assert kept["b"] is clients["b"]
    assert notes == []


def test_clients_without_training_examples_are_left_out_and_named():
    clients = {f"c{i}": ClientData(([], [])) for i in range(7)} | {"full": client([[0.0]], [0])}
    kept, notes = check_clients(clients, Labels(2))
    assert list(kept) == ["full"]
    assert notes == ["7 clients without training examples left out: 'c0', 'c1', 'c2', 'c3', 'c4' and 2 more"]
    with pytest.raises(UsageError, match="no client has training examples"):
        check_clients({"c": ClientData(([], []))}, Labels(2))
    with pytest.raises(UsageError, match="no client"):
        check_clients({}, Labels(2))


GOOD = client([[0.0, 0.0]] * 3, [0, 1, 0])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (client([[0.0, 0.0], [0.0, math.nan]], [0, 1]), "client 'bad', train row 1: feature is NaN"),
        (client([[math.inf, 0.0], [0.0, 0.0]], [0, 1]), "client 'bad', train row 0: feature is infinite"),
        (
            client([[0.0, 0.0]], [0], val=([[0.0, 0.0], [-math.inf, 0.0]], [0, 1])),
            "'bad', val row 1: feature",
        ),
        (client([[0.0, 0.0]], [0], test=([[0.0, 0.0]], [2])), "'bad', test row 0: label 2 is out of range"),
        (client([[0.0, 0.0]] * 2, [1, -1]), "'bad', train row 1: label -1 is out of range; give .* 0 … 1"),
        (client([[0.0, 0.0]], [[1]]), r"'bad', train: labels have shape \(1, 1\); .*shape \(1,\)"),
        (client([[0.0, 0.0]], [1.0]), r"'bad', train row 0: label is 1.0 \(torch.float32\)"),
        (client([[0.0]], [0]), r"'good', train has features of shape \(2,\) .*, client 'bad', train of"),
        (client([[0, 0]], [0]), r"'bad', train of shape \(2,\) torch.int64"),
        (client([[0.0, 0.0]], [0], test=([[0.0]], [0])), "client 'bad', test of shape"),
    ],
)
def test_what_does_not_fit_is_named(bad, words):
    with pytest.raises(UsageError, match=words) as refused:
        check_clients({"good": GOOD, "bad": bad}, Labels(2))
    assert "\n" not in str(refused.value)


def test_labels_of_a_classification_are_whole_numbers_one_per_example():
    with pytest.raises(UsageError, match=r"row 0: label is 0.5 \(torch.float32\); give .* 0 … 2"):
        check_clients({"a": client([[0.0]], [0.5])}, Labels(3))
    with pytest.raises(UsageError, match=r"labels have shape \(1, 2\); .*shape \(1,\)"):
        check_clients({"a": client([[0.0]], [[0, 1]])}, Labels(3))


def test_regression_labels_may_be_anything_finite():
    kept, _ = check_clients({"a": client([[0.0]], [[-7.5, 3.0]])})
    assert list(kept) == ["a"]
    with pytest.raises(UsageError, match=r"client 'a', train has labels of shape \(2,\)"):
        check_clients({"a": client([[0.0]], [[-7.5, 3.0]]), "b": client([[0.0]], [1.0])})
    with pytest.raises(UsageError, match="train row 1: label is NaN"):
        check_clients({"a": client([[0.0]] * 2, [0.5, math.nan])})


def test_a_nan_deep_in_an_image_gives_its_row():
    x = torch.zeros(5, 3, 4, 4)
    x[3, 2, 1, 0] = math.nan
    with pytest.raises(UsageError, match="train row 3: feature is NaN"):
        check_clients({"a": client(x, [0] * 5)}, Labels(2))
