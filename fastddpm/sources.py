"""Data sources: one function and one line of SOURCES each, all opened through the `datasets` library.

The library's exceptions, whatever their type, become one DataError line, and its bars and warnings stay off stderr,
which is the progress display.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import huggingface_hub.utils
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from .data import DataConfig

KNOWN_FORMS = "digits, hub:ID, parquet:PATH, folder:DIR, or anything load_dataset reads"
_LOGGERS = ("datasets", "huggingface_hub")
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class ImageSource(NamedTuple):
    """A data set reduced to its image and label columns, which it gives undecoded, as Arrow tables."""

    dataset: Any
    """datasets.Dataset or, streamed, datasets.IterableDataset."""
    image_column: str
    label_column: str | None
    num_images: int | None
    """Rows, None when streamed."""
    num_classes: int | None
    class_names: list[str] | None


def open_images(config: DataConfig) -> ImageSource:
    """Opens the source and finds its columns by type or name. DataError or ConfigError, one line."""
    dataset = _open_source(config)
    num_images = None if config.streaming else len(dataset)
    if num_images == 0:
        raise DataError(f"{config.source}: split {config.split} has 0 rows")
    with library_errors(config.source):
        features = dataset.features if dataset.features is not None else dataset._resolve_features().features
    if not features:
        raise DataError(f"{config.source}: split {config.split} has 0 rows or no columns")
    image_column = _find_image_column(features, config)
    label_column = _find_label_column(features, config)
    with library_errors(config.source):
        dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
        if isinstance(features[image_column], datasets.Image):
            # Decoded by us and not by the library, so that errors name the file or the row.
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        dataset = dataset.with_format("arrow")
        num_classes, class_names = _classes(dataset, features, label_column, num_images)
    return ImageSource(dataset, image_column, label_column, num_images, num_classes, class_names)


def _classes(
    dataset: Any, features: datasets.Features, label_column: str | None, num_images: int | None
) -> tuple[int | None, list[str] | None]:
    """(num_classes, class_names) of the label column: as declared or, of plain integers, counted up to the largest."""
    if label_column is None:
        return None, None
    feature = features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.num_classes, list(feature.names) if feature.names else None
    if num_images is None:
        return None, None
    largest = pc.max(dataset.select_columns([label_column])[:][label_column]).as_py()
    return (int(largest) + 1 if largest is not None and largest >= 0 else None), None


def _open_source(config: DataConfig) -> Any:
    """The data set of a config: a datasets.Dataset, or an IterableDataset when streamed. DataError or ConfigError."""
    if not config.source:
        raise ConfigError(f"data.source is empty: name the images to train on ({KNOWN_FORMS})")
    scheme, separator, location = config.source.partition(":")
    if scheme not in SOURCES:
        return _open_any(config.source, config)
    if bool(location) != (scheme != "digits") or (separator and not location):
        raise ConfigError(f"data.source={config.source} is not one of {KNOWN_FORMS}")
    if config.config is not None and scheme != "hub":
        raise ConfigError(f"data.config={config.config}: {config.source} has no configurations to choose from")
    return SOURCES[scheme](location, config)


def _open_digits(location: str, config: DataConfig) -> Any:
    """scikit-learn's load_digits, 1,797 scans of 8x8 pixels, 0..16 scaled to 0..255 and stored as PNG."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'fastddpm[digits]'") from error
    if config.split != "train":
        raise DataError(f"digits: no split {config.split}; it has train (all of them)")
    digits = load_digits()
    # round(v * 255 / 16) in integers; the only tie, v = 8, goes up
    pixels = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    encoded = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    with library_errors("digits"):
        dataset = datasets.Dataset.from_dict({"image": encoded, "label": digits.target.tolist()}, features=features)
        return dataset.to_iterable_dataset() if config.streaming else dataset


def _open_hub(location: str, config: DataConfig) -> Any:
    """A data set of the Hugging Face Hub."""
    if os.path.exists(location):
        raise DataError(
            f"{config.source}: load_dataset would read the local {os.path.abspath(location)} instead; run from another "
            "folder, or name the local data by parquet: or folder:"
        )
    return _build(config, location, name=config.config)


def _open_any(location: str, config: DataConfig) -> Any:
    """Whatever load_dataset makes of the name."""
    if os.path.isfile(os.path.join(location, "state.json")):
        raise DataError(f"{location} was written by save_to_disk: save it with to_parquet and name it parquet:PATH")
    try:
        return _build(config, os.path.expanduser(location), name=config.config)
    except DataError as error:
        if isinstance(error.__cause__, OSError):  # nothing of that name here or on the Hub
            raise DataError(f"{error} (a source is {KNOWN_FORMS})") from error
        raise


def _open_parquet(location: str, config: DataConfig) -> Any:
    """Local parquet files. Only files of the wanted split are read."""
    path = os.path.expanduser(location)
    if os.path.isdir(path):
        with library_errors(config.source):
            if not any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names):
                raise DataError(f"{config.source}: the folder holds no .parquet files")
            builder = datasets.load_dataset_builder("parquet", data_dir=glob.escape(path))
        files = {str(split): sorted(names) for split, names in builder.config.data_files.items()}
        files = {split: [name for name in names if name.endswith(".parquet")] for split, names in files.items()}
        files = {split: names for split, names in files.items() if names}
    else:
        names = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        files = {"train": sorted(name for name in names if os.path.isfile(name))}
        if not files["train"]:
            raise DataError(f"{config.source}: no such file or folder: {os.path.abspath(path)}")
    wanted = _split_names(config, list(files))
    # Footers are read here to name a damaged file, and because datasets stops at a file whose first row group is empty.
    files = {split: [name for name in files[split] if _num_rows(name, config)] for split in wanted}
    for split, kept in files.items():
        if not kept:
            raise DataError(f"{config.source}: split {split} has 0 rows")
    patterns = {split: [glob.escape(name) for name in kept] for split, kept in files.items()}
    return _build(config, "parquet", data_files=patterns)


def _num_rows(path: str, config: DataConfig) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except Exception as error:
        raise DataError(f"{config.source}: {path} is not a readable parquet file: {one_line(error)}") from error


def _open_folder(location: str, config: DataConfig) -> Any:
    """A folder (or an archive) of images, its subfolders the classes if all are at one depth: datasets' imagefolder.

    The folder is one split, train, unless every subfolder with images in it is called by the name of a split: a class
    folder `test tubes` must not silently become a test split, as it does in imagefolder left alone.
    """
    path = os.path.abspath(os.path.expanduser(location))
    if os.path.isfile(path):
        with library_errors(config.source):
            path = datasets.DownloadManager().extract(path)
        if os.path.isfile(path):
            raise DataError(f"{config.source}: neither a folder nor an archive of images")
    if not os.path.isdir(path):
        raise DataError(f"{config.source}: no such folder: {path}")
    holders = {os.path.relpath(folder, path).split(os.sep)[0] for folder in _folders_with_images(path)}
    if not holders:
        raise DataError(f"{config.source}: the folder holds no image files that PIL reads")
    splits = {split: sorted(holders.intersection(names)) for split, names in _SPLIT_FOLDERS.items()}
    patterns = {"train": [f"{glob.escape(path)}/**"]}
    if sum(len(names) for names in splits.values()) == len(holders):
        patterns = {s: [f"{glob.escape(path)}/{name}/**" for name in names] for s, names in splits.items() if names}
    _split_names(config, list(patterns))
    # All splits are listed, since class numbers come from the folders of all of them; images are not read.
    return _build(config, "imagefolder", data_files=patterns)


def _folders_with_images(path: str) -> Iterator[str]:
    """Folders below `path`, itself included, that hold image files, as imagefolder sees them (hidden ones are not)."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    extensions = tuple(ImageFolder.EXTENSIONS)
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
        if any(name.lower().endswith(extensions) and not name.startswith(".") for name in names):
            yield folder


SOURCES: dict[str, Callable[[str, DataConfig], Any]] = {
    "digits": _open_digits,
    "hub": _open_hub,
    "parquet": _open_parquet,
    "folder": _open_folder,
}


def _build(config: DataConfig, path: str, **arguments: Any) -> Any:
    """load_dataset in its two halves, so that a missing split is noticed before anything is downloaded."""
    with library_errors(config.source, bars=path not in ("parquet", "imagefolder")):
        builder = datasets.load_dataset_builder(path, **arguments)
        if known := list(builder.info.splits or builder.config.data_files or ()):
            _split_names(config, [str(split) for split in known])
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split)


def _split_names(config: DataConfig, known: list[str]) -> list[str]:
    """The names in a split expression such as "train[:10%]+test"; DataError for one that is not known."""
    names = [part.partition("[")[0].strip() for part in config.split.split("+")]
    for name in names:
        if name not in known:
            raise DataError(f"{config.source}: no split {name or repr(config.split)}; it has {', '.join(known)}")
    if config.streaming and names != [config.split]:
        raise DataError(f"{config.source}: data.split={config.split} cannot be streamed, only a whole split can")
    return list(dict.fromkeys(names))


class _Mute(logging.Filter):
    """Drops every record. A filter on the handler costs 1 us; setting a level clears all loggers' caches, 0.2 ms."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


@contextlib.contextmanager
def library_errors(source: str, bars: bool = False) -> Iterator[None]:
    """Around calls of datasets and pyarrow: any exception becomes one DataError line, and stderr stays quiet.

    bars: leave the progress bars of long downloads on, where a person is watching the first process.
    """
    bars = bars and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]:
            mute = _Mute()
            handler.addFilter(mute)
            undo.callback(handler.removeFilter, mute)
        if not bars:
            for library in (datasets, huggingface_hub.utils):
                if not library.are_progress_bars_disabled():
                    library.disable_progress_bars()
                    undo.callback(library.enable_progress_bars)
        try:
            yield
        except (DataError, ConfigError):
            raise
        except Exception as error:
            raise DataError(f"{source}: {one_line(error)}") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of an exception, or of the one that caused it where datasets says no more, on one line."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())
    message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."


def _find_image_column(features: datasets.Features, config: DataConfig) -> str:
    """The column named by the config or the only one of type Image; DataError otherwise."""
    name = config.image_column
    if name is not None:
        feature = _feature(features, name, "data.image_column", config)
        struct = isinstance(feature, dict) and ("bytes" in feature or "path" in feature)
        encoded = getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")
        if not (isinstance(feature, datasets.Image) or struct or encoded):
            raise DataError(
                f"{config.source}: column {name} (data.image_column) holds {_type_name(feature)}, not images, encoded "
                f"bytes or paths; columns: {_describe(features)}"
            )
        return name
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise DataError(
            f"{config.source}: no column of type Image; columns: {_describe(features)}; "
            "name one that holds encoded images with data.image_column"
        )
    if len(found) > 1:
        raise DataError(f"{config.source}: several image columns: {', '.join(found)}; choose one by data.image_column")
    return found[0]


def _find_label_column(features: datasets.Features, config: DataConfig) -> str | None:
    """The column named by the config, or the only one of type ClassLabel, or None; DataError otherwise."""
    name = config.label_column
    if name is not None:
        feature = _feature(features, name, "data.label_column", config)
        dtype = str(getattr(feature, "dtype", ""))
        if not (isinstance(feature, datasets.ClassLabel) or dtype.startswith(("int", "uint")) or dtype == "bool"):
            raise DataError(
                f"{config.source}: column {name} (data.label_column) holds {_type_name(feature)}, not ClassLabel or "
                f"integers; columns: {_describe(features)}"
            )
        return name
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise DataError(f"{config.source}: several label columns: {', '.join(found)}; choose one by data.label_column")
    return found[0] if found else None


def _feature(features: datasets.Features, name: str, option: str, config: DataConfig) -> Any:
    if name not in features:
        raise DataError(f"{config.source}: no column {name} ({option}); columns: {_describe(features)}")
    return features[name]


def _type_name(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _describe(features: datasets.Features) -> str:
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
