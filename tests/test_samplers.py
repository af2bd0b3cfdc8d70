"""Samplers: rows of coefficients against the derivation and diffusers, and whole loops against exact oracles."""

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from oracles import moments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import samplers
from fastddpm.diffusion import SCHEDULES, SPACINGS, NoiseSchedule, ProcessConfig
from fastddpm.errors import ConfigError, NumericsError
from fastddpm.generate import draw_images
from fastddpm.samplers import COLUMNS, SAMPLERS, Sampler, coefficient_rows, timestep_spacing, to_uint8
from fastddpm.solvers import Levels, Rows, Solver, ddpm
from fastddpm_kernels import Stream, draw_normal, reverse_step

C, E, H, F = (COLUMNS.index(name) for name in "CEHF")
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


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipping_comes_before_everything_else(sampler: str) -> None:
    """out is made of the clipped x_0_hat: the posterior mean (ddpm), or its own eps (ddim)."""
    steps = timestep_spacing(1000, 50)
    x_t, prediction, images = 2 * normal(4), 3 * normal(4, 1), numbers_of(4)
    for eta, i in itertools.product((0.0, 1.0) if sampler == "ddim" else (0.0,), (0, 20, 48, 49)):
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
    sampler = Sampler(net, schedule, clip=False, seed=SEED, temperature=0)
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
        (
            {"sampler": "euler"},
            "sampler is 'euler': valid are ddpm, ddim, ddim_inverse, dpmpp_2m, dpmpp_2m_sde, heun, unipc",
        ),
        ({"prediction": "epsilon"}, "valid are eps, x_0, v"),
        ({"variance": "learned"}, "valid are fixed_small, fixed_large, learned_range"),
        ({"sampler": "ddim", "variance": "learned"}, "valid are fixed_small, fixed_large"),
        ({"spacing": "even"}, "valid are trailing, leading, linspace"),
        ({"num_steps": 0}, "is 0: it must be in 1 .. 1000"),
        ({"num_steps": 1001}, "is 1001"),
        ({"sampler": "heun", "num_steps": 1001}, "is 1001"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"sampler": "unipc", "eta": 0.5}, "only ddim has it"),
        ({"churn": 0.5}, "only heun has it"),
        ({"clip_range": -1.0}, "clip_range is -1.0"),
        ({"clip": False, "clip_range": 0.0}, "clip_range is 0.0"),
        ({"seed": 2**63}, "seed is"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"guidance": 2.0}, "guidance is 2.0: it needs a network that was trained with hidden classes"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold is 0.0"),
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
    odd = Sampler(lambda x, t: torch.cat([x, x, x], 1), HO, num_steps=2)
    with pytest.raises(ConfigError, match=r"the network returned \[2, 9, 4, 5\] for x_t \[2, 3, 4, 5\]"):
        odd.sample(numbers_of(2), SHAPE)
    x_T = normal(2, dtype=torch.float32)
    for first in (-1, 2):
        with pytest.raises(ConfigError, match=f"first_step is {first}: it must be in 0 .. 1"):
            sampler.sample(numbers_of(2), SHAPE, x_T=x_T, first_step=first)
    with pytest.raises(ConfigError, match="ddpm begins at step 1: give the state"):
        sampler.sample(numbers_of(2), SHAPE, first_step=1)
    with pytest.raises(ConfigError, match="step 2 does not exist"):
        sampler.step(2, x_T, numbers_of(2))


def test_a_sampler_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def halfway(levels: Levels, *, eta: float) -> Rows:
        rows = ddpm(levels)
        return rows._replace(columns={name: 0.5 * (1 + eta) * column for name, column in rows.columns.items()})

    monkeypatch.setitem(SAMPLERS, "halfway", Solver(halfway))
    rows = coefficient_rows(HO, [999, 500], sampler="halfway", eta=1.0)
    assert np.array_equal(rows, coefficient_rows(HO, [999, 500]))


# Every sampler


EVERY: list[dict[str, Any]] = [
    {"sampler": "ddpm", "variance": "fixed_small"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "dpmpp_2m"},
    {"sampler": "dpmpp_2m_sde"},
    {"sampler": "heun"},
    {"sampler": "heun", "churn": 10.0},
    {"sampler": "unipc"},
]
every = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(map(str, o.values())))


def gaussian_v(sampler: Sampler, mu: float, sd: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best v for data N(mu, sd^2) at the levels of a sampler's own table, whole timesteps or not."""
    table = sampler.table
    known = dict(zip(table.timesteps.astype(np.float32).tolist(), table.alpha_bar.tolist(), strict=True))

    def net(x: Tensor, t: Tensor) -> Tensor:
        a = known[float(t[0])]
        residual = (x - math.sqrt(a) * mu) / (a * sd**2 + 1 - a)
        return math.sqrt(a * (1 - a)) * (1 - sd**2) * residual - math.sqrt(1 - a) * mu

    return net


ZERO_SNR: Any = SimpleNamespace(num_timesteps=1000, alpha_bar=np.append(HO.alpha_bar[:-1], 0.0))


@every
@pytest.mark.parametrize("schedule", [HO, ZERO_SNR], ids=["linear", "zero_snr"])
def test_every_sampler_makes_the_moments_of_its_table(options: dict[str, Any], schedule: NoiseSchedule) -> None:
    """25,600 numbers of 30 steps, histories, noise and all, through the fused step in float32, against the recursion.

    v, because from pure noise eps says nothing.
    """
    mu, sd = 0.3, 0.5
    more: dict[str, Any] = {"num_steps": 30, "prediction": "v", "clip": False, "seed": SEED, **options}
    net = gaussian_v(Sampler(net_of_sines, schedule, **more), mu, sd)
    sampler = Sampler(net, schedule, **more)
    out = sampler.sample(torch.arange(400), (1, 8, 8)).double()
    mean, variance = moments(sampler.table, 0.0, 1.0, mu, sd)
    n = out.numel()
    assert abs(float(out.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(out.var()) - variance) < 5 * variance * math.sqrt(2 / n)
    # The recursion is the data's, but for the coarseness of 30 steps of the first-order ones.
    assert abs(mean - mu) < 0.02 and abs(math.sqrt(variance) - sd) < 0.1


@every
@pytest.mark.parametrize(
    "extra", [{}, {"guidance": 2.0}, {"self_conditioning": True}, {"dynamic_threshold": 0.9}], ids=str
)
def test_no_image_depends_on_its_batch(options: dict[str, Any], extra: dict[str, Any]) -> None:
    def net(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shift = 0 if class_labels is None else class_labels[:, None, None, None]
        y = torch.sin(3 * x.double() + t[:, None, None, None] / 100 + shift)
        return (y[:, :3] + y[:, -3:]).float()

    more = {"null_class": 7, **extra} if "guidance" in extra else extra
    sampler = Sampler(net, HO, num_steps=5, seed=SEED, **options, **more)
    images = torch.tensor([5, 0, 2**32 - 1, 17, 3])
    labels = images % 4 if "guidance" in extra else None
    whole = sampler.sample(images, SHAPE, class_labels=labels)
    assert whole.isfinite().all()
    parts = [
        sampler.sample(part, SHAPE, class_labels=None if labels is None else part % 4)
        for part in images.split([2, 1, 2])
    ]
    assert torch.equal(torch.cat(parts), whole)
    film = list(sampler.steps(images, SHAPE, class_labels=labels))
    assert torch.equal(film[-1].x_0_hat, whole)
    assert [step.t for step in film] == sampler.timesteps.tolist()


@every
def test_a_run_can_begin_further_down(options: dict[str, Any]) -> None:
    """From a state of its own it goes on as before, except that histories begin anew."""
    sampler = Sampler(net_of_sines, HO, num_steps=8, seed=SEED, **options)
    images = numbers_of(3)
    states = [step.x_t for step in sampler.steps(images, SHAPE)]
    whole = sampler.sample(images, SHAPE)
    later = sampler.sample(images, SHAPE, x_T=states[4], first_step=4)
    assert torch.equal(later, whole) == (options["sampler"] in ("ddpm", "ddim") or options == {"sampler": "heun"})
    film = list(sampler.steps(images, SHAPE, x_T=states[4], first_step=4))
    assert [step.i for step in film] == list(range(4, len(states))) and torch.equal(film[-1].x_0_hat, later)
    assert (later - whole).abs().mean() < 0.5 * (later.roll(1, 0) - whole).abs().mean()
    if sampler.table.evaluations == 2:
        with pytest.raises(ConfigError, match="first_step is 3: heun begins a step at every 2nd evaluation"):
            sampler.sample(images, SHAPE, x_T=states[3], first_step=3)


@pytest.mark.parametrize("options", EVERY[:3])
def test_single_steps_are_those_of_the_run(options: dict[str, Any]) -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=6, seed=SEED, **options)
    images = numbers_of(3)
    x = draw_normal(images, SHAPE, seed=SEED, stream=Stream.X_T, channels_last=True)
    for step in sampler.steps(images, SHAPE):
        assert torch.equal(step.x_t, x)
        x, x_0_hat = sampler.step(step.i, x, images)
        assert torch.equal(step.x_0_hat, x_0_hat)
    assert torch.equal(x, sampler.sample(images, SHAPE))
    z = draw_normal(images, SHAPE, seed=SEED, stream=Stream.Z, step=2, channels_last=True)
    given = sampler.step(2, step.x_t, images, z=z)
    torch.testing.assert_close(given.x_next, sampler.step(2, step.x_t, images).x_next, rtol=0, atol=1e-6)
    noisier = sampler.step(2, step.x_t, images, z=z + 1).x_next - given.x_next
    torch.testing.assert_close(noisier, torch.full_like(z, sampler.table.column("F")[2]), rtol=0, atol=1e-6)


def test_a_sampler_with_a_history_has_no_single_steps() -> None:
    for name in ("dpmpp_2m", "unipc", "heun"):
        with pytest.raises(ConfigError, match=f"{name} has no single steps"):
            Sampler(net_of_sines, HO, num_steps=3, sampler=name).step(0, torch.zeros(2, *SHAPE), numbers_of(2))


def test_heun_tells_the_network_times_between_the_timesteps() -> None:
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    sampler = Sampler(net, HO, sampler="heun", num_steps=5, dtype=torch.bfloat16)
    sampler.sample(numbers_of(2), SHAPE)
    assert all(t.dtype == torch.float32 and t.shape == (2,) for t in seen)
    assert [float(t[0]) for t in seen] == sampler.timesteps.astype(np.float32).tolist() and len(seen) == 9


def test_inversion_finds_the_noise_of_an_image() -> None:
    """Gaussian data: x_T of an image is (x_0 - mu) / sd up to the discretisation, and DDIM leads back."""
    mu, sd = 0.3, 0.5
    net, _ = gaussian_oracle(HO, mu, sd)
    images, x_0 = numbers_of(4), normal(4, dtype=torch.float32) * sd + mu
    options: dict[str, Any] = {"num_steps": 250, "clip": False, "seed": SEED}
    inverse = Sampler(net, HO, sampler="ddim_inverse", **options)
    x_T = inverse.sample(images, SHAPE, x_T=x_0)
    torch.testing.assert_close(x_T, (x_0 - mu) / sd, rtol=0, atol=0.08)
    back = Sampler(net, HO, sampler="ddim", **options).sample(images, SHAPE, x_T=x_T)
    torch.testing.assert_close(back, x_0, rtol=0, atol=0.02)
    with pytest.raises(ConfigError, match="ddim_inverse begins from images"):
        inverse.sample(images, SHAPE)


# Guidance


def conditional(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
    """A network of classes 0 .. 8, of which 8 stands for none."""
    shift = torch.where(class_labels == 8, 0.0, 0.3 + 0.1 * class_labels)[:, None, None, None]
    return (0.8 + 0.2 * shift) * x + torch.sin(x + shift)


def guided_by_hand(w: Callable[[Tensor], Tensor]) -> Callable:
    def net(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        null = conditional(x, t, torch.full_like(class_labels, 8))
        return null + w(t)[:, None, None, None] * (conditional(x, t, class_labels) - null)

    return net


@every
def test_guidance_is_the_formula(options: dict[str, Any]) -> None:
    labels, images = torch.tensor([0, 3, 5]), numbers_of(3)

    def images_of(net: Callable, **more: Any) -> Tensor:
        return Sampler(net, HO, num_steps=6, seed=SEED, **options, **more).sample(images, SHAPE, class_labels=labels)

    ours = images_of(conditional, guidance=2.5, null_class=8)
    torch.testing.assert_close(ours, images_of(guided_by_hand(lambda t: torch.full(t.shape, 2.5))), rtol=0, atol=2e-4)
    assert torch.equal(images_of(conditional, guidance=1.0, null_class=8), images_of(conditional))
    assert (ours - images_of(conditional)).abs().max() > 0.05
    within = images_of(conditional, guidance=2.5, null_class=8, guidance_interval=(0.2, 0.7))
    by_hand = images_of(guided_by_hand(lambda t: torch.where((t >= 200) & (t <= 700), 2.5, 1.0)))
    torch.testing.assert_close(within, by_hand, rtol=0, atol=2e-4)


def test_with_and_without_class_are_one_call() -> None:
    calls: list[tuple[int, list[int]]] = []

    def net(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        calls.append((len(x), class_labels.tolist()))
        assert len(t) == len(x) and torch.equal(x[:2], x[-2:])
        return conditional(x, t, class_labels)

    for guidance, expected in ((3.0, (4, [2, 5, 8, 8])), (1.0, (2, [2, 5]))):
        calls.clear()
        sampler = Sampler(net, HO, num_steps=3, guidance=guidance, null_class=8)
        sampler.sample(numbers_of(2), SHAPE, class_labels=torch.tensor([2, 5]))
        assert calls == [expected] * 3


def test_autoguidance_takes_the_second_network() -> None:
    def weak(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return 0.9 * conditional(x, t, class_labels)

    def by_hand(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        guide = weak(x, t, class_labels)
        return guide + 1.7 * (conditional(x, t, class_labels) - guide)

    labels, images = torch.tensor([1, 4]), numbers_of(2)
    # The network's own null class is not the guide then.
    sampler = Sampler(conditional, HO, num_steps=5, seed=SEED, guidance=1.7, guide=weak, null_class=8)
    ours = sampler.sample(images, SHAPE, class_labels=labels)
    truth = Sampler(by_hand, HO, num_steps=5, seed=SEED).sample(images, SHAPE, class_labels=labels)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)


def test_guidance_rescale_is_that_of_the_paper() -> None:
    """Lin et al. 2024, eqs. 15 and 16, on one step, in float64."""
    labels, images, x_t = torch.tensor([1, 4]), numbers_of(2), normal(2)
    for rescale in (0.0, 0.7, 1.0):
        options: dict[str, Any] = {"guidance": 4.0, "null_class": 8, "guidance_rescale": rescale, "clip": False}
        sampler = Sampler(conditional, HO, num_steps=4, prediction="v", seed=SEED, **options)
        t = torch.full((2,), int(sampler.timesteps[1]))
        positive = conditional(x_t, t, labels)
        guided = guided_by_hand(lambda t: torch.full(t.shape, 4.0))(x_t, t, labels)
        ratio = positive.flatten(1).std(1) / guided.flatten(1).std(1)
        final = rescale * guided * ratio[:, None, None, None] + (1 - rescale) * guided
        made = sampler.step(1, x_t.float(), images, class_labels=labels)
        torch.testing.assert_close(made.x_0_hat.double(), HO.predict_x_0(x_t, t, final, "v"), rtol=0, atol=1e-5)


def test_guidance_and_learned_variance_go_together() -> None:
    """The variance is the class's own."""

    def net(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        known = (class_labels != 8).to(x.dtype)[:, None, None, None].expand_as(x)
        return torch.cat((conditional(x, t, class_labels), known), 1)

    labels, images, x_t = torch.tensor([1, 4]), numbers_of(2), normal(2, dtype=torch.float32)
    options: dict[str, Any] = {"num_steps": 10, "guidance": 3.0, "null_class": 8, "seed": SEED}
    learned = Sampler(net, HO, variance="learned_range", **options).step(4, x_t, images, class_labels=labels)
    large = Sampler(net, HO, variance="fixed_large", **options).step(4, x_t, images, class_labels=labels)
    torch.testing.assert_close(learned.x_next, large.x_next, rtol=0, atol=1e-5)


# What a network may be


@pytest.mark.parametrize("i", [0, 5, 8, 9])
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_learned_variance_is_the_formula(i: int, num_steps: int) -> None:
    """Improved DDPM, eq. 15, in float64 with betas of the skipped process; learned values beyond -1 .. 1 too."""
    v = torch.linspace(-1.5, 1.5, 60, dtype=torch.float64).reshape(1, *SHAPE).expand(2, -1, -1, -1)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.7 * x, v.float()), 1)

    i = i if num_steps == 10 else 990 + i
    sampler = Sampler(net, HO, num_steps=num_steps, variance="learned_range", clip=False, seed=SEED)
    images, x_t = numbers_of(2), normal(2)
    z = draw_normal(images, SHAPE, seed=SEED, stream=Stream.Z, step=i, dtype=torch.float64)
    steps = [*sampler.timesteps.tolist(), None]
    t, s = steps[i], steps[i + 1]
    a_t, a_s = HO.alpha_bar[t], 1.0 if s is None else HO.alpha_bar[s]
    beta = 1 - a_t / a_s
    x_0 = HO.predict_x_0(x_t, t, 0.7 * x_t)
    mean = (math.sqrt(a_s) * beta * x_0 + math.sqrt(1 - beta) * (1 - a_s) * x_t) / (1 - a_t)
    if s is not None:
        share, posterior = (v + 1) / 2, beta * (1 - a_s) / (1 - a_t)
        mean = mean + torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior))) * z
    ours = sampler.step(i, x_t.float(), images).x_next.double()
    torch.testing.assert_close(ours, mean, rtol=0, atol=2e-5 * float(x_0.abs().max()))


def test_other_samplers_take_the_prediction_of_a_network_with_learned_variance() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.7 * x, 9 * x), 1)

    images = numbers_of(2)
    for options in ({"sampler": "ddim"}, {"sampler": "unipc"}, {"variance": "fixed_small"}):
        ours, plain = (Sampler(n, HO, num_steps=4, seed=SEED, **options) for n in (net, lambda x, t: 0.7 * x))
        assert torch.equal(ours.sample(images, SHAPE), plain.sample(images, SHAPE))
    with pytest.raises(ConfigError, match="variance is learned_range and the network returned 3 channels: valid are 6"):
        Sampler(lambda x, t: x, HO, num_steps=4, variance="learned_range").sample(images, SHAPE)


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_self_conditioning_gives_the_network_its_last_estimate(sampler: str) -> None:
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.sin(x[:, :3] - 0.5 * x[:, 3:])

    run = Sampler(net, HO, sampler=sampler, num_steps=5, seed=SEED, self_conditioning=True)
    film = list(run.steps(numbers_of(2), SHAPE))
    estimates = [torch.zeros(2, *SHAPE), *(step.x_0_hat for step in film)]
    for given, step, estimate in zip(seen, film, estimates, strict=False):
        assert torch.equal(given, torch.cat((step.x_t, estimate), 1))
    assert torch.equal(run.sample(numbers_of(2), SHAPE), film[-1].x_0_hat)
    if sampler == "ddpm":
        made = run.step(3, film[3].x_t, numbers_of(2), x_0_hat=film[2].x_0_hat)
        assert torch.equal(made.x_0_hat, film[3].x_0_hat)


# Thresholds


@pytest.mark.parametrize("clip_range", [1.0, 0.5])
def test_dynamic_thresholding_is_imagen_s(clip_range: float) -> None:
    x_t = normal(5) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None, None]
    for q in (0.5, 0.9, 1.0):
        sampler = Sampler(lambda x, t: x, HO, prediction="x_0", dynamic_threshold=q, clip_range=clip_range, num_steps=4)
        s = torch.quantile(x_t.abs().flatten(1), q, dim=1).clamp(min=clip_range)[:, None, None, None]
        truth = x_t.clamp(-s, s) / s * clip_range
        torch.testing.assert_close(
            sampler.step(1, x_t.float(), numbers_of(5)).x_0_hat.double(), truth, rtol=0, atol=1e-6
        )
    static = Sampler(lambda x, t: x, HO, prediction="x_0", clip_range=clip_range, num_steps=4)
    made = static.step(1, x_t.float(), numbers_of(5)).x_0_hat
    assert torch.equal(made, x_t.float().clamp(-clip_range, clip_range))
    one = Sampler(lambda x, t: x, HO, prediction="x_0", dynamic_threshold=0.9, num_steps=2)
    assert one.sample(numbers_of(2), (1, 1, 1)).shape == (2, 1, 1, 1)


def test_no_step_waits_for_the_device_with_everything_on() -> None:
    options: dict[str, Any] = {"guidance": 2.0, "null_class": 8, "guidance_rescale": 0.7, "dynamic_threshold": 0.9}
    for sampler in ("unipc", "heun"):
        run = Sampler(conditional, HO, sampler=sampler, num_steps=4, seed=SEED, **options)
        film = run.steps(numbers_of(2), SHAPE, class_labels=torch.tensor([0, 1]))
        next(film)
        with NoSync():
            assert len(list(film)) == len(run.timesteps) - 1


# Classes, processes


class Classes:
    """A network of ours, as far as a sampler asks it: three classes and none."""

    config = SimpleNamespace(num_class_embeds=4, class_embed_type=None)

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(x + class_labels[:, None, None, None])


def test_classes_that_are_not_there() -> None:
    process = ProcessConfig(label_dropout=0.1)
    sampler = Sampler.of(process, Classes(), HO, num_steps=2)
    assert sampler.num_classes == 3
    for label in (-1, 4):
        with pytest.raises(ConfigError, match=f"class {label} does not exist: valid are 0 .. 2"):
            sampler.sample(numbers_of(1), SHAPE, class_labels=torch.tensor([label]))
    with pytest.raises(ConfigError, match=r"the network is conditional: give class_labels, each in 0 \.\. 2"):
        sampler.sample(numbers_of(1), SHAPE)
    sampler.sample(numbers_of(1), SHAPE, class_labels=torch.tensor([3]))  # no class, as the guide has it
    whole = Sampler.of(ProcessConfig(), Classes(), HO, num_steps=2)
    assert whole.num_classes == 4
    with pytest.raises(ConfigError, match="guidance is 2: it needs a network that was trained with hidden classes"):
        Sampler.of(ProcessConfig(), Classes(), HO, num_steps=2, guidance=2)
    plain: Any = lambda x, t: x  # noqa: E731
    plain.config = SimpleNamespace(num_class_embeds=None, class_embed_type=None)
    with pytest.raises(ConfigError, match="a class is asked for and the network has none"):
        Sampler(plain, HO, num_steps=2).sample(numbers_of(1), SHAPE, class_labels=torch.tensor([0]))


def test_a_sampler_of_a_process_has_its_settings() -> None:
    process = ProcessConfig(
        prediction="v",
        variance="fixed_small",
        clip_range=0.7,
        spacing="leading",
        dynamic_threshold=0.9,
        label_dropout=0.2,
        self_conditioning=True,
    )
    sampler = Sampler.of(process, Classes(), HO, num_steps=7, guidance=2.0)
    by_hand = Sampler(
        Classes(),
        HO,
        prediction="v",
        variance="fixed_small",
        clip_range=0.7,
        spacing="leading",
        dynamic_threshold=0.9,
        null_class=3,
        self_conditioning=True,
        guidance=2.0,
        num_steps=7,
    )
    for name in ("null_class", "self_conditioning", "dynamic_threshold", "clip_range", "num_classes"):
        assert getattr(sampler, name) == getattr(by_hand, name), name
    assert np.array_equal(sampler.rows, by_hand.rows)
    assert np.array_equal(sampler.timesteps, by_hand.timesteps)
    assert Sampler.of(process, Classes(), HO, prediction="eps").rows[0, 0] > 1


def test_drawn_images_take_their_classes_in_turn() -> None:
    sampler = Sampler.of(ProcessConfig(label_dropout=0.1), Classes(), HO, num_steps=2, seed=SEED)
    options: dict[str, Any] = {"shape": SHAPE, "batch_size": 3, "device": torch.device("cpu")}
    numbers = torch.arange(7)
    for classes, labels in ((None, numbers % 3), ((2,), numbers * 0 + 2), ((1, 0), (numbers + 1) % 2)):
        drawn = draw_images(sampler, 7, classes=classes, num_film=2, **options)
        truth = to_uint8(sampler.sample(numbers, SHAPE, class_labels=labels))
        assert np.array_equal(drawn.images, truth.numpy())
        assert np.array_equal(drawn.film[-1], truth[:2].numpy())
    with pytest.raises(ConfigError, match="class 5 does not exist"):
        draw_images(sampler, 1, classes=(5,), **options)
    with pytest.raises(ConfigError, match="ddim_inverse leads from images to noise"):
        draw_images(Sampler(net_of_sines, HO, sampler="ddim_inverse"), 1, **options)


class Replayed:
    """Stands in for a CUDA graph on a CPU: a replay runs the step again and writes its result where the first was."""

    def __init__(self, run: Callable[[], Tensor | None], stream: object, otherwise: str) -> None:
        self.run, self.result = run, run()

    def replay(self) -> None:
        result = self.run()
        if self.result is not None and result is not None:
            self.result.copy_(result)


@every
@pytest.mark.parametrize("extra", [{}, {"guidance": 2.0, "null_class": 8}, {"self_conditioning": True}], ids=str)
def test_a_graph_keeps_all_of_the_state(
    options: dict[str, Any], extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories, estimates and classes on tensors of its own, over two batches, a later start and a film."""
    monkeypatch.setattr(samplers, "_check_cuda", lambda device: None)
    monkeypatch.setattr(samplers, "capture", lambda *args: (replayed := Replayed(*args), replayed.result))
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())

    def net(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return conditional(x[:, :3] - 0.5 * x[:, -3:], t, class_labels)

    more: dict[str, Any] = {"num_steps": 4, "seed": SEED, **options, **extra}
    plain, graphed = (Sampler(net, HO, graph=graph, **more) for graph in (False, True))
    kept = []
    for images in (numbers_of(3), numbers_of(3) + 50):
        labels = images % 5
        kept.append(
            (graphed.sample(images, SHAPE, class_labels=labels), plain.sample(images, SHAPE, class_labels=labels))
        )
        film = [list(s.steps(images, SHAPE, class_labels=labels)) for s in (graphed, plain)]
        kept += [(getattr(a, n), getattr(b, n)) for a, b in zip(*film, strict=True) for n in ("x_t", "x_0_hat")]
    start: dict[str, Any] = {"class_labels": labels, "x_T": normal(3, dtype=torch.float32), "first_step": 2}
    kept.append((graphed.sample(images, SHAPE, **start), plain.sample(images, SHAPE, **start)))
    for ours, truth in kept:  # compared last: later replays must not have written into what was handed out
        assert torch.equal(ours, truth)


@pytest.mark.gpu
@every
def test_graphs_and_gpus_give_the_images_of_a_cpu(options: dict[str, Any]) -> None:
    """Histories, estimates, classes and guidance on the graph's own tensors, over two batches and a later start."""
    more: dict[str, Any] = {"guidance": 2.0, "null_class": 8, "num_steps": 6, "seed": SEED}
    labels = torch.tensor([0, 3, 5])
    truth = Sampler(conditional, HO, **options, **more)
    for graph in (False, True):
        sampler = Sampler(conditional, HO, graph=graph, **options, **more)
        for images in (numbers_of(3), numbers_of(3) + 50):
            ours = sampler.sample(images, SHAPE, "cuda", class_labels=labels)
            reference = truth.sample(images, SHAPE, class_labels=labels)
            torch.testing.assert_close(ours.cpu(), reference, rtol=0, atol=2e-3)
        x_T = normal(3, dtype=torch.float32)
        ours = sampler.sample(images, SHAPE, "cuda", class_labels=labels, x_T=x_T, first_step=2)
        reference = truth.sample(images, SHAPE, class_labels=labels, x_T=x_T, first_step=2)
        torch.testing.assert_close(ours.cpu(), reference, rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_a_graph_keeps_estimates_and_thresholds() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x[:, :3] - 0.5 * x[:, 3:])

    options: dict[str, Any] = {"self_conditioning": True, "dynamic_threshold": 0.9, "num_steps": 6, "seed": SEED}
    for name in ("ddim", "unipc"):
        plain, graphed = (
            Sampler(net, HO, sampler=name, graph=graph, **options).sample(numbers_of(3), SHAPE, "cuda")
            for graph in (False, True)
        )
        torch.testing.assert_close(graphed, plain, rtol=0, atol=1e-5)


# Pictures


def test_to_uint8() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    x = (levels / 127.5 - 1).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = to_uint8(x)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 16, 16, 3) and pixels.is_contiguous()
    assert torch.equal(pixels[1, ..., 2].flatten(), torch.arange(256, dtype=torch.uint8))  # inverse of x / 127.5 - 1
    outside = torch.tensor([-3.0, 3.0, 1e30, -1e30]).reshape(1, 4, 1, 1)
    assert to_uint8(outside).flatten().tolist() == [0, 255, 255, 0]
    for value in (math.nan, math.inf, -math.inf):
        x = torch.zeros(3, 1, 2, 2)
        x[2, 0, 1, 1] = value
        with pytest.raises(NumericsError, match="sample 2 of 3"):
            to_uint8(x)
