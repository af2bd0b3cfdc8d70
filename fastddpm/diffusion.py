"""The training process and its config, and both as diffusers' scheduler_config.json (Ho et al. 2020, DDPM).

Algorithm 1: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; the loss is mean (prediction - target)^2.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fastddpm_kernels import (
    STREAM_VERSION,
    Stream,
    add_noise,
    diffusion_loss,
    diffusion_loss_and_grad,
    draw_normal,
    draw_timesteps,
    draw_uniform,
    stream_tag,
)

from .errors import ConfigError
from .objectives import LOSSES, UNIT, LossHistory, loss_weights, stratified, vlb_constants
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
    zero_terminal_snr,
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
    LossName = str
else:  # the choices of --help are the tables' names, written once
    ScheduleName = Literal[tuple(SCHEDULES)]
    LossName = Literal[tuple(LOSSES)]

TimestepSampling = Literal["uniform", "stratified", "loss_aware"]
TIMESTEPS: tuple[str, ...] = get_args(TimestepSampling)
Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


_TURN_TAG = stream_tag(Stream.TIMESTEP, 1)


class Noised(NamedTuple):
    """What the network is trained on, and what the loss has to know of it.

    x_t [N, C, H, W], timesteps t int64 [N], flip bool [N] (None: no flips); importance float32 [N], the factor of each
    loss that makes up for how often its t is drawn (None: 1); offset float32 [N, C, 1, 1], the part of the noise that
    all pixels of a channel share (None: none); state, x_t in float32 where it is needed later (else None).
    """

    x_t: Tensor
    t: Tensor
    flip: Tensor | None
    importance: Tensor | None = None
    offset: Tensor | None = None
    state: Tensor | None = None


class TrainingProcess:
    """Noising and loss of the training step (DDPM, algorithm 1), as two kernel launches and a small one.

    Timestep, flip and eps of a sample are functions of (seed, ordinal) alone, so nothing is stored between noise and
    loss but t and flip, and nothing depends on batch, rank or restart. No call waits for the device.

    Attributes:
        history: past losses by timestep, from which loss-aware timesteps are drawn; None with the other ways.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        seed: int = 0,
        flip: bool = False,
        impl: str | None = None,
    ) -> None:
        """The process with the simple loss and uniform timesteps; `of` makes that of any config.

        Args:
            schedule: the forward process.
            prediction: what the network predicts, one of PREDICTIONS.
            seed: the run's seed, 0 .. 2^63 - 1.
            flip: mirror each image left-right with probability 1/2.
            impl: "triton", "reference" or None (by device), as in fastddpm_kernels.

        Raises:
            ConfigError: if `prediction` is unknown or cannot be had from the schedule, or the seed out of range.
        """
        schedule.check_prediction(prediction)
        check_seed(seed)
        self.schedule, self.prediction, self.seed, self.flip, self.impl = schedule, prediction, seed, flip, impl
        self.config = ProcessConfig(num_timesteps=schedule.num_timesteps, prediction=cast(Prediction, prediction))
        self.batch_size = 1
        self.history: LossHistory | None = None
        self._kept: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def of(
        cls,
        config: "ProcessConfig",
        *,
        seed: int,
        flip: bool,
        batch_size: int,
        device: torch.device | str = "cpu",
        impl: str | None = None,
    ) -> "TrainingProcess":
        """The training process that a config describes.

        Args:
            batch_size: images of an optimiser step on all processes, which stratified timesteps cover evenly.
            device: where the history of loss-aware timesteps is kept: that of the images.
            seed, flip, impl: as for the class itself.

        Raises:
            ConfigError: if a field of the config is wrong, or the seed out of range.
        """
        process = cls(config.noise_schedule(), config.prediction, seed, flip, impl)
        process.config, process.batch_size = config, batch_size
        if config.timesteps == "loss_aware":
            process.history = LossHistory(config.num_timesteps, device)
        return process

    @property
    def self_conditioning(self) -> bool:
        """Whether the network's input has its last estimate of x_0 behind x_t."""
        return self.config.self_conditioning

    @property
    def bounded(self) -> bool:
        """Whether terms of the bound are in the loss."""
        return self.config.loss in ("vlb", "hybrid")

    @property
    def _learned(self) -> bool:
        return self.config.variance == "learned_range"

    def noise(self, x_0: Tensor, ordinals: Tensor, dtype: torch.dtype = torch.float32) -> Noised:
        """Draw t, flips and eps and make x_t.

        Args:
            x_0: [N, C, H, W] uint8 (taken as x/127.5 - 1) or float (taken as it is), contiguous or channels_last.
            ordinals: int64 [N] on x_0's device: position of each image in the run's sequence of images.
            dtype: of x_t; it is computed in float32.

        Returns:
            x_t in x_0's memory format, t, flip and what the loss has to know. No gradient flows.
        """
        t, coin, importance = self._drawn(ordinals)
        flip = coin if self.flip else None
        tables = self._tables(x_0)
        keep = self.bounded or self.self_conditioning
        first = torch.float32 if keep or self.config.offset_noise else dtype
        x_t = add_noise(x_0, t, ordinals, *tables, seed=self.seed, flip=flip, dtype=first, impl=self.impl)
        offset = None
        if self.config.offset_noise:
            shape = (x_0.shape[1], 1, 1)
            normals = draw_normal(ordinals, shape, seed=self.seed, stream=Stream.OFFSET, impl=self.impl)
            offset = normals * self.config.offset_noise
            x_t = x_t + tables[1][t][:, None, None, None] * offset
        return Noised(x_t.to(dtype), t, flip, importance, offset, x_t if keep else None)

    def timesteps(self, ordinals: Tensor) -> Tensor:
        """t int64 [N] of the images at `ordinals` int64 [N], as noise draws it (loss-aware ones: with this history)."""
        return self._drawn(ordinals)[0]

    def _drawn(self, ordinals: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """t, coin of the flip, and importance."""
        num_timesteps = self.schedule.num_timesteps
        if self.config.timesteps == "uniform":
            return *draw_timesteps(ordinals, num_timesteps, seed=self.seed, impl=self.impl), None
        u, coin = draw_timesteps(ordinals, UNIT, seed=self.seed, impl=self.impl)
        if self.history is None:
            batches = ordinals.div(self.batch_size, rounding_mode="floor")
            turn = draw_uniform(batches, 1, seed=self.seed, stream=_TURN_TAG, impl=self.impl)[:, 0]
            turn = (turn * UNIT).to(torch.int64)  # exact: of 24 bits
            return stratified(u, turn, ordinals, num_timesteps, self.batch_size), coin, None
        t, importance = self.history.draw(u)
        return t, coin, importance

    def hide_labels(self, labels: Tensor, ordinals: Tensor, num_class_embeds: int | None) -> Tensor:
        """The classes that the network is told: the last one, which stands for none, for a share of label_dropout.

        Args:
            labels: int64 [N], -1 where there is none.
            ordinals: int64 [N], as for noise; whether a label is hidden is a function of (seed, ordinal).
            num_class_embeds: classes of the network, that which stands for none included.
        """
        if not self.config.label_dropout:
            return labels
        assert num_class_embeds is not None, "labels of a network without classes"
        draw = draw_uniform(ordinals, 1, seed=self.seed, stream=Stream.LABEL, impl=self.impl)[:, 0]
        return torch.where((draw < self.config.label_dropout) | (labels < 0), num_class_embeds - 1, labels)

    def estimate(self, prediction: Tensor, noised: Noised, ordinals: Tensor) -> Tensor:
        """The estimate of x_0 that self-conditioning gives the network, float32 [N, C, H, W]; 0 for half of them.

        Args:
            prediction: network output for noised.x_t at noised.t without an estimate.
            noised, ordinals: what noise returned, and was given; which half is a function of (seed, ordinal).
        """
        assert noised.state is not None, "of a process without self-conditioning"
        own = prediction.chunk(2, dim=1)[0] if self._learned else prediction
        x_0_hat = self.schedule.predict_x_0(noised.state, noised.t, own.float(), self.prediction)
        if self.config.clip:
            x_0_hat = x_0_hat.clamp(-self.config.clip_range, self.config.clip_range)
        draw = draw_uniform(ordinals, 1, seed=self.seed, stream=Stream.SELF_CONDITION, impl=self.impl)
        return torch.where(draw[:, :, None, None] < 0.5, x_0_hat, 0.0)

    def loss(self, prediction: Tensor, noised: Noised, ordinals: Tensor, x_0: Tensor | None = None) -> Tensor:
        """The loss of each sample, float32 [N], times its importance; differentiable in `prediction` only.

        Args:
            prediction: network output for noised.x_t at noised.t: [N, C, H, W], or [N, 2C, H, W] with learned_range.
            noised, ordinals: what noise returned, and was given.
            x_0: what noise was given; needed unless eps is predicted and the loss has no term of the bound.
        """
        terms = []
        if self._has_squares:
            own = self._own(prediction, noised)
            terms.append(diffusion_loss(own, noised.t, ordinals, *self._tables(own), **self._target(noised, x_0)))
        if self.bounded:
            terms.append(self._bound(prediction, noised, x_0))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def loss_and_grad(
        self, prediction: Tensor, noised: Noised, ordinals: Tensor, x_0: Tensor | None, grad_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient, of all but terms of the bound in one pass over the prediction.

        Args:
            grad_scale: factor of the gradient: 1/N for the mean of a batch of N, times the loss scale of fp16; a
                float32 scalar tensor on the device is read there. The rest as for loss.

        Returns:
            losses float32 [N]; the gradient of grad_scale * losses.sum() in the prediction's dtype and memory format,
            for torch.autograd.backward(prediction, gradient).
        """
        prediction = prediction.detach()
        if self._has_squares:
            own = self._own(prediction, noised)
            losses, grad = diffusion_loss_and_grad(
                own, noised.t, ordinals, *self._tables(own), grad_scale=grad_scale, **self._target(noised, x_0)
            )
            if not self.bounded:
                return losses, grad.to(prediction.dtype)
        with torch.enable_grad():
            leaf = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).detach().requires_grad_()
            bound = self._bound(leaf, noised, x_0)
            (bound_grad,) = torch.autograd.grad((bound * grad_scale).sum(), leaf)
        whole = torch.empty_like(prediction).copy_(bound_grad)
        if not self._has_squares:
            return bound.detach(), whole
        # Where one of the two has a gradient that of the other is 0, so the sum is not rounded.
        whole[:, : grad.shape[1]] += grad
        return losses + bound.detach(), whole

    @property
    def _has_squares(self) -> bool:
        return not (self._learned and self.config.loss == "vlb")

    def _own(self, prediction: Tensor, noised: Noised) -> Tensor:
        """What the loss kernel compares with the target made of eps: without variances, and without the known offset.

        The noise of x_t is eps + offset, and so is the target; the kernel draws eps only.
        """
        own = prediction.chunk(2, dim=1)[0] if self._learned else prediction
        if noised.offset is None or self.prediction == "x_0":
            return own
        if self.prediction == "eps":
            return own - noised.offset
        return own - self._tables(own)[0][noised.t][:, None, None, None] * noised.offset

    def _bound(self, prediction: Tensor, noised: Noised, x_0: Tensor | None) -> Tensor:
        """The part of each loss that is no weighted square, times its importance, [N]; differentiable in `prediction`.

        vlb: T L_t, of a fixed variance at t = 0 only (elsewhere what the square leaves out of it); hybrid: vlb_weight
        T L_t for the variance alone, the mean detached (improved DDPM, eq. 16). L_t is in nats per dimension: the
        paper's code takes bits, its lambda is this vlb_weight times ln 2.
        """
        from .bound import vlb_term  # which knows ProcessConfig from here

        if x_0 is None or noised.state is None:
            raise ValueError(f"the loss {self.config.loss!r} needs x_0 and what this process's noise() returned")
        if noised.flip is not None:
            x_0 = torch.where(noised.flip[:, None, None, None], x_0.flip(-1), x_0)
        if self.config.loss == "hybrid":
            own, variance = prediction.chunk(2, dim=1)
            prediction = torch.cat((own.detach(), variance), dim=1)
        term = vlb_term(self.config, self.schedule, x_0, noised.state, noised.t, prediction, clip=False)
        term = term * self.schedule.num_timesteps
        if self.config.loss == "hybrid":
            term = term * self.config.vlb_weight
        elif not self._learned:
            term = torch.where(noised.t == 0, term, self._table("constants", term.device)[noised.t])
        return term if noised.importance is None else term * noised.importance

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        table = self.schedule.table
        return table("sqrt_alpha_bar", like.device), table("sqrt_one_minus_alpha_bar", like.device)

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Loss weights or vlb's constants as a tensor [T] on the device, made once."""
        key = (name, str(device))
        if key not in self._kept:
            values = (vlb_constants if name == "constants" else loss_weights)(self.config, self.schedule)
            self._kept[key] = torch.tensor(values).float().to(device)
        return self._kept[key]

    def _target(self, noised: Noised, x_0: Tensor | None) -> dict[str, Any]:
        weights = noised.importance
        if self.config.loss not in ("simple", "hybrid"):  # whose weights are 1
            own = self._table("weights", noised.t.device)[noised.t]
            weights = own if weights is None else own * weights
        return {
            "seed": self.seed,
            "target": self.prediction,
            "x_0": x_0,
            "flip": noised.flip,
            "weights": weights,
            "huber": self.config.huber,
            "impl": self.impl,
        }


def check_seed(seed: int) -> None:
    """Raise a ConfigError unless the seed fits Philox's key without its sign bit."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}: it must be in 0 .. 2^63 - 1")


@dataclass(frozen=True)
class ProcessConfig:
    """The forward process and what the network predicts (Ho's recipe by default)."""

    schedule: ScheduleName = "linear"
    (
        "Noise schedule: linear (Ho), cosine (improved DDPM), sigmoid (GeoDiff: betas along a logistic curve) or "
        "quadratic (roots of the betas equally spaced; diffusers' scaled_linear)."
    )
    num_timesteps: int = 1000
    """Timesteps T of the forward process."""
    beta_start: float = 1e-4
    """First beta at T = 1000 (linear, sigmoid, quadratic); multiplied by 1000 / T."""
    beta_end: float = 0.02
    """Last beta at T = 1000 (linear, sigmoid, quadratic); multiplied by 1000 / T."""
    betas: tuple[float, ...] | None = None
    """All T betas, in place of those of the schedule; None computes them."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise eps, the image x_0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    variance: Variance = "fixed_large"
    (
        "Variance of a reverse step: fixed_large (beta; for all T steps), fixed_small (posterior; for fewer) or "
        "learned_range (the network's, between the two; needs loss hybrid or vlb)."
    )
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
        "Clip x_0 to this quantile of its absolute values, at least 1, and scale it back to -1 .. 1 (Imagen's dynamic "
        "thresholding, e.g. 0.995; with clip and clip_range 1); None clips to clip_range itself."
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
    """Weight of T L_t in hybrid, L_t in nats per dimension (lambda of improved DDPM, whose code takes bits)."""
    huber: float | None = None
    """Pseudo-Huber loss with this threshold on each element's error, in place of its square; None: the square."""
    offset_noise: float = 0.0
    """Standard deviation of noise that is added to eps, the same in all pixels of a channel (0.1 is usual)."""
    timesteps: TimestepSampling = "uniform"
    (
        "How t is drawn: uniform; stratified (each batch covers 0 .. T-1 evenly); loss_aware (in proportion to the "
        "root mean square of past losses, weighted back; improved DDPM, eq. 18)."
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
        check_choice("diffusion.loss", self.loss, list(LOSSES))
        check_choice("diffusion.timesteps", self.timesteps, TIMESTEPS)
        threshold, huber = self.dynamic_threshold, self.huber
        for name, ok, valid in (
            ("clip_range", self.clip_range > 0, "above 0"),
            ("dynamic_threshold", threshold is None or 0 < threshold <= 1, "above 0 and at most 1, or None"),
            ("min_snr_gamma", 0 < self.min_snr_gamma < math.inf, "above 0"),
            ("p2_gamma", 0 <= self.p2_gamma < math.inf, "at least 0"),
            ("p2_k", 0 < self.p2_k < math.inf, "above 0"),
            ("vlb_weight", 0 < self.vlb_weight < math.inf, "above 0"),
            ("huber", huber is None or 1e-6 <= huber < math.inf, "at least 1e-6, or None for the square"),
            ("offset_noise", 0 <= self.offset_noise < math.inf, "at least 0"),
            ("label_dropout", 0 <= self.label_dropout < 1, "at least 0 and below 1"),
        ):
            if not ok:
                raise ConfigError(f"diffusion.{name} is {getattr(self, name)}: it must be {valid}")
        self._check_combinations()
        self._schedule().check_prediction(self.prediction)

    def _check_combinations(self) -> None:
        """Fields that are valid by themselves and do not go together."""
        learned = self.variance == "learned_range"
        for wrong, line in (
            (
                self.loss == "hybrid" and not learned,
                f"loss is hybrid and diffusion.variance {self.variance}: hybrid trains a variance, so it needs "
                "learned_range",
            ),
            (
                learned and self.loss not in ("hybrid", "vlb"),
                f"variance is learned_range and diffusion.loss {self.loss}: nothing trains the variance; valid are "
                "hybrid, vlb",
            ),
            (
                self.huber is not None and self.loss in ("hybrid", "vlb"),
                f"huber is {self.huber} and diffusion.loss {self.loss}: the bound is made of squares; leave out huber "
                "or take simple, min_snr, p2",
            ),
            (
                self.zero_terminal_snr and self.prediction == "eps",
                "zero_terminal_snr is set and diffusion.prediction eps: eps of pure noise says nothing about x_0; "
                "valid are v, x_0",
            ),
            (
                self.zero_terminal_snr and self.loss in ("min_snr", "p2"),
                f"zero_terminal_snr is set and diffusion.loss {self.loss}: its weight is 0 at the last timestep, from "
                "which sampling starts; valid are simple, vlb, hybrid",
            ),
            (
                self.dynamic_threshold is not None and not self.clip,
                f"dynamic_threshold is {self.dynamic_threshold} and diffusion.clip off: it is a way of clipping; leave "
                "one out",
            ),
            (
                self.dynamic_threshold is not None and self.clip_range != 1,
                f"dynamic_threshold is {self.dynamic_threshold} and diffusion.clip_range {self.clip_range}: it scales "
                "x_0 to -1 .. 1, so clip_range must be 1",
            ),
        ):
            if wrong:
                raise ConfigError(f"diffusion.{line}")

    def noise_schedule(self) -> NoiseSchedule:
        """The tables of this process.

        Raises:
            ConfigError: if a field of the process is wrong (see check).
        """
        self.check()
        return self._schedule()

    def _schedule(self) -> NoiseSchedule:
        schedule = self._unscaled()
        return NoiseSchedule(zero_terminal_snr(schedule.beta)) if self.zero_terminal_snr else schedule

    def _unscaled(self) -> NoiseSchedule:
        """The schedule before it is rescaled to zero terminal SNR, if it is."""
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
_OUR_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid", "scaled_linear": "quadratic"}
_DIFFUSERS_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
# Dynamic thresholding of diffusers has a largest scale besides the quantile, which ours has not.
_NO_LARGEST = 1e9


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


_OUR_KEYS = ("label_dropout", "self_conditioning")


def to_diffusers_scheduler(process: ProcessConfig) -> dict[str, Any]:
    """scheduler_config.json, without the version of diffusers, of a DDPMScheduler that takes our ancestral steps.

    Betas which DDPMScheduler does not compute itself are written as trained_betas. With all T steps its images are
    ours; with fewer, trailing ones it takes its last step at some t > 0 and with fixed_large adds noise to the result,
    which our samplers never do. The betas are those before a rescaling to zero terminal SNR, which it does itself.

    Raises:
        ConfigError: if the process is not valid.
    """
    process.check()
    beta = process._unscaled().beta
    num_timesteps = len(beta)
    name = next((theirs for theirs, ours in _OUR_SCHEDULES.items() if ours == process.schedule), None)
    start, end = process.beta_start * 1000 / num_timesteps, process.beta_end * 1000 / num_timesteps
    threshold = process.dynamic_threshold
    computed = name is not None and _same(_diffusers_betas(name, num_timesteps, start, end), beta)
    # What our own samplers have to know of the network beyond diffusers' keys, which passes over others.
    ours = {key: value for key in _OUR_KEYS if (value := getattr(process, key))}
    return ours | {
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
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "thresholding": threshold is not None,
        "dynamic_thresholding_ratio": 0.995 if threshold is None else threshold,
        "sample_max_value": 1.0 if threshold is None else _NO_LARGEST,
    }


def from_diffusers_scheduler(facts: Mapping[str, Any]) -> tuple[ProcessConfig, NoiseSchedule]:
    """The process of a DDPMScheduler's or DDIMScheduler's config; the inverse of to_diffusers_scheduler.

    Missing keys get diffusers' defaults; keys it no longer reads are passed over. Betas are computed in float64.

    Raises:
        ConfigError: naming a class, schedule, variance or option that is not supported.
    """
    kind = facts.get("_class_name", "DDPMScheduler")
    check_choice("the scheduler's _class_name", kind, ("DDPMScheduler", "DDIMScheduler"))
    for key, default in (("steps_offset", 0), ("set_alpha_to_one", True)):
        if facts.get(key, default) != default:
            raise ConfigError(f"{key} = {facts[key]!r} in the scheduler's config is not supported: only {default!r} is")
    # Of the 2022 files: predict_epsilon was the only choice before prediction_type.
    predicted = facts.get("prediction_type", "epsilon" if facts.get("predict_epsilon", True) else "sample")
    ours = {theirs: mine for mine, theirs in _DIFFUSERS_PREDICTIONS.items()}
    check_choice("prediction_type of the scheduler's config", predicted, list(ours))
    if facts.get("rescale_betas_zero_snr", False) and predicted == "epsilon":
        raise ConfigError(
            "rescale_betas_zero_snr = True with prediction_type = 'epsilon' in the scheduler's config is not "
            "supported: eps of pure noise says nothing about x_0"
        )
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
        spacing=spacing,
        zero_terminal_snr=bool(facts.get("rescale_betas_zero_snr", False)),
        loss="hybrid" if variance == "learned_range" else "simple",  # what such nets are trained with
        label_dropout=float(facts.get("label_dropout", 0.0)),
        self_conditioning=bool(facts.get("self_conditioning", False)),
        **_clipping_of(facts),
        **named,
    )
    return process, process.noise_schedule()


def _clipping_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How x_0 is clipped by a diffusers scheduler, as fields of ProcessConfig."""
    if not facts.get("thresholding", False):
        return {"clip": bool(facts.get("clip_sample", True)), "clip_range": float(facts.get("clip_sample_range", 1.0))}
    largest = float(facts.get("sample_max_value", 1.0))
    if largest == 1:  # whatever the quantile is
        return {"clip": True}
    if largest < _NO_LARGEST:
        raise ConfigError(
            f"sample_max_value = {largest:g} with thresholding in the scheduler's config is not supported: only 1 "
            f"(plain clipping) and {_NO_LARGEST:g} or more (no limit) are"
        )
    return {"clip": True, "dynamic_threshold": float(facts.get("dynamic_thresholding_ratio", 0.995))}


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
