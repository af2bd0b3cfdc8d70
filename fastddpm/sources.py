"""Data sources: one function and one line of SOURCES each, all opened through the `datasets` library.

The library's exceptions, whatever their type, become one DataError line, and its bars and warnings stay off stderr,
which is the progress display. Several sources make one data set; of streamed parquet files the row groups are listed.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import fsspec
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.arrow_dataset import update_metadata_with_features
from datasets.fingerprint import Hasher
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from .errors import ConfigError, DataError
from .filters import Filter, rows_where
from .library import is_remote, library_errors, one_line, retried
from .order import spread
from .rowgroups import ROW_BITS, RowGroups, filter_row_groups, read_row_groups, read_rows
from .stored import digest_of, stored

if TYPE_CHECKING:
    from .data import DataConfig

KNOWN_FORMS = "digits, hub:ID, parquet:PATH, folder:DIR, or anything load_dataset reads"
_MOST_BLOCKS = 4096  # row groups whose labels are looked at
_THREADS = 16  # that read footers
_BATCH_ROWS = 256  # of a parquet file that are prepared together, where its first row group gives no number
_FILTER_ROWS = 65_536  # rows of a map-style set that are looked at together
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class ParquetStream(NamedTuple):
    """A streamed data set that is read from its parquet files without the library, which gives its features."""

    dataset: Any
    groups: RowGroups
    digest: str | None = None


class MapSet(NamedTuple):
    """A data set with random access, and a digest of the files that it was made of."""

    dataset: Any
    digest: str | None


class Part(NamedTuple):
    """One source, reduced to its image and label columns, which it gives undecoded, as Arrow tables."""

    name: str
    split: str
    dataset: Any
    """datasets.Dataset or, streamed, datasets.IterableDataset."""
    image_column: str
    label_column: str | None
    num_classes: int | None
    class_names: list[str] | None
    features: datasets.Features
    """Of these columns, images undecoded, and perhaps of more."""
    groups: RowGroups | None
    """Row groups of streamed parquet files."""
    kept: np.ndarray | None
    """int64: rows of a map-style set that pass the filter; None: all."""
    digest: str | None = None
    """Of the files, wherever they are: footers of parquet files, names and sizes in a folder; None: not known."""

    @property
    def schema(self) -> pa.Schema:
        """Of the columns as they are read."""
        names = [self.image_column, *([] if self.label_column is None else [self.label_column])]
        return datasets.Features({name: self.features[name] for name in names}).arrow_schema

    @property
    def num_blocks(self) -> int:
        """Row groups or shards of a streamed source."""
        return self.dataset.num_shards if self.groups is None else len(self.groups.sizes)

    @property
    def num_images(self) -> int | None:
        """Rows that are trained on; None of a stream whose rows are not counted."""
        if self.groups is not None:
            return int(self.groups.sizes.sum())
        if isinstance(self.dataset, datasets.IterableDataset):
            return None
        return len(self.dataset) if self.kept is None else len(self.kept)


class ImageSource(NamedTuple):
    """All sources of a data set as one."""

    parts: tuple[Part, ...]
    dataset: Any
    """Map-style: the rows of all sources, one after the other, before filtering; streamed: None."""
    image_column: str
    """Of dataset."""
    label_column: str | None
    rows: np.ndarray | None
    """int64 [num_images]: rows of dataset that pass the filter; None: all."""
    num_images: int | None
    num_classes: int | None
    class_names: list[str] | None
    warning: str | None

    def first_block(self, part: int) -> int:
        """The number of a streamed source's first row group or shard among those of all sources."""
        return sum(before.num_blocks for before in self.parts[:part])

    def streamed_labels(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """(rows int64 [n], as batches number them, and their labels) of row groups, the first few from all over."""
        blocks = [
            (part, self.first_block(number), block)
            for number, part in enumerate(self.parts)
            if part.groups is not None and part.label_column is not None
            for block in np.flatnonzero(part.groups.sizes).tolist()
        ]
        for place in spread(_MOST_BLOCKS, len(blocks)).tolist() if blocks else ():
            part, first, block = blocks[place]
            name, groups = part.label_column, part.groups
            schema = datasets.Features({name: part.features[name]}).arrow_schema
            kept = groups.rows_of(block)
            wanted = kept if kept is not None else np.arange(int(groups.sizes[block]), dtype=np.int64)
            for rows, table in read_rows(groups, block, schema, wanted, _FILTER_ROWS):
                yield (first + block) << ROW_BITS | rows, pa.concat_arrays(table.column(name).chunks)

    def name_row(self, row: int) -> str:
        """What messages call a row as batches number it."""
        part, text = self._name_row(row)
        name = _RowName(text)
        name.remote = _is_remote_source(part.name)
        return name

    def _name_row(self, row: int) -> tuple[Part, str]:
        if self.dataset is not None:
            for part in self.parts:
                if row < len(part.dataset):
                    return part, f"row {row} of split {part.split} of {part.name}"
                row -= len(part.dataset)
            raise IndexError(row)
        block, row = row >> ROW_BITS, row & ((1 << ROW_BITS) - 1)
        for part in self.parts:
            if block < part.num_blocks:
                break
            block -= part.num_blocks
        if part.groups is None:
            return part, f"row {row} of shard {block} of split {part.split} of {part.name}"
        path, group = part.groups.paths[int(part.groups.file[block])], int(part.groups.group[block])
        return part, f"row {row} of row group {group} of {path}, split {part.split} of {part.name}"


class _RowName(str):
    """What messages call a row, and whether its source is not of this machine."""

    remote = False


def may_name_file(row: str, path: str) -> bool:
    """Whether a row, as name_row calls it, may have its image in a local file: of a remote source in its cache only.

    Data that others have written could name any file of this machine.
    """
    if not getattr(row, "remote", False):
        return True
    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        datasets.config.EXTRACTED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    real = os.path.realpath(path)
    return any(real.startswith(os.path.join(os.path.realpath(cache), "")) for cache in caches)


def _is_remote_source(source: str) -> bool:
    scheme = source.partition(":")[0]
    if scheme in SOURCES and scheme != "hub":
        return False
    return scheme == "hub" or is_remote(source) or not os.path.exists(os.path.expanduser(source))


def open_images(config: DataConfig) -> ImageSource:
    """Opens the sources and finds their columns by type or name. DataError or ConfigError, one line."""
    rule = None if config.filter is None else Filter(config.filter)
    parts = [_open_part(replace(config, source=source), rule) for source in (config.source, *config.mix)]
    warning = None
    if len(parts) > 1 and any(part.label_column for part in parts):
        first = parts[0]
        if any(part.label_column is None or part.class_names != first.class_names for part in parts):
            warning = "labels are left out: " + "; ".join(
                f"{part.name} has {'none' if part.label_column is None else _shown(part.class_names)}" for part in parts
            )
            parts = [part._replace(label_column=None, num_classes=None, class_names=None) for part in parts]
    counts = [part.num_images for part in parts]
    if len(parts) > 1 and not config.weights and None in counts:
        name = parts[counts.index(None)].name
        raise ConfigError(f"data.weights is not set and {name} does not tell how many images it has: give weights")
    classes = [part.num_classes for part in parts]
    dataset, image_column, label_column = None, parts[0].image_column, parts[0].label_column
    if not config.streaming:
        dataset, image_column, label_column = _concatenated(parts)
    return ImageSource(
        tuple(parts),
        dataset,
        image_column,
        label_column,
        None if config.streaming else _kept_of_all(parts),
        None if None in counts else sum(count for count in counts if count is not None),
        None if None in classes else max(number for number in classes if number is not None),
        parts[0].class_names,
        warning,
    )


def _shown(names: list[str] | None) -> str:
    if names is None:
        return "plain numbers"
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _open_part(config: DataConfig, rule: Filter | None) -> Part:
    """One source."""
    opened = _open_source(config)
    dataset, groups, digest = opened, None, None
    if isinstance(opened, ParquetStream):
        dataset, groups, digest = opened
    elif isinstance(opened, MapSet):
        dataset, digest = opened
    if (not config.streaming and len(dataset) == 0) or (groups is not None and not groups.sizes.sum()):
        raise DataError(f"{config.source}: split {config.split} has 0 rows")
    with library_errors(config.source):
        features = dataset.features if dataset.features is not None else dataset._resolve_features().features
    if not features:
        raise DataError(f"{config.source}: split {config.split} has 0 rows or no columns")
    image_column = _find_image_column(features, config)
    label_column = _find_label_column(features, config)
    kept = None
    if rule is not None:
        if config.streaming and groups is None:
            raise DataError(
                f"{config.source}: data.filter needs to know the rows, which this stream does not tell: leave out "
                "--data.streaming, or store the data as parquet"
            )
        with library_errors(config.source):
            if groups is not None:
                groups = filter_row_groups(groups, rule, features, config.source)
            else:
                kept = _filtered(dataset, rule, features, config.source)
        if not (groups.sizes.sum() if groups is not None else len(kept if kept is not None else ())):
            raise DataError(f"{config.source}: data.filter={rule.shown()} leaves 0 rows of split {config.split}")
    with library_errors(config.source):
        dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
        if isinstance(features[image_column], datasets.Image):
            # Decoded by us and not by the library, so that errors name the file or the row.
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        dataset = dataset.with_format("arrow")
        num_images = None if config.streaming else len(dataset)
        num_classes, class_names = _classes(dataset, features, label_column, num_images)
        chosen = datasets.Features({name: features[name] for name in (image_column, label_column) if name is not None})
        if isinstance(features[image_column], datasets.Image):
            chosen[image_column] = datasets.Image(decode=False)
    return Part(
        config.source,
        config.split,
        dataset,
        image_column,
        label_column,
        num_classes,
        class_names,
        chosen,
        groups,
        kept,
        digest,
    )


def _filtered(dataset: Any, rule: Filter, features: datasets.Features, source: str) -> np.ndarray:
    """The rows of a map-style set for which `rule` holds, int64, ascending."""
    condition = rule.expression(features, source)
    columns = dataset.select_columns(list(rule.columns)).with_format("arrow")

    def evaluate() -> dict[str, np.ndarray]:
        firsts = range(0, len(columns), _FILTER_ROWS)
        kept = [rows_where(columns[first : first + _FILTER_ROWS], condition, first) for first in firsts]
        return {"rows": np.concatenate(kept)}

    return stored({"dataset": dataset._fingerprint, "filter": rule.key(features)}, evaluate)["rows"]


def _concatenated(parts: list[Part]) -> tuple[Any, str, str | None]:
    """All rows of map-style sources under the first one's names: (data set, image column, label column)."""
    first = parts[0]
    if len(parts) == 1:
        return first.dataset, first.image_column, first.label_column
    label = first.label_column
    if label == first.image_column or label is None:
        label = None
    sets = []
    for part in parts:
        with library_errors(part.name):
            names = {part.image_column: first.image_column}
            if label is not None and part.label_column is not None:
                names[part.label_column] = label
            dataset = part.dataset.select_columns(list(names))
            # By way of names that nothing else has: one source's image column may be called as another's labels are.
            dataset = dataset.rename_columns({name: f"fastddpm {new}" for name, new in names.items()})
            dataset = dataset.rename_columns({f"fastddpm {new}": new for new in names.values()})
            kinds = [source.features[source.image_column] for source in (first, part)]
            if _pixel_dtype(kinds[0]) is None and _pixel_dtype(kinds[1]) is None:
                dataset = dataset.cast_column(first.image_column, datasets.Image(decode=False))
            elif kinds[0] != kinds[1]:
                raise DataError(
                    f"{first.name} has images as {kinds[0]} and {part.name} as {kinds[1]}: mixed sources need "
                    "images of one kind, arrays of one shape, or --data.streaming"
                )
            if label is not None:
                dataset = _as_plain_integers(dataset, label)
            sets.append(dataset.with_format(None))
    with library_errors(", ".join(part.name for part in parts)):
        return datasets.concatenate_datasets(sets).with_format("arrow"), first.image_column, label


def _as_plain_integers(dataset: Any, column: str) -> Any:
    """A map-style set whose labels are declared int64 instead of classes, for one type in all sources.

    Dataset.cast_column would write the whole data set again, images and all, into the library's cache.
    """
    dataset = copy.deepcopy(dataset)  # tables are shared
    dataset._info.features[column] = datasets.Value("int64")
    dataset._data = dataset._data.cast(dataset.features.arrow_schema)
    dataset._data = update_metadata_with_features(dataset._data, dataset.features)
    dataset._fingerprint = Hasher.hash([dataset._fingerprint, "int64", column])
    return dataset


def _kept_of_all(parts: list[Part]) -> np.ndarray | None:
    """Rows of the concatenated sources that pass the filter."""
    if all(part.kept is None for part in parts):
        return None
    starts = np.cumsum([0] + [len(part.dataset) for part in parts])
    kept = [part.kept for part in parts if part.kept is not None]
    return np.concatenate([start + rows for start, rows in zip(starts, kept, strict=False)])


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
    """The data set of one source: a MapSet, datasets.Dataset or, streamed, an IterableDataset or a ParquetStream."""
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
        if config.streaming:
            return dataset.to_iterable_dataset()
        return MapSet(dataset, digest_of(pixels, digits.target.astype(np.int64)))


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
    # Streamed, they are read and remembered later.
    files = {s: [name for name in files[s] if config.streaming or _num_rows(name, config)] for s in wanted}
    for split, kept in files.items():
        if not kept:
            raise DataError(f"{config.source}: split {split} has 0 rows")
    patterns = {split: [glob.escape(name) for name in kept] for split, kept in files.items()}
    more: dict[str, Any] = {}
    if not config.streaming and any(_begins_empty(name) for kept in files.values() for name in kept):
        more["batch_size"] = _BATCH_ROWS  # datasets takes the first row group's, of which there are none
    return _build(config, "parquet", data_files=patterns, **more)


def _num_rows(path: str, config: DataConfig) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except Exception as error:
        raise DataError(f"{config.source}: {path} is not a readable parquet file: {one_line(error)}") from error


def _begins_empty(path: str) -> bool:
    metadata = pq.read_metadata(path)
    return metadata.num_row_groups > 0 and metadata.row_group(0).num_rows == 0


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
    if config.streaming:  # a stream is one shard in the order of classes, without shuffling
        raise ConfigError(
            f"data.streaming: {config.source} has random access and nothing of it is copied: leave out --data.streaming"
        )
    splits = {split: sorted(holders.intersection(names)) for split, names in _SPLIT_FOLDERS.items()}
    patterns = {"train": [f"{glob.escape(path)}/**"]}
    if sum(len(names) for names in splits.values()) == len(holders):
        patterns = {s: [f"{glob.escape(path)}/{name}/**" for name in names] for s, names in splits.items() if names}
    _split_names(config, list(patterns))
    # All splits are listed, since class numbers come from the folders of all of them; images are not read.
    return _build(config, "imagefolder", folder=path, data_files=patterns)


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


def _build(config: DataConfig, path: str, folder: str | None = None, **arguments: Any) -> Any:
    """load_dataset in its two halves, so that a missing split is noticed before anything is downloaded.

    folder: what the names of an imagefolder's files are relative to.
    """
    with library_errors(config.source, bars=path not in ("parquet", "imagefolder")):
        builder = datasets.load_dataset_builder(path, **arguments)
        if known := list(builder.info.splits or builder.config.data_files or ()):
            _split_names(config, [str(split) for split in known])
        if config.streaming and isinstance(builder, Parquet):
            files = {str(split): names for split, names in builder.config.data_files.items()}
            groups = read_row_groups(map(str, files[config.split]), config.source)  # names a file that cannot be read
            paths, stamp = groups.paths, groups.stamp
            digest = stored({"footer digests": stamp}, lambda: {"digest": _footer_digest(paths, config.source)})
            streamed = builder.as_streaming_dataset(split=config.split)
            return ParquetStream(streamed, groups, digest["digest"].tobytes().hex())
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split)
        builder.download_and_prepare()
        return MapSet(builder.as_dataset(split=config.split), _digest_of_files(builder, config, folder))


def _digest_of_files(builder: Any, config: DataConfig, folder: str | None) -> str | None:
    """Of a map-style set's files; None where they are not on this machine or tell nothing."""
    names = [part.partition("[")[0].strip() for part in config.split.split("+")]
    files = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    paths = [path for name in names for path in files.get(name, ())]
    if not paths or any(is_remote(path) for path in paths):
        return None
    if isinstance(builder, Parquet):
        return _footer_digest(tuple(paths), config.source).tobytes().hex()
    if folder is not None:
        return digest_of([[os.path.relpath(path, folder), os.path.getsize(path)] for path in paths])
    return None


def _footer_digest(paths: tuple[str, ...], source: str) -> np.ndarray:
    """int64 [4], the SHA-256 of sizes and footers of parquet files in their order.

    A footer has sizes, places and statistics of all columns of all row groups, and nothing of where the file is.
    """

    def of_file(path: str) -> bytes:
        def read() -> bytes:
            system, inner = fsspec.core.url_to_fs(path)
            with system.open(inner, "rb", cache_type="none") if is_remote(path) else open(path, "rb") as file:
                size = file.seek(-8, os.SEEK_END) + 8
                footer = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - 8 - footer))
                return hashlib.sha256(size.to_bytes(8, "little") + file.read(footer)).digest()

        return retried(read, path, is_remote(path))

    with library_errors(source), ThreadPoolExecutor(_THREADS) as pool:
        whole = hashlib.sha256(b"".join(pool.map(of_file, paths)))
    return np.frombuffer(whole.digest(), dtype=np.int64)


def _split_names(config: DataConfig, known: list[str]) -> list[str]:
    """The names in a split expression such as "train[:10%]+test"; DataError for one that is not known."""
    names = [part.partition("[")[0].strip() for part in config.split.split("+")]
    for name in names:
        if name not in known:
            raise DataError(f"{config.source}: no split {name or repr(config.split)}; it has {', '.join(known)}")
    if config.streaming and names != [config.split]:
        raise DataError(f"{config.source}: data.split={config.split} cannot be streamed, only a whole split can")
    return list(dict.fromkeys(names))


def _find_image_column(features: datasets.Features, config: DataConfig) -> str:
    """The column named by the config, or the only one of type Image or, failing that, of uint8 arrays; or DataError."""
    name = config.image_column
    if name is not None:
        feature = _feature(features, name, "data.image_column", config)
        if _pixel_dtype(feature) is not None:
            _check_dtype(feature, name, config)
            return name
        struct = isinstance(feature, dict) and ("bytes" in feature or "path" in feature)
        encoded = getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")
        if not (isinstance(feature, datasets.Image) or struct or encoded):
            raise DataError(
                f"{config.source}: column {name} (data.image_column) holds {_type_name(feature)}, not images, encoded "
                f"bytes, paths or arrays of uint8; columns: {_describe(features)}"
            )
        return name
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        found = [name for name, feature in features.items() if _pixel_dtype(feature) is not None]
        if len(found) == 1:
            _check_dtype(features[found[0]], found[0], config)
    if not found:
        raise DataError(
            f"{config.source}: no column of type Image; columns: {_describe(features)}; "
            "name one that holds encoded images with data.image_column"
        )
    if len(found) > 1:
        raise DataError(f"{config.source}: several image columns: {', '.join(found)}; choose one by data.image_column")
    return found[0]


def _pixel_dtype(feature: Any) -> str | None:
    """The dtype of arrays and nested lists of numbers with two or three axes; None of any other feature."""
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return str(feature.dtype)
    axes = 0
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature, axes = feature.feature, axes + 1
    return str(feature.dtype) if axes in (2, 3) and isinstance(feature, datasets.Value) else None


def _check_dtype(feature: Any, name: str, config: DataConfig) -> None:
    if (dtype := _pixel_dtype(feature)) != "uint8":
        raise DataError(f"{config.source}: column {name} holds arrays of {dtype}, not uint8: convert them to 0 .. 255")


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
