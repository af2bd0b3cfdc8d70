"""Noise schedules and the tables that follow from their betas (Ho et al. 2020, DDPM, eqs. 4 to 7 and 15).

t = 0 .. T-1, where index 0 is one step of noise (the paper's t = 1) and alpha_bar before it is 1.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .errors import ConfigError

Array = NDArray[np.float64]
Prediction = Literal["eps", "x_0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

PREDICTIONS: tuple[str, ...] = get_args(Prediction)
VARIANCES: tuple[str, ...] = get_args(Variance)
FIXED_VARIANCES = ("fixed_small", "fixed_large")

# No beta is larger: at beta = 1 nothing of x_0 is left and x_0 cannot be had from eps (Nichol & Dhariwal 2021, 3.2).
MAX_BETA = 0.999


def check_choice(what: str, value: object, valid: Sequence[str]) -> None:
    """Raise a ConfigError naming the valid values unless `value` is one of them."""
    if value not in valid:
        raise ConfigError(f"{what} is {value!r}: valid are {', '.join(valid)}")


def check_timesteps(num_timesteps: object) -> int:
    """num_timesteps as an int; a ConfigError unless it is a whole number of at least 1."""
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, numbers.Integral) or num_timesteps < 1:
        raise ConfigError(f"num_timesteps is {num_timesteps!r}: it must be a whole number of at least 1")
    return int(num_timesteps)


def linear(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """Betas equally spaced (DDPM, section 4), times 1000/T so that alpha_bar at the end hardly depends on T.

    Args:
        beta_start, beta_end: first and last beta at T = 1000, 0 < beta_start <= beta_end < 1. Betas which the scaling
            takes above 0.999 (T below about 20) are cut to it.
    """
    scale = _beta_scale(num_timesteps, beta_start, beta_end)
    return np.minimum(np.linspace(scale * beta_start, scale * beta_end, num_timesteps), MAX_BETA)


def cosine(num_timesteps: int, s: float = 0.008, max_beta: float = MAX_BETA) -> Array:
    """alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) over its value at 0 (improved DDPM, eq. 17).

    Args:
        s: offset that keeps the first betas from being too small, 0 <= s.
        max_beta: larger betas (the last ones) are cut to it, in (0, 1).
    """
    if not (0 <= s < math.inf and 0 < max_beta < 1):
        raise ConfigError(f"cosine schedule: s is {s} and max_beta {max_beta}: valid are s >= 0 and 0 < max_beta < 1")
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + s) / (1 + s) * (np.pi / 2)) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def sigmoid(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """Betas along a logistic curve over -6 .. 6 (GeoDiff, and DDPMScheduler's "sigmoid"), times 1000/T as for linear.

    Not the schedule of Jabri et al. 2022, in which alpha_bar itself is a logistic curve.

    Args:
        beta_start, beta_end: limits of the curve at T = 1000, 0 < beta_start <= beta_end < 1.
    """
    scale = _beta_scale(num_timesteps, beta_start, beta_end)
    curve = 1 / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    return np.minimum(scale * (beta_start + (beta_end - beta_start) * curve), MAX_BETA)


def quadratic(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """Betas whose square roots are equally spaced ("quad" of Ho's code, diffusers' "scaled_linear"), times 1000/T.

    Args:
        beta_start, beta_end: first and last beta at T = 1000, 0 < beta_start <= beta_end < 1; cut as for linear.
    """
    scale = _beta_scale(num_timesteps, beta_start, beta_end)
    roots = np.linspace(math.sqrt(scale * beta_start), math.sqrt(scale * beta_end), num_timesteps)
    return np.minimum(roots**2, MAX_BETA)


def _beta_scale(num_timesteps: int, beta_start: float, beta_end: float) -> float:
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(
            f"beta_start is {beta_start} and beta_end {beta_end}: valid are 0 < beta_start <= beta_end < 1 "
            "(as at 1000 timesteps)"
        )
    return 1000 / num_timesteps


SCHEDULES: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "quadratic": quadratic,
}


def zero_terminal_snr(betas: ArrayLike) -> Array:
    """Betas [T] of the same schedule, rescaled so that x_T is pure noise (Lin et al. 2024, algorithm 1).

    sqrt(alpha_bar) is shifted to 0 at the last index and scaled to its old value at the first one, so the last beta
    becomes 1.

    Args:
        betas: [T] in (0, 1).

    Raises:
        ConfigError: if T is 1: one step cannot keep its noise and become pure noise.
    """
    beta = np.array(betas, dtype=np.float64)
    if len(beta) < 2:
        raise ConfigError("zero_terminal_snr needs at least 2 timesteps: num_timesteps is 1")
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return np.append(beta[0], 1 - (root[1:] / root[:-1]) ** 2)


class NoiseSchedule:
    """Everything that follows from the betas of a forward process.

    The last beta may be 1, so that x_T is pure noise (zero terminal SNR): alpha_bar and snr are 0 there, every table is
    finite, and x_0 cannot be had from eps.

    Attributes (float64 numpy arrays [T] on the CPU, read-only, entry t belongs to timestep t):
        beta, alpha: noise variance of one step, and 1 - beta.
        alpha_bar, alpha_bar_prev: product of alphas up to and including t; the same one step earlier, 1 at index 0.
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: signal and noise of x_t. Two tables, because 1 - alpha_bar taken from
            a rounded alpha_bar loses the small noise of the first steps.
        posterior_mean_coef1, posterior_mean_coef2: of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0), eq. 7.
        posterior_variance: of q(x_{t-1} | x_t, x_0), eq. 7; 0 at index 0.
        posterior_log_variance: its logarithm, entry 0 replaced by that of index 1 (of beta where T = 1), as Ho does:
            a clamp at some tiny number instead would break the reconstruction term L_0.
        snr: alpha_bar / (1 - alpha_bar).
    """

    TABLES = (
        "beta",
        "alpha",
        "alpha_bar",
        "alpha_bar_prev",
        "sqrt_alpha_bar",
        "sqrt_one_minus_alpha_bar",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "posterior_log_variance",
        "snr",
    )

    def __init__(self, betas: ArrayLike) -> None:
        """Make the tables from betas [T], each in (0, 1); the last one may be 1.

        Raises:
            ConfigError: if there is no beta, one is out of range, or alpha_bar underflows.
        """
        beta = np.array(betas, dtype=np.float64)
        if beta.ndim != 1 or not beta.size:
            raise ConfigError(f"betas have the shape {list(beta.shape)}: valid is a list of at least one number")
        pure_noise = np.append(np.zeros(len(beta) - 1, dtype=bool), beta[-1] == 1)
        bad = np.flatnonzero(~((beta > 0) & (1 - beta < 1) & ((beta < 1) | pure_noise)))
        if bad.size:
            raise ConfigError(
                f"beta at index {bad[0]} is {beta[bad[0]]}: every beta must be above 0 and below 1 (the last may be 1)"
            )
        self.num_timesteps = len(beta)
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = np.cumprod(self.alpha)
        smallest = self.alpha_bar[~pure_noise].min(initial=1.0)
        if smallest < 1e-60:  # 1 / sqrt(alpha_bar) has to be a float32
            raise ConfigError(
                f"alpha_bar falls to {smallest:.3g}: the last steps would all be pure noise; "
                "use smaller betas or fewer timesteps"
            )
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        self.sqrt_alpha_bar = np.sqrt(self.alpha_bar)
        self.sqrt_one_minus_alpha_bar = np.sqrt(1 - self.alpha_bar)
        self.posterior_mean_coef1 = np.sqrt(self.alpha_bar_prev) * beta / (1 - self.alpha_bar)
        self.posterior_mean_coef2 = np.sqrt(self.alpha) * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.posterior_variance = beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        first = self.posterior_variance[1] if len(beta) > 1 else beta[0]
        self.posterior_log_variance = np.log(np.append(first, self.posterior_variance[1:]))
        self.snr = self.alpha_bar / (1 - self.alpha_bar)
        for name in self.TABLES:
            getattr(self, name).flags.writeable = False  # a table on a device could not follow a change
        self._tables: dict[tuple[str, str, torch.dtype], Tensor] = {}

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> "NoiseSchedule":
        """The schedule of given betas [T]; see __init__ for errors."""
        return cls(betas)

    @classmethod
    def from_name(cls, name: str, num_timesteps: int = 1000, **options: float) -> "NoiseSchedule":
        """The schedule SCHEDULES[name](num_timesteps, **options).

        Raises:
            ConfigError: if the name or an option is not known (names the valid ones) or a value is impossible.
        """
        if name not in SCHEDULES:
            raise ConfigError(f"unknown schedule {name!r}: valid are {', '.join(SCHEDULES)}")
        num_timesteps = check_timesteps(num_timesteps)
        valid = list(inspect.signature(SCHEDULES[name]).parameters)[1:]
        for option in options:
            if option not in valid:
                raise ConfigError(f"schedule {name} has no option {option!r}: valid are {', '.join(valid)}")
        return cls(SCHEDULES[name](num_timesteps, **options))

    def table(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """A table of TABLES as a tensor [T] on the device, rounded once from float64; made once, then kept there."""
        if name not in self.TABLES:
            raise ValueError(f"no table {name!r}: valid are {', '.join(self.TABLES)}")
        key = (name, str(torch.device(device)), dtype)
        if key not in self._tables:
            # Rounded before it moves: not every device has float64.
            self._tables[key] = torch.tensor(getattr(self, name)).to(dtype).to(device)
        return self._tables[key]

    def _at(self, name: str, t: Tensor | int, like: Tensor) -> Tensor:
        """Entries t of a table, float64 for a float64 `like` and float32 otherwise, ready to multiply `like`."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        values = self.table(name, like.device, dtype)[t]
        return values.reshape(-1, *(1,) * (like.ndim - 1)) if values.ndim else values

    def q_mean_variance(self, x_0: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and variance (broadcasts against it) of q(x_t | x_0), eq. 4.

        Args:
            x_0: [N, ...], floating point; low precision is computed in float32.
            t: int64 [N] on x_0's device, or one int.
        """
        return self._at("sqrt_alpha_bar", t, x_0) * x_0, self._at("sqrt_one_minus_alpha_bar", t, x_0) ** 2

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and variance (broadcasts against it) of q(x_{t-1} | x_t, x_0), eqs. 6 and 7.

        At t = 0 the variance is 0 and the mean x_0. Shapes, dtypes and t as for q_mean_variance.
        """
        mean = self._at("posterior_mean_coef1", t, x_0) * x_0 + self._at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self._at("posterior_variance", t, x_t)

    def predict_x_0(self, x_t: Tensor, t: Tensor | int, prediction: Tensor, kind: str = "eps") -> Tensor:
        """x_0_hat [N, ...] from what the network predicts (`kind`: one of PREDICTIONS), not clipped.

        eps: eq. 15 of the paper; v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0: Salimans & Ho 2022. Differentiable
        in x_t and prediction.

        Raises:
            ConfigError: if `kind` is unknown, or eps where x_T is pure noise.
        """
        self.check_prediction(kind)
        if kind == "x_0":
            return prediction
        signal, noise = self._at("sqrt_alpha_bar", t, x_t), self._at("sqrt_one_minus_alpha_bar", t, x_t)
        return signal * x_t - noise * prediction if kind == "v" else (x_t - noise * prediction) / signal

    def check_prediction(self, kind: str) -> None:
        """Raise a ConfigError unless `kind` is one of PREDICTIONS, and not eps where x_T is pure noise."""
        check_choice("prediction", kind, PREDICTIONS)
        if kind == "eps" and self.alpha_bar[-1] == 0:
            raise ConfigError(
                "prediction is 'eps' and the last alpha_bar is 0 (zero terminal SNR): eps of pure noise says nothing "
                "about x_0; valid are v, x_0"
            )

    def predict_eps(self, x_t: Tensor, t: Tensor | int, prediction: Tensor, kind: str = "eps") -> Tensor:
        """eps_hat [N, ...] from what the network predicts; the counterpart of predict_x_0."""
        check_choice("prediction", kind, PREDICTIONS)
        if kind == "eps":
            return prediction
        signal, noise = self._at("sqrt_alpha_bar", t, x_t), self._at("sqrt_one_minus_alpha_bar", t, x_t)
        return signal * prediction + noise * x_t if kind == "v" else (x_t - signal * prediction) / noise

    def variance(self, kind: str) -> Array:
        """Variance of p(x_{t-1} | x_t) for every t, float64 [T], never 0.

        fixed_small is the posterior variance (best where x_0 is one point), fixed_large is beta (best where x_0 is
        N(0, I)); entry 0 of either is the posterior variance of index 1, as in Ho's code. Samplers add no noise there;
        the entry matters to the likelihood.

        Raises:
            ConfigError: if `kind` is no fixed variance (of learned_range the two are the limits).
        """
        check_choice("variance", kind, FIXED_VARIANCES)
        small = np.exp(self.posterior_log_variance)
        return small if kind == "fixed_small" else np.append(small[0], self.beta[1:])
