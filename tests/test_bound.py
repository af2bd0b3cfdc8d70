"""The bound: its terms against formulas written anew in float64, and the bound of a Gaussian whose log p is known."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import bound
from fastddpm.bound import (
    Network,
    Stratum,
    bound_terms,
    decoder_log_likelihood,
    draw_in_stratum,
    make_strata,
    prior_term,
    reverse_log_variance,
    vlb_term,
)
from fastddpm.diffusion import ProcessConfig
from fastddpm.errors import ConfigError
from fastddpm.schedules import PREDICTIONS, NoiseSchedule
from fastddpm_kernels import Stream, draw_normal

SHAPE = (2, 3, 5)
SEED = 2**40 + 9
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def bytes_of(n: int, seed: int = 0) -> Tensor:
    x_0 = torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x_0[:, 0, 0, 0], x_0[:, 0, 0, 1] = 0, 255  # both open bins
    return x_0


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(config: ProcessConfig, t: Tensor, *, error: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Arguments of vlb_term with a prediction that is the target and an error."""
    schedule = config.noise_schedule()
    x_0 = bytes_of(len(t), seed)
    clean, eps = x_0.double() / 127.5 - 1, normal(len(t), *SHAPE, seed=seed)
    mean, variance = schedule.q_mean_variance(clean, t)
    alpha = torch.tensor(schedule.sqrt_alpha_bar)[t].view(-1, 1, 1, 1)
    target = {"eps": eps, "x_0": clean, "v": alpha * eps - variance.sqrt() * clean}[config.prediction]
    prediction = target + error * normal(len(t), *SHAPE, seed=seed + 1)
    if config.variance == "learned_range":
        prediction = torch.cat((prediction, normal(len(t), *SHAPE, seed=seed + 2).clamp(-1.2, 1.2)), dim=1)
    return {
        "config": config,
        "schedule": schedule,
        "x_0": x_0,
        "x_t": mean + variance.sqrt() * eps,
        "t": t,
        "prediction": prediction,
    }


def bin_mass(level: int, mean: float, variance: float) -> float:
    """log of the mass of a level's bin by mpmath, in the tail where it can be had."""
    with mpmath.workdps(60):
        x, sigma = mpmath.mpf(level) / mpmath.mpf("127.5") - 1 - mpmath.mpf(mean), mpmath.sqrt(variance)
        low = -mpmath.inf if level == 0 else (x - mpmath.mpf(1) / 255) / sigma
        high = mpmath.inf if level == 255 else (x + mpmath.mpf(1) / 255) / sigma
        if low > 0:
            low, high = -high, -low
        return float(mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low)))


def independent(config: ProcessConfig, x_0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, **_: Any) -> np.ndarray:
    """The terms as guided-diffusion states them: two means, two log variances, the KL of two Gaussians."""
    beta = config.noise_schedule().beta
    alpha_bar = np.cumprod(1 - beta)
    before = np.append(1.0, alpha_bar)[:-1]
    posterior = beta * (1 - before) / (1 - alpha_bar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    results = []
    for x, noisy, step, output in zip(x_0, x_t.numpy(), t.tolist(), prediction.numpy(), strict=True):
        clean = x.numpy().astype(np.float64) / 127.5 - 1
        value, frac = output[: len(x)], (output[len(x) :] + 1) / 2
        a, b = np.sqrt(alpha_bar[step]), np.sqrt(1 - alpha_bar[step])
        x_0_hat = {"eps": (noisy - b * value) / a, "x_0": value, "v": a * noisy - b * value}[config.prediction]
        if config.clip:
            x_0_hat = np.clip(x_0_hat, -config.clip_range, config.clip_range)
        log_variance = {
            "fixed_small": clipped[step],
            "fixed_large": clipped[0] if step == 0 else np.log(beta[step]),
            "learned_range": frac * np.log(beta[step]) + (1 - frac) * clipped[step],
        }[config.variance]
        log_variance = np.broadcast_to(log_variance, clean.shape)
        if step == 0:
            found = [
                -bin_mass(int(level), mean, math.exp(v))
                for level, mean, v in zip(x.flatten(), x_0_hat.flatten(), log_variance.flatten(), strict=True)
            ]
        else:
            of_clean = np.sqrt(before[step]) * beta[step] / (1 - alpha_bar[step])
            of_noisy = np.sqrt(1 - beta[step]) * (1 - before[step]) / (1 - alpha_bar[step])
            mean_q, mean_p = of_clean * clean + of_noisy * noisy, of_clean * x_0_hat + of_noisy * noisy
            lq = np.log(posterior[step])
            found = 0.5 * (
                -1 + log_variance - lq + np.exp(lq - log_variance) + (mean_q - mean_p) ** 2 / np.exp(log_variance)
            )
        results.append(np.mean(found))
    return np.array(results)


PROCESSES = [
    ProcessConfig(schedule=schedule, num_timesteps=num, prediction=prediction, variance=variance, clip=clip, loss=loss)
    for prediction in PREDICTIONS
    for schedule, num, variance, clip, loss in (
        ("linear", 1000, "fixed_small", True, "simple"),
        ("cosine", 300, "fixed_large", True, "simple"),
        ("sigmoid", 50, "learned_range", False, "hybrid"),
    )
]


@pytest.mark.parametrize("config", PROCESSES, ids=lambda c: f"{c.prediction}-{c.schedule}-{c.variance}")
def test_terms_against_the_formulas_written_anew(config):
    last = config.num_timesteps - 1
    arguments = example(config, torch.tensor([0, 1, 2, last // 2, last, 0]))
    truth = independent(**arguments)
    assert np.allclose(vlb_term(**arguments).numpy(), truth, rtol=1e-9, atol=1e-13)
    low = vlb_term(**{name: v.float() if name in ("x_t", "prediction") else v for name, v in arguments.items()})
    assert low.dtype == torch.float32
    # x_0_hat of t = T - 1 is x_t over a signal of 1e-2 and less: its rounding is what float32 of x_t means.
    assert np.allclose(low.numpy(), truth, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("bug", ["half bin", "closed edge", "variance"])
def test_planted_bugs_in_the_terms_are_seen(bug, monkeypatch):
    arguments = example(ProcessConfig(), torch.tensor([0, 1, 700]))
    if bug == "half bin":
        monkeypatch.setattr(bound, "HALF_BIN", 1 / 127.5)
    elif bug == "closed edge":  # no level is the lowest or the highest
        decoder = decoder_log_likelihood
        monkeypatch.setattr(
            bound, "decoder_log_likelihood", lambda x, mean, v: decoder(x * 0.9, mean - x * 0.1, v.expand_as(x))
        )
    else:
        monkeypatch.setattr(bound, "reverse_log_variance", lambda *a: reverse_log_variance(*a) / 2)
    assert not np.allclose(vlb_term(**arguments).numpy(), independent(**arguments), rtol=1e-3)


@settings(deadline=None, max_examples=60)
@given(mean=st.floats(-1.6, 1.6), log_variance=st.floats(-16.0, 1.0))
def test_the_bins_of_all_levels_make_up_the_whole_line(mean, log_variance):
    log_mass = decoder_log_likelihood(LEVELS, *torch.tensor((mean, log_variance), dtype=torch.float64))
    assert abs(float(log_mass.exp().sum()) - 1) < 1e-9


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_bins_against_quadrature(level):
    mean, sigma = 0.07, 0.3
    centre = level / 127.5 - 1
    ends = (-math.inf if level == 0 else centre - 1 / 255, math.inf if level == 255 else centre + 1 / 255)
    mass = scipy.integrate.quad(lambda x: scipy.stats.norm.pdf(x, mean, sigma), *ends, epsabs=1e-14)[0]
    variance = torch.tensor(sigma**2, dtype=torch.float64)
    found = decoder_log_likelihood(LEVELS[level], torch.tensor(mean, dtype=torch.float64), variance.log())
    assert math.isclose(float(found), math.log(mass), rel_tol=1e-9)


@pytest.mark.parametrize("config", [c for c in PROCESSES if c.prediction != "v"], ids=lambda c: c.variance)
def test_the_gradient_is_that_of_finite_differences(config):
    arguments = example(config, torch.tensor([0, 1, 30]))
    prediction = arguments.pop("prediction").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: vlb_term(**arguments, prediction=p, clip=False), prediction, eps=1e-7, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_finite_far_out(dtype):
    """An untrained network misses x_0 by hundreds of standard deviations of the last step."""
    config = ProcessConfig(
        prediction="x_0", variance="learned_range", loss="vlb", schedule="cosine", num_timesteps=4000
    )
    arguments = example(config, torch.tensor([0] * 6 + [1, 3999]))
    for far in (0.0, 1e-3, 1.0, 30.0):
        scale = torch.tensor((far, far, 1.0, 1.0), dtype=torch.float64).view(1, 4, 1, 1)
        prediction = (arguments["prediction"] * scale).to(dtype).requires_grad_()
        term = vlb_term(**arguments | {"prediction": prediction}, clip=False)
        term.sum().backward()
        assert term.isfinite().all() and prediction.grad is not None and prediction.grad.isfinite().all()


@pytest.mark.parametrize("deviations", [3.0, 1e2, 1e3, 1e4, 1e5])
def test_the_gradient_of_float32_is_right_far_out(deviations):
    """torch's own log_ndtr has a gradient that cancels there: 5 % off at 1e3 deviations, 0 at 1e6."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        log_variance = torch.tensor(-9.82, dtype=dtype)
        mean = (torch.tensor([0.1, -0.1], dtype=dtype) * deviations * math.exp(-4.91)).requires_grad_()
        x_0 = torch.tensor([1 / 255, -1 / 255], dtype=dtype)
        (gradient,) = torch.autograd.grad(decoder_log_likelihood(x_0, mean, log_variance).sum(), mean)
        gradients.append(gradient.double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_gradients_are_finite_where_x_0_hat_is_huge(variance):
    """eps of a short schedule: x_t / sqrt(alpha_bar) is far from any image, and the decoder is for t = 0 alone."""
    config = ProcessConfig(num_timesteps=20, loss="vlb", variance=variance)
    arguments = example(config, torch.arange(20))
    prediction = torch.zeros_like(arguments["prediction"], dtype=torch.float32).requires_grad_()
    vlb_term(**arguments | {"prediction": prediction}, clip=False).sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_a_term_does_not_depend_on_its_batch():
    config = ProcessConfig()
    generator = torch.Generator().manual_seed(0)
    x_0, x_t, prediction = (torch.randn(4, 3, 128, 128, generator=generator).clamp(-1, 1) for _ in range(3))
    t = torch.tensor([0, 3, 500, 999])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = vlb_term(config, config.noise_schedule(), x_0, x_t, t, prediction)
        for i in range(4):
            one = slice(i, i + 1)
            alone = vlb_term(config, config.noise_schedule(), x_0[one], x_t[one], t[one], prediction[one])
            assert torch.equal(alone, whole[one])
    finally:
        torch.set_num_threads(threads)


def test_learned_variance_lies_between_the_fixed_ones():
    base = ProcessConfig()
    schedule = base.noise_schedule()
    t = torch.tensor([1, 2, 500, 999])
    zeros = torch.zeros(4, *SHAPE, dtype=torch.float64)

    def learned(v: float) -> tuple[Tensor, Tensor]:
        config = ProcessConfig(variance="learned_range", loss="vlb")
        output = torch.cat((zeros, torch.full_like(zeros, v)), dim=1)
        arguments = example(base, t) | {"config": config}
        arguments["prediction"] = torch.cat((arguments["prediction"], output[:, 2:]), dim=1)
        return reverse_log_variance(config, schedule, t, output), vlb_term(**arguments)

    for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = ProcessConfig(variance=kind)  # type: ignore[arg-type]
        log_variance, term = learned(v)
        assert torch.allclose(
            log_variance, reverse_log_variance(fixed, schedule, t, zeros).expand_as(zeros), atol=1e-12
        )
        assert torch.allclose(term, vlb_term(**example(base, t) | {"config": fixed}), rtol=1e-10)
    low, middle, high = (learned(v)[0] for v in (-1.0, 0.3, 1.0))
    assert (low < middle).all() and (middle < high).all()
    first = reverse_log_variance(ProcessConfig(variance="fixed_large"), schedule, t * 0, zeros)
    assert torch.allclose(first.exp(), torch.full_like(first, schedule.posterior_variance[1])), "entry 0 replaced"


def test_clipping_is_the_configs_unless_said():
    arguments = example(ProcessConfig(clip_range=0.8), torch.tensor([0, 1, 900]), error=2.0)
    assert np.allclose(vlb_term(**arguments).numpy(), independent(**arguments), rtol=1e-9)
    free = ProcessConfig(clip=False)
    assert torch.equal(vlb_term(**arguments, clip=False), vlb_term(**arguments | {"config": free}))
    assert not torch.allclose(vlb_term(**arguments, clip=False), vlb_term(**arguments))


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_nothing_waits_for_the_device(variance):
    arguments = example(
        ProcessConfig(variance=variance, loss="hybrid" if variance == "learned_range" else "simple"),
        torch.tensor([0, 7]),
    )
    with NoWaiting():
        vlb_term(**arguments)
        prior_term(arguments["schedule"], arguments["x_0"])
    schedule = NoiseSchedule.from_name("linear", 1000)  # fake tables stay in it
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        assert vlb_term(**fake | {"schedule": schedule}).shape == (2,)


def test_the_prior_of_hos_schedule_is_as_good_as_nothing():
    schedule = NoiseSchedule.from_name("linear", 1000)
    x_0 = bytes_of(4)
    clean, alpha_bar = x_0.double() / 127.5 - 1, float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))
    variance = 1 - alpha_bar
    kl = 0.5 * (alpha_bar * clean**2 + variance - 1 - math.log(variance))
    assert torch.allclose(prior_term(schedule, x_0), kl.flatten(1).mean(1), rtol=1e-5)
    assert torch.allclose(prior_term(schedule, clean.float(), torch.float32).double(), prior_term(schedule, x_0))
    gray = torch.full((1, *SHAPE), 255, dtype=torch.uint8)
    assert 1e-5 < float(prior_term(schedule, gray)) / math.log(2) < 1e-4
    assert 5e-6 < float(prior_term(schedule, x_0).mean()) / math.log(2) < 5e-5


# Timesteps


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_timesteps=st.integers(1, 60))
def test_strata_hold_every_timestep_once(data, num_timesteps):
    every = data.draw(st.integers(1, max(1, num_timesteps - 1)))
    strata = make_strata(num_timesteps, every)
    assert strata[0] == Stratum(0, 1)
    assert [t for first, size in strata for t in range(first, first + size)] == list(range(num_timesteps))
    assert all(size == every for _, size in strata[1:-1])
    assert len(make_strata(num_timesteps)) == num_timesteps


@pytest.mark.parametrize("every", [0, -1, 10])
def test_every_out_of_range(every):
    with pytest.raises(ConfigError, match=rf"every is {every}: it must be in 1 \.\. 9 \(T - 1\)"):
        make_strata(10, every)


def test_timesteps_within_a_stratum_are_uniform_and_the_images_own():
    images = torch.arange(6000)
    t = draw_in_stratum(Stratum(8, 6), images, SEED)
    counts = torch.bincount(t, minlength=14)
    assert counts[:8].sum() == 0 and len(counts) == 14
    assert scipy.stats.chisquare(counts[8:].numpy()).pvalue > 1e-4
    assert torch.equal(draw_in_stratum(Stratum(8, 6), images[100:130], SEED), t[100:130])
    other = draw_in_stratum(Stratum(14, 6), images, SEED) - 6
    assert abs(np.corrcoef(t, other)[0, 1]) < 0.06, "strata are drawn independently"
    assert torch.equal(draw_in_stratum(Stratum(5, 1), images[:9], SEED), torch.full((9,), 5))


# A Gaussian

MEAN, STD = 0.1, 0.2  # of each pixel; the open bins are 4.5 standard deviations away


def gaussian_images(n: int) -> Tensor:
    """uint8 [n, 1, 16, 16] whose pixels have the probabilities of a Gaussian's bins."""
    pixels = MEAN + STD * normal(n, 1, 16, 16, seed=5)
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def log_probability(x_0: Tensor) -> Tensor:
    """log P of the images per dimension, [n]."""
    table = torch.tensor([bin_mass(level, MEAN, STD**2) for level in range(256)], dtype=torch.float64)
    return table[x_0.long()].flatten(1).mean(1)


def posterior_error(schedule: NoiseSchedule) -> np.ndarray:
    """Variance of x_0 given x_t: s^2 sigma^2 / (alpha^2 s^2 + sigma^2)."""
    alpha_bar = schedule.alpha_bar
    return STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)


def oracle(config: ProcessConfig, schedule: NoiseSchedule) -> Network:
    """The network that knows E[x_0 | x_t], and says so in what it is to predict.

    With learned_range it knows the variance of x_{t-1} given x_t as well, which is Gaussian: nothing better can be.
    """
    small = schedule.posterior_log_variance
    best = np.log(schedule.posterior_mean_coef1**2 * posterior_error(schedule) + schedule.posterior_variance)
    v = torch.tensor(2 * (best - small) / (np.log(schedule.beta) - small) - 1)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (
            torch.tensor(table)[t].view(-1, 1, 1, 1)
            for table in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar)
        )
        x_t = x_t.double()
        eps = sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_0 = (x_t - sigma * eps) / alpha
        output = {"eps": eps, "x_0": x_0, "v": alpha * eps - sigma * x_0}[config.prediction]
        if config.variance != "learned_range":
            return output
        return torch.cat((output, v[t].view(-1, 1, 1, 1).expand_as(output)), dim=1)

    return network


def expected_terms(config: ProcessConfig, schedule: NoiseSchedule) -> np.ndarray:
    """L_t of the Gaussian and its oracle by arithmetic: x_0 - x_0_hat is N(0, posterior_error)."""
    variance, error = schedule.variance(config.variance), posterior_error(schedule)
    with np.errstate(divide="ignore"):
        ratio = np.log(schedule.posterior_variance) - np.log(variance)
    terms = 0.5 * (np.exp(ratio) - 1 - ratio + schedule.posterior_mean_coef1**2 * error / variance)

    def first(r: float) -> float:
        sigma = math.sqrt(variance[0])
        high, low = (scipy.stats.norm.logcdf((-abs(r) + sign / 255) / sigma) for sign in (1, -1))
        return -(high + math.log1p(-math.exp(low - high))) * scipy.stats.norm.pdf(r, 0, math.sqrt(error[0]))

    width = 9 * math.sqrt(error[0])
    terms[0] = scipy.integrate.quad(first, -width, width, epsabs=1e-12, limit=200)[0]
    return terms


def measured(config: ProcessConfig, x_0: Tensor, every: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, weighted values) of all strata, each [S, N], and L_T [N], in nats per dimension."""
    schedule = config.noise_schedule()
    strata = make_strata(schedule.num_timesteps, every)
    images = torch.arange(len(x_0))
    found = list(bound_terms(config, schedule, oracle(config, schedule), x_0, images, strata, seed=SEED))
    values = torch.stack([terms.values * terms.stratum.size for terms in found])
    return torch.stack([terms.t for terms in found]).numpy(), values.numpy(), prior_term(schedule, x_0).numpy()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_of_a_gaussian_term_by_term(prediction, variance):
    config = ProcessConfig(num_timesteps=250, prediction=prediction, variance=variance)
    x_0 = gaussian_images(24)
    t, values, prior = measured(config, x_0)
    expected = expected_terms(config, config.noise_schedule())
    assert np.array_equal(t[:, 0], np.arange(250))
    # The mean of 24 * 256 squares of a normal: 1.8 %. The constant part of fixed_large only makes it less.
    assert np.abs(values.mean(1) / expected - 1).max() < 6 * math.sqrt(2 / x_0.numel())
    assert abs(values.sum(0).mean() / expected.sum() - 1) < 0.005
    bits = (values.sum(0) + prior).mean() / math.log(2)
    assert bits > -log_probability(x_0).mean() / math.log(2)


def test_the_bound_is_the_log_likelihood_where_the_reverse_process_is_exact():
    """Of a Gaussian p(x_{t-1} | x_t) can be right in mean and variance: the bound then loses nothing but bins."""
    x_0 = gaussian_images(250)
    config = ProcessConfig(num_timesteps=40, variance="learned_range", loss="vlb")
    _, values, prior = measured(config, x_0)
    gaps = values.sum(0) + prior + log_probability(x_0).numpy()
    stderr = gaps.std(ddof=1) / math.sqrt(len(gaps))
    assert stderr < 0.007 and -4 * stderr < gaps.mean() < 0.001 + 4 * stderr


def test_the_bound_of_fixed_variances_comes_nearer_with_more_timesteps():
    entropy = math.log(STD * 127.5 * math.sqrt(2 * math.pi * math.e))
    for variance in ("fixed_small", "fixed_large"):
        gaps = []
        for num_timesteps in (30, 100, 1000):
            config = ProcessConfig(num_timesteps=num_timesteps, variance=variance)
            gaps.append(expected_terms(config, config.noise_schedule()).sum() - entropy)
        assert gaps[0] > gaps[1] > gaps[2] > 0, (variance, gaps)


def test_thinning_does_not_change_what_is_expected():
    config = ProcessConfig(num_timesteps=40, variance="fixed_small")
    x_0 = gaussian_images(1).expand(12000, 1, 16, 16)[:, :, :2, :2].contiguous()
    t, values, _ = measured(config, x_0, every=7)
    assert t.shape[0] == 1 + 6 and len(np.unique(t)) == 40
    _, whole, _ = measured(config, x_0)
    sums, truth = values[1:].sum(0), whole[1:].sum(0)
    error = math.hypot(sums.std(), truth.std()) / math.sqrt(len(sums))
    assert abs(sums.mean() - truth.mean()) < 4 * error and error < 0.03 * truth.mean()


def test_terms_are_the_images_own():
    """Image 3 has the same terms in any batch, at the noise of its address."""
    config = ProcessConfig(num_timesteps=9, variance="fixed_small")
    schedule = config.noise_schedule()
    x_0, strata = gaussian_images(5), make_strata(9, 2)
    seen = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return oracle(config, schedule)(x_t, t)

    whole = [terms.values for terms in bound_terms(config, schedule, network, x_0, torch.arange(5), strata, seed=SEED)]
    x_t, t = seen[2]
    alone = bound_terms(config, schedule, network, x_0[3:4], torch.tensor([3]), strata, seed=SEED)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[3:4], b.values)
    eps = draw_normal(torch.tensor([3]), (1, 16, 16), seed=SEED, stream=Stream.BOUND, step=int(t[3]))
    mean, variance = schedule.q_mean_variance(x_0[3:4].double() / 127.5 - 1, t[3:4])
    assert torch.allclose(x_t[3:4].double(), mean + variance.sqrt() * eps, atol=1e-6)
