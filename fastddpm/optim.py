"""Optimiser, learning rate and weight average; the last two are functions of the step, so resume needs no state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import EMAConfig, OptimConfig


def make_optimizer(
    config: OptimConfig, parameters: list[nn.Parameter], capturable: bool = False
) -> torch.optim.Optimizer:
    """Adam or AdamW over one group, fused where the device has it; capturable: fit for CUDA graphs."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    fused = parameters[0].device.type in ("cpu", "cuda", "xpu")
    return kind(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=fused,
        foreach=None if fused else True,
        capturable=capturable,
    )


def learning_rate(config: OptimConfig, step: int, horizon: int | None) -> float:
    """Learning rate of optimiser step `step` = 0, 1, ...: linear warm-up, then constant, linear or cosine to 0.

    Ho's recipe is a warm-up of 5000 steps, then constant. With accelerate a prepared scheduler would advance once per
    process; a function of the step cannot. Without a horizon there is no decay.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, step / horizon) if horizon else 0.0
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.decay]
    return config.lr * rise * fall


def ema_decay(config: EMAConfig, step: int) -> float:
    """Decay applied after optimiser step `step` = 0, 1, ...: min(decay, (1 + n) / (10 + n)) with n = step + 1."""
    n = step + 1
    return min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay


def as_line(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The memory of a dense tensor as one dimension; brought into the memory order of `like` first if it differs."""
    if like is not None and x.stride() != like.stride():
        x = torch.empty_like(like).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What clipping multiplies the gradient by: min(1, clip_norm / norm), the epsilon being torch's."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor], weights: Sequence[Tensor], weight: float | Tensor, applied: Tensor | None = None
) -> None:
    """average <- (1 - weight) * average + weight * weights, over all tensors in one pass, without a host sync.

    Args:
        weight: 1 - decay, as a number or a float32 scalar on the device; a number counts as rounded to float32.
        applied: bool scalar on the device; where it is False (a step that is skipped) nothing changes.
    """
    averages, weights = list(averages), list(weights)
    if applied is None and not isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, weights, weight)
        return
    # foreach_lerp takes no weight from the device: sub, mul and add instead are three passes, 32 bytes a parameter for
    # 12. torch's fused SGD does, and a flag besides: with decay -1 its gradient is weights - average, its rate -weight.
    # (Not `maximize`: the order in which torch negates and decays has changed.)
    rate = -weight if isinstance(weight, Tensor) else -torch.tensor(weight, dtype=torch.float32).item()
    torch._fused_sgd_(
        averages, weights, [], weight_decay=-1.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False, found_inf=None if applied is None else 1.0 - applied.float(),
    )  # fmt: skip
