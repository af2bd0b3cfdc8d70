"""Data: the global sequence for any number of processes and workers, resuming, loader processes, broken images."""

import errno
import glob
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_data import (
    NUM_ROWS,
    SHARD_ROWS,
    image_bytes,
    one_line,
    picture,
    png,
    private_cache,
    shards_of,
    write_folder,
    write_splits,
)

import fastddpm.library
import fastddpm.loader
from fastddpm.data import Batch, DataConfig, ImageData, open_data
from fastddpm.errors import ConfigError, DataError
from fastddpm.loader import Share
from fastddpm.order import BatchPlan, rows_at
from fastddpm.sources import SOURCES

GOLDEN_STREAMED = [7, 17, 28, 37, 5, 18, 27, 38, 6, 19, 29, 36, 25, 47, 7, 42, 49, 34, 39, 2, 21, 31]
GOLDEN_FILTERED = [16, 36, 46, 2, 24, 26, 44, 4, 22, 34, 38, 8, 2, 40, 22, 34]
GOLDEN_SHARDED = [(0, 2), (5, 0), (2, 1), (3, 1), (0, 0), (5, 1), (4, 5), (5, 0), (2, 0)]
GOLDEN_MIXED = [26, 15, 2, 69, 60, 42, 45, 32, 40, 22, 68, 10, 43, 54, 37, 5]

CIFAR10 = os.environ.get("FASTDDPM_CIFAR10")


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("parquet [1]"))


SHARDS = (5, 0, 9, 3, 8, 4, 7)
KINDS: dict[str, dict[str, Any]] = {
    "map": {},
    "streamed": {"streaming": True, "lanes": 4},
    "sharded": {"source": "shards:x", "streaming": True, "lanes": 4},
    "map, filtered": {"filter": "label == 'a'"},
    "streamed, filtered": {"streaming": True, "lanes": 4, "filter": "label == 'a'"},
    "map, mixed": {"mix": ("{parquet}/train-00001*",), "weights": (3.0, 1.0)},
    "streamed, mixed": {"mix": ("shards:x",), "weights": (3.0, 1.0), "streaming": True, "lanes": 4},
    "streamed, one after the other": {"mix": ("{parquet}/train-00001*",), "streaming": True, "lanes": 6},
}


def of_kind(parquet: Path, kind: str, **more: Any) -> ImageData:
    fields: dict[str, Any] = {"source": f"parquet:{parquet}", "shuffle_buffer": 12, "cache_gb": 0} | KINDS[kind] | more
    # In names of files that are patterns, brackets have to be escaped.
    escaped = f"parquet:{glob.escape(str(parquet))}"
    fields["mix"] = tuple(source.format(parquet=escaped) for source in fields.get("mix", ()))
    return open_data(DataConfig(**fields), (8, 8), 3)


@pytest.fixture(scope="module", params=["map", "streamed"])
def data(request: pytest.FixtureRequest, parquet: Path) -> ImageData:
    # Without the cache of decoded images, which ends the loader processes' work: that is test_cache.py's.
    return of_kind(parquet, request.param)


@pytest.fixture(scope="module", params=KINDS)
def any_data(request: pytest.FixtureRequest, parquet: Path) -> ImageData:
    return of_kind(parquet, request.param)


@pytest.fixture(scope="module", autouse=True)
def shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "shards", lambda location, config: shards_of(SHARDS))
        yield


def sequence(data: ImageData, first: int, last: int, world: int = 1, accumulation: int = 1, workers: int = 0) -> list:
    """(ordinal, row, label, pixels) of all ranks, put in the order of the plan, without sorting."""
    ranks = [list(data.batches(7, first, last, 8, rank, world, accumulation, workers=workers)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {(last - first) * accumulation}
    found = []
    for micro_batches in zip(*ranks, strict=True):
        columns = []
        for batch in micro_batches:
            assert batch.labels is not None and len(batch.images) == 8 // (world * accumulation)
            columns.append(
                zip(
                    batch.ordinals.tolist(), batch.rows.tolist(), batch.labels.tolist(), image_bytes(batch), strict=True
                )
            )
        # The ranks take turns: position p of a global micro-batch is rank p mod world's.
        found += [example for examples in zip(*columns, strict=True) for example in examples]
    return found


def test_batch_layout(data: ImageData) -> None:
    batch = next(data.batches(0, 0, 1, 8, workers=0))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 8, 8)
    assert batch.images.stride() == (192, 1, 24, 3)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels is not None and {t.dtype for t in (batch.labels, batch.ordinals, batch.rows)} == {torch.int64}
    assert (data.num_classes, data.class_names) == (2, ["a", "b"])
    assert data.num_images == NUM_ROWS and batch.replaced == ()


def test_same_sequence_for_any_processes_accumulation_and_workers(any_data: ImageData) -> None:
    steps = 9  # 72 positions, so that a batch straddles two epochs
    reference = sequence(any_data, 0, steps)
    assert [ordinal for ordinal, *_ in reference] == list(range(8 * steps))
    for world, accumulation in ((1, 2), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)):
        assert sequence(any_data, 0, steps, world, accumulation) == reference
    for world, accumulation, workers in ((1, 1, 2), (1, 2, 3), (2, 1, 3), (4, 1, 1)):
        assert sequence(any_data, 0, steps, world, accumulation, workers) == reference


def file_row(row: int) -> int:
    """The row in the sequence of all files of what a streamed batch calls row group << 32 | row: they have one each."""
    return int(np.cumsum((0, *SHARD_ROWS))[row >> 32]) + (row & 0xFFFFFFFF)


def test_rows_hold_their_own_pixels_and_labels_and_epochs_every_row(data: ImageData) -> None:
    streaming = data.config.streaming
    epoch_rows = 48 if streaming else NUM_ROWS  # 4 lanes of 12
    assert data.dropped_per_epoch == NUM_ROWS - epoch_rows
    found = sequence(data, 0, 25)
    rows = [file_row(row) for _, row, _, _ in found]
    for row, (_, _, label, pixels) in zip(rows, found, strict=True):
        assert label == row % 2 and pixels == picture(row).tobytes()
    epochs = [rows[start : start + epoch_rows] for start in range(0, 4 * epoch_rows, epoch_rows)]
    assert all(len(set(epoch)) == epoch_rows and set(epoch) <= set(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    known = data.rows_at(np.arange(200), seed=7)
    assert known is not None and [row for _, row, _, _ in found] == known.tolist()
    if not streaming:
        assert rows == rows_at(np.arange(200), NUM_ROWS, seed=7).tolist()


@pytest.mark.parametrize("step", [1, 5, 6, 7, 20])  # 6: the last of an epoch of 48 or, straddling, of 50
def test_resuming_gives_what_the_uninterrupted_run_reads(any_data: ImageData, step: int) -> None:
    whole = sequence(any_data, 0, step + 3)
    assert sequence(any_data, step, step + 3) == whole[8 * step :]
    if step in (5, 20):
        assert sequence(any_data, step, step + 3, world=2, workers=2) == whole[8 * step :]


def test_a_batch_size_may_change_in_mid_run(any_data: ImageData) -> None:
    whole = sequence(any_data, 0, 9)
    rest = []
    for batches in zip(
        *(any_data.batches(7, 5, 7, 16, rank, 2, workers=0, offset=-40) for rank in (0, 1)), strict=True
    ):
        rest += [p for pair in zip(*(batch.ordinals.tolist() for batch in batches), strict=True) for p in pair]
    rows = [row for batch in any_data.batches(7, 5, 7, 16, workers=0, offset=-40) for row in batch.rows.tolist()]
    assert rest == list(range(40, 72)) and rows == [row for _, row, _, _ in whole[40:]]
    message = one_line(lambda: any_data.batches(7, 5, 7, 16, workers=0, offset=-81), ConfigError)
    assert "before the start" in message


def test_seeds_give_other_orders(data: ImageData) -> None:
    first, second = (next(data.batches(seed, 0, 1, 8, workers=0)).rows.tolist() for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("lanes", [1, 3, 50, 70])
@pytest.mark.parametrize("buffer", [1, 49, 5000])
def test_a_stream_is_whole_for_any_buffer_and_lanes(parquet: Path, buffer: int, lanes: int) -> None:
    data = of_kind(parquet, "streamed", shuffle_buffer=buffer, lanes=lanes)
    epoch = NUM_ROWS - (data.dropped_per_epoch or 0)
    assert data.num_lanes == min(lanes, NUM_ROWS) and epoch == NUM_ROWS // data.num_lanes * data.num_lanes
    rows = [row for _, row, _, _ in sequence(data, 0, 25)]
    assert all(len(set(rows[start : start + epoch])) == epoch for start in range(0, 200 - epoch, epoch))


def test_streamed_order_is_frozen(parquet: Path) -> None:
    """Golden values: a change would break the resuming of streamed runs."""
    rows = [file_row(row) for _, row, _, _ in sequence(of_kind(parquet, "streamed"), 0, 13)]
    assert rows[:12] + rows[46:52] + rows[96:100] == GOLDEN_STREAMED
    rows = [file_row(row) for _, row, _, _ in sequence(of_kind(parquet, "streamed, filtered"), 0, 4)]
    assert rows[:8] + rows[20:28] == GOLDEN_FILTERED
    rows = [row for _, row, _, _ in sequence(of_kind(parquet, "sharded"), 0, 13)]
    assert [(row >> 32, row & 0xFFFFFFFF) for row in rows[:6] + rows[96:99]] == GOLDEN_SHARDED
    rows = [row for _, row, _, _ in sequence(of_kind(parquet, "map, mixed"), 0, 2)]
    assert rows == GOLDEN_MIXED


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_random_state_is_touched(data: ImageData, workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(data.batches(0, 0, 3, 8, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_workers_ignore_signals_and_end_with_the_iterator(data: ImageData) -> None:
    batches = data.batches(0, 0, 40, 8, workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39
    assert not multiprocessing.active_children()
    batches = data.batches(0, 0, 40, 8, workers=1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_a_data_error(data: ImageData) -> None:
    batches = data.batches(0, 0, 400, 8, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(DataError, match=r"loader process ended unexpectedly.*data\.workers"):
        list(batches)


def test_a_program_that_closes_nothing_exits_and_the_library_is_quiet(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 but damaged")
    program = f"""
from fastddpm.data import DataConfig, open_data
from fastddpm.errors import DataError
data = open_data(DataConfig(source={"parquet:" + str(parquet)!r}, streaming=True), (8, 8), 3)
batches = data.batches(0, 0, 10**6, 8, workers=1)
next(batches)
list(open_data(DataConfig(source={"parquet:" + str(parquet)!r}), (8, 8), 3).batches(0, 0, 2, 8, workers=0))
for source in ({str(tmp_path)!r}, "nobody/nothing"):
    try:
        open_data(DataConfig(source=source), (8, 8), 3)
    except DataError:
        print("refused")
"""
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\nrefused\n", "")


def test_readers_pickle_for_spawned_workers(data: ImageData) -> None:
    share = Share(BatchPlan(8), 0, 7, 0, 3)
    if data.config.streaming:
        batch = next(iter(pickle.loads(pickle.dumps(data._stream_reader(share, skip=False)))))
    else:
        batch = pickle.loads(pickle.dumps(data._map_reader(share)))[0, 0]
    assert isinstance(batch, Batch)
    assert batch.rows.tolist() == [row for _, row, _, _ in sequence(data, 0, 1)]


def test_batches_checks_its_arguments_at_once(data: ImageData) -> None:
    assert "batch size 10 does not divide by 4" in one_line(lambda: data.batches(0, 0, 1, 10, world=4), ConfigError)
    assert "rank 2 of 2" in one_line(lambda: data.batches(0, 0, 1, 8, rank=2, world=2), ConfigError)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, streaming: bool, workers: int) -> None:
    write_folder(tmp_path, [f"{row:02}.png" for row in range(12)])
    (tmp_path / "07.png").write_bytes(b"not an image")
    source = str(tmp_path) if streaming else f"folder:{tmp_path}"
    data = open_data(DataConfig(source=source, streaming=streaming), (8, 8), 3)
    read: list[int] = []

    def read_all() -> None:
        for batch in data.batches(0, 0, 12, 1, workers=workers):
            read.extend(batch.rows.tolist())

    message = one_line(read_all)
    row = "row 7 of shard 0 of split train" if streaming else "row 7 of split train"
    assert f"image {tmp_path}/07.png ({row} of {source}) cannot be decoded: it is not an image" in message
    # The batches before it arrive, and it is named when its own is due.
    (tmp_path / "07.png").write_bytes(png(picture(7)))
    order = [batch.rows.item() for batch in data.batches(0, 0, 12, 1, workers=0)]
    assert read == order[: order.index(7)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_table_are_named(tmp_path: Path, streaming: bool) -> None:
    images = [{"bytes": png(picture(row)), "path": None} for row in range(4)]
    for bad, words in (
        (None, "the image of row 2{where} is missing"),
        ({"bytes": b"junk", "path": None}, "the image of row 2{where} cannot be decoded"),
        ({"bytes": png(picture(0, 5, 9)), "path": None}, "is 9x5 pixels (width x height), the model takes 8x8"),
        ({"bytes": None, "path": "/absent/1.png"}, "image /absent/1.png (row 2{where}) cannot be read"),
        ({"bytes": png(np.dstack([picture(0), picture(1)[..., 0]])), "path": None}, "is partly transparent"),
    ):
        path = tmp_path / "rows.parquet"
        column = pa.array([*images[:2], bad, images[3]], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"picture": column}), path)
        config = DataConfig(source=f"parquet:{path}", image_column="picture", streaming=streaming)
        data = open_data(config, (8, 8), 3)
        message = one_line(lambda data=data: list(data.batches(0, 0, 1, 4, workers=0)))
        where = f" of row group 0 of {path}, split train" if streaming else " of split train"
        assert words.format(where=f"{where} of parquet:{path}") in message


def test_an_empty_stream_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image()})
    empty = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    monkeypatch.setitem(SOURCES, "nothing", lambda location, config: empty)
    data = open_data(DataConfig(source="nothing:x", streaming=True), (8, 8), 3)
    for workers in (0, 1):
        message = one_line(lambda workers=workers: next(data.batches(0, 0, 1, 2, workers=workers)))
        assert message == "nothing:x: the stream has 0 rows"


def test_a_stream_that_breaks_off_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict]:
        yield {"image": {"bytes": png(picture(0)), "path": None}}
        raise OSError("connection\nlost")

    stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features({"image": datasets.Image()}))
    monkeypatch.setitem(SOURCES, "rows", lambda location, config: stream)
    data = open_data(DataConfig(source="rows:x", streaming=True), (8, 8), 3)
    assert "rows:x: OSError: connection lost" in one_line(lambda: list(data.batches(0, 0, 9, 1, workers=0)))


@pytest.mark.skipif(
    not os.path.isdir(CIFAR10 or ""), reason="FASTDDPM_CIFAR10 names no folder of CIFAR-10's parquet files"
)
@pytest.mark.parametrize("streaming", [False, True])
def test_cifar10(streaming: bool) -> None:
    config = DataConfig(source=f"parquet:{CIFAR10}", streaming=streaming)
    data = open_data(config, (32, 32), 3)
    assert data.num_classes == 10 and data.class_names is not None and data.class_names[0] == "airplane"
    assert data.num_images == 50_000 and data.num_lanes == (64 if streaming else 1)
    batches = [list(data.batches(0, 390, 392, 128, rank, 2, workers=1)) for rank in range(2)]  # straddles the epoch
    whole = list(data.batches(0, 390, 392, 128, workers=0))
    for step in range(2):
        for field in ("images", "labels", "ordinals", "rows"):
            parts = torch.stack([getattr(batches[rank][step], field) for rank in range(2)], dim=1).flatten(0, 1)
            assert torch.equal(parts, getattr(whole[step], field))
    assert len(torch.unique(whole[0].labels)) == 10
    assert 90 < whole[0].images.float().mean() < 150


def picture_paths(folder: Path, paths: list[Any], name: str = "paths.parquet") -> str:
    """A data set whose images are in files; None: in the data."""
    images = [{"bytes": None if path else png(picture(row)), "path": path} for row, path in enumerate(paths)]
    column = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"picture": column}), folder / name)
    return f"parquet:{folder / name}"


def read_paths(source: str, streaming: bool = False, **fields: Any) -> list[Any]:
    config = DataConfig(source=source, image_column="picture", streaming=streaming, cache_gb=0, **fields)
    return list(open_data(config, (8, 8), 3).batches(0, 0, 1, 3, workers=0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        PermissionError(errno.EACCES, "Permission denied"),
        ConnectionResetError("reset"),
        RuntimeError("whatever a file system raises"),
    ],
)
def test_a_fault_of_the_machine_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, error: Exception
) -> None:
    """With bad_image=skip other images would be trained on because of a network that was down."""
    monkeypatch.setattr(fastddpm.library, "RETRY_PAUSES", ())
    source = picture_paths(tmp_path, [None, None, "a.png"])

    def fails(*args: Any) -> bytes:
        raise error

    monkeypatch.setattr(fastddpm.loader, "_file_bytes", fails)
    for policy in ("error", "skip"):
        message = one_line(lambda policy=policy: read_paths(source, streaming, bad_image=policy))
        assert message.startswith("image a.png (row 2 of ") and " cannot be read: " in message


def test_a_lack_of_memory_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> bytes:
        raise MemoryError

    monkeypatch.setattr(fastddpm.loader, "_file_bytes", fails)
    with pytest.raises(MemoryError):
        read_paths(picture_paths(tmp_path, [None, "a.png"]), bad_image="skip")


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_that_are_no_image_files_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.png").write_bytes(png(picture(5)) + bytes(2000))
    (tmp_path / "secret.txt").write_text("password=1234")
    monkeypatch.setattr(fastddpm.loader, "MAX_FILE_BYTES", 2000)
    for path, words in (
        (f"{tmp_path}/pipe", "names no regular file"),
        ("/dev/zero", "names no regular file"),
        (str(tmp_path), "IsADirectoryError"),
        (f"{tmp_path}/absent.png", "FileNotFoundError"),
        (f"{tmp_path}/{'x' * 300}", "cannot be read: "),
        (f"{tmp_path}/large.png", "more than 2,000 bytes"),
        (f"{tmp_path}/secret.txt", "it is not an image but of a format that PIL does not read"),
    ):
        source = picture_paths(tmp_path, [None, None, path])
        message = one_line(lambda source=source: read_paths(source, streaming))
        assert words in message and "password" not in message
        (batch,) = read_paths(source, streaming, bad_image="skip")
        assert words in batch.replaced[0] and 2 not in batch.rows.tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_others_name_no_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """Of a Hub data set only what it has brought into its caches is read."""
    local = tmp_path / "a.png"
    local.write_bytes(png(picture(7)))
    monkeypatch.setitem(SOURCES, "hub", SOURCES["parquet"])

    def hub(path: str) -> str:
        return picture_paths(tmp_path, [None, None, path]).replace("parquet:", "hub:")

    monkeypatch.chdir(tmp_path)
    downloads = Path(datasets.config.DOWNLOADED_DATASETS_PATH)
    downloads.mkdir(parents=True, exist_ok=True)
    (downloads / "b.png").write_bytes(png(picture(8)))
    for path in (str(local), "a.png", f"{downloads}/../../../{local}", f"{downloads}x/a.png"):
        message = one_line(lambda path=path: read_paths(hub(path), streaming))
        assert "is not in the data, which come from elsewhere" in message
    (batch,) = read_paths(hub(f"{downloads}/b.png"), streaming)
    assert picture(8).tobytes() in image_bytes(batch)
    (batch,) = read_paths(hub(str(local)).replace("hub:", "parquet:"), streaming)
    assert picture(7).tobytes() in image_bytes(batch)


@pytest.mark.parametrize("fields", [{}, {"resident": True}, {"streaming": True}, {"weights": (1.0, 4.0)}])
def test_what_replaces_an_image_is_of_its_own_source(tmp_path: Path, fields: dict[str, Any]) -> None:
    junk = "/absent.png"
    few = picture_paths(tmp_path, [None, junk, None, junk], "few.parquet")
    many = picture_paths(tmp_path, [None] * 60, "many.parquet")
    config = DataConfig(few, image_column="picture", cache_gb=0, mix=(many,), bad_image="skip", lanes=1, **fields)
    data = open_data(config, (8, 8), 3)
    rows = [row for batch in data.batches(0, 0, 4, 64, workers=0) for row in batch.rows.tolist()]
    replaced = sum(len(batch.replaced) for batch in data.batches(0, 0, 4, 64, workers=0))
    if "weights" in fields:
        assert replaced >= 5 and sum(row < 4 for row in rows) == pytest.approx(51, abs=2)
    else:
        block = 4 if "streaming" not in fields else 1 << 32
        assert replaced == 8 and sum(row < block for row in rows) == 16


def array_set(tmp_path: Path, kind: str, arrays: np.ndarray) -> str:
    """A parquet file of uint8 arrays [N, ...]: as datasets' Array2D or Array3D, or as nested lists."""
    arrays_of = {3: datasets.Array2D, 4: datasets.Array3D}[arrays.ndim]
    feature: Any = arrays_of(shape=arrays.shape[1:], dtype="uint8")
    if kind == "lists":
        feature = datasets.Value("uint8")
        for _ in range(arrays.ndim - 1):
            feature = datasets.List(feature)
    features = datasets.Features({"pixels": feature, "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"pixels": list(arrays), "label": [row % 2 for row in range(len(arrays))]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    path = tmp_path / f"{kind}-{'x'.join(map(str, arrays.shape))}.parquet"
    dataset.to_parquet(path)
    return f"parquet:{path}"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "lists"])
def test_arrays_of_any_number_of_channels_are_read(tmp_path: Path, kind: str, streaming: bool) -> None:
    rng = np.random.default_rng(0)
    for shape, channels in (((9, 8, 5), 5), ((2, 9, 8), 2), ((9, 8), 1)):
        arrays = rng.integers(0, 256, (12, *shape), dtype=np.uint8)
        config = DataConfig(source=array_set(tmp_path, kind, arrays), streaming=streaming, workers=1)
        data = open_data(config, (9, 8), channels)
        expected = arrays.transpose(0, 2, 3, 1) if shape[0] == channels else arrays.reshape(12, 9, 8, channels)
        for workers in (0, 1):  # the second time from the store of decoded images, where there is one
            (batch,) = data.batches(3, 0, 1, 12, workers=workers)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.labels is not None
            rows = batch.rows.numpy() & 0xFFFFFFFF
            assert sorted(rows.tolist()) == list(range(12))
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected[rows])
            assert np.array_equal(batch.labels.numpy(), rows % 2)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_files_is_a_channel(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, channels), dtype=np.uint8)
    for row, pixels in enumerate(images):
        (tmp_path / f"{row}.png").write_bytes(png(pixels))
    (batch,) = open_data(DataConfig(f"folder:{tmp_path}"), (8, 8), channels).batches(0, 0, 1, 6, workers=0)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images[batch.rows.numpy()])
    message = one_line(lambda: list(open_data(DataConfig(f"folder:{tmp_path}"), (8, 8), 7).batches(0, 0, 1, 2)))
    assert ".png (row " in message and "is an image file, which has 1 (gray), 2 (gray, alpha), 3 (RGB) or 4" in message
    config = DataConfig(f"folder:{tmp_path}", background="white")
    message = one_line(lambda: open_data(config, (8, 8), channels), ConfigError)
    assert message.startswith(f"data.background is 'white' and the model has {channels} channels")
    message = one_line(lambda: open_data(DataConfig(f"folder:{tmp_path}"), (8, 8), 0), ConfigError)
    assert message == "a model of 0 channels: images have at least 1"


@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_that_cannot_be_used_are_named(tmp_path: Path, streaming: bool) -> None:
    def read(column: pa.Array, channels: int = 2, **fields: Any) -> None:
        pq.write_table(pa.table({"pixels": column}), tmp_path / "rows.parquet")
        config = DataConfig(source=f"parquet:{tmp_path}/rows.parquet", streaming=streaming, **fields)
        list(open_data(config, (1, 3), channels).batches(0, 0, 1, len(column), workers=0))

    def nested(dtype: pa.DataType) -> pa.DataType:
        return pa.list_(pa.list_(pa.list_(dtype)))

    sound = [[[1, 2], [3, 4], [5, 6]]]
    read(pa.array([sound, sound], nested(pa.uint8())))
    for bad, words in (
        (None, "is missing: the row has neither bytes nor a path"),
        ([[[1, 2], [3], [5, 6]]], "is no array: its rows differ in length, or one is missing"),
        ([[[1, 2], None, [5, 6]]], "is no array: its rows differ in length, or one is missing"),
        ([[[1, 2], [3, None], [5, 6]]], "is an array of which 1 values are missing (null)"),
        ([[[1, 2, 3], [3, 4, 5]]], "is an array of shape 1x2x3, of which neither the last nor the first axis is the 2"),
        ([], "is an array without values"),
        ([[], []], "is an array without values"),
    ):
        message = one_line(lambda bad=bad: read(pa.array([sound, bad], nested(pa.uint8()))))
        assert "row 1 of " in message and words in message
    for dtype in (pa.int64(), pa.float32()):
        for fields in ({}, {"image_column": "pixels"}):
            message = one_line(lambda dtype=dtype, fields=fields: read(pa.array([sound], nested(dtype)), **fields))
            name = {"int64": "int64", "float": "float32"}[str(dtype)]
            assert message.endswith(f"column pixels holds arrays of {name}, not uint8: convert them to 0 .. 255")
    with pytest.raises(DataError, match=r"column pixels \(data\.image_column\) holds List, not images"):
        read(pa.array([[1, 2]], pa.list_(pa.uint8())), image_column="pixels")


def test_arrays_are_mixed_with_their_like(tmp_path: Path, parquet: Path) -> None:
    arrays = np.random.default_rng(2).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    one, other = array_set(tmp_path, "arrays", arrays[:4]), array_set(tmp_path, "arrays", arrays[4:])
    (batch,) = open_data(DataConfig(one, mix=(other,)), (8, 8), 3).batches(0, 0, 1, 6, workers=0)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), arrays[batch.rows.numpy()])
    escaped = f"parquet:{glob.escape(str(parquet))}/train-00001*"
    message = one_line(lambda: open_data(DataConfig(one, mix=(escaped,)), (8, 8), 3))
    assert "mixed sources need images of one kind" in message
    data = open_data(DataConfig(one, mix=(escaped,), streaming=True), (8, 8), 3)  # where each has a decoder of its own
    assert len(next(data.batches(0, 0, 1, 8, workers=0)).images) == 8
