"""The order of the data: golden values, bijection, statistics, and the plan of positions."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastddpm import order as order_module
from fastddpm.errors import ConfigError
from fastddpm.order import (
    BatchPlan,
    LaneOrder,
    MapOrder,
    Mixture,
    Purpose,
    derive_key,
    permute,
    random_words,
    replacement,
    rows_at,
    source_seed,
    sub_keys,
)

SEEDS = st.integers(0, 2**63 - 1)

# A change of these breaks the resuming of runs.
GOLDEN_LANES = [
    (0, 0),
    (3, 1),
    (3, 3),
    (2, 1),
    (0, 1),
    (3, 0),
    (3, 2),
    (2, 4),
    (0, 2),
    (2, 3),
    (2, 0),
    (2, 2),
    (3, 2),
    (2, 3),
    (3, 1),
    (2, 4),
]
GOLDEN_MIXTURE = ([1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 2, 1, 3, 4, 2, 3, 5, 6, 7])
GOLDEN_REPLACEMENTS = [39, 568, 681]
GOLDEN_SEED = 8270574625228200263


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(n), n, derive_key(seed, epoch, Purpose.ROWS)).tolist()


def test_golden_values() -> None:
    # The first outputs of splitmix64 with seed 0, as its authors publish them.
    words = random_words(0, np.arange(3, dtype=np.uint64))
    assert words.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert derive_key(0, 0, Purpose.ROWS) == 0x568A9B0B1A2C05EC
    assert derive_key(1234, 5, Purpose.WINDOWS) == 0xFB037A1EB8D2E617
    assert derive_key(2**63 - 1, 2**63 - 1, Purpose.SOURCES) == 0xA28786650B8329F7
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
@given(
    world=st.integers(1, 8),
    accumulation=st.integers(1, 6),
    size=st.integers(1, 9),
    step=st.integers(0, 10**12),
    offset=st.integers(-(10**6), 10**6),
)
def test_plan_parts_the_global_batch(world: int, accumulation: int, size: int, step: int, offset: int) -> None:
    plan = BatchPlan(world * accumulation * size, world, accumulation, offset)
    assert plan.micro_batch_size == size
    first = offset + step * plan.batch_size
    for index in range(accumulation):
        parts = [plan.positions(step, index, rank) for rank in range(world)]
        # Ranks take turns, so that rank r keeps to positions of one rest modulo the number of ranks.
        start = first + index * world * size
        assert np.stack(parts, axis=1).reshape(-1).tolist() == list(range(start, start + world * size))
        assert {len(set((part % world).tolist())) for part in parts} == {1}


def test_a_batch_size_changed_in_mid_run_goes_on_where_it_was() -> None:
    before = [BatchPlan(12, 2).positions(step, 0, rank) for step in range(5) for rank in range(2)]
    after = [BatchPlan(20, 4, offset=60 - 5 * 20).positions(step, 0, rank) for step in (5, 6) for rank in range(4)]
    assert sorted(np.concatenate(before + after).tolist()) == list(range(100))


def test_four_thousand_ranks_share_out_every_position_in_under_a_millisecond_each() -> None:
    order = LaneOrder(np.full(2000, 500), 64, 64, seed=3)
    for world in (1, 7, 64, 4096):
        plan = BatchPlan(world * max(1, 128 // world), world)

        def read(rank: int, plan: BatchPlan = plan) -> tuple[list, list, set]:
            positions = plan.positions(17, 0, rank)
            rows, place = rows_at(positions, 10**6, seed=3), order.locate(positions % 64, positions // 64)
            return positions.tolist(), rows.tolist(), {*zip(place.block.tolist(), place.row.tolist(), strict=True)}

        parts = [read(rank) for rank in range(world)]
        first = 17 * plan.batch_size
        assert sorted(p for positions, _, _ in parts for p in positions) == [*range(first, first + plan.batch_size)]
        assert len({row for _, rows, _ in parts for row in rows}) == plan.batch_size
        assert len(set.union(*(places for _, _, places in parts))) == plan.batch_size
        took = []
        for _ in range(20):  # the best of them, since tests run beside each other
            began = time.perf_counter()
            positions = plan.positions(18, 0, world - 1)
            rows_at(positions, 10**6, seed=3)
            middle = time.perf_counter()
            order.locate(positions % 64, positions // 64)
            took.append((middle - began, time.perf_counter() - middle))
        assert max(map(min, zip(*took, strict=True))) < 1e-3


LANES = {
    "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0),
    "lanes": st.integers(1, 16),
    "window": st.integers(1, 30),
    "seed": SEEDS,
    "epoch": st.integers(0, 10**6),
}


@settings(max_examples=150, deadline=None)
@given(**LANES)
def test_lanes_hold_every_row_once_but_for_fewer_than_their_number(
    sizes: list[int], lanes: int, window: int, seed: int, epoch: int
) -> None:
    lanes = min(lanes, sum(sizes))
    order = LaneOrder(np.array(sizes), lanes, window, seed)
    length = order.length
    assert order.dropped == sum(sizes) - lanes * length < lanes
    index = epoch * length + np.arange(length)
    found = []
    for lane in range(lanes):
        place = order.locate(np.full(length, lane), index)
        rows = list(zip(place.block.tolist(), place.row.tolist(), strict=True))
        assert set(place.epoch.tolist()) == {epoch}
        # The same rows, read forward, windows permuted.
        forward = [(b, row) for b, first, last in order.pieces(lane, epoch, 0) for row in range(first, last)]
        shuffled = order.shuffled(np.full(length, lane), index)
        assert rows == [forward[i] for i in shuffled.tolist()]
        assert (shuffled // window == np.arange(length) // window).all()
        later = length // 2
        again = [(b, row) for b, first, last in order.pieces(lane, epoch, later) for row in range(first, last)]
        assert again == forward[later:]
        found += rows
    assert len(set(found)) == len(found) == lanes * length
    assert all(0 <= row < sizes[block] for block, row in found)


@settings(max_examples=50, deadline=None)
@given(**LANES, data=st.data())
def test_places_do_not_depend_on_what_is_asked_with_them(
    sizes: list[int], lanes: int, window: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    order = LaneOrder(np.array(sizes), min(lanes, sum(sizes)), window, seed)
    asked = data.draw(st.lists(st.integers(0, 20 * order.num_rows), min_size=1, max_size=12))
    lane, index = np.array(asked) % order.num_lanes, np.array(asked) // order.num_lanes
    together = np.stack(order.locate(lane, index))
    for i in reversed(range(len(asked))):
        assert np.stack(order.locate(lane[i : i + 1], index[i : i + 1])).tolist() == together[:, i : i + 1].tolist()


def test_every_epoch_leaves_out_other_rows() -> None:
    order = LaneOrder(np.array([10, 9, 4]), 5, 2, seed=1)
    left_out: Counter = Counter()
    for epoch in range(400):
        index = np.tile(epoch * order.length + np.arange(order.length), 5)
        place = order.locate(np.repeat(np.arange(5), order.length), index)
        present = set(zip(place.block.tolist(), place.row.tolist(), strict=True))
        left_out.update({(b, row) for b, size in enumerate((10, 9, 4)) for row in range(size)} - present)
    assert sum(left_out.values()) == 400 * 3 and len(left_out) == 23
    assert max(left_out.values()) < 4 * min(left_out.values())


@pytest.mark.parametrize("blocks", [1, 5])
def test_rows_meet_in_batches_as_often_as_chance_has_it(blocks: int) -> None:
    num_rows, lanes, window, batch = 480, 8, 6, 24
    order = LaneOrder(np.full(blocks, num_rows // blocks), lanes, window, seed=2)
    meetings = np.zeros(num_rows)  # of rows so many rows apart in the files
    epochs = 150
    index = np.arange(num_rows)
    for epoch in range(epochs):
        place = order.locate(index % lanes, epoch * order.length + index // lanes)
        rows = (place.block * (num_rows // blocks) + place.row).reshape(-1, batch)
        np.add.at(meetings, abs(rows[:, :, None] - rows[:, None, :]), 0.5)
    apart = np.arange(num_rows)
    pairs = num_rows - apart
    relative = meetings / (pairs * epochs * (batch - 1) / (num_rows - 1))
    far = (apart >= 2 * window) & (pairs > 60)  # nearer ones share a window, and of the farthest there are too few
    assert relative[far].max() < 1.5, (relative[far].max(), apart[far][relative[far].argmax()])


def test_keys_of_places_are_those_of_the_places_alone() -> None:
    keys = sub_keys(7, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert len(set(keys.tolist())) == 4
    for n in (1, 2, 7, 64):
        index = np.arange(4) % n
        assert permute(index, n, keys).tolist() == [permute(index[i : i + 1], n, int(keys[i])).item() for i in range(4)]


def test_golden_values_of_streams_and_mixtures() -> None:
    order = LaneOrder(np.array([3, 0, 5, 4]), 2, 4, seed=9)
    lane, index = np.arange(16) % 2, np.arange(16) // 2
    place = order.locate(lane, index)
    assert list(zip(place.block.tolist(), place.row.tolist(), strict=True)) == GOLDEN_LANES
    source, at = Mixture((2, 1), seed=9, period=6).pick(np.zeros(12, dtype=np.int64), np.arange(12))
    assert (source.tolist(), at.tolist()) == GOLDEN_MIXTURE
    assert [replacement(9, 5, attempt, 1000) for attempt in (1, 2, 3)] == GOLDEN_REPLACEMENTS
    assert (source_seed(9, 0), source_seed(9, 1)) == (9, GOLDEN_SEED)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.02, 1), min_size=1, max_size=5),
    seed=SEEDS,
    lane=st.integers(0, 63),
    period=st.integers(0, 10**6),
)
def test_mixtures_keep_their_shares_and_every_source_its_order(
    weights: list[float], seed: int, lane: int, period: int
) -> None:
    mixture = Mixture(weights, seed, period=1000)
    shares = np.array(weights) / sum(weights) * 1000
    assert mixture.counts.sum() == 1000 and (abs(mixture.counts - shares) < 1).all()
    index = np.arange(period * 1000, (period + 2) * 1000)
    source, at = mixture.pick(np.full(2000, lane), index)
    for s, count in enumerate(mixture.counts.tolist()):
        assert at[source == s].tolist() == list(range(period * count, (period + 2) * count))
    chosen = np.array([1999, 3, 1000])
    alone = mixture.pick(np.full(3, lane), index[chosen])
    assert (alone[0].tolist(), alone[1].tolist()) == (source[chosen].tolist(), at[chosen].tolist())


def test_mixtures_of_many_lanes_deal_once_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []
    monkeypatch.setattr(order_module, "permute", lambda index, n, key: (dealt.append(n), permute(index, n, key))[1])
    mixture = Mixture((2, 1), seed=9, period=20)
    lanes = np.arange(600)
    for index in range(45):
        mixture.pick(lanes, np.full(600, index))
    assert len(dealt) == 600 * 3
    for index in (19, 20) * 3:  # where a batch straddles two periods
        mixture.pick(lanes, index + lanes % 2)
    assert len(dealt) <= 600 * 5
    assert sum(len(periods) for periods in mixture._dealt.values()) <= 2 * 600


def test_a_weight_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.weights: 1e-05 is less than 1 in 10,000"):
        Mixture((1.0, 1e-5), seed=0)


def test_map_order_of_a_mixture_shows_every_row_of_every_source() -> None:
    assert MapOrder((3, 4), 5).numbers(np.arange(20)).tolist() == rows_at(np.arange(20), 7, 5).tolist()
    numbers = MapOrder((30, 10), 5, Mixture((1, 1), 5, period=20)).numbers(np.arange(60))
    counts = Counter(numbers.tolist())
    assert [counts[n] for n in range(40)] == [1] * 30 + [3] * 10


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
