"""add_noise: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM eq. 4), eps drawn inside and never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, check_table, compute_dtype, memory_format, resolve_impl
from .draws import images_of_normals
from .philox import Stream, normals_reference, split_ordinals, split_seed, stream_tag


def add_noise(
    x_0: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """Noise a batch to its timesteps; the noise is that of Stream.EPS at each sample's ordinal.

    x_0 [N, C, H, W]: uint8 (taken as x / 127.5 - 1) or floating point (taken as it is), any strides. t int64 [N] in
    0..T-1; ordinals int64 [N]; the tables fp32 [T] on x_0's device. flip bool [N] or None: mirror the sample along W
    before noise is added. Returns x_t of the dtype in x_0's memory format (dense); arithmetic is fp32. No gradients.
    Raises ValueError or TypeError for arguments out of shape, dtype or device; t out of range is not checked on a GPU.
    """
    check_images("x_0", x_0)
    check_noise_arguments(x_0, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, flip, seed)
    impl = resolve_impl(impl, x_0.device)
    return _add_noise_op(x_0, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, flip, dtype, impl)


def add_noise_reference(
    x_0: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`add_noise` in plain torch. Computes in float64 when x_0 or the tables are float64."""
    work = compute_dtype(x_0, sqrt_alpha_bar)
    x = normalised(x_0, flip, work)
    eps = eps_of(x_0, ordinals, seed, work)
    scale, sigma = (table.to(work)[t][:, None, None, None] for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar))
    # Products apart: torch's fused multiply-adds round differently at the end of a loop, so by batch position.
    x_t = eps.mul_(sigma).add_(x.mul_(scale))
    return x_t.to(dtype).contiguous(memory_format=memory_format(x_0))


def add_noise_triton(
    x_0: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`add_noise` as one Triton launch."""
    raise NotImplementedError


def normalised(x_0: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A fresh copy of x_0 in the dtype: uint8 mapped to [-1, 1], samples with `flip` mirrored along W."""
    x = torch.empty(x_0.shape, dtype=dtype, device=x_0.device, memory_format=memory_format(x_0)).copy_(x_0)
    if x_0.dtype == torch.uint8:
        x.div_(127.5).sub_(1.0)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    return x


def eps_of(x: Tensor, ordinals: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """The training noise of samples shaped like x [N, C, H, W], in x's memory format."""
    c1, c2 = split_ordinals(ordinals)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    normals = normals_reference(seed, c1, c2, stream_tag(Stream.EPS), shape[0] * shape[1] * shape[2], dtype)
    return images_of_normals(normals, shape, memory_format(x) == torch.channels_last)


def check_noise_arguments(
    x: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    flip: Tensor | None,
    seed: int,
) -> None:
    """Raise ValueError or TypeError unless the arguments fit samples x [N, C, H, W]."""
    split_seed(seed)
    check_per_sample("t", t, x.shape[0], torch.int64, x.device)
    check_per_sample("ordinals", ordinals, x.shape[0], torch.int64, x.device)
    check_table("sqrt_alpha_bar", sqrt_alpha_bar, x.device)
    check_table("sqrt_one_minus_alpha_bar", sqrt_one_minus_alpha_bar, x.device)
    if sqrt_alpha_bar.shape != sqrt_one_minus_alpha_bar.shape:
        raise ValueError(
            f"the tables differ in length: sqrt_alpha_bar has {sqrt_alpha_bar.shape[0]} entries, "
            f"sqrt_one_minus_alpha_bar {sqrt_one_minus_alpha_bar.shape[0]}"
        )
    if flip is not None:
        check_per_sample("flip", flip, x.shape[0], torch.bool, x.device)


@torch.library.custom_op("fastddpm_kernels::add_noise", mutates_args=())
def _add_noise_op(
    x_0: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    flip: Tensor | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    function = add_noise_triton if impl == "triton" else add_noise_reference
    return function(x_0, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed=seed, flip=flip, dtype=dtype)


@_add_noise_op.register_fake
def _(
    x_0: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    flip: Tensor | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return torch.empty(x_0.shape, dtype=dtype, device=x_0.device, memory_format=memory_format(x_0))
