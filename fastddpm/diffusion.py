"""The training process and its config, and both as diffusers' scheduler_config.json (Ho et al. 2020, DDPM).

Algorithm 1: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; the loss is mean (prediction - target)^2.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fastddpm_kernels import STREAM_VERSION, add_noise, diffusion_loss, diffusion_loss_and_grad, draw_timesteps

from .errors import ConfigError
from .schedules import (
    PREDICTIONS,
    SCHEDULES,
    VARIANCES,
    Array,
    NoiseSchedule,
    Prediction,
    Variance,
    check_choice,
    check_timesteps,
    cosine,
)

__all__ = [
    "PREDICTIONS",
    "SCHEDULES",
    "SPACINGS",
    "STREAM_VERSION",
    "VARIANCES",
    "NoiseSchedule",
    "Noised",
    "ProcessConfig",
    "TrainingProcess",
    "check_seed",
    "from_diffusers_scheduler",
    "to_diffusers_scheduler",
]

if TYPE_CHECKING:
    ScheduleName = str
else:  # the choices of --help are the table's names, written once
    ScheduleName = Literal[tuple(SCHEDULES)]

LossName = Literal["simple", "min_snr", "p2", "vlb", "hybrid"]
TimestepSampling = Literal["uniform", "stratified", "loss_aware"]
Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


class Noised(NamedTuple):
    """What the network is trained on: x_t [N, C, H, W], timesteps t int64 [N], flip bool [N] (None: no flips)."""

    x_t: Tensor
    t: Tensor
    flip: Tensor | None


class TrainingProcess:
    """Noising and loss of the training step (DDPM, algorithm 1), as two kernel launches and a small one.

    Timestep, flip and eps of a sample are functions of (seed, ordinal) alone, so nothing is stored between noise and
    loss but t and flip, and nothing depends on batch, rank or restart. No call waits for the device.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        seed: int = 0,
        flip: bool = False,
        impl: str | None = None,
    ) -> None:
        """
        Args:
            schedule: the forward process.
            prediction: what the network predicts, one of PREDICTIONS.
            seed: the run's seed, 0 .. 2^63 - 1.
            flip: mirror each image left-right with probability 1/2.
            impl: "triton", "reference" or None (by device), as in fastddpm_kernels.

        Raises:
            ConfigError: if `prediction` is unknown or the seed out of range.
        """
        check_choice("prediction", prediction, PREDICTIONS)
        check_seed(seed)
        self.schedule, self.prediction, self.seed, self.flip, self.impl = schedule, prediction, seed, flip, impl

    def noise(self, x_0: Tensor, ordinals: Tensor, dtype: torch.dtype = torch.float32) -> Noised:
        """Draw t, flips and eps and make x_t.

        Args:
            x_0: [N, C, H, W] uint8 (taken as x/127.5 - 1) or float (taken as it is), contiguous or channels_last.
            ordinals: int64 [N] on x_0's device: position of each image in the run's sequence of images.
            dtype: of x_t; it is computed in float32.

        Returns:
            x_t in x_0's memory format, t and flip. No gradient flows.
        """
        t, coin = self._drawn(ordinals)
        flip = coin if self.flip else None
        x_t = add_noise(x_0, t, ordinals, *self._tables(x_0), seed=self.seed, flip=flip, dtype=dtype, impl=self.impl)
        return Noised(x_t, t, flip)

    def timesteps(self, ordinals: Tensor) -> Tensor:
        """t int64 [N] of the images at `ordinals` int64 [N], as noise draws it."""
        return self._drawn(ordinals)[0]

    def _drawn(self, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        t, coin = draw_timesteps(ordinals, self.schedule.num_timesteps, seed=self.seed, impl=self.impl)
        return t, coin

    def loss(self, prediction: Tensor, noised: Noised, ordinals: Tensor, x_0: Tensor | None = None) -> Tensor:
        """Mean squared error of each sample, float32 [N]; differentiable in `prediction` only.

        Args:
            prediction: network output [N, C, H, W] for noised.x_t at noised.t.
            noised, ordinals: what noise returned, and was given.
            x_0: what noise was given; needed unless eps is predicted.
        """
        return diffusion_loss(prediction, noised.t, ordinals, *self._tables(prediction), **self._target(noised, x_0))

    def loss_and_grad(
        self, prediction: Tensor, noised: Noised, ordinals: Tensor, x_0: Tensor | None, grad_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in one pass over the prediction.

        Args:
            grad_scale: factor of the gradient: 1/N for the mean of a batch of N, times the loss scale of fp16; a
                float32 scalar tensor on the device is read there. The rest as for loss.

        Returns:
            losses float32 [N]; the gradient of grad_scale * losses.sum() in the prediction's dtype and memory format,
            for torch.autograd.backward(prediction, gradient).
        """
        return diffusion_loss_and_grad(
            prediction,
            noised.t,
            ordinals,
            *self._tables(prediction),
            grad_scale=grad_scale,
            **self._target(noised, x_0),
        )

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        table = self.schedule.table
        return table("sqrt_alpha_bar", like.device), table("sqrt_one_minus_alpha_bar", like.device)

    def _target(self, noised: Noised, x_0: Tensor | None) -> dict[str, Any]:
        return {"seed": self.seed, "target": self.prediction, "x_0": x_0, "flip": noised.flip, "impl": self.impl}


def check_seed(seed: int) -> None:
    """Raise a ConfigError unless the seed fits Philox's key without its sign bit."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}: it must be in 0 .. 2^63 - 1")


@dataclass(frozen=True)
class ProcessConfig:
    """The forward process and what the network predicts (Ho's recipe by default)."""

    schedule: ScheduleName = "linear"
    """Noise schedule: linear (Ho), cosine (improved DDPM) or sigmoid (GeoDiff: betas along a logistic curve)."""
    num_timesteps: int = 1000
    """Timesteps T of the forward process."""
    beta_start: float = 1e-4
    """First beta at T = 1000 (linear, sigmoid); multiplied by 1000 / T."""
    beta_end: float = 0.02
    """Last beta at T = 1000 (linear, sigmoid); multiplied by 1000 / T."""
    betas: tuple[float, ...] | None = None
    """All T betas, in place of those of the schedule; None computes them."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise eps, the image x_0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    variance: Variance = "fixed_large"
    """Variance of a reverse step: fixed_large (beta; for all T steps) or fixed_small (posterior; for fewer)."""
    clip: bool = True
    """Clip the predicted x_0 to -clip_range .. clip_range in every reverse step."""
    clip_range: float = 1.0
    """Limit of the predicted x_0; images are in -1 .. 1."""
    spacing: Spacing = "trailing"
    """Which timesteps are kept when sampling takes fewer than T: trailing starts at T - 1, leading ends at 0."""
    zero_terminal_snr: bool = False
    (
        "Rescale the schedule so that x_T is pure noise (Lin et al. 2024, algorithm 1); needs prediction v or x_0, "
        "since from pure noise eps says nothing about x_0."
    )
    dynamic_threshold: float | None = None
    (
        "Clip x_0 to this quantile of its absolute values, at least clip_range, and scale it back to clip_range "
        "(Imagen's dynamic thresholding, e.g. 0.995); None clips to clip_range itself."
    )
    loss: LossName = "simple"
    (
        "simple (DDPM eq. 14), min_snr (Hang et al. 2023), p2 (Choi et al. 2022), vlb (the bound itself, eq. 5) or "
        "hybrid (simple plus vlb_weight x vlb, for learned_range; improved DDPM, eq. 16)."
    )
    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio above which min_snr stops weighting timesteps up."""
    p2_gamma: float = 1.0
    """Exponent of p2's weight 1 / (p2_k + snr)^p2_gamma on the error of eps."""
    p2_k: float = 1.0
    """Constant in p2's weight."""
    vlb_weight: float = 1e-3
    """Weight of the bound in hybrid (improved DDPM's lambda)."""
    huber: float | None = None
    """Pseudo-Huber loss with this threshold on each element's error, in place of its square; None: the square."""
    offset_noise: float = 0.0
    """Standard deviation of noise that is added to eps, the same in all pixels of a channel (0.1 is usual)."""
    timesteps: TimestepSampling = "uniform"
    (
        "How t is drawn: uniform; stratified (each batch covers 0 .. T-1 evenly); loss_aware (in proportion to the root "
        "mean square of past losses, weighted back; improved DDPM, eq. 18)."
    )
    label_dropout: float = 0.0
    """Share of training images whose class is hidden, for classifier-free guidance (0.1 is usual; Ho & Salimans)."""
    self_conditioning: bool = False
    """Give the network its last estimate of x_0 as further input channels (Chen et al. 2022)."""

    def check(self) -> None:
        """Raise a ConfigError naming the field, its value and what is valid, unless all of them are."""
        check_choice("diffusion.schedule", self.schedule, list(SCHEDULES))
        check_choice("diffusion.prediction", self.prediction, PREDICTIONS)
        check_choice("diffusion.variance", self.variance, VARIANCES)
        check_choice("diffusion.spacing", self.spacing, SPACINGS)
        if not self.clip_range > 0:
            raise ConfigError(f"diffusion.clip_range is {self.clip_range}: it must be above 0")
        self._schedule()

    def noise_schedule(self) -> NoiseSchedule:
        """The tables of this process.

        Raises:
            ConfigError: if a field of the process is wrong (see check).
        """
        self.check()
        return self._schedule()

    def _schedule(self) -> NoiseSchedule:
        if self.betas is not None:
            if len(self.betas) != self.num_timesteps:
                raise ConfigError(
                    f"diffusion.betas has {len(self.betas)} entries and diffusion.num_timesteps is "
                    f"{self.num_timesteps}: they must agree"
                )
            return NoiseSchedule(self.betas)
        taken = inspect.signature(SCHEDULES[self.schedule]).parameters
        options = {name: getattr(self, name) for name in ("beta_start", "beta_end") if name in taken}
        return NoiseSchedule.from_name(self.schedule, self.num_timesteps, **options)


_DIFFUSERS_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_OUR_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_DIFFUSERS_VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}


def _diffusers_betas(name: str, num_timesteps: int, beta_start: float, beta_end: float) -> Array:
    """The betas that diffusers' DDPMScheduler computes, in float64 (it uses float32) and without scaling by T."""
    if name == "linear":
        return np.linspace(beta_start, beta_end, num_timesteps)
    if name == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    if name == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    if name == "squaredcos_cap_v2":
        return cosine(num_timesteps)
    raise ConfigError(
        f"beta_schedule {name!r} of the scheduler's config is not supported: "
        "supported are linear, scaled_linear, squaredcos_cap_v2, sigmoid and trained_betas"
    )


def _same(a: Array, b: Array) -> bool:
    """Equal but for the rounding of float64."""
    return np.allclose(a, b, rtol=1e-12, atol=0)


def to_diffusers_scheduler(process: ProcessConfig) -> dict[str, Any]:
    """scheduler_config.json, without the version of diffusers, of a DDPMScheduler that takes our ancestral steps.

    Betas which DDPMScheduler does not compute itself are written as trained_betas. With all T steps its images are
    ours; with fewer, trailing ones it takes its last step at some t > 0 and with fixed_large adds noise to the result,
    which our samplers never do.

    Raises:
        ConfigError: if the process is not valid.
    """
    beta = process.noise_schedule().beta
    num_timesteps = len(beta)
    name = next((theirs for theirs, ours in _OUR_SCHEDULES.items() if ours == process.schedule), None)
    start, end = process.beta_start * 1000 / num_timesteps, process.beta_end * 1000 / num_timesteps
    computed = name is not None and _same(_diffusers_betas(name, num_timesteps, start, end), beta)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": num_timesteps,
        "beta_schedule": name if computed else "linear",
        "beta_start": start if computed else float(beta[0]),
        "beta_end": end if computed else float(beta[-1]),
        "trained_betas": None if computed else beta.tolist(),
        "prediction_type": _DIFFUSERS_PREDICTIONS[process.prediction],
        "variance_type": process.variance,
        "clip_sample": process.clip,
        "clip_sample_range": process.clip_range,
        "timestep_spacing": process.spacing,
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    }


def from_diffusers_scheduler(facts: Mapping[str, Any]) -> tuple[ProcessConfig, NoiseSchedule]:
    """The process of a DDPMScheduler's or DDIMScheduler's config; the inverse of to_diffusers_scheduler.

    Missing keys get diffusers' defaults; keys it no longer reads are passed over. Betas are computed in float64.

    Raises:
        ConfigError: naming a class, schedule, variance or option that is not supported.
    """
    kind = facts.get("_class_name", "DDPMScheduler")
    check_choice("the scheduler's _class_name", kind, ("DDPMScheduler", "DDIMScheduler"))
    for key, default in (
        ("thresholding", False),
        ("rescale_betas_zero_snr", False),
        ("steps_offset", 0),
        ("set_alpha_to_one", True),
    ):
        if facts.get(key, default) != default:
            raise ConfigError(f"{key} = {facts[key]!r} in the scheduler's config is not supported: only {default!r} is")
    # Of the 2022 files: predict_epsilon was the only choice before prediction_type.
    predicted = facts.get("prediction_type", "epsilon" if facts.get("predict_epsilon", True) else "sample")
    ours = {theirs: mine for mine, theirs in _DIFFUSERS_PREDICTIONS.items()}
    check_choice("prediction_type of the scheduler's config", predicted, list(ours))
    # A DDIMScheduler has no choice: its variance at eta = 1 is the small one.
    variance = facts.get("variance_type", "fixed_small")
    check_choice("variance_type of the scheduler's config", variance, list(_DIFFUSERS_VARIANCES))
    spacing = facts.get("timestep_spacing", "leading")
    check_choice("timestep_spacing of the scheduler's config", spacing, SPACINGS)

    beta, named = _betas_of(facts)
    process = ProcessConfig(
        num_timesteps=len(beta),
        prediction=cast(Prediction, ours[predicted]),
        variance=cast(Variance, _DIFFUSERS_VARIANCES[variance]),
        clip=bool(facts.get("clip_sample", True)),
        clip_range=float(facts.get("clip_sample_range", 1.0)),
        spacing=spacing,
        **named,
    )
    return process, process.noise_schedule()


def _betas_of(facts: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
    """Betas of a diffusers scheduler's config, and the fields of ProcessConfig which make them."""
    if (trained := facts.get("trained_betas")) is not None:
        beta = NoiseSchedule(trained).beta
        return beta, {"betas": tuple(beta.tolist())}
    num_timesteps = check_timesteps(facts.get("num_train_timesteps", 1000))
    theirs = facts.get("beta_schedule", "linear")
    try:
        start, end = float(facts.get("beta_start", 1e-4)), float(facts.get("beta_end", 0.02))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"beta_start or beta_end of the scheduler's config is not a number: {error}") from error
    beta = _diffusers_betas(theirs, num_timesteps, start, end)
    scale = num_timesteps / 1000
    named = {"schedule": _OUR_SCHEDULES.get(theirs), "beta_start": start * scale, "beta_end": end * scale}
    try:
        same = ProcessConfig(num_timesteps=num_timesteps, **named).noise_schedule().beta  # type: ignore[arg-type]
    except ConfigError:  # no schedule of ours, or betas ours does not take: the table itself is the schedule
        return beta, {"betas": tuple(beta.tolist())}
    return beta, named if _same(same, beta) else {"betas": tuple(beta.tolist())}
