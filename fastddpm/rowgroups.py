"""Row groups of parquet files, local or remote: their sizes from the footers, the rows that pass a filter, reading.

Files are opened where they are read, in loader processes; nothing open crosses a fork.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from .errors import DataError
from .filters import Filter, rows_where
from .library import explained, is_remote, may_pass, one_line, pause, retried
from .stored import digest_of, stored

T = TypeVar("T")

ROW_BITS = 32
"""A streamed row is block << ROW_BITS | row inside the block."""

# Column chunks are read through buffers of this size, and not whole. That does not bound the memory: Arrow decodes a
# page at once, which ordinary writers fill with up to 1,024 images whatever their size (RowGroups.page_bytes).
_BUFFER_BYTES = {False: 1 << 20, True: 4 << 20}
_THREADS = 16
_PAGE_ROWS = 1024  # that pyarrow writes before it looks whether a page is full


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A local or remote parquet file, its columns read through small buffers and page by page."""
    remote = is_remote(path)
    with contextlib.ExitStack() as stack:
        source: Any = path
        if remote:
            system, inner = fsspec.core.url_to_fs(path)
            # Columns are read side by side, which would make a file system's own reading ahead useless.
            source = stack.enter_context(system.open(inner, "rb", cache_type="none"))
        with pq.ParquetFile(source, buffer_size=_BUFFER_BYTES[remote], pre_buffer=False) as file:
            yield file


class RowGroups(NamedTuple):
    """The row groups of a streamed source that are read, in the order of files and groups."""

    paths: tuple[str, ...]
    file: np.ndarray
    """int64 [num_blocks]: place in paths."""
    group: np.ndarray
    """int64 [num_blocks]: number within the file."""
    sizes: np.ndarray
    """int64 [num_blocks]: rows, after filtering."""
    kept: np.ndarray | None
    """int64 [sum of sizes]: numbers of the rows that passed the filter, block by block; None: all."""
    stamp: str
    """Digest of the files' names, sizes and dates."""
    page_bytes: np.ndarray
    """int64 [num_blocks]: what one who reads the block forward holds decoded, all columns, where pages are large."""

    def rows_of(self, block: int) -> np.ndarray | None:
        """Numbers of the rows of a block that are kept; None: all of them."""
        if self.kept is None:
            return None
        end = int(self.sizes[: block + 1].sum())
        return self.kept[end - int(self.sizes[block]) : end]


def read_row_groups(paths: Iterable[str], source: str) -> RowGroups:
    """The row groups of parquet files, from their footers, which are read side by side and remembered.

    Raises DataError naming the file that cannot be read.
    """
    paths = tuple(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(lambda path: _of_file(_stamp, path, source), paths))
        stamp = digest_of([[path, *found] for path, found in zip(paths, stamps, strict=True)])

        def footers() -> dict[str, np.ndarray]:
            sizes = list(pool.map(lambda path: _of_file(_group_sizes, path, source), paths))
            return {
                "groups": np.array([len(groups) for groups in sizes], dtype=np.int64),
                "rows": np.array([rows for groups in sizes for rows, _ in groups], dtype=np.int64),
                "bytes": np.array([size for groups in sizes for _, size in groups], dtype=np.int64),
            }

        found = stored({"row groups": stamp}, footers)
    groups, rows = found["groups"], found["rows"]
    page_bytes = found["bytes"] // np.maximum(rows, 1) * np.minimum(rows, _PAGE_ROWS)
    file = np.repeat(np.arange(len(paths), dtype=np.int64), groups)
    group = np.arange(len(rows), dtype=np.int64) - np.repeat(np.cumsum(groups) - groups, groups)
    return RowGroups(paths, file, group, rows, None, stamp, page_bytes)


def _of_file(action: Callable[[str], T], path: str, source: str) -> T:
    try:
        return retried(lambda: action(path), path, is_remote(path))
    except Exception as error:
        if isinstance(error, (pa.ArrowException, OSError)) and not isinstance(error, FileNotFoundError):
            raise DataError(f"{source}: {path} is not a readable parquet file: {one_line(error)}") from error
        raise DataError(f"{source}: {path}: {one_line(error)}") from error


def _stamp(path: str) -> list[str]:
    """What tells one content of a file from another without reading it."""
    if not is_remote(path):
        status = os.stat(path)
        return [str(status.st_size), str(status.st_mtime_ns)]
    system, inner = fsspec.core.url_to_fs(path)
    info = system.info(inner)
    names = ("size", "ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
    return [f"{name}={info[name]}" for name in names if info.get(name) is not None]


def _group_sizes(path: str) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group."""
    with open_parquet(path) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def filter_row_groups(groups: RowGroups, rule: Filter, features: datasets.Features, source: str) -> RowGroups:
    """The rows of `groups` for which `rule` holds, found by reading its columns once and remembered."""
    condition = rule.expression(features, source)
    columns = list(rule.columns)
    schema = datasets.Features({name: features[name] for name in columns}).arrow_schema
    bounds = np.searchsorted(groups.file, np.arange(len(groups.paths) + 1))

    def of_file(number: int) -> list[np.ndarray]:
        blocks = range(int(bounds[number]), int(bounds[number + 1]))

        def read(path: str) -> list[np.ndarray]:
            with open_parquet(path) as file:
                tables = (file.read_row_group(int(groups.group[i]), columns, use_threads=False) for i in blocks)
                return [rows_where(table_cast(table, schema), condition, 0) for table in tables]

        return _of_file(read, groups.paths[number], source)

    def evaluate() -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            kept = [rows for found in pool.map(of_file, range(len(groups.paths))) for rows in found]
        sizes = np.array([len(rows) for rows in kept], dtype=np.int64)
        return {"sizes": sizes, "rows": np.concatenate([*kept, np.empty(0, dtype=np.int64)])}

    found = stored({"footers": groups.stamp, "filter": rule.key(features)}, evaluate)
    return groups._replace(sizes=found["sizes"], kept=found["rows"])


def read_rows(
    groups: RowGroups, block: int, schema: pa.Schema, wanted: np.ndarray, chunk: int
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The rows `wanted` (int64, ascending, at least one) of a block, as (numbers, table of `schema`), read forward.

    chunk: rows that are read at a time. A remote file that fails is opened again and read on from where it failed; it
    is closed before the last of `wanted` are handed out. Raises DataError naming file and row group.
    """
    path, group = groups.paths[int(groups.file[block])], int(groups.group[block])
    done = failures = 0
    while True:
        try:
            with open_parquet(path) as file:
                at = 0
                for batch in file.iter_batches(chunk, [group], schema.names, use_threads=False):
                    stop = int(np.searchsorted(wanted, at + len(batch)))
                    if stop > done:
                        rows = wanted[done:stop]
                        table = pa.Table.from_batches([batch])
                        if stop - done == rows[-1] + 1 - rows[0]:
                            table = table.slice(int(rows[0]) - at, stop - done)
                        else:
                            table = table.take(pa.array(rows - at))
                        found = rows, table_cast(table, schema)
                        done, failures = stop, 0
                        if done == len(wanted):
                            break
                        yield found
                    at += len(batch)
                else:
                    raise DataError(f"{path} has fewer rows than it had when the run was started: restore it")
            yield found
            return
        except DataError:
            raise
        except Exception as error:
            failures += 1
            try:
                if not may_pass(error, is_remote(path)):
                    raise
                pause(failures, path, error)
            except Exception as last:
                raise DataError(f"{path}, row group {group}, cannot be read: {explained(last)}") from last
