"""The Triton kernels of group_norm_silu: the group stays on chip where it fits, else statistics are split and merged.

One pass: a program holds whole groups of one sample, [PLANE, BUNDLE] of its [H W, C], in registers: every tensor is
read and written once. Two passes (large planes, few groups): partial statistics of rows by Welford's recursion, merged
as in Chan, Golub and LeVeque 1979, then a second reading. The backward is built alike from the sums of du and du d,
where u is what the activation is applied to and d the input less its mean. Nothing is added by atomics and no program
sees two samples: results are the same in every run and do not depend on the batch. The mask of dropout is drawn again
in the backward, the normalised tensor is computed again, and cat((total, skip), 1) is two masked or selected reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import launch
from ._triton import tl, triton
from .launch import LAUNCH, on_device, seed_words, signed_word
from .tiles import philox, split_ordinal

# ex2 and rcp on the special-function unit, without the handling of denormals around it: sigmoid in 4 instructions. By
# the PTX ISA ex2.approx.ftz of -inf, inf is 0, inf and rcp.approx.ftz of inf is 0, so that -inf and every z below -88
# (where the power overflows, or its reciprocal is a denormal) give 0, inf gives 1, and NaN passes all four.
SIGMOID_ASM = tl.constexpr("""{
    .reg .f32 power;
    mul.ftz.f32 power, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 power, power;
    add.ftz.f32 power, power, 0f3F800000;
    rcp.approx.ftz.f32 $0, power;
}""")
# Arguments of any alignment: read once a program, they are not worth another compilation (2 % more instructions at
# most). All others lie at multiples of 16 bytes (see `_aligned`), so that a kernel is compiled once and adds up in one
# order wherever its tensors lie.
ANY_ALIGNMENT = ["add_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr", "ordinals_ptr"]
SCALARS = ["add_stride", "scale_stride", "shift_stride", "threshold", "tag", "seed_low", "seed_high"]
# Elements of the largest tile that stays on chip, and of a thread. 32 in the backward, which holds two tensors: 64
# would spill. 16 in the loops of the second way, whose accumulators are another two values an element.
ONE_PASS_ELEMENTS = 16384
FORWARD_ELEMENTS, BACKWARD_ELEMENTS, LOOP_ELEMENTS = 64, 32, 16
TILE_CHANNELS = 64  # of the second way: whole lines of 128 bytes in 16-bit types
COMPARISONS = 4096  # of sums over groups, each channel (or run of them) with each; fewer in small tiles: 1 warp spills
SPLIT_ELEMENTS = 32768  # of one program of the second way: the sums over its threads cost as much as 40 elements each


@triton.jit
def _runs(offs, VECTOR: tl.constexpr):
    """The offsets with the promise that VECTOR neighbours lie together."""
    return tl.max_contiguous(tl.multiple_of(offs, (1, VECTOR)), (1, VECTOR))


@triton.jit
def _first_source(mask, c, C1: tl.constexpr, SOURCES: tl.constexpr):
    """The mask of what lies in the first source."""
    return mask if SOURCES == "one" else mask & (c < C1)[None, :]


@triton.jit
def _read(
    x_ptr,  # [PLANE, C1] of one sample
    skip_ptr,  # [PLANE, C2]
    rows,
    c,
    first,
    mask,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile [rows, channels c] of cat((x, skip), 1) as fp32. SOURCES "apart": a tile lies in one of them."""
    if SOURCES == "mixed":
        mask_1 = mask & (c < C1)[None, :]
        mask_2 = mask & (c >= C1)[None, :]
        x = tl.load(x_ptr + _runs(rows * C1 + c[None, :], VECTOR), mask=mask_1, other=0).to(tl.float32)
        x += tl.load(skip_ptr + _runs(rows * C2 + (c - C1)[None, :], VECTOR), mask=mask_2, other=0).to(tl.float32)
    elif SOURCES == "apart":
        second = (first >= C1).to(tl.int32)
        offs = rows * (C1 + second * (C2 - C1)) + (c - second * C1)[None, :]
        x = tl.load(tl.where(first < C1, x_ptr, skip_ptr) + _runs(offs, VECTOR), mask=mask, other=0).to(tl.float32)
    else:
        x = tl.load(x_ptr + _runs(rows * C1 + c[None, :], VECTOR), mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _write(
    x_ptr,  # [PLANE, C1] of one sample
    skip_ptr,  # [PLANE, C2]
    value,
    rows,
    c,
    first,
    mask,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """`_read`'s counterpart."""
    value = value.to(x_ptr.dtype.element_ty)
    if SOURCES == "mixed":
        tl.store(x_ptr + _runs(rows * C1 + c[None, :], VECTOR), value, mask=mask & (c < C1)[None, :])
        tl.store(skip_ptr + _runs(rows * C2 + (c - C1)[None, :], VECTOR), value, mask=mask & (c >= C1)[None, :])
    elif SOURCES == "apart":
        second = (first >= C1).to(tl.int32)
        offs = rows * (C1 + second * (C2 - C1)) + (c - second * C1)[None, :]
        tl.store(tl.where(first < C1, x_ptr, skip_ptr) + _runs(offs, VECTOR), value, mask=mask)
    else:
        tl.store(x_ptr + _runs(rows * C1 + c[None, :], VECTOR), value, mask=mask)


@triton.jit
def _read_input(
    x_ptr,  # [PLANE, C1] of one sample
    residual_ptr,  # [PLANE, C1], read if RESIDUAL
    skip_ptr,  # [PLANE, C2], read unless SOURCES is "one"
    add_ptr,  # [C1], read if ADD
    total_ptr,  # [PLANE, C1], written if RESIDUAL
    rows,
    c,
    first,
    mask,
    mask_c,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    ADD: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """A tile of what is normalised, fp32. With a residual it is an output too, and rounded as that output is."""
    x = _read(x_ptr, skip_ptr, rows, c, first, mask, C1, C2, SOURCES, VECTOR)
    if ADD:
        x += tl.load(add_ptr + c, mask=mask_c & (c < C1), other=0).to(tl.float32)[None, :]
    if RESIDUAL:
        offs = _runs(rows * C1 + c[None, :], VECTOR)
        mask_1 = _first_source(mask, c, C1, SOURCES)
        x += tl.load(residual_ptr + offs, mask=mask_1, other=0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)  # changes nothing in the skip's channels: they have this dtype
        tl.store(total_ptr + offs, total, mask=mask_1)
        x = total.to(tl.float32)
    return x


@triton.jit
def _read_affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, c, mask, FILM: tl.constexpr):
    """Factor and offset of the normalised values, [channels] each."""
    factor = tl.load(weight_ptr + c, mask=mask, other=0).to(tl.float32)
    offset = tl.load(bias_ptr + c, mask=mask, other=0).to(tl.float32)
    if FILM:
        film = 1.0 + tl.load(scale_ptr + c, mask=mask, other=0).to(tl.float32)
        factor *= film
        offset = offset * film + tl.load(shift_ptr + c, mask=mask, other=0).to(tl.float32)
    return factor, offset


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Sums of FOLD neighbouring channels, [channels / FOLD]."""
    return tl.sum(tl.reshape(x, (x.shape[0] // FOLD, FOLD)), 1)


@triton.jit
def _tile_sums(x, FOLD: tl.constexpr):
    """Sums of a tile over its rows and FOLD neighbouring channels, which a thread has: [channels / FOLD]."""
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // FOLD, FOLD)), 2), 0)


@triton.jit
def _over_group(folded, GROUP: tl.constexpr, FOLD: tl.constexpr, BUNDLE: tl.constexpr):
    """For every channel, the sum over its group's folded channels: [channels]."""
    UNITS: tl.constexpr = folded.shape[0]
    if BUNDLE == GROUP:
        folded = tl.zeros_like(folded) + tl.sum(folded, 0)
    elif FOLD < GROUP:
        group = tl.arange(0, UNITS) * FOLD // GROUP
        folded = tl.sum(tl.where(group[:, None] == group[None, :], folded[:, None], 0.0), 0)
    return tl.reshape(tl.broadcast_to(folded[:, None], (UNITS, FOLD)), (UNITS * FOLD,))


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    if FAST:
        sigmoid = tl.inline_asm_elementwise(SIGMOID_ASM, "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid


@triton.jit
def _drop(
    y,
    rows,
    c,
    first,
    ordinals_ptr,
    n,
    threshold,
    tag,
    seed_low,
    seed_high,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """A tile of y with dropout's mask and scale (see dropout.py). RUNS: the channels are whole counters."""
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    c3 = tag.to(tl.uint32, bitcast=True)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    # Halves are compared in the upper half of their word: the high one needs no shift.
    least = threshold.to(tl.uint32, bitcast=True) << 16
    if RUNS:
        counters = rows * (C // 8) + (first // 8 + tl.arange(0, CHANNELS // 8))[None, :]
        word_0, word_1, word_2, word_3 = philox(counters.to(tl.uint32), c1, c2, c3, key_0, key_1)
        words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        words = tl.reshape(words, (y.shape[0], CHANNELS // 2))
        halves = tl.reshape(tl.join(words << 16, words), (y.shape[0], CHANNELS))
    else:
        elements = rows * C + c[None, :]
        word_0, word_1, word_2, word_3 = philox((elements // 8).to(tl.uint32), c1, c2, c3, key_0, key_1)
        low_pair = tl.where(elements % 4 < 2, word_0, word_1)
        high_pair = tl.where(elements % 4 < 2, word_2, word_3)
        words = tl.where(elements % 8 < 4, low_pair, high_pair)
        halves = tl.where(elements % 2 == 0, words << 16, words)
    return tl.where(halves >= least, y * (65536.0 / (65536 - threshold).to(tl.float32)), 0.0)


@triton.jit
def _gradient_of_u(d, dy, factor, offset, SILU: tl.constexpr, FAST: tl.constexpr):
    """du of dy = d(silu(u)) with u = d factor + offset."""
    if SILU:
        u = d * factor[None, :] + offset[None, :]
        sigmoid = _sigmoid(u, FAST)
        dy *= sigmoid * (u * (1.0 - sigmoid) + 1.0)
    return dy


@triton.jit
def _finish_sums(
    du_sum,  # [channels] sums over the plane of du
    dud_sum,  # [channels] of du d
    weight_ptr,
    bias_ptr,
    scale_ptr,
    rstd_ptr,  # [C / GROUP] of one sample
    daffine_ptr,  # [2, C]
    dfilm_ptr,  # [2, C]
    c,
    mask,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BUNDLE: tl.constexpr,
    FILM: tl.constexpr,
):
    """Write one sample's gradients of the parameters; returns a, k_1, k_2 of dx = a du - k_1 - k_2 d."""
    # Read again (.ca tells the compiler that these are other loads): held since the tile was read they would spill.
    rstd = tl.load(rstd_ptr + c // GROUP, mask=mask, other=0, cache_modifier=".ca")
    dun_sum = dud_sum * rstd
    if FILM:
        film = 1.0 + tl.load(scale_ptr + c, mask=mask, other=0, cache_modifier=".ca").to(tl.float32)
        tl.store(daffine_ptr + c, dun_sum * film, mask=mask)
        tl.store(daffine_ptr + C + c, du_sum * film, mask=mask)
        tl.debug_barrier()  # weight and bias are read after film is used: with all three at once it would spill
        weight = tl.load(weight_ptr + c, mask=mask, other=0, cache_modifier=".ca").to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=mask, other=0, cache_modifier=".ca").to(tl.float32)
        tl.store(dfilm_ptr + c, dun_sum * weight + du_sum * bias, mask=mask)
        tl.store(dfilm_ptr + C + c, du_sum, mask=mask)
        factor = weight * film
    else:
        factor = tl.load(weight_ptr + c, mask=mask, other=0, cache_modifier=".ca").to(tl.float32)
        tl.store(daffine_ptr + c, dun_sum, mask=mask)
        tl.store(daffine_ptr + C + c, du_sum, mask=mask)
    share = rstd * (1.0 / (GROUP * PLANE))
    k_1 = share * _over_group(_fold(factor * du_sum, FOLD), GROUP, FOLD, BUNDLE)
    k_2 = share * rstd * _over_group(_fold(factor * dun_sum, FOLD), GROUP, FOLD, BUNDLE)
    return factor * rstd, k_1, k_2


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _group_norm_kernel(
    x_ptr,  # [N, PLANE, C1]
    residual_ptr,  # [N, PLANE, C1]
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    ordinals_ptr,  # [N] int64
    total_ptr,  # [N, PLANE, C1]
    y_ptr,  # [N, PLANE, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    add_stride,
    scale_stride,
    shift_stride,
    threshold,
    tag,
    seed_low,
    seed_high,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BUNDLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RUNS: tl.constexpr,
    FAST: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """The forward in one pass."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * BUNDLE
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    mask_c = (tl.arange(0, CHANNELS) < BUNDLE) & (c < C)
    rows = tl.arange(0, ROWS)[:, None]
    mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & mask_c[None, :]
    x = _read_input(
        x_ptr + n * (PLANE * C1), residual_ptr + n * (PLANE * C1), skip_ptr + n * (PLANE * C2),
        add_ptr + n * add_stride, total_ptr + n * (PLANE * C1), rows, c, first, mask, mask_c,
        C1, C2, SOURCES, VECTOR, ADD, RESIDUAL,
    )  # fmt: skip
    if ADD and not EVEN:
        x = tl.where(mask, x, 0.0)  # `add` reaches lanes outside the plane too
    share: tl.constexpr = 1.0 / (GROUP * PLANE)
    pivot = _over_group(_tile_sums(x, FOLD), GROUP, FOLD, BUNDLE) * share
    d = x - pivot[None, :]
    if not EVEN:
        d = tl.where(mask, d, 0.0)
    # The mean of d is what rounding left in the pivot: with it the result is right at any ratio of mean to deviation.
    rest = _over_group(_tile_sums(d, FOLD), GROUP, FOLD, BUNDLE) * share
    variance = _over_group(_tile_sums(d * d, FOLD), GROUP, FOLD, BUNDLE) * share - rest * rest
    variance = tl.where(variance < 0.0, 0.0, variance)  # of equal values, by rounding; NaN stays
    rstd = 1.0 / tl.sqrt(variance + EPS)
    statistics = n * (C // GROUP) + c // GROUP
    tl.store(mean_ptr + statistics, pivot + rest, mask=mask_c & (c % GROUP == 0))
    tl.store(rstd_ptr + statistics, rstd, mask=mask_c & (c % GROUP == 0))
    factor, offset = _read_affine(
        weight_ptr, bias_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride, c, mask_c, FILM
    )
    factor *= rstd
    offset -= rest * factor
    y = d * factor[None, :] + offset[None, :]
    if SILU:
        y *= _sigmoid(y, FAST)
    if DROP:
        y = _drop(
            y, rows, c, first, ordinals_ptr, n, threshold, tag, seed_low, seed_high, C, CHANNELS, RUNS
        )  # fmt: skip
    tl.store(y_ptr + n * (PLANE * C) + _runs(rows * C + c[None, :], VECTOR), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _group_norm_backward_kernel(
    dy_ptr,  # [N, PLANE, C]
    dtotal_ptr,  # [N, PLANE, C1], read if DTOTAL
    x_ptr,  # [N, PLANE, C1]: x, or total
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    ordinals_ptr,  # [N] int64
    dx_ptr,  # [N, PLANE, C1]
    dskip_ptr,  # [N, PLANE, C2]
    daffine_ptr,  # [N, 2, C] of weight and bias
    dfilm_ptr,  # [N, 2, C] of scale and shift, written if FILM
    dadd_ptr,  # [N, C1], written if DADD
    add_stride,
    scale_stride,
    shift_stride,
    threshold,
    tag,
    seed_low,
    seed_high,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BUNDLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RUNS: tl.constexpr,
    FAST: tl.constexpr,
    ADD: tl.constexpr,
    DTOTAL: tl.constexpr,
    DADD: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """The backward in one pass."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * BUNDLE
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    mask_c = (tl.arange(0, CHANNELS) < BUNDLE) & (c < C)
    rows = tl.arange(0, ROWS)[:, None]
    mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & mask_c[None, :]
    statistics = n * (C // GROUP) + c // GROUP
    mean = tl.load(mean_ptr + statistics, mask=mask_c, other=0)
    rstd = tl.load(rstd_ptr + statistics, mask=mask_c, other=0)
    factor, offset = _read_affine(
        weight_ptr, bias_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride, c, mask_c, FILM
    )
    du = tl.load(dy_ptr + n * (PLANE * C) + _runs(rows * C + c[None, :], VECTOR), mask=mask, other=0).to(tl.float32)
    d = _read_input(
        x_ptr + n * (PLANE * C1), x_ptr, skip_ptr + n * (PLANE * C2), add_ptr + n * add_stride, x_ptr,
        rows, c, first, mask, mask_c, C1, C2, SOURCES, VECTOR, ADD, False,
    ) - mean[None, :]  # fmt: skip
    if DROP:
        du = _drop(
            du, rows, c, first, ordinals_ptr, n, threshold, tag, seed_low, seed_high, C, CHANNELS, RUNS
        )  # fmt: skip
    du = _gradient_of_u(d, du, factor * rstd, offset, SILU, FAST)
    # The factor comes back from there: held over the sums it would spill.
    factor, k_1, k_2 = _finish_sums(
        tl.sum(du, 0), tl.sum(du * d, 0), weight_ptr, bias_ptr, scale_ptr + n * scale_stride,
        rstd_ptr + n * (C // GROUP), daffine_ptr + n * (2 * C), dfilm_ptr + n * (2 * C), c, mask_c,
        C, PLANE, GROUP, FOLD, BUNDLE, FILM,
    )  # fmt: skip
    dx = du * factor[None, :] - (d * k_2[None, :] + k_1[None, :])
    if DTOTAL:
        mask_1 = _first_source(mask, c, C1, SOURCES)
        offs = _runs(rows * C1 + c[None, :], VECTOR)
        dx += tl.load(dtotal_ptr + n * (PLANE * C1) + offs, mask=mask_1, other=0).to(tl.float32)
    _write(dx_ptr + n * (PLANE * C1), dskip_ptr + n * (PLANE * C2), dx, rows, c, first, mask, C1, C2, SOURCES, VECTOR)
    if DADD:
        tl.store(dadd_ptr + n * C1 + c, tl.sum(dx if EVEN else tl.where(mask, dx, 0.0), 0), mask=mask_c & (c < C1))


@triton.jit(do_not_specialize=["add_stride"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _statistics_kernel(
    x_ptr,  # [N, PLANE, C1]
    residual_ptr,  # [N, PLANE, C1]
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    total_ptr,  # [N, PLANE, C1]
    means_ptr,  # [N, SPLITS, C]
    squares_ptr,  # [N, SPLITS, C] sums of squares about the means
    add_stride,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """First pass of the forward: each channel's mean and squares over a split's BLOCKS ROWS rows."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * CHANNELS
    split = tl.program_id(0) // TILES % SPLITS
    n = (tl.program_id(0) // (TILES * SPLITS)).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    slots = split * (BLOCKS * ROWS) + tl.arange(0, ROWS)[:, None]
    # Welford's recursion in every slot of the tile; a slot's rows below PLANE come first.
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        rows = slots + block * ROWS
        mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & (c < C)[None, :]
        x = _read_input(
            x_ptr + n * (PLANE * C1), residual_ptr + n * (PLANE * C1), skip_ptr + n * (PLANE * C2),
            add_ptr + n * add_stride, total_ptr + n * (PLANE * C1), rows, c, first, mask, c < C,
            C1, C2, SOURCES, VECTOR, ADD, RESIDUAL,
        )  # fmt: skip
        delta = x - mean
        if not EVEN:
            delta = tl.where(mask, delta, 0.0)
        mean += delta * (1.0 / (block + 1.0))
        if EVEN:
            squares += delta * (x - mean)
        else:
            squares += tl.where(mask, delta * (x - mean), 0.0)
    rows_of_slot = tl.minimum(tl.maximum((PLANE - slots + (ROWS - 1)) // ROWS, 0), BLOCKS).to(tl.float32)
    num_rows = tl.minimum(PLANE - split * (BLOCKS * ROWS), BLOCKS * ROWS).to(tl.float32)
    # Relative to the first slot, so that sums of large means round nothing away.
    pivot = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == 0, mean, 0.0), 0)
    centre = tl.sum(rows_of_slot * (mean - pivot[None, :]), 0) / num_rows
    apart = mean - pivot[None, :] - centre[None, :]
    offs = (n * SPLITS + split) * C + c
    tl.store(means_ptr + offs, pivot + centre, mask=c < C)
    tl.store(squares_ptr + offs, tl.sum(squares + rows_of_slot * apart * apart, 0), mask=c < C)


@triton.jit
def _merge_statistics_kernel(
    means_ptr,  # [N, SPLITS, C]
    squares_ptr,  # [N, SPLITS, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    C: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BUNDLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    EPS: tl.constexpr,
):
    """The statistics of whole groups from those of their splits and channels."""
    first = (tl.program_id(0) % TILES) * BUNDLE
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    mask_c = (tl.arange(0, CHANNELS) < BUNDLE) & (c < C)
    splits = tl.arange(0, PADDED_SPLITS)[:, None]
    mask = (splits < SPLITS) & mask_c[None, :]
    num_rows = tl.minimum(PLANE - splits * SPLIT_ROWS, SPLIT_ROWS).to(tl.float32)
    offs = (n * SPLITS + splits) * C + c[None, :]
    means = tl.load(means_ptr + offs, mask=mask, other=0)
    squares = tl.load(squares_ptr + offs, mask=mask, other=0)
    share: tl.constexpr = 1.0 / (GROUP * PLANE)
    pivot = tl.load(means_ptr + n * (SPLITS * C) + c // GROUP * GROUP, mask=mask_c, other=0)
    apart = tl.where(mask, means - pivot[None, :], 0.0)
    centre = _over_group(_tile_sums(apart * num_rows, FOLD), GROUP, FOLD, BUNDLE) * share
    apart = tl.where(mask, apart - centre[None, :], 0.0)
    squares += apart * apart * num_rows
    variance = _over_group(_tile_sums(squares, FOLD), GROUP, FOLD, BUNDLE) * share
    statistics = n * (C // GROUP) + c // GROUP
    tl.store(mean_ptr + statistics, pivot + centre, mask=mask_c & (c % GROUP == 0))
    tl.store(rstd_ptr + statistics, 1.0 / tl.sqrt(variance + EPS), mask=mask_c & (c % GROUP == 0))


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _apply_kernel(
    x_ptr,  # [N, PLANE, C1]: x, or total
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    ordinals_ptr,  # [N] int64
    y_ptr,  # [N, PLANE, C]
    add_stride,
    scale_stride,
    shift_stride,
    threshold,
    tag,
    seed_low,
    seed_high,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RUNS: tl.constexpr,
    FAST: tl.constexpr,
    ADD: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """Second pass of the forward."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * CHANNELS
    split = tl.program_id(0) // TILES % SPLITS
    n = (tl.program_id(0) // (TILES * SPLITS)).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    statistics = n * (C // GROUP) + c // GROUP
    mean = tl.load(mean_ptr + statistics, mask=c < C, other=0)
    factor, offset = _read_affine(
        weight_ptr, bias_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride, c, c < C, FILM
    )
    factor *= tl.load(rstd_ptr + statistics, mask=c < C, other=0)
    for block in range(BLOCKS):
        rows = (split * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & (c < C)[None, :]
        x = _read_input(
            x_ptr + n * (PLANE * C1), x_ptr, skip_ptr + n * (PLANE * C2), add_ptr + n * add_stride, x_ptr,
            rows, c, first, mask, c < C, C1, C2, SOURCES, VECTOR, ADD, False,
        )  # fmt: skip
        y = (x - mean[None, :]) * factor[None, :] + offset[None, :]
        if SILU:
            y *= _sigmoid(y, FAST)
        if DROP:
            y = _drop(
                y, rows, c, first, ordinals_ptr, n, threshold, tag, seed_low, seed_high, C, CHANNELS, RUNS
            )  # fmt: skip
        offs = _runs(rows * C + c[None, :], VECTOR)
        tl.store(y_ptr + n * (PLANE * C) + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _backward_sums_kernel(
    dy_ptr,  # [N, PLANE, C]
    x_ptr,  # [N, PLANE, C1]: x, or total
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    ordinals_ptr,  # [N] int64
    du_sums_ptr,  # [N, SPLITS, C]
    dud_sums_ptr,  # [N, SPLITS, C]
    add_stride,
    scale_stride,
    shift_stride,
    threshold,
    tag,
    seed_low,
    seed_high,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RUNS: tl.constexpr,
    FAST: tl.constexpr,
    ADD: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """First pass of the backward: each channel's sums of du and du d over a split's rows."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * CHANNELS
    split = tl.program_id(0) // TILES % SPLITS
    n = (tl.program_id(0) // (TILES * SPLITS)).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    statistics = n * (C // GROUP) + c // GROUP
    mean = tl.load(mean_ptr + statistics, mask=c < C, other=0)
    factor, offset = _read_affine(
        weight_ptr, bias_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride, c, c < C, FILM
    )
    factor *= tl.load(rstd_ptr + statistics, mask=c < C, other=0)
    du_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    dud_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        rows = (split * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & (c < C)[None, :]
        offs = _runs(rows * C + c[None, :], VECTOR)
        du = tl.load(dy_ptr + n * (PLANE * C) + offs, mask=mask, other=0).to(tl.float32)
        d = _read_input(
            x_ptr + n * (PLANE * C1), x_ptr, skip_ptr + n * (PLANE * C2), add_ptr + n * add_stride, x_ptr,
            rows, c, first, mask, c < C, C1, C2, SOURCES, VECTOR, ADD, False,
        ) - mean[None, :]  # fmt: skip
        if DROP:
            du = _drop(
                du, rows, c, first, ordinals_ptr, n, threshold, tag, seed_low, seed_high, C, CHANNELS, RUNS
            )  # fmt: skip
        du = _gradient_of_u(d, du, factor, offset, SILU, FAST)
        du_sum += du
        dud_sum += du * d
    offs = (n * SPLITS + split) * C + c
    tl.store(du_sums_ptr + offs, tl.sum(du_sum, 0), mask=c < C)
    tl.store(dud_sums_ptr + offs, tl.sum(dud_sum, 0), mask=c < C)


@triton.jit(do_not_specialize=["scale_stride"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _merge_sums_kernel(
    du_sums_ptr,  # [N, SPLITS, C]
    dud_sums_ptr,  # [N, SPLITS, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    rstd_ptr,  # [N, C / GROUP]
    daffine_ptr,  # [N, 2, C] of weight and bias
    dfilm_ptr,  # [N, 2, C] of scale and shift, written if FILM
    k_1_ptr,  # [N, C]
    k_2_ptr,  # [N, C]
    scale_stride,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BUNDLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    FILM: tl.constexpr,
):
    """The sums of whole groups from those of their splits and channels, and what follows from them."""
    first = (tl.program_id(0) % TILES) * BUNDLE
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    mask_c = (tl.arange(0, CHANNELS) < BUNDLE) & (c < C)
    splits = tl.arange(0, PADDED_SPLITS)[:, None]
    mask = (splits < SPLITS) & mask_c[None, :]
    offs = (n * SPLITS + splits) * C + c[None, :]
    _, k_1, k_2 = _finish_sums(
        tl.sum(tl.load(du_sums_ptr + offs, mask=mask, other=0), 0),
        tl.sum(tl.load(dud_sums_ptr + offs, mask=mask, other=0), 0), weight_ptr, bias_ptr, scale_ptr + n * scale_stride,
        rstd_ptr + n * (C // GROUP), daffine_ptr + n * (2 * C), dfilm_ptr + n * (2 * C), c, mask_c,
        C, PLANE, GROUP, FOLD, BUNDLE, FILM,
    )  # fmt: skip
    tl.store(k_1_ptr + n * C + c, k_1, mask=mask_c)
    tl.store(k_2_ptr + n * C + c, k_2, mask=mask_c)


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _backward_apply_kernel(
    dy_ptr,  # [N, PLANE, C]
    dtotal_ptr,  # [N, PLANE, C1], read if DTOTAL
    x_ptr,  # [N, PLANE, C1]: x, or total
    skip_ptr,  # [N, PLANE, C2]
    add_ptr,  # [C1] or [N, C1]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, C / GROUP]
    rstd_ptr,  # [N, C / GROUP]
    k_1_ptr,  # [N, C]
    k_2_ptr,  # [N, C]
    ordinals_ptr,  # [N] int64
    dx_ptr,  # [N, PLANE, C1]
    dskip_ptr,  # [N, PLANE, C2]
    dadd_ptr,  # [N, SPLITS, C1], written if DADD
    add_stride,
    scale_stride,
    shift_stride,
    threshold,
    tag,
    seed_low,
    seed_high,
    C1: tl.constexpr,
    C2: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SOURCES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RUNS: tl.constexpr,
    FAST: tl.constexpr,
    ADD: tl.constexpr,
    DTOTAL: tl.constexpr,
    DADD: tl.constexpr,
    FILM: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """Second pass of the backward."""
    C: tl.constexpr = C1 + C2
    first = (tl.program_id(0) % TILES) * CHANNELS
    split = tl.program_id(0) // TILES % SPLITS
    n = (tl.program_id(0) // (TILES * SPLITS)).to(tl.int64)
    c = first + tl.arange(0, CHANNELS)
    statistics = n * (C // GROUP) + c // GROUP
    mean = tl.load(mean_ptr + statistics, mask=c < C, other=0)
    factor, offset = _read_affine(
        weight_ptr, bias_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride, c, c < C, FILM
    )
    factor *= tl.load(rstd_ptr + statistics, mask=c < C, other=0)
    k_1 = tl.load(k_1_ptr + n * C + c, mask=c < C, other=0)
    k_2 = tl.load(k_2_ptr + n * C + c, mask=c < C, other=0)
    dadd = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        rows = (split * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = tl.full((ROWS, CHANNELS), True, tl.int1) if EVEN else (rows < PLANE) & (c < C)[None, :]
        offs = _runs(rows * C + c[None, :], VECTOR)
        du = tl.load(dy_ptr + n * (PLANE * C) + offs, mask=mask, other=0).to(tl.float32)
        d = _read_input(
            x_ptr + n * (PLANE * C1), x_ptr, skip_ptr + n * (PLANE * C2), add_ptr + n * add_stride, x_ptr,
            rows, c, first, mask, c < C, C1, C2, SOURCES, VECTOR, ADD, False,
        ) - mean[None, :]  # fmt: skip
        if DROP:
            du = _drop(
                du, rows, c, first, ordinals_ptr, n, threshold, tag, seed_low, seed_high, C, CHANNELS, RUNS
            )  # fmt: skip
        du = _gradient_of_u(d, du, factor, offset, SILU, FAST)
        dx = du * factor[None, :] - (d * k_2[None, :] + k_1[None, :])
        if DTOTAL:
            mask_1 = _first_source(mask, c, C1, SOURCES)
            offs = _runs(rows * C1 + c[None, :], VECTOR)
            dx += tl.load(dtotal_ptr + n * (PLANE * C1) + offs, mask=mask_1, other=0).to(tl.float32)
        _write(
            dx_ptr + n * (PLANE * C1), dskip_ptr + n * (PLANE * C2), dx, rows, c, first, mask, C1, C2, SOURCES, VECTOR
        )
        if DADD:
            dadd += dx if EVEN else tl.where(mask, dx, 0.0)
    if DADD:
        tl.store(dadd_ptr + (n * SPLITS + split) * C1 + c, tl.sum(dadd, 0), mask=c < C1)


@dataclass(frozen=True)
class Cut:
    """How a norm of [N, C1 + C2, H, W] is cut into programs; fields in capitals are constexpr arguments."""

    C1: int
    C2: int
    PLANE: int
    GROUP: int
    CHANNELS: int  # of a tile: a power of two
    ROWS: int  # of a tile: a power of two
    BUNDLE: int  # channels of a tile that are in use; in one pass whole groups
    BLOCKS: int = 1  # tiles in the loop of a program of the two passes
    one_pass: bool = True

    @property
    def C(self) -> int:
        """Channels in all."""
        return self.C1 + self.C2

    @property
    def TILES(self) -> int:
        """Programs side by side over the channels."""
        return -(-self.C // self.BUNDLE)

    @property
    def SPLITS(self) -> int:
        """Programs over the rows."""
        return -(-self.PLANE // (self.ROWS * self.BLOCKS))

    def sizes(self) -> dict[str, Any]:
        """The constexpr arguments of every kernel that reads images."""
        apart = self.C1 % self.BUNDLE == 0
        return {
            "C1": self.C1,
            "C2": self.C2,
            "PLANE": self.PLANE,
            "CHANNELS": self.CHANNELS,
            "ROWS": self.ROWS,
            "TILES": self.TILES,
            "SOURCES": "one" if not self.C2 else "apart" if apart else "mixed",
            "VECTOR": _vector(self.C1, self.C2, self.BUNDLE),
            "EVEN": self.C % self.CHANNELS == 0
            and self.BUNDLE == self.CHANNELS
            and self.PLANE % (self.ROWS * self.BLOCKS) == 0,
        }

    def groups(self) -> dict[str, Any]:
        """The further ones of kernels that sum over whole groups."""
        return {"GROUP": self.GROUP, "FOLD": _vector(self.GROUP), "BUNDLE": self.BUNDLE}

    def loop(self) -> dict[str, Any]:
        """The further ones of kernels that loop over rows."""
        return {"BLOCKS": self.BLOCKS, "SPLITS": self.SPLITS}

    def runs(self) -> dict[str, Any]:
        """The further one of kernels that draw dropout's mask: whether a counter serves a run of 8 channels."""
        return {"RUNS": self.C % 8 == 0 and self.BUNDLE % 8 == 0}

    def merge(self) -> dict[str, Any]:
        """The constexpr arguments of the kernels that merge the splits."""
        most = max(_power_of_2(self.GROUP), TILE_CHANNELS)
        bundle = min(most // self.GROUP * self.GROUP, self.C)
        return {
            "C": self.C,
            "PLANE": self.PLANE,
            "GROUP": self.GROUP,
            "FOLD": _vector(self.GROUP),
            "BUNDLE": bundle,
            "CHANNELS": _power_of_2(bundle),
            "TILES": -(-self.C // bundle),
            "SPLITS": self.SPLITS,
            "PADDED_SPLITS": _power_of_2(self.SPLITS),
        }

    def warps(self, elements: int, threshold: int = 0) -> dict[str, Any]:
        """Options of a launch whose threads have that many elements of a tile."""
        most = 16
        if threshold and not self.runs()["RUNS"]:
            # With four words of noise to every element; 16 warps would leave 128 registers each, and spill.
            elements, most = min(elements, LOOP_ELEMENTS), 8
        return {**LAUNCH, "num_warps": min(most, _warps(self.ROWS * self.CHANNELS, elements))}


def _power_of_2(size: int) -> int:
    """The least power of two that is at least size."""
    return 1 << max(0, size - 1).bit_length()


def _vector(*sizes: int) -> int:
    """The largest power of two up to 8 that divides all sizes."""
    return next(v for v in (8, 4, 2, 1) if all(size % v == 0 for size in sizes))


def _threads() -> int:
    """Threads of a warp."""
    return launch.WARP if torch.version.hip is None else launch.WAVEFRONT


def _warps(elements: int, elements_per_thread: int) -> int:
    return min(16, max(1, elements // (_threads() * elements_per_thread)))


@lru_cache(maxsize=4096)
def cut(
    num_channels: int,
    num_skip_channels: int,
    plane: int,
    num_groups: int,
    item_bytes: int,
    threads: int = launch.WARP,  # of a warp
) -> Cut:
    """One pass where whole groups fit on chip without much of the tile idle, else two."""
    channels = num_channels + num_skip_channels
    if channels * plane > 2**30:  # offsets within a sample are 32 bits wide
        raise ValueError(f"a sample of {channels * plane} elements is too large for the kernels: the limit is 2^30")
    group, rows = channels // num_groups, _power_of_2(plane)
    fold = _vector(group)
    best, bundle = (0.0, 0.0), 0
    for candidate in range(group, channels + 1, group):
        tile = _power_of_2(candidate)
        if rows * tile > ONE_PASS_ELEMENTS // (1 if candidate == tile else 2):  # masks take registers
            continue
        if _vector(candidate) < _vector(num_channels, num_skip_channels):
            continue  # narrower loads and stores
        comparisons = 0 if candidate == group or fold == group else (tile // fold) ** 2
        if comparisons > min(COMPARISONS, max(1024, 2 * rows * tile)):
            continue
        used = channels / (-(-channels // candidate) * tile)
        if candidate * item_bytes % 32:
            used *= 0.9  # sectors shared with the neighbouring program
        best, bundle = max((best, bundle), ((used, -abs(math.log2(rows * tile / 8192))), candidate))
    if bundle:
        return Cut(num_channels, num_skip_channels, plane, group, _power_of_2(bundle), rows, bundle)
    sizes = [size for size in (TILE_CHANNELS, 2 * TILE_CHANNELS, TILE_CHANNELS // 2) if size < 2 * channels]
    tile = min(sizes or [_power_of_2(channels)], key=lambda size: -(-channels // size) * size)
    rows = min(rows, max(1, 4 * threads * LOOP_ELEMENTS // tile))
    num_blocks = -(-plane // rows)
    most_splits = min(64, max(1, 2 * ONE_PASS_ELEMENTS // _power_of_2(group)))
    blocks = max(-(-num_blocks // most_splits), min(num_blocks, max(1, SPLIT_ELEMENTS // (rows * tile))))
    return Cut(num_channels, num_skip_channels, plane, group, tile, rows, tile, blocks, one_pass=False)


def _cut_of(x: Tensor, skip: Tensor | None, num_groups: int) -> Cut:
    num_skip_channels = 0 if skip is None else skip.shape[1]
    return cut(x.shape[1], num_skip_channels, x.shape[2] * x.shape[3], num_groups, x.element_size(), _threads())


def empty_images(x: Tensor, num_channels: int) -> Tensor:
    """[N, num_channels, H, W] like x, channels_last, not initialised."""
    shape = (x.shape[0], num_channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _aligned(x: Tensor) -> Tensor:
    """x, images or rows, or a copy where it does not start at a multiple of 16 bytes."""
    if x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _rows(x: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """Per-sample rows [N, C] (or one row [C]) as the kernels read them, and the stride from sample to sample."""
    if x is None:
        return like, 0
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, x.stride(0) if x.dim() == 2 else 0


def launch_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ordinals: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total (empty without a residual), mean and rstd [N, num_groups] fp32: one launch, or three."""
    num_samples = x.shape[0]
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    y = empty_images(x, weight.shape[0])
    total = x.new_empty(0) if residual is None else empty_images(x, x.shape[1])
    mean, rstd = (torch.empty(num_samples, num_groups, **like) for _ in range(2))
    if y.numel() == 0:
        return y, total, mean.zero_(), rstd.zero_()
    pieces = _cut_of(x, skip, num_groups)
    x = _aligned(x)
    with_residual = residual is not None
    residual = x if residual is None else _aligned(residual)
    second = x if skip is None else _aligned(skip)
    weight, bias = weight.contiguous(), bias.contiguous()
    (add_rows, add_stride), (scale_rows, scale_stride), (shift_rows, shift_stride) = (
        _rows(rows, x) for rows in (add, scale, shift)
    )
    film = (scale_rows, shift_rows)
    drawn = x if ordinals is None else ordinals.contiguous()
    words = (threshold, signed_word(tag), *seed_words(seed))
    options = {"FAST": launch.is_fast(x.device), "FILM": scale is not None, "SILU": silu, "DROP": threshold > 0}
    source = {"ADD": add is not None, "RESIDUAL": with_residual}
    with on_device(x):
        if pieces.one_pass:
            _group_norm_kernel[(num_samples * pieces.TILES,)](
                x,
                residual,
                second,
                add_rows,
                weight,
                bias,
                *film,
                drawn,
                total,
                y,
                mean,
                rstd,
                add_stride,
                scale_stride,
                shift_stride,
                *words,
                **pieces.sizes(),
                **pieces.groups(),
                **pieces.runs(),
                **options,
                **source,
                EPS=eps,
                **pieces.warps(FORWARD_ELEMENTS, threshold),
            )
            return y, total, mean, rstd
        # Each by itself: the second of two in one tensor might start anywhere.
        means, squares = (torch.empty(num_samples, pieces.SPLITS, pieces.C, **like) for _ in range(2))
        grid, loop = (num_samples * pieces.TILES * pieces.SPLITS,), {**pieces.sizes(), **pieces.loop()}
        _statistics_kernel[grid](
            x,
            residual,
            second,
            add_rows,
            total,
            means,
            squares,
            add_stride,
            **loop,
            **source,
            **pieces.warps(LOOP_ELEMENTS),
        )
        merge = pieces.merge()
        _merge_statistics_kernel[(num_samples * merge["TILES"],)](
            means,
            squares,
            mean,
            rstd,
            **merge,
            SPLIT_ROWS=pieces.ROWS * pieces.BLOCKS,
            EPS=eps,
            **{**LAUNCH, "num_warps": max(4, _warps(merge["PADDED_SPLITS"] * merge["CHANNELS"], LOOP_ELEMENTS))},
        )
        _apply_kernel[grid](
            total if with_residual else x,
            second,
            add_rows,
            weight,
            bias,
            *film,
            mean,
            rstd,
            drawn,
            y,
            add_stride,
            scale_stride,
            shift_stride,
            *words,
            GROUP=pieces.GROUP,
            **loop,
            **pieces.runs(),
            **options,
            ADD=add is not None and not with_residual,
            **pieces.warps(LOOP_ELEMENTS),
        )
    return y, total, mean, rstd


def launch_group_norm_silu_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ordinals: Tensor | None,
    *,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    with_dadd: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dskip, and per sample in fp32 (dweight, dbias) [N, 2, C], (dscale, dshift) [N, 2, C], dadd [N, C1].

    x is what was normalised before add: x, or total with add None. Results that do not apply are empty. One launch,
    or three.
    """
    num_samples, num_channels = x.shape[0], weight.shape[0]
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dx = empty_images(x, x.shape[1])
    dskip = x.new_empty(0) if skip is None else empty_images(x, skip.shape[1])
    daffine = torch.empty(num_samples, 2, num_channels, **like)
    dfilm = torch.empty(num_samples if scale is not None else 0, 2, num_channels, **like)
    if dy.numel() == 0:  # sums over no pixels
        dadd = torch.zeros(num_samples if with_dadd else 0, x.shape[1], **like)
        return dx, dskip, daffine.zero_(), dfilm.zero_(), dadd
    pieces = _cut_of(x, skip, num_groups)
    dadd = torch.empty(num_samples if with_dadd else 0, pieces.SPLITS, pieces.C1, **like)
    dy, x = _aligned(dy), _aligned(x)
    passed = dy if dtotal is None else _aligned(dtotal)
    second = x if skip is None else _aligned(skip)
    mean, rstd = _aligned(mean.contiguous()), _aligned(rstd.contiguous())
    weight, bias = weight.contiguous(), bias.contiguous()
    (add_rows, add_stride), (scale_rows, scale_stride), (shift_rows, shift_stride) = (
        _rows(rows, x) for rows in (add, scale, shift)
    )
    film = (scale_rows, shift_rows)
    second_gradient = dx if skip is None else dskip
    drawn = x if ordinals is None else ordinals.contiguous()
    scalars = (add_stride, scale_stride, shift_stride, threshold, signed_word(tag), *seed_words(seed))
    options = {
        "FAST": launch.is_fast(x.device),
        "ADD": add is not None,
        "FILM": scale is not None,
        "SILU": silu,
        "DROP": threshold > 0,
    }
    more = {"DTOTAL": dtotal is not None, "DADD": with_dadd}
    with on_device(x):
        if pieces.one_pass:
            _group_norm_backward_kernel[(num_samples * pieces.TILES,)](
                dy,
                passed,
                x,
                second,
                add_rows,
                weight,
                bias,
                *film,
                mean,
                rstd,
                drawn,
                dx,
                second_gradient,
                daffine,
                dfilm if scale is not None else daffine,
                dadd,
                *scalars,
                **pieces.sizes(),
                **pieces.groups(),
                **pieces.runs(),
                **options,
                **more,
                **pieces.warps(BACKWARD_ELEMENTS, threshold),
            )
            return dx, dskip, daffine, dfilm, dadd[:, 0]
        sums = [torch.empty(num_samples, pieces.SPLITS, pieces.C, **like) for _ in range(2)]
        k = [torch.empty(num_samples, pieces.C, **like) for _ in range(2)]
        grid, loop = (num_samples * pieces.TILES * pieces.SPLITS,), {**pieces.sizes(), **pieces.loop(), **pieces.runs()}
        inputs = (x, second, add_rows, weight, bias, *film, mean, rstd)
        _backward_sums_kernel[grid](
            dy,
            *inputs,
            drawn,
            *sums,
            *scalars,
            GROUP=pieces.GROUP,
            **loop,
            **options,
            **pieces.warps(LOOP_ELEMENTS),
        )
        merge = pieces.merge()
        _merge_sums_kernel[(num_samples * merge["TILES"],)](
            *sums,
            weight,
            bias,
            scale_rows,
            rstd,
            daffine,
            dfilm if scale is not None else daffine,
            *k,
            scale_stride,
            **merge,
            FILM=scale is not None,
            **{**LAUNCH, "num_warps": max(4, _warps(merge["PADDED_SPLITS"] * merge["CHANNELS"], LOOP_ELEMENTS))},
        )
        _backward_apply_kernel[grid](
            dy,
            passed,
            *inputs,
            *k,
            drawn,
            dx,
            second_gradient,
            dadd,
            *scalars,
            GROUP=pieces.GROUP,
            **loop,
            **options,
            **more,
            **pieces.warps(LOOP_ELEMENTS),
        )
    return dx, dskip, daffine, dfilm, dadd.sum(1)
