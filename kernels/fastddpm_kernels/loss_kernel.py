"""The Triton kernel of diffusion_loss: losses and gradient in one pass, the noise drawn again, no atomics.

Each program sums the squares of one tile of one sample; a second kernel adds a sample's tiles in a fixed order. So the
result is the same in every run and a sample's loss does not depend on the batch it is in.
"""

# Tuples grow in unrolled loops, which Triton types and mypy cannot.
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import memory_format
from ._triton import tl, triton
from .launch import LAUNCH, on_device, seed_words, tiles_of
from .noising import EPS_TAG, input_kind, input_scale
from .tiles import TWO_LN_2, load_group, normals, split_ordinal, store_group


@triton.jit
def _loss_tile(
    prediction_ptr,  # [D] of one sample
    x_0_ptr,  # [D]
    grad_ptr,  # [D]
    tile,
    flip,
    scale,
    sigma,
    grad_scale,
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
    TARGET: tl.constexpr,
    HUBER: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    """Sum of squared (or pseudo-Huber) errors of a tile; writes the gradient."""
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    # error = prediction + sigma x_0 - scale eps for v, prediction - x_0 for x_0, prediction - eps for eps.
    factor, offset = input_scale(sigma if TARGET == "v" else -1.0 + 0.0 * sigma, X_KIND)
    INVERSE_SQUARE: tl.constexpr = 1.0 / (HUBER * HUBER) if HUBER > 0 else 0.0
    total = tl.zeros((GROUPS,), tl.float32)
    for block in range(BLOCKS):
        first = (tile * BLOCKS + block) * UNROLL * GROUPS
        # Loads first: the compiler may not move them above the stores of an earlier group.
        error = ()
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            error += load_group(
                prediction_ptr, groups, groups * SIZE < C * PLANE, 0,
                C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN,
            )  # fmt: skip
        x = ()
        if TARGET != "eps":
            for i in tl.static_range(UNROLL):
                groups = first + i * GROUPS + tl.arange(0, GROUPS)
                x += load_group(
                    x_0_ptr, groups, groups * SIZE < C * PLANE, flip,
                    C, PLANE, WIDTH, PIXELS, LAYOUT, MIRROR, X_KIND == "bytes", GROUPS, EVEN,
                )  # fmt: skip
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            if TARGET != "x_0":
                variance = scale * scale if TARGET == "v" else 1.0
                noise = normals(groups, c1, c2, EPS_TAG, key_0, key_1, TWO_LN_2 * variance, SIZE // 4, FAST)
            grad = ()
            # Four sums in turn, so that an addition need not wait for the one before.
            squares_0 = tl.zeros((GROUPS,), tl.float32)
            squares_1 = tl.zeros((GROUPS,), tl.float32)
            squares_2 = tl.zeros((GROUPS,), tl.float32)
            squares_3 = tl.zeros((GROUPS,), tl.float32)
            for k in tl.static_range(SIZE):
                difference = error[i * SIZE + k]
                if TARGET != "eps":
                    difference = difference + (x[i * SIZE + k] * factor + offset)
                if TARGET != "x_0":
                    difference = difference - noise[k]
                if PIXELS == 1:
                    difference = tl.where(groups * 4 + k < C * PLANE, difference, 0.0)
                elif not EVEN:
                    difference = tl.where(mask, difference, 0.0)
                slope = difference
                if HUBER > 0:
                    # 2 d^2 / (1 + s) with s = sqrt(1 + (d / c)^2), whose gradient is 2 d / s.
                    stretch = difference * difference * INVERSE_SQUARE + 1.0
                    shrink = tl.rsqrt(stretch)
                    slope = difference * shrink
                    difference = difference * tl.rsqrt(stretch * shrink * 0.5 + 0.5)
                if k % 4 == 0:
                    squares_0 += difference * difference
                elif k % 4 == 1:
                    squares_1 += difference * difference
                elif k % 4 == 2:
                    squares_2 += difference * difference
                else:
                    squares_3 += difference * difference
                if WITH_GRAD:
                    grad += (slope * grad_scale,)
            total += (squares_0 + squares_1) + (squares_2 + squares_3)
            if WITH_GRAD:
                store_group(grad_ptr, groups, mask, grad, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _diffusion_loss_kernel(
    prediction_ptr,  # [N, D], memory order LAYOUT
    x_0_ptr,  # [N, D], the same order; not read if TARGET is "eps"
    grad_ptr,  # [N, D], the same order; written if WITH_GRAD
    sums_ptr,  # [N, TILES]; written if WITH_LOSSES
    t_ptr,  # [N] int64
    ordinals_ptr,  # [N] int64
    sqrt_alpha_bar_ptr,  # [T]
    sqrt_one_minus_alpha_bar_ptr,  # [T]
    flip_ptr,  # [N] uint8, read if FLIP
    weights_ptr,  # [N], read if WEIGHTED
    grad_scale_ptr,  # [1], or [N] if SCALE_PER_SAMPLE; read if WITH_GRAD
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
    TARGET: tl.constexpr,
    HUBER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    WITH_LOSSES: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    SIZE: tl.constexpr = C * PLANE
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.load(t_ptr + n)
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    scale = tl.load(sqrt_alpha_bar_ptr + t)
    sigma = tl.load(sqrt_one_minus_alpha_bar_ptr + t)
    weight = tl.load(weights_ptr + n) / SIZE if WEIGHTED else 1.0 / SIZE
    grad_scale = 0.0
    if WITH_GRAD:
        grad_scale = tl.load(grad_scale_ptr + (n if SCALE_PER_SAMPLE else 0)) * (2.0 * weight)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    prediction_ptr += n * SIZE
    x_0_ptr += n * SIZE
    grad_ptr += n * SIZE
    flip = tl.load(flip_ptr + n).to(tl.int32) if FLIP else 0
    if FLIP and PIXELS > 1:
        if flip != 0:
            total = _loss_tile(
                prediction_ptr, x_0_ptr, grad_ptr, tile, 1, scale, sigma, grad_scale, c1, c2, key_0, key_1,
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST,
                X_KIND, True, TARGET, HUBER, WITH_GRAD,
            )  # fmt: skip
        elif LAYOUT == "nhwc":
            total = _loss_tile(
                prediction_ptr, x_0_ptr, grad_ptr, tile, 0, scale, sigma, grad_scale, c1, c2, key_0, key_1,
                1, SIZE, SIZE, PIXELS, LAYOUT, GROUPS, UNROLL * C, BLOCKS, EVEN, FAST,
                X_KIND, False, TARGET, HUBER, WITH_GRAD,
            )  # fmt: skip
        else:
            total = _loss_tile(
                prediction_ptr, x_0_ptr, grad_ptr, tile, 0, scale, sigma, grad_scale, c1, c2, key_0, key_1,
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST,
                X_KIND, False, TARGET, HUBER, WITH_GRAD,
            )  # fmt: skip
    else:
        total = _loss_tile(
            prediction_ptr, x_0_ptr, grad_ptr, tile, flip, scale, sigma, grad_scale, c1, c2, key_0, key_1,
            C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST,
            X_KIND, False, TARGET, HUBER, WITH_GRAD,
        )  # fmt: skip
    if WITH_LOSSES:
        tl.store(sums_ptr + n * TILES + tile, total * weight)


@triton.jit
def _sum_tiles_kernel(sums_ptr, losses_ptr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """losses[n] = sum of sums[n, :], in an order that the number of samples has no part in."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, TILES, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + n * TILES + offs, mask=offs < TILES, other=0.0)
    tl.store(losses_ptr + n, tl.sum(total, 0))


def launch_diffusion_loss(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    grad_scale: Tensor | None,
    *,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    huber: float | None = None,
    with_losses: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses fp32 [N] and the gradient with respect to prediction scaled by grad_scale (one element, or [N]).

    The arguments are those of `diffusion_loss`. A result that is not asked for (with_losses False, grad_scale None) is
    an empty tensor and costs nothing.
    """
    num_samples, device = prediction.shape[0], prediction.device
    format_ = memory_format(prediction)
    prediction = prediction.detach().contiguous(memory_format=format_)
    losses = torch.empty(num_samples if with_losses else 0, dtype=torch.float32, device=device)
    grad = prediction.new_empty(0)
    if grad_scale is not None:
        grad = torch.empty(prediction.shape, dtype=prediction.dtype, device=device, memory_format=format_)
    if prediction.numel() == 0:
        return losses.zero_(), grad
    x = prediction if x_0 is None else x_0.contiguous(memory_format=format_)
    scale = losses if grad_scale is None else grad_scale.to(torch.float32).contiguous()
    cut = tiles_of(prediction, max(prediction.element_size(), x.element_size()), flip=flip is not None)
    sums = (
        torch.empty(num_samples, cut.TILES, dtype=torch.float32, device=device)
        if with_losses and cut.TILES > 1
        else losses
    )
    with on_device(prediction):
        _diffusion_loss_kernel[(num_samples * cut.TILES,)](
            prediction,
            x,
            grad,
            sums,
            t.contiguous(),
            ordinals.contiguous(),
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            t if flip is None else flip.contiguous().view(torch.uint8),
            losses if weights is None else weights.to(torch.float32).contiguous(),
            scale,
            *seed_words(seed),
            **cut.constants(),
            X_KIND=input_kind(x, cut.PIXELS, cut.FAST),
            FLIP=flip is not None,
            TARGET=target,
            HUBER=0.0 if huber is None else float(huber),
            WEIGHTED=weights is not None,
            SCALE_PER_SAMPLE=scale.numel() > 1,
            WITH_LOSSES=with_losses,
            WITH_GRAD=grad_scale is not None,
            **LAUNCH,
        )
        if sums is not losses:
            block = min(1024, 1 << (cut.TILES - 1).bit_length())
            _sum_tiles_kernel[(num_samples,)](sums, losses, TILES=cut.TILES, BLOCK=block, **LAUNCH)
    return losses, grad
