"""Sources: every form of data.source, and the one line that each bad input gets."""

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
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
    write_folder,
    write_parquet,
    write_splits,
)

from fastddpm.data import DataConfig, open_data, resolve_source
from fastddpm.errors import ConfigError, DataError
from fastddpm.sources import SOURCES


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("parquet [1]"))


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
        assert data.num_images == num_images
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
