"""Training images: any source that the `datasets` library reads, in an order fixed by (seed, position).

Position p of the global sequence names one training example for ever, whatever the number of processes, accumulation
steps and loader workers (order.py says which), so that the data state of a run is one integer. Images travel as uint8
NHWC memory; the noising kernel normalises them on the device.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from .errors import ConfigError
from .order import BatchPlan

if TYPE_CHECKING:  # datasets takes 0.6 s to import, for which --help and sampling need not wait
    from .sources import ImageSource

Fit = Literal["exact", "resize", "crop", "resize_crop"]


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
        "Stream the data instead of preparing them in datasets' cache first: starts at once and needs no disk "
        "space, but shuffles within a buffer and reads up to the position again on resume."
    )
    image_column: str | None = None
    """Column of the images; by default the one column of type Image."""
    label_column: str | None = None
    """Column of the class labels; by default the one column of type ClassLabel, if there is one."""
    fit: Fit = "exact"
    (
        "How images reach the model's size: exact (others are refused, since scaling should be a decision), resize "
        "(stretch), crop (centre), resize_crop (scale the shorter side, then crop the centre). Scaling is antialiased."
    )
    flip: bool = True
    """Mirror each training image left to right with probability 1/2, drawn on the device at the sample's position."""
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
    shuffle_buffer: int = 2048
    (
        "Examples in the shuffle buffer of a streamed data set, held undecoded in every loader process. The order "
        "depends on it."
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
    """int64 [n]: the row of the split; streamed, shard * 2^32 + row inside the shard. Always on the host."""


def open_data(config: DataConfig, size: tuple[int, int], channels: int) -> ImageData:
    """Opens the images of `config` for a model of size (H, W) and 1 or 3 channels.

    Nothing is decoded here. Raises ConfigError for values that cannot be run and DataError, one line that names what
    is wrong and what there is, for data that cannot be opened or lack what the config asks for.
    """
    if channels not in (1, 3):
        raise ConfigError(f"a model of {channels} channels: images have 1 (gray) or 3 (RGB)")
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
    from .sources import open_images

    return ImageData(config, open_images(config), size, channels)


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

    num_images: rows of the split, None when streamed. num_classes and class_names: of the label column, each None
    where it is not known. warning: why decoded images are not kept although they should be, known after batches.
    """

    def __init__(self, config: DataConfig, source: ImageSource, size: tuple[int, int], channels: int) -> None:
        self.config = config
        self.size = size
        self.channels = channels
        self.num_images = source.num_images
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.warning: str | None = None
        self._source = source

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
    ) -> Generator[Batch, None, None]:
        """This rank's micro-batches of steps first_step .. last_step - 1: step by step, accumulation index by index.

        seed: the run's, in [0, 2^63). batch_size: the global one, a multiple of world x accumulation (ConfigError).
        workers: loader processes, config.workers by default.
        device: where the batches are wanted; to a GPU each is copied while the step before it runs. By default they
        stay on the host, or on the CPU where the data set is resident.
        Positions are step * batch_size and following, so a resumed run reads what the uninterrupted one would have.
        No global random state is read or changed. DataError for an image that cannot be used reaches the caller when
        its own batch is due; of a resident set, which is loaded here (ConfigError where it does not fit), at once.
        Close the iterator (or drop it) to end its loader processes.
        """
        plan = BatchPlan(batch_size, world, accumulation)
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} processes")
        from .cache import open_store
        from .loader import (
            Decoder,
            MapReader,
            Share,
            ShuffledStream,
            StreamReader,
            copied_ahead,
            load,
            load_resident,
            resident_batches,
        )

        source, config = self._source, self.config
        workers = config.workers if workers is None else workers
        share = Share(plan, rank, seed, first_step, last_step)
        decoder = Decoder(config.source, source.image_column, source.label_column, self.size, self.channels, config.fit)
        if self.num_images is None:
            stream = ShuffledStream(source.dataset, decoder, config.shuffle_buffer)
            reader: MapReader | StreamReader = StreamReader(stream, decoder, share)
        else:
            about = {**decoder._asdict(), "split": config.split}
            shape = (self.num_images, *self.size, self.channels)
            store, self.warning = open_store(source.dataset, about, shape, config.cache_gb * 1e9)
            if store is not None and store.complete():
                workers = 0
            reader = MapReader(source.dataset, decoder, share, self.num_images, store)
            if config.resident:
                return resident_batches(load_resident(reader, workers, device or torch.device("cpu")), share)
        if device is None or device.type == "cpu":
            return load(reader, share, workers, pin=False)
        return copied_ahead(load(reader, share, workers, pin=True), device)
