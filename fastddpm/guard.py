"""Numerics guard: what the host makes of each step's loss and gradient norm, without making it wait for the device.

A step whose loss or gradient is not finite is skipped on the device, on every rank alike (step.py). Here such steps
are counted and written down, too many of them end the run, and a spike of the gradient's norm is noted.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import NumericsError

LAG = 2
"""Steps after which a GPU's numbers are read: by then they have arrived, and every rank reads them at the same step."""
MAX_IN_A_ROW = 3
MAX_IN_WINDOW, WINDOW = 10, 1000
SPIKE = 10.0
"""Times the usual norm that are noted."""
SETTLED = 100
"""Steps after which a norm is usual."""


class StepNumbers(NamedTuple):
    """What one step of this process came to, on the host."""

    number: int
    """The step, counted from 1."""
    norm: float
    """Of the whole gradient before clipping, the same on all ranks."""
    losses: Tensor
    """float32 [n]: of this rank's images."""
    rows: Tensor
    """int64 [n]: their rows in the data set."""
    t: Tensor
    """int64 [n]: their timesteps."""


class Mailbox:
    """Carries each step's numbers to the host; what is put in comes out LAG steps later on a GPU, at once on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.lag = LAG if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, Any, list[Tensor]]] = deque()

    def put(self, number: int, norm: Tensor, losses: list[Tensor], rows: list[Tensor], t: list[Tensor]) -> None:
        """norm float32 [], and losses float32 [n] and t int64 [n] of each micro-batch, on the device, which may
        overwrite them later.

        rows: int64 [n] of each micro-batch, on the host.
        """
        # As float32, which holds timesteps below 2^24 as they are.
        packed = torch.cat([norm.detach().reshape(1).float(), *losses, *(part.float() for part in t)])
        event = None
        if packed.device.type == "cuda":
            arrived = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            arrived.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            packed = arrived
        self._waiting.append((number, packed, event, rows))

    def take(self, everything: bool = False) -> Iterator[StepNumbers]:
        """The numbers that are due, oldest first."""
        while len(self._waiting) > (0 if everything else self.lag):
            number, packed, event, rows = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            packed = packed.cpu()  # of a device that is neither; a GPU's has arrived
            losses, t = packed[1:].chunk(2)
            yield StepNumbers(number, packed[0].item(), losses, torch.cat(rows), t.long())


@dataclass
class Guard:
    """Counts of a run; a function of its steps alone, so a checkpoint carries it (to_facts, from_facts)."""

    skipped: list[int] = field(default_factory=list)
    """Numbers of the steps of the last WINDOW that were skipped."""
    num_skipped: int = 0
    """Steps skipped since the start of the run."""
    log_norm: float = 0.0
    """Running mean of the logarithm of the norm."""
    num_norms: int = 0
    """Norms in it."""

    def to_facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "skipped": list(self.skipped)}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Guard":
        """The inverse of to_facts; a run that knows none starts afresh."""
        return cls(**facts) if facts else cls()

    def skip(self, number: int) -> None:
        """Step `number` was skipped."""
        self.skipped = [n for n in self.skipped if n > number - WINDOW] + [number]
        self.num_skipped += 1

    def check(self, number: int, what: str) -> None:
        """After skip.

        Raises:
            NumericsError: with three skipped steps in a row or more than ten in a thousand; `what` names the images.
        """
        last = self.skipped[-MAX_IN_A_ROW:]
        if last == list(range(number - MAX_IN_A_ROW + 1, number + 1)):
            why = f"{MAX_IN_A_ROW} steps in a row"
        elif len(self.skipped) > MAX_IN_WINDOW:
            why = f"{len(self.skipped)} of the last {WINDOW} steps"
        else:
            return
        raise NumericsError(
            f"{why} had a loss or gradient that is not finite, the last of them step {number} ({what}); the run stops "
            "and its checkpoints are good: lower optim.lr, set optim.clip_norm, or look at these images "
            f"(fastddpm replay RUN --step {number} computes the step again)"
        )

    def spike(self, norm: float) -> float | None:
        """Take note of a finite norm; the usual one if this is a spike."""
        if norm <= 0.0:
            return None
        usual = math.exp(self.log_norm)
        if self.num_norms >= SETTLED and norm > SPIKE * usual:
            return usual  # not counted, or a row of them would become usual
        self.num_norms += 1
        self.log_norm += (math.log(norm) - self.log_norm) / min(self.num_norms, SETTLED)
        return None
