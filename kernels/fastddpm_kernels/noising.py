"""add_noise: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM eq. 4); eps is drawn inside, not stored."""

# Tuples grow in unrolled loops, which Triton types and mypy cannot.
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import (
    check_images,
    check_per_sample,
    check_pixels,
    check_precision,
    check_table,
    compute_dtype,
    memory_format,
    resolve_impl,
)
from ._triton import tl, triton
from .draws import images_of_normals
from .launch import LAUNCH, on_device, seed_words, tiles_of
from .ops import Case, Kwargs, Op, example_flip, example_floats, example_images, example_schedule
from .philox import Stream, normals_reference, split_ordinals, split_seed, stream_tag
from .tiles import TWO_LN_2, load_group, normals, split_ordinal, store_group

EPS_TAG = tl.constexpr(stream_tag(Stream.EPS))


@triton.jit
def input_scale(scale, X_KIND: tl.constexpr):
    """What a loaded value of x_0 is multiplied by, and what is added, to give scale * x_0."""
    if X_KIND == "float":
        factor = scale
        offset = 0.0
    else:
        # x / 127.5 - 1; a "bytes" value carries 2^-133, undone in two steps since 2^133 is no float.
        factor = scale * (2.0**126 / 127.5) * 128.0 if X_KIND == "bytes" else scale * (1.0 / 127.5)
        offset = -scale
    return factor, offset


@triton.jit
def _add_noise_tile(
    x_0_ptr,  # [D] of one sample
    x_t_ptr,  # [D]
    tile,
    flip,
    scale,
    sigma,
    c1,
    c2,
    key_0,
    key_1,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    X_KIND: tl.constexpr,
    MIRROR: tl.constexpr,
):
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    factor, offset = input_scale(scale, X_KIND)
    for block in range(BLOCKS):
        first = (tile * BLOCKS + block) * UNROLL * GROUPS
        # Loads first: the compiler may not move them above the stores of an earlier group.
        x = ()
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            x += load_group(
                x_0_ptr, groups, mask, flip, C, PLANE, WIDTH, PIXELS, LAYOUT, MIRROR, X_KIND == "bytes", GROUPS, EVEN
            )
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            noise = normals(groups, c1, c2, EPS_TAG, key_0, key_1, TWO_LN_2 * sigma * sigma, SIZE // 4, FAST)
            x_t = ()
            for k in tl.static_range(SIZE):
                x_t += ((x[i * SIZE + k] * factor + offset) + noise[k],)
            store_group(x_t_ptr, groups, mask, x_t, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _add_noise_kernel(
    x_0_ptr,  # [N, D], memory order LAYOUT
    x_t_ptr,  # [N, D], the same order
    t_ptr,  # [N] int64
    ordinals_ptr,  # [N] int64
    sqrt_alpha_bar_ptr,  # [T]
    sqrt_one_minus_alpha_bar_ptr,  # [T]
    flip_ptr,  # [N] uint8, read if FLIP
    seed_low,
    seed_high,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    X_KIND: tl.constexpr,
    FLIP: tl.constexpr,
):
    SIZE: tl.constexpr = C * PLANE
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.load(t_ptr + n)
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    scale = tl.load(sqrt_alpha_bar_ptr + t)
    sigma = tl.load(sqrt_one_minus_alpha_bar_ptr + t)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    x_0_ptr += n * SIZE
    x_t_ptr += n * SIZE
    flip = tl.load(flip_ptr + n).to(tl.int32) if FLIP else 0
    if FLIP and PIXELS > 1:
        # A sample is mirrored or not as a whole: a uniform branch between two straight bodies.
        if flip != 0:
            _add_noise_tile(
                x_0_ptr, x_t_ptr, tile, 1, scale, sigma, c1, c2, key_0, key_1,
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, True,
            )  # fmt: skip
        elif LAYOUT == "nhwc":
            # Not mirrored, the sample is one run of memory: wider rows of threads, the same elements.
            _add_noise_tile(
                x_0_ptr, x_t_ptr, tile, 0, scale, sigma, c1, c2, key_0, key_1,
                1, SIZE, SIZE, PIXELS, LAYOUT, GROUPS, UNROLL * C, BLOCKS, EVEN, FAST, X_KIND, False,
            )  # fmt: skip
        else:
            _add_noise_tile(
                x_0_ptr, x_t_ptr, tile, 0, scale, sigma, c1, c2, key_0, key_1,
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, False,
            )  # fmt: skip
    else:
        _add_noise_tile(
            x_0_ptr, x_t_ptr, tile, flip, scale, sigma, c1, c2, key_0, key_1,
            C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, False,
        )  # fmt: skip


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
    Raises ValueError for arguments out of shape, dtype or device; t out of range is not checked on a GPU.
    """
    check_images("x_0", x_0)
    check_noise_arguments(x_0, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, flip, seed)
    check_pixels("x_0", x_0)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    impl = resolve_impl(impl, x_0.device)
    check_precision(impl, x_0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
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
    format_ = memory_format(x_0)
    x_0 = x_0.contiguous(memory_format=format_)
    x_t = torch.empty(x_0.shape, dtype=dtype, device=x_0.device, memory_format=format_)
    if x_0.numel() == 0:
        return x_t
    cut = tiles_of(x_0, max(x_0.element_size(), x_t.element_size()), flip=flip is not None)
    with on_device(x_t):
        _add_noise_kernel[(x_0.shape[0] * cut.TILES,)](
            x_0,
            x_t,
            t.contiguous(),
            ordinals.contiguous(),
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            t if flip is None else flip.contiguous().view(torch.uint8),
            *seed_words(seed),
            **cut.constants(),
            X_KIND=input_kind(x_0, cut.PIXELS, cut.FAST),
            FLIP=flip is not None,
            **LAUNCH,
        )
    return x_t


def input_kind(x_0: Tensor, pixels: int, fast: bool) -> str:
    """How the kernels read x_0: "float", "uint8", or "bytes" (uint8 as aligned words)."""
    if x_0.dtype != torch.uint8:
        return "float"
    return "bytes" if fast and pixels > 1 and x_0.data_ptr() % pixels == 0 else "uint8"


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
    """Raise ValueError unless the arguments fit samples x [N, C, H, W]."""
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


def _example(case: Case) -> Kwargs:
    is_float = case.variant.startswith("float")
    kwargs = {
        "x_0": example_floats(case, "x_0") if is_float else example_images(case),
        **example_schedule(case),
        "dtype": case.dtype,
    }
    if "flip" in case.variant:
        kwargs["flip"] = example_flip(case)
    return kwargs


ADD_NOISE = Op(
    "add_noise",
    add_noise,
    add_noise_reference,
    add_noise_triton,
    _example,
    ("uint8", "uint8-flip", "float-flip"),
    (torch.float32, torch.bfloat16, torch.float16),
)
