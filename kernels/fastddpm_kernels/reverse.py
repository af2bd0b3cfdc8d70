"""reverse_step: one step of any sampler that is a row of coefficients.

    prediction' = guide + W (prediction - guide)                                  guidance (Ho and Salimans 2022)
    x_0_hat     = clip(A x_t + B prediction', lo, hi)
    x_next      = C x_0_hat + E x_t + H h1 + G h2 + F s z
    h1_next     = P1 x_0_hat + Q1 x_t + R1 h1 + S1 h2,   h2_next = P2 x_0_hat + Q2 x_t + R2 h1 + S2 h2

s is 1, or exp(log variance / 2) of a learned variance v (improved DDPM eq. 15):
log variance = frac log_max + (1 - frac) log_min with frac = (v + 1) / 2. DDPM, DDIM and one-step solvers need no
history; multistep solvers carry what they know of earlier steps in h1 and h2.
"""

# Tuples grow in unrolled loops, which Triton types and mypy cannot.
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, check_precision, compute_dtype, memory_format, resolve_impl
from ._triton import tl, triton
from .draws import images_of_normals
from .launch import LAUNCH, on_device, seed_words, tiles_of
from .ops import Case, Kwargs, Op, example_floats
from .philox import MASK, Stream, normals_reference, split_seed, stream_tag
from .tiles import TWO_LN_2, load_group, normals, store_group

COLUMNS = (
    *("A", "B", "C", "E", "H", "F", "lo", "hi"),
    *("W", "log_min", "log_max"),
    *("G", "P1", "Q1", "R1", "S1", "P2", "Q2", "R2", "S2"),
)
NUM_COLUMNS = tl.constexpr(len(COLUMNS))
MOST_HISTORY = 2
Z_TAG = tl.constexpr(stream_tag(Stream.Z))
QUARTER_LOG2_E = tl.constexpr(0.36067376022224085)
# x_next; with return_x_0 also x_0_hat; with history x_next, x_0_hat or None, and the next history.
Stepped = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor | None, tuple[Tensor, ...]]


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _reverse_step_kernel(
    x_t_ptr,  # [N, D], memory order LAYOUT, as all of the images here
    prediction_ptr,  # [N, D]
    guide_ptr,  # [N, D]; read if GUIDED
    variance_ptr,  # [N, D]; read if LEARNED
    noise_ptr,  # [N, D]; read if NOISE is "given"
    h1_ptr,  # [N, D]; read if HISTORY is 1 or 2
    h2_ptr,  # [N, D]; read if HISTORY is 2
    out_ptr,  # [N, D]
    x_0_ptr,  # [N, D]; written if WITH_X_0
    h1_next_ptr,  # [N, D]; written if HISTORY is 1 or 2
    h2_next_ptr,  # [N, D]; written if HISTORY is 2
    coefficients_ptr,  # [S, 20]
    row_ptr,  # [1] int64
    images_ptr,  # [N] int64
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
    HISTORY: tl.constexpr,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,
    NOISE: tl.constexpr,
    WITH_X_0: tl.constexpr,
):
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.load(row_ptr)
    coefficients_ptr += row * NUM_COLUMNS
    a = tl.load(coefficients_ptr)
    b = tl.load(coefficients_ptr + 1)
    c = tl.load(coefficients_ptr + 2)
    e = tl.load(coefficients_ptr + 3)
    low = tl.load(coefficients_ptr + 6)
    high = tl.load(coefficients_ptr + 7)
    if NOISE != "none":
        f = tl.load(coefficients_ptr + 5)
    if NOISE == "drawn":
        image = tl.load(images_ptr + n).to(tl.uint32)
        step = row.to(tl.uint32)
        key_0 = seed_low.to(tl.uint32, bitcast=True)
        key_1 = seed_high.to(tl.uint32, bitcast=True)
    if GUIDED:
        extra = tl.load(coefficients_ptr + 8) - 1.0
    if LEARNED:
        log_min = tl.load(coefficients_ptr + 9)
        log_max = tl.load(coefficients_ptr + 10)
        # exp(log variance / 2) = 2^(v slope + middle); where F is 0, noise of 0 must not meet an infinite factor.
        slope = tl.where(f == 0.0, 0.0, (log_max - log_min) * QUARTER_LOG2_E)
        middle = tl.where(f == 0.0, 0.0, (log_max + log_min) * QUARTER_LOG2_E)
    if HISTORY > 0:
        h = tl.load(coefficients_ptr + 4)
        p1 = tl.load(coefficients_ptr + 12)
        q1 = tl.load(coefficients_ptr + 13)
        r1 = tl.load(coefficients_ptr + 14)
    if HISTORY > 1:
        g = tl.load(coefficients_ptr + 11)
        s1 = tl.load(coefficients_ptr + 15)
        p2 = tl.load(coefficients_ptr + 16)
        q2 = tl.load(coefficients_ptr + 17)
        r2 = tl.load(coefficients_ptr + 18)
        s2 = tl.load(coefficients_ptr + 19)
    x_t_ptr += n * (C * PLANE)
    prediction_ptr += n * (C * PLANE)
    guide_ptr += n * (C * PLANE)
    variance_ptr += n * (C * PLANE)
    noise_ptr += n * (C * PLANE)
    h1_ptr += n * (C * PLANE)
    h2_ptr += n * (C * PLANE)
    out_ptr += n * (C * PLANE)
    x_0_ptr += n * (C * PLANE)
    h1_next_ptr += n * (C * PLANE)
    h2_next_ptr += n * (C * PLANE)
    for block in range(BLOCKS):
        first = (tile * BLOCKS + block) * UNROLL * GROUPS
        # Loads first: the compiler may not move them above the stores of an earlier group.
        x = ()
        prediction = ()
        guide = ()
        variance = ()
        given = ()
        h1 = ()
        h2 = ()
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            x += load_group(x_t_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN)
            prediction += load_group(
                prediction_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN
            )
            if GUIDED:
                guide += load_group(
                    guide_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN
                )
            if LEARNED:
                variance += load_group(
                    variance_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN
                )
            if NOISE == "given":
                given += load_group(
                    noise_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN
                )
            if HISTORY > 0:
                h1 += load_group(h1_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN)
            if HISTORY > 1:
                h2 += load_group(h2_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN)
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            if NOISE == "drawn":
                noise = normals(groups, image, step, Z_TAG, key_0, key_1, TWO_LN_2 * f * f, SIZE // 4, FAST)
            x_0 = ()
            out = ()
            h1_next = ()
            h2_next = ()
            for k in tl.static_range(SIZE):
                x_k = x[i * SIZE + k]
                prediction_k = prediction[i * SIZE + k]
                if GUIDED:
                    # W - 1 times the difference: a row with W = 1 leaves the prediction as it is.
                    prediction_k = prediction_k + (prediction_k - guide[i * SIZE + k]) * extra
                # A NaN of the network must come out as one: the clip lets it through.
                x_0_k = tl.clamp(x_k * a + prediction_k * b, low, high, propagate_nan=tl.PropagateNan.ALL)
                x_0 += (x_0_k,)
                out_k = x_0_k * c + x_k * e
                if HISTORY > 0:
                    out_k = out_k + h1[i * SIZE + k] * h
                    h1_next_k = (x_0_k * p1 + x_k * q1) + h1[i * SIZE + k] * r1
                if HISTORY > 1:
                    out_k = out_k + h2[i * SIZE + k] * g
                    h1_next_k = h1_next_k + h2[i * SIZE + k] * s1
                    h2_next += (((x_0_k * p2 + x_k * q2) + h1[i * SIZE + k] * r2) + h2[i * SIZE + k] * s2,)
                if HISTORY > 0:
                    h1_next += (h1_next_k,)
                if NOISE != "none":
                    noise_k = noise[k] if NOISE == "drawn" else given[i * SIZE + k] * f
                    if LEARNED:
                        noise_k = noise_k * tl.exp2(variance[i * SIZE + k] * slope + middle)
                    out_k = out_k + noise_k
                out += (out_k,)
            store_group(out_ptr, groups, mask, out, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)
            if WITH_X_0:
                store_group(x_0_ptr, groups, mask, x_0, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)
            if HISTORY > 0:
                store_group(h1_next_ptr, groups, mask, h1_next, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)
            if HISTORY > 1:
                store_group(h2_next_ptr, groups, mask, h2_next, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)


def reverse_step(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    history: tuple[Tensor, ...] = (),
    guide: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    noisy: bool = True,
    return_x_0: bool = False,
    impl: str | None = None,
) -> Stepped:
    """The next state (fp32, x_t's memory format) from x_t and the network's prediction, by one row of coefficients.

    Returns x_next; with return_x_0 (x_next, x_0_hat); with history (x_next, x_0_hat or None, the next history), the
    last a tuple as long as history. All of them are fresh tensors like x_next.

    x_t fp32 [N, C, H, W]; prediction the same shape, any floating dtype and strides. coefficients fp32 [S, 20] on the
    device, columns COLUMNS; row: int64 with one element on the device, the row to apply and the solver step in the
    address of z (never read by the host, so a CUDA graph may advance it); images int64 [N], image numbers below 2^32.
    z comes from Stream.Z at (image, row) and F must not be negative; where F is 0, z counts for nothing.

    history: none, one or two fp32 tensors shaped as x_t (h1, h2); without them H, G and the columns from P1 on are not
    read, with one of them G, S1 and the columns from P2 on are not. guide: a second prediction, any floating dtype and
    strides; without it W is not read. variance: a learned v (about -1..1) shaped as x_t, any floating dtype and
    strides; without it log_min and log_max are not read. noise: a z of the caller's own shaped as x_t, any floating
    dtype, in place of Stream.Z; then F may have any sign. noisy=False promises that F is 0 in every row: nothing is
    drawn, and noise and variance are not read. No gradients.
    Raises ValueError for arguments out of shape, dtype or device.
    """
    check_images("x_t", x_t)
    if prediction.shape != x_t.shape or prediction.device != x_t.device:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} on {prediction.device} must match x_t {tuple(x_t.shape)} "
            f"on {x_t.device}"
        )
    if not prediction.is_floating_point() or not x_t.is_floating_point():
        raise ValueError(f"x_t and prediction must be floating point, got {x_t.dtype} and {prediction.dtype}")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(COLUMNS):
        raise ValueError(f"coefficients must be [S, {len(COLUMNS)}], got {tuple(coefficients.shape)}")
    if coefficients.dtype not in (torch.float32, torch.float64) or coefficients.device != x_t.device:
        raise ValueError(
            f"coefficients must be float32 on {x_t.device}, got {coefficients.dtype} on {coefficients.device}"
        )
    if row.numel() != 1 or row.dtype != torch.int64 or row.device != x_t.device:
        raise ValueError(
            f"row must be one int64 on {x_t.device}, got {row.dtype} of shape {tuple(row.shape)} on {row.device}"
        )
    check_per_sample("images", images, x_t.shape[0], torch.int64, x_t.device)
    split_seed(seed)
    if not isinstance(history, tuple) or len(history) > MOST_HISTORY:
        raise ValueError(f"history must be a tuple of at most {MOST_HISTORY} tensors, got {_described(history)}")
    for i, h in enumerate(history):
        _check_like(f"history[{i}]", h, x_t)
        if h.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"history[{i}] must be float32, got {h.dtype}")
    for name, x in (("guide", guide), ("variance", variance), ("noise", noise)):
        if x is not None:
            _check_like(name, x, x_t)
    impl = resolve_impl(impl, x_t.device)
    arguments = _arguments(
        x_t, prediction, coefficients, row, images, history, guide, variance, noise, seed, noisy, return_x_0
    )
    check_precision(impl, *(x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()))
    results = _reverse_step_op(*arguments, impl)
    return _stepped(results, len(history), return_x_0)


def reverse_step_reference(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    history: tuple[Tensor, ...] = (),
    guide: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    noisy: bool = True,
    return_x_0: bool = False,
) -> Stepped:
    """`reverse_step` in plain torch. Computes in float64 when an input is float64."""
    arguments = _arguments(
        x_t, prediction, coefficients, row, images, history, guide, variance, noise, seed, noisy, return_x_0
    )
    results = _run_reference(*arguments)
    return _stepped(results, len(history), return_x_0)


def reverse_step_triton(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    history: tuple[Tensor, ...] = (),
    guide: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    noisy: bool = True,
    return_x_0: bool = False,
) -> Stepped:
    """`reverse_step` as one Triton launch."""
    arguments = _arguments(
        x_t, prediction, coefficients, row, images, history, guide, variance, noise, seed, noisy, return_x_0
    )
    results = _launch(*arguments)
    return _stepped(results, len(history), return_x_0)


def _check_like(name: str, x: Tensor, x_t: Tensor) -> None:
    """Raise ValueError unless x is floating point, and shaped and placed as x_t."""
    if x.shape != x_t.shape or x.device != x_t.device:
        raise ValueError(f"{name} {tuple(x.shape)} on {x.device} must match x_t {tuple(x_t.shape)} on {x_t.device}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def _described(history: object) -> str:
    return f"{len(history)}" if isinstance(history, tuple) else f"a {type(history).__name__}"


def _arguments(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    history: tuple[Tensor, ...],
    guide: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seed: int,
    noisy: bool,
    return_x_0: bool,
) -> tuple[Any, ...]:
    """The arguments as the op takes them: h1 and h2 apart, and nothing about noise that is not there."""
    h1, h2 = (*history, None, None)[:MOST_HISTORY]
    if not noisy:
        variance = noise = None
    row = row.reshape(1)
    return x_t, prediction, coefficients, row, images, h1, h2, guide, variance, noise, seed, noisy, return_x_0


def _stepped(results: tuple[Tensor, Tensor, Tensor, Tensor], num_history: int, return_x_0: bool) -> Stepped:
    """What the public op returns of (x_next, x_0_hat, h1_next, h2_next)."""
    out, x_0_hat, *history = results
    if num_history:
        return out, x_0_hat if return_x_0 else None, tuple(history[:num_history])
    return (out, x_0_hat) if return_x_0 else out


def _run_reference(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    guide: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seed: int,
    noisy: bool,
    return_x_0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_next, x_0_hat, h1_next, h2_next), empty where not asked for or without history."""
    work = compute_dtype(x_t, prediction, coefficients, h1, h2, guide, variance, noise)
    columns = coefficients.index_select(0, row)[0].to(work).unbind(0)
    a, b, c, e, h, f, lo, hi, w, log_min, log_max, g, p1, q1, r1, s1, p2, q2, r2, s2 = columns
    x, past = x_t.to(work), tuple(each.to(work) for each in (h1, h2) if each is not None)
    # Products apart: torch's fused multiply-adds round differently at the end of a loop, so by batch position.
    predicted = prediction.to(work)
    if guide is not None:
        predicted = predicted + (predicted - guide.to(work)).mul_(w - 1.0)
    x_0_hat = (x * a).add_(predicted * b).clamp_(lo, hi)

    def combined(*factors: Tensor) -> Tensor:
        """Factors of x_0_hat, x_t and the history, as far as there is one."""
        total = (x_0_hat * factors[0]).add_(x * factors[1])
        for factor, each in zip(factors[2:], past, strict=False):
            total.add_(each * factor)
        return total

    out = combined(c, e, h, g)
    if noisy:
        z = _normals_of(x_t, row, images, seed, work).mul_(f) if noise is None else noise.to(work) * f
        if variance is not None:
            # Where F is 0 the noise is 0, and must not meet an infinite factor.
            slope, middle = (torch.where(f == 0, 0.0, log_max + sign * log_min) / 4 for sign in (-1.0, 1.0))
            z.mul_((variance.to(work) * slope).add_(middle).exp_())
        out.add_(z)
    results = (
        out,
        x_0_hat if return_x_0 else None,
        combined(p1, q1, r1, s1) if len(past) > 0 else None,
        combined(p2, q2, r2, s2) if len(past) > 1 else None,
    )
    first, second, third, fourth = (
        out.new_empty(0) if x is None else x.contiguous(memory_format=memory_format(x_t)) for x in results
    )
    return first, second, third, fourth


def _normals_of(x_t: Tensor, row: Tensor, images: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """z of Stream.Z at (image, row), shaped and placed as x_t."""
    shape, c1 = (x_t.shape[1], x_t.shape[2], x_t.shape[3]), images & MASK
    c2 = row.expand_as(c1) & MASK
    normals = normals_reference(seed, c1, c2, stream_tag(Stream.Z), shape[0] * shape[1] * shape[2], dtype)
    return images_of_normals(normals, shape, memory_format(x_t) == torch.channels_last)


def _launch(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    guide: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seed: int,
    noisy: bool,
    return_x_0: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_next, x_0_hat, h1_next, h2_next), empty where not asked for or without history."""
    format_ = memory_format(x_t)
    x_t = x_t.contiguous(memory_format=format_)
    # A pointer that is not read is x_t's, one that is not written an empty tensor's.
    read = tuple(
        x_t if x is None else x.contiguous(memory_format=format_) for x in (prediction, guide, variance, noise, h1, h2)
    )
    out = torch.empty(x_t.shape, dtype=torch.float32, device=x_t.device, memory_format=format_)
    x_0_hat, h1_next, h2_next = (
        torch.empty_like(out) if wanted else out.new_empty(0) for wanted in (return_x_0, h1 is not None, h2 is not None)
    )
    if out.numel() == 0:
        return out, x_0_hat, h1_next, h2_next
    num_read = 2 + sum(x is not None for x in (guide, variance, noise, h1, h2))
    cut = tiles_of(x_t, max(x.element_size() for x in (x_t, *read, out)), num_read=num_read)
    with on_device(out):
        _reverse_step_kernel[(x_t.shape[0] * cut.TILES,)](
            x_t,
            *read,
            out,
            x_0_hat,
            h1_next,
            h2_next,
            coefficients.contiguous(),
            row,
            images.contiguous(),
            *seed_words(seed),
            **cut.constants(),
            HISTORY=2 if h2 is not None else 1 if h1 is not None else 0,
            GUIDED=guide is not None,
            LEARNED=variance is not None,
            NOISE=("drawn" if noise is None else "given") if noisy else "none",
            WITH_X_0=return_x_0,
            **LAUNCH,
        )
    return out, x_0_hat, h1_next, h2_next


@torch.library.custom_op("fastddpm_kernels::reverse_step", mutates_args=())
def _reverse_step_op(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    guide: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seed: int,
    noisy: bool,
    return_x_0: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = _launch if impl == "triton" else _run_reference
    return function(
        *(x_t, prediction, coefficients, row, images, h1, h2, guide, variance, noise, seed, noisy, return_x_0)
    )


@_reverse_step_op.register_fake
def _(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    guide: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seed: int,
    noisy: bool,
    return_x_0: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = torch.float32
    if impl != "triton":
        work = compute_dtype(x_t, prediction, coefficients, h1, h2, guide, variance, noise)
    out = torch.empty(x_t.shape, dtype=work, device=x_t.device, memory_format=memory_format(x_t))
    x_0_hat, h1_next, h2_next = (
        torch.empty_like(out) if wanted else out.new_empty(0) for wanted in (return_x_0, h1 is not None, h2 is not None)
    )
    return out, x_0_hat, h1_next, h2_next


def _example(case: Case) -> Kwargs:
    coefficients = torch.rand(5, len(COLUMNS), generator=case.generator("coefficients")) * 0.5 + 0.25
    column = dict(zip(COLUMNS, coefficients.unbind(1), strict=True))
    column["lo"][:], column["hi"][:], column["F"][-1] = -1.0, 1.0, 0.0  # the last step of a sampler adds no noise
    column["W"].add_(2.0)
    column["log_min"].sub_(3.0)
    flags = case.variant.split("-")
    if "noiseless" in flags:
        column["F"][:] = 0.0
    kwargs: Kwargs = {
        "x_t": example_floats(case, "x_t", torch.float32),
        "prediction": example_floats(case, "prediction"),
        "coefficients": coefficients.to(case.device),
        "row": torch.tensor(4 if "last" in flags else 2, device=case.device),
        "images": torch.randint(2**32, (case.shape[0],), generator=case.generator("images")).to(case.device),
        "seed": 2**62 + case.seed,
        "noisy": "noiseless" not in flags,
        "return_x_0": "with_x_0" in flags,
    }
    if "guided" in flags:
        kwargs["guide"] = example_floats(case, "guide")
    if "learned" in flags:
        # Where there is no noise, an untrained net's variance may be anything.
        kwargs["variance"] = example_floats(case, "variance") * (1e3 if "last" in flags else 1.0)
    if "given" in flags:
        kwargs["noise"] = example_floats(case, "noise", torch.float32)
    length = next((int(flag[1:]) for flag in flags if flag in ("h1", "h2")), 0)
    if length:
        kwargs["history"] = tuple(example_floats(case, f"h{i + 1}", torch.float32) for i in range(length))
    return kwargs


REVERSE_STEP = Op(
    "reverse_step",
    reverse_step,
    reverse_step_reference,
    reverse_step_triton,
    _example,
    (
        *("noisy", "with_x_0", "last"),
        *("guided", "learned", "learned-last", "given", "h1", "h2-noiseless"),
        *("h1-guided-noiseless-with_x_0", "h2-guided-learned-given-with_x_0"),
    ),
    (torch.float32, torch.bfloat16, torch.float16),
)
