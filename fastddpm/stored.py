"""Arrays that are worked out from a data set once and kept beside datasets' cache: row counts, rows that pass a filter.

A file is safetensors and carries a digest of its content: one that is damaged, cut short or a stranger's is worked out
again. Processes of one machine wait for the first of them to write it. Files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_VERSION = 2
_FOLDER = "fastddpm-index"


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of arrays and of whatever else JSON takes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def stored(identity: dict[str, Any], compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `compute` returns, int64 arrays by name, from the file of `identity` where there is a sound one.

    Where nothing can be written it is worked out each time. Raises what `compute` raises.
    """
    if not datasets.is_caching_enabled():
        return compute()
    path = Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER / f"{digest_of(identity, _VERSION)}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    with held(path.with_suffix(".lock")):
        found = _read(path)  # another process may have written it in the meantime
        if found is None:
            found = compute()
            _write(path, found)
    return found


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, other processes wait that want the same lock file; where there can be none, nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # without a lock the work is done more than once
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        yield


def _content(arrays: dict[str, np.ndarray]) -> str:
    return digest_of(*(part for name in sorted(arrays) for part in (name, arrays[name])))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            sound = (file.metadata() or {}).get("content") == _content(arrays)
    except (OSError, SafetensorError):
        return None
    return arrays if sound else None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_file(arrays, part, metadata={"content": _content(arrays)})
        os.replace(part, path)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            part.unlink()
