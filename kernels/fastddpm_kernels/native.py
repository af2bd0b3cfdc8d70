"""group_norm_silu on CPUs: native.cpp, compiled on the user's machine when it is first asked for, called by ctypes.

The library is kept in $XDG_CACHE_HOME/fastddpm/native (~/.cache without it), a directory of the user's own, under the
hash of everything that it was made of. Its threads are torch's: it calls the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-w")
TIMEOUT_SECONDS = 300
DTYPES = (torch.bfloat16, torch.float32)

_SIZES = ("num_samples", "num_pixels", "channels_x", "channels_skip", "num_groups", "num_threads")
_OPTIONS = ("is_bf16", "silu", "threshold", "tag", "seed")
_IMAGES = ("x", "residual", "skip", "dy", "dtotal", "y", "total", "dx", "dskip")
_VECTORS = ("add", "weight", "bias", "scale", "shift", "ordinals", "mean", "rstd", "sum_dz", "sum_dz_xhat", "dadd")


class _Args(ctypes.Structure):
    """`Args` of native.cpp; every field is 8 bytes wide."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, *_OPTIONS)),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_IMAGES, *_VECTORS, "gomp_parallel")),
    )


def native_available() -> str | None:
    """None where the library is there or can be compiled (a few seconds, once), else one line saying why not."""
    library = _library()
    return library if isinstance(library, str) else None


def forward(
    x: Tensor,
    residual: Tensor | None,
    skip: Tensor | None,
    add: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    ordinals: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y [N, C, H, W] in x's dtype, total [N, C1, H, W] (None without residual), mean and rstd [N, G] float32.

    x, residual [N, C1, H, W] and skip [N, C2, H, W]: bfloat16 or float32, channels_last and dense; add [N, C1], weight
    and bias [C = C1 + C2], scale and shift [N, C]: float32, contiguous. threshold = round(p 65536), 0 for no dropout,
    else tag, seed and ordinals int64 [N] as in `dropout`. Raises ValueError for tensors of another kind and
    RuntimeError where there is no library.
    """
    args, num_channels = _arguments(
        x, skip, weight, bias, scale, shift, num_groups, silu, threshold, tag, seed, ordinals
    )
    n = x.shape[0]
    y = torch.empty((n, num_channels, *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    total = None if residual is None else torch.empty_like(x)
    mean, rstd = (torch.empty(n, num_groups) for _ in range(2))
    args.eps = eps
    args.residual, args.add = _image("residual", residual, x.shape, x.dtype), _vector("add", add, (n, x.shape[1]))
    args.y, args.total, args.mean, args.rstd = (None if t is None else t.data_ptr() for t in (y, total, mean, rstd))
    _call("group_norm_silu_forward", args)
    return y, total, mean, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total_or_x: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    ordinals: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """dx [N, C1, H, W], dskip (None without skip), sum_dz and sum_dz_xhat [N, C], dadd [N, C1] float32.

    total_or_x: the forward's total, with add = None, or its x where there was no residual. dtotal, the gradient of
    total, is added to dx. The sums are over pixels: of dz, the gradient at FiLM's output, of dz times the normalised
    value, and dadd of dx before it is rounded, dtotal included. Other arguments and errors as in `forward`.
    """
    args, num_channels = _arguments(
        total_or_x, skip, weight, bias, scale, shift, num_groups, silu, threshold, tag, seed, ordinals
    )
    x, n, channels_x = total_or_x, total_or_x.shape[0], total_or_x.shape[1]
    dx = torch.empty_like(x)
    dskip = None if skip is None else torch.empty_like(skip)
    sum_dz, sum_dz_xhat, dadd = (torch.empty(n, c) for c in (num_channels, num_channels, channels_x))
    args.dy = _image("dy", dy, (n, num_channels, *x.shape[2:]), x.dtype)
    args.dtotal, args.add = _image("dtotal", dtotal, x.shape, x.dtype), _vector("add", add, (n, channels_x))
    args.mean, args.rstd = (_vector(k, t, (n, num_groups)) for k, t in (("mean", mean), ("rstd", rstd)))
    args.dx, args.dskip = dx.data_ptr(), None if dskip is None else dskip.data_ptr()
    args.sum_dz, args.sum_dz_xhat, args.dadd = sum_dz.data_ptr(), sum_dz_xhat.data_ptr(), dadd.data_ptr()
    _call("group_norm_silu_backward", args)
    return dx, dskip, sum_dz, sum_dz_xhat, dadd


def _arguments(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    ordinals: Tensor | None,
) -> tuple[_Args, int]:
    """What both directions share, and C."""
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"impl='native' takes [N, C, H, W] in bfloat16 or float32, got {x.dtype} {list(x.shape)}")
    n, channels_x, height, width = x.shape
    channels_skip = 0 if skip is None else skip.shape[1]
    num_channels = channels_x + channels_skip
    if channels_x == 0 or num_groups < 1 or num_channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_channels} channels")
    if not 0 <= threshold < 65536 or (threshold and ordinals is None):
        raise ValueError(f"dropout needs ordinals and a threshold in [0, 65536), got {threshold}")
    args = _Args(n, height * width, channels_x, channels_skip, num_groups, torch.get_num_threads())
    args.is_bf16, args.silu, args.threshold, args.tag, args.seed = x.dtype == torch.bfloat16, silu, threshold, tag, seed
    args.x = _image("x", x, x.shape, x.dtype)
    args.skip = _image("skip", skip, (n, channels_skip, height, width), x.dtype)
    args.weight, args.bias = _vector("weight", weight, (num_channels,)), _vector("bias", bias, (num_channels,))
    args.scale, args.shift = _vector("scale", scale, (n, num_channels)), _vector("shift", shift, (n, num_channels))
    args.ordinals = _vector("ordinals", ordinals, (n,), torch.int64) if threshold else None
    args.gomp_parallel = _gomp_parallel()
    return args, num_channels


def _image(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """The address of a dense channels_last tensor of the shape and dtype on the CPU."""
    if x is None:
        return None
    if x.dtype != dtype or x.shape != shape or x.device.type != "cpu":
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} is not dense: call {name}.contiguous(memory_format=torch.channels_last)")
    return x.data_ptr()


def _vector(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int | None:
    """The address of a contiguous tensor of the shape and dtype on the CPU."""
    if x is None:
        return None
    if x.dtype != dtype or x.shape != shape or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {x.dtype} {list(x.shape)}")
    return x.data_ptr()


def _call(name: str, args: _Args) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"impl='native' cannot run: {library}")
    library[name](ctypes.byref(args))


@functools.cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in torch's own OpenMP runtime (GNU's or LLVM's), None where torch has none.

    A symbol is looked up in the library and all that it needs. A second runtime would be a second pool of threads
    that spin on the cores of the first.
    """
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return ctypes.CDLL(str(_compile()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())


def _compile() -> Path:
    """The library's path, made unless it is there. Raises OSError or RuntimeError."""
    if os.name != "posix":
        raise RuntimeError("it needs Linux or macOS")
    compiler = _compiler()
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    command = [*compiler, *FLAGS, native]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if version.returncode:
        raise RuntimeError(f"the compiler {shlex.join(compiler)!r} fails with --version: set CXX to one that works")
    parts = (SOURCE.read_text(), *command, version.stdout, _cpu())
    directory = _cache_directory()
    path = directory / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    if path.exists():
        return path
    # A name of its own until it is whole, so that several processes may do this at once.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-o", temporary, str(SOURCE)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            line = next((line for line in lines if "error" in line), lines[0] if lines else f"status {done.returncode}")
            raise RuntimeError(f"the compiler {shlex.join(compiler)!r} fails ({line.strip()}): set CXX to another one")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _compiler() -> list[str]:
    """$CXX (with its arguments), else the first of c++, g++ and clang++."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name in wanted[:1] or ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found, *wanted[1:]]
    if wanted:
        raise RuntimeError(f"the compiler CXX={wanted[0]!r} is not found: set CXX to a C++ compiler")
    raise RuntimeError("no C++ compiler (c++, g++, clang++) is found: install one or set CXX")


def _cpu() -> str:
    """What -march=native looks at: a home directory may be shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    first = cpuinfo.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.startswith(("model", "cpu family", "CPU p", "flags", "Features")))


def _cache_directory() -> Path:
    """Made if need be. Raises RuntimeError where another user could have put a library in it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "fastddpm" / "native"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f"{path} can be written by others: chmod 700 it, or set XDG_CACHE_HOME to a place of your own"
        )
    return path
