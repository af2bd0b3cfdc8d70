"""What a run finds on its machine: devices and processes, the precision that pays, memory, versions."""

import contextlib
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from .errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
# How much faster products have to be in bf16 for its rounding: without matrix units the casts eat the gain.
WORTH_BF16 = 1.5
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU)


def make_accelerator(precision: str, **kwargs: Any) -> Accelerator:
    """An accelerator of a settled precision (not "auto"), which is the config's alone, checked against the device.

    Raises:
        ConfigError: for fp16 on a CPU, where accelerate would run fp32 without a word, and for several processes that
            do not know of each other or have no device each.
    """
    if not kwargs.get("cpu"):
        check_processes()
    mixed = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # or accelerate refuses a second precision in one process
    accelerator = Accelerator(mixed_precision=mixed, **kwargs)
    if accelerator.device.type == "cpu":
        keep_memory()
    if precision == "fp16" and accelerator.device.type in ("cpu", "mps"):
        raise ConfigError(f"precision fp16 needs a GPU; on {accelerator.device.type} use bf16 or fp32")
    if accelerator.distributed_type not in SUPPORTED:
        raise ConfigError(
            f"distributed type {accelerator.distributed_type.value} is not supported: use one of the files in launch/"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and accelerator.num_processes == 1:
        raise ConfigError(
            f"{world} processes were launched but do not know of each other: on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def check_processes() -> None:
    """Check the processes that a launcher has started on this machine against its GPUs, before anything waits.

    Raises:
        ConfigError: several processes without a GPU that have not been told to use the CPU, where each would train the
            whole run by itself; more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    if not torch.accelerator.is_available():
        raise ConfigError(
            f"{world} processes were launched on a machine without a GPU: to train on CPUs, set ACCELERATE_USE_CPU=true"
        )
    if torch.cuda.is_available():
        # Some launchers say only which of this machine's processes this is.
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or int(os.environ.get("LOCAL_RANK", "0")) + 1)
        if here > (gpus := torch.cuda.device_count()):
            raise ConfigError(
                f"{here} processes were launched on this machine and {gpus} GPUs are visible to them: start one "
                "process per GPU, or make more visible (CUDA_VISIBLE_DEVICES)"
            )


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Round denormals of this process to 0 meanwhile: CPUs are slow at them (digits: 53 -> 46 ms a step).

    Ho's zero-scale layers start a run among them, and Adam's second moments end there.
    """
    before = bool(torch.full((1,), 1e-40).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back and asking again at every step.

    Activations of some megabytes come and go hundreds of times a step, and each page that is new costs a fault (Ho's
    net in bf16, batch 16: 815 -> 785 ms). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
            mallopt(parameter, value)


def join_processes(timeout: timedelta) -> None:
    """Have the processes that a launcher started find each other; one that waits longer for the others ends them all.

    Raises:
        ConfigError: as check_processes.
    """
    check_processes()
    # Before anything of accelerate's, whose first use takes torch's own timeout (10 minutes of NCCL, 30 of gloo).
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout)


def settle_precision(precision: str, stored: Callable[[], str | None] = lambda: None) -> tuple[str, str | None]:
    """fp32, bf16 or fp16, the same on all processes, and a line that says why if it was to be found out ("auto").

    What `stored` gives, else bf16 on CUDA devices that have it and on a CPU where products in it are measured to be
    faster, in less than a second. Rank 0 decides for all.
    """
    if precision != "auto":
        return precision, None
    check_processes()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which Accelerator reads, and this does not
    found: list[Any] = [None]
    if state.is_main_process:
        kept = stored()
        found = [_measured_precision(state.device) if kept is None else (kept, None)]
    if state.num_processes > 1:
        broadcast_object_list(found)
    chosen: tuple[str, str | None] = found[0]
    return chosen


def _measured_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if has else "fp32"), f"the GPU computes in bf16: {'yes' if has else 'no'}"
    if device.type != "cpu":
        return "fp32", f"bf16 on {device.type} has not been tried"
    fp32, bf16 = (product_rate(dtype) for dtype in (torch.float32, torch.bfloat16))
    chosen = "bf16" if bf16 > WORTH_BF16 * fp32 else "fp32"
    rates = f"{bf16 / 1e9:,.0f} GFLOP/s in bf16, {fp32 / 1e9:,.0f} in fp32"
    return chosen, f"products take {rates}, {torch.get_num_threads()} threads"


def product_rate(dtype: torch.dtype, size: int = 768) -> float:
    """FLOP per second of a CPU's matrix product, the best of a few."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + 0.25
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in (
        *("fastddpm", "torch", "triton", "accelerate", "datasets", "einops", "huggingface-hub", "numpy", "pillow"),
        *("pyarrow", "safetensors", "tyro"),
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a CUDA device, resident on the host otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where this fails with a clear ModuleNotFoundError

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
