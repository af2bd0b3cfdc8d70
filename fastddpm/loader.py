"""From undecoded rows to a process's micro-batches: random access or streams by lanes, through torch's DataLoader.

Loader workers hold no random state and ignore signals; what they cannot read reaches the caller as its own DataError.
The batches of a GPU are copied while the step before them runs, or gathered from a data set that lives on the device.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import stat
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from datasets.utils.file_utils import xopen
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from .cache import DecodedStore
from .data import Batch, Fit
from .errors import ConfigError, DataError
from .images import ImageProblem, decode_image, fit_array
from .library import is_remote, library_errors, one_line, retried
from .order import BatchPlan, MapOrder, replacement
from .runlog import make_bar
from .sources import may_name_file
from .streams import Example, LaneReader, Orphaned, Stream

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 30
"""Of a file that the data name by its path."""

MAX_ATTEMPTS = 100
"""Rows that are tried in the place of one that cannot be used."""

_SHOWN = 120  # last characters of a path in messages
_RESIDENT_ROWS = 256  # rows decoded at a time on their way to the device


class Share(NamedTuple):
    """What one process reads of the global sequence."""

    plan: BatchPlan
    rank: int
    seed: int
    first_step: int
    last_step: int

    def micro_batches(self) -> Iterator[tuple[int, int]]:
        return self.plan.micro_batches(self.first_step, self.last_step)


class Decoder(NamedTuple):
    """Turns Arrow values of the two columns into pixels and labels; images are encoded or are arrays of pixels."""

    source: str
    image_column: str
    label_column: str | None
    size: tuple[int, int]
    channels: int
    fit: Fit
    background: tuple[int, int, int] | None = None

    def values(self, table: pa.Table) -> list[tuple[Any, int]]:
        """(undecoded image, label) per row."""
        images = _undecoded(table.column(self.image_column))
        if self.label_column is None:
            return [(image, -1) for image in images]
        labels = table.column(self.label_column).to_pylist()
        return [(image, -1 if label is None else int(label)) for image, label in zip(images, labels, strict=True)]

    def pixels(self, image: Any, row: int, name_row: Callable[[int], str]) -> np.ndarray:
        """uint8 [H, W, C] of the undecoded image of a row; BadImage, which names it by its path and the row's name."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's, about oversized images and damaged metadata
                if isinstance(image, pa.ListScalar):
                    return fit_array(_array_of(image), self.size, self.channels, self.fit)
                data, inside = _read_bytes(image, row, name_row)
                return decode_image(data, self.size, self.channels, self.fit, self.background, quote=inside)
        except ImageProblem as problem:
            raise BadImage(f"{_name_image(image, name_row(row))} {problem}") from problem
        except OSError as error:  # of the machine, and no word on the image
            raise DataError(f"{_name_image(image, name_row(row))} cannot be read: {one_line(error)}") from error


def _undecoded(column: pa.ChunkedArray) -> list[Any]:
    """The images of a column: encoded ones as Python's objects, arrays as the nested lists that Arrow has."""
    kind = column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type
    if not _is_list(kind):
        return column.to_pylist()
    chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    return [row if row.is_valid else None for chunk in chunks for row in chunk]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _array_of(row: pa.ListScalar) -> np.ndarray:
    """The array that a nested list is. ImageProblem: rows of different lengths, something or all of it missing."""
    values, shape = row.values, [len(row.values)]
    while _is_list(values.type):
        if not len(values):
            raise ImageProblem("is an array without values")
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ImageProblem("is no array: its rows differ in length, or one is missing")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise ImageProblem(f"is an array of which {values.null_count} values are missing (null)")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


class BadImage(DataError):
    """One image that cannot be used, for what it is: trying again, or on another machine, would not change it."""


def _name_image(image: Any, where: str) -> str:
    path = _path(image)
    if path and len(path) > _SHOWN:
        path = f"...{path[-_SHOWN:]}"
    return f"image {path} ({where})" if path else f"the image of {where}"


def _path(image: Any) -> str | None:
    """The path inside an undecoded image, whose Arrow type is struct<bytes, path>, binary or string."""
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else None


def _read_bytes(image: Any, row: int, name_row: Callable[[int], str]) -> tuple[bytes, bool]:
    """The encoded bytes of an undecoded image, and whether they are in the data and not in a file that it names.

    ImageProblem: there are none. OSError: they could not be read now.
    """
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data, True
    path = _path(image)
    if not path:
        raise ImageProblem("is missing: the row has neither bytes nor a path")
    try:
        remote = is_remote(path)
        if not remote and not may_name_file(name_row(row), path):
            raise ImageProblem("is not in the data, which come from elsewhere: files of this machine are not read")
        return retried(lambda: _file_bytes(path, remote), path, remote), False
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        if isinstance(error, ImageProblem):
            raise
        raise ImageProblem(f"cannot be read: {one_line(error, _SHOWN)}") from error  # ValueError: a zero byte in a path
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise ImageProblem(f"cannot be read: {one_line(error, _SHOWN)}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a remote file system raises
        raise OSError(one_line(error)) from error


def _file_bytes(path: str, remote: bool) -> bytes:
    # A URL is inside an archive or on the Hub, as streamed data sets name files.
    if not remote and not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a pipe would be waited for
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise ImageProblem("cannot be read: the path names no regular file")
    with xopen(path, "rb") if remote else open(path, "rb") as file:
        data: bytes = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ImageProblem(f"has more than {MAX_FILE_BYTES:,} bytes, too many for an image")
        return data


def _too_many(message: str) -> DataError:
    return DataError(f"{message}; nor can any of {MAX_ATTEMPTS} others that were tried in its place")


class MapReader(TorchDataset):
    """Micro-batches of a data set with random access: from the store where it knows an image, or else decoded into it.

    rows: int64 [num_images], rows of `dataset` that the numbers of `order` stand for; None: the numbers themselves.
    The store goes by numbers. skip: take another image in the place of one that cannot be used.
    """

    def __init__(
        self,
        dataset: Any,
        decoder: Decoder,
        share: Share,
        order: MapOrder,
        name_row: Callable[[int], str],
        *,
        rows: np.ndarray | None = None,
        store: DecodedStore | None = None,
        skip: bool = False,
    ) -> None:
        self.dataset = dataset
        self.decoder = decoder
        self.share = share
        self.order = order
        self.name_row = name_row
        self.rows = rows
        self.store = store
        self.skip = skip

    def __getitem__(self, key: tuple[int, int]) -> Batch | _Failure:
        positions = self.share.plan.positions(*key, self.share.rank)
        try:
            return self._batch(positions, self.order.numbers(positions))
        except DataError as error:
            return _Failure(error)

    def batch_of(self, numbers: np.ndarray) -> Batch:
        """The images of `numbers` int64 [n], images [n, H, W, C]; the positions are their places."""
        images, labels, bad = self._images(numbers)
        for problem in bad.values():
            raise problem
        return self._as_batch(images, labels, np.arange(len(numbers)), self.rows_of(numbers), [])

    def rows_of(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows of the data set that `numbers` stand for."""
        return numbers if self.rows is None else self.rows[numbers]

    def _batch(self, positions: np.ndarray, numbers: np.ndarray) -> Batch:
        images, labels, bad = self._images(numbers)
        messages = []
        for i, problem in bad.items():
            number = self._instead(int(positions[i]), int(numbers[i]), images[i : i + 1], labels[i : i + 1], problem)
            numbers[i] = number
            messages.append(str(problem))
        return self._as_batch(images, labels, positions, self.rows_of(numbers), messages)

    def _as_batch(
        self, images: np.ndarray, labels: np.ndarray, positions: np.ndarray, rows: np.ndarray, messages: list[str]
    ) -> Batch:
        return Batch(
            torch.from_numpy(images),
            None if self.decoder.label_column is None else torch.from_numpy(labels),
            torch.from_numpy(positions),
            torch.from_numpy(rows),
            tuple(messages),
        )

    def replacements(self, position: int, number: int) -> Iterator[int]:
        """Images to try in the place of image `number` at `position`, all of its source: mixtures keep their shares."""
        ends = np.cumsum(self.order._sizes)
        source = int(np.searchsorted(ends, number, side="right"))
        count = self.order._sizes[source]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            yield int(ends[source]) - count + replacement(self.share.seed, position, attempt, count)

    def _instead(self, position: int, bad: int, image: np.ndarray, label: np.ndarray, problem: BadImage) -> int:
        """Fills image [1, H, W, C] and label [1] with another image than number `bad` and returns its number."""
        for number in self.replacements(position, bad):
            images, labels, found = self._images(np.array([number]))
            if not found:
                image[:], label[:] = images, labels
                return number
        raise _too_many(str(problem))

    def _images(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, BadImage]]:
        """uint8 [n, H, W, C], int64 [n], and what is wrong with those that, to be skipped, are left empty."""
        if self.store is None:
            return self._decoded(numbers)
        images, labels, known = self.store.read(numbers)
        bad: dict[int, BadImage] = {}
        if not known.all():
            unknown = np.flatnonzero(~known)
            images[unknown], labels[unknown], found = self._decoded(numbers[unknown])
            bad = {int(unknown[i]): problem for i, problem in found.items()}
            sound = np.setdiff1d(unknown, list(bad))
            self.store.write(numbers[sound], images[sound], labels[sound])
        return images, labels, bad

    def _decoded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, BadImage]]:
        rows = self.rows_of(numbers).tolist()
        with library_errors(self.decoder.source):
            table = self.dataset[rows]
        images = np.zeros((len(rows), *self.decoder.size, self.decoder.channels), dtype=np.uint8)
        labels = np.empty(len(rows), dtype=np.int64)
        bad: dict[int, BadImage] = {}
        for i, (row, (image, label)) in enumerate(zip(rows, self.decoder.values(table), strict=True)):
            labels[i] = label
            try:
                images[i] = self.decoder.pixels(image, row, self.name_row)
            except BadImage as problem:
                if not self.skip:
                    raise
                bad[i] = problem
        return images, labels, bad


class InOrder(MapReader):
    """The images in the order of their numbers, which stand in the place of rows; of a bad one -1 - number."""

    def __getitem__(self, key: tuple[int, int]) -> Batch | _Failure:
        positions = self.share.plan.positions(*key, self.share.rank)
        numbers = positions % self.order.num_images
        try:
            images, labels, bad = self._images(numbers)
        except DataError as error:
            return _Failure(error)
        numbers[list(bad)] = -1 - numbers[list(bad)]
        return self._as_batch(images, labels, positions, numbers, [str(problem) for problem in bad.values()])


class StreamReader(IterableDataset):
    """A stream's micro-batches in parts: each loader worker reads its own of the process's lanes.

    Worker i yields part i of every micro-batch, which may be empty. Where there are more workers than lanes, those of a
    lane all read it and decode in turns. decoders: one for each of the data set's sources.
    """

    def __init__(
        self,
        stream: Stream,
        decoders: tuple[Decoder, ...],
        share: Share,
        name_row: Callable[[int], str],
        skip: bool = False,
    ) -> None:
        self.stream = stream
        self.decoders = decoders
        self.share = share
        self.name_row = name_row
        self.skip = skip

    def __iter__(self) -> Iterator[Batch | _Failure]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        parent = None if info is None else os.getppid()  # one's own may end before one's work: nohup
        readers: dict[tuple[int, int], LaneReader] = {}
        try:
            for key in self.share.micro_batches():
                positions = self.share.plan.positions(*key, self.share.rank)
                positions = positions[self._own(positions, worker, num_workers)]
                lanes, which, indices = (column.tolist() for column in self.stream.find(positions))
                examples = []
                for at in zip(lanes, which, indices, strict=True):
                    if at[:2] not in readers:
                        readers[at[:2]] = LaneReader(
                            self.stream.lanes[at[1]],
                            at[0],
                            self.stream.window,
                            self.values,
                            lambda: parent is None or os.getppid() == parent,
                        )
                    examples.append((readers[at[:2]], at[2]))
                yield self._part(positions, examples)
        except Orphaned:
            return
        except DataError as error:
            yield _Failure(error)

    def _own(self, positions: np.ndarray, worker: int, num_workers: int) -> np.ndarray:
        """bool [n]: the positions of this worker, for a start mid-run the same lanes in every micro-batch."""
        num_lanes = self.stream.num_lanes
        apart = int(np.gcd(self.share.plan.world, num_lanes))  # the process's lanes are so far apart
        lane = positions % num_lanes // apart
        own_lanes = num_lanes // apart
        if own_lanes >= num_workers:
            return lane % num_workers == worker
        in_turn = (num_workers - 1 - lane) // own_lanes + 1  # workers lane, lane + own_lanes, ... share it
        turn = positions // np.lcm(self.share.plan.world, num_lanes)
        return lane + own_lanes * (turn % in_turn) == worker

    def _part(self, positions: np.ndarray, places: list[tuple[LaneReader, int]]) -> Batch:
        examples, pixels, messages = [], [], []
        for reader, index in places:
            example = reader.at(index)
            try:
                pixels.append(self._pixels(example))
            except BadImage as problem:
                if not self.skip:
                    raise
                messages.append(str(problem))
                example, image = self._instead(reader, index, example.source, str(problem))
                pixels.append(image)
            examples.append(example)
        return self._as_batch(examples, pixels, positions, messages)

    def values(self, source: int, table: pa.Table) -> list[tuple[Any, int]]:
        """(undecoded image, label) of each row of a table of a source."""
        return self.decoders[source].values(table)

    def batch_of(self, examples: list[Example]) -> Batch:
        """Examples decoded, images [n, H, W, C]; the positions are their places."""
        return self._as_batch(examples, [self._pixels(example) for example in examples], np.arange(len(examples)), [])

    def _as_batch(
        self, examples: list[Example], pixels: list[np.ndarray], positions: np.ndarray, messages: list[str]
    ) -> Batch:
        decoder = self.decoders[0]
        images = np.array(pixels, dtype=np.uint8).reshape(-1, *decoder.size, decoder.channels)
        labels = torch.tensor([example.label for example in examples], dtype=torch.int64)
        return Batch(
            torch.from_numpy(images),
            None if decoder.label_column is None else labels,
            torch.from_numpy(positions),
            torch.tensor([example.row for example in examples], dtype=torch.int64),
            tuple(messages),
        )

    def _pixels(self, example: Example) -> np.ndarray:
        return self.decoders[example.source].pixels(example.image, example.row, self.name_row)

    def _instead(self, reader: LaneReader, index: int, source: int, message: str) -> tuple[Example, np.ndarray]:
        # Where sources are read one after the other a window has rows of several: those of the same one first.
        for attempt in range(1, min(reader.window, MAX_ATTEMPTS + 1)):
            example = reader.instead(index, attempt)
            if example.source == source:
                with contextlib.suppress(BadImage):
                    return example, self._pixels(example)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            example = reader.instead(index, attempt)
            with contextlib.suppress(BadImage):
                return example, self._pixels(example)
        raise _too_many(message)


class _Failure:
    """A DataError on its way out of a loader worker: an exception would arrive wrapped in the worker's traceback."""

    def __init__(self, error: DataError) -> None:
        self.message, self.kind = str(error), BadImage if isinstance(error, BadImage) else DataError


def load(reader: MapReader | StreamReader, share: Share, workers: int, pin: bool) -> Generator[Batch, None, None]:
    """The reader's micro-batches through a DataLoader that touches no global random state."""
    parts = max(1, workers) if isinstance(reader, StreamReader) else 1
    pin = pin and torch.cuda.is_available()
    with warnings.catch_warnings():
        # torch's, that there are more workers than processor cores: they still overlap with the training step.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader = DataLoader(
            reader,
            batch_size=None,
            sampler=None if isinstance(reader, StreamReader) else _Keys(share),
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=2 * parts if workers else None,
            pin_memory=pin and parts == 1,  # parts are pinned when they are put together
            worker_init_fn=_init_worker,
            generator=torch.Generator().manual_seed(0),  # iter() draws from it; without it from the global generator
        )
        with _signals_held_back():
            iterator = iter(loader)
    _OPEN_ITERATORS.add(iterator)
    received: list[Batch] = []
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                # A dead worker shows as the DataLoader's RuntimeError or, in the middle of a hand-over, as a broken
                # connection. What a worker raised itself says "Caught ... in DataLoader worker process".
                broken_off = not isinstance(error, RuntimeError) and "in DataLoader worker process" not in str(error)
                if workers == 0 or not (broken_off or "DataLoader worker (pid" in str(error)):
                    raise
                raise DataError(
                    f"a loader process ended unexpectedly, often for lack of memory or of shared memory "
                    f"(/dev/shm): lower data.workers ({one_line(error)})"
                ) from error
            if isinstance(item, _Failure):
                raise item.kind(item.message)
            received.append(item)
            if len(received) == parts:
                batch = received[0] if parts == 1 else _joined(received, pin)
                received = []
                # pin_memory makes a list of what was a tuple
                yield batch._replace(images=batch.images.permute(0, 3, 1, 2), replaced=tuple(batch.replaced))
    finally:
        _close(iterator)


def _joined(parts: list[Batch], pin: bool) -> Batch:
    """The parts of one micro-batch in order of position."""
    order = torch.cat([part.ordinals for part in parts]).argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    places = place.split([len(part.ordinals) for part in parts])

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.empty((len(order), *tensors[0].shape[1:]), dtype=tensors[0].dtype, pin_memory=pin)
        for at, tensor in zip(places, tensors, strict=True):
            whole[at] = tensor
        return whole

    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        join([part.images for part in parts]),
        join(labels) if labels else None,
        join([part.ordinals for part in parts]),
        join([part.rows for part in parts]),
        tuple(message for part in parts for message in part.replaced),
    )


def copied_ahead(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on `device`; on CUDA each is copied from pinned memory while the consumer works on the one before."""
    if device.type != "cuda":
        return _one_ahead(batches, lambda batch: _move(batch, device), lambda batch: batch)
    stream = torch.cuda.Stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            # The pinned source may be dropped at once: its allocator, too, waits for the copy before it reuses it.
            return _move(batch, device), stream.record_event()

    def receive(sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, copied = sent
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(copied)
        for tensor in (batch.images, batch.labels, batch.ordinals):
            if tensor is not None:
                tensor.record_stream(consumer)  # or a later copy could take its memory while the step still reads it
        return batch

    return _one_ahead(batches, send, receive)


def _move(batch: Batch, device: torch.device) -> Batch:
    images, labels, ordinals = (
        None if tensor is None else tensor.to(device, non_blocking=device.type == "cuda")
        for tensor in (batch.images, batch.labels, batch.ordinals)
    )
    assert images is not None and ordinals is not None
    return batch._replace(images=images, labels=labels, ordinals=ordinals)


def _one_ahead(
    batches: Generator[Batch, None, None], send: Callable[[Batch], T], receive: Callable[[T], Batch]
) -> Generator[Batch, None, None]:
    """Sends each batch before the one in front of it is handed out; a DataError waits until its own batch is due."""
    with contextlib.closing(batches):
        sent: T | None = None
        while True:
            failure: DataError | None = None
            following: T | None = None
            try:
                if (batch := next(batches, None)) is not None:
                    following = send(batch)
            except DataError as error:
                failure = error
            if sent is not None:
                yield receive(sent)
            if failure is not None:
                raise failure
            if following is None:
                return
            sent = following


class Resident(NamedTuple):
    """A whole data set on a device."""

    images: torch.Tensor
    """uint8 [num_images, H, W, C]."""
    labels: torch.Tensor | None
    """int64 [num_images], or None without a label column."""
    bad: dict[int, str]
    """Numbers of images that could not be used, and why."""


def load_resident(reader: MapReader, workers: int, device: torch.device) -> Resident:
    """Puts the whole data set of `reader` on `device`.

    Raises ConfigError where it would take more than half of the memory that is free there (of a CPU: all that there
    is), and DataError for an image that cannot be used and is not to be skipped.
    """
    decoder, num_images, rank = reader.decoder, reader.order.num_images, reader.share.rank
    num_bytes, free = num_images * decoder.size[0] * decoder.size[1] * decoder.channels, _free_bytes(device)
    if num_bytes > free // 2:
        raise ConfigError(
            f"data.resident: the {num_images:,} images take {num_bytes / 1e9:.3g} GB, more than half of the "
            f"{free / 1e9:.3g} GB of memory of {device}: leave out --data.resident"
        )
    images = torch.empty((num_images, *decoder.size, decoder.channels), dtype=torch.uint8, device=device)
    labels = None if decoder.label_column is None else torch.empty(num_images, dtype=torch.int64, device=device)
    bad: dict[int, str] = {}
    plan = BatchPlan(min(_RESIDENT_ROWS, num_images))
    steps = -(-num_images // plan.batch_size)
    first = rank * steps // reader.share.plan.world  # elsewhere on each rank, which finds in the store what others did
    share = Share(plan, 0, 0, first, first + steps)
    in_order = InOrder(
        *(reader.dataset, decoder, share, reader.order, reader.name_row),
        rows=reader.rows,
        store=reader.store,
        skip=reader.skip,
    )
    loading = load(in_order, share, workers, pin=device.type == "cuda")
    with (
        contextlib.closing(copied_ahead(loading, device)) as batches,
        make_bar("decoding", "images", num_images, enabled=rank == 0) as bar,
    ):
        for batch in batches:
            bad.update(zip((-1 - batch.rows[batch.rows < 0]).tolist(), batch.replaced, strict=True))
            numbers = torch.where(batch.rows < 0, -1 - batch.rows, batch.rows).to(device)
            images.index_copy_(0, numbers, batch.images.permute(0, 2, 3, 1))
            if labels is not None and batch.labels is not None:
                labels.index_copy_(0, numbers, batch.labels)
            bar.update(min(len(numbers), num_images - bar.n))
    return Resident(images, labels, bad)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


def resident_batches(resident: Resident, reader: MapReader) -> Generator[Batch, None, None]:
    """Micro-batches of `reader` gathered on the device, for which the host sends numbers and waits for nothing."""
    device, share, order = resident.images.device, reader.share, reader.order
    for key in share.micro_batches():
        positions = share.plan.positions(*key, share.rank)
        numbers = order.numbers(positions)
        messages = []
        if resident.bad:
            for i in np.flatnonzero(np.isin(numbers, list(resident.bad))).tolist():
                message = resident.bad[int(numbers[i])]
                messages.append(message)
                tried = reader.replacements(int(positions[i]), int(numbers[i]))
                number = next((number for number in tried if number not in resident.bad), None)
                if number is None:
                    raise _too_many(message)
                numbers[i] = number
        places = torch.from_numpy(numbers)
        places = (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)
        first, step = int(positions[0]), share.plan.world
        yield Batch(
            resident.images.index_select(0, places).permute(0, 3, 1, 2),
            None if resident.labels is None else resident.labels.index_select(0, places),
            torch.arange(first, first + step * len(positions), step, device=device),
            torch.from_numpy(reader.rows_of(numbers)),
            tuple(messages),
        )


def _as_it_is(item: Any) -> Any:
    return item


class _Keys(Sampler):
    """What the DataLoader asks a MapReader for."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.share.micro_batches()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Loader processes are born with SIGINT and SIGTERM blocked; here they are delivered at the end.

    A signal to the process group is the training process's to answer: it needs its workers to finish the step and save.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    """For processes that do not inherit the blocked signals: those of a fork server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


_OPEN_ITERATORS: weakref.WeakSet[Any] = weakref.WeakSet()


def _close(iterator: Any) -> None:
    """Ends the loader processes, also those that are in a long walk and, deaf to SIGTERM, would be waited for."""
    workers = list(getattr(iterator, "_workers", ()))
    if workers:
        with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler, when one of them has been killed
            iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
    _OPEN_ITERATORS.discard(iterator)


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own exit handler, which would wait for ever for processes that ignore its SIGTERM."""
    for iterator in list(_OPEN_ITERATORS):
        _close(iterator)
