"""Decoded images on disk: the raw uint8 pixels of a whole data set at the model's size, filled as rows are decoded.

A file holds the pixels [num_images, H, W, C] and behind them one int64 pair (label, check) per row. check is
2^32 + CRC-32 of (identity of the store, row, label, pixels); 0 says that the row has not been decoded yet.

Every read of a row computes its check anew, from the bytes that it is about to hand out (0.1 ms for 128 images of
32x32). So nothing depends on the order in which bytes reach the disk or another process, and there are no states to
repair: any number of processes may fill the file at once (a row's bytes are the same whoever decodes it), and what a
kill, a power cut, a truncation or a stranger has left counts as not decoded and is overwritten. A file may be deleted
at any time; only cutting it short under a process that reads it would end that process.

Opening a store sets its time of change, and whoever makes a new one removes those that nobody has opened for 30 days:
other data, another size, another version of the codecs. A shared lock on each open file keeps the stores of runs that
last longer; it guards nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import weakref
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from PIL import features

from .files import write_json

_VERSION = 2  # of this layout and of the rules of decode_image: raise it when one of them changes
_FOLDER = "fastddpm-decoded"
_MARK_BYTES = 16
_UNUSED_SECONDS = 30 * 86400.0  # after which a store is removed


class DecodedStore:
    """The decoded images of one data set, in a file that is made where it is missing.

    path: the file. shape: (num_images, H, W, C). salt: 32 bits, the identity of the store in its checks.
    Raises OSError where the file cannot be made at its full size; one that can only be read is read.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], salt: int) -> None:
        self.path, self.shape, self.salt = path, shape, salt
        self._row_bytes = shape[1] * shape[2] * shape[3]
        pixel_bytes = shape[0] * self._row_bytes
        self._marks_at = -(-pixel_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = self._marks_at + shape[0] * _MARK_BYTES
        self._file, self._writable = _open(path, size)
        weakref.finalize(self, os.close, self._file)
        with contextlib.suppress(OSError):  # a store that can only be read
            os.utime(path)
        with contextlib.suppress(OSError, ImportError):  # a file system without locks
            _lock(self._file, shared=True)
        self._map = mmap.mmap(self._file, size, access=mmap.ACCESS_READ)
        self._pixels = np.frombuffer(self._map, np.uint8, pixel_bytes).reshape(shape)
        self._marks = np.frombuffer(self._map, np.int64, 2 * shape[0], self._marks_at).reshape(-1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedStore, (self.path, self.shape, self.salt)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels uint8 [n, H, W, C], labels int64 [n] and known bool [n] of `rows` int64 [n].

        Where a row is not known, its pixels and label mean nothing.
        """
        images, marks = np.take(self._pixels, rows, axis=0), np.take(self._marks, rows, axis=0)
        labels, known = marks[:, 0].copy(), marks[:, 1] != 0
        known[known] = self._checks(rows[known], labels[known], images[known]) == marks[known, 1]
        return images, labels, known

    def write(self, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """Keeps decoded rows, as read gives them. What the disk refuses is not kept, nor anything after it."""
        marks = np.stack((labels, self._checks(rows, labels, images)), axis=1)
        try:
            for row, pixels, mark in zip(rows.tolist() if self._writable else [], images, marks, strict=False):
                # Not through the map: a page that a full disk cannot take would kill the process there.
                os.pwrite(self._file, pixels, row * self._row_bytes)
                os.pwrite(self._file, mark, self._marks_at + row * _MARK_BYTES)
        except OSError:
            self._writable = False

    def complete(self) -> bool:
        """Whether all rows have been decoded, as far as their marks say."""
        return bool(self._marks[:, 1].all())

    def _checks(self, rows: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
        heads = np.stack((rows, labels), axis=1)
        pixels = images.reshape(len(rows), self._row_bytes)
        sums = [zlib.crc32(row.data, zlib.crc32(head.data, self.salt)) for head, row in zip(heads, pixels, strict=True)]
        return np.array(sums, dtype=np.int64) + (1 << 32)


def open_store(
    dataset: Any, about: dict[str, Any], shape: tuple[int, int, int, int], budget_bytes: float
) -> tuple[DecodedStore | None, str | None]:
    """The store of a datasets.Dataset beside that library's cache, or None and, unless that is as wished, why.

    about: what the decoded images depend on besides the data set's content; with it they are another store.
    shape: (num_images, H, W, C). budget_bytes: larger sets are not stored.
    """
    size = float(np.prod(shape, dtype=np.float64))
    # Without caching the library gives its data sets random fingerprints; Windows has no os.pwrite.
    if size > budget_bytes or not datasets.is_caching_enabled() or not hasattr(os, "pwrite"):
        return None, None
    codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "avif")}
    identity = about | {
        "fingerprint": dataset._fingerprint,
        "shape": list(shape),
        "version": _VERSION,
        "pillow": PIL.__version__,
        "codecs": codecs,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER
    path = folder / f"{digest[:32]}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (described := path.with_suffix(".json")).exists():
            write_json(described, identity)  # for people: nothing reads it
        if not path.exists():
            _remove_unused(folder)  # first, for they may hold the space that the new one needs
        return DecodedStore(path, shape, int(digest[-8:], 16)), None
    except OSError as error:
        return None, f"decoded images are not kept in {folder}, so each epoch decodes anew: {error.strerror or error}"


def _remove_unused(folder: Path) -> None:
    """Removes the stores that nobody has opened for 30 days and nobody has open."""
    for path in folder.glob("*.bin"):
        with contextlib.suppress(OSError, ImportError):
            if not re.fullmatch(r"[0-9a-f]{32}", path.stem) or path.stat().st_mtime > time.time() - _UNUSED_SECONDS:
                continue
            file = os.open(path, os.O_RDWR)
            try:
                _lock(file, shared=False)
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)
            finally:
                os.close(file)


def _lock(file: int, shared: bool) -> None:
    """A lock that lasts until the file is closed, by all processes that inherited it. OSError where others hold it."""
    import fcntl  # not on Windows

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _open(path: Path, size: int) -> tuple[int, bool]:
    """A descriptor of the file, at least `size` long with all its blocks reserved, and whether it can be written."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if not path.exists() or path.stat().st_size < size:
            raise
        return os.open(path, os.O_RDONLY), False
    try:
        if os.fstat(file).st_size < size:
            _reserve(path, file, size)
    except OSError:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file, True


def _reserve(path: Path, file: int, size: int) -> None:
    """Zeros up to `size`, which overwrite nothing, so that several processes may do it at once."""
    free = shutil.disk_usage(path.parent).free
    if size > free // 2:
        raise OSError(f"they take {size / 1e9:.3g} GB, more than half of the {free / 1e9:.3g} GB that are free there")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
