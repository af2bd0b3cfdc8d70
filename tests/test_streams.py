"""Streams by lanes, mixtures, filters, images that are skipped, and remote files that fail for a while."""

import io
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_data import (
    NUM_ROWS,
    image_bytes,
    one_line,
    picture,
    png,
    private_cache,
    regroup,
    shards_of,
    write_folder,
    write_parquet,
    write_splits,
)

from fastddpm import data as data_module
from fastddpm import library, rowgroups, stored, streams
from fastddpm.data import Batch, DataConfig, ImageData, open_data
from fastddpm.errors import ConfigError, DataError
from fastddpm.filters import Filter
from fastddpm.loader import Share
from fastddpm.order import BatchPlan, replacement
from fastddpm.rowgroups import read_row_groups
from fastddpm.sources import SOURCES
from fastddpm.streams import LaneReader, ParquetLanes, ParquetPart, rows_by_number


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows in 18 row groups of 3 and fewer, and one of none."""
    folder = write_splits(tmp_path_factory.mktemp("parquet"))
    for path in folder.glob("train-*.parquet"):
        regroup(path, 3)
    return folder


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "RETRY_PAUSES", (0.0, 0.0, 0.0))


def opened(source: str | Path, **fields: Any) -> ImageData:
    source = f"parquet:{source}" if isinstance(source, Path) else source
    return open_data(DataConfig(**{"source": source, "cache_gb": 0, "shuffle_buffer": 12, **fields}), (8, 8), 3)


def read(data: ImageData, steps: int = 12, batch_size: int = 4, first: int = 0, **more: Any) -> list[Batch]:
    return list(data.batches(7, first, steps, batch_size, workers=more.pop("workers", 0), **more))


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def pictures(batches: list[Batch]) -> list[int]:
    """Which of made_data's pictures the images are."""
    known = {picture(row).tobytes(): row for row in range(2 * NUM_ROWS)}
    return [known[pixels] for batch in batches for pixels in image_bytes(batch)]


def reader_values(data: ImageData) -> Callable[[int, pa.Table], list[tuple[Any, int]]]:
    return data._stream_reader(Share(BatchPlan(1), 0, 0, 0, 0), skip=False).values


def test_lanes_are_read_as_the_order_says(parquet: Path) -> None:
    data = opened(parquet, streaming=True, lanes=5)
    stream = data._stream(3)
    (lanes,) = stream.lanes
    assert isinstance(lanes, ParquetLanes) and len(lanes.order.sizes) == 19
    reader = LaneReader(lanes, 2, stream.window, reader_values(data))
    index = np.arange(0, 60)
    expected = lanes.rows(np.full(60, 2), index).tolist()
    assert [reader.at(i).row for i in range(60)] == expected
    # In any order, and jumping far ahead.
    for i in (59, 3, 4, 30, 10**9 + 7, 0):
        assert reader.at(i).row == lanes.rows(np.array([2]), np.array([i])).item()


def test_a_run_without_loader_processes_outlives_its_shell(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = itertools.count(2)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert len(read(opened(parquet, streaming=True, lanes=4))) == 12


def test_a_rank_opens_the_row_groups_of_its_lanes_only(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(parquet, streaming=True, lanes=4)
    asked: set[tuple[str, int]] = set()
    real = pq.ParquetFile.iter_batches

    def recorded(self: pq.ParquetFile, batch_size: int, groups: list[int], *rest: Any, **more: Any) -> Any:
        asked.update((self._path_for_test, group) for group in groups)
        return real(self, batch_size, groups, *rest, **more)

    whole = rowgroups.open_parquet

    class Named:
        def __init__(self, path: str) -> None:
            self.path, self.context = path, whole(path)

        def __enter__(self) -> pq.ParquetFile:
            file = self.context.__enter__()
            file._path_for_test = self.path
            return file

        def __exit__(self, *error: Any) -> Any:
            return self.context.__exit__(*error)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    monkeypatch.setattr(rowgroups, "open_parquet", Named)
    used, counts = [], []
    for rank in range(4):
        asked.clear()
        rows = rows_of(read(data, rank=rank, world=4))  # 48 of 50 rows, an epoch
        blocks = {row >> 32 for row in rows}
        assert len(asked) == len(blocks) <= 6
        used.append(blocks)
        counts.append(len(rows))
    assert counts == [12] * 4 and sum(map(len, used)) <= 18 + 4


def test_footers_are_read_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, range(10))
    regroup(path, 4)
    opens: list[str] = []
    real = rowgroups.open_parquet
    monkeypatch.setattr(rowgroups, "open_parquet", lambda path: (opens.append(path), real(path))[1])
    for _ in range(2):
        groups = read_row_groups([str(path)], "x")
        assert groups.sizes.tolist() == [4, 4, 2] and groups.group.tolist() == [0, 1, 2] and len(opens) == 1
    regroup(path, 5)
    os.utime(path, (1, 1))
    assert read_row_groups([str(path)], "x").sizes.tolist() == [5, 5] and len(opens) == 2


def test_a_damaged_index_is_worked_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls: list[int] = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"rows": np.arange(5), "sizes": np.array([5])}

    for expected in (1, 1):
        assert stored.stored({"a": 1}, compute)["rows"].tolist() == [0, 1, 2, 3, 4] and len(calls) == expected
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    for number, bad in enumerate((content[:-9], b"", b"\x80\x04.", content[:-8] + b"\1" + content[-7:]), start=2):
        file.write_bytes(bad)
        assert stored.stored({"a": 1}, compute)["rows"].tolist() == [0, 1, 2, 3, 4] and len(calls) == number
        assert file.read_bytes() == content
    stored.stored({"a": 2}, compute)
    assert len(calls) == 6
    (tmp_path / "fastddpm-index").rename(tmp_path / "moved")
    (tmp_path / "fastddpm-index").write_text("in the way")
    assert stored.stored({"a": 1}, compute)["sizes"].tolist() == [5] and len(calls) == 7


def test_shards_belong_to_lanes_and_come_back_lane_by_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (5, 0, 9, 3, 8, 4, 7)
    monkeypatch.setitem(SOURCES, "shards", lambda location, config: shards_of(counts))
    data = opened("shards:x", streaming=True, lanes=8)
    assert (data.num_lanes, data.num_images, data.dropped_per_epoch) == (4, None, None)  # divides 8, at most 7
    assert (
        opened("shards:x", streaming=True).num_lanes == 4 and opened("shards:x", streaming=True, lanes=7).num_lanes == 7
    )
    rows = rows_of(read(data, steps=60))
    for lane in range(4):
        own = rows[lane::4]
        shards = range(lane, 7, 4)
        length = sum(counts[shard] for shard in shards)
        assert {row >> 32 for row in own} <= set(shards)
        everything = {(shard << 32) + row for shard in shards for row in range(counts[shard])}
        epochs = [own[start : start + length] for start in range(0, 60 - length, length)]
        assert all(set(epoch) == everything for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    message = one_line(lambda: read(opened("shards:x", streaming=True, lanes=7)))
    assert message == "shards:x: lane 1 of 7 of the stream has 0 rows"


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_follow_their_weights(parquet: Path, tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "more.parquet", range(NUM_ROWS, NUM_ROWS + 10))
    mix = (f"parquet:{tmp_path}/more.parquet",)
    data = opened(parquet, mix=mix, weights=(1, 1), streaming=streaming, lanes=2)
    found = pictures(read(data, steps=100))
    assert data.num_images == 60 and data.class_names == ["a", "b"]
    assert 160 < sum(row >= NUM_ROWS for row in found) < 240  # of 400: exactly half of each 10,000 in a lane
    own = [row for row in found if row >= NUM_ROWS]
    if not streaming:
        assert all(set(own[start : start + 10]) == set(range(50, 60)) for start in range(0, 150, 10))
    together = opened(parquet, mix=mix, streaming=streaming, lanes=2)
    assert sorted(pictures(read(together, steps=15))) == list(range(60))
    identities = {data.identity, together.identity, opened(parquet, streaming=streaming, lanes=2).identity}
    assert len(identities) == 2  # weights are in the config


@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_holds_for_every_source(parquet: Path, tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "more.parquet", range(NUM_ROWS, NUM_ROWS + 10))
    mix = (f"parquet:{tmp_path}/more.parquet",)
    data = opened(parquet, mix=mix, filter="label == 'b'", streaming=streaming, lanes=5)
    assert sorted(pictures(read(data, steps=6, batch_size=5))) == list(range(1, 60, 2))


def test_workers_share_out_positions_and_none_is_idle(parquet: Path) -> None:
    for lanes, world, workers in ((4, 2, 3), (1, 2, 3), (6, 4, 2), (5, 3, 7)):
        data = opened(parquet, streaming=True, lanes=lanes)
        for rank in range(world):
            reader = data._stream_reader(Share(BatchPlan(world, world), rank, 0, 0, 0), skip=False)
            positions = rank + world * np.arange(840)
            owners = np.stack([reader._own(positions, worker, workers) for worker in range(workers)])
            assert (owners.sum(axis=0) == 1).all() and owners.sum(axis=1).min() > 0


def test_labels_of_a_mixture_are_kept_where_the_classes_agree(parquet: Path, tmp_path: Path) -> None:
    features = datasets.Features({"picture": datasets.Image(), "img": datasets.ClassLabel(names=["a", "c"])})
    images = [{"bytes": png(picture(row)), "path": None} for row in range(50, 54)]
    write_parquet(tmp_path / "other.parquet", range(4), features, picture=images, img=[0, 1, 0, 1])
    for streaming in (False, True):
        data = opened(parquet, mix=(f"parquet:{tmp_path}/other.parquet",), streaming=streaming)
        assert data.num_classes is None and data.label_column is None
        assert (
            data.warning is not None and "labels are left out: " in data.warning and "2 classes (a, c)" in data.warning
        )
        batches = read(data, steps=14)
        assert all(batch.labels is None for batch in batches) and {50, 53} & set(pictures(batches))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"mix": ("digits",), "weights": (1.0,)}, ConfigError, "data.weights has 1 numbers for 2 sources"),
        ({"mix": ("digits",), "weights": (1.0, 0.0)}, ConfigError, "each must be a number above 0"),
        ({"mix": ("digits",), "weights": (1.0, 1e-9)}, ConfigError, "1e-09 is less than 1 in 10,000"),
        ({"mix": ("parquet:/absent",)}, DataError, "no such file or folder: /absent"),
        ({"mix": ("digits",), "streaming": True}, ConfigError, "digits does not tell how many images it has: give"),
        ({"lanes": 0}, ConfigError, "data.lanes is 0"),
        ({"bad_image": "ignore"}, ConfigError, "data.bad_image is 'ignore': valid are error, skip"),
        ({"background": "whitish"}, ConfigError, "data.background"),
        ({"filter": "label == len(x)"}, ConfigError, "len(x) is not understood"),
        ({"filter": "label == 'z'"}, DataError, "no class 'z'"),
        ({"filter": "size > 3"}, DataError, "no column size (data.filter='size > 3'); columns: img, label"),
        ({"filter": "img == 'x'"}, DataError, "column img holds images"),
        ({"filter": "label == 3"}, DataError, "data.filter='label == 3' leaves 0 rows of split train"),
        ({"filter": "label == 'a'", "source": "digits", "streaming": True}, DataError, "leave out --data.streaming"),
    ],
)
def test_what_cannot_be_mixed_or_filtered(parquet: Path, fields: dict, error: type[Exception], words: str) -> None:
    assert words in one_line(lambda: opened(fields.pop("source", parquet), **fields), error)


FILTERS = {
    "label == 'b'": [11, 13],
    "label in ('a',)": [10],
    "label not in (0,)": [11, 13],
    "not x": [11],
    "1 < w <= 3": [11, 12],
    "not (w == 2)": [10, 12],
    "s in ['u', 'w'] or w == 2": [10, 11, 13],
    "w >= -1 and x": [10, 12],
    "'a' != label": [11, 13],
    "w == 1.0": [10],
}


@pytest.mark.parametrize("text", FILTERS)
def test_filters_hold_where_their_words_say(text: str) -> None:
    from fastddpm.filters import rows_where

    types = {"w": datasets.Value("int64"), "x": datasets.Value("bool"), "s": datasets.Value("string")}
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"]), **types})
    columns = {
        "label": [0, 1, None, 1],
        "w": [1, 2, 3, None],
        "x": [True, False, True, None],
        "s": ["u", "v", None, "w"],
    }
    assert rows_where(pa.table(columns), Filter(text).expression(features, "x"), 10).tolist() == FILTERS[text]


@pytest.mark.parametrize(
    "text",
    [
        *("len(w)", "w == x + 1", "w is None", "3", "f(", "1 == 2", "w.real == 1", "[i for i in w]", "w == (1, 2)"),
        *("w in x", "__import__('os').system('x') == 0", "w == f'{1}'", "lambda: w", "w if x else y", "-'a' == w"),
        *("", "w[0] == 1", "w in (1, 'a')"),
    ],
)
def test_nothing_else_is_a_filter(text: str) -> None:
    assert "data.filter" in one_line(lambda: Filter(text), ConfigError)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_is_evaluated_once_and_gives_its_rows(
    parquet: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastddpm import sources

    tables: list[int] = []
    for module in (sources, rowgroups):
        real = module.rows_where
        monkeypatch.setattr(module, "rows_where", lambda *a, real=real: (tables.append(1), real(*a))[1])
    text = f"label == 'b' and label != {100 + streaming}"  # of its own, so that no other test has evaluated it
    for _ in range(2):
        data = opened(parquet, filter=text, streaming=streaming, lanes=5)
        assert data.num_images == 25 and len(tables) == (19 if streaming else 1)
    assert sorted(pictures(read(data, steps=5, batch_size=5))) == list(range(1, NUM_ROWS, 2))
    assert data.identity != opened(parquet, streaming=streaming, lanes=5).identity
    looked_at = [found for found in data.look_at(64) if isinstance(found, Batch)]
    assert len(looked_at) == (18 if streaming else 25) and {row % 2 for row in pictures(looked_at)} == {1}
    labels = [(row, label) for rows, found in data.labels() for row, label in zip(rows, found.to_pylist(), strict=True)]
    assert labels == ([] if streaming else [(row, 1) for row in range(1, NUM_ROWS, 2)])


BAD = (7, 20, 21, 33)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    images: list[dict | None] = [{"bytes": png(picture(row)), "path": f"{row}.png"} for row in range(NUM_ROWS)]
    for row in BAD:
        images[row] = {"bytes": b"not an image", "path": f"{row}.png"}
    images[33] = None
    write_parquet(folder / "x.parquet", range(NUM_ROWS), img=images)
    regroup(folder / "x.parquet", 8)
    return folder


def bad_shards(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in range(shard * 10, shard * 10 + 10):
            yield {"img": {"bytes": b"x" if row in BAD else png(picture(row)), "path": f"{row}.png"}}


BAD_KINDS: dict[str, dict[str, Any]] = {
    "map": {},
    "stored": {"cache_gb": 1.0},
    "resident": {"resident": True},
    "streamed": {"streaming": True, "lanes": 4},
    "windows of one": {"streaming": True, "lanes": 4, "shuffle_buffer": 1},
    "sharded": {"source": "bad:x", "streaming": True, "lanes": 4},
}


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_skipped_images_are_replaced_alike_on_any_number_of_processes(
    bad: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features({"img": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(bad_shards, features=features, gen_kwargs={"shards": [*range(5)]})
    monkeypatch.setitem(SOURCES, "bad", lambda location, config: stream)
    fields: dict[str, Any] = {"source": f"parquet:{bad}", "bad_image": "skip"} | BAD_KINDS[kind]
    data = opened(fields.pop("source"), **fields)
    whole = read(data, steps=26)
    found, told = pictures(whole), [message for batch in whole for message in batch.replaced]
    assert not set(found) & set(BAD)
    assert 6 <= len(told) <= 10  # of 104 positions, two epochs of 4
    assert len(set(told)) == 4 and all("split train of" in message for message in told)
    missing = sum("is missing: the row has neither" in message for message in set(told))
    assert missing == (kind != "sharded")  # where the library itself refuses missing images
    assert sum("cannot be decoded" in message for message in set(told)) == 4 - missing
    if "streaming" not in fields:
        assert found == rows_of(whole)  # rows are those of the images that are used
        known = data.rows_at(np.arange(104), 7)
        assert known is not None
        for position, (row, used) in enumerate(zip(known.tolist(), found, strict=True)):
            tried = (replacement(7, position, attempt, NUM_ROWS) for attempt in range(1, 99))
            assert used == (next(number for number in tried if number not in BAD) if row in BAD else row)
    for world, workers in ((2, 0), (4, 0), (2, 3)):
        ranks = [read(data, steps=26, rank=rank, world=world, workers=workers) for rank in range(world)]
        merged = []
        for batches in zip(*ranks, strict=True):
            merged += [row for rows in zip(*([pictures([b]) for b in batches]), strict=True) for row in rows]
        assert merged == found
        assert sorted(m for batches in ranks for batch in batches for m in batch.replaced) == sorted(told)
    assert pictures(read(data, first=15, steps=26)) == found[60:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_bad_images_ends_with_an_error(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "x.parquet", range(3), img=[{"bytes": b"x", "path": f"{row}.png"} for row in range(3)])
    data = opened(tmp_path / "x.parquet", streaming=streaming, bad_image="skip")
    message = one_line(lambda: read(data))
    assert "nor can any of 100 others that were tried in its place" in message and ".png (row " in message


def test_bad_images_are_not_stored(bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = opened(bad, bad_image="skip", cache_gb=1)
    first = read(data, steps=26)
    again = read(data, steps=26)
    assert [batch.replaced for batch in first] == [batch.replaced for batch in again]
    assert pictures(first) == pictures(again)
    message = one_line(lambda: read(opened(bad, cache_gb=1), steps=26))
    assert " of split train of parquet:" in message


class Flaky(io.BytesIO):
    """A file that breaks off at some reads."""

    failures: list[Exception]

    def read(self, size: int | None = -1) -> bytes:
        if Flaky.failures and self.tell() < 4096:
            raise Flaky.failures.pop()
        return super().read(size)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Exception], None]]:
    """A parquet file at memory://, and a function that makes its next reads fail."""
    write_parquet(tmp_path / "a.parquet", range(20))
    regroup(tmp_path / "a.parquet", 5)
    content = (tmp_path / "a.parquet").read_bytes()
    system = fsspec.filesystem("memory")
    system.pipe("/remote/a.parquet", content)
    monkeypatch.setattr(type(system), "open", lambda self, path, mode, **more: Flaky(content))
    Flaky.failures = []
    monkeypatch.setitem(SOURCES, "memory", open_memory)
    yield lambda count, error: Flaky.failures.extend([error] * count)
    system.rm("/remote/a.parquet")


def open_memory(location: str, config: DataConfig) -> Any:
    from fastddpm.sources import ParquetStream

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    return ParquetStream(dataset, read_row_groups(["memory://remote/a.parquet"], config.source))


def test_remote_files_are_read_again(
    remote: Callable[[int, Exception], None], no_waiting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    data = opened("memory:x", streaming=True, lanes=2)
    expected = pictures(read(data, steps=10))
    assert sorted(expected[:20]) == list(range(20)) and capfd.readouterr().err == ""
    remote(3, OSError("connection\nreset"))
    assert pictures(read(data, steps=10)) == expected
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0] == "fastddpm: memory://remote/a.parquet: OSError: connection reset; attempt 2 of 4 in 0 s"
    remote(100, OSError("gone for good"))
    message = one_line(lambda: read(data, steps=10))
    assert "memory://remote/a.parquet, row group " in message and "gone for good" in message
    assert len(capfd.readouterr().err.splitlines()) == 3
    for lasting in (FileNotFoundError("no"), PermissionError("no"), ValueError("no")):
        Flaky.failures = [lasting]
        assert "cannot be read" in one_line(lambda: read(data, steps=10)) and not capfd.readouterr().err


def test_remote_footers_are_read_again(
    remote: Callable[[int, Exception], None], no_waiting: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with private_cache(tmp_path / "another"):
        remote(2, TimeoutError("slow"))
        assert opened("memory:x", streaming=True).num_images == 20
        assert len(capfd.readouterr().err.splitlines()) == 2


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(library.time, "sleep", slept.append)

    def fail() -> None:
        raise ConnectionError("x")

    with pytest.raises(ConnectionError):
        library.retried(fail, "x", remote=False)
    assert slept == [1, 2, 4, 8, 16]


def shard_that_breaks(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in range(shard * 300, shard * 300 + 300):
            if row == 299 and BROKEN:
                raise BROKEN.pop()
            yield {"img": {"bytes": png(picture(row % 50)), "path": None}, "label": row % 2}


BROKEN: list[Exception] = []


def test_a_shard_that_breaks_off_is_read_on(
    monkeypatch: pytest.MonkeyPatch, no_waiting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    stream = datasets.IterableDataset.from_generator(
        shard_that_breaks, features=features, gen_kwargs={"shards": [0, 1]}
    )
    monkeypatch.setitem(SOURCES, "breaks", lambda location, config: stream)
    data = opened("breaks:x", streaming=True, shuffle_buffer=100)
    expected = rows_of(read(data, steps=150))
    assert len(set(expected)) == 600 and not capfd.readouterr().err
    BROKEN.extend([ConnectionError("lost")] * 2)
    assert rows_of(read(data, steps=150)) == expected
    assert capfd.readouterr().err.count("fastddpm: breaks:x: ConnectionError: lost; attempt 2 of 4") >= 1
    BROKEN.append(KeyError("no network's error"))
    assert "KeyError" in one_line(lambda: read(data, steps=150)) and not capfd.readouterr().err


def test_images_behind_urls_are_read_again(
    monkeypatch: pytest.MonkeyPatch, no_waiting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastddpm import loader

    tries: list[str] = []

    def flaky_open(path: str, mode: str) -> io.BytesIO:
        tries.append(path)
        if len(tries) == 1:
            raise ConnectionError("lost")
        return io.BytesIO(b"content")

    monkeypatch.setattr(loader, "xopen", flaky_open)
    assert loader._read_bytes({"bytes": None, "path": "hf://x/1.png"}, 0, str) == (b"content", False)
    assert "hf://x/1.png: ConnectionError: lost" in capfd.readouterr().err


def test_a_small_set_has_fewer_lanes(tmp_path: Path) -> None:
    for count, page_bytes, lanes in (
        *((1, 0, 1), (63, 0, 1), (128, 0, 2), (200, 0, 2), (5000, 0, 64), (5000, 16 << 20, 64)),
        *((5000, (16 << 20) + 1, 32), (5000, 1024 * 100_000, 8), (5000, 600 << 20, 1), (5000, 5 << 30, 1)),
    ):
        pages = np.array([page_bytes])
        groups = rowgroups.RowGroups(("x",), *(np.zeros(1, dtype=np.int64),) * 2, np.array([count]), None, "", pages)
        write_parquet(tmp_path / "one.parquet", range(1))
        data = opened(tmp_path / "one.parquet", streaming=True)
        source = data._source._replace(parts=(data._source.parts[0]._replace(groups=groups),))
        found = ImageData(data.config, source, (8, 8), 3)
        assert found.num_lanes == lanes and (found.warning is None) == (page_bytes < 4 << 30)


def test_lanes_hold_no_more_than_the_footers_let_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    write_parquet(tmp_path / "x.parquet", range(1500))
    pq.write_table(pq.read_table(tmp_path / "x.parquet"), tmp_path / "x.parquet", row_group_size=1200)
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(2)]
    for _ in range(2):  # the second time from the stored index
        pages = read_row_groups([str(tmp_path / "x.parquet")], "x").page_bytes.tolist()
        assert pages == [sizes[0] // 1200 * 1024, sizes[1] // 300 * 300]
    assert opened(tmp_path, streaming=True).num_lanes == 16
    monkeypatch.setattr(data_module, "LANES_BYTES", 5 * pages[0])
    data = opened(tmp_path, streaming=True)
    assert (data.num_lanes, data.window, data.warning) == (4, 3, None)
    mix = (f"parquet:{tmp_path}/x.parquet",)
    assert opened(tmp_path, streaming=True, mix=mix).num_lanes == 4
    assert opened(tmp_path, streaming=True, mix=mix, weights=(1, 1)).num_lanes == 2
    monkeypatch.setattr(data_module, "MANY_BYTES", 5 * pages[0])
    warning = opened(tmp_path, streaming=True, lanes=6).warning
    assert warning is not None and warning.startswith(f"the stream's lanes (6) may hold {6 * pages[0] / 1e9:.3g} GB")
    assert opened(tmp_path, streaming=True, lanes=5).warning is None and opened(tmp_path, lanes=6).warning is None


def test_the_identity_knows_lanes_and_window(parquet: Path) -> None:
    kinds = ({}, {"lanes": 2}, {"lanes": 2, "shuffle_buffer": 14})
    assert len({opened(parquet, streaming=True, **fields).identity for fields in kinds}) == 3
    assert len({opened(parquet, **fields).identity for fields in kinds}) == 1


@pytest.fixture
def few_files() -> Iterator[None]:
    """15 more open files than there are, until somebody raises that."""
    resource = pytest.importorskip("resource")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no list of open files")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    # The limit is on numbers, of which those that others have closed are free again.
    free = [number for number in range(max(taken) + 16) if number not in taken][:15]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_lanes_open_as_many_files_as_they_need(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet", range(800))
    fields: dict = {"streaming": True, "lanes": 20, "mix": (f"parquet:{tmp_path}/x.parquet",), "weights": (1, 1)}
    data = opened(tmp_path, **fields)
    request.getfixturevalue("few_files")
    with monkeypatch.context() as patch:
        patch.setattr(streams, "raise_file_limit", lambda: None)
        message = one_line(lambda: read(data, steps=30))
        assert "Too many open files" in message and "lower data.lanes, or raise the limit (ulimit -n)" in message
    assert len(read(data, steps=30)) == 30


def test_files_are_closed_when_a_lane_has_read_its_piece(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_now, most = 0, 0
    real = rowgroups.open_parquet

    @contextmanager
    def counted(path: str) -> Iterator[pq.ParquetFile]:
        nonlocal open_now, most
        with real(path) as file:
            open_now += 1
            most = max(most, open_now)
            yield file
            open_now -= 1

    monkeypatch.setattr(rowgroups, "open_parquet", counted)
    data = opened(parquet, streaming=True, lanes=6)  # row groups of 3, which are read at once
    assert sorted(pictures(read(data, steps=8, batch_size=6))) and most == 1


def test_one_image_is_looked_at_without_reading_hundreds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", range(600))
    chunks: list[int] = []
    real = pq.ParquetFile.iter_batches

    def recorded(self: pq.ParquetFile, batch_size: int, *rest: Any, **more: Any) -> Any:
        chunks.append(batch_size)
        return real(self, batch_size, *rest, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    (found,) = opened(tmp_path, streaming=True).look_at(1)
    assert isinstance(found, Batch) and max(chunks) <= 16


def test_rows_are_numbered_without_a_list_of_all(parquet: Path) -> None:
    huge = rowgroups.RowGroups(
        ("x",), *(np.arange(3),) * 2, np.array([10**12, 0, 10**12]), None, "", np.zeros(3, dtype=np.int64)
    )
    kept = huge._replace(sizes=np.array([2, 0, 1]), kept=np.array([4, 7, 5]))
    parts = (ParquetPart(huge, pa.schema([]), 0, 0), ParquetPart(kept, pa.schema([]), 1, 3))
    numbers = np.array([2 * 10**12 + 1, 0, 10**12 - 1, 10**12, 2 * 10**12, 2 * 10**12 + 2])
    places = [(row >> 32, row & 0xFFFFFFFF) for row in rows_by_number(parts, numbers % 2**62).tolist()]
    assert [places[i] for i in (0, 1, 4, 5)] == [(3, 7), (0, 0), (3, 4), (5, 5)] and places[3] == (2, 0)


def test_rows_are_named_by_split_and_file(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "shards", lambda location, config: shards_of((5, 5)))
    write_folder(tmp_path / "f", ["0.png", "1.png"])
    mapped = opened(parquet, mix=(f"folder:{tmp_path}/f",))
    assert mapped.name_row(49) == f"row 49 of split train of parquet:{parquet}"
    assert mapped.name_row(51) == f"row 1 of split train of folder:{tmp_path}/f"
    streamed = opened(parquet, mix=("shards:x",), weights=(1, 1), streaming=True)
    name = f"row 1 of row group 2 of {parquet}/train-00001-of-00003.parquet, split train of parquet:{parquet}"
    assert streamed.name_row((8 << 32) + 1) == name
    assert streamed.name_row((19 << 32) + 4) == "row 4 of shard 0 of split train of shards:x"
