"""The variational bound on -log p(x_0), term by term (Ho et al. 2020, DDPM, eq. 5; improved DDPM, section 3).

-log p(x_0) <= L_T + sum over t of L_t, in our index:
L_T = KL(q(x_T | x_0) || N(0, I));  L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t = 1 .. T-1, which is the
KL of two Gaussians of mean distance posterior_mean_coef1 (x_0 - x_0_hat);  L_0 = -log p(x_0 | x_1), where x_0 are 8-bit
images and p gives the integral of a Gaussian over each pixel's bin, the outermost bins open to infinity (section 3.3).
All are in nats per dimension here. Each L_t is an expectation over x_t, of which one draw is taken per image and
timestep: its noise is a function of (seed, number of the image, t), so that no figure depends on batches or processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal, philox_words, stream_tag

from .errors import ConfigError
from .schedules import NoiseSchedule

if TYPE_CHECKING:  # its losses are made of the terms here
    from .diffusion import ProcessConfig

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t float32 [N, C, H, W], t [N]) -> prediction [N, C, H, W], or [N, 2C, H, W] with learned variances."""

HALF_BIN = 1 / 255
"""Half the distance of two of the 256 levels that 8-bit pixels have in -1 .. 1."""

# Layer of the stream's tag at which timesteps within their strata are drawn; noise is at layer 0.
_STRATUM_TAG = stream_tag(Stream.BOUND, 1)


class Stratum(NamedTuple):
    """Consecutive timesteps of which each image takes one, which stands for all of them."""

    first: int
    size: int


def make_strata(num_timesteps: int, every: int = 1) -> tuple[Stratum, ...]:
    """t = 0 by itself, and 1 .. T-1 cut into strata of `every` timesteps, the last one of what is left.

    Raises:
        ConfigError: if `every` is not in 1 .. T-1 (1 .. 1 where T is 1).
    """
    most = max(1, num_timesteps - 1)
    if not 1 <= every <= most:
        raise ConfigError(f"every is {every}: it must be in 1 .. {most} (T - 1)")
    firsts = range(1, num_timesteps, every)
    return (Stratum(0, 1), *(Stratum(first, min(every, num_timesteps - first)) for first in firsts))


class Terms(NamedTuple):
    """One stratum's part of the bound of a batch."""

    stratum: Stratum
    t: Tensor
    """int64 [N] on the host: the timestep of each image."""
    values: Tensor
    """[N]: L_t of each image, in nats per dimension. Times stratum.size, what the stratum adds to the bound."""


@torch.no_grad()
def bound_terms(
    config: ProcessConfig,
    schedule: NoiseSchedule,
    network: Network,
    x_0: Tensor,
    images: Tensor,
    strata: Sequence[Stratum],
    *,
    seed: int,
    impl: str | None = None,
) -> Iterator[Terms]:
    """L_0 and the L_t of a batch of images, one network call per stratum; L_T is prior_term.

    With all timesteps (strata of size 1) their sum is one draw of the bound; with fewer its expectation is the same.

    Args:
        config, schedule: the process.
        network: in eval mode.
        x_0: uint8 [N, C, H, W] on the device.
        images: int64 [N] on the host, numbers of the images, 0 .. 2^32 - 1: addresses of their noise.
        strata: of make_strata, all or some.
        seed: of the noise.
        impl: as in fastddpm_kernels.

    Yields:
        Terms, on the device in float64 where it has that; nothing waits for it.
    """
    dtype = torch.float32 if x_0.device.type == "mps" else torch.float64
    clean = images_to_floats(x_0, dtype)
    channels, height, width = x_0.shape[1:]
    if not strata:
        return
    # All at once: a copy from the host waits for what the device is doing.
    drawn = torch.stack([draw_in_stratum(stratum, images, seed) for stratum in strata])
    all_t, all_ordinals = drawn.to(x_0.device), (drawn << 32 | images).to(x_0.device)
    for stratum, t, t_device, ordinals in zip(strata, drawn, all_t, all_ordinals, strict=True):
        # float32 as the network is trained on; its rounding is that of the point at which the term is taken.
        eps = draw_normal(
            ordinals, (channels, height, width), seed=seed, stream=Stream.BOUND, channels_last=True, impl=impl
        )
        signal = _at(schedule, "sqrt_alpha_bar", t_device, dtype)
        noise = _at(schedule, "sqrt_one_minus_alpha_bar", t_device, dtype)
        x_t = (signal * clean + noise * eps).float()
        prediction = network(x_t, t_device).to(dtype)
        yield Terms(stratum, t, vlb_term(config, schedule, clean, x_t, t_device, prediction))


def draw_in_stratum(stratum: Stratum, images: Tensor, seed: int) -> Tensor:
    """The timestep that each image takes of a stratum, uniform over it: int64 [N], as images (on the host)."""
    word, *_ = philox_words(seed, stratum.first, images & 0xFFFFFFFF, images >> 32, _STRATUM_TAG)
    return stratum.first + (word * stratum.size >> 32)


def vlb_term(
    config: ProcessConfig,
    schedule: NoiseSchedule,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction: Tensor,
    *,
    clip: bool | None = None,
) -> Tensor:
    """L_t of each sample in nats per dimension, for any prediction, variance and schedule.

    x_0_hat is clipped to clip_range if `clip` (the likelihood of DDPM and improved DDPM is that of the clipped model);
    dynamic thresholding, which depends on the image as a whole, is not applied. No call waits for the device.

    Args:
        config, schedule: the process.
        x_0: [N, C, H, W] in -1 .. 1, floating point, on the 256 levels 2 k / 255 - 1 of 8-bit pixels where t is 0;
            uint8 is taken as k.
        x_t: [N, C, H, W], floating point, of q(x_t | x_0).
        t: int64 [N], on the device.
        prediction: the network's output [N, C, H, W], or [N, 2C, H, W] with learned_range, whose last C channels are v.
        clip: config.clip if None; training on the bound takes False, since a clipped x_0_hat has no gradient.

    Returns:
        [N], float64 for a float64 prediction and float32 otherwise; differentiable in `prediction`, everywhere finite.
    """
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    x_0 = images_to_floats(x_0, dtype)
    x_t, prediction = x_t.to(dtype), prediction.to(dtype)
    log_variance = reverse_log_variance(config, schedule, t, prediction)
    if config.variance == "learned_range":
        prediction = prediction.chunk(2, dim=1)[0]
    x_0_hat = schedule.predict_x_0(x_t, t, prediction, config.prediction)
    if config.clip if clip is None else clip:
        x_0_hat = x_0_hat.clamp(-config.clip_range, config.clip_range)
    # x_t has the same coefficient in the means of q and p: their distance is had without its rounding.
    distance = _at(schedule, "posterior_mean_coef1", t, dtype) * (x_0 - x_0_hat)
    log_ratio = _at(schedule, "posterior_log_variance", t, dtype) - log_variance
    kl = 0.5 * (torch.expm1(log_ratio) - log_ratio + distance**2 * torch.exp(-log_variance))
    # At t = 0 the mean of p is x_0_hat: posterior_mean_coef1 is 1 and posterior_mean_coef2 0.
    first = (t == 0).view(-1, 1, 1, 1)
    # Elsewhere the decoder is computed too: of what has a finite value and gradient, or 0 times infinity is NaN.
    decoder = decoder_log_likelihood(x_0, torch.where(first, x_0_hat, x_0), torch.where(first, log_variance, 0.0))
    return _mean(torch.where(first, -decoder, kl))


def reverse_log_variance(config: ProcessConfig, schedule: NoiseSchedule, t: Tensor, output: Tensor) -> Tensor:
    """log variance of p(x_{t-1} | x_t), broadcasting against [N, C, H, W], in the dtype of `output`.

    That of NoiseSchedule.variance, its entry 0 replaced by the posterior variance of index 1; with learned_range
    frac log beta + (1 - frac) log posterior variance, frac = (v + 1) / 2 (improved DDPM, eq. 15), v the last half of
    the channels of the network's output [N, 2C, H, W].
    """
    low = _at(schedule, "posterior_log_variance", t, output.dtype)
    if config.variance == "fixed_small":
        return low
    high = _at(schedule, "beta", t, output.dtype).log()
    if config.variance == "fixed_large":
        return torch.where((t == 0).view(-1, 1, 1, 1), low, high)
    frac = (output.chunk(2, dim=1)[1] + 1) / 2
    return frac * high + (1 - frac) * low


def decoder_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the integral of N(mean, variance) over the bin of each x_0, elementwise (DDPM, eq. 13).

    Bins are x_0 +- 1/255; that of the lowest level begins at minus infinity and that of the highest ends at infinity.
    Its value and its gradient are finite wherever (x_0 - mean)^2 / variance is.
    """
    scale = torch.exp(-0.5 * log_variance)
    centred, half = (x_0 - mean) * scale, HALF_BIN * scale
    # Either tail mirrored to the left one, where the logarithm of the cumulative distribution is exact.
    below = -centred.abs()
    upper, lower = _log_ndtr(below + half), _log_ndtr(below - half)
    inside = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-torch.finfo(x_0.dtype).tiny)))
    lowest, highest = x_0 < -1 + HALF_BIN, x_0 > 1 - HALF_BIN
    inside = torch.where(lowest, _log_ndtr(centred + half), inside)
    return torch.where(highest, _log_ndtr(half - centred), inside)


def _log_ndtr(x: Tensor) -> Tensor:
    """log of the cumulative distribution of N(0, 1), with a gradient that is right far out.

    That of torch's own is exp(-(result + x^2 / 2)), which cancels: in fp32 it is 5 % off at x = -1e3 and 0 at -1e6.
    """
    far = x < -1
    y, near = torch.where(far, x, -1.0), torch.where(far, 0.0, x)
    return torch.where(far, torch.log(torch.special.erfcx(-y * 2**-0.5) / 2) - y * y / 2, torch.special.log_ndtr(near))


def prior_term(schedule: NoiseSchedule, x_0: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image in nats per dimension: [N] of the dtype.

    Args:
        x_0: [N, C, H, W], as for vlb_term.
    """
    alpha_bar = float(schedule.alpha_bar[-1])
    constant = -math.log1p(-alpha_bar) - alpha_bar
    return 0.5 * (alpha_bar * images_to_floats(x_0, dtype) ** 2 + constant).flatten(1).mean(1)


def _mean(x: Tensor) -> Tensor:
    """Means [N] of the elements by halving: additions alone, in an order that the size sets and the batch does not."""
    rows = x.flatten(1)
    size = rows.shape[1]
    while rows.shape[1] > 1:
        half = (rows.shape[1] + 1) // 2
        head, tail = rows[:, :half], rows[:, half:]
        rows = torch.cat((head[:, : tail.shape[1]] + tail, head[:, tail.shape[1] :]), 1)
    return rows[:, 0] / size


def images_to_floats(x_0: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in -1 .. 1 in the dtype: k / 127.5 - 1 of uint8 values k, anything else as it is."""
    return x_0.to(dtype) / 127.5 - 1 if x_0.dtype == torch.uint8 else x_0.to(dtype)


def _at(schedule: NoiseSchedule, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries t of a table, ready to multiply [N, C, H, W]."""
    return schedule.table(name, t.device, dtype)[t].view(-1, 1, 1, 1)
