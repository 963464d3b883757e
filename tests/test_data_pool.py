from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from idiolect.core.errors import UsageError
from idiolect.data import (
    ByClient,
    ByDomain,
    ByGroup,
    Dirichlet,
    Iid,
    Noise,
    PermuteLabels,
    Pool,
    QuantitySkew,
    SensorOffset,
    Shuffled,
    federate,
    load,
)


def numbered(n=200, **columns):
    """A pool whose only feature is the row number, so that every example can be recognized."""
    y = torch.arange(n) % 4
    return Pool("numbers", torch.arange(n, dtype=torch.float32)[:, None], y, tuple("abcd"), **columns)


def rows(examples):
    return [] if examples is None else examples.x[:, 0].int().tolist()


def test_the_parts_of_all_clients_are_disjoint_and_complete_and_keep_their_labels():
    people = federate(numbered(), Dirichlet(0.5), clients=7, test=0.3, val=0.1)
    seen = [row for data in people.values() for examples in data.splits().values() for row in rows(examples)]
    assert sorted(seen) == list(range(200))
    assert list(people) == [f"client-{i}" for i in range(7)]
    for data in people.values():
        for x, y in data.splits().values():
            assert torch.equal(x[:, 0].long() % 4, y)


def test_shares_are_of_the_clients_examples_and_halves_round_up():
    data = federate(numbered(), Iid(), clients=4, test=0.25, val=0.15)["client-0"]
    assert (len(data.train.y), len(data.val.y), len(data.test.y)) == (29, 8, 13)
    alone = federate(numbered(700), Iid(), clients=1, test=0.3)["client-0"]
    assert (len(alone.train.y), len(alone.test.y), alone.val) == (490, 210, None)


def test_a_client_with_one_example_trains_on_it():
    data = federate(numbered(3), Iid(), clients=3, test=0.9, val=0.05)
    assert [len(client.train.y) for client in data.values()] == [1, 1, 1]
    assert all(client.test is None and client.val is None for client in data.values())
    two = federate(numbered(2), Iid(), clients=1, test=0.5, val=0.4)["client-0"]
    assert (len(two.train.y), two.val, len(two.test.y)) == (1, None, 1)


def test_no_test_share_means_no_test():
    assert federate(numbered(), Iid(), test=0)["client-00"].test is None


def test_size_caps_training_examples_only():
    free = federate(numbered(), Iid(), clients=4, test=0.2, val=0.2)
    capped = federate(numbered(), Iid(), clients=4, test=0.2, val=0.2, size=10)
    for name, data in capped.items():
        assert rows(data.train) == rows(free[name].train)[:10]
        assert rows(data.val) == rows(free[name].val)
        assert rows(data.test) == rows(free[name].test)


def test_the_official_test_part_is_the_test_whatever_the_split():
    part = np.where(np.arange(200) % 5 == 0, "test", "train")
    people = federate(numbered(part=part), Iid(), clients=4, test="official", val=0.1, size=30)
    assert sorted(row for data in people.values() for row in rows(data.test)) == list(range(0, 200, 5))
    for data in people.values():
        assert len(data.train.y) == 30
        assert len(data.val.y) == 5
        assert all(row % 5 for row in rows(data.train) + rows(data.val))


def test_the_same_seed_gives_the_same_clients_and_another_seed_others():
    def dealt(seed):
        people = federate(numbered(), Iid(), clients=5, shift=Noise(1), seed=seed)
        return {name: data.train.x.tolist() for name, data in people.items()}

    assert dealt(3) == dealt(3)
    assert dealt(3) != dealt(4)


def test_a_client_does_not_depend_on_the_others():
    group = np.repeat(["a", "b", "c"], [60, 70, 70])
    alike = numbered(group=group)
    fewer = Pool("numbers", alike.x[:130], alike.y[:130], alike.classes, group[:130])
    first, second = (federate(pool, ByClient(), shift=Noise(1)) for pool in (alike, fewer))
    assert list(second) == ["a", "b"]
    for name in second:
        assert torch.equal(first[name].train.x, second[name].train.x)
        assert torch.equal(first[name].test.y, second[name].test.y)


def test_the_shift_is_applied_to_each_client_by_name_seed_and_classes():
    shift = SensorOffset(1) + PermuteLabels(3)
    plain, shifted = (federate(numbered(), Iid(), clients=5, shift=change, seed=3) for change in (None, shift))
    for name, data in shifted.items():
        expected = shift.apply(plain[name], name, seed=3, classes=4)
        for split, examples in data.splits().items():
            assert torch.equal(examples.x, expected.splits()[split].x)
            assert torch.equal(examples.y, expected.splits()[split].y)
    offsets = [float((shifted[name].train.x - plain[name].train.x).mean()) for name in plain]
    assert len({round(offset, 3) for offset in offsets}) == 5


def test_clients_of_one_size_are_not_dealt_out_alike():
    people = federate(numbered(group=np.repeat(["a", "b"], 100)), ByClient())
    assert rows(people["b"].test) != [row + 100 for row in rows(people["a"].test)]


def test_clients_of_a_regression_and_their_shift():
    pool = Pool("heat", torch.rand(40, 2), torch.rand(40))
    people = federate(pool, QuantitySkew(1, minimum=4), clients=4)
    assert sum(len(data.train.y) + len(data.test.y) for data in people.values()) == 40
    with pytest.raises(UsageError, match="PermuteLabels needs classes"):
        federate(pool, Iid(), clients=4, shift=PermuteLabels(2))


def test_domains_of_equal_training_size_tested_on_the_whole_official_part():
    group = np.repeat(["far", "near"], [60, 140])
    part = np.where(np.arange(200) % 2, "test", "train")
    people = federate(numbered(group=group, part=part), ByDomain(), test="official", size=25)
    assert {name: (len(d.train.y), len(d.test.y)) for name, d in people.items()} == {
        "far": (25, 30),
        "near": (25, 70),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": 0.8, "val": 0.2}, "test=0.8 and val=0.2 leave nothing to train"),
        ({"test": -0.1}, "test must be a number 0 … 1, or 'official', got -0.1"),
        ({"test": math.nan}, "test must be a number 0 … 1, or 'official', got nan"),
        ({"test": "official", "val": 1.0}, "leave nothing to train"),
        ({"test": "official"}, "pool 'numbers' has no official test part"),
        ({"test": "officially"}, "test must be a number 0 … 1, or 'official', got 'officially'"),
        ({"size": 0}, "size must be a whole number, at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
        ({"clients": 201}, "200 examples are too few for 201 clients"),
    ],
)
def test_impossible_wishes_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        federate(numbered(), Iid(), **options)


def test_a_pool_with_columns_of_different_length_is_refused():
    with pytest.raises(UsageError, match="pool 'p': 3 examples in x, 2 in group"):
        Pool("p", torch.zeros(3, 1), torch.zeros(3), group=np.array(["a", "b"]))
    assert len(load("digits")) == 1797


@pytest.mark.parametrize("form", [np.asarray, lambda column: np.asarray(column).tolist(), torch.as_tensor])
def test_a_pool_of_arrays_or_lists_is_dealt_out_as_one_of_tensors(form):
    x, y = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), np.arange(40) % 2
    group, unit = np.arange(40) % 3, np.arange(40) // 2
    like = Pool("mine", torch.from_numpy(x), torch.from_numpy(y), group=group.astype(str), unit=unit.astype(str))
    pool = Pool("mine", form(x), form(y), group=form(group), unit=form(unit))
    for split, deal in ((Iid(), Shuffled()), (ByClient(), ByGroup()), (ByDomain(), ByGroup())):
        one, other = (federate(p, split, clients=2, deal=deal) for p in (pool, like))
        assert list(one) == list(other)
        for name, data in one.items():
            assert torch.equal(data.train.x, other[name].train.x)
            assert torch.equal(data.train.y, other[name].train.y)
            assert data.train.y.dtype == torch.int64
            assert torch.equal(data.test.x, other[name].test.x)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            {"y": ["ill", "well"]},
            "pool 'mine': y cannot be read as one array of numbers (text is no number: give class nu",
        ),
        ({"x": None}, "pool 'mine': x cannot be read as one array of numbers (a NoneType"),
        ({"x": [[1.0], [2.0, 3.0]]}, "pool 'mine': x cannot be read as one array of numbers (a list"),
        ({"x": torch.eye(2).to_sparse()}, "a sparse Tensor: give x.to_dense()"),
        ({"group": "ward"}, "pool 'mine': group is one value: give one for each example"),
        ({"unit": [1, 2, 3]}, "pool 'mine': 2 examples in x, 3 in unit"),
    ],
)
def test_columns_that_are_no_columns_are_one_line(columns, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        Pool(**{"name": "mine", "x": [[1.0], [2.0]], "y": [0, 1], **columns})
    assert "\n" not in str(caught.value)
