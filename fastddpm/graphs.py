"""Capturing work in a CUDA graph, with an error that says why where that fails."""

from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import ConfigError

T = TypeVar("T")


def capture(run: Callable[[], T], stream: torch.cuda.Stream, otherwise: str) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture run() on the stream; returns the graph and what run returned, tensors that each replay writes anew.

    Args:
        run: queues work on the device without waiting for it; it has run before, so that libraries are set up.
        otherwise: what the user can do without a graph, the end of the message.

    Raises:
        ConfigError: if run does what cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": a loader's pinning thread and NCCL's watchdog call CUDA while this one captures.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # the capture's own end hides what went wrong inside
            cause = cause.__context__
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"a step could not be captured in a CUDA graph: {reason}; {otherwise}") from error
    return graph, result
