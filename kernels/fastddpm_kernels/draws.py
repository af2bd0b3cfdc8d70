"""draw_timesteps and draw_normal: the addressable draws that stand alone (timesteps, flips, x_T)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_per_sample, resolve_impl
from .philox import MASK, Stream, normals_reference, philox_words, split_ordinals, split_seed, stream_tag


def draw_timesteps(
    ordinals: Tensor, num_timesteps: int, *, seed: int, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """The timestep and the flip flag of each sample.

    ordinals: int64 [N], the samples' positions in the sequence of samples consumed. num_timesteps: T in [1, 2^31].
    Returns t, int64 [N], uniform over 0..T-1, and flip, bool [N], true for half of the samples:
    t = (w0 T) >> 32 of quad 0 at Stream.TIMESTEP, flip = top bit of w0 of quad 0 at Stream.FLIP. No gradients.
    Raises ValueError or TypeError for a seed, T or ordinals out of shape or range.
    """
    check_ordinals("ordinals", ordinals)
    split_seed(seed)
    if not 1 <= num_timesteps <= 2**31:
        raise ValueError(f"num_timesteps must be in [1, 2^31], got {num_timesteps}")
    return _draw_timesteps_op(ordinals, num_timesteps, seed, resolve_impl(impl, ordinals.device))


def draw_timesteps_reference(ordinals: Tensor, num_timesteps: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`draw_timesteps` in plain torch."""
    c1, c2 = split_ordinals(ordinals)
    word_t = philox_words(seed, 0, c1, c2, stream_tag(Stream.TIMESTEP))[0]
    word_flip = philox_words(seed, 0, c1, c2, stream_tag(Stream.FLIP))[0]
    return (word_t * num_timesteps) >> 32, word_flip >= 2**31


def draw_timesteps_triton(ordinals: Tensor, num_timesteps: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`draw_timesteps` as one Triton launch."""
    raise NotImplementedError


def draw_normal(
    ordinals: Tensor,
    shape: tuple[int, int, int],
    *,
    seed: int,
    stream: int,
    step: int | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """Standard normals [N, C, H, W] of the dtype, addressed by (seed, stream, ordinal, element).

    ordinals: int64 [N]; shape: (C, H, W); stream: a `Stream` (or a whole `stream_tag`). step None: the counter holds
    the 64-bit ordinal. step an int in [0, 2^32): c1 = ordinal (low 32 bits) and c2 = step, the address of the noise of
    reverse step number `step` of image number `ordinal`. channels_last chooses the memory format and changes no value.
    No gradients. Raises ValueError or TypeError for arguments out of shape or range.
    """
    check_ordinals("ordinals", ordinals)
    split_seed(seed)
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    if step is not None and not 0 <= step <= MASK:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    num_channels, height, width = shape
    impl = resolve_impl(impl, ordinals.device)
    return _draw_normal_op(ordinals, num_channels, height, width, seed, int(stream), step, channels_last, dtype, impl)


def draw_normal_reference(
    ordinals: Tensor,
    shape: tuple[int, int, int],
    *,
    seed: int,
    stream: int,
    step: int | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`draw_normal` in plain torch: words exact, transform in float64, rounded once to the dtype."""
    c1, c2 = split_ordinals(ordinals)
    if step is not None:
        c2 = torch.full_like(c1, step)
    return images_of_normals(normals_reference(seed, c1, c2, int(stream), _size(shape), dtype), shape, channels_last)


def draw_normal_triton(
    ordinals: Tensor,
    shape: tuple[int, int, int],
    *,
    seed: int,
    stream: int,
    step: int | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`draw_normal` as one Triton launch."""
    raise NotImplementedError


def images_of_normals(normals: Tensor, shape: tuple[int, int, int], channels_last: bool) -> Tensor:
    """Dense [N, C, H, W] of normals [N, C H W] given in element order (H, W, C)."""
    num_channels, height, width = shape
    images = normals.reshape(-1, height, width, num_channels).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check_ordinals(name: str, ordinals: Tensor) -> None:
    """Raise unless ordinals are int64 [N]."""
    check_per_sample(name, ordinals, ordinals.numel(), torch.int64, ordinals.device)


def _size(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


@torch.library.custom_op("fastddpm_kernels::draw_timesteps", mutates_args=())
def _draw_timesteps_op(ordinals: Tensor, num_timesteps: int, seed: int, impl: str) -> tuple[Tensor, Tensor]:
    function = draw_timesteps_triton if impl == "triton" else draw_timesteps_reference
    return function(ordinals, num_timesteps, seed=seed)


@_draw_timesteps_op.register_fake
def _(ordinals: Tensor, num_timesteps: int, seed: int, impl: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ordinals), torch.empty_like(ordinals, dtype=torch.bool)


@torch.library.custom_op("fastddpm_kernels::draw_normal", mutates_args=())
def _draw_normal_op(
    ordinals: Tensor,
    num_channels: int,
    height: int,
    width: int,
    seed: int,
    stream: int,
    step: int | None,
    channels_last: bool,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    function = draw_normal_triton if impl == "triton" else draw_normal_reference
    shape = (num_channels, height, width)
    return function(ordinals, shape, seed=seed, stream=stream, step=step, channels_last=channels_last, dtype=dtype)


@_draw_normal_op.register_fake
def _(
    ordinals: Tensor,
    num_channels: int,
    height: int,
    width: int,
    seed: int,
    stream: int,
    step: int | None,
    channels_last: bool,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return torch.empty(
        (ordinals.shape[0], num_channels, height, width),
        dtype=dtype,
        device=ordinals.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
