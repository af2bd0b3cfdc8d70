"""What training minimises: weights of the squared error by timestep, and which timesteps are drawn how often.

All losses but the bound's own terms are w[t] mean (prediction - target)^2. The error of one prediction is that of
another times a factor of t alone (from x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps):

    (eps - eps_hat)^2 = snr (x_0 - x_0_hat)^2,  (v - v_hat)^2 = (1 + snr) (x_0 - x_0_hat)^2

with snr = alpha_bar / (1 - alpha_bar).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError
from .schedules import Array, NoiseSchedule

if TYPE_CHECKING:
    from .diffusion import ProcessConfig

UNIT = 2**31
"""Draws u of timesteps are whole numbers in 0 .. UNIT - 1: their share of UNIT is uniform in [0, 1)."""


def simple(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """1 for every t (DDPM, eq. 14)."""
    return np.ones(schedule.num_timesteps)


def min_snr(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """min(snr, gamma) of the error of x_0 (Hang et al. 2023): min(snr, gamma) / snr of eps, / (snr + 1) of v."""
    return np.minimum(schedule.snr, config.min_snr_gamma) * _x_0_error(config, schedule)


def p2(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """1 / (k + snr)^gamma of the error of eps (Choi et al. 2022, eq. 8)."""
    of_eps = (config.p2_k + schedule.snr) ** -config.p2_gamma
    return of_eps if config.prediction == "eps" else of_eps * schedule.snr * _x_0_error(config, schedule)


def vlb(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """T times the weight in the bound: of eps T beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) (DDPM, eqs. 8 and 12).

    With a uniform t the expected loss is then the sum over t of the KL terms of eq. 5, in nats per dimension, but for
    what the variances contribute (vlb_constants). Entry 0 is 0: the loss there is that of the discretised decoder,
    which is no square. With learned_range this is the weight at the posterior variance; the loss takes the network's.
    """
    kind = "fixed_small" if config.variance == "learned_range" else config.variance
    of_x_0 = schedule.num_timesteps * schedule.posterior_mean_coef1**2 / (2 * schedule.variance(kind))
    return np.append(0.0, (of_x_0 * _x_0_error(config, schedule))[1:])


def vlb_constants(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """What vlb's loss has besides the weighted square, float64 [T]: T times the KL of the two fixed variances.

    Nothing with fixed_small, and nothing at index 0.
    """
    log_ratio: Array = schedule.posterior_log_variance - np.log(schedule.variance(config.variance))
    kl: Array = 0.5 * (np.expm1(log_ratio) - log_ratio)
    return schedule.num_timesteps * kl


def _x_0_error(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """Squared error of x_0 per squared error of the config's own prediction, float64 [T]."""
    schedule.check_prediction(config.prediction)
    if config.prediction == "x_0":
        return np.ones(schedule.num_timesteps)
    ratio = (1 - schedule.alpha_bar) if config.prediction == "v" else 1 / schedule.snr
    return np.asarray(ratio, dtype=np.float64)


LOSSES: dict[str, Callable[["ProcessConfig", NoiseSchedule], Array]] = {
    "simple": simple,
    "min_snr": min_snr,
    "p2": p2,
    "vlb": vlb,
    "hybrid": simple,  # of the prediction; terms of the bound, which train the variance, are added to it
}


def loss_weights(config: "ProcessConfig", schedule: NoiseSchedule) -> Array:
    """Weight of the mean squared error of the config's own prediction, float64 [T], 0 or more.

    Raises:
        ConfigError: if eps is predicted and x_T is pure noise.
    """
    return LOSSES[config.loss](config, schedule)


def stratified(u: Tensor, turn: Tensor, ordinals: Tensor, num_timesteps: int, batch_size: int) -> Tensor:
    """t int64 [N]: each sample of a batch draws from one of batch_size equal parts of 0 .. T-1, no two from the same.

    t = (j UNIT + u) T // (batch_size UNIT) with j = (ordinal + turn) mod batch_size, computed without so large a
    product. Exact whole numbers: the same on every device. The turn is the batch's own: without it a place in the
    batch, where the lanes of a stream put images of the same shards, would see the same timesteps for ever.

    Args:
        u: int64 [N], uniform in 0 .. UNIT - 1.
        turn: int64 [N], the same for all samples of a batch and uniform in 0 .. UNIT - 1 over batches.
        ordinals: int64 [N], positions in the training sequence.
    """
    part = (ordinals + (turn * batch_size >> 31)) % batch_size
    return (part * num_timesteps + (u * num_timesteps >> 31)) // batch_size


class LossHistory:
    """Past losses of every timestep, and timesteps drawn in proportion to their root mean square.

    p_t ~ sqrt(mean of the last 10 L_t^2), mixed with 0.1 % of uniform, once every t has 10 losses, uniform before; the
    loss of a sample is multiplied by 1 / (T p_t), which leaves its expectation as it was (improved DDPM, eq. 18).

    Probabilities are whole numbers of shares, 256 on average and at least 1, so that losses which differ in their last
    bits (as those of other numbers of processes do) all but never lead to another t. Nothing waits for the device, no
    shape depends on values, and the state changes in place: all of it can be captured in a CUDA graph.

    Attributes:
        losses: float32 [T, 10], the last losses of each t from the oldest to the newest, -1 where there is none yet.
    """

    LENGTH = 10
    UNIFORM = 0.001
    SHARES = 256
    LARGEST = 1e18  # its square is a float32

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.losses = torch.full((num_timesteps, self.LENGTH), -1.0, device=device)

    def shares(self) -> Tensor:
        """int64 [T]: p_t in units of 1 over their sum."""
        weights = self.losses.square().mean(1).sqrt()
        relative = weights / weights.mean().clamp(min=1e-30)
        shares = (self.SHARES * ((1 - self.UNIFORM) * relative + self.UNIFORM)).round().clamp(min=1)
        return torch.where((self.losses >= 0).all(), shares, float(self.SHARES)).to(torch.int64)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t int64 [N], by inverting the cumulative distribution at u / UNIT, and its importance(t).

        Args:
            u: int64 [N], uniform in 0 .. UNIT - 1.
        """
        shares = self.shares()
        cumulative = shares.cumsum(0)
        t = torch.searchsorted(cumulative, u * cumulative[-1] >> 31, right=True)
        return t, self._importance(shares, t)

    def importance(self, t: Tensor) -> Tensor:
        """1 / (T p_t) of the present history, float32 [N]."""
        return self._importance(self.shares(), t)

    @staticmethod
    def _importance(shares: Tensor, t: Tensor) -> Tensor:
        return shares.sum().float() / (len(shares) * shares[t]).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses of one step; those that are not finite are passed over.

        Args:
            t: int64 [B], drawn from the present history, of the samples of all processes in order of position.
            losses: float [B] as TrainingProcess returns them, that is times `importance`, which is divided out here.
        """
        own = losses.float() / self.importance(t)
        num_timesteps = len(self.losses)
        key, order = torch.where(own.isfinite(), t, num_timesteps).sort(stable=True)
        own = own[order].clamp(0, self.LARGEST)
        timesteps = torch.arange(num_timesteps, device=t.device)
        first = torch.searchsorted(key, timesteps)
        count = torch.searchsorted(key, timesteps, right=True) - first
        # Each row is the end of the old row with its new losses behind it: read, not scattered, so that the order is
        # that of positions.
        place = count[:, None] + torch.arange(self.LENGTH, device=t.device)
        new = own[(first[:, None] + place - self.LENGTH).clamp(0, len(own) - 1)]
        old = self.losses.gather(1, place.clamp(max=self.LENGTH - 1))
        self.losses.copy_(torch.where(place < self.LENGTH, old, new))

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint: the tensors themselves, not copies."""
        return {"losses": self.losses}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the state that tensors() gave.

        Raises:
            CheckpointError: if it is not there or of another number of timesteps.
        """
        losses = tensors.get("losses")
        if losses is None or losses.shape != self.losses.shape:
            found = "none" if losses is None else list(losses.shape)
            raise CheckpointError(
                f"the history of losses by timestep is {found}: it must be of shape {list(self.losses.shape)}"
            )
        self.losses.copy_(losses)
