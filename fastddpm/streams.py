"""Streamed data sets by lanes: position p of the global sequence is index p // C of lane p mod C, of C lanes.

A lane is read forward with one window of its rows in memory, undecoded, and windows are permuted by key. Parquet files
give lanes over their row groups, whose sizes are in the footers: where a row stands is known without reading
(LaneOrder), whole epochs and blocks are skipped, and a process opens the row groups of its own lanes only. Of other
streams (WebDataset, JSON, images in archives) nothing is known beforehand: lane l owns shards l, l + C, ... and reads
them in an order of their own each time, and going on at an index means reading up to it. Lanes that are not equally
long then begin their next epoch at their own time: the examples of a shorter one come round sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from .errors import DataError
from .library import library_errors, may_pass, pause, raise_file_limit
from .order import LaneOrder, Mixture, Purpose, derive_key, permute, shuffle_in_windows, sub_keys
from .rowgroups import ROW_BITS, RowGroups, read_rows

_CHUNK_ROWS = 256  # rows that are read at a time, at most
_FEWEST_ROWS = 16  # and at least: each time costs 50 us
_FAR = 4096  # rows that are sooner skipped by opening their block anew than by reading on


class Rows(NamedTuple):
    """Some rows of a lane in the order in which they are read."""

    rows: np.ndarray
    """int64 [n]: block << 32 | row inside the block."""
    table: pa.Table
    source: int
    """Which of the data set's sources they are from."""


class Example(NamedTuple):
    """One undecoded row."""

    row: int
    image: Any
    label: int
    source: int


class LaneRows(Protocol):
    """What a lane is made of: rows that are read forward, epoch after epoch."""

    seed: int

    def length(self, lane: int) -> int | None:
        """Rows of the lane in each epoch; None: not known before the first has been read to its end."""

    def read(self, lane: int, epoch: int, first: int) -> Iterator[Rows]:
        """The rows of `lane` in `epoch` from number `first` on."""


@dataclass(frozen=True)
class ParquetPart:
    """One source's row groups."""

    groups: RowGroups
    schema: pa.Schema
    """Of the columns that are read."""
    source: int
    first_block: int
    """Number of its first block among the blocks of all sources."""


class ParquetLanes:
    """Lanes over the row groups of one or several sources, as LaneOrder cuts them."""

    def __init__(self, parts: tuple[ParquetPart, ...], num_lanes: int, window: int, seed: int) -> None:
        self.parts = parts
        self.seed = seed
        sizes = np.concatenate([part.groups.sizes for part in parts])
        self.order = LaneOrder(sizes, num_lanes, window, seed)
        self._starts = np.cumsum([0] + [len(part.groups.sizes) for part in parts])
        self._chunk = min(max(window, _FEWEST_ROWS), _CHUNK_ROWS)

    def length(self, lane: int) -> int | None:
        return self.order.length

    def rows(self, lane: np.ndarray, index: np.ndarray) -> np.ndarray:
        """block << 32 | row inside the block, int64 [n], of the rows at `index` of `lane`, without reading."""
        place = self.order.locate(lane, index)
        rows = np.empty_like(place.row)
        for block in np.unique(place.block).tolist():
            inside = place.block == block
            part, own = self._part(block)
            kept = part.groups.rows_of(own)
            within = place.row[inside] if kept is None else kept[place.row[inside]]
            rows[inside] = (part.first_block + own) << ROW_BITS | within
        return rows

    def read(self, lane: int, epoch: int, first: int) -> Iterator[Rows]:
        raise_file_limit()
        for block, begin, end in self.order.pieces(lane, epoch, first):
            part, own = self._part(block)
            kept = part.groups.rows_of(own)
            wanted = np.arange(begin, end) if kept is None else kept[begin:end]
            for rows, table in read_rows(part.groups, own, part.schema, wanted, self._chunk):
                yield Rows((part.first_block + own) << ROW_BITS | rows, table, part.source)

    def _part(self, block: int) -> tuple[ParquetPart, int]:
        number = int(np.searchsorted(self._starts, block, side="right")) - 1
        return self.parts[number], block - int(self._starts[number])


def rows_by_number(parts: tuple[ParquetPart, ...], numbers: np.ndarray) -> np.ndarray:
    """Rows (block << 32 | row inside it) of images counted through all parts in the order of files: int64 [n]."""
    rows, start = np.empty_like(numbers), 0
    for part in parts:
        sizes, kept = part.groups.sizes, part.groups.kept
        inside = (numbers >= start) & (numbers < start + sizes.sum())
        own, ends = numbers[inside] - start, np.cumsum(sizes)
        blocks = np.searchsorted(ends, own, side="right")
        within = own - (ends - sizes)[blocks] if kept is None else kept[own]
        rows[inside] = (part.first_block + blocks) << ROW_BITS | within
        start += int(sizes.sum())
    return rows


def read_examples(
    parts: tuple[ParquetPart, ...], rows: np.ndarray, values: Callable[[int, pa.Table], list[tuple[Any, int]]]
) -> list[Example]:
    """The undecoded rows `rows` (block << 32 | row inside it), each read by itself. DataError where one cannot be."""
    examples = []
    for row in rows.tolist():
        block = row >> ROW_BITS
        part = next(p for p in parts if 0 <= block - p.first_block < len(p.groups.sizes))
        wanted = np.array([row & ((1 << ROW_BITS) - 1)])
        for _, table in read_rows(part.groups, block - part.first_block, part.schema, wanted, _FEWEST_ROWS):
            ((image, label),) = values(part.source, table)
            examples.append(Example(row, image, label, part.source))
    return examples


class ShardPart(NamedTuple):
    """One source of a stream about which nothing is known before it is read."""

    dataset: Any
    name: str
    source: int
    first_shard: int
    """Number of its first shard among the shards of all sources."""


class ShardLanes:
    """Lanes over shards: lane l owns shards l, l + num_lanes, ... and reads them in an order of each epoch's own."""

    def __init__(self, part: ShardPart, num_lanes: int, seed: int) -> None:
        self.part = part
        self.num_lanes = num_lanes
        self.seed = seed
        self._lengths: dict[int, int] = {}

    def length(self, lane: int) -> int | None:
        return self._lengths.get(lane)

    def read(self, lane: int, epoch: int, first: int) -> Iterator[Rows]:
        raise_file_limit()
        num_shards = self.part.dataset.num_shards
        own = np.arange(lane, num_shards, self.num_lanes, dtype=np.int64)
        key = sub_keys(derive_key(self.seed, epoch, Purpose.BLOCKS), np.array([lane])).item()
        count = 0
        for shard in own[permute(np.arange(len(own), dtype=np.int64), len(own), key)].tolist():
            row = (self.part.first_shard + shard) << ROW_BITS
            for table in self._tables(num_shards, shard):
                skipped = min(max(0, first - count), len(table))
                rows = np.arange(row + skipped, row + len(table), dtype=np.int64)
                count += len(table)
                row += len(table)
                yield Rows(rows, table.slice(skipped), self.part.source)
        if count == 0:
            which = "the stream" if self.num_lanes == 1 else f"lane {lane} of {self.num_lanes} of the stream"
            raise DataError(f"{self.part.name}: {which} has 0 rows")
        self._lengths[lane] = count

    def _tables(self, num_shards: int, shard: int) -> Iterator[pa.Table]:
        name, done, failures = self.part.name, 0, 0
        while True:
            try:
                with library_errors(name):
                    # iter() and not __iter__: inside a loader worker the latter hands every worker other shards.
                    tables = iter(self.part.dataset.shard(num_shards, shard).iter(batch_size=_CHUNK_ROWS))
                count = 0
                while True:
                    with library_errors(name):
                        table = next(tables, None)
                    if table is None:
                        return
                    count += len(table)
                    if count > done:
                        new = table.slice(len(table) - (count - done))
                        done, failures = count, 0
                        yield new
            except DataError as error:
                cause = error.__cause__
                if cause is None or not may_pass(cause, remote=False):
                    raise
                failures += 1
                try:
                    pause(failures, name, cause)
                except Exception:
                    raise error from cause


class LaneReader:
    """Examples of one lane by index, windows of its rows permuted by key.

    Indices may be asked in any order; ascending ones are read forward. values: (image, label) of each row of a table of
    a source. alive: asked between reads; False ends the reading.
    """

    def __init__(
        self,
        lanes: LaneRows,
        lane: int,
        window: int,
        values: Callable[[int, pa.Table], list[tuple[Any, int]]],
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.lanes, self.lane, self.window, self.values, self.alive = lanes, lane, window, values, alive
        self._epoch = self._start = -1  # of the window in memory, and its first row within the epoch
        self._examples: list[Example] = []
        self._reading: Iterator[Rows] = iter(())
        self._left: list[Rows] = []
        self._next = (-1, -1)  # (epoch, row within it) that _reading gives next

    def at(self, index: int) -> Example:
        """The example at `index` of the lane, counted over all epochs. Raises DataError."""
        place = self._place(index)  # which may be what puts the window's examples there
        return self._examples[place]

    def instead(self, index: int, attempt: int) -> Example:
        """What takes the place of the example at `index`: others of its window, from the next one on, cyclically.

        attempt: from 1 on. When a window is used up, what follows it in the lane.
        """
        place = self._place(index)
        if attempt < len(self._examples):
            return self._examples[(place + attempt) % len(self._examples)]
        length = self.lanes.length(self.lane)
        beyond = self._start + attempt + (0 if length is None else index - index % length)
        return LaneReader(self.lanes, self.lane, self.window, self.values, self.alive).at(beyond)

    def _place(self, index: int) -> int:
        """Makes the window of `index` the one in memory and returns where in it the example stands."""
        while True:
            length = self.lanes.length(self.lane)
            epoch, row = divmod(index, length) if length is not None else (0, index)
            start = row // self.window * self.window
            if (epoch, start) != (self._epoch, self._start):
                self._load(epoch, start)
            if row < start + len(self._examples):
                break
            # The lane turned out to be shorter than the index; its length is known now.
            self._epoch = -1
        return self._shuffled[row - start]

    def _load(self, epoch: int, start: int) -> None:
        at_epoch, at = self._next
        far = start - at > _FAR and self.lanes.length(self.lane) is not None
        if at_epoch != epoch or at > start or far:
            self._reading, self._left = self.lanes.read(self.lane, epoch, start), []
            at = start
        while at < start and (skipped := self._take(min(start - at, _CHUNK_ROWS))):
            at += sum(len(rows.rows) for rows in skipped)
        self._examples = [
            Example(row, image, label, rows.source)
            for rows in self._take(self.window)
            for row, (image, label) in zip(rows.rows.tolist(), self.values(rows.source, rows.table), strict=True)
        ]
        count = len(self._examples)
        self._epoch, self._start, self._next = epoch, start, (epoch, start + count)
        if count:
            key = sub_keys(
                derive_key(self.lanes.seed, epoch, Purpose.WINDOWS),
                np.array([self.lane]),
                np.array([start // self.window]),
            )
            places = np.arange(count, dtype=np.int64)
            self._shuffled = shuffle_in_windows(places, count, self.window, np.repeat(key, count)).tolist()

    def _take(self, count: int) -> list[Rows]:
        """The next `count` rows, fewer at the end of the epoch."""
        taken = []
        while count > 0:
            if not self._left:
                if not self.alive():
                    raise Orphaned
                rows = next(self._reading, None)
                if rows is None:
                    break
                self._left = [rows]
            (rows,) = self._left
            taken.append(Rows(rows.rows[:count], rows.table.slice(0, count), rows.source))
            rest = Rows(rows.rows[count:], rows.table.slice(count), rows.source)
            count -= len(taken[-1].rows)
            self._left = [rest] if len(rest.rows) else []
        return taken


class Orphaned(Exception):
    """The training process is gone."""


class Stream(NamedTuple):
    """All that fixes the order of a streamed data set for one seed."""

    num_lanes: int
    window: int
    lanes: tuple[LaneRows, ...]
    """One for all sources or, in a mixture, one for each."""
    mixture: Mixture | None

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lane, which of lanes, index in it) of positions int64 [n] of the global sequence: int64 [n] each."""
        lane, index = positions % self.num_lanes, positions // self.num_lanes
        if self.mixture is None:
            return lane, np.zeros_like(lane), index
        return lane, *self.mixture.pick(lane, index)

    def rows(self, positions: np.ndarray) -> np.ndarray | None:
        """Rows (block << 32 | row inside it) at positions, without reading; None where reading is what tells."""
        lane, which, index = self.find(positions)
        rows = np.empty_like(positions)
        for number in np.unique(which).tolist():
            lanes = self.lanes[number]
            if not isinstance(lanes, ParquetLanes):
                return None
            inside = which == number
            rows[inside] = lanes.rows(lane[inside], index[inside])
        return rows
