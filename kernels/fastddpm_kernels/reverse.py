"""reverse_step: one step of any sampler that is a row of coefficients.

x_0_hat = clip(A x_t + B prediction, lo, hi);  x_{t-1} = C x_0_hat + E x_t + F z
"""

# Tuples grow in unrolled loops, which Triton types and mypy cannot.
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, check_precision, compute_dtype, memory_format, resolve_impl
from ._triton import tl, triton
from .draws import images_of_normals
from .launch import LAUNCH, on_device, seed_words, tiles_of
from .ops import Case, Kwargs, Op, example_floats
from .philox import MASK, Stream, normals_reference, split_seed, stream_tag
from .tiles import TWO_LN_2, load_group, normals, store_group

COLUMNS = ("A", "B", "C", "E", "H", "F", "lo", "hi")
Z_TAG = tl.constexpr(stream_tag(Stream.Z))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _reverse_step_kernel(
    x_t_ptr,  # [N, D], memory order LAYOUT
    prediction_ptr,  # [N, D], the same order
    out_ptr,  # [N, D], the same order
    x_0_ptr,  # [N, D], the same order; written if WITH_X_0
    coefficients_ptr,  # [S, 8]
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
    WITH_X_0: tl.constexpr,
):
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.load(row_ptr)
    image = tl.load(images_ptr + n)
    coefficients_ptr += row * 8
    a = tl.load(coefficients_ptr)
    b = tl.load(coefficients_ptr + 1)
    c = tl.load(coefficients_ptr + 2)
    e = tl.load(coefficients_ptr + 3)
    f = tl.load(coefficients_ptr + 5)
    low = tl.load(coefficients_ptr + 6)
    high = tl.load(coefficients_ptr + 7)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    x_t_ptr += n * (C * PLANE)
    prediction_ptr += n * (C * PLANE)
    out_ptr += n * (C * PLANE)
    x_0_ptr += n * (C * PLANE)
    for block in range(BLOCKS):
        first = (tile * BLOCKS + block) * UNROLL * GROUPS
        # Loads first: the compiler may not move them above the stores of an earlier group.
        x = ()
        prediction = ()
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            x += load_group(x_t_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN)
            prediction += load_group(
                prediction_ptr, groups, mask, 0, C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN
            )
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            mask = groups * SIZE < C * PLANE
            noise = normals(
                groups, image.to(tl.uint32), row.to(tl.uint32), Z_TAG, key_0, key_1, TWO_LN_2 * f * f, SIZE // 4, FAST
            )
            x_0 = ()
            out = ()
            for k in tl.static_range(SIZE):
                # A NaN of the network must come out as one: the clip lets it through.
                x_0_k = tl.clamp(
                    x[i * SIZE + k] * a + prediction[i * SIZE + k] * b, low, high, propagate_nan=tl.PropagateNan.ALL
                )
                x_0 += (x_0_k,)
                out += ((x_0_k * c + x[i * SIZE + k] * e) + noise[k],)
            store_group(out_ptr, groups, mask, out, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)
            if WITH_X_0:
                store_group(x_0_ptr, groups, mask, x_0, C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, EVEN)


def reverse_step(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    history: Tensor | None = None,
    return_x_0: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_{t-1} (fp32, x_t's memory format) from x_t and the network's prediction; with return_x_0 also x_0_hat.

    x_t fp32 [N, C, H, W]; prediction the same shape, any floating dtype and strides. coefficients fp32 [S, 8] on the
    device, columns (A, B, C, E, H, F, lo, hi); row: int64 with one element on the device, the row to apply and the
    solver step in the address of z (never read by the host, so a CUDA graph may advance it); images int64 [N], image
    numbers below 2^32. z comes from Stream.Z at (image, row) and F must not be negative; where F is 0, z counts for
    nothing (it is always finite).
    history is reserved for multistep solvers and must be None. No gradients.
    Raises ValueError for arguments out of shape or dtype.
    """
    check_images("x_t", x_t)
    if history is not None:
        raise ValueError("history is reserved for multistep solvers: pass None")
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
    impl = resolve_impl(impl, x_t.device)
    check_precision(impl, x_t, prediction, coefficients)
    out, x_0_hat = _reverse_step_op(x_t, prediction, coefficients, row.reshape(1), images, seed, return_x_0, impl)
    return (out, x_0_hat) if return_x_0 else out


def reverse_step_reference(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    return_x_0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reverse_step` in plain torch. Computes in float64 when an input is float64."""
    out, x_0_hat = _run_reference(x_t, prediction, coefficients, row, images, seed, return_x_0)
    return (out, x_0_hat) if return_x_0 else out


def reverse_step_triton(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    *,
    seed: int,
    return_x_0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reverse_step` as one Triton launch."""
    out, x_0_hat = _launch(x_t, prediction, coefficients, row, images, seed, return_x_0)
    return (out, x_0_hat) if return_x_0 else out


def _run_reference(
    x_t: Tensor, prediction: Tensor, coefficients: Tensor, row: Tensor, images: Tensor, seed: int, return_x_0: bool
) -> tuple[Tensor, Tensor]:
    """(x_{t-1}, x_0_hat), the second empty unless asked for."""
    work = compute_dtype(x_t, prediction, coefficients)
    a, b, c, e, _, f, lo, hi = coefficients.index_select(0, row.reshape(1))[0].to(work).unbind(0)
    channels_last = memory_format(x_t) == torch.channels_last
    shape = (x_t.shape[1], x_t.shape[2], x_t.shape[3])
    c1 = images & MASK
    normals = normals_reference(
        seed, c1, row.reshape(1).expand_as(c1) & MASK, stream_tag(Stream.Z), shape[0] * shape[1] * shape[2], work
    )
    z = images_of_normals(normals, shape, channels_last)
    x = x_t.to(work)
    # Products apart: torch's fused multiply-adds round differently at the end of a loop, so by batch position.
    x_0_hat = (x * a).add_(prediction.to(work) * b).clamp_(lo, hi)
    out = (x_0_hat * c).add_(x * e).add_(z.mul_(f)).contiguous(memory_format=memory_format(x_t))
    return out, x_0_hat.contiguous(memory_format=memory_format(x_t)) if return_x_0 else out.new_empty(0)


def _launch(
    x_t: Tensor, prediction: Tensor, coefficients: Tensor, row: Tensor, images: Tensor, seed: int, return_x_0: bool
) -> tuple[Tensor, Tensor]:
    """(x_{t-1}, x_0_hat), the second empty unless asked for."""
    format_ = memory_format(x_t)
    x_t = x_t.contiguous(memory_format=format_)
    prediction = prediction.contiguous(memory_format=format_)
    out = torch.empty(x_t.shape, dtype=torch.float32, device=x_t.device, memory_format=format_)
    x_0_hat = torch.empty_like(out) if return_x_0 else out.new_empty(0)
    if out.numel() == 0:
        return out, x_0_hat
    cut = tiles_of(x_t, max(x.element_size() for x in (x_t, prediction, out)))
    with on_device(out):
        _reverse_step_kernel[(x_t.shape[0] * cut.TILES,)](
            x_t,
            prediction,
            out,
            x_0_hat,
            coefficients.contiguous(),
            row,
            images.contiguous(),
            *seed_words(seed),
            **cut.constants(),
            WITH_X_0=return_x_0,
            **LAUNCH,
        )
    return out, x_0_hat


@torch.library.custom_op("fastddpm_kernels::reverse_step", mutates_args=())
def _reverse_step_op(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    seed: int,
    return_x_0: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    function = _launch if impl == "triton" else _run_reference
    return function(x_t, prediction, coefficients, row, images, seed, return_x_0)


@_reverse_step_op.register_fake
def _(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    images: Tensor,
    seed: int,
    return_x_0: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    work = torch.float32 if impl == "triton" else compute_dtype(x_t, prediction, coefficients)
    out = torch.empty(x_t.shape, dtype=work, device=x_t.device, memory_format=memory_format(x_t))
    return out, torch.empty_like(out) if return_x_0 else out.new_empty(0)


def _example(case: Case) -> Kwargs:
    coefficients = torch.rand(5, len(COLUMNS), generator=case.generator("coefficients")) * 0.5 + 0.25
    coefficients[:, 6], coefficients[:, 7] = -1.0, 1.0
    coefficients[-1, 5] = 0.0  # the last step of a sampler adds no noise
    return {
        "x_t": example_floats(case, "x_t", torch.float32),
        "prediction": example_floats(case, "prediction"),
        "coefficients": coefficients.to(case.device),
        "row": torch.tensor(4 if case.variant == "last" else 2, device=case.device),
        "images": torch.randint(2**32, (case.shape[0],), generator=case.generator("images")).to(case.device),
        "seed": 2**62 + case.seed,
        "return_x_0": case.variant == "with_x_0",
    }


REVERSE_STEP = Op(
    "reverse_step",
    reverse_step,
    reverse_step_reference,
    reverse_step_triton,
    _example,
    ("noisy", "with_x_0", "last"),
    (torch.float32, torch.bfloat16, torch.float16),
)
