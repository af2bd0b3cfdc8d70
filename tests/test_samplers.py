"""Samplers: rows of coefficients against the derivation and diffusers, and whole loops against exact oracles."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.diffusion import SCHEDULES, SPACINGS, NoiseSchedule
from fastddpm.errors import ConfigError, NumericsError
from fastddpm.samplers import COLUMNS, SAMPLERS, Sampler, coefficient_rows, ddpm, timestep_spacing, to_uint8
from fastddpm_kernels import Stream, draw_normal, reverse_step

A, B, C, E, H, F, LO, HI = range(8)
HO = NoiseSchedule.from_name("linear", 1000)
SEED = 2**35 + 3
SHAPE = (3, 4, 5)


def normal(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers_of(n: int) -> Tensor:
    return torch.arange(7, 7 + n)


# Timesteps


def test_spacings_by_hand() -> None:
    assert timestep_spacing(10, 5, "trailing").tolist() == [9, 7, 5, 3, 1]
    assert timestep_spacing(10, 5, "leading").tolist() == [8, 6, 4, 2, 0]
    assert timestep_spacing(10, 4, "linspace").tolist() == [9, 6, 3, 0]
    for spacing in SPACINGS:
        assert timestep_spacing(1000, 1000, spacing).tolist() == list(range(999, -1, -1))


# Rows


def check_marginals(rows: np.ndarray, alpha_bar_t: np.ndarray) -> None:
    """A step made with the true x_0 takes q(x_t | x_0) to q(x_s | x_0): what makes any subset of steps legitimate."""
    alpha_bar_s = np.append(alpha_bar_t[1:], 1.0)
    mean = rows[:, C] + rows[:, E] * np.sqrt(alpha_bar_t)
    variance = rows[:, E] ** 2 * (1 - alpha_bar_t) + rows[:, F] ** 2
    assert np.allclose(mean, np.sqrt(alpha_bar_s), rtol=1e-9, atol=0), "mean of x_s given x_0"
    assert np.allclose(variance, 1 - alpha_bar_s, rtol=1e-9, atol=1e-15), "variance of x_s given x_0"


@settings(deadline=None, max_examples=150)
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
    rows = coefficient_rows(schedule, steps, sampler=sampler, eta=eta, variance="fixed_small")
    assert rows.shape == (sizes[1], len(COLUMNS)) and np.isfinite(rows).all()
    assert np.isfinite(rows.astype(np.float32)).all()
    check_marginals(rows, schedule.alpha_bar[steps])
    # The last step gives x_0_hat itself: final alpha_bar 1, no noise.
    assert rows[-1, [C, E, H, F]].tolist() == [1, 0, 0, 0]
    assert (rows[:, LO] == -1).all() and (rows[:, HI] == 1).all() and (rows[:, H] == 0).all()


SIGMA_BUGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigma of the next step": lambda rows: np.append(rows[1:, F], 0.0),
    "sigma of the step before": lambda rows: np.append(rows[0, F], rows[:-1, F]),
    "variance in place of sigma": lambda rows: rows[:, F] ** 2,
}


@pytest.mark.parametrize("bug", SIGMA_BUGS)
def test_a_wrong_sigma_fails(bug: str) -> None:
    steps = timestep_spacing(1000, 25)
    for options in ({"sampler": "ddpm", "variance": "fixed_small"}, {"sampler": "ddim", "eta": 1.0}):
        rows = coefficient_rows(HO, steps, **options)  # type: ignore[arg-type]
        rows[:, F] = SIGMA_BUGS[bug](rows)
        with pytest.raises(AssertionError, match="variance of x_s"):
            check_marginals(rows, HO.alpha_bar[steps])


def test_alpha_bar_shifted_by_one_fails() -> None:
    steps = timestep_spacing(1000, 25)
    rows = coefficient_rows(HO, steps - 1, variance="fixed_small")
    with pytest.raises(AssertionError, match="mean of x_s"):
        check_marginals(rows, HO.alpha_bar[steps])


def test_all_steps_of_ddpm_are_the_posterior() -> None:
    """Rows from ratios of alpha_bar agree with the tables made from the betas (eq. 7)."""
    rows = coefficient_rows(HO, timestep_spacing(1000, 1000), variance="fixed_small")[::-1]
    assert np.allclose(rows[:, C], HO.posterior_mean_coef1, rtol=1e-10)
    assert np.allclose(rows[:, E], HO.posterior_mean_coef2, rtol=1e-10)
    assert np.allclose(rows[:, F] ** 2, HO.posterior_variance, rtol=1e-9)
    large = coefficient_rows(HO, timestep_spacing(1000, 1000), variance="fixed_large")[::-1]
    assert np.allclose(large[1:, F] ** 2, HO.beta[1:], rtol=1e-10) and large[0, F] == 0


@pytest.mark.parametrize("num_steps", [1000, 250, 37])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_at_eta_1_is_the_ancestral_step(name: str, num_steps: int) -> None:
    schedule = NoiseSchedule.from_name(name)
    steps = timestep_spacing(1000, num_steps)
    ancestral = coefficient_rows(schedule, steps, sampler="ddpm", variance="fixed_small")
    assert np.allclose(coefficient_rows(schedule, steps, sampler="ddim", eta=1.0), ancestral, rtol=1e-8, atol=1e-14)


def test_ddim_at_eta_0_draws_no_noise() -> None:
    assert (coefficient_rows(HO, timestep_spacing(1000, 20), sampler="ddim")[:, F] == 0).all()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_fixed_large_is_right_for_white_noise_data(name: str) -> None:
    """Data N(0, I): the best x_0_hat is sqrt(alpha_bar) x_t, and each ancestral step then keeps the variance at 1."""
    schedule = NoiseSchedule.from_name(name)
    for num_steps in (1000, 50):
        steps = timestep_spacing(1000, num_steps)
        rows = coefficient_rows(schedule, steps, variance="fixed_large", prediction="x_0")[:-1]
        slope = rows[:, C] * np.sqrt(schedule.alpha_bar[steps][:-1]) + rows[:, E]
        assert np.allclose(slope**2 + rows[:, F] ** 2, 1, rtol=1e-12)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_clipping_comes_before_everything_else(sampler: str) -> None:
    """out is made of the clipped x_0_hat: the posterior mean (ddpm), or its own eps (ddim)."""
    steps = timestep_spacing(1000, 50)
    x_t, prediction, images = 2 * normal(4), 3 * normal(4, 1), numbers_of(4)
    for eta, i in itertools.product((0.0, 1.0), (0, 20, 48, 49)):
        rows = torch.tensor(coefficient_rows(HO, steps, sampler=sampler, eta=eta, variance="fixed_small"))
        t, s = int(steps[i]), int(steps[i + 1]) if i < 49 else None
        a_t, a_s = HO.alpha_bar[t], 1.0 if s is None else HO.alpha_bar[s]
        x_0 = HO.predict_x_0(x_t, t, prediction).clamp(-1, 1)
        assert (x_0.abs() == 1).double().mean() > 0.2 or i == 49
        z = draw_normal(images, SHAPE, seed=SEED, stream=Stream.Z, step=i, dtype=torch.float64)
        sigma = math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) * (1.0 if sampler == "ddpm" else eta)
        if sampler == "ddpm":
            beta = 1 - a_t / a_s
            mean = (math.sqrt(a_s) * beta * x_0 + math.sqrt(1 - beta) * (1 - a_s) * x_t) / (1 - a_t)
        else:
            eps = HO.predict_eps(x_t, t, x_0, "x_0")
            mean = math.sqrt(a_s) * x_0 + math.sqrt(max(1 - a_s - sigma**2, 0)) * eps
        out, x_0_hat = reverse_step(x_t, prediction, rows, torch.tensor(i), images, seed=SEED, return_x_0=True)
        torch.testing.assert_close(x_0_hat, x_0, rtol=0, atol=1e-10)
        torch.testing.assert_close(out, mean + sigma * z, rtol=0, atol=1e-9)


def test_without_clipping_x_0_hat_is_free() -> None:
    rows = torch.tensor(coefficient_rows(HO, [999], clip_range=None))
    args = (rows, torch.tensor(0), numbers_of(2))
    _, x_0_hat = reverse_step(normal(2), normal(2, 1), *args, seed=SEED, return_x_0=True)
    assert x_0_hat.abs().max() > 10


# Whole loops


def net_of_sines(x: Tensor, t: Tensor) -> Any:
    """A stand-in for a network, element by element in float64, so that it does not depend on the batch itself."""
    return SimpleNamespace(sample=torch.sin(3 * x.double() + t[:, None, None, None] / 100).float())


def eps_oracle(schedule: NoiseSchedule, x_0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that knows the image."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        a = torch.tensor(schedule.alpha_bar)[t][:, None, None, None]
        return ((x.double() - a.sqrt() * x_0) / (1 - a).sqrt()).float()

    return net


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("num_steps", [1, 7, 100])
@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.7}])
def test_with_the_exact_eps_the_sampler_returns_x_0(name: str, num_steps: int, options: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_name(name, 100)
    x_0 = normal(3).clamp(-1, 1) * 0.95
    for clip in (True, False):
        sampler = Sampler(eps_oracle(schedule, x_0), schedule, num_steps=num_steps, clip=clip, seed=SEED, **options)
        # x_0_hat carries the float32 rounding of x_t, 8 ulp of 4 at most, times 1 / sqrt(alpha_bar) of the last step.
        atol = 32 * 2.0**-24 / math.sqrt(schedule.alpha_bar[sampler.timesteps[-1]])
        torch.testing.assert_close(sampler.sample(numbers_of(3), SHAPE).double(), x_0, rtol=0, atol=atol)


def gaussian_oracle(schedule: NoiseSchedule, mu: float, sd: float) -> tuple[Callable, np.ndarray]:
    """The best eps_hat for data N(mu, sd^2), gain (x_t - sqrt(alpha_bar) mu), and its gains."""
    a = schedule.alpha_bar
    gain = np.sqrt(1 - a) / (a * sd**2 + 1 - a)

    def net(x: Tensor, t: Tensor) -> Tensor:
        g, signal = (torch.tensor(v, dtype=torch.float32)[t][:, None, None, None] for v in (gain, np.sqrt(a)))
        return g * (x - signal * mu)

    return net, gain


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_samples_have_the_moments_of_the_recursion(variance: str) -> None:
    """Algorithm 2 as the paper writes it, followed exactly by mean and variance, against 200,000 samples."""
    schedule, mu, sd = NoiseSchedule.from_name("linear", 40), 0.3, 0.5
    net, gain = gaussian_oracle(schedule, mu, sd)
    sampler = Sampler(net, schedule, variance=variance, clip=False, seed=SEED)
    mean, var = 0.0, 1.0
    seen = {i: x_t for i, _, x_t, _ in sampler.steps(torch.arange(3200), (1, 8, 8)) if i % 13 == 0}
    seen[40] = sampler.sample(torch.arange(3200), (1, 8, 8))
    for i, t in enumerate([*reversed(range(40)), -1]):
        if i in seen:
            n = seen[i].numel()
            assert abs(float(seen[i].double().mean()) - mean) < 5 * math.sqrt(var / n), f"mean before step {i}"
            assert abs(float(seen[i].double().var()) - var) < 5 * var * math.sqrt(2 / n), f"variance before step {i}"
        if t >= 0:
            push = schedule.beta[t] / math.sqrt(1 - schedule.alpha_bar[t]) * gain[t]
            slope = (1 - push) / math.sqrt(1 - schedule.beta[t])
            offset = push * math.sqrt(schedule.alpha_bar[t]) * mu / math.sqrt(1 - schedule.beta[t])
            sigma2 = {"fixed_small": schedule.posterior_variance, "fixed_large": schedule.beta}[variance][t]
            mean, var = slope * mean + offset, slope**2 * var + (sigma2 if t else 0.0)
    # The recursion itself ends at the data, but for the coarseness of 40 steps: the best variance lies in between.
    assert mean == pytest.approx(mu, abs=1e-3) and math.sqrt(var) == pytest.approx(sd, abs=0.08)
    assert (math.sqrt(var) < sd) == (variance == "fixed_small")


def test_without_noise_the_samples_collapse() -> None:
    """The lecture's question: the mean alone loses the spread of the data."""
    schedule, mu, sd = NoiseSchedule.from_name("linear", 200), 0.3, 0.5
    net, _ = gaussian_oracle(schedule, mu, sd)
    sampler = Sampler(net, schedule, clip=False, seed=SEED)
    spread = float(sampler.sample(torch.arange(200), (1, 8, 8)).std())
    sampler.rows[:, F] = 0
    assert float(sampler.sample(torch.arange(200), (1, 8, 8)).std()) < 0.3 * spread


@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}])
def test_an_image_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=9, seed=SEED, **options)
    images = torch.tensor([5, 0, 2**32 - 1, 17, 3, 100, 4])
    whole = sampler.sample(images, SHAPE)
    parts = [sampler.sample(part, SHAPE) for part in images.split([3, 1, 3])]
    assert torch.equal(torch.cat(parts), whole)
    again = sampler.sample(images.flip(0), SHAPE).flip(0)
    assert torch.equal(again, whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == len(images)
    other = Sampler(net_of_sines, HO, num_steps=9, seed=SEED + 1, **options)
    assert not torch.equal(other.sample(images, SHAPE), whole)


def test_steps_and_callback_tell_the_same_story() -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=12, seed=SEED)
    images = numbers_of(3)
    states: list[tuple[int, int, Tensor]] = []
    result = sampler.sample(images, SHAPE, callback=lambda *step: states.append(step))
    film = list(sampler.steps(images, SHAPE))
    assert [i for i, _, _ in states] == [step.i for step in film] == list(range(12))
    assert [t for _, t, _ in states] == [step.t for step in film] == sampler.timesteps.tolist()
    x_T = draw_normal(images, SHAPE, seed=SEED, stream=Stream.X_T)
    for step, before in zip(film, [x_T, *(x for _, _, x in states)], strict=False):
        assert torch.equal(step.x_t, before) and step.x_0_hat.abs().max() <= 1
    assert torch.equal(states[-1][2], result) and torch.equal(film[-1].x_0_hat, result)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_given_x_T_is_used_and_kept() -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=5, sampler="ddim", seed=SEED)
    images = numbers_of(2)
    x_T = draw_normal(images, SHAPE, seed=SEED, stream=Stream.X_T)
    copy = x_T.clone()
    assert torch.equal(sampler.sample(images, SHAPE, x_T=x_T), sampler.sample(images, SHAPE))
    assert torch.equal(x_T, copy)
    assert not torch.equal(sampler.sample(images, SHAPE, x_T=-x_T), sampler.sample(images, SHAPE))


def test_what_the_network_is_given_and_may_return() -> None:
    seen: list[dict[str, Any]] = []

    def net(x: Tensor, t: Tensor, **more: Any) -> Any:
        seen.append({"x": x, "t": t, **more})
        outputs = (x, (x, None), SimpleNamespace(sample=x))
        return outputs[len(seen) % 3]

    sampler = Sampler(net, HO, num_steps=3, dtype=torch.bfloat16, seed=SEED)
    result = sampler.sample(numbers_of(2), SHAPE)
    assert result.dtype == torch.float32
    assert [call["t"].tolist() for call in seen] == [[t, t] for t in sampler.timesteps.tolist()]
    assert all(call["x"].dtype == torch.bfloat16 and "class_labels" not in call for call in seen)
    seen.clear()
    sampler.sample(numbers_of(2), SHAPE, class_labels=torch.tensor([4, 9]))
    assert all(call["class_labels"].tolist() == [4, 9] for call in seen) and len(seen) == 3


class NoSync(TorchDispatchMode):
    """Fails where a value is read from the device by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read by the host"
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    run = Sampler(lambda x, t: 0.5 * x, HO, num_steps=4, seed=SEED).steps(numbers_of(2), SHAPE)
    next(run)  # image numbers are checked before the first step
    with NoSync():
        assert len(list(run)) == 3


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu() -> None:
    sampler = Sampler(lambda x, t: 0.5 * x, HO, num_steps=6, dtype=torch.bfloat16, seed=SEED)
    images = numbers_of(2)
    run = sampler.steps(images, SHAPE, "cuda")
    next(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, last = run
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = sampler.sample(images, SHAPE)
    torch.testing.assert_close(last.x_0_hat.cpu(), reference, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "heun"}, "sampler is 'heun': valid are ddpm, ddim"),
        ({"prediction": "epsilon"}, "valid are eps, x_0, v"),
        ({"variance": "learned"}, "valid are fixed_small, fixed_large"),
        ({"sampler": "ddim", "variance": "learned"}, "valid are fixed_small, fixed_large"),
        ({"spacing": "even"}, "valid are trailing, leading, linspace"),
        ({"num_steps": 0}, "is 0: it must be in 1 .. 1000"),
        ({"num_steps": 1001}, "is 1001"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"clip_range": -1.0}, "clip_range is -1.0"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_wrong_values_name_the_valid_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(net_of_sines, HO, **options)


def test_wrong_arguments_of_sample() -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=2)
    for images in (torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ConfigError, match=r"int64 numbers \[N\]"):
            sampler.sample(images, SHAPE)
    with pytest.raises(ConfigError, match="image numbers"):
        sampler.sample(torch.tensor([-1]), SHAPE)
    with pytest.raises(ConfigError, match="image numbers"):
        sampler.sample(torch.tensor([2**32]), SHAPE)
    with pytest.raises(ConfigError, match=r"x_T has the shape \[1, 3, 4, 5\]: valid is \[2, 3, 4, 5\]"):
        sampler.sample(numbers_of(2), SHAPE, x_T=torch.zeros(1, *SHAPE))
    with pytest.raises(ConfigError, match="class_labels"):
        sampler.sample(numbers_of(2), SHAPE, class_labels=torch.tensor([1]))
    learned = Sampler(lambda x, t: torch.cat([x, x], 1), HO, num_steps=2)
    with pytest.raises(ConfigError, match="learned variances"):
        learned.sample(numbers_of(2), SHAPE)


def test_a_sampler_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def halfway(alpha_bar_t: np.ndarray, alpha_bar_s: np.ndarray, *, eta: float) -> Any:
        return tuple(0.5 * (1 + eta) * column for column in ddpm(alpha_bar_t, alpha_bar_s))

    monkeypatch.setitem(SAMPLERS, "halfway", halfway)
    rows = coefficient_rows(HO, [999, 500], sampler="halfway", eta=1.0)
    assert np.array_equal(rows, coefficient_rows(HO, [999, 500]))


# Pictures


def test_to_uint8() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    x = (levels / 127.5 - 1).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = to_uint8(x)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 16, 16, 3) and pixels.is_contiguous()
    assert torch.equal(pixels[1, ..., 2].flatten(), torch.arange(256, dtype=torch.uint8))  # inverse of x / 127.5 - 1
    outside = torch.tensor([-3.0, 3.0, math.inf, -math.inf]).reshape(1, 4, 1, 1)
    assert to_uint8(outside).flatten().tolist() == [0, 255, 255, 0]
    x = torch.zeros(3, 1, 2, 2)
    x[2, 0, 1, 1] = math.nan
    with pytest.raises(NumericsError, match="sample 2 of 3"):
        to_uint8(x)
