"""The order of the data: golden values, bijection, statistics, and the plan of positions."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastddpm.errors import ConfigError
from fastddpm.order import BatchPlan, Purpose, derive_key, permute, random_words, rows_at

SEEDS = st.integers(0, 2**63 - 1)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(n), n, derive_key(seed, epoch, Purpose.ROWS)).tolist()


def test_golden_values() -> None:
    # The first outputs of splitmix64 with seed 0, as its authors publish them.
    words = random_words(0, np.arange(3, dtype=np.uint64))
    assert words.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert derive_key(0, 0, Purpose.ROWS) == 0x568A9B0B1A2C05EC
    assert derive_key(1234, 5, Purpose.BUFFER) == 0xFB037A1EB8D2E617
    assert derive_key(2**63 - 1, 2**63 - 1, Purpose.BUFFER_TAIL) == 0xA28786650B8329F7
    assert epoch_order(10, seed=0, epoch=0) == [0, 1, 6, 4, 7, 2, 9, 5, 3, 8]
    assert epoch_order(10, seed=0, epoch=1) == [1, 6, 7, 9, 8, 2, 3, 4, 0, 5]
    assert epoch_order(10, seed=1, epoch=0) == [9, 5, 8, 0, 6, 3, 4, 2, 7, 1]
    assert epoch_order(7, seed=42, epoch=3) == [0, 6, 5, 4, 2, 1, 3]
    key = derive_key(0, 0, Purpose.ROWS)
    assert permute(np.arange(5), 50_000, key).tolist() == [21590, 48041, 1900, 5902, 15288]
    assert permute(np.arange(3), 2**40 + 7, key).tolist() == [781811722480, 69811968776, 203207577934]
    last = np.arange(2**62 - 5, 2**62 - 2)
    assert permute(last, 2**62, key).tolist() == [2267497183058067671, 2014863169326058246, 468573673834969621]
    assert rows_at(np.arange(5, 15), 7, seed=42).tolist() == [6, 2, 4, 2, 1, 3, 6, 0, 5, 4]


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2**32, 2**62), seed=SEEDS, data=st.data())
def test_huge_domains_keep_distinct_indices_distinct_and_inside(n: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    rows = permute(np.array(index), n, derive_key(seed, 0, Purpose.ROWS))
    assert rows.dtype == np.int64 and len(set(rows.tolist())) == len(index)
    assert rows.min() >= 0 and rows.max() < n


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 500), seed=SEEDS, positions=st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_rows_do_not_depend_on_what_is_asked_with_them(n: int, seed: int, positions: list[int]) -> None:
    together = rows_at(np.array(positions), n, seed).tolist()
    assert together == [rows_at(np.array([p]), n, seed).item() for p in positions]
    assert together == [epoch_order(n, seed, p // n)[p % n] for p in positions]


def test_batches_straddle_epochs_without_dropping_or_repeating() -> None:
    rows = np.concatenate([rows_at(np.arange(first, first + 16), 50, seed=3) for first in range(0, 400, 16)])
    for epoch in range(8):
        assert sorted(rows[epoch * 50 : epoch * 50 + 50].tolist()) == list(range(50))


def test_keys_differ() -> None:
    keys = [derive_key(seed, epoch, purpose) for seed in range(20) for epoch in range(200) for purpose in Purpose]
    assert len(set(keys)) == len(keys)
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(10) for epoch in range(20)}
    assert len(orders) == 200


def test_positions_and_neighbours_are_uniform() -> None:
    # The seeds are fixed; 4 rounds in place of 12 give p = 0.
    for n in (7, 10, 17, 50):
        orders = np.array([epoch_order(n, seed=11, epoch=epoch) for epoch in range(4000)])
        for position in (0, 1, n // 2, n - 1):
            assert stats.chisquare(np.bincount(orders[:, position], minlength=n)).pvalue > 1e-4
        for position in (0, n // 2, n - 2):
            pairs = np.bincount(orders[:, position] * n + orders[:, position + 1], minlength=n * n).reshape(n, n)
            assert stats.chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-4


def test_all_orders_of_four_are_equally_frequent() -> None:
    counts = Counter(tuple(epoch_order(4, seed=7, epoch=epoch)) for epoch in range(4800))
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(("index", "n"), [([-1], 5), ([5], 5), ([0], 0)])
def test_indices_outside_are_refused(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        permute(np.array(index), n, 0)


def test_keys_outside_64_bits_are_refused() -> None:
    for seed, epoch in ((-1, 0), (2**63, 0), (0, -1), (0, 2**63)):
        with pytest.raises(ValueError, match="2\\^63"):
            derive_key(seed, epoch, Purpose.ROWS)


@settings(max_examples=100, deadline=None)
@given(world=st.integers(1, 8), accumulation=st.integers(1, 6), size=st.integers(1, 9), step=st.integers(0, 10**12))
def test_plan_parts_the_global_batch(world: int, accumulation: int, size: int, step: int) -> None:
    plan = BatchPlan(world * accumulation * size, world, accumulation)
    assert plan.micro_batch_size == size
    parts = [plan.positions(step, index, rank) for index in range(accumulation) for rank in range(world)]
    first = step * plan.batch_size
    assert np.concatenate(parts).tolist() == list(range(first, first + plan.batch_size))
    # p = step*B + a*(B/A) + r*(B/(A*R)) + j
    batch = plan.batch_size
    for index in range(accumulation):
        for rank in range(world):
            expected = step * batch + index * (batch // accumulation) + rank * (batch // (accumulation * world))
            assert plan.first_position(step, index, rank) == expected


def test_plan_lists_micro_batches_in_training_order() -> None:
    assert list(BatchPlan(12, 2, 2).micro_batches(3, 5)) == [(3, 0), (3, 1), (4, 0), (4, 1)]


def test_batch_size_that_does_not_divide_names_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"100 does not divide by 3 processes x 2 accumulation steps = 6.*96 or 102"):
        BatchPlan(100, 3, 2)
    with pytest.raises(ConfigError, match=r"such as 4$"):
        BatchPlan(3, 4, 1)
    for values in ((0, 1, 1), (8, 0, 1), (8, 1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            BatchPlan(*values)
