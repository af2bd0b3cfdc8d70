"""Optimiser, learning rate and weight average; the last two are functions of the step, so resume needs no state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import EMAConfig, OptimConfig


def make_optimizer(config: OptimConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam or AdamW over one group, fused where the device has it."""
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
    )


def learning_rate(config: OptimConfig, step: int, horizon: int) -> float:
    """Learning rate of optimiser step `step` = 0, 1, ...: linear warm-up, then constant, linear or cosine to 0.

    Ho's recipe is a warm-up of 5000 steps, then constant. With accelerate a prepared scheduler would advance once per
    process; a function of the step cannot.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, step / horizon)
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.decay]
    return config.lr * rise * fall


def ema_decay(config: EMAConfig, step: int) -> float:
    """Decay applied after optimiser step `step` = 0, 1, ...: min(decay, (1 + n) / (10 + n)) with n = step + 1."""
    n = step + 1
    return min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, applied: Tensor | None = None
) -> None:
    """average <- decay * average + (1 - decay) * weight, over all tensors in a few kernels, without a host sync.

    Args:
        applied: bool scalar on the device; where it is False (fp16's loss scale skipped the step) nothing changes.
    """
    if applied is None:
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)
        return
    change = torch._foreach_sub(list(weights), list(averages))
    torch._foreach_mul_(change, torch.where(applied, 1.0 - decay, 0.0))
    torch._foreach_add_(list(averages), change)
