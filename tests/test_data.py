"""Data: sources, the global sequence for any number of processes and workers, resuming, and every bad input's line."""

import io
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastddpm.data import Batch, DataConfig, ImageData, open_data, resolve_source
from fastddpm.errors import ConfigError, DataError
from fastddpm.loader import Decoder, MapReader, Share, ShuffledStream, StreamReader
from fastddpm.order import BatchPlan, rows_at
from fastddpm.sources import SOURCES

CIFAR10 = os.environ.get("FASTDDPM_CIFAR10")
NUM_ROWS = 50
SHARD_ROWS = (17, 20, 13)


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """datasets' cache in a folder of this module's own, removed at the end."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        patch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "extracted")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    shutil.rmtree(folder, ignore_errors=True)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(row: int, height: int = 8, width: int = 8) -> np.ndarray:
    """An RGB image that no other row has."""
    return np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_parquet(path: Path, rows: range, features: datasets.Features | None = None, **columns: Any) -> None:
    features = features or datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(picture(row)), "path": f"{row}.png"} for row in rows]
    labels = [row % 2 for row in rows]
    values = {"img": images, "label": labels} | columns
    dataset = datasets.Dataset.from_dict({name: values[name] for name in features}, features=features)
    dataset.to_parquet(path)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows of train in three files, one of them beside an empty file, and a test split that cannot be read."""
    folder = tmp_path_factory.mktemp("parquet [1]")
    start = 0
    for number, rows in enumerate(SHARD_ROWS):
        write_parquet(folder / f"train-0000{number}-of-00003.parquet", range(start, start + rows))
        start += rows
    whole = pq.read_table(folder / "train-00000-of-00003.parquet")
    pq.write_table(whole.slice(0, 0), folder / "train-extra.parquet")
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 but damaged")
    (folder / "README.md").write_text("a data set")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["map", "streamed"])
def data(request: pytest.FixtureRequest, parquet: Path) -> ImageData:
    config = DataConfig(source=f"parquet:{parquet}", streaming=request.param, shuffle_buffer=12)
    return open_data(config, (8, 8), 3)


def write_folder(folder: Path, names: list[str]) -> Path:
    for row, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(row)))
    return folder


def image_bytes(batch: Batch) -> list[bytes]:
    return [pixels.tobytes() for pixels in batch.images.permute(0, 2, 3, 1).contiguous().numpy()]


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
    batch = next(data.batches(0, 0, 1, 8, workers=0, pin=True))
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_for_a_gpu(data: ImageData, workers: int) -> None:
    batch = next(data.batches(0, 0, 2, 8, workers=workers, pin=True))
    assert batch.images.is_pinned() and batch.ordinals.is_pinned()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("streaming", [False, True])
def test_digits(streaming: bool) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = open_data(DataConfig(source="digits", streaming=streaming), (8, 8), 1)
    assert (data.num_classes, data.class_names) == (10, list("0123456789"))
    (batch,) = data.batches(0, 0, 1, 1797, workers=0)
    rows = batch.rows.numpy()
    assert sorted(rows.tolist()) == list(range(1797))
    assert np.array_equal(batch.images[:, 0].numpy(), np.rint(digits.images[rows] * 255 / 16))
    assert batch.labels is not None and np.array_equal(batch.labels.numpy(), digits.target[rows])


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fastddpm\[digits\]'"):
        open_data(DataConfig(source="digits"), (8, 8), 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/0.png", "cat/1.png", "dog/2.png"], ["cat", "dog"]),
        (["0.png", "1.png", "2.png"], None),
        # Not a split of one image and a class: imagefolder left alone would train on test tubes only.
        (["cat/0.png", "test tubes/1.png", "train/2.png"], ["cat", "test tubes", "train"]),
    ],
)
def test_folders(tmp_path: Path, names: list[str], classes: list[str] | None, streaming: bool) -> None:
    folder = write_folder(tmp_path / "my [photos] train", names)
    (folder / "notes.txt").write_text("not an image")
    data = open_data(DataConfig(source=f"folder:{folder}", streaming=streaming), (8, 8), 3)
    assert data.class_names == classes
    (batch,) = data.batches(0, 0, 1, 3, workers=0)
    assert sorted(image_bytes(batch)) == sorted(picture(row).tobytes() for row in range(3))
    for row, pixels in enumerate(image_bytes(batch)):
        number = next(n for n in range(3) if picture(n).tobytes() == pixels)
        if classes is not None:
            assert batch.labels is not None and classes[batch.labels[row]] == names[number].split("/")[0]
        else:
            assert batch.labels is None


def test_folder_with_split_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, ["train/cat/0.png", "train/dog/1.png", "val/dog/2.png"])
    sizes = {}
    for split in ("train", "validation"):
        data = open_data(DataConfig(source=f"folder:{tmp_path}", split=split), (8, 8), 3)
        sizes[split] = data.num_images
        assert data.class_names == ["cat", "dog"]  # the same numbers in every split
    assert sizes == {"train": 2, "validation": 1}
    with pytest.raises(DataError, match="no split test; it has train, validation"):
        open_data(DataConfig(source=f"folder:{tmp_path}", split="test"), (8, 8), 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_archive_of_a_folder(tmp_path: Path, streaming: bool) -> None:
    folder = write_folder(tmp_path / "images", ["cat/0.png", "dog/1.png"])
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", folder)
    data = open_data(DataConfig(source=f"folder:{archive}", streaming=streaming), (8, 8), 3)
    (batch,) = data.batches(0, 0, 1, 2, workers=0)
    assert data.class_names == ["cat", "dog"]
    assert sorted(image_bytes(batch)) == sorted(picture(row).tobytes() for row in range(2))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_file_glob_and_unnamed_columns(parquet: Path, tmp_path: Path, streaming: bool) -> None:
    for location, num_images in ((parquet / "train-00001-of-00003.parquet", 20), (tmp_path / "*.parquet", 6)):
        if num_images == 6:
            encoded = [png(picture(row)) for row in range(6)]
            table = pa.table({"raw": encoded, "kind": pa.array([3, 0, None, 1, 2, 3], pa.int32()), "text": ["x"] * 6})
            pq.write_table(table, tmp_path / "any.parquet")
        named = {"image_column": "raw", "label_column": "kind"} if num_images == 6 else {}
        config = DataConfig(source=f"parquet:{location}", streaming=streaming, **named)
        data = open_data(config, (8, 8), 3)
        assert data.num_images == (None if streaming else num_images)
        (batch,) = data.batches(0, 0, 1, num_images, workers=0)
        assert batch.labels is not None and len(set(batch.rows.tolist())) == num_images
        if num_images == 6:
            assert data.num_classes == (None if streaming else 4) and data.class_names is None
            assert batch.labels.tolist() == [[3, 0, -1, 1, 2, 3][row] for row in batch.rows.tolist()]
            assert image_bytes(batch) == [picture(row).tobytes() for row in batch.rows.tolist()]


def test_slices_and_sums_of_splits(parquet: Path) -> None:
    for split, num_images in (("train[:10]", 10), ("train[10%:20%]", 5), ("train[:3]+train[40:]", 13)):
        assert open_data(DataConfig(source=f"parquet:{parquet}", split=split), (8, 8), 3).num_images == num_images
    with pytest.raises(DataError, match="cannot be streamed, only a whole split can"):
        open_data(DataConfig(source=f"parquet:{parquet}", split="train[:10]", streaming=True), (8, 8), 3)


def test_any_name_that_load_dataset_reads(parquet: Path, tmp_path: Path) -> None:
    for number in range(3):
        shutil.copy(parquet / f"train-0000{number}-of-00003.parquet", tmp_path)
    data = open_data(DataConfig(source=str(tmp_path)), (8, 8), 3)
    assert data.num_images == NUM_ROWS
    with pytest.raises(DataError, match="no split test; it has train"):
        open_data(DataConfig(source=str(tmp_path), split="test"), (8, 8), 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_fit_and_channels_reach_the_decoder(tmp_path: Path, streaming: bool) -> None:
    for row, (height, width) in enumerate([(8, 8), (20, 30), (31, 12)]):
        (tmp_path / f"{row}.png").write_bytes(png(picture(row, height, width)))
    config = DataConfig(source=f"folder:{tmp_path}", fit="resize_crop", streaming=streaming)
    (batch,) = open_data(config, (6, 10), 1).batches(0, 0, 1, 3, workers=0)
    assert batch.images.shape == (3, 1, 6, 10) and batch.images.permute(0, 2, 3, 1).is_contiguous()


def test_the_library_is_left_as_it_was(tmp_path: Path) -> None:
    handlers = [handler for name in ("datasets", "huggingface_hub") for handler in logging.getLogger(name).handlers]
    filters = [list(handler.filters) for handler in handlers]
    write_folder(tmp_path, ["a/0.png", "b/1.png"])
    list(open_data(DataConfig(source=f"folder:{tmp_path}"), (8, 8), 3).batches(0, 0, 2, 2, workers=0))
    with pytest.raises(DataError):
        open_data(DataConfig(source="nobody/nothing"), (8, 8), 3)
    assert handlers and [handler.filters for handler in handlers] == filters
    assert not datasets.are_progress_bars_disabled()


def test_resolve_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_source("parquet:here/*.parquet") == f"parquet:{tmp_path}/here/*.parquet"
    assert resolve_source("folder:../x") == f"folder:{tmp_path.parent}/x"
    assert resolve_source("here") == str(tmp_path / "here")
    for same in ("digits", "hub:here", "uoft-cs/cifar10", "", f"folder:{tmp_path}"):
        assert resolve_source(same) == same


def test_every_source_is_documented_and_every_field_described(capsys: pytest.CaptureFixture[str]) -> None:
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    shown = capsys.readouterr().out
    for word in (*SOURCES, "antialiased", "probability", "position", "undecoded", "ClassLabel"):
        assert word in shown
    assert tyro.cli(DataConfig, args=["--source", "digits", "--fit", "crop", "--no-flip"]).fit == "crop"


def one_line(action: Callable[[], Any], error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "fields", "words"),
    [
        ("parquet:{tmp}/missing", {}, "no such file or folder: {tmp}/missing"),
        ("folder:{tmp}/missing", {}, "no such folder: {tmp}/missing"),
        ("folder:{tmp}/texts", {}, "holds no image files"),
        ("parquet:{tmp}/texts", {}, "holds no .parquet files"),
        ("parquet:{tmp}/texts/a.txt", {}, "a.txt is not a readable parquet file"),
        ("folder:{tmp}/texts/a.txt", {}, "neither a folder nor an archive"),
        ("parquet:{parquet}", {"split": "test"}, "test-00000-of-00001.parquet is not a readable parquet file"),
        ("parquet:{parquet}", {"split": "dev"}, "no split dev; it has train, test"),
        ("parquet:{parquet}", {"split": ""}, "no split ''; it has train, test"),
        ("digits", {"split": "test"}, "no split test; it has train"),
        ("parquet:{parquet}", {"image_column": "x"}, "no column x (data.image_column); columns: img (Image), label"),
        ("parquet:{parquet}", {"image_column": "label"}, "column label (data.image_column) holds ClassLabel, not"),
        ("parquet:{parquet}", {"label_column": "x"}, "no column x (data.label_column); columns: img (Image), label"),
        ("parquet:{parquet}", {"label_column": "img"}, "column img (data.label_column) holds Image, not ClassLabel"),
        ("parquet:{tmp}/two.parquet", {}, "several image columns: img, mask; choose one by data.image_column"),
        ("parquet:{tmp}/no_image.parquet", {}, "no column of type Image; columns: raw (binary), word (string)"),
        ("parquet:{tmp}/no_image.parquet", {"image_column": "raw", "label_column": "word"}, "holds string, not"),
        ("parquet:{tmp}/empty.parquet", {}, "split train has 0 rows"),
        ("hub:nobody/nothing", {}, "hub:nobody/nothing: ConnectionError: Couldn't reach"),
        ("nobody/nothing", {}, "nobody/nothing: ConnectionError: Couldn't reach"),
        ("{tmp}/absent", {}, "{tmp}/absent: FileNotFoundError"),
        ("parqet:x", {}, "(a source is digits, hub:ID, parquet:PATH, folder:DIR, or anything load_dataset reads)"),
        ("{tmp}/saved", {}, "was written by save_to_disk"),
        ("hub:texts", {}, "load_dataset would read the local {tmp}/texts instead"),
    ],
)
def test_what_cannot_be_opened_gets_one_line(
    broken: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, source: str, fields: dict, words: str
) -> None:
    monkeypatch.chdir(broken)
    config = DataConfig(source=source.format(tmp=broken, parquet=parquet), streaming=streaming, **fields)
    assert words.format(tmp=broken) in one_line(lambda: open_data(config, (8, 8), 3))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("text")
    two = datasets.Features({"img": datasets.Image(), "mask": datasets.Image()})
    write_parquet(folder / "two.parquet", range(2), two, mask=[{"bytes": png(picture(0)), "path": None}] * 2)
    table = pa.table({"raw": [b"1", b"2"], "word": ["x", "y"]})
    pq.write_table(table, folder / "no_image.parquet")
    pq.write_table(table.slice(0, 0), folder / "empty.parquet")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize(
    ("fields", "size", "channels", "words"),
    [
        ({"source": ""}, (8, 8), 3, "data.source is empty"),
        ({"source": "parquet:"}, (8, 8), 3, "data.source=parquet: is not one of digits, hub:ID"),
        ({"source": "digits:8"}, (8, 8), 3, "data.source=digits:8 is not one of"),
        ({"source": "digits", "config": "big"}, (8, 8), 1, "data.config=big: digits has no configurations"),
        ({"source": "digits", "workers": -1}, (8, 8), 1, "data.workers is -1"),
        ({"source": "digits", "shuffle_buffer": 0}, (8, 8), 1, "data.shuffle_buffer is 0"),
        ({"source": "digits"}, (8, 8), 4, "4 channels"),
        ({"source": "digits"}, (0, 8), 1, "0x8"),
    ],
)
def test_values_that_cannot_be_run(fields: dict, size: tuple[int, int], channels: int, words: str) -> None:
    assert words in one_line(lambda: open_data(DataConfig(**fields), size, channels), ConfigError)


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


@pytest.mark.skipif(CIFAR10 is None, reason="FASTDDPM_CIFAR10 names no folder of CIFAR-10's parquet files")
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
