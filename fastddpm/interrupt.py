"""SIGINT and SIGTERM as a request to stop after the current step, agreed on by all ranks."""

import signal
import types
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C interrupts at once.

    With several processes the ranks vote on a gloo group beside the training's own, so a step never waits for the GPU:
    a vote is sent after each step and read after the next, and all ranks stop at the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._vote: tuple[Any, torch.Tensor] | None = None
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
        if self._vote is not None and exc[0] is None:
            self._vote[0].wait()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def agreed(self) -> bool:
        """Whether to stop now; called once per step on every rank, with the same answer on all."""
        if self._group is None:
            return self.asked
        stop = False
        if self._vote is not None:
            work, flag = self._vote
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([int(self.asked)])
        self._vote = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return stop
