"""log p(x_0) of a diffusion model, exactly, through its probability-flow ODE (Song et al. 2021, appendix D).

In lambda, the logarithm of the signal-to-noise ratio, with alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda),
lambda_0 at the data end and lambda_1 at the noise end:

    dx/dlambda = (sigma^2 x - sigma eps_hat(x, t)) / 2
    log p(x at lambda_0) = log N(x at lambda_1; 0, I) + integral from lambda_0 to lambda_1 of div(dx/dlambda)

The network is trained at whole t and asked at fractional ones, where lambda(t) is linear between them. The data end is
t = 0, the first noise level: the model measured is the one that draws x_T from N(0, I) and follows the ODE to t = 0.
The noise end is T - 1, or where log SNR falls to -14, since below it nothing of the image is left (and schedules that
end in pure noise have no lambda there). x_0_hat is not clipped: the field has to be smooth.

The density of the model is that of real numbers, and pixels are 8-bit: each is spread over its bin, x_0 + (2 u - 1)/255
with u uniform in [0, 1) (dequantisation), so that by Jensen's inequality
-log2 P(x_0) <= -log2 p(x_0 + (2 u - 1)/255) + log2(255/2) per dimension, on average over u.

The divergence is Hutchinson's estimate v^T J v with Rademacher probes v, unbiased for the integral.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal, draw_uniform, stream_tag

from .bound import HALF_BIN, Network, images_to_floats
from .diffusion import ProcessConfig
from .errors import ConfigError
from .schedules import NoiseSchedule

LEAST_LOG_SNR = -14.0
"""Where the ODE ends if the schedule goes on: the share of the image left in x is e^-7."""
BITS_OF_BIN = -math.log2(2 * HALF_BIN)
"""log2(255 / 2), bits per dimension from a density over -1 .. 1 to the probability of an 8-bit level."""

# Of the classical method: how far into the step each slope is taken, along the one before, and its weight.
_RUNGE_KUTTA = ((0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6))
_NODES = 64  # of the path before a timestep of pure noise
# Layer of the stream's tag for dequantisation: the noise of the bound is at layer 0, its strata at 1.
_DEQUANTISE_TAG = stream_tag(Stream.BOUND, 2)


def dequantise(x_0: Tensor, images: Tensor, *, seed: int, dtype: torch.dtype) -> Tensor:
    """8-bit images spread over their bins: x_0 + (2 u - 1) / 255, u uniform and a function of (seed, image) alone.

    Args:
        x_0: uint8 [N, C, H, W].
        images: int64 [N] on the same device.

    Returns:
        [N, C, H, W] of the dtype, within -1 - 1/255 .. 1 + 1/255.
    """
    count, channels, height, width = x_0.shape
    u = draw_uniform(images, channels * height * width, seed=seed, stream=_DEQUANTISE_TAG).to(dtype)
    # In H, W, C order, as elements are counted everywhere.
    u = u.view(count, height, width, channels).permute(0, 3, 1, 2)
    return images_to_floats(x_0, dtype) + (2 * u - 1) * HALF_BIN


def draw_probes(images: Tensor, shape: tuple[int, int, int], num_probes: int, *, seed: int) -> Tensor:
    """Rademacher probes [num_probes, N, C, H, W], +1 or -1: float32, a function of (seed, image, probe) alone."""
    normals = [
        draw_normal(images, shape, seed=seed, stream=Stream.PROBE, step=probe, channels_last=True)
        for probe in range(num_probes)
    ]
    return torch.stack([torch.where(normal < 0, -1.0, 1.0) for normal in normals])


def ode_log_likelihood(
    config: ProcessConfig,
    schedule: NoiseSchedule,
    network: Network,
    x: Tensor,
    probes: Tensor,
    *,
    num_steps: int = 50,
) -> Tensor:
    """log p(x) of the model in nats, by the Runge-Kutta method of fourth order over equal steps of log SNR.

    With as many evaluations Heun's method is 30 times as far off (digits, 100: 0.015 to 0.0005 bits/dim).

    Args:
        config, schedule: the process; prediction and learned_range (whose variances the ODE has no use for) are read.
        network: in eval mode, called with float32 t; differentiable in x. Its parameters should need no gradients.
        x: [N, C, H, W] at the data end, dequantised; the ODE is solved in its dtype.
        probes: [P, N, C, H, W] of draw_probes; the trajectory is the same for all.
        num_steps: of the solver, four network evaluations each.

    Returns:
        [P, N] in the dtype of x: the log density by each probe.

    Raises:
        ConfigError: for fewer steps than 1, and for a schedule of one noise level.
    """
    if num_steps < 1:
        raise ConfigError(f"steps is {num_steps}: it must be at least 1")
    path = _path(schedule)
    grid = np.linspace(path[0][0], path[0][-1], num_steps + 1)
    probes = probes.to(x.dtype)
    total = torch.zeros(probes.shape[:2], dtype=x.dtype, device=x.device)
    for i in range(num_steps):
        step = grid[i + 1] - grid[i]
        increments: list[tuple[Tensor, Tensor]] = []
        for share, weight in _RUNGE_KUTTA:
            log_snr = grid[i] + share * step
            place = x + share * step * increments[-1][0] if increments else x
            slope, divergence = _field(config, network, place, probes, log_snr, _time(path, log_snr))
            increments.append((slope, divergence))
            total = total + weight * step * divergence
        x = x + sum(weight * step * slope for (_, weight), (slope, _) in zip(_RUNGE_KUTTA, increments, strict=True))
    log_normal = -0.5 * (x**2 + math.log(2 * math.pi)).flatten(1).sum(1)
    return log_normal + total


def _time(path: tuple[np.ndarray, np.ndarray], log_snr: float) -> float:
    nodes, times = path
    return float(np.interp(-log_snr, -nodes, times))  # np.interp wants what rises


def _path(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """log SNR, falling, and t of the nodes of the path: the timesteps, and what leads from the last of them to the end.

    Before a timestep of pure noise, whose log SNR is infinite, alpha falls to 0 linearly.
    """
    with np.errstate(divide="ignore"):
        log_snr = np.log(schedule.snr)
    above = np.flatnonzero(log_snr > LEAST_LOG_SNR)
    kept, times = log_snr[above], above.astype(np.float64)
    if 0 < len(above) < len(log_snr):
        last, beyond = kept[-1], log_snr[len(above)]
        more = np.array([LEAST_LOG_SNR])
        share = (last - more) / (last - beyond)
        if np.isinf(beyond):
            more = np.linspace(last, LEAST_LOG_SNR, _NODES + 1)[1:]
            share = 1 - np.sqrt((1 + np.exp(-last)) / (1 + np.exp(-more)))
        kept, times = np.append(kept, more), np.append(times, times[-1] + share)
    if len(kept) < 2:
        raise ConfigError(
            f"num_timesteps is {schedule.num_timesteps}: the probability-flow ODE needs two noise levels of a log SNR "
            f"above {LEAST_LOG_SNR}"
        )
    return kept, times


def _field(
    config: ProcessConfig, network: Network, x: Tensor, probes: Tensor, log_snr: float, t: float
) -> tuple[Tensor, Tensor]:
    """dx/dlambda [N, C, H, W] and the estimates [P, N] of its divergence."""
    alpha, sigma = (1 / math.sqrt(1 + math.exp(sign * log_snr)) for sign in (-1, 1))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        output = network(x, time).to(x.dtype)
        if config.variance == "learned_range":
            output = output.chunk(2, dim=1)[0]
        # sigma eps_hat, without a division by a sigma that is small
        noise = {
            "eps": lambda: sigma * output,
            "x_0": lambda: x - alpha * output,
            "v": lambda: alpha * sigma * output + sigma**2 * x,
        }[config.prediction]()
        slope = (sigma**2 * x - noise) / 2
        estimates = []
        for number, probe in enumerate(probes):
            (product,) = torch.autograd.grad((slope * probe).sum(), x, retain_graph=number + 1 < len(probes))
            estimates.append((product * probe).flatten(1).sum(1))
    return slope.detach(), torch.stack(estimates)
