"""diffusion_loss: weights[n] mean((prediction - target)^2) per sample, the noise drawn again instead of stored.

Targets: eps (DDPM eq. 14), x_0, and v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022).
huber = c takes 2 c (sqrt(d^2 + c^2) - c) in place of the square of an error d: d^2 near 0, 2 c |d| far from it
(pseudo-Huber, Charbonnier et al. 1997; Song and Dhariwal 2023 eq. 7).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import (
    check_images,
    check_no_gradient,
    check_per_sample,
    check_pixels,
    check_precision,
    compute_dtype,
    memory_format,
    resolve_impl,
)
from .loss_kernel import launch_diffusion_loss
from .noising import check_noise_arguments, eps_of, normalised
from .ops import Case, Kwargs, Op, example_flip, example_floats, example_images, example_schedule

TARGETS = ("eps", "x_0", "v")
LEAST_HUBER = 1e-6  # below it (d / c)^2 nears the end of fp32, and the error is 2 c |d| to the last bit long before


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
    huber: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Per-sample losses fp32 [N]: weights[n] times the mean over elements of (prediction - target)^2.

    prediction [N, C, H, W] floating point, any strides. t, ordinals, the tables, seed, x_0 and flip as `add_noise` was
    given them; x_0 and flip are needed by the targets "x_0" and "v" only. weights fp32 [N] or None (ones).
    huber: None, or the c > 0 of the pseudo-Huber error 2 c (sqrt(d^2 + c^2) - c) that then stands for d^2.
    Differentiable in prediction, once. A sample's loss does not depend on its batch. `diffusion_loss_and_grad` gives
    the gradient in the same pass over the data. Raises ValueError for arguments out of shape or dtype.
    """
    tables = (sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
    x_0, flip = _check(prediction, t, ordinals, *tables, seed, target, x_0, flip, weights, huber)
    impl = resolve_impl(impl, prediction.device)
    check_precision(impl, prediction, x_0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
    return _diffusion_loss_op(
        prediction, t, ordinals, *tables, None, seed, target, x_0, flip, weights, huber, True, impl
    )[0]


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
    huber: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss` and the gradient of grad_scale * losses.sum() with respect to prediction, in one pass.

    grad_scale: fp32 tensor with one element on prediction's device (read by the kernel: no synchronisation) or a
    float. The other arguments as for `diffusion_loss`. Returns losses fp32 [N] (not scaled) and grad in prediction's
    dtype and memory format: root the backward at the prediction with it, `torch.autograd.backward(prediction, grad)`.
    Neither result carries a gradient. Raises ValueError for arguments out of shape or dtype.
    """
    tables = (sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
    x_0, flip = _check(prediction, t, ordinals, *tables, seed, target, x_0, flip, weights, huber)
    impl = resolve_impl(impl, prediction.device)
    check_precision(impl, prediction, x_0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
    scale, prediction = _scale_tensor(grad_scale, prediction), prediction.detach()
    return _diffusion_loss_op(
        prediction, t, ordinals, *tables, scale, seed, target, x_0, flip, weights, huber, True, impl
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
    huber: float | None = None,
) -> Tensor:
    """`diffusion_loss` in plain torch, differentiable by autograd: what the ops' own gradients are tested against."""
    goal = _goal(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip)
    error = prediction.to(goal.dtype) - goal
    losses = (error.square() if huber is None else _pseudo_huber(error, huber)).mean(dim=(1, 2, 3))
    return losses if weights is None else losses * weights


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
    huber: float | None = None,
) -> Tensor:
    """The losses of `diffusion_loss` as one Triton launch and a small sum; carries no gradient of its own."""
    tables = (sqrt_alpha_bar, sqrt_one_minus_alpha_bar)
    return launch_diffusion_loss(
        prediction,
        t,
        ordinals,
        *tables,
        None,
        seed=seed,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        huber=huber,
    )[0]


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
    huber: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss_and_grad` in plain torch. Computes in float64 when an input is float64.

    The sum over a sample is a fixed tree of additions, so it is bitwise the same in any batch.
    """
    tables, scale = (sqrt_alpha_bar, sqrt_one_minus_alpha_bar), _scale_tensor(grad_scale, prediction)
    return _run_reference(
        prediction,
        t,
        ordinals,
        *tables,
        scale,
        seed=seed,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        huber=huber,
    )


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
    huber: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss_and_grad` as one Triton launch and a small sum."""
    tables, scale = (sqrt_alpha_bar, sqrt_one_minus_alpha_bar), _scale_tensor(grad_scale, prediction)
    return launch_diffusion_loss(
        prediction,
        t,
        ordinals,
        *tables,
        scale,
        seed=seed,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        huber=huber,
    )


def _scale_tensor(grad_scale: Tensor | float, prediction: Tensor) -> Tensor:
    """grad_scale as a tensor [1] on prediction's device; a float becomes a fill, not a copy from the host."""
    if not isinstance(grad_scale, Tensor):
        return torch.full((1,), grad_scale, dtype=compute_dtype(prediction), device=prediction.device)
    if grad_scale.numel() != 1 or grad_scale.device != prediction.device:
        raise ValueError(
            f"grad_scale must hold one element on {prediction.device}, got shape {tuple(grad_scale.shape)} "
            f"on {grad_scale.device}"
        )
    return grad_scale.detach().reshape(1)


def _run_reference(
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
    huber: float | None,
    with_losses: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `launch_diffusion_loss` computes, in plain torch."""
    goal = _goal(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, target, x_0, flip)
    work, num_samples = goal.dtype, prediction.shape[0]
    num_elements = max(1, prediction.shape[1:].numel())
    error = torch.sub(prediction.detach().to(work), goal, out=goal)
    weight = torch.ones((), dtype=work, device=goal.device) if weights is None else weights.to(work)
    losses, grad = error.new_empty(0), prediction.new_empty(0)
    if with_losses:
        values = error.square() if huber is None else _pseudo_huber(error, huber)
        losses = (_tree_sum(values) / num_elements * weight).reshape(num_samples)
    if grad_scale is not None:
        scale = weight * grad_scale.to(goal.device, work) * (2.0 / num_elements)
        if huber is not None:
            error = error / _stretch(error, huber)
        grad = error.mul_(scale.expand(num_samples)[:, None, None, None]).to(prediction.dtype)
    return losses, grad


def _goal(
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


def _stretch(error: Tensor, huber: float) -> Tensor:
    """sqrt(1 + (d / c)^2), by which the square's gradient 2 d is divided."""
    return (error / huber).square().add(1.0).sqrt()


def _pseudo_huber(error: Tensor, huber: float) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c), written as 2 d^2 / (1 + sqrt(1 + (d / c)^2)): no difference of two near numbers."""
    return 2.0 * error.square() / _stretch(error, huber).add(1.0)


def _tree_sum(values: Tensor) -> Tensor:
    """Sums [N] of values [N, C, H, W], by halving: additions alone, in an order that the size sets. Overwrites them."""
    rows = values.permute(0, 2, 3, 1).flatten(1)
    size = rows.shape[1]
    while size > 1:
        half = (size + 1) // 2
        rows[:, : size - half] += rows[:, half:size]
        size = half
    return rows.sum(1) if size == 0 else rows[:, 0]


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
    huber: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Validate; returns x_0 and flip, dropped where the target does not read them."""
    check_images("prediction", prediction)
    if not prediction.is_floating_point():
        raise ValueError(f"prediction must be floating point, got {prediction.dtype}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known: use one of {', '.join(TARGETS)}")
    if huber is not None and not (math.isfinite(huber) and huber >= LEAST_HUBER):
        raise ValueError(f"huber must be None or finite and at least {LEAST_HUBER}, got {huber}")
    check_noise_arguments(prediction, t, ordinals, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, flip, seed)
    check_no_gradient(weights=weights, x_0=x_0)
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
    check_pixels("x_0", x_0)
    return x_0, flip


@torch.library.custom_op("fastddpm_kernels::diffusion_loss", mutates_args=())
def _diffusion_loss_op(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    grad_scale: Tensor | None,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    huber: float | None,
    with_losses: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and the gradient; one that is not asked for (no losses, no grad_scale) is an empty tensor."""
    function = launch_diffusion_loss if impl == "triton" else _run_reference
    return function(
        prediction,
        t,
        ordinals,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        grad_scale,
        seed=seed,
        target=target,
        x_0=x_0,
        flip=flip,
        weights=weights,
        huber=huber,
        with_losses=with_losses,
    )


@_diffusion_loss_op.register_fake
def _(
    prediction: Tensor,
    t: Tensor,
    ordinals: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    grad_scale: Tensor | None,
    seed: int,
    target: str,
    x_0: Tensor | None,
    flip: Tensor | None,
    weights: Tensor | None,
    huber: float | None,
    with_losses: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if impl == "triton" else compute_dtype(prediction, x_0, sqrt_alpha_bar)
    losses = prediction.new_empty(prediction.shape[0] if with_losses else 0, dtype=dtype)
    if grad_scale is None:
        return losses, prediction.new_empty(0)
    grad = torch.empty(
        prediction.shape, dtype=prediction.dtype, device=prediction.device, memory_format=memory_format(prediction)
    )
    return losses, grad


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    prediction, t, ordinals, table, sigma_table, _, seed, target, x_0, flip, weights, huber, _, impl = inputs
    ctx.save_for_backward(prediction, t, ordinals, table, sigma_table, x_0, flip, weights)
    ctx.settings = (seed, target, huber, impl)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    prediction, t, ordinals, table, sigma_table, x_0, flip, weights = ctx.saved_tensors  # type: ignore[attr-defined]
    seed, target, huber, impl = ctx.settings  # type: ignore[attr-defined]
    if torch.is_grad_enabled():  # as under create_graph=True
        raise RuntimeError("diffusion_loss is differentiable once: a gradient of its gradient is not supported")
    tables = (table, sigma_table)
    _, grad = _diffusion_loss_op(
        prediction.detach(), t, ordinals, *tables, upstream, seed, target, x_0, flip, weights, huber, False, impl
    )
    return grad, *[None] * 13


_diffusion_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _example(case: Case) -> Kwargs:
    kwargs = {"prediction": example_floats(case, "prediction"), **example_schedule(case)}
    target, _, rest = case.variant.partition("-")
    kwargs["target"] = target
    if target != "eps":
        kwargs["x_0"] = example_floats(case, "x_0", torch.float32) if "float" in rest else example_images(case)
    if "flip" in rest:
        kwargs["flip"] = example_flip(case)
    if "weighted" in rest:
        kwargs["weights"] = (0.5 + torch.rand(case.shape[0], generator=case.generator("weights"))).to(case.device)
    if "huber" in rest:
        kwargs["huber"] = 0.3
    return kwargs


def _example_with_grad(case: Case) -> Kwargs:
    return {**_example(case), "grad_scale": torch.tensor(1.7, device=case.device)}


VARIANTS = ("eps", "v-flip-weighted", "x_0-float", "eps-huber", "v-flip-weighted-huber")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFUSION_LOSS = Op(
    "diffusion_loss", diffusion_loss, diffusion_loss_reference, diffusion_loss_triton, _example, VARIANTS, DTYPES
)
DIFFUSION_LOSS_AND_GRAD = Op(
    "diffusion_loss_and_grad",
    diffusion_loss_and_grad,
    diffusion_loss_and_grad_reference,
    diffusion_loss_and_grad_triton,
    _example_with_grad,
    VARIANTS,
    DTYPES,
)
