"""From undecoded rows to a process's micro-batches: random access or a shuffled stream, through torch's DataLoader.

Loader workers hold no random state and ignore signals; what they cannot read reaches the caller as its own DataError.
The batches of a GPU are copied while the step before them runs, or gathered from a data set that lives on the device.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from itertools import islice
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
from .images import ImageProblem, decode_image
from .order import BatchPlan, Purpose, derive_key, permute, random_words, rows_at
from .runlog import make_bar
from .sources import library_errors, one_line

T = TypeVar("T")

_ROW_BITS = 32  # a streamed row is shard << 32 | row inside the shard
_CHUNK_ROWS = 256  # rows that the library hands over at a time
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
    """Turns Arrow values of the two columns into a Batch; images stay [n, H, W, C] until they have been pinned."""

    source: str
    image_column: str
    label_column: str | None
    size: tuple[int, int]
    channels: int
    fit: Fit

    def values(self, table: pa.Table) -> list[tuple[Any, int]]:
        """(undecoded image, label) per row."""
        images = table.column(self.image_column).to_pylist()
        if self.label_column is None:
            return [(image, -1) for image in images]
        labels = table.column(self.label_column).to_pylist()
        return [(image, -1 if label is None else int(label)) for image, label in zip(images, labels, strict=True)]

    def batch(
        self, values: list[tuple[Any, int]], positions: np.ndarray, rows: np.ndarray, name_row: Callable[[int], str]
    ) -> Batch:
        """Decodes `values`; name_row says how messages call a row."""
        images = np.empty((len(values), *self.size, self.channels), dtype=np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about oversized images and damaged metadata
            for i, (image, _) in enumerate(values):
                try:
                    images[i] = decode_image(_read_bytes(image), self.size, self.channels, self.fit)
                except ImageProblem as problem:
                    where = f"{name_row(int(rows[i]))} of {self.source}"
                    path = _path(image)
                    name = f"image {path} ({where})" if path else f"the image of {where}"
                    raise DataError(f"{name} {problem}") from problem
        labels = None
        if self.label_column is not None:
            labels = torch.tensor([label for _, label in values], dtype=torch.int64)
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(positions), torch.from_numpy(rows))


def _path(image: Any) -> str | None:
    """The path inside an undecoded image, whose Arrow type is struct<bytes, path>, binary or string."""
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else None


def _read_bytes(image: Any) -> bytes:
    """The encoded bytes of an undecoded image, read from its path where it holds none."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data
    path = _path(image)
    if not path:
        raise ImageProblem("is missing: the row has neither bytes nor a path")
    try:
        if "://" in path:  # inside an archive or on the Hub, as streamed data sets name files
            with xopen(path, "rb") as file:
                return file.read()
        with open(path, "rb") as file:
            return file.read()
    except Exception as error:  # OSError, or whatever a remote file system raises
        raise ImageProblem(f"cannot be read: {one_line(error)}") from error


class MapReader(TorchDataset):
    """Micro-batches of a data set with random access: from the store where it knows a row, or else decoded into it."""

    def __init__(
        self, dataset: Any, decoder: Decoder, share: Share, num_images: int, store: DecodedStore | None = None
    ) -> None:
        self.dataset = dataset
        self.decoder = decoder
        self.share = share
        self.num_images = num_images
        self.store = store

    def __getitem__(self, key: tuple[int, int]) -> Batch | _Failure:
        positions = self.share.plan.positions(*key, self.share.rank)
        try:
            return self._batch(positions, self.rows(positions))
        except DataError as error:
            return _Failure(str(error))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows of the data set at `positions`."""
        return rows_at(positions, self.num_images, self.share.seed)

    def _batch(self, positions: np.ndarray, rows: np.ndarray) -> Batch:
        if self.store is None:
            return self._decoded(positions, rows)
        images, labels, known = self.store.read(rows)
        if not known.all():
            new = self._decoded(positions[~known], rows[~known])
            images[~known] = new.images.numpy()
            if new.labels is not None:
                labels[~known] = new.labels.numpy()
            self.store.write(rows[~known], images[~known], labels[~known])
        return Batch(
            torch.from_numpy(images),
            None if self.decoder.label_column is None else torch.from_numpy(labels),
            torch.from_numpy(positions),
            torch.from_numpy(rows),
        )

    def _decoded(self, positions: np.ndarray, rows: np.ndarray) -> Batch:
        with library_errors(self.decoder.source):
            table = self.dataset[rows.tolist()]
        return self.decoder.batch(self.decoder.values(table), positions, rows, lambda row: f"row {row}")


class InOrder(MapReader):
    """The rows as they are stored, again and again."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.num_images


class ShuffledStream:
    """The examples of a streamed data set in an order of their own, fixed by (seed, epoch).

    An epoch reads the shards in a permuted order through a shuffle buffer. Both are counter-based, so every process and
    worker can walk the same sequence, which costs about 3 us per small example that it does not decode.
    """

    def __init__(self, dataset: Any, decoder: Decoder, buffer_size: int) -> None:
        self.dataset = dataset
        self.decoder = decoder
        self.buffer_size = buffer_size

    def examples(self, seed: int, start: int) -> Iterator[tuple[int, int, tuple[Any, int]]]:
        """(position, row, undecoded value) of all positions from `start` on, epoch after epoch, without end.

        Raises DataError where the stream is empty or cannot be read.
        """
        position = epoch = 0
        while True:
            first = position
            for row, value in self._epoch(seed, epoch):
                if position >= start:
                    yield position, row, value
                position += 1
            length = position - first
            if length == 0:
                raise DataError(f"{self.decoder.source}: the stream has 0 rows")
            # All epochs are of one length, so whole ones before the start need no second walk.
            skipped = max(0, start - position) // length
            position += skipped * length
            epoch += 1 + skipped

    def _epoch(self, seed: int, epoch: int) -> Iterator[tuple[int, tuple[Any, int]]]:
        """(row, value) through the buffer: example k takes the place of a random one, which is handed out."""
        key = derive_key(seed, epoch, Purpose.BUFFER)
        buffer: list[tuple[int, tuple[Any, int]]] = []
        count = 0
        for chunk in self._chunks(seed, epoch):
            words = random_words(key, np.arange(count, count + len(chunk), dtype=np.uint64))
            places = ((words >> np.uint64(32)) * np.uint64(self.buffer_size)) >> np.uint64(32)
            count += len(chunk)
            for example, place in zip(chunk, places.tolist(), strict=True):
                if len(buffer) < self.buffer_size:
                    buffer.append(example)
                else:
                    handed_out, buffer[place] = buffer[place], example
                    yield handed_out
        if buffer:
            tail = np.arange(len(buffer), dtype=np.int64)
            for place in permute(tail, len(buffer), derive_key(seed, epoch, Purpose.BUFFER_TAIL)).tolist():
                yield buffer[place]

    def _chunks(self, seed: int, epoch: int) -> Iterator[list[tuple[int, tuple[Any, int]]]]:
        """The rows of all shards, shard by shard in the epoch's order, some at a time."""
        num_shards = self.dataset.num_shards
        order = permute(np.arange(num_shards, dtype=np.int64), num_shards, derive_key(seed, epoch, Purpose.SHARDS))
        for shard in order.tolist():
            row = shard << _ROW_BITS
            for table in self._tables(num_shards, shard):
                values = self.decoder.values(table)
                yield list(enumerate(values, start=row))
                row += len(values)

    def _tables(self, num_shards: int, shard: int) -> Iterator[pa.Table]:
        # iter() and not __iter__: inside a loader worker the latter hands every worker other shards.
        source = self.decoder.source
        with library_errors(source):
            tables = iter(self.dataset.shard(num_shards, shard).iter(batch_size=_CHUNK_ROWS))
        while True:
            with library_errors(source):
                table = next(tables, None)
            if table is None:
                return
            yield table


class StreamReader(IterableDataset):
    """Micro-batches of a stream: each loader worker walks all of it and decodes every num_workers-th micro-batch."""

    def __init__(self, stream: ShuffledStream, decoder: Decoder, share: Share) -> None:
        self.stream = stream
        self.decoder = decoder
        self.share = share

    def __iter__(self) -> Iterator[Batch | _Failure]:
        # The DataLoader takes from its workers in turn, so micro-batch i must come from worker i modulo their number.
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        parent = os.getppid()
        plan, rank = self.share.plan, self.share.rank
        examples: Iterator[tuple[int, int, tuple[Any, int]]] | None = None
        try:
            for step, index in islice(self.share.micro_batches(), worker, None, num_workers):
                first = plan.first_position(step, index, rank)
                if examples is None:
                    examples = self.stream.examples(self.share.seed, first)
                rows: list[int] = []
                values: list[tuple[Any, int]] = []
                for position, row, value in examples:
                    if position >= first:
                        rows.append(row)
                        values.append(value)
                        if len(rows) == plan.micro_batch_size:
                            break
                    elif position % 4096 == 0 and os.getppid() != parent:
                        return  # the training process was killed during a long walk
                positions = plan.positions(step, index, rank)
                yield self.decoder.batch(values, positions, np.array(rows, dtype=np.int64), _name_streamed_row)
        except DataError as error:
            yield _Failure(str(error))


def _name_streamed_row(row: int) -> str:
    return f"row {row & ((1 << _ROW_BITS) - 1)} of shard {row >> _ROW_BITS}"


class _Failure:
    """A DataError on its way out of a loader worker: an exception would arrive wrapped in the worker's traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


def load(reader: MapReader | StreamReader, share: Share, workers: int, pin: bool) -> Generator[Batch, None, None]:
    """The reader's micro-batches through a DataLoader that touches no global random state."""
    with warnings.catch_warnings():
        # torch's, that there are more workers than processor cores: they still overlap with the training step.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader = DataLoader(
            reader,
            batch_size=None,
            sampler=None if isinstance(reader, StreamReader) else _Keys(share),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin and torch.cuda.is_available(),
            worker_init_fn=_init_worker,
            generator=torch.Generator().manual_seed(0),  # iter() draws from it; without it from the global generator
        )
        with _signals_held_back():
            iterator = iter(loader)
    _OPEN_ITERATORS.add(iterator)
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
                raise DataError(item.message)
            yield item._replace(images=item.images.permute(0, 3, 1, 2))
    finally:
        _close(iterator)


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
    return Batch(images, labels, ordinals, batch.rows)


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


def load_resident(reader: MapReader, workers: int, device: torch.device) -> Resident:
    """Puts the whole data set of `reader` on `device`.

    Raises ConfigError where it would take more than half of the memory that is free there (of a CPU: all that there
    is), and DataError for an image that cannot be used.
    """
    decoder, num_images, rank = reader.decoder, reader.num_images, reader.share.rank
    num_bytes, free = num_images * decoder.size[0] * decoder.size[1] * decoder.channels, _free_bytes(device)
    if num_bytes > free // 2:
        raise ConfigError(
            f"data.resident: the {num_images:,} images take {num_bytes / 1e9:.3g} GB, more than half of the "
            f"{free / 1e9:.3g} GB of memory of {device}: leave out --data.resident"
        )
    images = torch.empty((num_images, *decoder.size, decoder.channels), dtype=torch.uint8, device=device)
    labels = None if decoder.label_column is None else torch.empty(num_images, dtype=torch.int64, device=device)
    plan = BatchPlan(min(_RESIDENT_ROWS, num_images))
    steps = -(-num_images // plan.batch_size)
    first = rank * steps // reader.share.plan.world  # elsewhere on each rank, which finds in the store what others did
    share = Share(plan, 0, 0, first, first + steps)
    loading = load(
        InOrder(reader.dataset, decoder, share, num_images, reader.store), share, workers, pin=device.type == "cuda"
    )
    with (
        contextlib.closing(copied_ahead(loading, device)) as batches,
        make_bar("decoding", "images", num_images, enabled=rank == 0) as bar,
    ):
        for batch in batches:
            rows = batch.rows.to(device)
            images.index_copy_(0, rows, batch.images.permute(0, 2, 3, 1))
            if labels is not None and batch.labels is not None:
                labels.index_copy_(0, rows, batch.labels)
            bar.update(min(len(rows), num_images - bar.n))
    return Resident(images, labels)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


def resident_batches(resident: Resident, share: Share) -> Generator[Batch, None, None]:
    """Micro-batches gathered on the device, for which the host sends row numbers and waits for nothing."""
    device, num_images = resident.images.device, len(resident.images)
    for step, index in share.micro_batches():
        positions = share.plan.positions(step, index, share.rank)
        rows = torch.from_numpy(rows_at(positions, num_images, share.seed))
        places = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
        first = int(positions[0])
        yield Batch(
            resident.images.index_select(0, places).permute(0, 3, 1, 2),
            None if resident.labels is None else resident.labels.index_select(0, places),
            torch.arange(first, first + len(positions), device=device),
            rows,
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
