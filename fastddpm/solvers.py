"""Solvers: what a sampler does at each network evaluation, as a table of float64 coefficients, one row for each.

    prediction <- guide + W (prediction - guide)
    x_0_hat = clip(A x + B prediction, lo, hi)
    x_next  = C x_0_hat + E x + H h1 + G h2 + F z          (learned variance: F exp(log variance / 2) z)
    h1_next = P1 x_0_hat + Q1 x + R1 h1 + S1 h2            h2_next likewise with P2 .. S2

x is the variance-preserving state x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps. Papers in other variables are
brought to it: sigma = sqrt((1 - alpha_bar) / alpha_bar) and y = x / sqrt(alpha_bar) in EDM's, lambda = -log sigma in
DPM-Solver's. alpha_bar = 0 (pure noise, sigma infinite) gives finite rows; nothing here divides by it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .diffusion import SPACINGS
from .errors import ConfigError
from .schedules import PREDICTIONS, VARIANCES, Array, NoiseSchedule, check_choice, check_timesteps

COLUMNS = (
    *("A", "B", "C", "E", "H", "F", "lo", "hi", "W", "log_min", "log_max"),
    *("G", "P1", "Q1", "R1", "S1", "P2", "Q2", "R2", "S2"),
)
KARRAS_RHO = 7.0  # EDM, table 1
MAX_CHURN = np.sqrt(2) - 1  # EDM, algorithm 2: a step never adds more noise than the image has


def timestep_spacing(num_timesteps: int, num_steps: int, spacing: str = "trailing") -> np.ndarray:
    """The timesteps that a sampler of `num_steps` steps visits, int64 [num_steps], descending (as diffusers' do).

    trailing: from T - 1 down by T / num_steps, the choice for few steps (Lin et al. 2024, table 2); leading: multiples
    of T // num_steps, so it starts below T - 1 (at 980 for 50 of 1000); linspace: both T - 1 and 0.

    Raises:
        ConfigError: if num_steps is not in 1 .. num_timesteps, or the spacing is unknown.
    """
    check_choice("spacing", spacing, SPACINGS)
    check_timesteps(num_timesteps)
    if isinstance(num_steps, bool) or num_steps != int(num_steps) or not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"the number of sampling steps is {num_steps}: it must be in 1 .. {num_timesteps} (T)")
    if spacing == "trailing":
        # Cut to num_steps, because the rounding of the stride can let arange go one too far (to timestep -1).
        steps = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))[:num_steps] - 1
    elif spacing == "leading":
        steps = (np.arange(num_steps) * (num_timesteps // num_steps))[::-1]
    else:
        steps = np.round(np.linspace(0, num_timesteps - 1, num_steps))[::-1]
    return steps.astype(np.int64)


@dataclass(frozen=True)
class Levels:
    """The noise levels at which a solver stops on its way from x_T to the image, which is one more behind them."""

    t: np.ndarray
    """Timesteps [S], descending: int64, or float64 where they lie between those of the schedule."""
    alpha_bar: Array
    """float64 [S], ascending."""
    schedule: Array
    """alpha_bar of all timesteps, float64 [T]."""
    num_steps: int
    """Steps of the whole run, of which the first may have been left out."""

    @classmethod
    def at(cls, schedule: NoiseSchedule, timesteps: Sequence[int] | np.ndarray) -> "Levels":
        """The levels of whole timesteps, descending.

        Raises:
            ConfigError: if they are not, or one is not of the schedule.
        """
        t = np.asarray(timesteps, dtype=np.int64)
        if not len(t) or (np.diff(t) >= 0).any() or t[-1] < 0 or t[0] >= schedule.num_timesteps:
            raise ConfigError(
                f"timesteps are {t.tolist()}: valid are descending ones in 0 .. {schedule.num_timesteps - 1}"
            )
        alpha_bar = np.asarray(schedule.alpha_bar, dtype=np.float64)
        return cls(t, alpha_bar[t], alpha_bar, len(t))

    def start(self, first: int) -> "Levels":
        """The same without the first ones."""
        return replace(self, t=self.t[first:], alpha_bar=self.alpha_bar[first:])

    def timestep(self, sigma: Array) -> Array:
        """Timesteps at which the schedule has the noise levels `sigma`, log sigma being linear between its own."""
        known = self.schedule > 0
        log_sigma = 0.5 * np.log((1 - self.schedule[known]) / self.schedule[known])
        return np.interp(np.log(sigma), log_sigma, np.flatnonzero(known))


def spaced(schedule: NoiseSchedule, num_steps: int, spacing: str) -> Levels:
    """The levels of timestep_spacing.

    Raises:
        ConfigError: as that; for a single step that would be taken at t = 0, from pure noise.
    """
    if num_steps == 1 < schedule.num_timesteps and spacing in ("leading", "linspace"):
        raise ConfigError(f"spacing is {spacing}: a single step of it is one at t = 0; take trailing")
    return Levels.at(schedule, timestep_spacing(schedule.num_timesteps, num_steps, spacing))


def karras(schedule: NoiseSchedule, num_steps: int, spacing: str) -> Levels:
    """Levels with sigma^(1/7) evenly spaced from the schedule's largest (finite) sigma to its smallest (EDM, eq. 5).

    Raises:
        ConfigError: as timestep_spacing, whose `spacing` has no part in this one.
    """
    timestep_spacing(schedule.num_timesteps, num_steps, spacing)
    alpha_bar = np.asarray(schedule.alpha_bar, dtype=np.float64)
    known = alpha_bar[alpha_bar > 0]
    if not known.size:
        raise ConfigError("a grid of sigmas needs a timestep at which something of the image is left")
    largest, smallest = (sigma ** (1 / KARRAS_RHO) for sigma in sigma_of(known[[-1, 0]]))
    sigma = (largest + np.linspace(0, 1, num_steps) * (smallest - largest)) ** KARRAS_RHO
    levels = Levels(np.empty(0), 1 / (1 + sigma**2), alpha_bar, num_steps)
    return replace(levels, t=levels.timestep(sigma))


def sigma_of(alpha_bar: Array) -> Array:
    """Noise over signal, infinite where alpha_bar is 0."""
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


class Rows(NamedTuple):
    """What a solver does, one entry per network evaluation (R of them); columns that it leaves out are 0."""

    t: np.ndarray
    """Timestep the network is told [R]."""
    alpha_bar: Array
    """Noise level of x, from which x_0_hat is read [R]."""
    columns: dict[str, Array]
    num_history: int = 0
    """Tensors h1, h2 that it hands on."""
    evaluations: int = 1
    """Evaluations at each level (but the last, which has one)."""
    learned: bool = False
    """Whether F is scaled by the network's own variance."""


def ddpm(levels: Levels, *, variance: str = "fixed_large") -> Rows:
    """The ancestral step from t to the next kept timestep s < t (DDPM, eqs. 6 and 7, algorithm 2).

    The steps between are skipped, so beta is that of the whole way, 1 - alpha_bar_t / alpha_bar_s, in mean and variance
    (improved DDPM, eq. 19).

    Args:
        variance: fixed_small, the posterior's; fixed_large, beta; or learned_range, between the two in logarithms as
            the network says (improved DDPM, eq. 15). No noise in the last step, whose log_min is that of the step
            before (of its beta where there is none): the posterior's variance is 0 there.
    """
    check_choice("variance", variance, VARIANCES)
    a_t, a_s = levels.alpha_bar, np.append(levels.alpha_bar[1:], 1.0)
    beta = 1 - a_t / a_s
    small = beta * (1 - a_s) / (1 - a_t)
    columns = {
        "C": np.sqrt(a_s) * beta / (1 - a_t),
        "E": np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t),
    }
    if variance == "learned_range":
        columns["F"] = np.ones_like(beta)
        columns["log_max"] = np.log(beta)
        columns["log_min"] = np.log(np.append(small[:-1], small[-2] if len(small) > 1 else beta[-1]))
    else:
        columns["F"] = np.sqrt(beta if variance == "fixed_large" else small)
    columns["F"][-1] = 0
    return Rows(levels.t, a_t, columns, learned=variance == "learned_range")


def ddim(levels: Levels, *, eta: float = 0.0) -> Rows:
    """The DDIM step (Song et al. 2021, eqs. 12 and 16), with eps derived again from the clipped x_0_hat.

    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z, where
    eps_hat = (x_t - sqrt(alpha_bar_t) x_0_hat) / sqrt(1 - alpha_bar_t). With the network's eps instead, x_t drifts away
    from what x_0_hat and eps_hat make up as soon as x_0_hat is clipped.

    Args:
        eta: share of fresh noise, 0 (deterministic) to 1 (the ancestral step with fixed small variance).

    Raises:
        ConfigError: if eta is not in 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta}: it must be in 0 .. 1")
    a_t, a_s = levels.alpha_bar, np.append(levels.alpha_bar[1:], 1.0)
    sigma = eta * np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    E = np.sqrt(np.maximum(1 - a_s - sigma**2, 0) / (1 - a_t))
    return Rows(levels.t, a_t, {"C": np.sqrt(a_s) - E * np.sqrt(a_t), "E": E, "F": sigma})


def ddim_inverse(levels: Levels) -> Rows:
    """DDIM run backwards, from an image to the x_T that leads to it (Dhariwal & Nichol 2021, section F; deterministic).

    The step x_t -> x_s has to be solved for x_t. As diffusers' DDIMInverseScheduler does, the network is told t but
    shown x_s, and what it says is read at the level of x_s: x_t = sqrt(alpha_bar_t) x_0_hat + sqrt(1 - alpha_bar_t)
    eps_hat. The image itself has no noise from which eps_hat could be had: there x_0_hat is read as at the first
    timestep, and x_t = (1 + sqrt(alpha_bar_t)) x - sqrt(alpha_bar_t) x_0_hat, the same for a network that predicts eps.
    """
    t, a_t = levels.t[::-1], levels.alpha_bar[::-1]
    a_s = np.append(a_t[0], a_t[:-1])
    E = np.sqrt((1 - a_t) / (1 - a_s))
    C = np.sqrt(a_t) - E * np.sqrt(a_s)
    C[0], E[0] = -np.sqrt(a_t[0]), 1 + np.sqrt(a_t[0])
    return Rows(t, a_s, {"C": C, "E": E})


def _half_log_snr(alpha_bar: Array) -> Array:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), infinite at both ends."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))


def _multistep(levels: Levels) -> tuple[Array, Array, Array, Array]:
    """Of each step from t to s: sigma_s / sigma_t, sqrt(alpha_bar_s), h = lambda_s - lambda_t, and h over the h before.

    The last is 0 where a step has none before it, where the one before came from pure noise, and in the last step: it
    goes to lambda = infinity, where only a first-order step is finite.
    """
    a = np.append(levels.alpha_bar, 1.0)
    h = np.diff(_half_log_snr(a))
    ratio = np.zeros_like(h)
    ratio[1:-1] = h[1:-1] / h[:-2]
    return np.sqrt((1 - a[1:]) / (1 - a[:-1])), np.sqrt(a[1:]), h, ratio


def dpmpp_2m(levels: Levels) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order from one evaluation a step, h1 the x_0_hat before.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) (x_0_hat + h / (2 h_before) (x_0_hat - h1)); the first step and
    the last, to sigma 0, are of first order (DDIM's).
    """
    E, signal, h, ratio = _multistep(levels)
    weight = -signal * np.expm1(-h)
    C, H = weight * (1 + ratio / 2), -weight * ratio / 2
    return Rows(levels.t, levels.alpha_bar, {"C": C, "E": E, "H": H, "P1": np.ones_like(C)}, 1)


def dpmpp_2m_sde(levels: Levels) -> Rows:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5): the same for the reverse SDE, with fresh noise in each step.

    x_s = sigma_s / sigma_t exp(-h) x_t + alpha_s (1 - exp(-2h)) (x_0_hat + h / (2 h_before) (x_0_hat - h1))
    + sigma_s sqrt(1 - exp(-2h)) z, with sigma_s = sqrt(1 - alpha_bar_s).
    """
    decay, signal, h, ratio = _multistep(levels)
    weight = -signal * np.expm1(-2 * h)
    F = np.sqrt(-np.expm1(-2 * h) * (1 - signal**2))
    columns = {"C": weight * (1 + ratio / 2), "E": decay * np.exp(-h), "H": -weight * ratio / 2, "F": F}
    return Rows(levels.t, levels.alpha_bar, columns | {"P1": np.ones_like(F)}, 1)


def unipc(levels: Levels) -> Rows:
    """UniPC-2 with B(h) = exp(h) - 1, bh2 (Zhao et al. 2023, algorithms 1 and 2), order 1 first and last.

    Its corrector mends the state of an evaluation by the x_0_hat made there: with m_i the x_0_hat at the predicted x_i,
    the corrected state is r_i + c_i m_i, where r_i (kept in h2) is known before the evaluation. Prediction and next r
    are then linear in r_i, m_i and m_{i-1} (kept in h1), with u = alpha (1 - exp(-h)) of the step:

        x_{i+1} = sigma_{i+1} / sigma_i (r_i + c_i m_i) + u m_i + u / (2 rk) (m_{i-1} - m_i)
        r_{i+1} = sigma_{i+1} / sigma_i (r_i + c_i m_i) + u m_i + u rho_0 / rk (m_{i-1} - m_i) - c_{i+1} m_i

    rk = -h_before / h; c_{i+1} = u rho_1; rho solves the 2 x 2 system of eq. 9 (order 1: rho_0 = 0, rho_1 = 1/2).
    """
    decay, signal, h, ratio = _multistep(levels)
    u = -signal * np.expm1(-h)
    second = ratio > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        phi_2 = np.expm1(-h) / -h - 1
        b_1 = phi_2 / np.expm1(-h)
        b_2 = 2 * (phi_2 / -h - 0.5) / np.expm1(-h)
        rho_0 = (b_1 - b_2) * ratio / (1 + ratio)  # 1 / (1 - rk) with rk = -1 / ratio
    rho_1 = np.where(second, b_1 - rho_0, 0.5)
    half = -u * ratio / 2
    old = np.where(second, -u * ratio * rho_0, 0.0)
    next_c = u * rho_1
    c = np.append(0.0, next_c[:-1])
    first = np.zeros_like(decay)
    first[0] = decay[0]  # where the state itself takes the place of r
    columns = {
        **{"C": decay * c + u - half, "E": first, "H": half, "G": decay - first, "P1": np.ones_like(c)},
        **{"P2": decay * c + u - old - next_c, "Q2": first, "R2": old, "S2": decay - first},
    }
    return Rows(levels.t, levels.alpha_bar, columns, 2)


def heun(levels: Levels, *, churn: float = 0.0) -> Rows:
    """Heun's method on dy/dsigma = (y - x_0_hat) / sigma, y = x / sqrt(alpha_bar), with churn (EDM, algorithm 2).

    Two evaluations a step: the first takes Euler's step and leaves x + (h / 2) d in h1, the second adds (h / 2) d' to
    it. The last step, to sigma 0, is Euler's. Both states are kept at the scale of the level they go to.

    Args:
        churn: S_churn, at least 0: before step i of N the noise level grows by min(churn / N, sqrt(2) - 1) of itself.
            The noise for it comes with the step before; the first has none, since nothing is noisier than x_T.

    Raises:
        ConfigError: if churn is negative, or a level has no signal left (its sigma is infinite).
    """
    if not 0 <= churn < np.inf:
        raise ConfigError(f"churn is {churn}: it must be a number of at least 0")
    if not levels.alpha_bar.all():
        raise ConfigError("heun cannot start where nothing of the image is left (alpha_bar 0): leave that timestep out")
    sigma, num = sigma_of(levels.alpha_bar), len(levels.t)
    raised = sigma * np.append(1.0, np.full(num - 1, 1 + min(churn / levels.num_steps, MAX_CHURN)))
    t = levels.t if not churn else np.append(levels.t[:1], levels.timestep(raised[1:]))
    scale, scale_raised = 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + raised**2)
    rows = {name: np.zeros(2 * num - 1) for name in ("C", "E", "H", "F", "P1", "Q1")}
    # First evaluations, at the raised level; the last goes to sigma 0.
    next_sigma, next_scale = np.append(sigma[1:], 0.0), np.append(scale[1:], 1.0)
    shrink = next_sigma / raised
    rows["E"][::2] = next_scale / scale_raised * shrink
    rows["C"][::2] = next_scale * (1 - shrink)
    rows["Q1"][:-1:2] = (next_scale / scale_raised * (1 + shrink) / 2)[:-1]
    rows["P1"][:-1:2] = (next_scale * (1 - shrink) / 2)[:-1]
    # Second evaluations, at the level gone to; they end at that of the next step, noise and all.
    half = (sigma[1:] - raised[:-1]) / (2 * sigma[1:])
    rows["H"][1::2] = scale_raised[1:] / scale[1:]
    rows["E"][1::2] = scale_raised[1:] / scale[1:] * half
    rows["C"][1::2] = -scale_raised[1:] * half
    rows["F"][1::2] = scale_raised[1:] * np.sqrt(np.maximum(raised[1:] ** 2 - sigma[1:] ** 2, 0))
    alpha_bar = np.empty(2 * num - 1)
    alpha_bar[::2], alpha_bar[1::2] = scale_raised**2, scale[1:] ** 2
    told = np.empty(2 * num - 1, dtype=t.dtype)
    told[::2], told[1::2] = t, levels.t[1:]
    return Rows(told, alpha_bar, rows, 1, evaluations=2)


class Solver(NamedTuple):
    """A line of SAMPLERS: the rows, made of the levels and the options that the function names, and which levels."""

    rows: Callable[..., Rows]
    levels: Callable[[NoiseSchedule, int, str], Levels] = spaced
    to_image: bool = True
    """Whether it ends at an image (or begins with one, and ends at x_T)."""


SAMPLERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm),
    "ddim": Solver(ddim),
    "ddim_inverse": Solver(ddim_inverse, to_image=False),
    "dpmpp_2m": Solver(dpmpp_2m),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde),
    "heun": Solver(heun, karras),
    "unipc": Solver(unipc),
}


@dataclass(frozen=True)
class Table:
    """A solver's table for one network: a row for each of R evaluations."""

    timesteps: np.ndarray
    """int64 or float64 [R], what the network is told."""
    alpha_bar: Array
    """float64 [R], the noise level of the state it is shown."""
    rows: Array
    """float64 [R, 20], in the order of COLUMNS; read-only, since devices hold copies."""
    num_history: int
    evaluations: int
    learned: bool
    """These three as in Rows."""

    def column(self, name: str) -> Array:
        """One column, float64 [R]."""
        return self.rows[:, COLUMNS.index(name)]


def make_table(
    levels: Levels,
    *,
    sampler: str = "ddpm",
    prediction: str = "eps",
    variance: str = "fixed_large",
    eta: float = 0.0,
    churn: float = 0.0,
    temperature: float = 1.0,
    clip_range: float | None = 1.0,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> Table:
    """The whole table of a sampler.

    Args:
        levels: at which noise levels it stops.
        prediction: what the network predicts; it decides A and B (DDPM eq. 15 for eps).
        variance, eta, churn: of ddpm, ddim and heun.
        temperature: factor of all noise that is added on the way, at least 0.
        clip_range: x_0_hat is clipped to -clip_range .. clip_range before anything is made of it; None: not clipped.
        guidance, guidance_interval: W where t / T is in the interval (None: everywhere); 1 elsewhere.

    Raises:
        ConfigError: if a name or a value is not valid, an option belongs to another sampler, or eps is predicted at a
            level of pure noise.
    """
    check_choice("sampler", sampler, list(SAMPLERS))
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    _check_number("clip_range", clip_range, clip_range is None or 0 < clip_range < np.inf, "above 0")
    _check_number("temperature", temperature, 0 <= temperature < np.inf, "at least 0")
    _check_number("guidance", guidance, 0 <= guidance < np.inf, "at least 0")
    interval = (0.0, 1.0) if guidance_interval is None else guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"guidance_interval is {guidance_interval}: give two shares of T, 0 <= low <= high <= 1")
    options = {"variance": variance, "eta": eta, "churn": churn}
    known = {name: inspect.signature(solver.rows).parameters for name, solver in SAMPLERS.items()}
    for name, value in (("eta", eta), ("churn", churn)):
        if value and name not in known[sampler]:
            takers = ", ".join(other for other in SAMPLERS if name in known[other])
            raise ConfigError(f"{name} is {value} and the sampler is {sampler}: only {takers} has it")
    made = SAMPLERS[sampler].rows(levels, **{name: options[name] for name in options if name in known[sampler]})

    columns = dict.fromkeys(COLUMNS, np.zeros(len(made.t))) | made.columns
    columns["A"], columns["B"] = _reading(made, prediction)
    columns["F"] = temperature * columns["F"]
    columns["hi"] = np.full(len(made.t), np.inf if clip_range is None else clip_range)
    columns["lo"] = -columns["hi"]
    share = made.t / len(levels.schedule)
    columns["W"] = np.where((interval[0] <= share) & (share <= interval[1]), guidance, 1.0)
    rows = np.stack([columns[name] for name in COLUMNS], axis=1)
    rows.flags.writeable = False
    return Table(np.array(made.t), np.array(made.alpha_bar), rows, *made[3:])


def _check_number(name: str, value: float | None, ok: bool, valid: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value}: it must be {valid}")


def _reading(made: Rows, prediction: str) -> tuple[Array, Array]:
    """A and B: how x_0_hat is read from the state and the prediction."""
    signal, noise = np.sqrt(made.alpha_bar), np.sqrt(1 - made.alpha_bar)
    if prediction == "x_0":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "v":
        return signal, -noise
    if not signal.all():
        t = made.t[np.flatnonzero(signal == 0)[0]]
        raise ConfigError(
            f"the network predicts eps, which says nothing about x_0 at timestep {t}, where alpha_bar is 0: a schedule "
            "with zero terminal SNR needs prediction v or x_0"
        )
    return 1 / signal, -noise / signal


def coefficient_rows(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | np.ndarray,
    *,
    sampler: str = "ddpm",
    prediction: str = "eps",
    variance: str = "fixed_large",
    eta: float = 0.0,
    clip_range: float | None = 1.0,
) -> Array:
    """The rows of a sampler that stops at the given timesteps, descending: float64 [R, 20]; see make_table."""
    options = {"prediction": prediction, "variance": variance, "eta": eta, "clip_range": clip_range}
    return make_table(Levels.at(schedule, timesteps), sampler=sampler, **options).rows  # type: ignore[arg-type]
