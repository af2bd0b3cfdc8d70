"""diffusion_loss: weights[n] mean((prediction - target)^2) per sample, the noise drawn again instead of stored.

Targets: eps (DDPM eq. 14), x_0, and v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, compute_dtype, memory_format, resolve_impl
from ._triton import tl, triton
from .launch import LAUNCH, seed_words, tiles_of
from .noising import EPS_TAG, check_noise_arguments, eps_of, input_kind, input_scale, normalised
from .tiles import TWO_LN_2, load_group, normals, split_ordinal, store_group

TARGETS = ("eps", "x_0", "v")


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
    WITH_GRAD: tl.constexpr,
):
    """Sum of squared errors of a tile; writes the gradient."""
    SIZE: tl.constexpr = 4 if PIXELS == 1 else PIXELS * C
    # error = prediction + sigma x_0 - scale eps for v, prediction - x_0 for x_0, prediction - eps for eps.
    factor, offset = input_scale(sigma if TARGET == "v" else -1.0 + 0.0 * sigma, X_KIND)
    total = tl.zeros((GROUPS,), tl.float32)
    for block in range(BLOCKS):
        first = (tile * BLOCKS + block) * UNROLL * GROUPS
        # Loads first: the compiler may not move them above the stores of an earlier group.
        error = ()
        for i in tl.static_range(UNROLL):
            groups = first + i * GROUPS + tl.arange(0, GROUPS)
            error = error + load_group(
                prediction_ptr, groups, groups * SIZE < C * PLANE, 0,
                C, PLANE, WIDTH, PIXELS, LAYOUT, False, False, GROUPS, EVEN,
            )  # fmt: skip
        x = ()
        if TARGET != "eps":
            for i in tl.static_range(UNROLL):
                groups = first + i * GROUPS + tl.arange(0, GROUPS)
                x = x + load_group(
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
                if k % 4 == 0:
                    squares_0 += difference * difference
                elif k % 4 == 1:
                    squares_1 += difference * difference
                elif k % 4 == 2:
                    squares_2 += difference * difference
                else:
                    squares_3 += difference * difference
                if WITH_GRAD:
                    grad = grad + (difference * grad_scale,)
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
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, True, TARGET, WITH_GRAD,
            )  # fmt: skip
        elif LAYOUT == "nhwc":
            total = _loss_tile(
                prediction_ptr, x_0_ptr, grad_ptr, tile, 0, scale, sigma, grad_scale, c1, c2, key_0, key_1,
                1, SIZE, SIZE, PIXELS, LAYOUT, GROUPS, UNROLL * C, BLOCKS, EVEN, FAST, X_KIND, False, TARGET, WITH_GRAD,
            )  # fmt: skip
        else:
            total = _loss_tile(
                prediction_ptr, x_0_ptr, grad_ptr, tile, 0, scale, sigma, grad_scale, c1, c2, key_0, key_1,
                C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, False, TARGET, WITH_GRAD,
            )  # fmt: skip
    else:
        total = _loss_tile(
            prediction_ptr, x_0_ptr, grad_ptr, tile, flip, scale, sigma, grad_scale, c1, c2, key_0, key_1,
            C, PLANE, WIDTH, PIXELS, LAYOUT, GROUPS, UNROLL, BLOCKS, EVEN, FAST, X_KIND, False, TARGET, WITH_GRAD,
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


def diffusion_loss(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Per-sample losses fp32 [N]: weights[n] times the mean over elements of (prediction - target)^2.

    prediction [N, C, H, W] floating point, any strides. t, ordinals, the tables, seed, x_0 and flip as `add_noise` was
    given them; x_0 and flip are needed by the targets "x_0" and "v" only. weights fp32 [N] or None (ones).
    Differentiable in prediction, once. A sample's loss does not depend on its batch. `diffusion_loss_and_grad` gives
    the gradient in the same pass over the data. Raises ValueError or TypeError for arguments out of shape or dtype.
    """
    x_0, flip = _check(
        prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip, weights
    )
    impl = resolve_impl(impl, prediction.device)
    return _diffusion_loss_op(
        prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip, weights, impl
    )


def diffusion_loss_and_grad(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    grad_scale: Tensor | float,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss` and the gradient of grad_scale * losses.sum() with respect to prediction, in one pass.

    grad_scale: fp32 tensor with one element on prediction's device (read by the kernel: no synchronisation) or a
    float. The other arguments as for `diffusion_loss`. Returns losses fp32 [N] (not scaled) and grad in prediction's
    dtype and memory format: root the backward at the prediction with it, `torch.autograd.backward(prediction, grad)`.
    Neither result carries a gradient. Raises ValueError or TypeError for arguments out of shape or dtype.
    """
    x_0, flip = _check(
        prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip, weights
    )
    impl = resolve_impl(impl, prediction.device)
    scale = torch.as_tensor(grad_scale, dtype=compute_dtype(prediction), device=prediction.device)
    if scale.numel() != 1:
        raise ValueError(f"grad_scale must hold one element, got shape {tuple(scale.shape)}")
    return _diffusion_loss_and_grad_op(
        prediction.detach(),
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        scale.reshape(1),
        seed,
        target,
        x_0,
        flip,
        weights,
        impl,
    )


def diffusion_loss_reference(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`diffusion_loss` in plain torch, differentiable by autograd (tests compare the ops' gradients with it)."""
    goal = _target_of(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip)
    losses = (prediction.to(goal.dtype) - goal).square().mean(dim=(1, 2, 3))
    return losses if weights is None else losses * weights


def diffusion_loss_and_grad_reference(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    grad_scale: Tensor | float,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    with_losses: bool = True,
    with_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss_and_grad` in plain torch. grad_scale: one element, or [N] with one scale per sample.

    The sum over a sample is a fixed tree, so it is bitwise the same in any batch. A result that is not asked for is
    an empty tensor. Computes in float64 when an input is float64.
    """
    goal = _target_of(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip)
    work, num_samples = goal.dtype, prediction.shape[0]
    num_elements = prediction[0].numel() if num_samples else 1
    error = torch.sub(prediction.detach(), goal, out=goal)
    weight = torch.ones((), dtype=work, device=goal.device) if weights is None else weights.to(work)
    losses, grad = error.new_empty(0), error.new_empty(0, dtype=prediction.dtype)
    if with_losses:
        losses = (_tree_sum(error.square()) / num_elements * weight).reshape(num_samples)
    if with_grad:
        scale = weight * torch.as_tensor(grad_scale, dtype=work, device=goal.device) * (2.0 / num_elements)
        grad = error.mul_(scale.expand(num_samples)[:, None, None, None]).to(prediction.dtype)
    return losses, grad


def diffusion_loss_triton(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The losses of `diffusion_loss` as one Triton launch and a small sum; the gradient is the op's business."""
    return diffusion_loss_and_grad_triton(
        prediction,
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        seed=seed,
        grad_scale=1.0,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        with_grad=False,
    )[0]


def diffusion_loss_and_grad_triton(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    seed: int,
    grad_scale: Tensor | float,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    with_losses: bool = True,
    with_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss_and_grad` as one Triton launch and a small sum. grad_scale: one element, or [N]."""
    num_samples, device = prediction.shape[0], prediction.device
    format_ = memory_format(prediction)
    prediction = prediction.detach().contiguous(memory_format=format_)
    losses = torch.zeros(num_samples if with_losses else 0, dtype=torch.float32, device=device)
    grad = prediction.new_empty(0)
    if with_grad:
        grad = torch.empty(prediction.shape, dtype=prediction.dtype, device=device, memory_format=format_)
    if prediction.numel() == 0:
        return losses, grad
    x = prediction if x_0 is None else x_0.contiguous(memory_format=format_)
    scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=device).contiguous() if with_grad else losses
    cut = tiles_of(prediction, max(prediction.element_size(), x.element_size()), flip=flip is not None)
    sums = torch.empty(num_samples, cut.TILES, device=device) if with_losses and cut.TILES > 1 else losses
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
        WEIGHTED=weights is not None,
        SCALE_PER_SAMPLE=scale.numel() > 1,
        WITH_LOSSES=with_losses,
        WITH_GRAD=with_grad,
        **LAUNCH,
    )
    if sums is not losses:
        block = min(1024, 1 << (cut.TILES - 1).bit_length())
        _sum_tiles_kernel[(num_samples,)](sums, losses, TILES=cut.TILES, BLOCK=block, **LAUNCH)
    return losses, grad


def _target_of(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """What the prediction is compared with: a fresh tensor in prediction's memory format."""
    work = compute_dtype(prediction, x_0, sqrt_alpha_bar)
    if target == "eps":
        return eps_of(prediction, ordinals, seed, work)
    assert x_0 is not None
    x = normalised(x_0, flip, work).contiguous(memory_format=memory_format(prediction))
    if target == "x_0":
        return x
    scale, sigma = (table.to(work)[t][:, None, None, None] for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar))
    return eps_of(prediction, ordinals, seed, work).mul_(scale).sub_(x.mul_(sigma))


def _tree_sum(x: Tensor) -> Tensor:
    """Sums [N] over all but the first axis by halving; overwrites x. Additions alone, in an order set by the size."""
    rows = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
    size = rows.shape[1]
    if size == 0:
        return rows.sum(1)
    while size > 1:
        half = (size + 1) // 2
        rows[:, : size - half] += rows[:, half:size]
        size = half
    return rows[:, 0]


def _check(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Validate; returns x_0 and flip, dropped where the target does not read them."""
    check_images("prediction", prediction)
    if not prediction.is_floating_point():
        raise TypeError(f"prediction must be floating point, got {prediction.dtype}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known: use one of {', '.join(TARGETS)}")
    check_noise_arguments(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, flip, seed)
    if weights is not None:
        check_per_sample("weights", weights, prediction.shape[0], None, prediction.device)
    if target == "eps":
        return None, None
    if x_0 is None:
        raise ValueError(f"target={target!r} needs x_0")
    if x_0.shape != prediction.shape or x_0.device != prediction.device:
        raise ValueError(
            f"x_0 {tuple(x_0.shape)} on {x_0.device} must match prediction {tuple(prediction.shape)} "
            f"on {prediction.device}"
        )
    return x_0, flip


@torch.library.custom_op("fastddpm_kernels::diffusion_loss", mutates_args=())
def _diffusion_loss_op(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> Tensor:
    function = diffusion_loss_and_grad_triton if impl == "triton" else diffusion_loss_and_grad_reference
    return function(
        prediction,
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        seed=seed,
        grad_scale=1.0,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        with_grad=False,
    )[0]


@_diffusion_loss_op.register_fake
def _(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=compute_dtype(prediction, x_0, sqrt_alpha_bar))


@torch.library.custom_op("fastddpm_kernels::diffusion_loss_backward", mutates_args=())
def _diffusion_loss_backward_op(
    upstream: Tensor,
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> Tensor:
    function = diffusion_loss_and_grad_triton if impl == "triton" else diffusion_loss_and_grad_reference
    return function(
        prediction,
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        seed=seed,
        grad_scale=upstream,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        with_losses=False,
    )[1]


@_diffusion_loss_backward_op.register_fake
def _(
    upstream: Tensor,
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> Tensor:
    return torch.empty(
        prediction.shape, dtype=prediction.dtype, device=prediction.device, memory_format=memory_format(prediction)
    )


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    prediction, t, ordinals, table, sigma_table, seed, target, x_0, flip, weights, impl = inputs
    ctx.save_for_backward(prediction, t, ordinals, table, sigma_table, x_0, flip, weights)
    ctx.settings = (seed, target, impl)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    prediction, t, ordinals, table, sigma_table, x_0, flip, weights = ctx.saved_tensors  # type: ignore[attr-defined]
    seed, target, impl = ctx.settings  # type: ignore[attr-defined]
    grad = _diffusion_loss_backward_op(
        upstream, prediction, t, ordinals, table, sigma_table, seed, target, x_0, flip, weights, impl
    )
    return grad, *[None] * 10


_diffusion_loss_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastddpm_kernels::diffusion_loss_and_grad", mutates_args=())
def _diffusion_loss_and_grad_op(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    grad_scale: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    function = diffusion_loss_and_grad_triton if impl == "triton" else diffusion_loss_and_grad_reference
    return function(
        prediction,
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        seed=seed,
        grad_scale=grad_scale,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
    )


@_diffusion_loss_and_grad_op.register_fake
def _(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    grad_scale: Tensor,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    losses = prediction.new_empty(prediction.shape[0], dtype=compute_dtype(prediction, x_0, sqrt_alpha_bar))
    grad = torch.empty(
        prediction.shape, dtype=prediction.dtype, device=prediction.device, memory_format=memory_format(prediction)
    )
    return losses, grad
