"""Which implementation runs, and the facts about tensors and launches that every op shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import HAS_TRITON, interpreting

IMPLS = ("triton", "reference")
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is also ROCm's name


def resolve_impl(impl: str | None, device: torch.device, cpu_impls: tuple[str, ...] = ()) -> str:
    """The implementation to run: `impl` itself, or the device's own when it is None. Never falls back.

    cpu_impls: names that the op knows besides, the first of which is the default off the GPU. Raises ValueError for an
    unknown name and RuntimeError when "triton" was asked for and cannot run there.
    """
    if impl is None:
        impl = "triton" if device.type in TRITON_DEVICES else (*cpu_impls, "reference")[0]
    known = (*IMPLS, *cpu_impls)
    if impl not in known:
        raise ValueError(f"impl={impl!r} is not known: use one of {', '.join(known)}, or None to choose by the device")
    if impl == "triton":
        if not HAS_TRITON:
            raise RuntimeError("impl='triton' needs the triton package: pip install triton, or use impl='reference'")
        if device.type not in TRITON_DEVICES and not interpreting():
            raise RuntimeError(
                f"impl='triton' cannot run on a {device.type} tensor: move it to a GPU, use impl='reference', or set "
                "TRITON_INTERPRET=1 before the first import to run the kernels in the interpreter"
            )
    return impl


def is_channels_last(x: Tensor) -> bool:
    """True when the channels of x [N, C, H, W] are its fastest axis (also for slices that leave gaps)."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense memory format that results made from x [N, C, H, W] are given."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64 (the references as truth), else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def check_images(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is [N, C, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got shape {tuple(x.shape)}")


def check_pixels(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is uint8 (0 .. 255) or floating point: other integers would be taken as they are."""
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{name} must be uint8 (0 .. 255) or floating point (-1 .. 1), got {x.dtype}")


def check_no_gradient(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that asks for a gradient it would not get."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} requires a gradient and gets none here: detach it")


def check_precision(impl: str, *tensors: Tensor | None) -> None:
    """Raise ValueError for float64 in the Triton kernels, whose arithmetic is float32."""
    if impl == "triton" and any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise ValueError("float64 is for impl='reference': the Triton kernels compute in float32")


def check_per_sample(name: str, x: Tensor, num_samples: int, dtype: torch.dtype | None, device: torch.device) -> None:
    """Raise unless x is [num_samples] of the dtype (None: any) on the device."""
    if x.shape != (num_samples,):
        raise ValueError(f"{name} must have shape [{num_samples}], got {list(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the samples are on {device}")


def check_table(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless x is a table [T] of float32 (or float64, for the references) on the device."""
    if x.dim() != 1:
        raise ValueError(f"{name} must be a table [T], got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 (alpha_bar in 16 bits spoils the noise levels), got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the samples are on {device}")
