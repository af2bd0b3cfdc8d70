"""What is looked at before a run takes its first step, so that it does not end in its second hour.

The room on the disk, the number of images, the labels, and a few images from all over the data set. Every part is
bounded in time, whatever the size of the data: what it did not get to is left to the training.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow.compute as pc
import torch

from .checkpoint import Checkpoints
from .config import Config
from .errors import ConfigError, DataError
from .unet import UNet

if TYPE_CHECKING:
    from .data import ImageData

T = TypeVar("T")

CHECKPOINT_BYTES, PIPELINE_BYTES = 16, 4  # per parameter: weights, average and two moments in fp32; the average alone
LABEL_SECONDS = 3.0
GRACE_SECONDS = 1.5
PROBE_IMAGES, PROBE_SECONDS = 64, 3.0


def check(config: Config, data: ImageData, world: int, *, run_folder: Path) -> list[str]:
    """Warnings about what is odd and can be trained on all the same; called once per run, on rank 0.

    world: processes of the run. run_folder: where its checkpoints go.
    Takes less than ten seconds: three for the labels, three for the images, and for each as long as a single read takes
    beyond, up to 1.5; a read that takes longer is left behind in its thread, with a warning.

    Raises:
        ConfigError: the disk has no room for two checkpoints.
        DataError: a label is out of range; an image cannot be used or, with data.bad_image=skip, more than half of
            those that were tried cannot.
    """
    return [
        *_check_disk(config, run_folder),
        *_check_size(config, data, world),
        *_check_labels(config, data),
        *_check_images(config, data),
    ]


def _check_disk(config: Config, run_folder: Path) -> Iterator[str]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(config.model).parameters())
    checkpoint, pipeline = CHECKPOINT_BYTES * parameters, PIPELINE_BYTES * parameters
    present = sum(
        file.stat().st_size for path in Checkpoints(run_folder).all() for file in path.rglob("*") if file.is_file()
    )
    free = shutil.disk_usage(run_folder).free
    # An older one is deleted after a newer one is complete, and the pipeline's files are replaced by new ones: however
    # many are there, one more of each has to fit.
    least, wanted = (max(count * checkpoint - present, checkpoint) + pipeline for count in (2, config.keep + 1))
    about = f"{run_folder}: {_gb(free)} are free on this disk and a checkpoint takes {_gb(checkpoint)}"
    if free < least:
        raise ConfigError(
            f"{about}, of which two are needed while one replaces the other, and the model's files {_gb(pipeline)}: "
            "make room, or choose a --run on another disk"
        )
    if free < wanted:
        yield f"{about}: {config.keep + 1} (keep={config.keep} and one being written) will not fit; lower --keep"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _check_size(config: Config, data: ImageData, world: int) -> Iterator[str]:
    num_images, batch = data.num_images, config.batch_size
    if num_images is not None and num_images < batch:
        yield (
            f"{config.data.source} has {num_images:,} images and each batch takes {batch:,}: every batch repeats images"
        )
    if config.data.streaming and data.num_lanes % world:
        yield (
            f"the stream has {data.num_lanes} lanes, which {world} processes do not divide: each reads lanes of others "
            "besides its own; data.lanes sets their number (the order depends on it)"
        )
    for part in data._source.parts if config.data.streaming else ():
        if part.groups is None and part.num_blocks == 1:
            yield (
                f"{part.name} is a stream of one shard, which is read in its own order: it is shuffled only within "
                f"data.shuffle_buffer ({config.data.shuffle_buffer:,} images)"
            )


class _InTime(Generic[T]):
    """What an iterator gives within some seconds, from a daemon thread, which a read that hangs does not outlive.

    late: whether it was given up on while a read went on. What it raises is raised here.
    """

    def __init__(self, items: Iterator[T], seconds: float) -> None:
        self.items, self.seconds, self.late = items, seconds, False

    def __iter__(self) -> Iterator[T]:
        deadline = time.monotonic() + self.seconds
        found: queue.Queue[tuple[str, Any]] = queue.Queue(1)
        stopped = threading.Event()

        def hand_over(kind: str, value: Any) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    found.put((kind, value), timeout=0.1)
                    return

        def read() -> None:
            try:
                for item in self.items:
                    hand_over("item", item)
                    if stopped.is_set():
                        return
            except BaseException as error:
                hand_over("error", error)
            else:
                hand_over("end", None)

        threading.Thread(target=read, daemon=True, name="preflight").start()
        try:
            while True:
                try:
                    kind, value = found.get(timeout=max(0.0, deadline + GRACE_SECONDS - time.monotonic()))
                except queue.Empty:
                    self.late = True
                    return
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
                if time.monotonic() > deadline:
                    return
        finally:
            stopped.set()


def _check_labels(config: Config, data: ImageData) -> Iterator[str]:
    """All labels that can be read in time, of a set with random access or of parquet files."""
    if data.num_classes is None:
        return
    found = _InTime(data._source.streamed_labels() if config.data.streaming else data.labels(), LABEL_SECONDS)
    lowest = -1 if data.declares_classes else 0
    read = unlabelled = 0
    for rows, stored in found:
        labels = stored.cast("int64")  # or bool, or of fewer bits
        limits = pc.min_max(labels).as_py()
        if limits["min"] is not None and not lowest <= limits["min"] <= limits["max"] < data.num_classes:
            values = labels.to_pylist()
            place = next(
                i for i, label in enumerate(values) if label is not None and not lowest <= label < data.num_classes
            )
            raise _out_of_range(data, values[place], int(rows[place]))
        unlabelled += labels.null_count + pc.sum(pc.less(labels, 0), min_count=0).as_py()
        read += len(rows)
    if found.late:
        yield f"{config.data.source}: reading labels takes long; only {read:,} were checked"
    if unlabelled and config.conditional and not config.diffusion.label_dropout:
        raise DataError(
            f"{config.data.source}: {unlabelled:,} of {read:,} images have no label, and the run is conditional: hide "
            "some labels with --diffusion.label-dropout, whose class of its own they then get, or filter them out with "
            "--data.filter"
        )
    if unlabelled:
        some = f"{read:,} checked" if config.data.streaming else f"the first {read:,}"
        among = f"{read:,}" if read == data.num_images else some
        yield f"{config.data.source}: {unlabelled:,} of {among} images have no label (null or -1)"


def _out_of_range(data: ImageData, label: int, row: int) -> DataError:
    assert data.num_classes is not None
    return DataError(
        f"label {label} (column {data.label_column}) of {data.name_row(row)} is not in 0 .. {data.num_classes - 1}: "
        "correct it, or choose another column by data.label_column"
    )


def _check_images(config: Config, data: ImageData) -> Iterator[str]:
    """Decode images from all over the set."""
    from .loader import BadImage

    if data.num_images is None:  # a window of rows would have to be read before the first
        data = copy.copy(data)
        data.config = dataclasses.replace(data.config, shuffle_buffer=1)
    tried = 0
    bad: list[DataError] = []
    looked_at = _InTime(data.look_at(PROBE_IMAGES), PROBE_SECONDS)
    for found in looked_at:
        tried += 1
        if isinstance(found, DataError):
            if config.data.bad_image == "error" or not isinstance(found, BadImage):
                raise found
            bad.append(found)
        elif found.labels is None or data.num_classes is None:
            continue
        elif not -1 <= int(found.labels) < data.num_classes:  # of a stream, whose labels are not all read
            raise _out_of_range(data, int(found.labels), int(found.rows))
    if looked_at.late:
        yield (
            f"{config.data.source}: after {PROBE_SECONDS + GRACE_SECONDS:g} s {tried} images have been read: the "
            "storage or the network is slow or fails, which is left to the training"
        )
    if len(bad) > max(1, tried / 2):  # of some streams no more can be tried after one
        raise DataError(f"{len(bad)} of {tried} images tried cannot be used, too many to skip; the first: {bad[0]}")
    if bad:
        yield f"{len(bad)} of {tried} images tried cannot be used and will be replaced; the first: {bad[0]}"
