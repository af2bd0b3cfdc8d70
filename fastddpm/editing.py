"""Editing pictures with a trained network: inpainting, interpolation, starts from a picture, variations of one.

q(x_t | x_0) puts a picture into the chain at any step (DDPM, eq. 4), and reverse steps take it from there to another:
RePaint (Lugmayr et al. 2022, algorithm 1), SDEdit (Meng et al. 2022), latents between two pictures (DDPM, section 4.3;
DDIM, section 5.3). All noise has an address: edit n of a picture is the same whatever the batch it is made in.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal, stream_tag

from .errors import ConfigError
from .samplers import SAMPLERS, Sampler
from .schedules import check_choice

How = Literal["inversion", "noise"]
INTERPOLATIONS: tuple[str, ...] = get_args(How)

# Layers of Stream.RENOISE; the counter's step tells apart the draws of one layer.
_START, _KNOWN, _JUMP = range(3)

Callback = Callable[[int, int, Tensor], object]


def as_x_0(pictures: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Pictures as the network sees them: float32 [N, C, H, W] in -1 .. 1, channels_last.

    Args:
        pictures: an array uint8 [H, W, C] or [N, H, W, C], as they are decoded; or a tensor [C, H, W] or [N, C, H, W],
            uint8, or floating point and then taken as it is. uint8 becomes x / 127.5 - 1, which samplers.to_uint8
            gives back exactly.

    Raises:
        ConfigError: of another shape or dtype.
    """
    x = torch.tensor(pictures) if isinstance(pictures, np.ndarray) else pictures
    floats = x.is_floating_point() and isinstance(pictures, Tensor)
    if x.ndim not in (3, 4) or not (x.dtype == torch.uint8 or floats):
        raise ConfigError(
            f"a picture is {x.dtype} {list(x.shape)}: give an array uint8 [N, H, W, C] or a tensor [N, C, H, W], "
            "uint8 or float in -1 .. 1"
        )
    x = x if x.ndim == 4 else x[None]
    x = (x if isinstance(pictures, Tensor) else x.permute(0, 3, 1, 2)).to(device)
    x = x.to(torch.float32) if floats else x.to(torch.float32) / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def inpaint(
    sampler: Sampler,
    picture: np.ndarray | Tensor,
    mask: np.ndarray | Tensor,
    numbers: Tensor,
    *,
    resamples: int = 10,
    jump: int = 10,
    device: torch.device | str = "cpu",
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Paint the masked part of a picture anew and keep the rest (RePaint, algorithm 1).

    After each reverse step the known part is replaced by q(x_s | x_0) of the picture (eq. 8), so the network sees both
    parts at one noise level. They fit together only because each stretch of `jump` steps is gone `resamples` times,
    with q(x_t | x_s) leading back to its beginning: with resamples = 1 the paint hardly knows what it is to fit.
    It comes to p(unknown | known) with small steps, many resamples and fixed_large: of a Gaussian pixel of correlation
    0.95 with the known one, in 250 steps, the mean is off by 1.06 standard deviations with 1, by 0.07 with 10 (by 0.17
    with jump 10, which agrees over longer stretches instead), and the spread by 44 and 5 %.

    Args:
        sampler: ddpm or ddim; RePaint takes 250 steps.
        picture: one, or one for each number, as as_x_0 takes them.
        mask: bool or uint8, [H, W] or [N, H, W]; paint where it is True, or 128 and more (white).
        numbers: int64 [N], which edits: each number gives another painting, 0 .. 2^32 - 1.
        resamples: times that each stretch is gone, at least 1 (the paper's r).
        jump: steps of a stretch (the paper's j), fewer than the sampler has unless resamples is 1.
        class_labels: int64 [N], handed to the network.
        callback: called as callback(v, t, x) after network call v, which was at timestep t, with the state it led to.

    Returns:
        float32 [N, C, H, W]; where the mask is False exactly the picture.

    Raises:
        ConfigError: a sampler with a history, a mask of another size, all or none of the picture, resamples or jump
            below 1, resampling with a jump that does not fit into the steps.
    """
    _check_to_image(sampler)
    walk = repaint_walk(len(sampler.timesteps), jump, resamples)
    x_0, numbers = _for_each(picture, numbers, device)
    unknown = _mask(mask, x_0)
    alpha_bar = [*sampler.table.alpha_bar.tolist(), 1.0]
    labels = None if class_labels is None else class_labels.to(device)
    noisy = _draws_noise(sampler)
    x, x_0_hat = _normal(sampler, numbers, x_0, Stream.X_T), None
    v = 0
    for here, there in pairwise(walk):
        if there > here:
            # Of call v and not of step `here`: a step taken again has fresh noise. In a first descent they agree.
            z = _normal(sampler, numbers, x_0, Stream.Z, v) if noisy else None
            # The sampler checks classes that are on the CPU: once is enough.
            x, x_0_hat = sampler.step(
                here, x, numbers, z=z, class_labels=labels if v else class_labels, x_0_hat=x_0_hat
            )
            known = x_0
            if there < len(alpha_bar) - 1:
                known = _noised(x_0, alpha_bar[there], _normal(sampler, numbers, x_0, _layer(_KNOWN), v))
            x = torch.where(unknown, x, known)
            if callback is not None:
                callback(v, int(sampler.timesteps[here]), x)
            v += 1
        else:
            ratio = alpha_bar[there] / alpha_bar[here]
            x = _noised(x, ratio, _normal(sampler, numbers, x_0, _layer(_JUMP), v))
    return x


def repaint_walk(num_steps: int, jump: int, resamples: int) -> list[int]:
    """The states that inpainting goes through, from 0 (x_T) to num_steps (x_0): one up is a reverse step, else a jump.

    As in the paper's code, stretches end where a multiple of `jump` steps of noise and one more are left: x_0 itself
    is never noised again.

    Raises:
        ConfigError: resamples or jump below 1, or resampling with a jump that does not fit into the steps.
    """
    for name, value in (("resamples", resamples), ("jump", jump)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    if resamples > 1 and jump >= num_steps:
        raise ConfigError(f"jump is {jump}: to resample, it must be below the number of steps ({num_steps})")
    left = {num_steps - 1 - t: resamples - 1 for t in range(0, num_steps - jump, jump)}
    walk = [0]
    while walk[-1] < num_steps:
        walk.append(walk[-1] + 1)
        if left.get(walk[-1]):
            left[walk[-1]] -= 1
            walk.append(walk[-1] - jump)
    return walk


@torch.no_grad()
def start_from(
    sampler: Sampler,
    picture: np.ndarray | Tensor,
    strength: float,
    numbers: Tensor,
    *,
    device: torch.device | str = "cpu",
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Noise a picture to a share of the way to x_T and sample from there (SDEdit): a sketch becomes a picture.

    Args:
        sampler: any.
        picture: one, or one for each number, as as_x_0 takes them.
        strength: in (0, 1], see start_step; 1 keeps nothing of the picture: it is Sampler.sample.
        numbers: int64 [N], which edits, 0 .. 2^32 - 1.
        class_labels, callback: as Sampler.sample takes them.

    Returns:
        float32 [N, C, H, W].

    Raises:
        ConfigError: a strength out of range; what Sampler.sample raises.
    """
    first = start_step(sampler, strength)
    x_0, numbers = _for_each(picture, numbers, device)
    x_t = None if strength == 1 else _started(sampler, x_0, first, numbers)
    return sampler.sample(
        numbers,
        _shape(x_0),
        device,
        x_T=x_t,
        first_step=first,
        class_labels=class_labels,
        callback=callback,
    )


def start_step(sampler: Sampler, strength: float) -> int:
    """Number of the sampler's step to begin with: the one whose timestep is nearest to that share of the first one's.

    Timestep t has t + 1 steps of noise: of 1000 timesteps in 10 steps (999, 899, .. 99), 0.5 begins at 499.

    Raises:
        ConfigError: unless strength is in (0, 1]; ddim_inverse.
    """
    _check_to_image(sampler)
    if not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength}: it must be above 0 and at most 1 (all noise)")
    # A step may have several evaluations, of which the first is to be the beginning.
    noise_steps = sampler.timesteps[:: sampler.table.evaluations] + 1
    return int(np.abs(noise_steps - strength * noise_steps[0]).argmin()) * sampler.table.evaluations


def variations(
    sampler: Sampler,
    picture: np.ndarray | Tensor,
    num: int,
    strength: float,
    *,
    device: torch.device | str = "cpu",
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """`num` pictures like one: start_from with the numbers 0 .. num - 1. float32 [num, C, H, W].

    Raises:
        ConfigError: num below 1; what start_from raises.
    """
    if num < 1:
        raise ConfigError(f"the number of variations is {num}: it must be at least 1")
    numbers = torch.arange(num)
    return start_from(sampler, picture, strength, numbers, device=device, class_labels=class_labels, callback=callback)


@torch.no_grad()
def interpolate(
    sampler: Sampler,
    a: np.ndarray | Tensor,
    b: np.ndarray | Tensor,
    frames: int,
    *,
    how: str = "inversion",
    strength: float = 0.5,
    refine: int = 5,
    number: int = 0,
    class_label: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Pictures on a way from a to b: latents of both, states between them, and the sampler from there, in one batch.

    Returns:
        float32 [frames, C, H, W]. Arguments, ends and errors are those of Interpolation, which makes frames in parts.
    """
    way = Interpolation(
        sampler, a, b, how=how, strength=strength, refine=refine, number=number, class_label=class_label, device=device
    )
    return way.frames(way.weights(frames))


class Interpolation:
    """The way from a to b through the latents; a frame is a function of its weight alone, whatever its batch."""

    @torch.no_grad()
    def __init__(
        self,
        sampler: Sampler,
        a: np.ndarray | Tensor,
        b: np.ndarray | Tensor,
        *,
        how: str = "inversion",
        strength: float = 0.5,
        refine: int = 5,
        number: int = 0,
        class_label: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Find the latents of both pictures.

        Args:
            sampler: for inversion deterministic (ddim with eta 0); for noise any.
            a, b: one picture each, as as_x_0 takes them.
            how: inversion: x_T of both by DDIM run backwards, and slerp between them, which keeps their norm (DDIM,
                section 5.3); the ends are a and b again. noise: both noised to `strength` by the same eps, and a line
                between them (DDPM, section 4.3); the frames share their noise, and the ends are only like a and b.
            strength: of noise, see start_step.
            refine: rounds of the inversion of each step, see invert.
            number: image number of the noise.
            class_label: handed to the network for every frame.

        Raises:
            ConfigError: pictures of two sizes, a value out of range, a sampler that cannot be inverted.
        """
        check_choice("how", how, INTERPOLATIONS)
        ends = [as_x_0(picture, device) for picture in (a, b)]
        for end in ends:
            if len(end) != 1 or end.shape != ends[0].shape:
                raise ConfigError(
                    f"the pictures are {list(ends[0].shape)} and {list(ends[1].shape)}: valid are two of one size"
                )
        self.sampler, self.how, self.number, self.class_label = sampler, how, number, class_label
        x_0 = torch.cat(ends)
        numbers = self._numbers(2, x_0)
        if how == "inversion":
            self.first_step = 0
            self.latents = invert(sampler, x_0, numbers, refine=refine, class_labels=self._labels(2, x_0))
        else:
            self.first_step = start_step(sampler, strength)
            self.latents = _started(sampler, x_0, self.first_step, numbers)

    @staticmethod
    def weights(frames: int) -> Tensor:
        """Weights float64 [frames] of b, evenly from 0 to 1. Raises ConfigError unless there are at least 2."""
        if frames < 2:
            raise ConfigError(f"frames is {frames}: it must be at least 2, the two pictures themselves")
        return torch.linspace(0, 1, frames, dtype=torch.float64)

    @torch.no_grad()
    def frames(self, weights: Tensor, callback: Callback | None = None) -> Tensor:
        """The pictures at `weights` of b, float [F] in 0 .. 1, as one batch float32 [F, C, H, W]."""
        between = slerp if self.how == "inversion" else lerp
        states = between(self.latents[0], self.latents[1], weights.to(self.latents.device))
        return self.sampler.sample(
            self._numbers(len(weights), states),
            _shape(states),
            states.device,
            x_T=states,
            first_step=self.first_step,
            class_labels=self._labels(len(weights), states),
            callback=callback,
        )

    def _numbers(self, count: int, like: Tensor) -> Tensor:
        """All frames have one image number, and so the same noise: they differ in where they start alone."""
        return torch.full((count,), self.number, dtype=torch.int64, device=like.device)

    def _labels(self, count: int, like: Tensor) -> Tensor | None:
        if self.class_label is None:
            return None
        return torch.full((count,), self.class_label, dtype=torch.int64, device=like.device)


@torch.no_grad()
def invert(
    sampler: Sampler,
    x_0: Tensor,
    numbers: Tensor,
    *,
    refine: int = 5,
    class_labels: Tensor | None = None,
) -> Tensor:
    """The x_T from which a deterministic sampler gives x_0, float32 [N, C, H, W]: DDIM backwards (DDIM, section 5.4).

    A step takes x_t to x_s = cos(delta) x_t - sin(delta) v_hat(x_t, t), cos(delta) = sqrt(alpha_bar_s alpha_bar_t) +
    sqrt((1 - alpha_bar_s) (1 - alpha_bar_t)). Backwards x_t is the unknown: x_t <- x_t + (x_s - step(x_t)) / cos(delta)
    from x_t = x_s. Its first round is the usual inversion to first order (the sampler ddim_inverse), with what the
    network says of x_s; each further one multiplies what is left by tan(delta) d v_hat / d x, less than 1 for the exact
    prediction of Gaussian data that vary less than the noise. Where x_0_hat is clipped any x_t beyond the limit serves.

    Args:
        sampler: ddim with eta 0, the one that is to lead back.
        x_0: float32 [N, C, H, W].
        numbers: int64 [N], as Sampler.step takes them (no noise is drawn).
        refine: rounds, at least 1: network evaluations per step.
        class_labels: int64 [N], handed to the network.

    Raises:
        ConfigError: a sampler with noise, with a history or of one step; a self-conditioned network, whose estimate
            comes from the step that is yet to be found; refine below 1.
    """
    _check_to_image(sampler)
    if refine < 1:
        raise ConfigError(f"refine is {refine}: it must be at least 1")
    if _draws_noise(sampler):
        raise ConfigError(f"{sampler.sampler} draws noise and cannot be run backwards: take ddim with eta 0")
    if sampler.self_conditioning:
        raise ConfigError("a self-conditioned network cannot be run backwards: interpolate in noise (--how noise)")
    if len(sampler.timesteps) < 2:
        raise ConfigError("the sampler has 1 step: to run it backwards takes at least 2")
    alpha_bar = [*sampler.table.alpha_bar.tolist(), 1.0]
    x = x_0
    for i in reversed(range(len(sampler.timesteps))):
        target = x
        a_t, a_s = alpha_bar[i], alpha_bar[i + 1]
        cos_delta = math.sqrt(a_s * a_t) + math.sqrt((1 - a_s) * (1 - a_t))
        for _ in range(refine):
            x = x + (target - sampler.step(i, x, numbers, class_labels=class_labels).x_next) / cos_delta
    return x


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of a and b, float32 [C, H, W], at weights [F]: [F, C, H, W] (DDIM, eq. 67).

    (sin((1 - w) theta) a + sin(w theta) b) / sin(theta), theta the angle between a and b: of two vectors of one norm,
    all between have it too. A line's middle has 0.7 of it where they are perpendicular, which draws of x_T nearly are.
    Where they are parallel it is a line. At 0 and 1 it is a and b exactly.
    """
    p, q = a.double().flatten(), b.double().flatten()
    cosine = (p @ q / (p.norm() * q.norm()).clamp_min(1e-300)).clamp(-1, 1)
    theta = torch.acos(cosine)
    w = weights.double()
    sine = torch.sin(theta)
    flat = sine < 1e-7
    sine = torch.where(flat, torch.ones_like(sine), sine)
    of_a = torch.where(flat, 1 - w, torch.sin((1 - w) * theta) / sine)
    of_b = torch.where(flat, w, torch.sin(w * theta) / sine)
    return _combined(a, b, of_a, of_b)


def lerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """(1 - w) a + w b of a and b, float32 [C, H, W], at weights [F]: [F, C, H, W]."""
    w = weights.double()
    return _combined(a, b, 1 - w, w)


def _combined(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    of_a, of_b = (w.to(torch.float32)[:, None, None, None] for w in (of_a, of_b))
    return (of_a * a + of_b * b).contiguous(memory_format=torch.channels_last)


def _started(sampler: Sampler, x_0: Tensor, first_step: int, numbers: Tensor) -> Tensor:
    """q(x_t | x_0) at the level of a step, by the noise of `numbers`."""
    # Where churn raises the level of a step, it does so at the end of the one before, which is left out.
    level = sampler.table.alpha_bar[max(first_step - sampler.table.evaluations + 1, 0)]
    return _noised(x_0, float(level), _normal(sampler, numbers, x_0, _layer(_START), 0))


def _noised(x: Tensor, ratio: float, eps: Tensor) -> Tensor:
    """q(x_t | x_s): sqrt(ratio) x + sqrt(1 - ratio) eps, ratio = alpha_bar_t / alpha_bar_s (1 at x_0)."""
    return math.sqrt(ratio) * x + math.sqrt(1 - ratio) * eps


def _draws_noise(sampler: Sampler) -> bool:
    return bool(sampler.table.column("F").any())


def _check_to_image(sampler: Sampler) -> None:
    if not SAMPLERS[sampler.sampler].to_image:
        raise ConfigError(f"sampler {sampler.sampler} leads from images to noise: edit with one that leads to images")


def _layer(layer: int) -> int:
    return stream_tag(Stream.RENOISE, layer)


def _normal(sampler: Sampler, numbers: Tensor, like: Tensor, stream: int, step: int | None = None) -> Tensor:
    """Normals float32 [N, C, H, W] at the address (sampler's seed, stream, number, step)."""
    return draw_normal(
        numbers,
        _shape(like),
        seed=sampler.seed,
        stream=stream,
        step=step,
        channels_last=True,
        impl=sampler.impl,
    )


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[1], x.shape[2], x.shape[3]


def _for_each(picture: np.ndarray | Tensor, numbers: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """x_0 [N, C, H, W] of one picture or of N, and the numbers, on the device."""
    x_0 = as_x_0(picture, device)
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype != torch.int64:
        raise ConfigError(f"numbers is {numbers.dtype} {list(numbers.shape)}: give int64 numbers [N], at least one")
    if numbers.device.type == "cpu" and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**32:
        raise ConfigError("numbers must be in 0 .. 2^32 - 1")
    if len(x_0) not in (1, len(numbers)):
        raise ConfigError(
            f"there are {len(x_0)} pictures and {len(numbers)} numbers: give one picture, or one for each"
        )
    return x_0.expand(len(numbers), *x_0.shape[1:]), numbers.to(device)


def _mask(mask: np.ndarray | Tensor, x_0: Tensor) -> Tensor:
    """bool [N or 1, 1, H, W] on x_0's device: where to paint."""
    m = torch.tensor(mask) if isinstance(mask, np.ndarray) else mask
    if m.dtype not in (torch.bool, torch.uint8) or m.ndim not in (2, 3):
        raise ConfigError(f"the mask is {m.dtype} {list(m.shape)}: give bool or uint8 [H, W]")
    m = (m if m.dtype == torch.bool else m >= 128).reshape(-1, *m.shape[-2:])
    if m.shape[1:] != x_0.shape[2:] or len(m) not in (1, len(x_0)):
        raise ConfigError(
            f"the mask is {m.shape[2]}x{m.shape[1]} pixels (width x height), the picture "
            f"{x_0.shape[3]}x{x_0.shape[2]}: they must be of one size"
        )
    if not m.flatten(1).any(1).all():
        raise ConfigError("the mask is black: there is nothing to paint (white is painted, black is kept)")
    if m.flatten(1).all(1).any():
        raise ConfigError("the mask is white: nothing of the picture is kept; to paint all of it, sample")
    return m[:, None].to(x_0.device)
