"""The order of the training data as a pure function: position p of the global sequence -> (epoch, row).

BatchPlan says which positions a process works on, rows_at which row of a map-style set stands at a position, LaneOrder
which row of which block (row group) of a streamed one, Mixture which of several sources gives a position its image.

A keyed Feistel permutation with cycle walking (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002,
the generalised network on Z_a x Z_b) gives every epoch its own order in O(1) memory with random access, so that the
whole data state of a run is one integer. Only integer arithmetic modulo 2^64 is used: the order is the same on every
machine and in every version of numpy and torch. Golden values are in tests/test_order.py; a change breaks resuming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import isqrt
from typing import NamedTuple

import numpy as np

from .errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
_MASK = 0xFFFFFFFFFFFFFFFF
# Rows per position and pairs of neighbours look uniform (chi-square over 20,000 epochs) from 8 rounds on for n >= 7;
# 12 make all orders of n <= 5 equally frequent too. A micro-batch of 128 costs 0.2 ms, in a loader worker.
_NUM_ROUNDS = 12
_RINGS = 3  # epochs whose order of blocks is kept
_PERIODS = 2  # of a mixture that are kept of each lane


class Purpose(IntEnum):
    """What a key is for; keys of different purposes are independent."""

    ROWS = 0
    BLOCKS = 1
    """Blocks (row groups, shards) of an epoch."""
    WINDOWS = 2
    """Rows within a window of a lane."""
    SOURCES = 3
    """Sources of a mixture within a period."""
    CUT = 4
    """Where an epoch's rows are cut open."""
    REPLACEMENT = 5
    """Rows in the place of images that cannot be used."""
    SHIFTS = 6
    """Where in its rows of an epoch a lane begins."""


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014; constants of Stafford's mix 13) of one integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_words(x: np.ndarray) -> np.ndarray:
    """_mix of each word of a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(seed: int, epoch: int, purpose: Purpose) -> int:
    """The 64-bit key of an epoch: a bijection of epoch for a fixed seed and purpose, so that no two epochs share one.

    seed and epoch: integers in [0, 2^63). Raises ValueError outside.
    """
    if not (0 <= seed < 2**63 and 0 <= epoch < 2**63):
        raise ValueError(f"seed {seed} and epoch {epoch} must be in [0, 2^63)")
    return _mix(_mix(_mix(seed + _GOLDEN) + epoch * _GOLDEN) + (int(purpose) + 1) * _GOLDEN)


def sub_keys(key: int, *numbers: np.ndarray) -> np.ndarray:
    """Keys below `key`, one per place of `numbers` (int64 of one shape, >= 0): uint64 of that shape.

    A bijection of each number for fixed others, so that parts of an epoch do not share a key.
    """
    keys = np.full(numbers[0].shape, key, dtype=np.uint64)
    for number in numbers:
        keys = _mix_words(keys + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return keys


def source_seed(seed: int, source: int) -> int:
    """The seed of source number `source` of a mixture, in [0, 2^63): the run's own for the first."""
    return seed if source == 0 else _mix(_mix(seed + _GOLDEN) + source * _GOLDEN) >> 1


def random_words(key: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """Words number `index` (uint64, any shape) of the splitmix64 generator that starts at `key`: uint64.

    key: 64 bits, or an array of them of index's shape, one per index.
    """
    start = np.uint64((key + _GOLDEN) & _MASK) if isinstance(key, int) else key + np.uint64(_GOLDEN)
    return _mix_words(index * np.uint64(_GOLDEN) + start)


def permute(index: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """The images of `index` under the permutation of 0..n-1 that `key` names.

    index: int64, any shape, values in [0, n); n >= 1; key: 64 bits (derive_key), or a uint64 array of index's shape
    (sub_keys), the key of each index. Returns int64 of index's shape.
    x = L * b + R with L < a, R < b, a = ceil(sqrt n), b = ceil(n / a). Even rounds add F_i(R) to L modulo a, odd rounds
    F_i(L) to R modulo b, F_i being the splitmix64 generator that starts at round key i. That is a bijection of
    0..a*b-1; what lands at n or above is sent round again until it lands below (fewer than 1 in sqrt n do).
    Raises ValueError for an index outside [0, n).
    """
    index = np.asarray(index, dtype=np.int64)
    if n < 1 or (index.size and not (index.min() >= 0 and index.max() < n)):
        raise ValueError(f"indices of a permutation of {n} must be in [0, {n})")
    root = isqrt(n - 1) + 1
    a, b = np.uint64(root), np.uint64(-(-n // root))
    keys = key if isinstance(key, int) else key.reshape(-1)

    def walk(x: np.ndarray, keys: int | np.ndarray) -> np.ndarray:
        left: np.ndarray
        right: np.ndarray
        left, right = x // b, x % b
        for i in range(_NUM_ROUNDS):
            add = (i + 1) * _GOLDEN
            round_key = _mix(keys + add) if isinstance(keys, int) else _mix_words(keys + np.uint64(add & _MASK))
            if i % 2 == 0:
                left = (left + random_words(round_key, right) % a) % a
            else:
                right = (right + random_words(round_key, left) % b) % b
        return left * b + right

    x = walk(index.astype(np.uint64).reshape(-1), keys)
    outside = np.flatnonzero(x >= n)
    while outside.size:
        x[outside] = walk(x[outside], keys if isinstance(keys, int) else keys[outside])
        outside = outside[x[outside] >= n]
    return x.astype(np.int64).reshape(index.shape)


def rows_at(positions: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """Rows of a map-style data set at `positions` of the global sequence.

    positions: int64 [n], >= 0. Position p is entry p % num_images of the permutation of epoch p // num_images, so every
    epoch holds each row once and nothing is dropped where a batch straddles two epochs. Returns int64 [n].
    """
    positions = np.asarray(positions, dtype=np.int64)
    epochs, index = np.divmod(positions, num_images)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        rows[inside] = permute(index[inside], num_images, derive_key(seed, epoch, Purpose.ROWS))
    return rows


def replacement(seed: int, position: int, attempt: int, num_images: int) -> int:
    """What takes the place of the image at `position` when it and attempts 1 .. attempt - 1 cannot be used.

    attempt: from 1 on. Returns a number in [0, num_images), which is looked up as rows_at's rows are.
    """
    key = derive_key(seed, position, Purpose.REPLACEMENT)
    return _mix(key + attempt * _GOLDEN) % num_images


@dataclass(frozen=True)
class BatchPlan:
    """Which positions each process works on: the same global batch for any number of processes and accumulation steps.

    Global batch `step` holds positions offset + step*B .. offset + step*B + B-1. Its micro-batch of accumulation index
    a holds B/A of them, of which process `rank` has every R-th: offset + step*B + a*(B/A) + rank + R*j, j < B / (A*R).
    A process so keeps to the lanes of a stream whose number leaves the same rest modulo R.
    offset: position of image 0 of step 0, negative where a larger batch was set in mid-run.
    Raises ConfigError where the batch size does not divide.
    """

    batch_size: int
    world: int = 1
    accumulation: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        parts = self.world * self.accumulation
        if self.batch_size < 1 or self.world < 1 or self.accumulation < 1:
            raise ConfigError(
                f"batch size {self.batch_size}, {self.world} processes and {self.accumulation} accumulation steps: "
                "each must be at least 1"
            )
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            choice = f"{below} or {below + parts}" if below else f"{parts}"
            raise ConfigError(
                f"batch size {self.batch_size} does not divide by {self.world} processes x {self.accumulation} "
                f"accumulation steps = {parts}: choose a multiple of {parts}, such as {choice}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images of one process in one forward pass, B / (A*R)."""
        return self.batch_size // (self.world * self.accumulation)

    def positions(self, step: int, index: int, rank: int) -> np.ndarray:
        """The micro-batch's positions, int64 [micro_batch_size], ascending by the number of processes."""
        first = self.offset + step * self.batch_size + index * (self.batch_size // self.accumulation) + rank
        return first + self.world * np.arange(self.micro_batch_size, dtype=np.int64)

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[tuple[int, int]]:
        """(step, accumulation index) of steps first_step .. last_step - 1, in the order in which they are trained."""
        for step in range(first_step, last_step):
            for index in range(self.accumulation):
                yield step, index


class Place(NamedTuple):
    """Rows of a stream, all int64 [n]."""

    epoch: np.ndarray
    block: np.ndarray
    row: np.ndarray
    """Inside the block."""


@dataclass(frozen=True, eq=False)
class LaneOrder:
    """The order of rows that lie in blocks of known size and are best read forward, in num_lanes lanes.

    Each epoch the blocks are put end to end in an order of its own, closed to a ring, cut open at a row of its own and
    cut into C = num_lanes lanes of L = N // C rows; N - C*L < C rows are left out, others each epoch. A lane is read
    forward from a row of its own in it to its end, then from its start up to that row: rows L apart, which stand in
    neighbouring lanes, would otherwise come together in every epoch (with one block 8 times as often as others). Within
    a lane, windows of W rows so read are permuted. So a lane goes through its share of blocks with W rows in memory,
    and any (lane, index) is known without reading: index k of a lane is row k % L of its epoch k // L.
    sizes: int64 [num_blocks], rows of each block, 0 allowed. Raises ValueError where C is not in 1 .. N or W < 1.
    """

    sizes: np.ndarray
    num_lanes: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_lanes <= self.num_rows or self.window < 1:
            raise ValueError(f"{self.num_rows} rows cannot be read in {self.num_lanes} lanes, windows of {self.window}")

    @cached_property
    def num_rows(self) -> int:
        return int(self.sizes.sum())

    @property
    def length(self) -> int:
        """Rows of a lane in each epoch, L."""
        return self.num_rows // self.num_lanes

    @property
    def dropped(self) -> int:
        """Rows that an epoch leaves out."""
        return self.num_rows - self.length * self.num_lanes

    def shuffled(self, lane: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Which of its lane and epoch's rows, 0 .. L-1 as they are read, is at `index` of `lane` (both int64 [n])."""
        epoch, place = np.divmod(index, self.length)
        keys = np.empty(len(index), dtype=np.uint64)
        window = place // self.window
        for e in np.unique(epoch).tolist():
            inside = epoch == e
            keys[inside] = sub_keys(derive_key(self.seed, e, Purpose.WINDOWS), lane[inside], window[inside])
        return shuffle_in_windows(place, self.length, self.window, keys)

    def locate(self, lane: np.ndarray, index: np.ndarray) -> Place:
        """The rows at `index` of `lane`, both int64 [n]."""
        lane, index = np.broadcast_arrays(np.asarray(lane, dtype=np.int64), np.asarray(index, dtype=np.int64))
        epoch = index // self.length
        read = self.shuffled(lane, index)
        block, row = np.empty_like(read), np.empty_like(read)
        for e in np.unique(epoch).tolist():
            inside = epoch == e
            order, ends, cut = self._ring(e)
            own = lane[inside]
            within = own * self.length + (read[inside] + self._shifts(e, own)) % self.length
            at = (within + cut) % self.num_rows
            slot = np.searchsorted(ends, at, side="right")
            block[inside] = order[slot]
            row[inside] = at - (ends[slot] - self.sizes[order[slot]])
        return Place(epoch, block, row)

    def pieces(self, lane: int, epoch: int, first: int) -> Iterator[tuple[int, int, int]]:
        """(block, first row, last row + 1) of the rows of `lane` in `epoch` from its row number `first` on, in order.

        Their order before windows are permuted: that in which they are read.
        """
        order, ends, cut = self._ring(epoch)
        left = self.length - first
        within = (first + int(self._shifts(epoch, np.array([lane]))[0])) % self.length
        while left > 0:
            at = (lane * self.length + within + cut) % self.num_rows
            slot = int(np.searchsorted(ends, at, side="right"))
            block = int(order[slot])
            row = at - int(ends[slot] - self.sizes[block])
            count = min(left, int(ends[slot]) - at, self.length - within)
            yield block, row, row + count
            left -= count
            within = (within + count) % self.length

    def _shifts(self, epoch: int, lane: np.ndarray) -> np.ndarray:
        """The row of each lane, int64 [n] in 0 .. L-1, at which it begins in `epoch`."""
        keys = sub_keys(derive_key(self.seed, epoch, Purpose.SHIFTS), lane)
        return (keys % np.uint64(self.length)).astype(np.int64)

    def _ring(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The blocks in the order of `epoch`, the rows up to the end of each, and where the ring is cut open."""
        cached: dict[int, tuple[np.ndarray, np.ndarray, int]] = self.__dict__.setdefault("_rings", {})
        if epoch not in cached:
            num_blocks = len(self.sizes)
            order = permute(np.arange(num_blocks), num_blocks, derive_key(self.seed, epoch, Purpose.BLOCKS))
            cut = derive_key(self.seed, epoch, Purpose.CUT) % self.num_rows
            while len(cached) >= _RINGS:  # lanes are at most one epoch apart where a batch straddles two
                del cached[min(cached)]
            cached[epoch] = (order, np.cumsum(self.sizes[order]), cut)
        return cached[epoch]


def shuffle_in_windows(place: np.ndarray, length: int, window: int, keys: np.ndarray) -> np.ndarray:
    """`place` (int64 [n], in 0 .. length-1) after windows of `window` rows, the last one shorter, are permuted.

    keys: uint64 [n], the key of each place's window. Returns int64 [n].
    """
    start = place // window * window
    inside = np.empty_like(place)
    size = np.minimum(window, length - start)
    for n in np.unique(size).tolist():
        chosen = size == n
        inside[chosen] = permute((place - start)[chosen], n, keys[chosen])
    return start + inside


class Mixture:
    """Which source gives each place its image, so that every period of M places holds source s m_s times.

    weights: any positive numbers; m_s are weights * M rounded to a sum of M by largest remainders.
    Places of a period are dealt out in an order of its own. The i-th place of source s over all periods takes index i
    of that source's own order. Raises ConfigError where a weight rounds to 0.
    """

    def __init__(self, weights: Sequence[float], seed: int, period: int = 10_000) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * period
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: period - int(counts.sum())]] += 1
        if not (counts > 0).all():
            number = int(np.argmin(counts))
            raise ConfigError(
                f"data.weights: {weights[number]:g} is less than 1 in {period:,} of their sum: leave the source out, "
                "or give it more"
            )
        self.counts = counts
        self.seed = seed
        self.period = period
        self._dealt: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}  # by lane and number of period

    def pick(self, lane: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index in the source's order) at `index` of `lane`, all int64 [n]; each lane has its own periods."""
        lane, index = np.broadcast_arrays(np.asarray(lane, dtype=np.int64), np.asarray(index, dtype=np.int64))
        number, place = np.divmod(index, self.period)
        source, at = np.empty_like(place), np.empty_like(place)
        for one, q in {*zip(lane.tolist(), number.tolist(), strict=True)}:
            inside = (lane == one) & (number == q)
            sources, before = self._deal(one, q)
            source[inside] = sources[place[inside]]
            at[inside] = q * self.counts[source[inside]] + before[place[inside]]
        return source, at

    def _deal(self, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place of a period of a lane, and how many places of that source are before it in it.

        Of each lane the last two periods are kept, in 40 kB each: one costs 1 ms, and a batch takes from every lane.
        """
        cached = self._dealt.setdefault(lane, {})
        if number not in cached:
            key = sub_keys(derive_key(self.seed, number, Purpose.SOURCES), np.array([lane])).item()
            dealt = permute(np.arange(self.period), self.period, key)
            small = np.min_scalar_type(self.period)
            source = np.searchsorted(np.cumsum(self.counts), dealt, side="right").astype(small)
            before = np.empty(self.period, dtype=small)
            for which, count in enumerate(self.counts.tolist()):
                before[source == which] = np.arange(count)
            while len(cached) >= _PERIODS:
                del cached[next(iter(cached))]
            cached[number] = (source, before)
        return cached[number]


class MapOrder:
    """Which image of a map-style set stands at a position; images are numbered over all sources, 0 .. num_images - 1.

    sizes: images of each source. mixture: how positions are dealt out to them, or None for one order over all images.
    """

    def __init__(self, sizes: Sequence[int], seed: int, mixture: Mixture | None = None) -> None:
        self.num_images = sum(sizes)
        self.seed = seed
        self._sizes = tuple(sizes)
        self._mixture = mixture

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The images at `positions` (int64 [n], >= 0) of the global sequence: int64 [n]."""
        if self._mixture is None:
            return rows_at(positions, self.num_images, self.seed)
        source, index = self._mixture.pick(np.zeros_like(positions), positions)
        numbers = np.empty_like(positions)
        for s in np.unique(source).tolist():
            inside = source == s
            start = sum(self._sizes[:s])
            numbers[inside] = start + rows_at(index[inside], self._sizes[s], source_seed(self.seed, s))
        return numbers


def spread(count: int, length: int) -> np.ndarray:
    """Up to `count` of 0 .. length - 1 as int64, both ends included, in an order whose first few are all over them."""
    count = min(count, length)
    bits = max(1, (count - 1).bit_length())
    places = [int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)]
    places = [place for place in places if place < count]
    return np.array(places, dtype=np.int64) * (length - 1) // max(1, count - 1)
