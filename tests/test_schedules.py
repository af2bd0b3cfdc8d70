"""Schedules and their tables: against high-precision products, diffusers, Bayes by quadrature, and the bound itself."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.errors import ConfigError
from fastddpm.schedules import PREDICTIONS, SCHEDULES, NoiseSchedule, zero_terminal_snr

NAMES = sorted(SCHEDULES)
HO = NoiseSchedule.from_name("linear", 1000)


def mutant(schedule: NoiseSchedule, **tables: np.ndarray) -> NoiseSchedule:
    """The schedule with some of its tables replaced, as a bug would."""
    broken = NoiseSchedule(schedule.beta)
    for name, values in tables.items():
        assert not np.array_equal(values, getattr(schedule, name)), f"{name} is not changed"
        setattr(broken, name, values)
    return broken


def shifted_alpha_bar(schedule: NoiseSchedule) -> NoiseSchedule:
    """The bug of taking alpha_bar one step late in the posterior."""
    a, prev, beta = np.append(schedule.alpha_bar[1:], 1e-9), schedule.alpha_bar, schedule.beta
    return mutant(
        schedule,
        posterior_mean_coef1=np.sqrt(prev) * beta / (1 - a),
        posterior_mean_coef2=np.sqrt(schedule.alpha) * (1 - prev) / (1 - a),
        posterior_variance=beta * (1 - prev) / (1 - a),
    )


BUGS: dict[str, Callable[[NoiseSchedule], NoiseSchedule]] = {
    "alpha_bar shifted": shifted_alpha_bar,
    "coefficients swapped": lambda s: mutant(
        s, posterior_mean_coef1=s.posterior_mean_coef2, posterior_mean_coef2=s.posterior_mean_coef1
    ),
    "variance beta": lambda s: mutant(s, posterior_variance=s.beta),
    "variance of the next index": lambda s: mutant(
        s, posterior_variance=np.append(s.posterior_variance[1:], s.posterior_variance[-1])
    ),
}


# Tables


def check_tables(schedule: NoiseSchedule) -> None:
    """Compare with products of 60 digits, from the betas alone."""
    with localcontext() as context:
        context.prec = 60
        alpha_bar = Decimal(1)
        for t, beta in enumerate(schedule.beta.tolist()):
            b, prev = Decimal(beta), alpha_bar
            alpha_bar *= 1 - b
            exact = {
                "alpha": 1 - b,
                "alpha_bar": alpha_bar,
                "alpha_bar_prev": prev,
                "sqrt_alpha_bar": alpha_bar.sqrt(),
                "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
                "posterior_mean_coef1": prev.sqrt() * b / (1 - alpha_bar),
                "posterior_mean_coef2": (1 - b).sqrt() * (1 - prev) / (1 - alpha_bar),
                "posterior_variance": b * (1 - prev) / (1 - alpha_bar),
                "snr": alpha_bar / (1 - alpha_bar),
            }
            # float64 keeps alpha_bar to 1e-16 per factor; 1 - alpha_bar loses what alpha_bar_0 is closer to 1.
            rtol = 4e-16 * (t + 2) * (1 + 1 / (1 - schedule.alpha_bar[0]))
            for name, value in exact.items():
                assert getattr(schedule, name)[t] == pytest.approx(float(value), rel=rtol, abs=0), f"{name}[{t}]"


@pytest.mark.parametrize("num_timesteps", [1, 2, 30, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_tables_against_high_precision(name: str, num_timesteps: int) -> None:
    check_tables(NoiseSchedule.from_name(name, num_timesteps))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_tables(bug: str) -> None:
    with pytest.raises(AssertionError):
        check_tables(BUGS[bug](NoiseSchedule.from_name("cosine", 30)))


@pytest.mark.parametrize(
    "name, theirs",
    [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid"), ("quadratic", "scaled_linear")],
)
def test_schedules_against_diffusers(name: str, theirs: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for num_timesteps in (10, 100, 1000):
        schedule = NoiseSchedule.from_name(name, num_timesteps)
        options = {"beta_start": 0.1 / num_timesteps, "beta_end": 20 / num_timesteps}
        if name != "cosine" and num_timesteps == 10:
            continue  # beta_end would be 2: ours is cut, theirs is not a variance
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=num_timesteps, beta_schedule=theirs, **options)
        # Theirs is float32: an ulp or two per beta, subtraction and product, carried along by the product.
        # The square of a root doubles the root's errors.
        bound = np.cumsum(2.0**-24 * (4 + (8 if name == "quadratic" else 4) * schedule.beta / schedule.alpha))
        error = np.abs(scheduler.alphas_cumprod.double().numpy() / schedule.alpha_bar - 1)
        assert (error <= bound).all(), f"T = {num_timesteps}: {(error / bound).max():.2f} of the float32 bound"


def test_facts_of_the_papers() -> None:
    assert HO.beta[0] == 1e-4 and HO.beta[-1] == 0.02
    assert HO.alpha_bar[-1] == pytest.approx(4.04e-5, rel=2e-3)  # Ho et al.: the prior is all but reached
    assert HO.posterior_log_variance[0] == pytest.approx(-9.82, abs=5e-3)
    half = NoiseSchedule.from_name("cosine", 1000).alpha_bar[499]  # improved DDPM, figure 5
    assert half == pytest.approx(math.cos((0.508 / 1.008) * math.pi / 2) ** 2, abs=1e-4)
    assert NoiseSchedule.from_name("cosine", 1000).beta.max() == 0.999


def test_scaled_schedules_do_not_depend_on_t_but_for_resolution() -> None:
    for name in ("linear", "sigmoid", "quadratic"):
        ends = [math.log(NoiseSchedule.from_name(name, n).alpha_bar[-1]) for n in (200, 1000, 4000)]
        assert max(ends) - min(ends) < 0.1 * abs(ends[1]), (name, ends)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), st.integers(1, 5000))
def test_properties_of_every_schedule(name: str, num_timesteps: int) -> None:
    schedule = NoiseSchedule.from_name(name, num_timesteps)
    assert schedule.num_timesteps == len(schedule.beta) == num_timesteps
    assert ((schedule.beta > 0) & (schedule.beta <= 0.999)).all()
    assert (np.diff(schedule.beta) >= -1e-15).all()
    assert ((schedule.alpha_bar > 0) & (schedule.alpha_bar < 1)).all()
    assert (np.diff(schedule.alpha_bar) < 0).all() and (np.diff(schedule.snr) < 0).all()
    assert schedule.alpha_bar_prev[0] == 1 and schedule.posterior_variance[0] == 0
    assert (schedule.posterior_variance <= schedule.beta).all()
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1, abs=1e-9) and schedule.posterior_mean_coef2[0] == 0
    assert np.isfinite(schedule.posterior_log_variance).all()
    for table in schedule.TABLES:
        assert np.isfinite(schedule.table(table).numpy()).all()
    # No level is lost in float32, neither the first noise nor the last signal.
    assert (schedule.table("sqrt_one_minus_alpha_bar") > 0).all() and (schedule.table("sqrt_alpha_bar") > 0).all()


def test_device_tables_are_rounded_once_and_kept() -> None:
    table = HO.table("sqrt_one_minus_alpha_bar", "cpu")
    assert table.dtype == torch.float32 and table is HO.table("sqrt_one_minus_alpha_bar", torch.device("cpu"))
    assert np.array_equal(table.numpy(), HO.sqrt_one_minus_alpha_bar.astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        HO.beta[0] = 1
    with pytest.raises(ValueError, match="sqrt_alpha_bar"):
        HO.table("_tables")


def test_variances() -> None:
    small, large = HO.variance("fixed_small"), HO.variance("fixed_large")
    assert np.allclose(small[1:], HO.posterior_variance[1:], rtol=1e-14) and np.array_equal(large[1:], HO.beta[1:])
    assert small[0] == large[0] == pytest.approx(HO.posterior_variance[1], rel=1e-14)
    assert NoiseSchedule([0.3]).variance("fixed_large").tolist() == pytest.approx([0.3])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NoiseSchedule.from_name("cosin"), "cosin.*linear, cosine, sigmoid"),
        (lambda: NoiseSchedule.from_name("linear", 0), "num_timesteps is 0"),
        (lambda: NoiseSchedule.from_name("linear", cast(int, 2.5)), "num_timesteps is 2.5"),
        (lambda: NoiseSchedule.from_name("linear", True), "num_timesteps is True"),
        (lambda: NoiseSchedule.from_name("linear", 10, s=1), "no option 's': valid are beta_start, beta_end"),
        (lambda: NoiseSchedule.from_name("linear", 10, beta_start=0.0), "beta_start is 0.0"),
        (lambda: NoiseSchedule.from_name("linear", 10, beta_start=0.5, beta_end=0.1), "beta_end 0.1"),
        (lambda: NoiseSchedule.from_name("sigmoid", 10, beta_end=float("nan")), "nan"),
        (lambda: NoiseSchedule.from_name("cosine", 10, s=-1), "s is -1"),
        (lambda: NoiseSchedule.from_name("cosine", 10, max_beta=1.0), "max_beta 1.0"),
        (lambda: NoiseSchedule.from_name("linear", 1000, beta_end=0.9), "alpha_bar falls to"),
        (lambda: NoiseSchedule([]), "shape"),
        (lambda: NoiseSchedule([[0.1]]), "shape"),
        (lambda: NoiseSchedule([1.0, 0.1]), "index 0 is 1.0"),
        (lambda: NoiseSchedule([0.1, 1.5]), "index 1 is 1.5"),
        (lambda: NoiseSchedule([0.99] * 40 + [1.0]), "alpha_bar falls to 1e-80"),
        (lambda: zero_terminal_snr([0.1]), "at least 2 timesteps"),
        (lambda: NoiseSchedule([0.1, 1.0]).check_prediction("eps"), "the last alpha_bar is 0.*valid are v, x_0"),
        (lambda: NoiseSchedule([0.1, 1.0]).predict_x_0(torch.zeros(1), 0, torch.zeros(1)), "the last alpha_bar is 0"),
        (lambda: NoiseSchedule([0.1, -0.1]), "index 1 is -0.1"),
        (lambda: NoiseSchedule([1e-20]), "index 0 is 1e-20"),
        (lambda: NoiseSchedule([float("nan")]), "index 0 is nan"),
        (lambda: HO.variance("learned_range"), "learned_range.*fixed_small, fixed_large"),
        (lambda: HO.predict_x_0(torch.zeros(1), 0, torch.zeros(1), "epsilon"), "epsilon.*eps, x_0, v"),
    ],
)
def test_wrong_values_name_the_valid_ones(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# Zero terminal SNR


@pytest.mark.parametrize("num_timesteps", [2, 30, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_is_algorithm_1(name: str, num_timesteps: int) -> None:
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    plain = NoiseSchedule.from_name(name, num_timesteps)
    betas = zero_terminal_snr(plain.beta)
    theirs = ddpm.rescale_zero_terminal_snr(torch.tensor(plain.beta)).numpy()
    # Both take 1 - alpha: its rounding is that of numbers near 1.
    assert np.allclose(betas, theirs, rtol=1e-9, atol=4e-16)
    schedule = NoiseSchedule(betas)
    root, before = schedule.sqrt_alpha_bar, plain.sqrt_alpha_bar
    assert root[-1] == schedule.snr[-1] == 0 and root[0] == pytest.approx(before[0], rel=1e-15)
    # Affine in sqrt(alpha_bar): what lies between moves in proportion.
    affine = before[0] * (before - before[-1]) / (before[0] - before[-1])
    assert np.allclose(root, affine, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_pure_noise_are_finite_and_right(name: str) -> None:
    schedule = NoiseSchedule(zero_terminal_snr(NoiseSchedule.from_name(name, 40).beta))
    check_tables(schedule)
    for table in schedule.TABLES:
        assert np.isfinite(schedule.table(table).numpy()).all(), table
    check_posterior(schedule, last=39)
    # Given x_0, pure noise says nothing: q(x_{T-2} | x_{T-1}, x_0) = q(x_{T-2} | x_0).
    x_0, x_t = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-1.9]], dtype=torch.float64)
    mean, variance = schedule.q_posterior(x_0, x_t, 39)
    q_mean, q_variance = schedule.q_mean_variance(x_0, 38)
    torch.testing.assert_close(mean, q_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, q_variance, rtol=1e-12, atol=0)
    for kind in ("fixed_small", "fixed_large"):
        check_bound(schedule, 0.4, kind)


def test_a_planted_bug_fails_zero_terminal_snr() -> None:
    """alpha_bar shifted in place of its root: the ends are right, the betas between are not."""
    alpha_bar = HO.alpha_bar
    wrong = (alpha_bar - alpha_bar[-1]) * (alpha_bar[0] / (alpha_bar[0] - alpha_bar[-1]))
    assert not np.allclose(np.append(HO.beta[0], 1 - wrong[1:] / wrong[:-1]), zero_terminal_snr(HO.beta), rtol=1e-3)


@pytest.mark.parametrize("kind", ["x_0", "v"])
def test_pure_noise_can_be_predicted_from(kind: str) -> None:
    schedule = NoiseSchedule(zero_terminal_snr(HO.beta))
    x_0, eps = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = {"x_0": x_0, "v": -x_0}[kind]  # v = 0 eps - 1 x_0
    torch.testing.assert_close(schedule.predict_x_0(eps, 999, prediction, kind), x_0)
    torch.testing.assert_close(schedule.predict_eps(eps, 999, prediction, kind), eps)


# The derivation


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_the_chain(name: str) -> None:
    """T Gaussian steps add up to one: moments of x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z, step by step."""
    schedule = NoiseSchedule.from_name(name, 200)
    x_0 = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    mean, variance = x_0.clone(), 0.0
    for t, beta in enumerate(schedule.beta.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        q_mean, q_variance = schedule.q_mean_variance(x_0, t)
        torch.testing.assert_close(q_mean, mean, rtol=1e-12, atol=0)
        assert float(q_variance) == pytest.approx(variance, rel=1e-11)


def check_posterior(schedule: NoiseSchedule, last: int | None = None) -> None:
    """q(x_{t-1} | x_t, x_0) against q(x_t | x_{t-1}) q(x_{t-1} | x_0) on a grid; only the betas are taken on trust.

    The trapezoid rule is exact to rounding for a Gaussian sampled three times per standard deviation over +-12 of them.
    """
    for t in range(1, last or schedule.num_timesteps):
        beta = float(schedule.beta[t])
        alpha_bar_prev = math.prod(1 - float(b) for b in schedule.beta[:t])
        for x_0, x_t in ((0.8, 0.5), (-0.9, 1.3)):
            x_s_mean, x_s_sd = math.sqrt(alpha_bar_prev) * x_0, math.sqrt(1 - alpha_bar_prev)
            step_mean, step_sd = x_t / math.sqrt(1 - beta), math.sqrt(beta / (1 - beta))
            low = min(x_s_mean - 12 * x_s_sd, step_mean - 12 * step_sd)
            high = max(x_s_mean + 12 * x_s_sd, step_mean + 12 * step_sd)
            x, width = np.linspace(low, high, 20001, retstep=True)
            assert width < min(x_s_sd, step_sd) / 6  # the product is narrower than either, by at most sqrt(2) if equal
            log_p = -((x - x_s_mean) ** 2) / (2 * x_s_sd**2) - (x - step_mean) ** 2 / (2 * step_sd**2)
            p = np.exp(log_p - log_p.max())
            p /= p.sum()
            mean = (p * x).sum()
            variance = (p * (x - mean) ** 2).sum()
            q_mean, q_variance = schedule.q_posterior(
                torch.tensor([x_0], dtype=torch.float64), torch.tensor([x_t], dtype=torch.float64), t
            )
            assert float(q_mean) == pytest.approx(mean, rel=1e-9, abs=1e-9), f"mean at t = {t}"
            assert float(q_variance) == pytest.approx(variance, rel=1e-9), f"variance at t = {t}"


@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_is_bayes(name: str) -> None:
    check_posterior(NoiseSchedule.from_name(name, 40))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_bayes(bug: str) -> None:
    with pytest.raises(AssertionError, match="at t = "):
        check_posterior(BUGS[bug](NoiseSchedule.from_name("linear", 40)))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_are_one_another(kind: str) -> None:
    """x_0, eps and v of the same x_t lead to the same x_0_hat and eps_hat, at every t."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(HO.num_timesteps)
    x_0, eps = torch.randn(2, len(t), 1, 2, 3, generator=generator, dtype=torch.float64)
    mean, variance = HO.q_mean_variance(x_0, t)
    x_t = mean + variance.sqrt() * eps
    prediction = {"eps": eps, "x_0": x_0, "v": mean / x_0 * eps - variance.sqrt() * x_0}[kind]
    torch.testing.assert_close(HO.predict_x_0(x_t, t, prediction, kind), x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(HO.predict_eps(x_t, t, prediction, kind), eps, rtol=0, atol=1e-11)
    # An int is the same as that int for every sample.
    torch.testing.assert_close(
        HO.predict_x_0(x_t[7:8], 7, prediction[7:8], kind), HO.predict_x_0(x_t, t, prediction, kind)[7:8]
    )


def test_low_precision_images_do_not_make_the_tables_coarse() -> None:
    """In bf16, alpha_bar of the first steps is 1 and their noise nothing: the tables stay float32."""
    t = torch.arange(1000)
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    mean, variance = HO.q_mean_variance(x, t)
    assert mean.dtype == variance.dtype == torch.float32
    assert np.allclose(variance[:, 0].numpy(), 1 - HO.alpha_bar, rtol=1e-6)


def log_normal_mean(second_moment: float, variance: float) -> float:
    """E log N(y; m, variance) where E (y - m)^2 = second_moment."""
    return -0.5 * math.log(2 * math.pi * variance) - second_moment / (2 * variance)


def check_bound(schedule: NoiseSchedule, x_0: float, kind: str) -> None:
    """E_q log p(x_{0:T}) / q(x_{1:T} | x_0), summed along the chain, is L_T, the KL terms and L_0 added up.

    One pixel; the network is the best one for data N(0.2, 0.3^2), so that everything is Gaussian and exact. The left
    side uses the betas and the model alone, the right side the posterior's tables.
    """
    mu, s2, beta = 0.2, 0.09, schedule.beta
    alpha_bar = np.cumprod(1 - beta)
    variance = schedule.variance(kind)
    # p(x_{t-1} | x_t) = N(slope x_t + offset, variance): eq. 7 at the x_0_hat which the best network gives.
    gain = np.sqrt(alpha_bar) * s2 / (alpha_bar * s2 + 1 - alpha_bar)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    coef1 = np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    coef2 = np.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    slope, offset = coef1 * gain + coef2, coef1 * (mu - gain * np.sqrt(alpha_bar) * mu)

    chain, sum_of_terms = 0.0, 0.0
    mean, var = x_0, 0.0  # of x_{t-1} given x_0
    for t in range(schedule.num_timesteps):
        alpha = 1 - float(beta[t])
        next_mean, next_var, covariance = math.sqrt(alpha) * mean, alpha * var + beta[t], math.sqrt(alpha) * var
        # E (x_{t-1} - slope x_t - offset)^2 under the joint of x_{t-1} and x_t
        spread = var - 2 * slope[t] * covariance + slope[t] ** 2 * next_var
        second = spread + (mean - slope[t] * next_mean - offset[t]) ** 2
        chain += log_normal_mean(second, variance[t]) - log_normal_mean(beta[t], beta[t])
        if t == 0:
            sum_of_terms += log_normal_mean(second, variance[0])
        else:
            q_slope, q_offset = schedule.posterior_mean_coef2[t], schedule.posterior_mean_coef1[t] * x_0
            gap = (q_slope - slope[t]) ** 2 * next_var
            gap += ((q_slope - slope[t]) * next_mean + q_offset - offset[t]) ** 2
            ratio = schedule.posterior_variance[t] / variance[t]
            sum_of_terms -= 0.5 * (ratio - 1 - math.log(ratio) + gap / variance[t])
        mean, var = next_mean, next_var
    prior = 0.5 * (var - 1 - math.log(var) + mean**2)
    chain += log_normal_mean(var + mean**2, 1.0)
    sum_of_terms -= prior
    assert sum_of_terms == pytest.approx(chain, abs=1e-9), f"{kind}: the terms add up to {sum_of_terms}, not {chain}"

    # The bound is below the model's own log p(x_0), here a Gaussian that the chain of p leads to.
    mean, var = 0.0, 1.0
    for t in reversed(range(schedule.num_timesteps)):
        mean, var = slope[t] * mean + offset[t], slope[t] ** 2 * var + variance[t]
    log_p = log_normal_mean((x_0 - mean) ** 2, var)
    assert chain <= log_p + 1e-9, "the bound is above the likelihood"


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", NAMES)
def test_the_terms_add_up_to_the_bound(name: str, kind: str) -> None:
    for num_timesteps in (2, 25):
        check_bound(NoiseSchedule.from_name(name, num_timesteps), 0.4, kind)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_bound(bug: str) -> None:
    with pytest.raises(AssertionError, match="add up"):
        check_bound(BUGS[bug](NoiseSchedule.from_name("linear", 25)), 0.4, "fixed_large")


def test_the_prior_term_is_negligible() -> None:
    """L_T of the standard schedule is about 1e-5 bits per dimension: x_T may be drawn from N(0, I)."""
    a = HO.alpha_bar[-1]
    mean_square = 0.27  # of CIFAR-10's pixels in -1 .. 1
    bits = 0.5 * (a * mean_square - a - math.log1p(-a)) / math.log(2)
    assert 5e-6 < bits < 3e-5
