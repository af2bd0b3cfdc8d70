"""diffusion_loss: weights[n] mean((prediction - target)^2) per sample, the noise drawn again instead of stored.

Targets: eps (DDPM eq. 14), x_0, and v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, compute_dtype, memory_format, resolve_impl
from .noising import check_noise_arguments, eps_of, normalised

TARGETS = ("eps", "x_0", "v")


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
    """`diffusion_loss` as one Triton launch and a small sum."""
    raise NotImplementedError


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
    """`diffusion_loss_and_grad` as one Triton launch and a small sum."""
    raise NotImplementedError


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
