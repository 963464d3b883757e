"""Which of a client's examples train, validate and test: blocks of time, whole groups, and what cannot be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idiolect.core.errors import UsageError
from idiolect.data import ByClient, ByDomain, ByGroup, Contiguous, Dirichlet, Iid, Pool, QuantitySkew, TimeBlocks
from idiolect.data import federate as deal_out


def windows(values=200, length=10, stride=3, clients=None):
    """A pool of overlapping windows of one long recording per client; x holds the times that a window covers."""
    starts = np.arange(0, values - length + 1, stride)
    x = torch.from_numpy(np.stack([np.arange(s, s + length) for s in starts])).float()
    group = None
    if clients:
        x, group = x.repeat(clients, 1), np.repeat([f"c{k}" for k in range(clients)], len(starts))
    return Pool("recording", x, torch.arange(len(x)) % 2, ("low", "high"), group)


def times(examples):
    return set() if examples is None else {int(t) for t in examples.x.flatten()}


@pytest.mark.parametrize(("length", "stride"), [(10, 3), (10, 10), (12, 5), (7, 1)])
@pytest.mark.parametrize("val", [0.0, 0.2])
def test_no_window_reaches_from_one_block_into_another_and_one_row_less_would_not_do(length, stride, val):
    gap = -(-length // stride) - 1
    pool = windows(400, length, stride, clients=2)
    for data in deal_out(pool, ByClient(), test=0.25, val=val, deal=TimeBlocks(gap)).values():
        train, validated, tested = map(times, (data.train, data.val, data.test))
        assert max(train) < min(validated or tested)
        assert max(validated or train) < min(tested)
        rows = len(pool) // 2
        assert len(data.test.y) == int(rows * 0.25 + 0.5)
        assert len(data.train.y) == rows - len(data.test.y) - int(rows * val + 0.5) - gap * (2 if val else 1)
    if gap:
        leaky = deal_out(pool, ByClient(), test=0.25, val=val, deal=TimeBlocks(gap - 1))["c0"]
        assert times(leaky.train) & times(leaky.val or leaky.test)


def test_a_limit_on_training_examples_keeps_the_latest():
    data = deal_out(windows(clients=1), ByClient(), test=0.25, size=5, deal=TimeBlocks(3))["c0"]
    whole = deal_out(windows(clients=1), ByClient(), test=0.25, deal=TimeBlocks(3))["c0"]
    assert len(data.train.y) == 5
    assert max(times(data.train)) == max(times(whole.train))
    assert times(data.test) == times(whole.test)


@pytest.mark.parametrize("gap", [0, 3])
def test_contiguous_clients_share_no_value_only_with_the_gap(gap):
    people = deal_out(windows(), Contiguous(gap), clients=4, test=0.25, deal=TimeBlocks(gap))
    spans = [times(data.train) | times(data.test) for data in people.values()]
    overlap = [bool(one & other) for one, other in pairwise(spans)]
    assert overlap == [gap == 0] * 3
    assert [max(one) < max(other) for one, other in pairwise(spans)] == [True] * 3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 30))
def test_contiguous_blocks_are_even_and_lose_only_the_gaps(clients, gap, more):
    n = clients + gap * (clients - 1) + more
    held = Contiguous(gap).indices(np.zeros(n), None, clients, np.random.default_rng(0))
    sizes = [len(rows) for rows in held]
    assert sum(sizes) == n - gap * (clients - 1)
    assert max(sizes) - min(sizes) <= 1
    assert held[0][0] == 0
    assert held[-1][-1] == n - 1
    assert all(after[0] - before[-1] == gap + 1 for before, after in pairwise(held))
    assert all((np.diff(rows) == 1).all() for rows in held)


def patients(each=(4, 1, 6, 2, 3, 5, 2, 4), clients=1):
    unit = np.repeat([f"p{k}" for k in range(len(each) * clients)], each * clients)
    n = len(unit)
    group = np.repeat([f"ward{k}" for k in range(clients)], n // clients)
    return Pool("study", torch.arange(float(n))[:, None], torch.arange(n) % 2, ("a", "b"), group, unit=unit)


def held_units(pool, data):
    return {name: {pool.unit[int(row)] for row in part.x[:, 0]} for name, part in data.splits().items()}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("val", [0.0, 0.2])
@pytest.mark.parametrize("split", [ByClient(), Iid(), Dirichlet(0.5, minimum=6), Contiguous()], ids=repr)
def test_no_patient_is_in_two_parts_of_any_client(seed, val, split):
    pool = patients(clients=3)
    people = deal_out(pool, split, 3, test=0.25, val=val, deal=ByGroup(), seed=seed)
    where = {}
    for data in people.values():
        if isinstance(split, ByClient | Iid):
            assert data.test is not None
            assert len(data.train.y)
            assert (data.val is not None) == bool(val)
        for part, units in held_units(pool, data).items():
            where.setdefault(part, set()).update(units)
    assert not (where["train"] & where["test"])
    assert not (where.get("val", set()) & (where["train"] | where["test"]))
    assert len(set().union(*where.values())) == 24
    rows = sum(len(part.y) for data in people.values() for part in data.splits().values())
    assert rows == len(pool)


def test_shares_are_met_as_closely_as_whole_groups_allow():
    for seed in range(20):
        data = deal_out(patients(), ByClient(), test=0.3, deal=ByGroup(), seed=seed)["ward0"]
        assert abs(len(data.test.y) - 0.3 * 27) <= 3  # half of the largest group


def test_the_groups_of_the_pool_are_the_units_where_it_has_no_others():
    speakers = Pool("talk", torch.zeros(12, 1), torch.zeros(12).long(), ("a",), np.repeat(list("abcd"), 3))
    data = deal_out(speakers, Iid(), 1, test=0.25, deal=ByGroup())["client-0"]
    assert len(data.test.y) == 3


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: deal_out(windows(), Iid(), 4, deal=TimeBlocks(3)), "TimeBlocks: Iid() takes neighbors in time apart"),
        (lambda: deal_out(windows(), QuantitySkew(1.0), 4, deal=TimeBlocks()), "takes neighbors in time apart"),
        (
            lambda: deal_out(windows(clients=2), ByDomain(clients_per_domain=2), deal=TimeBlocks()),
            "ByDomain(clients_per_domain=2, size=None) takes neighbors in time apart",
        ),
        (
            lambda: deal_out(windows(40, clients=2), ByClient(), val=0.25, deal=TimeBlocks(4)),
            "client 'c0' has 11 rows; test=0.25, val=0.25 and gap=4 leave none to train",
        ),
        (
            lambda: deal_out(windows(40), Contiguous(300), 3),
            "11 rows are too few for 3 clients with gap=300 rows between",
        ),
        (lambda: TimeBlocks(-1), "TimeBlocks: gap is -1; give a number of rows, 0 or above"),
        (lambda: TimeBlocks(2.5), "TimeBlocks: gap=2.5 is not a whole number"),
        (lambda: Contiguous(-1), "gap is -1"),
        (lambda: deal_out(windows(), Iid(), 2, deal=ByGroup()), "ByGroup needs a column"),
        (
            lambda: deal_out(windows(clients=2), ByClient(), deal=ByGroup()),
            "2 groups for 2 clients leave none for test",
        ),
        (lambda: deal_out(windows(), Iid(), 2, deal="time"), "deal is text, 'time'; there are Shuffled(), TimeBlocks"),
        (
            lambda: deal_out(windows(), Iid(), 2, deal=ByGroup),
            "deal is the class ByGroup; there are Shuffled(), TimeBlocks(gap)",
        ),
        (
            lambda: deal_out(
                Pool("p", torch.zeros(4, 1), torch.zeros(4), part=np.repeat(["train", "test"], 2)),
                Contiguous(),
                1,
                test="official",
                deal=TimeBlocks(),
            ),
            "TimeBlocks(gap=0) cannot keep to the official test part",
        ),
    ],
)
def test_what_cannot_be_dealt_is_one_line(act, line):
    with pytest.raises(UsageError) as caught:
        act()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_any_library_give_the_same_clients():
    pool = windows(clients=2)
    one = deal_out(pool, Iid(), 4, test=0.25, val=0.125, size=9, seed=3)
    other = deal_out(
        pool, Iid(), np.int64(4), torch.tensor(0.25), np.float32(0.125), None, np.int32(9), torch.tensor(3)
    )
    assert list(one) == list(other)
    assert all(torch.equal(one[c].train.x, other[c].train.x) for c in one)
    for made in (Dirichlet(np.float64(0.5), np.int64(3)), Dirichlet(torch.tensor(0.5), 3)):
        assert repr(made) == "Dirichlet(alpha=0.5, minimum=3)"
