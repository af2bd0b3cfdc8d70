"""The common part of every benchmark record: what it ran on, how it was timed, where the line goes."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def environment(device: str) -> dict[str, Any]:
    """The facts that every line carries: device, clocks, driver, versions, commit, time and command."""
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    smi = _output("nvidia-smi", query, "--format=csv,noheader", "--id=0") if device == "cuda" else None
    driver, *clocks = smi.split(", ") if smi else (None,)
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "clocks": ", ".join(c for c in clocks if c) or None,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "accelerate": _version("accelerate"),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def results_path(facts: Mapping[str, Any]) -> Path:
    """benchmarks/results/<device>/<date>-<commit>.jsonl for the facts of `environment`."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug / f"{facts['utc'][:10]}-{(facts['commit'] or 'none')[:8]}.jsonl"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of `repetitions` samples of `calls` calls each."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repetitions: int
    calls: int


def timings(
    functions: Mapping[str, Callable[[int], Any]], device: str, *, repetitions: int, sample_ms: float
) -> dict[str, Timing]:
    """Time functions against each other, interleaved: every repetition takes one sample of each.

    A function is called with a running number, by which it can rotate its buffers. A sample is as many calls as fill
    sample_ms, so that the clock and the queue's start cost nothing.
    """
    calls = {}
    for name, function in functions.items():
        for i in range(3):
            function(i)
        once = _sample(function, 3, device)
        calls[name] = max(1, min(1000, round(sample_ms / max(once, 1e-4))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            samples[name].append(_sample(function, calls[name], device))
    return {name: Timing(*_percentiles(values), repetitions, calls[name]) for name, values in samples.items()}


def _sample(function: Callable[[int], Any], calls: int, device: str) -> float:
    """Milliseconds per call."""
    if device != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            function(i)
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for i in range(calls):
        function(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    p20, p50, p80 = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return float(p20), float(p50), float(p80)


def copy_rate(device: str) -> float:
    """GB/s of a device copy (bytes read plus written) on tensors far larger than any cache."""
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    timing = timings({"copy": lambda _: target.copy_(source)}, device, repetitions=10, sample_ms=1.0)["copy"]
    return 2 * size / timing.p50_ms / 1e6
