"""The likelihood of the probability-flow ODE against Gaussians of known density: order, probes, constants."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fastddpm import likelihood
from fastddpm.bound import Network
from fastddpm.diffusion import ProcessConfig
from fastddpm.errors import ConfigError
from fastddpm.likelihood import BITS_OF_BIN, dequantise, draw_probes, ode_log_likelihood
from fastddpm.schedules import PREDICTIONS, NoiseSchedule

SEED = 2**37 + 1
SHAPE = (1, 2, 3)
SIZE = math.prod(SHAPE)
CONFIG = ProcessConfig(num_timesteps=200)
SCHEDULE = CONFIG.noise_schedule()


class Gaussian:
    """Data N(mean, covariance) of 6 pixels, and all that follows from it at a log SNR."""

    def __init__(self, diagonal: bool) -> None:
        generator = np.random.default_rng(3)
        self.mean = generator.normal(0.1, 0.3, SIZE)
        root = np.diag(generator.uniform(0.1, 0.9, SIZE)) if diagonal else generator.normal(0, 0.3, (SIZE, SIZE))
        self.covariance = root @ root.T + 0.01 * np.eye(SIZE)

    def network(self, prediction: str, schedule: NoiseSchedule) -> Network:
        """E[eps | x], or what stands for it, at t whole or between two timesteps, where log SNR is linear."""
        log_snr = np.log(schedule.alpha_bar) - np.log(1 - schedule.alpha_bar)

        def ask(x: Tensor, t: Tensor) -> Tensor:
            assert t.dtype == torch.float32 and (t == t[0]).all()
            snr = math.exp(np.interp(float(t[0]), np.arange(len(log_snr)), log_snr))
            alpha, sigma = math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))
            precision = np.linalg.inv(alpha**2 * self.covariance + sigma**2 * np.eye(SIZE))
            eps = sigma * (x.flatten(1) - alpha * torch.tensor(self.mean)) @ torch.tensor(precision)
            x_0 = (x.flatten(1) - sigma * eps) / alpha
            return {"eps": eps, "x_0": x_0, "v": alpha * eps - sigma * x_0}[prediction].view_as(x)

        return ask

    def log_density(self, x: Tensor, schedule: NoiseSchedule) -> np.ndarray:
        """Of N(0, I) at T - 1 carried to t = 0 by the exact flow, which takes each principal axis by itself."""
        values, axes = np.linalg.eigh(self.covariance)
        centre = axes.T @ self.mean
        ends = []
        for alpha_bar in (schedule.alpha_bar[0], schedule.alpha_bar[-1]):
            ends.append((math.sqrt(alpha_bar) * centre, np.sqrt(alpha_bar * values + 1 - alpha_bar)))
        (mean_0, std_0), (mean_T, std_T) = ends
        along = x.flatten(1).numpy() @ axes
        scale = std_0 / std_T
        return scipy.stats.norm.logpdf(along, mean_0 - scale * mean_T, scale).sum(1)


def points(n: int) -> Tensor:
    return 0.6 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def log_p(data: Gaussian, steps: int, config: ProcessConfig = CONFIG, num_probes: int = 1, n: int = 5) -> Tensor:
    schedule = config.noise_schedule()
    probes = draw_probes(torch.arange(n), SHAPE, num_probes, seed=SEED)
    network = data.network(config.prediction, schedule)
    return ode_log_likelihood(config, schedule, network, points(n), probes, num_steps=steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_density_of_a_gaussian_at_the_solvers_order(prediction):
    """Of a diagonal Jacobian one Rademacher probe gives the trace itself: what is left is the solver's error."""
    data, config = Gaussian(diagonal=True), dataclasses.replace(CONFIG, prediction=prediction)
    truth = data.log_density(points(5), SCHEDULE)
    errors = [np.abs(log_p(data, steps, config)[0].numpy() - truth).max() for steps in (8, 16, 32, 64)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(3.6 < order < 4.6 for order in orders[1:]), (errors, orders)
    assert errors[-1] < 1e-4 * SIZE


def test_a_planted_half_of_the_divergence_is_seen(monkeypatch):
    data, field = Gaussian(diagonal=True), likelihood._field
    monkeypatch.setattr(likelihood, "_field", lambda *a: (field(*a)[0], field(*a)[1] / 2))
    assert np.abs(log_p(data, 16)[0].numpy() - data.log_density(points(5), SCHEDULE)).max() > 0.5


def test_probes_are_unbiased_and_say_how_far_off_they_are():
    data = Gaussian(diagonal=False)
    found = log_p(data, 16, num_probes=150, n=3).numpy()
    axes = math.sqrt(SIZE) * torch.eye(SIZE, dtype=torch.float64).view(SIZE, 1, *SHAPE).expand(SIZE, 3, *SHAPE)
    network = data.network("eps", SCHEDULE)
    # Probes along the axes give the trace itself.
    exact = ode_log_likelihood(CONFIG, SCHEDULE, network, points(3), axes, num_steps=16).mean(0).numpy()
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert (error > 1e-3).all() and (np.abs(found.mean(0) - exact) < 4.5 * error).all()
    assert np.allclose(exact, data.log_density(points(3), SCHEDULE), rtol=2e-3)


def test_the_variances_of_learned_range_are_passed_over():
    data = Gaussian(diagonal=False)
    config = dataclasses.replace(CONFIG, variance="learned_range", loss="vlb")
    network = data.network("eps", SCHEDULE)
    probes = draw_probes(torch.arange(2), SHAPE, 1, seed=SEED)
    learned = ode_log_likelihood(
        config, SCHEDULE, lambda x, t: torch.cat((network(x, t), x), dim=1), points(2), probes, num_steps=4
    )
    assert torch.equal(learned, ode_log_likelihood(CONFIG, SCHEDULE, network, points(2), probes, num_steps=4))


def test_probes_are_signs_of_their_address():
    probes = draw_probes(torch.arange(400), SHAPE, 3, seed=SEED)
    assert probes.shape == (3, 400, *SHAPE) and (probes.abs() == 1).all()
    assert abs(float(probes.mean())) < 4 / math.sqrt(probes.numel())
    assert torch.equal(draw_probes(torch.tensor([7]), SHAPE, 2, seed=SEED)[1, 0], probes[1, 7])
    assert not torch.equal(probes[0], probes[1])


def test_dequantised_pixels_fill_their_bins():
    x_0 = torch.arange(256, dtype=torch.uint8).repeat(60).view(256, *(3, 4, 5))
    x = dequantise(x_0, torch.arange(256), seed=SEED, dtype=torch.float64)
    u = ((x - (x_0.double() / 127.5 - 1)) * 255 + 1) / 2
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    assert float(x.min()) >= -1 - 1 / 255 and float(x.max()) <= 1 + 1 / 255
    assert torch.equal(dequantise(x_0[9:11], torch.tensor([9, 10]), seed=SEED, dtype=torch.float64), x[9:11])
    other = dequantise(x_0, torch.arange(256), seed=SEED + 1, dtype=torch.float64)
    assert not torch.equal(other, x)


def test_the_constant_of_the_bins_turns_densities_into_probabilities():
    """Of a Gaussian over many levels -log2 P(level) is the mean of -log2 of its density there, and the constant."""
    x_0 = torch.full((1, 1, 40, 50), 150, dtype=torch.uint8)
    x = dequantise(x_0, torch.tensor([0]), seed=SEED, dtype=torch.float64).numpy()
    centre = 150 / 127.5 - 1
    mass = np.diff(scipy.stats.norm.cdf([centre - 1 / 255, centre + 1 / 255], 0.1, 0.3))[0]
    bits = -scipy.stats.norm.logpdf(x, 0.1, 0.3).mean() / math.log(2) + BITS_OF_BIN
    assert math.isclose(bits, -math.log2(mass), rel_tol=1e-4)
    assert math.isclose(BITS_OF_BIN, math.log2(255 / 2))


def test_the_path_ends_where_nothing_is_left_of_the_image():
    log_snr, times = likelihood._path(SCHEDULE)
    assert times.tolist() == list(range(200)) and np.allclose(log_snr, np.log(SCHEDULE.snr))
    schedule = NoiseSchedule.from_name("cosine", 1000)
    log_snr, times = likelihood._path(schedule)
    assert log_snr[-1] == -14 and times[-2] < times[-1] < times[-2] + 1 and np.log(schedule.snr[-1]) < -14
    snr = np.log(schedule.snr)
    assert math.isclose(np.interp(times[-1], np.arange(1000), snr), -14, rel_tol=1e-12)
    assert (np.diff(log_snr) < 0).all()


def test_the_path_to_pure_noise():
    """From the last timestep that has something left, alpha falls to 0 linearly in t."""
    schedule = ProcessConfig(num_timesteps=6, beta_end=0.002, prediction="v", zero_terminal_snr=True).noise_schedule()
    log_snr, times = likelihood._path(schedule)
    assert np.log(schedule.snr[-2]) > -14 and schedule.snr[-1] == 0
    alpha = np.sqrt(1 / (1 + np.exp(-log_snr[5:])))
    assert log_snr[-1] == -14 and np.allclose(alpha, schedule.sqrt_alpha_bar[-2] * (5 - times[5:]), rtol=1e-9)
    assert (np.diff(log_snr) < 0).all() and (np.diff(times) > 0).all() and times[-1] < 5


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_out_of_range(steps):
    with pytest.raises(ConfigError, match=rf"steps is {steps}: it must be at least 1"):
        log_p(Gaussian(diagonal=True), steps)


def test_one_noise_level_has_no_ode():
    with pytest.raises(ConfigError, match="num_timesteps is 1: the probability-flow ODE needs two"):
        log_p(Gaussian(diagonal=True), 3, ProcessConfig(num_timesteps=1))
