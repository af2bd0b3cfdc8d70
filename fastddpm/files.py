"""Files that are whole at any instant: write to a temporary name, fsync, rename; and hashes that prove it."""

import contextlib
import hashlib
import json
import os
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .errors import ConfigError


def sync(path: Path) -> None:
    """fsync a file or a folder, so that a rename of it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it over `path`.

    Readers see the old file or the new one, never a torn one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because writers such as PIL choose their format by it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_HELD: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: loader processes outlive a killed trainer by seconds and must not hold its lock."""
    for handle in list(_HELD):
        handle.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def expand(path: str) -> Path:
    """A user's path with ~ expanded where there is such a user."""
    return Path(os.path.expanduser(path))


def lock_folder(path: Path) -> IO[str]:
    """Hold a folder for this process until the returned file is closed or the process ends, however it ends.

    Raises:
        ConfigError: if another process holds it.
    """
    handle = (path / ".lock").open("a")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ConfigError(
            f"{path} is in use by another process: wait for it, stop it, or choose another --run"
        ) from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: nobody is kept out, as before
    _HELD.add(handle)
    return handle


def writable_folder(path: Path, what: str) -> Path:
    """Make a folder and prove that a file can be written into it.

    Raises:
        ConfigError: naming the folder, if it cannot be made or written.
    """
    probe = path / f".{uuid.uuid4().hex[:8]}.probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be written: {error.strerror or error}") from error
    with contextlib.suppress(FileNotFoundError):
        probe.unlink()
    return path
