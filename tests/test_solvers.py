"""Tables of solvers in float64: orders of convergence with exact oracles, marginals, moments, zero terminal SNR."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import moments, run

import fastddpm_kernels
from fastddpm import solvers
from fastddpm.diffusion import SCHEDULES, SPACINGS, NoiseSchedule, ProcessConfig
from fastddpm.errors import ConfigError
from fastddpm.solvers import COLUMNS, SAMPLERS, Levels, Table, coefficient_rows, make_table, timestep_spacing

Array = np.ndarray
HO = NoiseSchedule.from_name("linear", 1000)
ZERO_SNR = SimpleNamespace(num_timesteps=10, alpha_bar=np.append(np.linspace(0.99, 0.05, 9), 0.0))
# Images that are one number: two narrow modes, one twice as likely.
WEIGHTS, MEANS, DEVIATION = np.array([2 / 3, 1 / 3]), np.array([-0.6, 0.8]), 0.25
# UniPC-2 has the corrector's order, one above its predictor's (Zhao et al. 2023, theorem 3.1).
ORDERS = {"ddim": 1, "dpmpp_2m": 2, "heun": 2, "unipc": 3}


def test_columns_are_the_kernel_s() -> None:
    assert fastddpm_kernels.REVERSE_COLUMNS == COLUMNS


def mixture_oracle(x: Array, alpha_bar: float) -> Array:
    """E[x_0 | x_t] of the two modes."""
    variance = alpha_bar * DEVIATION**2 + 1 - alpha_bar
    residual = x[..., None] - math.sqrt(alpha_bar) * MEANS
    share = WEIGHTS * np.exp(-(residual**2) / (2 * variance))
    share /= share.sum(-1, keepdims=True)
    means = MEANS + math.sqrt(alpha_bar) * DEVIATION**2 / variance * residual
    return (share * means).sum(-1)


def gaussian_oracle(x: Array, alpha_bar: float) -> Array:
    """E[x_0 | x_t] of N(MEANS[0], DEVIATION^2)."""
    variance = alpha_bar * DEVIATION**2 + 1 - alpha_bar
    return MEANS[0] + math.sqrt(alpha_bar) * DEVIATION**2 / variance * (x - math.sqrt(alpha_bar) * MEANS[0])


def even(num: int, last: float = 3.0) -> Levels:
    """Levels evenly spaced in lambda from almost pure noise to almost an image: the same ends for any number."""
    lam = np.linspace(-4, last, num)
    alpha_bar = 1 / (1 + np.exp(-2 * lam))
    return Levels(np.linspace(900.0, 10.0, num), alpha_bar, HO.alpha_bar, num)


def flow(x: Array, first: float, last: float, steps: int = 4000) -> Array:
    """The probability-flow ODE from one alpha_bar to another, by Runge-Kutta in lambda: dx_0-form, y = x / signal."""
    lam = 0.5 * np.log(np.array([first, last]) / (1 - np.array([first, last])))
    h = (lam[1] - lam[0]) / steps
    y = x / math.sqrt(first)

    def slope(y: Array, at: float) -> Array:  # dy / dlambda = -sigma dy / dsigma = x_0_hat - y
        alpha_bar = 1 / (1 + math.exp(-2 * at))
        return mixture_oracle(y * math.sqrt(alpha_bar), alpha_bar) - y

    for i in range(steps):
        at = lam[0] + i * h
        k1 = slope(y, at)
        k2 = slope(y + h / 2 * k1, at + h / 2)
        k3 = slope(y + h / 2 * k2, at + h / 2)
        k4 = slope(y + h * k3, at + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * math.sqrt(last)


START = np.linspace(-1.9, 1.9, 20)
TRUTH = flow(START, even(9).alpha_bar[0], even(9).alpha_bar[-1])


def error_of(sampler: str, num: int, change: Callable[[Table], None] | None = None, **options: Any) -> float:
    """How far the state before the last step (which goes to sigma 0) is from the ODE's."""
    table = make_table(even(num), sampler=sampler, prediction="x_0", clip_range=None, **options)
    if change is not None:
        table.rows.flags.writeable = True
        change(table)
    # The last row has the last level; the state it is given is compared.
    return float(np.abs(run(table, mixture_oracle, START)[-2] - TRUTH).mean())


def order_of(sampler: str, change: Callable[[Table], None] | None = None) -> float:
    return math.log2(error_of(sampler, 81, change) / error_of(sampler, 161, change))


def test_the_oracle_s_flow_is_right_for_a_gaussian() -> None:
    """One mode has a solution in closed form: y keeps its distance from the mean in units of sqrt(s^2 + sigma^2)."""
    first, last = 0.01, 0.99
    table = make_table(even(400), sampler="dpmpp_2m", prediction="x_0", clip_range=None)
    states = run(table, gaussian_oracle, START)
    a = even(400).alpha_bar
    deviation = np.sqrt(a * DEVIATION**2 + 1 - a)
    exact = np.sqrt(a[-1]) * MEANS[0] + (START - np.sqrt(a[0]) * MEANS[0]) * deviation[-1] / deviation[0]
    assert np.abs(states[-2] - exact).max() < 2e-4
    assert np.allclose(flow(flow(START, first, last), last, first), START, atol=1e-6)


@pytest.mark.parametrize("sampler", ORDERS)
def test_orders(sampler: str) -> None:
    assert order_of(sampler) == pytest.approx(ORDERS[sampler], abs=0.2)
    assert sampler == "ddim" or error_of(sampler, 41) < 0.25 * error_of("ddim", 41)


def test_the_corrector_pays() -> None:
    assert error_of("unipc", 21) < error_of("dpmpp_2m", 21)


def wrong(name: str, factor: float) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table.rows[1:-1, COLUMNS.index(name)] *= factor

    return change


@pytest.mark.parametrize(
    "sampler, change",
    [
        ("dpmpp_2m", wrong("H", -1)),
        ("dpmpp_2m", wrong("H", 0.5)),
        ("unipc", wrong("R2", 0)),
        ("unipc", wrong("H", 0)),
        ("heun", wrong("P1", 0.9)),
        ("heun", wrong("C", 1.01)),
    ],
)
def test_planted_bugs_lose_the_order(sampler: str, change: Callable[[Table], None]) -> None:
    assert order_of(sampler, change) != pytest.approx(ORDERS[sampler], abs=0.2)


def test_steps_taken_for_equal_lose_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced lambdas cannot tell, and smooth ones hardly: every other step is three times as long here."""

    def levels(num: int) -> Levels:
        steps = np.where(np.arange(num - 1) % 2, 3.0, 1.0)
        alpha_bar = 1 / (1 + np.exp(-2 * (np.append(0, np.cumsum(steps)) * 7 / steps.sum() - 4)))
        return Levels(np.linspace(900.0, 10.0, num), alpha_bar, HO.alpha_bar, num)

    truth = flow(START, levels(41).alpha_bar[0], levels(41).alpha_bar[-1])

    def order(sampler: str) -> float:
        errors = [
            np.abs(
                run(make_table(levels(num), sampler=sampler, prediction="x_0"), mixture_oracle, START)[-2] - truth
            ).mean()
            for num in (81, 161)
        ]
        return math.log2(errors[0] / errors[1])

    for sampler, expected in ORDERS.items():
        assert order(sampler) == pytest.approx(expected, abs=0.25), sampler
    right = solvers._multistep

    monkeypatch.setattr(solvers, "_multistep", lambda levels: (*right(levels)[:3], np.sign(right(levels)[3])))
    for sampler in ("dpmpp_2m", "unipc"):
        assert order(sampler) < ORDERS[sampler] - 0.4, sampler


NOISY: list[dict[str, Any]] = [
    {"sampler": "ddpm", "variance": "fixed_small"},
    {"sampler": "ddpm", "variance": "fixed_large"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "dpmpp_2m_sde"},
    {"sampler": "heun", "churn": 20.0},
    {"sampler": "heun"},
    {"sampler": "unipc"},
    {"sampler": "dpmpp_2m"},
]


@pytest.mark.parametrize("options", NOISY, ids=lambda o: "-".join(map(str, o.values())))
def test_the_distribution_is_reached(options: dict[str, Any]) -> None:
    """Mean and variance of the result go to the data's as the steps get smaller, in proportion or faster."""
    errors = []
    for num in (100, 400):
        levels = even(num, last=7.0)  # sigma 0.001, so that the last step is no matter
        a = levels.alpha_bar[0]
        start = math.sqrt(a) * MEANS[0], a * DEVIATION**2 + 1 - a
        mean, variance = moments(make_table(levels, prediction="x_0", **options), *start, MEANS[0], DEVIATION)
        errors.append(max(abs(mean - MEANS[0]), abs(math.sqrt(variance) - DEVIATION)))
    assert errors[1] < 0.02 * DEVIATION and errors[1] < 0.3 * errors[0] + 1e-5, errors


@pytest.mark.parametrize("options", [{"sampler": "dpmpp_2m_sde"}, {"sampler": "heun", "churn": 20.0}])
def test_a_wrong_factor_of_the_noise_misses_the_variance(options: dict[str, Any]) -> None:
    table = make_table(even(400, last=7.0), prediction="x_0", temperature=1.1, **options)
    _, variance = moments(table, 0.0, 1.0, MEANS[0], DEVIATION)
    assert abs(math.sqrt(variance) - DEVIATION) > 0.02 * DEVIATION


def test_sde_2m_is_better_than_first_order() -> None:
    """Variance against the ancestral step's, which is the first-order solver of the same SDE."""

    def error(sampler: str) -> float:
        levels = even(60)
        a = levels.alpha_bar[0]
        table = make_table(levels, sampler=sampler, prediction="x_0", variance="fixed_small")
        _, variance = moments(table, math.sqrt(a) * MEANS[0], a * DEVIATION**2 + 1 - a, MEANS[0], DEVIATION)
        return abs(math.sqrt(variance) - DEVIATION)

    assert error("dpmpp_2m_sde") < 0.4 * error("ddpm")


def test_first_order_sde_is_the_ancestral_step() -> None:
    """With the x_0_hat before equal to this one, SDE 2M is the posterior mean and the posterior variance."""
    levels = Levels.at(HO, timestep_spacing(1000, 20))
    sde, small = (make_table(levels, sampler=name, variance="fixed_small") for name in ("dpmpp_2m_sde", "ddpm"))
    assert np.allclose(sde.column("C") + sde.column("H"), small.column("C"), rtol=1e-9, atol=1e-12)
    assert np.allclose(sde.column("E"), small.column("E"), rtol=1e-9, atol=1e-12)
    assert np.allclose(sde.column("F"), small.column("F"), rtol=1e-9, atol=1e-12)


def test_multistep_with_equal_estimates_is_ddim() -> None:
    levels = Levels.at(HO, timestep_spacing(1000, 20))
    two, one = (make_table(levels, sampler=name) for name in ("dpmpp_2m", "ddim"))
    assert np.allclose(two.column("C") + two.column("H"), one.column("C"), rtol=1e-9, atol=1e-12)
    assert np.allclose(two.column("E"), one.column("E"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", [name for name, solver in SAMPLERS.items() if solver.to_image])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_the_last_step_returns_its_estimate(sampler: str, num_steps: int) -> None:
    levels = SAMPLERS[sampler].levels(HO, num_steps, "trailing")
    last = dict(zip(COLUMNS, make_table(levels, sampler=sampler).rows[-1], strict=True))
    assert [last[name] for name in "CEHGF"] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("sampler", [name for name, solver in SAMPLERS.items() if solver.to_image])
def test_with_one_image_every_solver_returns_it(sampler: str) -> None:
    levels = SAMPLERS[sampler].levels(HO, 7, "trailing")
    options = {"churn": 5.0} if sampler == "heun" else {}
    table = make_table(levels, sampler=sampler, prediction="x_0", **options)
    z = np.random.default_rng(0).normal(size=(len(table.rows), 4))
    assert np.allclose(run(table, lambda x, a: np.full_like(x, 0.3), np.ones(4), z)[-1], 0.3, atol=1e-12)


def test_inversion_and_ddim_return() -> None:
    """From an image to its x_T and back, the better the more steps."""
    images = np.linspace(-0.9, 1.1, 9)
    errors = []
    for num in (50, 400):
        levels = Levels.at(HO, timestep_spacing(1000, num))
        inverse = make_table(levels, sampler="ddim_inverse", clip_range=None)
        assert inverse.timesteps.tolist() == levels.t[::-1].tolist()
        x = images
        for t, row in zip(inverse.timesteps, inverse.rows, strict=True):
            at = dict(zip(COLUMNS, row, strict=True))
            level = HO.alpha_bar[t]  # what the network is told, though x is of the level before
            eps = (x - math.sqrt(level) * mixture_oracle(x, level)) / math.sqrt(1 - level)
            x = at["C"] * (at["A"] * x + at["B"] * eps) + at["E"] * x
        back = run(make_table(levels, sampler="ddim", clip_range=None), mixture_oracle, x)[-1]
        errors.append(float(np.abs(back - images).max()))
    assert errors[1] < 0.02 and errors[1] < 0.3 * errors[0], errors


# The marginals, whatever is skipped


def check_marginals(rows: Array, alpha_bar_t: Array) -> None:
    """A step made with the true x_0 takes q(x_t | x_0) to q(x_s | x_0): what makes any subset of steps legitimate."""
    alpha_bar_s = np.append(alpha_bar_t[1:], 1.0)
    C, E, F = (rows[:, COLUMNS.index(name)] for name in "CEF")
    assert np.allclose(C + E * np.sqrt(alpha_bar_t), np.sqrt(alpha_bar_s), rtol=1e-9, atol=0), "mean of x_s given x_0"
    variance = E**2 * (1 - alpha_bar_t) + F**2
    assert np.allclose(variance, 1 - alpha_bar_s, rtol=1e-9, atol=1e-15), "variance of x_s given x_0"


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 1000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))),
    st.sampled_from(SPACINGS),
    st.sampled_from(["ddpm", "ddim"]),
    st.floats(0, 1),
)
def test_respacing_keeps_the_marginals(
    name: str, sizes: tuple[int, int], spacing: str, sampler: str, eta: float
) -> None:
    schedule = NoiseSchedule.from_name(name, sizes[0])
    steps = timestep_spacing(*sizes, spacing)
    options = {"eta": eta} if sampler == "ddim" else {"variance": "fixed_small"}
    rows = coefficient_rows(schedule, steps, sampler=sampler, **options)  # type: ignore[arg-type]
    assert rows.shape == (sizes[1], len(COLUMNS)) and np.isfinite(rows.astype(np.float32)).all()
    check_marginals(rows, schedule.alpha_bar[steps])


SIGMA_BUGS: dict[str, Callable[[Array], Array]] = {
    "sigma of the next step": lambda F: np.append(F[1:], 0.0),
    "sigma of the step before": lambda F: np.append(F[0], F[:-1]),
    "variance in place of sigma": lambda F: F**2,
}


@pytest.mark.parametrize("bug", SIGMA_BUGS)
def test_a_wrong_sigma_fails(bug: str) -> None:
    steps = timestep_spacing(1000, 25)
    for options in ({"sampler": "ddpm", "variance": "fixed_small"}, {"sampler": "ddim", "eta": 1.0}):
        rows = coefficient_rows(HO, steps, **options).copy()  # type: ignore[arg-type]
        rows[:, COLUMNS.index("F")] = SIGMA_BUGS[bug](rows[:, COLUMNS.index("F")])
        with pytest.raises(AssertionError, match="variance of x_s"):
            check_marginals(rows, HO.alpha_bar[steps])


def test_alpha_bar_shifted_by_one_fails() -> None:
    steps = timestep_spacing(1000, 25)
    with pytest.raises(AssertionError, match="mean of x_s"):
        check_marginals(coefficient_rows(HO, steps - 1, variance="fixed_small"), HO.alpha_bar[steps])


# Learned variance


def test_learned_range_is_between_the_logarithms_of_the_skipped_process() -> None:
    """Against betas made anew for the kept timesteps alone, as improved DDPM's code respaces."""
    steps = timestep_spacing(1000, 25)
    table = make_table(Levels.at(HO, steps), variance="learned_range")
    kept = steps[::-1]
    beta = 1 - HO.alpha_bar[kept] / np.append(1.0, HO.alpha_bar[kept[:-1]])
    respaced = NoiseSchedule.from_betas(beta)
    assert np.allclose(table.column("log_max")[::-1], np.log(beta), rtol=1e-10)
    assert np.allclose(table.column("log_min")[::-1], respaced.posterior_log_variance, rtol=1e-8)
    assert table.column("F").tolist() == [1.0] * 24 + [0.0] and table.learned
    whole = make_table(Levels.at(HO, np.arange(999, -1, -1)), variance="learned_range")
    assert np.allclose(whole.column("log_min")[::-1], HO.posterior_log_variance, rtol=1e-8)
    alone = make_table(Levels.at(HO, [999]), variance="learned_range")
    assert np.isfinite(alone.column("log_min")).all()


# Zero terminal SNR


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("error")
def test_from_pure_noise_all_rows_are_finite(sampler: str, prediction: str, num_steps: int, spacing: str) -> None:
    if num_steps == 1 and spacing != "trailing" and sampler != "heun":
        with pytest.raises(ConfigError, match=f"spacing is {spacing}: a single step .* take trailing"):
            SAMPLERS[sampler].levels(ZERO_SNR, num_steps, spacing)
        return
    levels = SAMPLERS[sampler].levels(ZERO_SNR, num_steps, spacing)  # type: ignore[arg-type]
    for options in ({"variance": v} for v in ("fixed_small", "fixed_large", "learned_range")):
        rows = make_table(levels, sampler=sampler, prediction=prediction, **options).rows.astype(np.float32)
        limits = [COLUMNS.index("lo"), COLUMNS.index("hi")]
        assert np.isfinite(np.delete(rows, limits, axis=1)).all()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.filterwarnings("error")
def test_all_steps_are_finite_numbers_of_float32(sampler: str, name: str) -> None:
    for num_timesteps, zero_snr in ((1000, False), (1000, True), (1, False)):
        prediction = "v" if zero_snr else "eps"
        process = ProcessConfig(
            schedule=name, num_timesteps=num_timesteps, zero_terminal_snr=zero_snr, prediction=prediction
        )
        schedule = process.noise_schedule()
        assert (schedule.alpha_bar[-1] == 0) == zero_snr
        for num_steps in {num_timesteps, 1}:
            levels = SAMPLERS[sampler].levels(schedule, num_steps, "trailing")
            rows = make_table(levels, sampler=sampler, prediction=prediction).rows.astype(np.float32)
            assert np.isfinite(rows).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_pure_noise_is_the_limit_of_almost_pure_noise(sampler: str) -> None:
    almost = SimpleNamespace(num_timesteps=10, alpha_bar=np.append(ZERO_SNR.alpha_bar[:-1], 1e-24))
    rows = [make_table(Levels.at(s, [9, 6, 3, 0]), sampler=sampler, prediction="v").rows for s in (ZERO_SNR, almost)]  # type: ignore[arg-type]
    # What goes with 1 / lambda, of which almost pure noise has 27 only, is not yet 0.
    assert np.allclose(rows[0], rows[1], atol=0.03)


def test_eps_says_nothing_about_pure_noise() -> None:
    for sampler in ("ddpm", "dpmpp_2m"):
        with pytest.raises(ConfigError, match="at timestep 9, where alpha_bar is 0"):
            make_table(Levels.at(ZERO_SNR, [9, 4]), sampler=sampler)  # type: ignore[arg-type]
    make_table(Levels.at(ZERO_SNR, [8, 4]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="heun cannot start"):
        make_table(Levels.at(ZERO_SNR, [9, 4]), sampler="heun", prediction="v")  # type: ignore[arg-type]


# EDM's grid


def test_karras_levels_by_hand() -> None:
    levels = solvers.karras(HO, 5, "trailing")
    sigma = np.sqrt((1 - levels.alpha_bar) / levels.alpha_bar)
    ends = np.sqrt((1 - HO.alpha_bar[[999, 0]]) / HO.alpha_bar[[999, 0]])
    assert np.allclose(sigma[[0, -1]], ends, rtol=1e-9)
    assert np.allclose(np.diff(sigma ** (1 / 7)), np.diff(sigma ** (1 / 7))[0], rtol=1e-9)
    assert levels.t[0] == pytest.approx(999) and levels.t[-1] == pytest.approx(0, abs=1e-9)
    # Between timesteps log sigma is interpolated.
    whole = Levels.at(HO, [700, 699, 20])
    assert np.allclose(whole.timestep(np.sqrt((1 - whole.alpha_bar) / whole.alpha_bar)), [700, 699, 20], atol=1e-9)
    middle = math.sqrt(np.prod(np.sqrt((1 - whole.alpha_bar[:2]) / whole.alpha_bar[:2])))
    assert whole.timestep(np.array([middle])) == pytest.approx(699.5)


def test_heun_takes_two_evaluations_a_step_and_one_at_the_end() -> None:
    for num in (1, 2, 9):
        table = make_table(solvers.karras(HO, num, "trailing"), sampler="heun")
        assert len(table.rows) == 2 * num - 1 and table.evaluations == 2
        assert (table.timesteps[1::2] == table.timesteps[2::2]).all()


def test_churn_raises_the_level_and_the_noise_fills_it() -> None:
    """x with the noise of its level, given the true image, has that of the raised level after the second evaluation."""
    num, churn = 12, 3.0
    levels = solvers.karras(HO, num, "trailing")
    sigma = np.sqrt((1 - levels.alpha_bar) / levels.alpha_bar)
    table = make_table(levels, sampler="heun", churn=churn)
    raised = np.sqrt((1 - table.alpha_bar) / table.alpha_bar)[2::2]
    assert np.allclose(raised, sigma[1:] * (1 + churn / num), rtol=1e-9)
    assert np.allclose(table.column("F")[1::2], np.sqrt((raised**2 - sigma[1:] ** 2) / (1 + raised**2)), rtol=1e-9)
    assert np.allclose(table.timesteps[2::2], levels.timestep(raised), rtol=1e-9)
    most = make_table(levels, sampler="heun", churn=1e9)
    assert np.allclose(np.sqrt((1 - most.alpha_bar) / most.alpha_bar)[2::2], sigma[1:] * math.sqrt(2), rtol=1e-9)


# Options


def test_guidance_acts_in_its_interval() -> None:
    levels = Levels.at(HO, [999, 700, 500, 300, 0])
    assert make_table(levels, guidance=3.0).column("W").tolist() == [3.0] * 5
    table = make_table(levels, guidance=3.0, guidance_interval=(0.3, 0.7))
    assert table.column("W").tolist() == [1.0, 3.0, 3.0, 3.0, 1.0]


def test_temperature_scales_the_noise_alone() -> None:
    levels = Levels.at(HO, timestep_spacing(1000, 9))
    for options in ({"variance": "fixed_large"}, {"sampler": "dpmpp_2m_sde"}, {"variance": "learned_range"}):
        full, half = (make_table(levels, temperature=t, **options) for t in (1.0, 0.5))  # type: ignore[arg-type]
        assert np.array_equal(half.column("F"), 0.5 * full.column("F"))
        others = [i for i, name in enumerate(COLUMNS) if name != "F"]
        assert np.array_equal(half.rows[:, others], full.rows[:, others])


def test_a_start_further_down_keeps_its_rows() -> None:
    """What a history needs is made anew; from the third row on the rows are those of the whole run."""
    levels = Levels.at(HO, timestep_spacing(1000, 12))
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        whole, part = (make_table(part, sampler=sampler).rows for part in (levels, levels.start(4)))
        assert np.array_equal(part[2:], whole[6:]) and not np.array_equal(part[0], whole[4])
    churned = solvers.karras(HO, 12, "trailing")
    whole, part = (make_table(part, sampler="heun", churn=6.0).rows for part in (churned, churned.start(4)))
    assert np.allclose(part[2:], whole[10:], rtol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "sampler is 'euler': valid are ddpm, ddim, ddim_inverse, dpmpp_2m, dpmpp_2m_sde, heun"),
        ({"eta": 0.5}, "eta is 0.5 and the sampler is ddpm: only ddim has it"),
        ({"sampler": "unipc", "eta": 0.5}, "eta is 0.5 and the sampler is unipc"),
        ({"sampler": "ddim", "churn": 1.0}, "churn is 1.0 and the sampler is ddim: only heun has it"),
        ({"sampler": "heun", "churn": -1.0}, "churn is -1.0"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"clip_range": 0.0}, "clip_range is 0.0"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is"),
        ({"variance": "learned"}, "valid are fixed_small, fixed_large, learned_range"),
    ],
)
def test_wrong_values_name_the_valid_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_table(Levels.at(HO, [999, 500]), **options)


def test_tables_are_read_only() -> None:
    rows = coefficient_rows(HO, [999, 500])
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


def test_names_are_unique() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS) == 20
    for a, b in itertools.combinations(SAMPLERS, 2):
        assert SAMPLERS[a].rows is not SAMPLERS[b].rows
