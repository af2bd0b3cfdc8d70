"""draw_timesteps, draw_normal and draw_uniform: the addressable draws that stand alone (timesteps, flips, x_T, ...)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_per_sample, resolve_impl
from ._triton import interpreting, tl, triton
from .launch import LAUNCH, on_device, seed_words, signed_word, tiles_of
from .ops import Case, Kwargs, Op, example_ordinals
from .philox import CHUNK_QUADS, MASK, Stream, normals_reference, philox_grid, split_ordinals, split_seed, stream_tag
from .tiles import TWO_LN_2, join_4, normals, philox, split_ordinal, store_group

TIMESTEP_TAG = tl.constexpr(stream_tag(Stream.TIMESTEP))
FLIP_TAG = tl.constexpr(stream_tag(Stream.FLIP))


@triton.jit(do_not_specialize=["num_samples", "num_timesteps", "seed_low", "seed_high"])
def _draw_timesteps_kernel(
    ordinals_ptr,  # [N] int64
    t_ptr,  # [N] int64
    flip_ptr,  # [N] uint8
    num_samples,
    num_timesteps,
    seed_low,
    seed_high,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_samples
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + offs, mask=mask, other=0))
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    zero = tl.zeros((BLOCK,), tl.uint32)
    word_t = philox(zero, c1, c2, zero + TIMESTEP_TAG, key_0, key_1)[0]
    word_flip = philox(zero, c1, c2, zero + FLIP_TAG, key_0, key_1)[0]
    t = (word_t.to(tl.uint64) * num_timesteps.to(tl.uint32, bitcast=True).to(tl.uint64)) >> 32
    tl.store(t_ptr + offs, t.to(tl.int64), mask=mask)
    tl.store(flip_ptr + offs, (word_flip >> 31).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["step", "tag", "seed_low", "seed_high"])
def _draw_normal_kernel(
    ordinals_ptr,  # [N] int64
    out_ptr,  # [N, D], memory order LAYOUT
    step,
    tag,
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
    HAS_STEP: tl.constexpr,
):
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    if HAS_STEP:
        c2 = step.to(tl.uint32, bitcast=True)
    c3 = tag.to(tl.uint32, bitcast=True)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    out_ptr += n * (C * PLANE)
    for block in range(BLOCKS):
        for i in tl.static_range(UNROLL):
            groups = ((tile * BLOCKS + block) * UNROLL + i) * GROUPS + tl.arange(0, GROUPS)
            values = normals(groups, c1, c2, c3, key_0, key_1, TWO_LN_2, SIZE // 4, FAST)
            store_group(
                out_ptr, groups, groups * SIZE < C * PLANE, values, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN
            )


@triton.jit(do_not_specialize=["tag", "seed_low", "seed_high"])
def _draw_uniform_kernel(
    ordinals_ptr,  # [N] int64
    out_ptr,  # [N, NUM]
    tag,
    seed_low,
    seed_high,
    NUM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    c3 = tag.to(tl.uint32, bitcast=True)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    quads = tile * BLOCK + tl.arange(0, BLOCK)
    word_0, word_1, word_2, word_3 = philox(quads.to(tl.uint32), c1, c2, c3, key_0, key_1)
    words = join_4(word_0, word_1, word_2, word_3, BLOCK)
    elements = quads[:, None] * 4 + tl.arange(0, 4)[None, :]
    # 24 bits are a float without rounding: 1 is never reached.
    tl.store(out_ptr + n * NUM + elements, (words >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=elements < NUM)


def draw_timesteps(
    ordinals: Tensor, num_timesteps: int, *, seed: int, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """The timestep and the flip flag of each sample.

    ordinals: int64 [N], the samples' positions in the sequence of samples consumed. num_timesteps: T in [1, 2^31].
    Returns t, int64 [N], uniform over 0..T-1, and flip, bool [N], true for half of the samples:
    t = (w0 T) >> 32 of quad 0 at Stream.TIMESTEP, flip = top bit of w0 of quad 0 at Stream.FLIP. No gradients.
    Raises ValueError for a seed, T or ordinals out of shape or range.
    """
    check_ordinals("ordinals", ordinals)
    split_seed(seed)
    if not 1 <= num_timesteps <= 2**31:
        raise ValueError(f"num_timesteps must be in [1, 2^31], got {num_timesteps}")
    return _draw_timesteps_op(ordinals, num_timesteps, seed, resolve_impl(impl, ordinals.device))


def draw_timesteps_reference(ordinals: Tensor, num_timesteps: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`draw_timesteps` in plain torch."""
    if ordinals.device.type == "mps":
        t, flip = draw_timesteps_reference(ordinals.cpu(), num_timesteps, seed=seed)
        return t.to(ordinals.device), flip.to(ordinals.device)
    c1, c2 = split_ordinals(ordinals)
    tags = torch.tensor((stream_tag(Stream.TIMESTEP), stream_tag(Stream.FLIP)), device=ordinals.device)
    even, _ = philox_grid(split_seed(seed), torch.zeros_like(tags), c1, c2, tags)
    word_t, word_flip = even[0, : 2 * c1.shape[0]].view(-1, 2).unbind(1)
    return (word_t * num_timesteps) >> 32, word_flip >= 2**31


def draw_timesteps_triton(ordinals: Tensor, num_timesteps: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`draw_timesteps` as one Triton launch."""
    num_samples = ordinals.shape[0]
    t = torch.empty(num_samples, dtype=torch.int64, device=ordinals.device)
    flip = torch.empty(num_samples, dtype=torch.bool, device=ordinals.device)
    if num_samples:
        block = 1 << (num_samples - 1).bit_length() if interpreting() else 128
        with on_device(t):
            _draw_timesteps_kernel[(-(-num_samples // block),)](
                ordinals.contiguous(),
                t,
                flip.view(torch.uint8),
                num_samples,
                signed_word(num_timesteps),
                *seed_words(seed),
                BLOCK=block,
                **LAUNCH,
            )
    return t, flip


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
    No gradients. Raises ValueError for arguments out of shape or range.
    """
    check_ordinals("ordinals", ordinals)
    split_seed(seed)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    if step is not None and not 0 <= step <= MASK:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    if not 0 <= int(stream) <= MASK:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
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
    out = torch.empty(
        (ordinals.shape[0], *shape),
        dtype=dtype,
        device=ordinals.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if out.numel() == 0:
        return out
    cut = tiles_of(out, out.element_size())
    with on_device(out):
        _draw_normal_kernel[(out.shape[0] * cut.TILES,)](
            ordinals.contiguous(),
            out,
            signed_word(step or 0),
            signed_word(int(stream)),
            *seed_words(seed),
            **cut.constants(),
            HAS_STEP=step is not None,
            **LAUNCH,
        )
    return out


def draw_uniform(ordinals: Tensor, num: int, *, seed: int, stream: int, impl: str | None = None) -> Tensor:
    """Uniform numbers fp32 [N, num] in [0, 1), addressed by (seed, stream, ordinal, element).

    Element 4 q + k is the top 24 bits of word k of quad q: (word >> 8) 2^-24, the same on every device. ordinals:
    int64 [N]; num in [1, 2^30]; stream: a `Stream` (or a whole `stream_tag`). No gradients. Raises ValueError for
    arguments out of shape or range.
    """
    check_ordinals("ordinals", ordinals)
    split_seed(seed)
    if not 1 <= num <= 2**30:
        raise ValueError(f"num must be in [1, 2^30], got {num}")
    if not 0 <= int(stream) <= MASK:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    return _draw_uniform_op(ordinals, num, seed, int(stream), resolve_impl(impl, ordinals.device))


def draw_uniform_reference(ordinals: Tensor, num: int, *, seed: int, stream: int) -> Tensor:
    """`draw_uniform` in plain torch."""
    if ordinals.device.type == "mps":  # the words must agree bit for bit: made where int64 products are known to
        return draw_uniform_reference(ordinals.cpu(), num, seed=seed, stream=stream).to(ordinals.device)
    key, (c1, c2) = split_seed(seed), split_ordinals(ordinals)
    num_quads = -(-num // 4)
    out = torch.empty(ordinals.shape[0], num_quads, 4, device=ordinals.device, dtype=torch.float32)
    samples_step = max(1, CHUNK_QUADS // num_quads)
    for quad in range(0, num_quads, CHUNK_QUADS):
        quads = torch.arange(quad, min(quad + CHUNK_QUADS, num_quads), device=ordinals.device)
        for sample in range(0, ordinals.shape[0], samples_step):
            samples = slice(sample, sample + samples_step)
            even, odd = philox_grid(key, quads, c1[samples], c2[samples], int(stream))
            block = out[samples, quad : quad + CHUNK_QUADS]
            size = block.shape[0] * block.shape[1]
            for word, row in enumerate((even[0], odd[1], even[1], odd[0])):
                block[..., word] = (row[:size] >> 8).view(block.shape[:2])
    flat = out.mul_(2.0**-24).view(ordinals.shape[0], num_quads * 4)
    return flat[:, :num].clone(memory_format=torch.contiguous_format)


def draw_uniform_triton(ordinals: Tensor, num: int, *, seed: int, stream: int) -> Tensor:
    """`draw_uniform` as one Triton launch."""
    out = torch.empty(ordinals.shape[0], num, device=ordinals.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    num_quads = -(-num // 4)
    whole = 1 << (num_quads - 1).bit_length()
    block = whole if interpreting() else min(64, whole)
    num_tiles = -(-num_quads // block)
    with on_device(out):
        _draw_uniform_kernel[(ordinals.shape[0] * num_tiles,)](
            ordinals.contiguous(),
            out,
            signed_word(int(stream)),
            *seed_words(seed),
            NUM=num,
            BLOCK=block,
            TILES=num_tiles,
            **LAUNCH,
        )
    return out


def images_of_normals(normals: Tensor, shape: tuple[int, int, int], channels_last: bool) -> Tensor:
    """Dense [N, C, H, W] of normals [N, C H W] given in element order (H, W, C)."""
    num_channels, height, width = shape
    images = normals.reshape(normals.shape[0], height, width, num_channels).permute(0, 3, 1, 2)
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


@torch.library.custom_op("fastddpm_kernels::draw_uniform", mutates_args=())
def _draw_uniform_op(ordinals: Tensor, num: int, seed: int, stream: int, impl: str) -> Tensor:
    function = draw_uniform_triton if impl == "triton" else draw_uniform_reference
    return function(ordinals, num, seed=seed, stream=stream)


@_draw_uniform_op.register_fake
def _(ordinals: Tensor, num: int, seed: int, stream: int, impl: str) -> Tensor:
    return torch.empty(ordinals.shape[0], num, device=ordinals.device, dtype=torch.float32)


def _example_timesteps(case: Case) -> Kwargs:
    return {"ordinals": example_ordinals(case), "num_timesteps": 1000, "seed": 2**62 + case.seed}


def _example_normal(case: Case) -> Kwargs:
    return {
        "ordinals": example_ordinals(case),
        "shape": case.shape[1:],
        "seed": 2**62 + case.seed,
        "stream": stream_tag(Stream.Z if case.variant == "z" else Stream.X_T),
        "step": 999 if case.variant == "z" else None,
        "channels_last": case.channels_last,
        "dtype": case.dtype,
    }


def _example_uniform(case: Case) -> Kwargs:
    return {
        "ordinals": example_ordinals(case),
        "num": case.shape[1] * case.shape[2] * case.shape[3],
        "seed": 2**62 + case.seed,
        "stream": stream_tag(Stream.AUGMENT),
    }


DRAW_TIMESTEPS = Op(
    "draw_timesteps",
    draw_timesteps,
    draw_timesteps_reference,
    draw_timesteps_triton,
    _example_timesteps,
    ("",),
)
DRAW_NORMAL = Op(
    "draw_normal",
    draw_normal,
    draw_normal_reference,
    draw_normal_triton,
    _example_normal,
    ("x_T", "z"),
    (torch.float32, torch.bfloat16, torch.float16),
)
DRAW_UNIFORM = Op(
    "draw_uniform",
    draw_uniform,
    draw_uniform_reference,
    draw_uniform_triton,
    _example_uniform,
    ("",),
)
