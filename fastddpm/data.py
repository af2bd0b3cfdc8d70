"""Training images: any source that the `datasets` library reads, in an order fixed by (seed, position).

Position p of the global sequence names one training example for ever, whatever the number of processes, accumulation
steps and loader workers (order.py says which), so that the data state of a run is one integer. Sources may be mixed,
filtered by a condition, and streamed; each keeps that promise in an order of its own. Images travel as uint8
NHWC memory; the noising kernel normalises them on the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from .errors import ConfigError, DataError
from .order import BatchPlan, MapOrder, Mixture, source_seed, spread

if TYPE_CHECKING:  # datasets takes 0.6 s to import, for which --help and sampling need not wait
    import pyarrow as pa

    from .loader import Decoder, MapReader, Share, StreamReader
    from .sources import ImageSource
    from .streams import LaneRows, ParquetPart, Stream

MOST_LANES = 64
"""Lanes of a streamed set where the config names no number, for up to so many processes."""
LANES_BYTES = 1 << 30
"""What the lanes of streamed parquet files hold together, at most, where the config does not name their number."""
MANY_BYTES = 4 << 30
"""From where on a warning says what they hold."""

Fit = Literal["exact", "resize", "crop", "resize_crop"]
BadImagePolicy = Literal["error", "skip"]

_LABELS = 65_536  # that are read at a time
_LOOKED_AT_IN_A_STREAM = 8  # images of one that has to be read through


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they reach the model's size."""

    source: str = ""
    (
        "The data set: digits (scikit-learn's handwritten digits), hub:ID (Hugging Face Hub), parquet:PATH (a "
        "folder, a glob or a file), folder:DIR (images, with or without class folders), or anything load_dataset reads."
    )
    config: str | None = None
    """Name of the data set's configuration, where a Hub data set has several."""
    split: str = "train"
    """Split to train on; load_dataset's slices such as train[:10%] work unless streamed."""
    streaming: bool = False
    (
        "Stream the data instead of preparing them in datasets' cache first: starts at once and needs no disk space. "
        "Of parquet files the row groups come in a new order each epoch and a resumed run opens those it is at; other "
        "streams are shuffled by shards, and what came before in them is read again on resume. Both shuffle rows "
        "within a buffer."
    )
    image_column: str | None = None
    """Column of the images or uint8 arrays; by default the one column of type Image, or failing that of arrays."""
    label_column: str | None = None
    """Column of the class labels; by default the one column of type ClassLabel, if there is one."""
    fit: Fit = "exact"
    (
        "How images reach the model's size: exact (others are refused, since scaling should be a decision), resize "
        "(stretch), crop (centre), resize_crop (scale the shorter side, then crop the centre). Scaling is antialiased."
    )
    flip: bool = True
    """Mirror each training image left to right with probability 1/2, drawn on the device at the sample's position."""
    augment: float = 0.0
    (
        "Probability of each geometric augmentation (flips, turns, scaling, shifts; Karras et al. 2022, appendix F.2), "
        "whose parameters the network is told, so that they do not leak into samples; 0.12 is theirs, 0 none."
    )
    workers: int = 2
    (
        "Loader processes per training process, which decode ahead of the training step; 0 decodes in the training "
        "process itself, and so does a set that the cache holds whole. The order does not depend on it."
    )
    cache_gb: float = 8.0
    (
        "Largest data set, in GB of uint8 pixels at the model's size, whose decoded images are kept beside datasets' "
        "cache and read from there ever after; 0 decodes anew each time. Streamed sets are not kept."
    )
    resident: bool = False
    (
        "Keep the whole decoded data set in the memory of each device: the step then waits for no data. Refused where "
        "it does not fit; not for streamed sets."
    )
    shuffle_buffer: int = 4096
    (
        "Examples that a streamed data set holds undecoded, over all lanes and processes, to shuffle within; sources "
        "mixed by data.weights hold so many each. The order depends on it."
    )
    lanes: int | None = None
    (
        "Parts into which a streamed data set is cut, read side by side; unset: 64, fewer of a small set, of few "
        "shards, or of large images in parquet files, for their memory. The order depends on it; the number of "
        "processes should divide it, so that each reads its own."
    )
    mix: tuple[str, ...] = ()
    """Further sources, mixed with `source`; each is written as a source is, and has the same split and columns."""
    weights: tuple[float, ...] = ()
    """Share of each source in the training sequence, `source` first; unset: by their numbers of images."""
    filter: str | None = None
    (
        'Train on the rows for which this holds, e.g. "label in (1, 7) and not blurred": comparisons of columns other '
        "than images, and, or, not, in. Evaluated once, into a stored index of rows."
    )
    background: str | None = None
    """Colour to put behind transparent images: a name or #rrggbb; unset, they are refused."""
    bad_image: BadImagePolicy = "error"
    (
        "What an image that cannot be used does: error ends the run and names it; skip takes another row in its place, "
        "the same on any number of processes, counts it, and ends the run above 0.1 %."
    )


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: torch.Tensor
    """uint8 [n, C, H, W] in NHWC memory (channels_last strides)."""
    labels: torch.Tensor | None
    """int64 [n], or None without a label column; -1 where a row has no label."""
    ordinals: torch.Tensor
    """int64 [n]: positions p in the global sequence, the addresses of t, flip, noise and dropout."""
    rows: torch.Tensor
    (
        "int64 [n]: the row of the split, counted on through mixed sources; streamed, row group or shard * 2^32 + row "
        "inside it. Always on the host. ImageData.name_row says what a row is called."
    )
    replaced: tuple[str, ...] = ()
    """What was wrong with images in whose place others were taken (data.bad_image=skip), which `rows` names."""


def open_data(config: DataConfig, size: tuple[int, int], channels: int) -> ImageData:
    """Opens the images of `config` for a model of size (H, W) and so many channels.

    Image files have 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA) of them; columns of uint8 arrays any number.

    Nothing is decoded here. Raises ConfigError for values that cannot be run and DataError, one line that names what
    is wrong and what there is, for data that cannot be opened or lack what the config asks for.
    """
    if channels < 1:
        raise ConfigError(f"a model of {channels} channels: images have at least 1")
    if config.background is not None and channels not in (1, 3):
        raise ConfigError(
            f"data.background is {config.background!r} and the model has {channels} channels: only those of 1 (gray) "
            "or 3 (RGB) are flattened; leave out --data.background"
        )
    if min(size) < 1:
        raise ConfigError(f"a model of size {size[0]}x{size[1]}: both must be at least 1")
    if config.workers < 0:
        raise ConfigError(f"data.workers is {config.workers}: it must be at least 0")
    if config.shuffle_buffer < 1:
        raise ConfigError(f"data.shuffle_buffer is {config.shuffle_buffer}: it must be at least 1")
    if not config.cache_gb >= 0:
        raise ConfigError(f"data.cache_gb is {config.cache_gb}: it must be at least 0")
    if config.resident and config.streaming:
        raise ConfigError("data.resident keeps a whole data set and data.streaming never has it: leave one of them out")
    if config.lanes is not None and config.lanes < 1:
        raise ConfigError(f"data.lanes is {config.lanes}: it must be at least 1")
    if config.bad_image not in get_args(BadImagePolicy):
        raise ConfigError(f"data.bad_image is {config.bad_image!r}: valid are {', '.join(get_args(BadImagePolicy))}")
    if config.weights and len(config.weights) != 1 + len(config.mix):
        raise ConfigError(
            f"data.weights has {len(config.weights)} numbers for {1 + len(config.mix)} sources (data.source and "
            "data.mix): give one for each, or none"
        )
    if not all(0 < weight < float("inf") for weight in config.weights):
        raise ConfigError(f"data.weights is {config.weights}: each must be a number above 0")
    if len(config.weights) > 1:
        Mixture(config.weights, 0)
    from .images import parse_background
    from .sources import open_images

    background = None if config.background is None else parse_background(config.background)
    return ImageData(config, open_images(config), size, channels, background)


def resolve_source(source: str) -> str:
    """The source with a local path in it made absolute, so that it means the same from another working directory."""
    scheme, _, location = source.partition(":")
    if scheme in ("parquet", "folder") and location:
        return f"{scheme}:{os.path.abspath(os.path.expanduser(location))}"
    if source and source != "digits" and scheme != "hub" and os.path.exists(os.path.expanduser(source)):
        return os.path.abspath(os.path.expanduser(source))
    return source


class ImageData:
    """An opened data set; open_data makes it.

    num_images: rows that are trained on, over all sources and after filtering; None of a stream that does not tell.
    num_classes and class_names: of the label column, each None where it is not known. warning: why labels are left out,
    what memory many lanes take, or why decoded images are not kept although they should be, known after batches.
    """

    def __init__(
        self,
        config: DataConfig,
        source: ImageSource,
        size: tuple[int, int],
        channels: int,
        background: tuple[int, int, int] | None = None,
    ) -> None:
        self.config = config
        self.size = size
        self.channels = channels
        self.num_images = source.num_images
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._source = source
        self._background = background
        self._last_mixture: Mixture | None = None  # with what it has dealt out
        self.warning = "; ".join(filter(None, (source.warning, self._much_memory()))) or None

    @cached_property
    def identity(self) -> str:
        """Digest of all that the order depends on besides the config: a resumed run must find the same."""
        from .stored import digest_of

        described: list[Any] = [2]  # raised where the order of the same data becomes another
        for part in self._source.parts:
            described.append(part.digest)
            if part.groups is not None:
                kept = part.groups.kept if part.groups.kept is not None else "all"
                described += ["parquet", part.groups.sizes, kept]
            elif part.num_images is None:
                described += ["shards", part.dataset.num_shards]
            else:
                described += ["rows", len(part.dataset), part.kept if part.kept is not None else "all"]
        if self.config.streaming:
            described += ["lanes", self.num_lanes, self.window]
        return digest_of(*described)

    def name_row(self, row: int) -> str:
        """What messages call a row of a Batch: file or shard and row group, row, split and source."""
        return self._source.name_row(row)

    @cached_property
    def num_lanes(self) -> int:
        """Lanes in which a streamed data set is read; 1 where it is not streamed.

        config.lanes, but no more than images and, of streams that do not tell their number, the largest divisor that is
        no more than a source's shards. Unset: 64, or the power of two that leaves a lane of a small set 64 images and
        that keeps what all lanes of parquet files hold decoded within LANES_BYTES.
        """
        if not self.config.streaming:
            return 1
        parts = self._source.parts
        lanes = self.config.lanes or MOST_LANES
        counts = [part.num_images for part in parts if part.num_images is not None]
        if counts:
            count = min(counts) if self.config.weights else sum(counts)
            lanes = min(lanes, count if self.config.lanes else 1 << max(1, count // MOST_LANES).bit_length() - 1)
        while self.config.lanes is None and lanes > 1 and lanes * self._lane_bytes > LANES_BYTES:
            lanes //= 2
        shards = [part.dataset.num_shards for part in parts if part.num_images is None]
        if shards:
            lanes = next(number for number in range(min(lanes, *shards), 0, -1) if lanes % number == 0)
        return lanes

    @property
    def _lane_bytes(self) -> int:
        """What a lane of streamed parquet files holds decoded at most: a page of a row group, of a mixture one each."""
        groups = [part.groups for part in self._source.parts if part.groups is not None]
        largest = [int(found.page_bytes[found.sizes > 0].max(initial=0)) for found in groups]
        return sum(largest) if self.config.weights else max(largest, default=0)

    def _much_memory(self) -> str | None:
        held = self.num_lanes * self._lane_bytes
        if not self.config.streaming or held <= MANY_BYTES:
            return None
        return (
            f"the stream's lanes ({self.num_lanes:,}) may hold {held / 1e9:.3g} GB, a page of up to 1,024 images each, "
            "over all processes: lower data.lanes, or write the files with smaller row groups"
        )

    @property
    def window(self) -> int:
        """Rows of a lane that are shuffled among themselves, in memory undecoded."""
        return max(1, self.config.shuffle_buffer // self.num_lanes)

    @property
    def num_blocks(self) -> int | None:
        """Row groups or shards of a streamed set; None where it is not streamed."""
        return sum(part.num_blocks for part in self._source.parts) if self.config.streaming else None

    @property
    def dropped_per_epoch(self) -> int | None:
        """Rows that each epoch leaves out, others every time; None of mixtures and of streams that do not tell."""
        if self.num_images is None or len(self.config.weights) > 1:
            return None
        return self.num_images % self.num_lanes

    @property
    def label_column(self) -> str | None:
        """The column of the class labels, if there is one; of several sources, the first one's."""
        return self._source.label_column

    @property
    def declares_classes(self) -> bool:
        """Whether the labels are declared as classes, where -1 stands for none, and are not plain integers."""
        return self.label_column is not None and self.class_names is not None

    def labels(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """(rows int64 [n], as in Batch, and their labels) of a map-style set, some at a time; nothing if streamed."""
        if self.label_column is None or self.config.streaming:
            return
        import pyarrow as pa

        column = self._source.dataset.select_columns([self.label_column])
        for first in range(0, len(column), _LABELS):
            table = column[first : first + _LABELS]
            labels = pa.concat_arrays(table.column(self.label_column).chunks)
            rows = np.arange(first, first + len(labels), dtype=np.int64)
            if self._source.rows is not None:
                begin, end = np.searchsorted(self._source.rows, (first, first + len(labels)))
                rows = self._source.rows[begin:end]
                labels = labels.take(pa.array(rows - first))
            if len(rows):
                yield rows, labels

    def rows_at(self, positions: np.ndarray, seed: int) -> np.ndarray | None:
        """The rows (as in Batch) at positions of the global sequence, both int64 [n], without reading any image.

        None where only reading tells: of streams whose rows are not counted.
        """
        if self.config.streaming:
            return self._stream(seed).rows(positions)
        numbers = self._map_order(seed).numbers(positions)
        return numbers if self._source.rows is None else self._source.rows[numbers]

    def look_at(self, count: int) -> Iterator[Batch | DataError]:
        """Up to `count` images from all over the set, one by one: each a Batch of one, or what is wrong with it.

        Of streamed parquet files these are first images of row groups; of another stream, which can only be read
        through, the first few of the training sequence of seed 0, up to the first that cannot be used.
        """
        from .loader import Share, load
        from .streams import rows_by_number

        if self.num_images is None:
            reader = self._stream_reader(Share(BatchPlan(1), 0, 0, 0, min(count, _LOOKED_AT_IN_A_STREAM)), skip=False)
            try:
                yield from load(reader, reader.share, 0, pin=False)
            except DataError as error:
                yield error
            return
        if self.config.streaming:
            sizes = np.concatenate([part.groups.sizes for part in self._parquet_parts])
            firsts = (np.cumsum(sizes) - sizes)[sizes > 0]
            rows = rows_by_number(self._parquet_parts, firsts[spread(count, len(firsts))])
        else:
            numbers = spread(count, self.num_images)
            rows = numbers if self._source.rows is None else self._source.rows[numbers]
        for row in rows:
            try:
                yield self.decode_rows(np.array([row]))
            except DataError as error:
                yield error

    def decode_rows(self, rows: np.ndarray) -> Batch:
        """Images by their rows (int64 [n], as in Batch), of a map-style set or of streamed parquet files.

        The ordinals mean nothing. Raises DataError for an image that cannot be used, whatever config.bad_image says,
        and ValueError of a stream whose rows are not counted.
        """
        from .loader import MapReader, Share
        from .streams import read_examples

        rows, share = np.asarray(rows, dtype=np.int64), Share(BatchPlan(1), 0, 0, 0, 0)
        if not self.config.streaming:
            reader = MapReader(self._source.dataset, self._decoder(), share, self._map_order(0), self.name_row)
            batch = reader.batch_of(rows)
        elif self.num_images is None:
            raise ValueError("rows of a stream that does not count them cannot be chosen")
        else:
            streamed = self._stream_reader(share, skip=False)
            batch = streamed.batch_of(read_examples(self._parquet_parts, rows, streamed.values))
        return batch._replace(images=batch.images.permute(0, 3, 1, 2))

    def batches(
        self,
        seed: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int | None = None,
        device: torch.device | None = None,
        offset: int = 0,
        labels: range | None = None,
    ) -> Generator[Batch, None, None]:
        """This rank's micro-batches of steps first_step .. last_step - 1: step by step, accumulation index by index.

        seed: the run's, in [0, 2^63). batch_size: the global one, a multiple of world x accumulation (ConfigError).
        workers: loader processes, config.workers by default.
        device: where the batches are wanted; to a GPU each is copied while the step before it runs. By default they
        stay on the host, or on the CPU where the data set is resident.
        offset: position of image 0 of step 0; other than 0 where the batch size was changed in mid-run.
        labels: those that may come; another is a DataError that names its row, before it reaches a device. None: any.
        Positions are offset + step * batch_size and following, of which this rank has every world-th, so a resumed run
        reads what the uninterrupted one would have.
        No global random state is read or changed. DataError for an image that cannot be used reaches the caller when
        its own batch is due; of a resident set, which is loaded here (ConfigError where it does not fit), at once.
        Close the iterator (or drop it) to end its loader processes.
        """
        plan = BatchPlan(batch_size, world, accumulation, offset)
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} processes")
        if offset + first_step * batch_size < 0:
            raise ConfigError(f"step {first_step} of batch size {batch_size} is before the start (offset {offset})")
        from .loader import Share, copied_ahead, load, load_resident, resident_batches

        config = self.config
        workers = config.workers if workers is None else workers
        share = Share(plan, rank, seed, first_step, last_step)
        reader: MapReader | StreamReader
        if config.streaming:
            reader = self._stream_reader(share, skip=config.bad_image == "skip")
        else:
            reader = self._map_reader(share)
            if reader.store is not None and reader.store.complete():
                workers = 0
            if config.resident:
                resident = load_resident(reader, workers, device or torch.device("cpu"))
                if resident.labels is not None:
                    self._check_labels(resident.labels.cpu(), np.arange(len(resident.labels)), labels, reader.rows_of)
                return resident_batches(resident, reader)
        if device is None or device.type == "cpu":
            return self._labelled(load(reader, share, workers, pin=False), labels)
        return copied_ahead(self._labelled(load(reader, share, workers, pin=True), labels), device)

    def _labelled(self, batches: Generator[Batch, None, None], labels: range | None) -> Generator[Batch, None, None]:
        with contextlib.closing(batches):
            for batch in batches:
                if batch.labels is not None:
                    self._check_labels(batch.labels, batch.rows.numpy(), labels)
                yield batch

    def _check_labels(
        self,
        found: torch.Tensor,
        rows: np.ndarray,
        valid: range | None,
        row_of: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    ) -> None:
        if valid is None:
            return
        wrong = np.flatnonzero(((found < valid.start) | (found >= valid.stop)).numpy())
        if len(wrong):
            label, row = int(found[wrong[0]]), int(row_of(rows[wrong[:1]])[0])
            raise DataError(
                f"label {label} (column {self.label_column}) of {self.name_row(row)} is not one that the network is "
                f"told ({valid.start} .. {valid.stop - 1}): correct it, leave such rows out with --data.filter, or "
                "change --model.num-class-embeds"
            )

    def _decoder(self) -> Decoder:
        from .loader import Decoder

        source, config = self._source, self.config
        name = ", ".join(part.name for part in source.parts)
        columns = (source.image_column, source.label_column)
        return Decoder(name, *columns, self.size, self.channels, config.fit, self._background)

    def _map_reader(self, share: Share) -> MapReader:
        """The reader of a set with random access, and the store of its decoded images."""
        from .cache import open_store
        from .loader import MapReader
        from .stored import digest_of

        source, config, decoder = self._source, self.config, self._decoder()
        order = self._map_order(share.seed)
        about = {**decoder._asdict(), "split": config.split}
        if source.rows is not None:
            about["rows"] = digest_of(source.rows)
        shape = (order.num_images, *self.size, self.channels)
        store, warning = open_store(source.dataset, about, shape, config.cache_gb * 1e9)
        self.warning = "; ".join(filter(None, (source.warning, warning))) or None
        return MapReader(
            *(source.dataset, decoder, share, order, self.name_row),
            rows=source.rows,
            store=store,
            skip=config.bad_image == "skip",
        )

    def _mixture(self, seed: int) -> Mixture | None:
        if len(self.config.weights) < 2:
            return None
        if self._last_mixture is None or self._last_mixture.seed != seed:
            self._last_mixture = Mixture(self.config.weights, seed)
        return self._last_mixture

    def _map_order(self, seed: int) -> MapOrder:
        sizes = [part.num_images or 0 for part in self._source.parts]
        return MapOrder(sizes, seed, self._mixture(seed))

    def _stream_reader(self, share: Share, skip: bool) -> StreamReader:
        from .loader import StreamReader

        decoders = tuple(
            self._decoder()._replace(image_column=part.image_column, label_column=part.label_column)
            for part in self._source.parts
        )
        return StreamReader(self._stream(share.seed), decoders, share, self.name_row, skip)

    @cached_property
    def _parquet_parts(self) -> tuple[ParquetPart, ...]:
        """The sources of a stream that are parquet files."""
        from .streams import ParquetPart

        return tuple(
            ParquetPart(part.groups, part.schema, number, self._source.first_block(number))
            for number, part in enumerate(self._source.parts)
            if part.groups is not None
        )

    def _stream(self, seed: int) -> Stream:
        """The lanes of a streamed set."""
        from .streams import ParquetLanes, ShardLanes, ShardPart, Stream

        window, mixture = self.window, self._mixture(seed)
        if mixture is None and self._parquet_parts:
            lanes: tuple[LaneRows, ...] = (ParquetLanes(self._parquet_parts, self.num_lanes, window, seed),)
            return Stream(self.num_lanes, window, lanes, None)
        parquet = {part.source: part for part in self._parquet_parts}
        lanes = tuple(
            ParquetLanes((parquet[number],), self.num_lanes, window, source_seed(seed, number))
            if number in parquet
            else ShardLanes(
                ShardPart(part.dataset, part.name, number, self._source.first_block(number)),
                self.num_lanes,
                source_seed(seed, number),
            )
            for number, part in enumerate(self._source.parts)
        )
        return Stream(self.num_lanes, window, lanes, mixture)
