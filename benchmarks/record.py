"""The common part of every benchmark: what it ran on, how it is timed, the fields of a record, where the line goes.

Records of one `workload` and `case` on one device are rivals of each other; `ours` says whose an implementation is. A
record with correct = False carries no time and is never plotted.
"""

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
        "device_type": device,
        "clocks": ", ".join(c for c in clocks if c) or None,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "accelerate": _version("accelerate"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def _command() -> str:
    """This process's command line, without the place of the clone."""
    program = Path(sys.argv[0])
    is_ours = program.resolve().parent == ROOT / "benchmarks"
    return " ".join(["python", *(["-m", f"benchmarks.{program.stem}"] if is_ours else [program.name]), *sys.argv[1:]])


def results_path(facts: Mapping[str, Any]) -> Path:
    """benchmarks/results/<device>/<date>-<commit>.jsonl for the facts of `environment`."""
    name = f"{facts['utc'][:10]}-{(facts['commit'] or 'none')[:8]}.jsonl"
    return ROOT / "benchmarks" / "results" / slug(facts["device"]) / name


def slug(device: str) -> str:
    """A folder's name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.quantile(torch.tensor(values, dtype=torch.float64), wanted)
    return float(p20), float(p50), float(p80)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, device: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of whole calls, candidates in turn: every round calls each once, beginning with another one.

    The device is waited for before and after each call. At most `rounds` rounds; after `seconds` no further one begins,
    but the first min(5, rounds) are always taken. Warm up (and compile) before.
    """
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - start > seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            begin = time.perf_counter()
            candidates[name]()
            synchronize(device)
            samples[name].append((time.perf_counter() - begin) * 1e3)
    return samples


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def quantiles(ms: Sequence[float]) -> dict[str, float | int]:
    """p20_ms, p50_ms, p80_ms and repetitions of a list of milliseconds."""
    p20, p50, p80 = _percentiles(ms)
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "repetitions": len(ms)}


def copy_rate(device: str) -> float:
    """GB/s of a device copy (bytes read plus written) on tensors far larger than any cache."""
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    timing = timings({"copy": lambda _: target.copy_(source)}, device, repetitions=10, sample_ms=1.0)["copy"]
    return 2 * size / timing.p50_ms / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product in the dtype: 8192 on a GPU, 1024 on a CPU, as torch is set up to do it."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = timings({"matmul": lambda _: a @ b}, device, repetitions=10, sample_ms=50.0)["matmul"]
    return 2 * size**3 / timing.p50_ms / 1e9


@dataclass(frozen=True)
class Rates:
    """What the device reached in the same process: the yardsticks of a record's shares."""

    copy_gb_per_s: float
    matmul_tflops: float | None = None
    """Of the record's dtype; None where no share of it is reported."""


def make_record(
    workload: str,
    case: str,
    impl: str,
    *,
    ours: bool,
    correct: bool,
    facts: Mapping[str, Any],
    rates: Rates,
    timing: Mapping[str, float | int | None] | None,
    direction: str,
    dtype: str,
    shape: Sequence[int],
    memory_format: str,
    ideal_bytes: int | None = None,
    images: int | None = None,
    gflop_per_image: float | None = None,
    peak_memory_bytes: int | None = None,
    error: float | None = None,
    torch_error: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line with every field; those that do not apply are None, and all rates are None unless correct and timed.

    Args:
        workload: the benchmark, e.g. "train_step". case: what is compared, the same words for ours and its rivals.
        impl: eager, torch.compile, triton, diffusers, lucidrains, ... with its variant.
        facts: of `environment`. timing: of `quantiles`, per call. dtype: e.g. "bfloat16".
        ideal_bytes: least traffic of a call. images: finished by a call. gflop_per_image: of all their arithmetic.
        error, torch_error: worst error of this and of plain PyTorch against the truth. more: the workload's own fields.
    """
    timed = dict(timing) if correct and timing else {"p20_ms": None, "p50_ms": None, "p80_ms": None, "repetitions": 0}
    p50 = timed["p50_ms"]
    gb_per_s = ideal_bytes / p50 / 1e6 if p50 and ideal_bytes else None
    tflops = gflop_per_image * images / p50 if p50 and images and gflop_per_image else None
    return {
        "workload": workload,
        "case": case,
        "impl": impl,
        "ours": ours,
        "correct": correct,
        "direction": direction,
        "dtype": dtype,
        "shape": list(shape),
        "memory_format": memory_format,
        **timed,
        "peak_memory_bytes": peak_memory_bytes,
        "ideal_bytes": ideal_bytes,
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": rates.copy_gb_per_s,
        "copy_share": gb_per_s / rates.copy_gb_per_s if gb_per_s else None,
        "images_per_s": images / p50 * 1e3 if p50 and images else None,
        "gflop_per_image": gflop_per_image,
        "matmul_tflops": rates.matmul_tflops,
        "matmul_share": tflops / rates.matmul_tflops if tflops and rates.matmul_tflops else None,
        "error": error,
        "torch_error": torch_error,
        **more,
        **facts,
    }


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All lines of the .jsonl files below a folder, by file name. Raises ValueError naming a line that is not JSON."""
    records = []
    for path in sorted(folder.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}): was a run killed while it wrote?") from error
    return records
