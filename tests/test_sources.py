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
from fastddpm.filters import Filter
from fastddpm.sources import SOURCES, open_images


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


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/0.png", "cat/1.png", "dog/2.png"], ["cat", "dog"]),
        (["0.png", "1.png", "2.png"], None),
        # Not a split of one image and a class: imagefolder left alone would train on test tubes only.
        (["cat/0.png", "test tubes/1.png", "train/2.png"], ["cat", "test tubes", "train"]),
    ],
)
def test_folders(tmp_path: Path, names: list[str], classes: list[str] | None) -> None:
    folder = write_folder(tmp_path / "my [photos] train", names)
    (folder / "notes.txt").write_text("not an image")
    data = open_data(DataConfig(source=f"folder:{folder}"), (8, 8), 3)
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


def test_archive_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", ["cat/0.png", "dog/1.png"])
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", folder)
    data = open_data(DataConfig(source=f"folder:{archive}"), (8, 8), 3)
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
    config = DataConfig(
        source=str(tmp_path) if streaming else f"folder:{tmp_path}", fit="resize_crop", streaming=streaming
    )
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
        ({"source": "digits"}, (8, 8), 0, "0 channels"),
        ({"source": "digits"}, (0, 8), 1, "0x8"),
    ],
)
def test_values_that_cannot_be_run(fields: dict, size: tuple[int, int], channels: int, words: str) -> None:
    assert words in one_line(lambda: open_data(DataConfig(**fields), size, channels), ConfigError)


def with_column(path: Path, name: str, values: pa.Array, group: int | None = None) -> str:
    images = [png(picture(row)) for row in range(len(values))]
    pq.write_table(pa.table({"img": images, name: values}), path, row_group_size=group)
    return f"parquet:{path}"


def rows_kept(source: str, text: str, streaming: bool = False) -> list[int]:
    """Rows in the file that pass a filter."""
    config = DataConfig(source=source, image_column="img", streaming=streaming, lanes=1, filter=text)
    part = open_images(config).parts[0]
    kept = part.groups.kept if part.groups is not None else part.kept
    assert kept is not None
    return kept.tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_filters_that_differ_in_the_middle_have_each_their_own_rows(tmp_path: Path, streaming: bool) -> None:
    """pyarrow writes the middle of a long list as an ellipsis."""
    source = with_column(tmp_path / "a.parquet", "number", pa.array(range(60)))
    for left_out in (14, 15, 16):
        wanted = [number for number in range(30) if number != left_out]
        assert rows_kept(source, f"number in {wanted}", streaming) == wanted


def test_the_key_of_a_filter_has_types_and_classes() -> None:
    rule = Filter("label == 'a'")
    keys = [
        rule.key(datasets.Features({"label": kind}))
        for kind in (datasets.ClassLabel(names=["a", "b"]), datasets.ClassLabel(names=["b", "a"]))
    ]
    keys += [rule.key(datasets.Features({"label": datasets.Value(kind)})) for kind in ("string", "large_string")]
    assert len({str(key) for key in keys}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_values_pass_neither_a_list_nor_its_negation(tmp_path: Path, streaming: bool) -> None:
    source = with_column(tmp_path / "a.parquet", "number", pa.array([0, 1, None, 2]))
    assert rows_kept(source, "number in (0, 1)", streaming) == [0, 1]
    assert rows_kept(source, "not (number in (0, 1))", streaming) == [3]
    assert rows_kept(source, "number not in (0, 1)", streaming) == [3]
    assert rows_kept(source, "not (number not in (0, 1))", streaming) == [0, 1]
    assert rows_kept(source, "not (number in (0, 1) and number == 0)", streaming) == [1, 3]


def test_float32_is_compared_in_its_own_precision(tmp_path: Path) -> None:
    source = with_column(tmp_path / "a.parquet", "score", pa.array([0.1, 0.5, 3], pa.float32()))
    assert rows_kept(source, "score == 0.1") == [0]
    assert rows_kept(source, "0.1 < score") == [1, 2]
    assert rows_kept(source, "score in (0.1, 3)") == [0, 2]
    assert rows_kept(source, "score >= 3") == [2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "number == " + "9" * 40,
        f"number in (1, {10**30})",
        "not " * 3000 + "number == 1",
        "(" * 300 + "number == 1" + ")" * 300,
        "number == 'word'",
        "number in ('word',)",
    ],
)
def test_a_filter_that_cannot_be_evaluated_is_named(tmp_path: Path, streaming: bool, text: str) -> None:
    source = with_column(tmp_path / "a.parquet", "number", pa.array(range(6)))
    with pytest.raises(ConfigError) as caught:
        rows_kept(source, text, streaming)
    assert str(caught.value).startswith("data.filter") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_local_folder_is_not_streamed(tmp_path: Path) -> None:
    """A stream of it would be one shard in the order of classes."""
    write_folder(tmp_path / "a", ["cat/0.png", "dog/1.png"])
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "a")
    for name in ("a", "b.zip"):
        config = DataConfig(source=f"folder:{tmp_path}/{name}", streaming=True)
        message = one_line(lambda config=config: open_data(config, (8, 8), 3), ConfigError)
        assert f"folder:{tmp_path}/{name} has random access" in message and "leave out --data.streaming" in message


def test_mixing_labelled_sources_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": png(picture(row, 200, 200)), "path": None} for row in range(10)]
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", range(10), img=images)
        open_data(DataConfig(source=f"parquet:{tmp_path}/{name}.parquet"), (200, 200), 3)

    def written() -> dict[Path, int]:
        return {path: path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow")}

    before = written()
    assert len(before) == 2
    config = DataConfig(
        source=f"parquet:{tmp_path}/a.parquet",
        mix=(f"parquet:{tmp_path}/b.parquet",),
        cache_gb=0,
        filter="label == 'b'",
    )
    data = open_data(config, (200, 200), 3)
    (batch,) = data.batches(0, 0, 1, 10, workers=2)
    assert batch.labels is not None and set(batch.labels.tolist()) == {1} and data.class_names == ["a", "b"]
    for row, pixels in zip(batch.rows.tolist(), image_bytes(batch), strict=True):
        assert pixels == picture(row % 10, 200, 200).tobytes()
    assert written() == before
    again = open_data(config, (200, 200), 3)
    assert again._source.dataset._fingerprint == data._source.dataset._fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_identity_is_that_of_the_files_wherever_they_are(tmp_path: Path, streaming: bool) -> None:
    def identity(folder: str) -> str:
        return open_data(DataConfig(source=f"parquet:{tmp_path}/{folder}", streaming=streaming), (8, 8), 3).identity

    write_splits(tmp_path / "a")
    first = identity("a")
    assert identity("a") == first
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert identity("b") == first
    images = [{"bytes": png(picture(row + 100, 9, 8)), "path": f"{row}.png"} for row in range(20)]
    write_parquet(tmp_path / "b" / "train-00001-of-00003.parquet", range(17, 37), img=images)
    assert identity("b") != first
    # Other rows under the same names: as many of them, in files of the same order.
    shutil.copy(tmp_path / "a" / "train-00001-of-00003.parquet", tmp_path / "b" / "train-00001-of-00003.parquet")
    assert identity("b") == first


def test_identity_of_a_folder_is_names_and_sizes(tmp_path: Path) -> None:
    def identity(folder: str) -> str:
        return open_data(DataConfig(source=f"folder:{tmp_path}/{folder}"), (8, 8), 3).identity

    write_folder(tmp_path / "a", ["cat/0.png", "dog/1.png"])
    first = identity("a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert identity("a") == identity("b") == first
    (tmp_path / "b" / "cat" / "0.png").write_bytes(png(picture(0, 9, 9)))
    assert identity("b") != first
    (tmp_path / "a" / "dog" / "1.png").rename(tmp_path / "a" / "dog" / "2.png")
    assert identity("a") != first


def test_digits_have_an_identity() -> None:
    assert open_images(DataConfig(source="digits")).parts[0].digest == "6b1a97b404052130d7350e721d24e20f"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_may_begin_with_an_empty_row_group(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "whole.parquet", range(6))
    whole = pq.read_table(tmp_path / "whole.parquet")
    with pq.ParquetWriter(tmp_path / "a.parquet", whole.schema) as writer:
        for table in (whole.slice(0, 0), whole.slice(0, 2), whole.slice(0, 0), whole.slice(2)):
            writer.write_table(table)
    assert pq.read_metadata(tmp_path / "a.parquet").row_group(0).num_rows == 0
    data = open_data(DataConfig(source=f"parquet:{tmp_path}/a.parquet", streaming=streaming, lanes=1), (8, 8), 3)
    (batch,) = data.batches(0, 0, 1, 6, workers=0)
    assert sorted(image_bytes(batch)) == sorted(picture(row).tobytes() for row in range(6))
