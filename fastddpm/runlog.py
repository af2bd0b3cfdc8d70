"""What a run says while it runs: RUN/log.jsonl for programs, a progress bar or plain lines on stderr for people."""

import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import replace_file, write_json


def write_status(run: Path, status: str, step: int, **facts: Any) -> None:
    """Replace RUN/status.json, which outlives what launchers make of exit codes.

    status: running, done, preempted (a signal stopped the run, which goes on with the same command) or failed.
    """
    record = {"status": status, "step": step, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_json(run / "status.json", record | {"pid": os.getpid(), "host": socket.gethostname()})


def read_status(run: Path) -> dict[str, Any]:
    """RUN/status.json, or nothing where there is none."""
    try:
        found = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class RunLog:
    """RUN/log.jsonl, or another file of its kind: one JSON object per event, in step order, no repeats on restart."""

    def __init__(self, run: Path, name: str = "log.jsonl") -> None:
        self.path = run / name

    def rewind(self, step: int) -> None:
        """Drop lines beyond `step`, which a restart will write again, and a last line torn by a kill."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        kept = b"".join(line + b"\n" for line in raw.split(b"\n") if self._step(line) <= step)
        if kept != raw:
            replace_file(self.path, lambda temporary: temporary.write_bytes(kept))

    @staticmethod
    def _step(line: bytes) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            return float("inf")

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite, which JSON does not have, become null."""
        with self.path.open("a") as handle:
            handle.write(to_json(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All lines, oldest first; without one that a kill has torn."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        return [json.loads(line) for line in lines if math.isfinite(self._step(line))]


def to_json(record: Any) -> str:
    """One line of JSON, with null for numbers that are not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), allow_nan=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def make_bar(desc: str, unit: str, total: int, initial: int = 0, enabled: bool = True) -> tqdm:
    """A progress bar on stderr with rate and time left, shown on a terminal only."""
    # Asked here, because tqdm draws nothing on a terminal that says it has 0 rows, as many pseudo-terminals do.
    size = shutil.get_terminal_size((100, 24))
    return tqdm(
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        unit_scale=True,
        smoothing=0.05,
        file=sys.stderr,
        ncols=size.columns - 1,
        nrows=size.lines,
        disable=not (enabled and sys.stderr.isatty()),
    )


class Progress:
    """A bar on a terminal, a line per log interval in a pipe, nothing on ranks other than 0."""

    def __init__(self, *, first_step: int, last_step: int, batch_size: int, enabled: bool) -> None:
        self.last_step, self.batch_size, self.enabled = last_step, batch_size, enabled
        bar = make_bar("training", "images", last_step * batch_size, first_step * batch_size, enabled)
        self.bar: tqdm | None = None if bar.disable else bar

    def step(self) -> None:
        """One optimiser step is done."""
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def report(self, record: dict[str, Any]) -> None:
        """Show a log record."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{record['loss']:.4f}", step=record["step"], refresh=False)
        elif self.enabled:
            left = (self.last_step - record["step"]) * self.batch_size / max(record["images_per_s"], 1e-9)
            self.say(
                f"step {record['step']}/{self.last_step}  loss {record['loss']:.4f}  "
                f"{record['images_per_s']:.1f} images/s  {_clock(left)} left"
            )

    def say(self, message: str) -> None:
        """A line to the user that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(message, file=sys.stderr)
        elif self.enabled:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
