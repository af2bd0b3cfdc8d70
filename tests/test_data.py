"""Data: the global sequence for any number of processes and workers, resuming, loader processes, broken images."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    write_folder,
    write_splits,
)

from fastddpm.data import Batch, DataConfig, ImageData, open_data
from fastddpm.errors import ConfigError, DataError
from fastddpm.loader import Decoder, MapReader, Share, ShuffledStream, StreamReader
from fastddpm.order import BatchPlan, rows_at
from fastddpm.sources import SOURCES

CIFAR10 = os.environ.get("FASTDDPM_CIFAR10")


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("parquet [1]"))


@pytest.fixture(scope="module", params=["map", "streamed"])
def data(request: pytest.FixtureRequest, parquet: Path) -> ImageData:
    # Without the cache of decoded images, which ends the loader processes' work: that is test_cache.py's.
    config = DataConfig(
        source=f"parquet:{parquet}", streaming=request.param == "streamed", shuffle_buffer=12, cache_gb=0
    )
    return open_data(config, (8, 8), 3)


def sequence(data: ImageData, first: int, last: int, world: int = 1, accumulation: int = 1, workers: int = 0) -> list:
    """(ordinal, row, label, pixels) of all ranks, put in the order of the plan, without sorting."""
    ranks = [list(data.batches(7, first, last, 8, rank, world, accumulation, workers=workers)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {(last - first) * accumulation}
    found = []
    for micro_batches in zip(*ranks, strict=True):
        for batch in micro_batches:
            assert batch.labels is not None and len(batch.images) == 8 // (world * accumulation)
            columns = (batch.ordinals.tolist(), batch.rows.tolist(), batch.labels.tolist(), image_bytes(batch))
            found += zip(*columns, strict=True)
    return found


def test_batch_layout(data: ImageData) -> None:
    batch = next(data.batches(0, 0, 1, 8, workers=0))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 8, 8)
    assert batch.images.stride() == (192, 1, 24, 3)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels is not None and {t.dtype for t in (batch.labels, batch.ordinals, batch.rows)} == {torch.int64}
    assert (data.num_classes, data.class_names) == (2, ["a", "b"])
    assert data.num_images == (None if data.config.streaming else NUM_ROWS)


def test_same_sequence_for_any_processes_accumulation_and_workers(data: ImageData) -> None:
    steps = 9  # 72 positions, so that a batch straddles two epochs
    reference = sequence(data, 0, steps)
    assert [ordinal for ordinal, *_ in reference] == list(range(8 * steps))
    for world in (1, 2, 4):
        for accumulation in (1, 2):
            for workers in (0, 2):
                assert sequence(data, 0, steps, world, accumulation, workers) == reference


def test_rows_hold_their_own_pixels_and_labels_and_epochs_every_row(data: ImageData) -> None:
    found = sequence(data, 0, 25)
    starts = np.cumsum((0, *SHARD_ROWS))
    file_rows = [starts[row >> 32] + (row & 0xFFFFFFFF) for _, row, _, _ in found]
    for file_row, (_, _, label, pixels) in zip(file_rows, found, strict=True):
        assert label == file_row % 2 and pixels == picture(file_row).tobytes()
    epochs = [file_rows[start : start + NUM_ROWS] for start in range(0, 200, NUM_ROWS)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    if not data.config.streaming:
        assert [row for _, row, _, _ in found] == rows_at(np.arange(200), NUM_ROWS, seed=7).tolist()


@pytest.mark.parametrize("step", [1, 5, 6, 7, 20])
def test_resuming_gives_what_the_uninterrupted_run_reads(data: ImageData, step: int) -> None:
    whole = sequence(data, 0, step + 3)
    assert sequence(data, step, step + 3) == whole[8 * step :]
    assert sequence(data, step, step + 3, world=2, workers=2) == whole[8 * step :]


def test_seeds_give_other_orders(data: ImageData) -> None:
    first, second = (next(data.batches(seed, 0, 1, 8, workers=0)).rows.tolist() for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("buffer", [1, 49, 50, 51, 5000])
def test_a_stream_is_whole_for_any_buffer(parquet: Path, buffer: int) -> None:
    data = open_data(DataConfig(source=f"parquet:{parquet}", streaming=True, shuffle_buffer=buffer), (8, 8), 3)
    rows = [row for _, row, _, _ in sequence(data, 0, 25)]
    assert all(len(set(rows[start : start + NUM_ROWS])) == NUM_ROWS for start in range(0, 200, NUM_ROWS))


def test_streamed_order_is_frozen(parquet: Path) -> None:
    """Golden values: a change would break the resuming of streamed runs."""
    data = open_data(DataConfig(source=f"parquet:{parquet}", streaming=True, shuffle_buffer=12), (8, 8), 3)
    rows = [divmod(row, 2**32) for _, row, _, _ in sequence(data, 0, 13)]
    assert rows[:10] == [(1, 8), (1, 6), (1, 11), (1, 0), (1, 15), (1, 9), (1, 3), (1, 18), (1, 12), (1, 5)]
    assert rows[50:56] == [(1, 1), (1, 9), (1, 5), (1, 2), (1, 11), (1, 8)]
    assert rows[96:100] == [(2, 10), (2, 1), (0, 12), (2, 6)]


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
    source, share = data._source, Share(BatchPlan(8), 0, 7, 0, 3)
    decoder = Decoder(data.config.source, source.image_column, source.label_column, (8, 8), 3, "exact")
    if data.num_images is None:
        stream = pickle.loads(pickle.dumps(StreamReader(ShuffledStream(source.dataset, decoder, 12), decoder, share)))
        batch = next(iter(stream))
    else:
        batch = pickle.loads(pickle.dumps(MapReader(source.dataset, decoder, share, data.num_images)))[0, 0]
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
    data = open_data(DataConfig(source=f"folder:{tmp_path}", streaming=streaming), (8, 8), 3)
    read: list[int] = []

    def read_all() -> None:
        for batch in data.batches(0, 0, 12, 1, workers=workers):
            read.extend(batch.rows.tolist())

    message = one_line(read_all)
    row = "row 7 of shard 0" if streaming else "row 7"
    assert f"image {tmp_path}/07.png ({row} of folder:{tmp_path}) cannot be decoded: it is not an image" in message
    # The batches before it arrive, and it is named when its own is due.
    (tmp_path / "07.png").write_bytes(png(picture(7)))
    order = [batch.rows.item() for batch in data.batches(0, 0, 12, 1, workers=0)]
    assert read == order[: order.index(7)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_table_are_named(tmp_path: Path, streaming: bool) -> None:
    images = [{"bytes": png(picture(row)), "path": None} for row in range(4)]
    for bad, words in (
        (None, "row 2{shard} of {source} is missing"),
        ({"bytes": b"junk", "path": None}, "the image of row 2{shard} of {source} cannot be decoded"),
        ({"bytes": png(picture(0, 5, 9)), "path": None}, "is 9x5 pixels (width x height), the model takes 8x8"),
        ({"bytes": None, "path": "/absent/1.png"}, "image /absent/1.png (row 2{shard} of {source}) cannot be read"),
        ({"bytes": png(np.dstack([picture(0), picture(1)[..., 0]])), "path": None}, "is partly transparent"),
    ):
        path = tmp_path / "rows.parquet"
        column = pa.array([*images[:2], bad, images[3]], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"picture": column}), path)
        config = DataConfig(source=f"parquet:{path}", image_column="picture", streaming=streaming)
        data = open_data(config, (8, 8), 3)
        message = one_line(lambda data=data: list(data.batches(0, 0, 1, 4, workers=0)))
        assert words.format(shard=" of shard 0" if streaming else "", source=f"parquet:{path}") in message


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
    assert data.num_images == (None if streaming else 50_000)
    batches = [list(data.batches(0, 390, 392, 128, rank, 2, workers=1)) for rank in range(2)]  # straddles the epoch
    whole = list(data.batches(0, 390, 392, 128, workers=0))
    for step in range(2):
        for field in ("images", "labels", "ordinals", "rows"):
            parts = torch.cat([getattr(batches[rank][step], field) for rank in range(2)])
            assert torch.equal(parts, getattr(whole[step], field))
    assert len(torch.unique(whole[0].labels)) == 10
    assert 90 < whole[0].images.float().mean() < 150
