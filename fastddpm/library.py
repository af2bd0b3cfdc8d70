"""Calls of datasets, pyarrow and file systems: exceptions become one line, and those that may pass are retried."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import datasets
import huggingface_hub.utils

from .errors import ConfigError, DataError

T = TypeVar("T")

RETRY_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts at a remote file."""

_LOGGERS = ("datasets", "huggingface_hub")
_NETWORK = ("aiohttp", "httpx", "requests", "urllib3", "botocore", "huggingface_hub")
_WORTH_WAITING = (408, 425, 429)  # HTTP statuses below 500 that pass


class _Mute(logging.Filter):
    """Drops every record. A filter on the handler costs 1 us; setting a level clears all loggers' caches, 0.2 ms."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


@contextlib.contextmanager
def library_errors(source: str, bars: bool = False) -> Iterator[None]:
    """Around calls of datasets and pyarrow: any exception becomes one DataError line, and stderr stays quiet.

    bars: leave the progress bars of long downloads on, where a person is watching the first process.
    """
    bars = bars and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for handler in [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]:
            mute = _Mute()
            handler.addFilter(mute)
            undo.callback(handler.removeFilter, mute)
        if not bars:
            for library in (datasets, huggingface_hub.utils):
                if not library.are_progress_bars_disabled():
                    library.disable_progress_bars()
                    undo.callback(library.enable_progress_bars)
        try:
            yield
        except (DataError, ConfigError):
            raise
        except Exception as error:
            raise DataError(f"{source}: {explained(error)}") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of an exception, or of the one that caused it where datasets says no more, on one line."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())
    message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."


def explained(error: BaseException) -> str:
    """one_line, and what to do where too many files are open."""
    if not _too_many_files(error):
        return one_line(error)
    return (
        f"{one_line(error)}: each lane of each source keeps one open: lower data.lanes, or raise the limit (ulimit -n)"
    )


def _too_many_files(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def raise_file_limit() -> None:
    """Lets this process open as many files as the system allows it to: a stream holds one for each lane and source."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as hf://datasets/..."""
    return "://" in path


def may_pass(error: BaseException, remote: bool) -> bool:
    """Whether trying again makes sense: the network's errors and, of remote files, the operating system's."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_WAITING:
        return False
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if _too_many_files(error):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return not libraries.isdisjoint(_NETWORK) or (remote and isinstance(error, OSError))


def pause(failures: int, name: str, error: BaseException) -> None:
    """Says that `name` has failed for the failures-th time in a row and waits; raises `error` after the last pause."""
    if failures > len(RETRY_PAUSES):
        raise error
    seconds = RETRY_PAUSES[failures - 1]
    attempt = f"attempt {failures + 1} of {len(RETRY_PAUSES) + 1}"
    print(f"fastddpm: {name}: {one_line(error)}; {attempt} in {seconds:g} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def retried(action: Callable[[], T], name: str, remote: bool) -> T:
    """What `action` returns, tried again where its error may pass."""
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            if not may_pass(error, remote):
                raise
            failures += 1
            pause(failures, name, error)
