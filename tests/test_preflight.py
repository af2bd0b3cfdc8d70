"""What is refused, and what is said, before a run takes its first step: in seconds, whatever the size of the data."""

import dataclasses
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_data import NUM_ROWS, one_line, picture, png, private_cache, write_folder, write_parquet, write_splits

import fastddpm.loader
import fastddpm.preflight as preflight
from fastddpm.cli import main
from fastddpm.config import Config, preset
from fastddpm.data import DataConfig, open_data
from fastddpm.errors import ConfigError, DataError
from fastddpm.order import spread
from fastddpm.preflight import check
from fastddpm.sources import SOURCES
from fastddpm.unet import UNet

ROOT = Path(__file__).parents[1]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with private_cache(tmp_path_factory.mktemp("cache")):
        yield


def config_of(source: str, **data: Any) -> Config:
    return preset("digits", batch_size=8, data={"source": source, **data})


def checked(config: Config, run: Path, world: int = 1) -> list[str]:
    model = dataclasses.replace(config.data, fit="resize")
    data = open_data(model, (8, 8), 1)
    return check(config, data, world, run_folder=run)


def labelled(path: Path, labels: list[Any], names: list[str] | None = None) -> str:
    """A parquet file whose labels nobody has checked; names: of a ClassLabel column."""
    label: Any = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"img": datasets.Image(), "label": label})
    images = [{"bytes": png(picture(row % 7)), "path": f"{row}.png"} for row in range(len(labels))]
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64())})
    pq.write_table(table.cast(features.arrow_schema), path)
    return f"parquet:{path}"


def test_a_sound_set_gives_no_warning(tmp_path: Path) -> None:
    write_splits(tmp_path / "data")
    assert checked(config_of(f"parquet:{tmp_path}/data"), tmp_path) == []
    assert checked(config_of(f"parquet:{tmp_path}/data", streaming=True), tmp_path) == []
    write_folder(tmp_path / "folder", [f"{row}.png" for row in range(9)])
    assert checked(config_of(f"folder:{tmp_path}/folder"), tmp_path) == []


@pytest.mark.parametrize("label", [2, 77, -2])
def test_a_label_out_of_range_is_named_with_its_row(tmp_path: Path, label: int) -> None:
    # Not one of the rows whose images are tried.
    source = labelled(tmp_path / "a.parquet", [0, 1] * 10 + [label, label] + [0] * 178, ["a", "b"])
    message = one_line(lambda: checked(config_of(source), tmp_path))
    assert f"label {label} (column label) of row 20" in message and "is not in 0 .. 1" in message


def test_labels_of_streams_are_checked_on_the_images_that_are_tried(tmp_path: Path) -> None:
    source = labelled(tmp_path / "a.parquet", [2, 0, 1] * 5, ["a", "b"])
    message = one_line(lambda: checked(config_of(source, streaming=True), tmp_path))
    assert "label 2 (column label) of row 0 of row group 0 of " in message and "is not in 0 .. 1" in message


def test_a_negative_number_is_no_label_unless_the_column_is_of_classes(tmp_path: Path) -> None:
    source = labelled(tmp_path / "a.parquet", [3, 0, -1, 4])
    message = one_line(lambda: checked(config_of(source, label_column="label"), tmp_path))
    assert "label -1 (column label) of row 2" in message and "is not in 0 .. 4" in message
    source = labelled(tmp_path / "b.parquet", [1, None, -1, 0, -1] * 2, ["a", "b"])
    assert checked(config_of(source), tmp_path) == [f"{source}: 6 of 10 images have no label (null or -1)"]
    source = labelled(tmp_path / "c.parquet", [3, None] * 5)
    assert checked(config_of(source, label_column="label"), tmp_path) == [
        f"{source}: 5 of 10 images have no label (null or -1)"
    ]


def test_a_conditional_run_needs_labels_unless_it_hides_some(tmp_path: Path) -> None:
    source = labelled(tmp_path / "a.parquet", [1, None, -1, 0, -1] * 2, ["a", "b"])
    config = dataclasses.replace(config_of(source), conditional=True)
    assert "6 of 10 images have no label, and the run is conditional" in one_line(lambda: checked(config, tmp_path))
    hiding = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, label_dropout=0.1))
    assert len(checked(hiding, tmp_path)) == 1


def test_labels_of_every_stored_type_are_read(tmp_path: Path) -> None:
    for kind in (pa.bool_(), pa.int8(), pa.uint16(), pa.int64()):
        table = pa.table({"img": [png(picture(0))] * 4, "label": pa.array([0, 1, None, 1]).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        config = config_of(f"parquet:{tmp_path}/a.parquet", image_column="img", label_column="label")
        (warning,) = [line for line in checked(config, tmp_path) if "batch" not in line]
        assert "1 of 4 images have no label" in warning


def test_only_rows_that_are_trained_on_are_looked_at(tmp_path: Path) -> None:
    source = labelled(tmp_path / "a.parquet", [0, 1, 9, 1] * 5, ["a", "b"])
    with pytest.raises(DataError, match="label 9"):
        checked(config_of(source), tmp_path)
    assert checked(config_of(source, filter="label < 2"), tmp_path) == []


def with_bad(path: Path, bad: list[int], num_rows: int = 20) -> str:
    """Images of which some cannot be decoded."""
    images = [
        {"bytes": b"<html>" if row in bad else png(picture(row)), "path": f"{row}.png"} for row in range(num_rows)
    ]
    write_parquet(path, range(num_rows), img=images)
    return f"parquet:{path}"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_image_is_named_with_row_and_path(tmp_path: Path, streaming: bool) -> None:
    source = with_bad(tmp_path / "a.parquet", [0 if streaming else 13])
    message = one_line(lambda: checked(config_of(source, streaming=streaming), tmp_path))
    assert "13.png" in message or streaming
    assert re.search(rf"image \d+\.png \(row {0 if streaming else 13} ", message)
    assert "it is not an image but an HTML page" in message


def test_bad_images_that_are_skipped_are_counted(tmp_path: Path) -> None:
    source = with_bad(tmp_path / "a.parquet", [3, 13])
    (warning,) = checked(config_of(source, bad_image="skip"), tmp_path)
    assert warning.startswith("2 of 20 images tried cannot be used and will be replaced; the first: image ")
    source = with_bad(tmp_path / "b.parquet", list(range(11)))
    message = one_line(lambda: checked(config_of(source, bad_image="skip"), tmp_path))
    assert message.startswith("11 of 20 images tried cannot be used, too many to skip; the first: image ")


def test_a_stream_that_ends_its_look_at_one_bad_image_is_not_judged_by_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", [f"{row}.png" for row in range(3)])
    for row in range(3):
        (tmp_path / "folder" / f"{row}.png").write_bytes(b"")
    source = f"{tmp_path}/folder"
    config = dataclasses.replace(config_of(source, streaming=True, bad_image="skip"), batch_size=1)
    shard, warning = checked(config, tmp_path)
    assert "is a stream of one shard" in shard
    assert "1 of 1 images tried cannot be used and will be replaced" in warning and "it is empty (0 bytes)" in warning


def test_the_probe_reaches_all_parts_of_a_set_of_any_size() -> None:
    for count, length in ((1, 1), (64, 3), (64, 64), (20, 1797), (64, 10**12)):
        places = spread(count, length).tolist()
        assert len(set(places)) == len(places) == min(count, length)
        assert {min(places), max(places)} == {0, length - 1}
    assert spread(64, 6301).tolist()[:4] == [0, 3200, 1600, 4800]
    data = open_data(DataConfig(source="digits"), (8, 8), 1)
    batches = [found for found in data.look_at(64) if not isinstance(found, DataError)]
    rows = sorted(int(batch.rows) for batch in batches)
    assert len(rows) == 64 and rows[0] == 0 and rows[-1] == 1796 and (np.diff(rows) > 20).all()
    given = data.decode_rows(np.array([int(batches[5].rows)]))
    assert torch.equal(batches[5].images, given.images) and given.images.shape == (1, 1, 8, 8)


def test_streams_are_looked_at_by_the_rows_that_batches_have(tmp_path: Path) -> None:
    write_splits(tmp_path / "data")
    whole = pq.read_table(tmp_path / "data" / "train-00001-of-00003.parquet")
    pq.write_table(whole, tmp_path / "data" / "train-00001-of-00003.parquet", row_group_size=3)
    write_folder(tmp_path / "folder", [f"{row:02}.png" for row in range(9)])
    for source, count in ((f"parquet:{tmp_path}/data", 9), (f"{tmp_path}/folder", 8)):
        data = open_data(DataConfig(source=source, streaming=True), (8, 8), 3)
        read = {int(batch.rows): batch for batch in data.batches(0, 0, 60, 1, workers=0)}
        found = [batch for batch in data.look_at(64) if not isinstance(batch, DataError)]
        assert len(found) == count
        for batch in found:
            assert torch.equal(batch.images, read[int(batch.rows)].images)
            assert batch.labels == read[int(batch.rows)].labels


class Endless:
    """A data set that is never read to its end: labels of 10^12 rows, images that take a while."""

    num_images, num_classes, declares_classes, label_column = 10**12, 10, True, "label"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.decoded = seconds, 0

    def labels(self) -> Any:
        for first in itertools.count(0, 65536):
            yield np.arange(first, first + 65536), pa.array([3] * 65536, pa.int64())

    def look_at(self, count: int) -> Any:
        for _ in range(count):
            self.decoded += 1
            time.sleep(self.seconds)
            yield SimpleNamespace(labels=torch.tensor([3]))


def test_it_ends_in_time_however_large_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.LABEL_SECONDS + preflight.PROBE_SECONDS < 8
    monkeypatch.setattr(preflight, "LABEL_SECONDS", 0.3)
    monkeypatch.setattr(preflight, "PROBE_SECONDS", 0.3)
    data: Any = Endless(0.1)
    start = time.monotonic()
    assert check(config_of("huge"), data, 1, run_folder=tmp_path) == []
    assert time.monotonic() - start < 5
    assert 2 <= data.decoded <= 4


def test_fewer_images_than_a_batch_are_a_warning(tmp_path: Path) -> None:
    write_splits(tmp_path / "data")
    config = dataclasses.replace(config_of(f"parquet:{tmp_path}/data"), batch_size=NUM_ROWS)
    assert checked(config, tmp_path) == []
    (warning,) = checked(dataclasses.replace(config, batch_size=NUM_ROWS + 1), tmp_path)
    assert "has 50 images and each batch takes 51: every batch repeats images" in warning


def test_lanes_that_processes_do_not_divide_are_a_warning(tmp_path: Path) -> None:
    write_splits(tmp_path / "data")
    config = config_of(f"parquet:{tmp_path}/data", streaming=True, lanes=6)
    assert checked(config, tmp_path, world=3) == []
    (warning,) = checked(config, tmp_path, world=4)
    assert "the stream has 6 lanes, which 4 processes do not divide" in warning


def test_the_disk_is_measured_against_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config_of("digits"), keep=3)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(config.model).parameters())
    one, pipeline = 16 * parameters, 4 * parameters
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    data = open_data(config.data, (8, 8), 1)

    def verdict(num_bytes: int) -> str:
        free[0] = num_bytes
        try:
            return "warning" if check(config, data, 1, run_folder=tmp_path) else "fits"
        except ConfigError as error:
            assert str(tmp_path) in str(error) and "make room" in str(error) and "\n" not in str(error)
            return "refused"

    def edges(least: int, wanted: int) -> None:
        assert verdict(least - 1) == "refused"
        assert verdict(wanted) == "fits"
        if least < wanted:
            assert verdict(least) == verdict(wanted - 1) == "warning"

    edges(2 * one + pipeline, 4 * one + pipeline)
    for number in range(1, 4):  # what is there already need not fit again, but the next one always has to
        folder = tmp_path / "checkpoints" / f"step-{number:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(one))
        edges(one + pipeline, (4 - number) * one + pipeline)


def test_a_checkpoint_takes_as_much_as_is_reckoned_with(tmp_path: Path) -> None:
    from fastddpm.trainer import Trainer

    config = preset("digits", run=str(tmp_path / "run"), steps=1, sample_every=0)
    trainer = Trainer(config)
    trainer.train()
    parameters = sum(weight.numel() for weight in trainer.weights)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    # Of this small net the headers, 100 bytes for each tensor, are a tenth.
    assert preflight.CHECKPOINT_BYTES * parameters < size < 1.2 * preflight.CHECKPOINT_BYTES * parameters
    unet = sum(path.stat().st_size for path in (tmp_path / "run" / "unet").iterdir())
    assert preflight.PIPELINE_BYTES * parameters < unet < 1.2 * preflight.PIPELINE_BYTES * parameters


def bad_commands(tmp_path: Path) -> dict[str, tuple[list[str], int, str]]:
    """Arguments of `fastddpm`, its exit code and some words of its one line."""
    whole, empty = tmp_path / "whole.parquet", tmp_path / "empty.parquet"
    write_parquet(whole, range(8))
    pq.write_table(pq.read_table(whole).slice(0, 0), empty)
    out_of_range = labelled(tmp_path / "labels.parquet", [0, 1, 1, 5], ["a", "b"])
    train = ["train", "--preset", "digits", "--run", str(tmp_path / "run"), "--data.source"]
    return {
        "empty set": ([*train, f"parquet:{empty}"], 4, "has 0 rows"),
        "wrong column": ([*train, f"parquet:{whole}", "--data.image-column", "image"], 4, "no column image"),
        "label out of range": ([*train, out_of_range], 4, "label 5 (column label) of row 3"),
        "unknown key": ([*train, f"parquet:{whole}", "--data.colour", "red"], 5, "unknown option --data.colour"),
    }


@pytest.mark.parametrize("case", ["empty set", "wrong column", "label out of range", "unknown key"])
def test_what_cannot_be_trained_ends_with_a_line_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, code, words = bad_commands(tmp_path)[case]
    assert main(arguments) == code
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("fastddpm: error: ")]
    assert words in line and shown.out == ""


def test_it_does_so_in_less_than_ten_seconds(tmp_path: Path) -> None:
    """The one that comes latest, as a user sees it."""
    arguments, code, words = bad_commands(tmp_path)["label out of range"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-m", "fastddpm", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == code and words in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
    # Of the processor: others may keep it busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


class Stuck(Endless):
    """A remote set whose reads hang, in retries or for ever."""

    num_images: Any = 10**12

    def __init__(self, where: str) -> None:
        super().__init__(0)
        self.where, self.ended = where, threading.Event()

    def labels(self) -> Any:
        yield np.arange(5), pa.array([3] * 5, pa.int64())
        if self.where == "labels":
            self.ended.wait(60)

    def look_at(self, count: int) -> Any:
        yield SimpleNamespace(labels=torch.tensor([3]))
        if self.where == "images":
            self.ended.wait(60)


@pytest.mark.parametrize(
    ("where", "words"), [("labels", "only 5 were checked"), ("images", "after 0.4 s 1 images have been read")]
)
def test_reads_that_hang_are_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    assert preflight.LABEL_SECONDS + preflight.PROBE_SECONDS + 2 * preflight.GRACE_SECONDS < 9.5
    for name in ("LABEL_SECONDS", "PROBE_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(preflight, name, 0.2)
    data: Any = Stuck(where)
    start = time.monotonic()
    (warning,) = check(config_of("stuck"), data, 1, run_folder=tmp_path)
    assert time.monotonic() - start < 5 and words in warning
    data.ended.set()


def test_uncounted_streams_are_not_read_a_window_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows(shards: list[int]) -> Any:
        for _ in shards:
            for row in range(5000):
                read.append(row)
                yield {"img": {"bytes": png(picture(row % 7)), "path": None}, "label": row % 2}

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    stream = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"shards": [0]})
    monkeypatch.setitem(SOURCES, "slow", lambda location, config: stream)
    config = config_of("slow:x", streaming=True, shuffle_buffer=4000)
    (warning,) = checked(config, tmp_path)
    assert (
        warning.startswith("slow:x is a stream of one shard") and "within data.shuffle_buffer (4,000 images)" in warning
    )
    assert len(read) <= 256  # that are read at a time


@pytest.mark.parametrize("label", [2, -2])
def test_labels_of_streamed_parquet_files_are_checked(tmp_path: Path, label: int) -> None:
    """Neither the image that is tried of the row group nor one that the filter leaves out."""
    source = labelled(tmp_path / "a.parquet", [0, 1] * 20 + [7, label] + [0] * 18, ["a", "b"])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("use", pa.array([i != 40 for i in range(60)])), tmp_path / "a.parquet", 12)
    message = one_line(lambda: checked(config_of(source, streaming=True, filter="use"), tmp_path))
    assert f"label {label} (column label) of row 5 of row group 3 of " in message and "is not in 0 .. 1" in message
    source = labelled(tmp_path / "b.parquet", [0, None, 1, -1, 1], ["a", "b"])
    warnings = checked(dataclasses.replace(config_of(source, streaming=True), batch_size=4), tmp_path)
    assert warnings == [f"{source}: 2 of 5 images have no label (null or -1)"]


@pytest.mark.parametrize("label", [2, -2])
def test_labels_of_other_streams_are_checked_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int
) -> None:
    data = open_data(DataConfig(source="digits"), (8, 8), 1)
    found = SimpleNamespace(labels=torch.tensor([label]), rows=torch.tensor([3]))
    monkeypatch.setattr(data, "look_at", lambda count: iter([found]))
    monkeypatch.setattr(data, "num_classes", 2)
    monkeypatch.setattr(data, "labels", lambda: iter(()))
    message = one_line(lambda: check(config_of("digits"), data, 1, run_folder=tmp_path))
    assert f"label {label} (column label) of row 3 " in message


def test_a_machine_that_cannot_read_is_no_set_of_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "folder", [f"{row}.png" for row in range(9)])
    config = config_of(f"folder:{tmp_path}/folder", bad_image="skip")
    opened = open_data(dataclasses.replace(config.data, fit="resize"), (8, 8), 1)

    def fails(path: str, remote: bool) -> bytes:
        if path.endswith("3.png"):
            raise OSError(5, "Input/output error")
        return png(picture(1))

    monkeypatch.setattr(fastddpm.loader, "_file_bytes", fails)
    message = one_line(lambda: check(config, opened, 1, run_folder=tmp_path))
    assert "3.png" in message and "Input/output error" in message
