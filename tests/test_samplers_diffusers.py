"""Samplers against diffusers' schedulers: timesteps, single steps in float64 and float32, and a whole loop."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastddpm.diffusion import PREDICTIONS, SPACINGS, NoiseSchedule, ProcessConfig, to_diffusers_scheduler
from fastddpm.samplers import Sampler, coefficient_rows, timestep_spacing, to_uint8
from fastddpm.solvers import COLUMNS, SAMPLERS, Table, make_table
from fastddpm_kernels import Stream, draw_normal, reverse_step

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HO = NoiseSchedule.from_name("linear", 1000)
SEED = 2**35 + 3
SHAPE = (3, 4, 5)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers_of(n: int) -> Tensor:
    return torch.arange(7, 7 + n)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 1200).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))), st.sampled_from(SPACINGS))
def test_spacing_is_that_of_diffusers(sizes: tuple[int, int], spacing: str) -> None:
    num_timesteps, num_steps = sizes
    steps = timestep_spacing(num_timesteps, num_steps, spacing)
    assert steps.dtype == np.int64 and steps.shape == (num_steps,)
    assert (np.diff(steps) < 0).all() and steps[-1] >= 0 and steps[0] < num_timesteps
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=num_timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    theirs = scheduler.timesteps.tolist()
    # Rounding of their stride can add a last step at timestep -1: 61 steps of 1000, say, are 62 there.
    assert steps.tolist() == (theirs[:-1] if theirs[-1] == -1 else theirs)


def scheduler_pair(
    kind: str, prediction: str, variance: str, clip: bool, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, Callable[[Tensor], None]]:
    """A diffusers scheduler as it is (float32 tables) and one with float64 tables, and the setter of their noise."""
    noise: list[Tensor] = []
    for module in ("ddpm", "ddim"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda shape, dtype=None, **_: noise[-1].to(dtype),
        )
    facts = to_diffusers_scheduler(
        ProcessConfig(prediction=prediction, variance=variance, clip=clip, clip_range=0.8)  # type: ignore[arg-type]
    )
    plain, exact = (getattr(diffusers, kind).from_config(facts) for _ in range(2))
    exact.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact.one = torch.ones((), dtype=torch.float64)
    exact.final_alpha_cumprod = exact.one  # DDIM's set_alpha_to_one
    for scheduler in (plain, exact):
        scheduler.set_timesteps(num_steps)
    return plain, exact, noise.append


def check_step(
    rows: np.ndarray, i: int, theirs: Callable[[Any, Tensor, Tensor], tuple], plain: Any, exact: Any, put: Callable
) -> None:
    """One step in float64 to 1e-9, and in float32 as well as diffusers' own float32."""
    x_t, prediction, images = normal(3), normal(3, 1), numbers_of(3)
    put(draw_normal(images, SHAPE, seed=SEED, stream=Stream.Z, step=i, dtype=torch.float64))
    truth = theirs(exact, x_t, prediction)
    row = torch.tensor(i)
    ours = reverse_step(x_t, prediction, torch.tensor(rows), row, images, seed=SEED, return_x_0=True)
    base = theirs(plain, x_t.float(), prediction.float())
    table = torch.tensor(rows, dtype=torch.float32)
    single = reverse_step(x_t.float(), prediction.float(), table, row, images, seed=SEED, return_x_0=True)
    for what, a, b, c, d in zip(("x_s", "x_0_hat"), ours, truth, single, base, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(scale, 1), msg=lambda m: f"{what}: {m}")  # noqa: B023
        error, error_base = float((c - b).abs().max()), float((d - b).abs().max())
        assert error <= 2 * (error_base + 1e-6 * scale), f"{what}: error {error}, of diffusers {error_base}"
        assert error <= 1e-5 * max(scale, 1), f"{what}: error {error} of {scale}"


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1000, 50, 30])
def test_ddpm_steps_against_diffusers(
    num_steps: int, prediction: str, variance: str, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, exact, put = scheduler_pair("DDPMScheduler", prediction, variance, clip, num_steps, monkeypatch)
    steps = timestep_spacing(1000, num_steps)
    assert exact.timesteps.tolist() == steps.tolist()
    rows = coefficient_rows(HO, steps, variance=variance, prediction=prediction, clip_range=0.8 if clip else None)
    for i in (0, 1, num_steps // 2, num_steps - 2, num_steps - 1):
        if i == num_steps - 1 and steps[i] > 0 and variance == "fixed_large":
            continue  # their last step adds noise to the image; see to_diffusers_scheduler
        check_step(rows, i, lambda s, x, p: s.step(p, int(steps[i]), x, return_dict=False), plain, exact, put)  # noqa: B023


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1000, 50])
def test_ddim_steps_against_diffusers(
    num_steps: int, prediction: str, eta: float, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, exact, put = scheduler_pair("DDIMScheduler", prediction, "fixed_small", clip, num_steps, monkeypatch)
    steps = timestep_spacing(1000, num_steps)
    assert exact.timesteps.tolist() == steps.tolist()
    rows = coefficient_rows(HO, steps, sampler="ddim", eta=eta, prediction=prediction, clip_range=0.8 if clip else None)
    for i in (0, 1, num_steps // 2, num_steps - 2, num_steps - 1):
        check_step(
            rows,
            i,
            lambda s, x, p: s.step(p, int(steps[i]), x, eta=eta, use_clipped_model_output=True, return_dict=False),  # noqa: B023
            plain,
            exact,
            put,
        )


class Net(nn.Module):
    """A small random network of x and t."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.15, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        level = (torch.as_tensor(t) / 1000).reshape(-1, 1, 1, 1).to(x).expand(len(x), 1, *x.shape[2:])
        return SimpleNamespace(sample=x + self.last(torch.tanh(self.first(torch.cat([x, level], 1)))))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_loop_of_ddpm_pipeline_gives_our_images(
    schedule: Any, prediction: Any, variance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' scheduler, read from our scheduler_config.json and fed our x_T and z: within one 8-bit level."""
    process = ProcessConfig(schedule=schedule, num_timesteps=60, prediction=prediction, variance=variance)
    images, net = numbers_of(4), Net()
    sampler = Sampler(net, process.noise_schedule(), prediction=prediction, variance=variance, seed=SEED)
    ours = to_uint8(sampler.sample(images, (3, 8, 8)))

    scheduler = diffusers.DDPMScheduler.from_config(to_diffusers_scheduler(process))
    step = itertools.count()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda shape, **_: draw_normal(images, tuple(shape[1:]), seed=SEED, stream=Stream.Z, step=next(step)),
    )
    image = draw_normal(images, (3, 8, 8), seed=SEED, stream=Stream.X_T)
    scheduler.set_timesteps(60)
    with torch.no_grad():
        for t in scheduler.timesteps:
            image = scheduler.step(net(image, t).sample, t, image).prev_sample
    theirs = (((image / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1) * 255).round()
    assert next(step) == 59  # none at the last step
    assert ours.float().std() > 20
    difference = (ours.float() - theirs).abs()
    assert difference.max() <= 1, f"{difference.max()} levels"


# Solvers with a history: the same network values and noise at every step, from the states of our own run.

FACTS: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def scheduler_of(sampler: str, prediction: str, num_steps: int) -> Any:
    facts = FACTS | {"prediction_type": PREDICTION_TYPES[prediction]}
    if sampler == "heun":
        scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="linspace", **facts)
    elif sampler == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(timestep_spacing="trailing", **facts)
    else:
        kind = "sde-dpmsolver++" if sampler.endswith("sde") else "dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type=kind, timestep_spacing="trailing", **facts)
    scheduler.set_timesteps(num_steps)
    return scheduler


def value_of_net(x: Tensor, t: float) -> Tensor:
    """A stand-in for a network, smooth and bounded."""
    return 0.6 * x + 0.3 * torch.sin(2 * x + t / 300)


def differences(table: Table, scheduler: Any, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Of each step its timestep and how far the next states are apart, in terms of the largest value."""
    sampler_is_heun = table.evaluations == 2
    images, x, found = numbers_of(3), normal(3), []
    h = tuple(torch.zeros_like(x) for _ in range(table.num_history))
    levels = [*table.alpha_bar.tolist(), 1.0]
    rows = torch.tensor(table.rows)
    assert len(scheduler.timesteps) == len(table.timesteps)
    for i, t in enumerate(table.timesteps.tolist()):
        assert float(scheduler.timesteps[i]) == pytest.approx(t, abs=1e-2)  # by log sigma, in float32
        prediction = value_of_net(x, t)
        z = draw_normal(images, SHAPE, seed=SEED, stream=Stream.Z, step=i, dtype=torch.float64)
        # EDM's state is ours over sqrt(alpha_bar).
        scale, next_scale = (levels[i] ** 0.5, levels[i + 1] ** 0.5) if sampler_is_heun else (1.0, 1.0)
        options = {"variance_noise": z.to(dtype)} if "DPM" in type(scheduler).__name__ else {}
        theirs = scheduler.step(prediction.to(dtype), scheduler.timesteps[i], (x / scale).to(dtype), **options)
        x, _, h = reverse_step(x, prediction, rows, torch.tensor(i), images, seed=SEED, history=h)  # type: ignore[misc]
        apart = (theirs.prev_sample.double() * next_scale - x).abs().max() / x.abs().max()
        found.append((t, float(apart)))
    return found


def table_of(sampler: str, prediction: str, num_steps: int) -> Table:
    levels = SAMPLERS[sampler].levels(HO, num_steps, "trailing")
    return make_table(levels, sampler=sampler, prediction=prediction, clip_range=None)


multistep = pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun"])


@multistep
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [12, 20, 50])
def test_solvers_against_diffusers(sampler: str, prediction: str, num_steps: int) -> None:
    """As they are, with alpha_bar a product of float32 numbers, which tells most below t = 50 (and in long steps)."""
    table = table_of(sampler, prediction, num_steps)
    for t, apart in differences(table, scheduler_of(sampler, prediction, num_steps), torch.float32):
        assert apart < (2e-5 if t >= 50 else 1e-3), f"t = {t}: {apart}"


def exact_scheduler(sampler: str, prediction: str, num_steps: int, table: Table) -> Any:
    """diffusers' scheduler with our sigmas in float64."""
    scheduler = scheduler_of(sampler, prediction, num_steps)
    sigmas = torch.tensor(np.append(np.sqrt((1 - table.alpha_bar) / table.alpha_bar), 0.0))
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=2e-4, atol=0)
    scheduler.sigmas = sigmas
    return scheduler


@multistep
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [8, 20])
def test_solvers_with_the_tables_of_diffusers_replaced(sampler: str, prediction: str, num_steps: int) -> None:
    """To 1e-9 down to t = 0; in float32 to its rounding, so that what differs above is their alpha_bar alone.

    Their multistep DPM-Solver takes its steps in float32 whatever it is given.
    """
    table = table_of(sampler, prediction, num_steps)
    scheduler = exact_scheduler(sampler, prediction, num_steps, table)
    found = differences(table, scheduler, torch.float64)
    assert max(apart for _, apart in found) < (2e-6 if sampler.startswith("dpm") else 1e-9), found
    single = exact_scheduler(sampler, prediction, num_steps, table)
    single.sigmas = single.sigmas.float()
    assert max(apart for _, apart in differences(table, single, torch.float32)) < 5e-6


@multistep
@pytest.mark.parametrize("column, factor", [("C", 1.0001), ("E", 1.0001), ("H", -1.0), ("P1", 1.001)])
def test_planted_bugs_are_seen_by_diffusers(sampler: str, column: str, factor: float) -> None:
    table = table_of(sampler, "v", 20)
    i = COLUMNS.index(column)
    if not table.rows[2:-2, i].any():
        return  # this solver has none
    rows = table.rows.copy()
    rows[2:-2, i] *= factor
    found = differences(replace(table, rows=rows), scheduler_of(sampler, "v", 20), torch.float32)
    assert max(apart for t, apart in found if t >= 50) > 2e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [50, 20])
def test_inversion_against_diffusers(num_steps: int, prediction: str) -> None:
    facts = FACTS | {"prediction_type": PREDICTION_TYPES[prediction], "clip_sample": False}
    plain, exact = (diffusers.DDIMInverseScheduler(timestep_spacing="trailing", **facts) for _ in range(2))
    exact.alphas_cumprod = torch.tensor(HO.alpha_bar)
    for scheduler in (plain, exact):
        scheduler.set_timesteps(num_steps)
    table = table_of("ddim_inverse", prediction, num_steps)
    assert table.timesteps.tolist() == exact.timesteps.tolist()
    rows, images = torch.tensor(table.rows), numbers_of(3)
    for i, t in enumerate(table.timesteps.tolist()):
        x, value = normal(3), normal(3, 1)
        if i == 0 and prediction != "eps":
            continue  # they take the image for noise of no size: v counts differently then, and x_0 is divided by 0
        ours = reverse_step(x, value, rows, torch.tensor(i), images, seed=SEED)
        truth = exact.step(value, t, x).prev_sample
        single = plain.step(value.float(), t, x.float()).prev_sample.double()
        scale = float(truth.abs().max())
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9 * max(scale, 1))
        if t >= 50:
            torch.testing.assert_close(ours, single, rtol=0, atol=2e-5 * scale)


def test_dynamic_thresholds_against_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9, prediction_type="sample", **FACTS
    )
    scheduler.set_timesteps(4)
    x_t = 2 * normal(3).float()
    sampler = Sampler(lambda x, t: 1.5 * x, HO, num_steps=4, prediction="x_0", sampler="ddim", dynamic_threshold=0.9)
    theirs = scheduler.step(1.5 * x_t, int(sampler.timesteps[1]), x_t).pred_original_sample
    torch.testing.assert_close(sampler.step(1, x_t, numbers_of(3)).x_0_hat, theirs, rtol=0, atol=1e-6)
