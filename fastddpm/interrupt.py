"""SIGINT and SIGTERM as a request to stop after the current step, agreed on by all ranks; and following a launcher."""

import contextlib
import ctypes
import os
import signal
import sys
import time
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A Ctrl-C in a terminal reaches a process twice where its launcher forwards its own.
SAME_CTRL_C = 2.0
PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Have SIGTERM sent to this process when the launcher that started it ends (Linux).

    accelerate launch starts a single process and does not hand on signals: the training would go on unseen. Only
    where the parent is a launcher, since a shell that ends leaves its background jobs to themselves.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        words = b" ".join(command[:4])
        if sys.platform != "linux" or not any(name in words for name in (b"accelerate", b"torchrun", b"torch.dist")):
            return
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C, two seconds later, interrupts at once.

    With several processes the ranks vote on a gloo group beside the training's own, so a step never waits for the GPU:
    a vote is sent after each step and read after the next, and all ranks stop at the same step. With the vote travels
    a count, whose sum over all ranks and steps so far is `total`.
    """

    def __init__(self, total: int = 0, timeout: timedelta | None = None) -> None:
        self.asked: signal.Signals | None = None
        self.total = total
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._vote: tuple[Any, torch.Tensor] | None = None
        self._stop = False
        self._asked_at = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: its owner handles signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        if exc[0] is None:
            self.settle()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is not None and number == signal.SIGINT and now - self._asked_at > SAME_CTRL_C:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked, self._asked_at = signal.Signals(number), now

    def agreed(self, count: int = 0) -> bool:
        """Whether to stop now; called once per step on every rank, with the same answer on all.

        count: what this rank adds to `total`.
        """
        if self._group is None:
            self.total += count
            return self.asked is not None
        self.settle()
        numbers = torch.tensor([int(self.asked is not None), count])
        self._vote = (dist.all_reduce(numbers, group=self._group, async_op=True), numbers)
        return self._stop

    def settle(self) -> bool:
        """Wait for the vote that is under way, so that `total` holds all steps; whether to stop now."""
        if self._vote is not None:
            work, numbers = self._vote
            self._vote = None
            work.wait()
            asked, count = numbers.tolist()
            self._stop = self._stop or asked > 0
            self.total += count
        return self._stop if self._group is not None else self.asked is not None
