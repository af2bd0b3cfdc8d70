"""Editing: RePaint against the moments of its recursion and the true conditional, starts, inversion, the command."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastddpm import editing
from fastddpm.cli import EditCommand, main
from fastddpm.diffusion import NoiseSchedule
from fastddpm.edit import _class_label
from fastddpm.editing import (
    Interpolation,
    as_x_0,
    inpaint,
    interpolate,
    invert,
    lerp,
    repaint_walk,
    slerp,
    start_from,
    start_step,
    variations,
)
from fastddpm.errors import ConfigError
from fastddpm.samplers import COLUMNS, Sampler, to_uint8

ROOT = Path(__file__).parents[1]
HO = NoiseSchedule.from_name("linear", 1000)
SEED = 2**35 + 3
C, E, F = (COLUMNS.index(name) for name in "CEF")

# Pairs of pixels (left, right), the rows of a picture [1, H, 2]: N(MEAN, COV), correlated.
MEAN, SD, RHO = np.array([0.1, -0.2]), 0.5, 0.95
COV = SD**2 * np.array([[1, RHO], [RHO, 1]])
LEFT = 0.8  # what is known of each pair
TRUE_MEAN, TRUE_SD = MEAN[1] + RHO * (LEFT - MEAN[0]), SD * math.sqrt(1 - RHO**2)
RIGHT_MASK = np.array([[False, True]])


def eps_map(schedule: NoiseSchedule, t: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact eps_hat of pairs is G (x_t - signal MEAN): G [2, 2] and signal MEAN."""
    a = schedule.alpha_bar[t]
    return math.sqrt(1 - a) * np.linalg.inv(a * COV + (1 - a) * np.eye(2)), math.sqrt(a) * MEAN


def pairs_oracle(schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """The exact network for pairs, of any labels."""

    def net(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        gain, centre = (torch.from_numpy(v) for v in eps_map(schedule, int(t[0])))
        return ((x.double() - centre) @ gain.T).float()

    return net


def net_of_sines(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """A stand-in for a network, element by element in float64, so that it does not depend on the batch itself."""
    return torch.sin(3 * x.double() + t[:, None, None, None] / 100).float()


def pictures(n: int, shape: tuple[int, ...] = (4, 5, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


# Pictures in


def test_pictures_become_states_and_pictures_again() -> None:
    uint8 = pictures(2)
    x = as_x_0(uint8)
    assert x.dtype == torch.float32 and x.shape == (2, 3, 4, 5) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_uint8(x), torch.from_numpy(uint8))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert torch.equal(to_uint8(as_x_0(levels))[0], torch.from_numpy(levels))
    tensor = torch.from_numpy(uint8).permute(0, 3, 1, 2)
    assert torch.equal(as_x_0(tensor), x) and torch.equal(as_x_0(tensor[0]), x[:1])
    assert torch.equal(as_x_0(x.double()), x)  # floats are taken as they are
    for wrong in (uint8.astype(np.float32), uint8.astype(np.int64), uint8[0, :, :, 0], tensor.long()):
        with pytest.raises(ConfigError, match="give an array uint8"):
            as_x_0(wrong)


# RePaint


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.integers(1, 4))
def test_the_walk_is_the_one_of_diffusers(sizes: tuple[int, int], resamples: int) -> None:
    num_steps, jump = sizes
    theirs = RePaintScheduler(num_train_timesteps=num_steps)
    theirs.set_timesteps(num_steps, jump, resamples)
    walk = repaint_walk(num_steps, jump, resamples)
    levels = [num_steps - 1]  # steps of noise less one, as they count; they go back up one by one
    for here, there in itertools.pairwise(walk):
        levels += [num_steps - 1 - there] if there > here else [num_steps - 1 - here + k for k in range(1, jump + 1)]
    assert walk[-1] == num_steps and levels[:-1] == theirs.timesteps.tolist()


def repaint_moments(sampler: Sampler, resamples: int, jump: int) -> tuple[float, float]:
    """Mean and standard deviation of the painted pixel, by RePaint followed exactly: it is linear in Gaussians."""
    levels = [*HO.alpha_bar[sampler.timesteps], 1.0]
    mean, cov = np.zeros(2), np.eye(2)
    for here, there in itertools.pairwise(repaint_walk(len(sampler.timesteps), jump, resamples)):
        a, b = levels[here], levels[there]
        if there < here:
            mean, cov = math.sqrt(b / a) * mean, b / a * cov + (1 - b / a) * np.eye(2)
            continue
        gain, centre = eps_map(HO, int(sampler.timesteps[here]))
        row = sampler.rows[here]
        x_0_map = (np.eye(2) - math.sqrt(1 - a) * gain) / math.sqrt(a)
        step = row[C] * x_0_map + row[E] * np.eye(2)
        mean = step @ mean + row[C] * math.sqrt((1 - a) / a) * gain @ centre
        cov = step @ cov @ step.T + row[F] ** 2 * np.eye(2)
        mean[0], cov[0], cov[:, 0] = math.sqrt(b) * LEFT, 0, 0  # the known one is drawn anew, of nothing else
        cov[0, 0] = 1 - b
    return float(mean[1]), math.sqrt(cov[1, 1])


def painted(sampler: Sampler, num: int = 250, **options: Any) -> np.ndarray:
    """The painted pixels of 64 `num` pairs."""
    picture = torch.full((1, 64, 2), LEFT)
    picture[..., 1] = 0.3  # what is painted over has no say
    result = inpaint(sampler, picture, RIGHT_MASK.repeat(64, 0), torch.arange(num), **options)
    assert torch.equal(result[..., 0], torch.full_like(result[..., 0], LEFT))
    return result[..., 1].double().numpy().ravel()


@pytest.mark.parametrize(
    ("num_steps", "resamples", "jump", "options"),
    [
        (12, 1, 1, {"variance": "fixed_small"}),
        (12, 4, 1, {"variance": "fixed_small"}),
        (12, 3, 1, {"variance": "fixed_large"}),
        (20, 3, 4, {"variance": "fixed_small"}),
        (12, 4, 2, {"sampler": "ddim"}),
        (12, 3, 3, {"sampler": "ddim", "eta": 0.5}),
    ],
)
def test_inpainting_has_the_moments_of_algorithm_1(
    num_steps: int, resamples: int, jump: int, options: dict[str, Any]
) -> None:
    sampler = Sampler(pairs_oracle(HO), HO, num_steps=num_steps, clip=False, seed=SEED, **options)
    values = painted(sampler, resamples=resamples, jump=jump)
    mean, sd = repaint_moments(sampler, resamples, jump)
    assert abs(values.mean() - mean) < 5 * sd / math.sqrt(len(values))
    assert abs(values.std() - sd) < 5 * sd / math.sqrt(2 * len(values))


BUGS: dict[str, Callable[[Any], Any]] = {
    "the noise of a step is the same each time it is taken": lambda normal: (
        lambda s, n, like, stream, step=None: normal(s, n, like, stream, None if step is None else 0)
    ),
    "known and jump share their noise": lambda normal: (
        lambda s, n, like, stream, step=None: normal(s, n, like, min(stream, editing._layer(editing._KNOWN)), step)
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_noise_that_is_used_twice_fails(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "_normal", BUGS[bug](editing._normal))
    with pytest.raises(AssertionError):
        test_inpainting_has_the_moments_of_algorithm_1(12, 4, 1, {"variance": "fixed_small"})


def test_resampling_brings_the_paint_to_the_conditional() -> None:
    """Without it a pixel of correlation 0.95 misses by its standard deviation; more of it, and finer steps, mend it."""

    def gaps(num_steps: int, resamples: int, jump: int = 1, variance: str = "fixed_large") -> tuple[float, float]:
        sampler = Sampler(pairs_oracle(HO), HO, num_steps=num_steps, clip=False, variance=variance)
        mean, sd = repaint_moments(sampler, resamples, jump)
        return abs(mean - TRUE_MEAN) / TRUE_SD, sd / TRUE_SD - 1

    errors = np.array([gaps(250, resamples) for resamples in (1, 2, 5, 10)])
    assert errors[0] == pytest.approx([1.06, 0.44], abs=0.01) and errors[-1] == pytest.approx([0.07, 0.05], abs=0.01)
    assert (np.diff(errors, axis=0) < 0).all(), errors
    assert gaps(250, 10, jump=10)[0] == pytest.approx(0.17, abs=0.01)
    assert gaps(20, 10)[0] > 1 and gaps(50, 10)[0] > 0.25
    # The posterior's variance is too small for steps that are taken again and again: the spread shrinks below the true.
    assert gaps(250, 10, variance="fixed_small")[1] < -0.08
    # And the samples themselves.
    sampler = Sampler(pairs_oracle(HO), HO, num_steps=60, clip=False, seed=SEED)
    once, often = (painted(sampler, 40, resamples=resamples, jump=1) for resamples in (1, 6))
    assert abs(once.mean() - TRUE_MEAN) > TRUE_SD > 2 * abs(often.mean() - TRUE_MEAN)


def test_what_is_known_is_returned_bit_by_bit() -> None:
    picture = pictures(1)[0]
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3, 2:], mask[0, 0], mask[3, 3] = 255, 127, 128  # 128 and more are painted
    sampler = Sampler(net_of_sines, HO, num_steps=8, seed=SEED)
    result = to_uint8(inpaint(sampler, picture, mask, torch.arange(3), resamples=2, jump=2)).numpy()
    kept = mask < 128
    assert (result[:, kept] == picture[kept]).all()
    changed = result[:, ~kept] != picture[~kept]
    assert changed.mean() > 0.9 and len({image.tobytes() for image in result}) == 3


def test_without_resampling_free_pixels_are_those_of_sample() -> None:
    """The net of sines looks at one pixel at a time: those that are painted know nothing of the others."""
    for name, eta in (("ddpm", 0.0), ("ddim", 0.5)):
        sampler = Sampler(net_of_sines, HO, num_steps=9, seed=SEED, sampler=name, eta=eta)
        numbers = torch.tensor([3, 11])
        mask = np.ones((4, 5), bool)
        mask[0, 0] = False
        result = inpaint(sampler, pictures(1)[0], mask, numbers, resamples=1)
        sampled = sampler.sample(numbers, (3, 4, 5))
        assert torch.allclose(result[:, :, mask], sampled[:, :, mask], rtol=0, atol=1e-6)


def test_every_draw_has_an_address_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []
    draw = editing.draw_normal

    def recorded(*args: Any, stream: int, step: int | None = None, **more: Any) -> Tensor:
        seen.append((int(stream), step))
        return draw(*args, stream=stream, step=step, **more)

    monkeypatch.setattr(editing, "draw_normal", recorded)
    sampler = Sampler(net_of_sines, HO, num_steps=12, seed=SEED)
    inpaint(sampler, pictures(1)[0], np.eye(4, 5, dtype=bool), torch.arange(2), resamples=3, jump=2)
    calls = sum(there > here for here, there in itertools.pairwise(repaint_walk(12, 2, 3)))
    assert len(seen) == len(set(seen)) and sum(stream == 6 for stream, _ in seen) == calls == 12 + 5 * 2 * 2


def states_seen(
    edit: Callable[[Sampler], object], num_steps: int, x_0: float, **options: Any
) -> list[tuple[float, Tensor]]:
    """(t, x_t) of every network call of an edit, with the network that knows that all pixels are x_0."""
    seen: list[tuple[float, Tensor]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        a = level(float(t[0]))
        seen.append((float(t[0]), x.double()))
        return ((x.double() - math.sqrt(a) * x_0) / math.sqrt(1 - a)).float()

    given: dict[str, Any] = {"variance": "fixed_small", "clip": False, "seed": SEED, **options}
    edit(Sampler(net, HO, num_steps=num_steps, **given))
    return seen


def level(t: float) -> float:
    """alpha_bar at a timestep, also between those of the schedule, where log sigma is linear (Sampler's heun)."""
    log_snr = np.interp(t, np.arange(1000), np.log(HO.snr))
    return float(1 / (1 + np.exp(-log_snr)))


def check_marginal(x: Tensor, t: float, x_0: float) -> None:
    a, n = level(t), x.numel()
    assert abs(float(x.mean()) - math.sqrt(a) * x_0) < 5 * math.sqrt((1 - a) / n), f"mean at {t}"
    assert abs(float(x.var()) - (1 - a)) < 5 * (1 - a) * math.sqrt(2 / n), f"variance at {t}"


def test_the_network_sees_q_of_x_t_after_every_jump() -> None:
    """Known and unknown part, on the way down and taken up again, have the mean and the variance of DDPM's eq. 4."""
    mask = np.zeros((20, 20), bool)
    mask[:, 10:] = True
    picture = torch.full((1, 20, 20), 0.7)
    seen = states_seen(lambda s: inpaint(s, picture, mask, torch.arange(10), resamples=3, jump=3), 10, 0.7)
    assert len(seen) == 10 + 3 * 2 * 3
    for t, x in seen[1:]:  # x_T itself is N(0, I)
        check_marginal(x[..., :10], t, 0.7)
        check_marginal(x[..., 10:], t, 0.7)


# Starts from a picture


def test_start_steps_by_hand() -> None:
    sampler = Sampler(net_of_sines, HO, num_steps=10)  # timesteps 999, 899, .. 99
    steps = {1.0: 0, 0.96: 0, 0.94: 1, 0.6: 4, 0.5: 5, 0.1: 9, 0.001: 9}
    assert {strength: start_step(sampler, strength) for strength in steps} == steps
    for wrong in (0.0, 1.01, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"strength is .* above 0 and at most 1"):
            start_step(sampler, wrong)


@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_a_start_has_the_marginal_of_its_step(strength: float) -> None:
    picture = torch.full((1, 20, 20), -0.4)
    seen = states_seen(lambda s: start_from(s, picture, strength, torch.arange(10)), 10, -0.4)
    assert [t for t, _ in seen] == list(range(round(strength * 1000) - 1, 0, -100))
    for t, x in seen:
        check_marginal(x, t, -0.4)


@pytest.mark.parametrize(
    "options",
    [{"sampler": "unipc"}, {"sampler": "dpmpp_2m"}, {"sampler": "heun"}, {"sampler": "heun", "churn": 20.0}],
)
def test_samplers_of_any_kind_start(options: dict[str, Any]) -> None:
    picture = torch.full((1, 20, 20), 0.5)
    seen = states_seen(lambda s: start_from(s, picture, 0.4, torch.arange(10)), 12, 0.5, **options)
    assert 300 < seen[0][0] < 500
    for t, x in seen[:2]:
        check_marginal(x, t, 0.5)


def test_full_strength_is_sample_and_small_strength_keeps_the_picture() -> None:
    picture, numbers = pictures(1)[0], torch.tensor([4, 0, 9])
    sampler = Sampler(net_of_sines, HO, num_steps=10, seed=SEED)
    assert torch.equal(start_from(sampler, picture, 1.0, numbers), sampler.sample(numbers, (3, 4, 5)))
    exact = Sampler(lambda x, t: eps_of(as_x_0(picture), x, t), HO, num_steps=1000, seed=SEED)
    near = start_from(exact, picture, 0.01, numbers)
    assert torch.allclose(near, as_x_0(picture).expand(3, -1, -1, -1), rtol=0, atol=1e-3)


def eps_of(x_0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    a = torch.tensor(HO.alpha_bar)[t][:, None, None, None]
    return ((x.double() - a.sqrt() * x_0) / (1 - a).sqrt()).float()


def test_variations_are_starts_of_many_numbers() -> None:
    picture = pictures(1)[0]
    sampler = Sampler(net_of_sines, HO, num_steps=10, seed=SEED)
    result = variations(sampler, picture, 4, 0.5)
    assert torch.equal(result, start_from(sampler, picture, 0.5, torch.arange(4)))
    assert len({tuple(image.flatten().tolist()) for image in result}) == 4
    with pytest.raises(ConfigError, match="variations is 0"):
        variations(sampler, picture, 0, 0.5)


# Interpolation


def test_slerp_keeps_the_norm_and_its_ends() -> None:
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    b = b * (a.norm() / b.norm())
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    states = slerp(a, b, weights)
    assert torch.equal(states[0], a) and torch.equal(states[-1], b)
    assert torch.allclose(states.flatten(1).norm(dim=1), a.norm(), rtol=1e-6)
    turned = torch.nn.functional.cosine_similarity(states[:-1].flatten(1), states[1:].flatten(1))
    assert torch.allclose(turned, turned[0], atol=1e-6)  # equal angles
    assert lerp(a, b, weights)[4].norm() < 0.8 * a.norm()
    assert torch.equal(lerp(a, b, weights)[[0, -1]], torch.stack([a, b]))
    for other in (a, 2 * a):  # no angle
        assert torch.allclose(slerp(a, other, weights), lerp(a, other, weights), atol=1e-6)


def drawn_pairs(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, 1, 8, 2, generator=generator, dtype=torch.float64)
    return (z @ torch.from_numpy(np.linalg.cholesky(COV)).T + torch.from_numpy(MEAN)).float()


def test_inversion_returns_and_improves_with_each_round() -> None:
    """The x_T that is found is that of the flow, N(0, I), and leads back to the picture; the usual inversion misses."""
    sampler = Sampler(pairs_oracle(HO), HO, sampler="ddim", num_steps=200, clip=False, seed=SEED)
    x_0, numbers = drawn_pairs(40), torch.arange(40)
    errors = []
    for refine in (1, 2, 3, 5):
        x_T = invert(sampler, x_0, numbers, refine=refine)
        back = sampler.sample(numbers, (1, 8, 2), x_T=x_T)
        errors.append(float((back - x_0).abs().max()))
    assert errors[0] > 0.01 and (np.diff(errors) < 0).all() and errors[-1] < 2e-6, errors
    assert float(x_T.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_ends_of_an_interpolation_are_the_pictures(schedule: str) -> None:
    noise = NoiseSchedule.from_name(schedule)
    sampler = Sampler(pairs_oracle(noise), noise, sampler="ddim", num_steps=100, clip=False, seed=SEED)
    a, b = drawn_pairs(2).unbind(0)
    frames = interpolate(sampler, a, b, 5)
    assert frames.shape == (5, 1, 8, 2)
    assert torch.allclose(frames[0], a, rtol=0, atol=1e-3) and torch.allclose(frames[-1], b, rtol=0, atol=1e-3)
    # The flow of Gaussian data is linear, and so is a slerp in its ends.
    x_T = torch.stack([a, b]) - torch.from_numpy(MEAN).float()
    p, q = (torch.linalg.solve(torch.linalg.cholesky(torch.from_numpy(COV)).float(), x.mT) for x in x_T)
    theta = math.acos(float((p * q).sum() / (p.norm() * q.norm())))
    middle = (x_T[0] + x_T[1]) * (math.sin(theta / 2) / math.sin(theta)) + torch.from_numpy(MEAN).float()
    assert torch.allclose(frames[2], middle, rtol=0, atol=0.05)


def test_interpolating_in_noise_has_starts_as_its_ends() -> None:
    a, b = pictures(2)
    sampler = Sampler(net_of_sines, HO, num_steps=10, seed=SEED)
    frames = interpolate(sampler, a, b, 5, how="noise", strength=0.4, number=7)
    seven = torch.tensor([7])
    assert torch.equal(frames[:1], start_from(sampler, a, 0.4, seven))
    assert torch.equal(frames[4:], start_from(sampler, b, 0.4, seven))
    # All frames share eps: the state between has the signal of the line between the pictures, and all of the noise.
    way = Interpolation(sampler, a, b, how="noise", strength=0.4, number=7)
    level = HO.alpha_bar[sampler.timesteps[way.first_step]]
    eps = (way.latents - math.sqrt(level) * torch.cat([as_x_0(a), as_x_0(b)])) / math.sqrt(1 - level)
    assert torch.allclose(eps[0], eps[1], atol=1e-5) and float(eps.std()) == pytest.approx(1, abs=0.2)


# What holds for all


EDITS: dict[str, Callable[[Sampler, Tensor], Tensor]] = {
    "inpaint": lambda s, n: inpaint(s, pictures(1)[0], np.eye(4, 5, dtype=bool), n, resamples=2, jump=2),
    "start": lambda s, n: start_from(s, pictures(1)[0], 0.5, n),
    "inversion": lambda s, n: Interpolation(s, *pictures(2)).frames(n / 10),
    "noise": lambda s, n: Interpolation(s, *pictures(2), how="noise").frames(n / 10),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_does_not_depend_on_its_batch(name: str) -> None:
    sampler = Sampler(net_of_sines, HO, sampler="ddim", num_steps=9, seed=SEED)
    numbers, edit = torch.tensor([5, 0, 3, 7, 10]), EDITS[name]
    whole = edit(sampler, numbers)
    assert torch.equal(torch.cat([edit(sampler, part) for part in numbers.split([2, 1, 2])]), whole)
    assert torch.equal(edit(sampler, numbers.flip(0)).flip(0), whole)
    assert whole.dtype == torch.float32 and not whole.requires_grad
    assert len({tuple(image.flatten().tolist()) for image in whole}) == len(numbers)


def test_one_picture_for_each_number() -> None:
    both, numbers = pictures(2), torch.tensor([3, 8])
    sampler = Sampler(net_of_sines, HO, num_steps=6, seed=SEED)
    masks = np.stack([np.eye(4, 5, dtype=bool), ~np.eye(4, 5, dtype=bool)])
    together = inpaint(sampler, both, masks, numbers, resamples=2, jump=1)
    for i in range(2):
        alone = inpaint(sampler, both[i], masks[i], numbers[i : i + 1], resamples=2, jump=1)
        assert torch.equal(together[i : i + 1], alone)
    assert torch.equal(start_from(sampler, both, 0.5, numbers)[1:], start_from(sampler, both[1], 0.5, numbers[1:]))


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu() -> None:
    """From the first network call on nothing is read by the host, and the paint is that of the CPU."""
    numbers, picture, mask = torch.arange(2), pictures(1)[0], np.eye(4, 5, dtype=bool)
    sampler = Sampler(lambda x, t, class_labels: 0.5 * x, HO, num_steps=12, seed=SEED)
    options: dict[str, Any] = {"resamples": 2, "jump": 2, "class_labels": numbers}
    try:
        result = inpaint(
            *(sampler, picture, mask, numbers),
            device="cuda",
            callback=lambda v, t, x: torch.cuda.set_sync_debug_mode("error") if v == 11 else None,
            **options,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), inpaint(sampler, picture, mask, numbers, **options), rtol=0, atol=1e-4)


def test_labels_reach_the_network() -> None:
    seen: list[list[int]] = []

    def net(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels.tolist())
        return 0.5 * x

    sampler = Sampler(net, HO, sampler="ddim", num_steps=4, seed=SEED)
    picture, numbers, labels = pictures(1)[0], torch.arange(2), torch.tensor([4, 9])
    inpaint(sampler, picture, np.eye(4, 5, dtype=bool), numbers, resamples=1, class_labels=labels)
    start_from(sampler, picture, 0.5, numbers, class_labels=labels)
    assert len(seen) > 4 and all(call == [4, 9] for call in seen)
    seen.clear()
    interpolate(sampler, picture, picture, 2, class_label=3)
    assert len(seen) == 5 * 4 + 4 and all(call == [3, 3] for call in seen)


def test_callbacks_follow_the_network_calls() -> None:
    calls: list[tuple[int, int]] = []
    sampler = Sampler(net_of_sines, HO, num_steps=6, seed=SEED)
    arguments = (sampler, pictures(1)[0], np.eye(4, 5, dtype=bool), torch.arange(2))
    inpaint(*arguments, resamples=2, jump=2, callback=lambda v, t, x: calls.append((v, t)))
    assert [v for v, _ in calls] == list(range(6 + 2 * 2))
    assert [t for _, t in calls[:5]] == [999, 832, 666, 832, 666]


def test_wrong_arguments_are_named() -> None:
    picture, numbers = pictures(1)[0], torch.arange(2)
    sampler = Sampler(net_of_sines, HO, num_steps=6, seed=SEED)
    mask = np.eye(4, 5, dtype=bool)

    def refused(message: str, edit: Callable[[], object]) -> None:
        with pytest.raises(ConfigError, match=message):
            edit()

    refused(
        "mask is black: there is nothing to paint",
        lambda: inpaint(sampler, picture, mask & False, numbers, resamples=1),
    )
    refused("mask is white: .* sample", lambda: inpaint(sampler, picture, mask | True, numbers, resamples=1))
    refused("mask is 4x5 pixels .* the picture 5x4", lambda: inpaint(sampler, picture, mask.T, numbers, resamples=1))
    refused("mask is torch.float64", lambda: inpaint(sampler, picture, mask.astype(float), numbers, resamples=1))
    refused("resamples is 0", lambda: inpaint(sampler, picture, mask, numbers, resamples=0))
    refused("jump is 0", lambda: inpaint(sampler, picture, mask, numbers, jump=0))
    refused(r"jump is 6: .* number of steps \(6\)", lambda: inpaint(sampler, picture, mask, numbers, jump=6))
    refused(r"give int64 numbers \[N\]", lambda: inpaint(sampler, picture, mask, numbers.float(), resamples=1))
    refused(r"numbers must be in 0 .. 2\^32 - 1", lambda: start_from(sampler, picture, 0.5, numbers - 1))
    refused("3 pictures and 2 numbers", lambda: start_from(sampler, pictures(3), 0.5, numbers))
    refused("draws noise .* ddim with eta 0", lambda: interpolate(sampler, picture, picture, 3))
    ddim = Sampler(net_of_sines, HO, sampler="ddim", num_steps=6, seed=SEED)
    refused("frames is 1", lambda: interpolate(ddim, picture, picture, 1))
    refused("refine is 0", lambda: interpolate(ddim, picture, picture, 3, refine=0))
    refused("how is 'morph': valid are inversion, noise", lambda: interpolate(ddim, picture, picture, 3, how="morph"))
    refused("valid are two of one size", lambda: interpolate(ddim, picture, picture.transpose(1, 0, 2), 3))
    own = Sampler(net_of_sines, HO, sampler="ddim", num_steps=6, self_conditioning=True)
    refused("self-conditioned", lambda: interpolate(own, picture, picture, 3))
    inverse = Sampler(net_of_sines, HO, sampler="ddim_inverse", num_steps=6)
    for edit in (EDITS["inpaint"], EDITS["start"], EDITS["inversion"], EDITS["noise"]):
        refused("ddim_inverse leads from images to noise", lambda edit=edit: edit(inverse, numbers))  # type: ignore[misc]
    one = Sampler(net_of_sines, HO, sampler="ddim", num_steps=1)
    refused("1 step: .* at least 2", lambda: interpolate(one, picture, picture, 3))


def test_a_sampler_with_a_history_cannot_inpaint() -> None:
    sampler = Sampler(net_of_sines, HO, sampler="dpmpp_2m", num_steps=6, seed=SEED)
    with pytest.raises(ConfigError, match="dpmpp_2m"):
        inpaint(sampler, pictures(1)[0], np.eye(4, 5, dtype=bool), torch.arange(2), resamples=1)
    assert start_from(sampler, pictures(1)[0], 0.5, torch.arange(2)).isfinite().all()


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    tiny = ["--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4", "--batch-size", "8"]
    tiny += ["--log-every", "1", "--sample-every", "0", "--diffusion.num-timesteps", "12"]
    assert main(["train", "--preset", "digits", "--run", str(folder / "run"), "--steps", "2", *tiny]) == 0
    weights = folder / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in load_file(weights).items()}, weights)
    for name, picture in zip("ab", pictures(2, (8, 8)), strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 4:] = 255
    for name, picture in {"mask": mask, "black": mask * 0, "white": mask | 255, "wide": mask.repeat(2, 1)}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    Image.fromarray(pictures(1, (16, 20, 3))[0]).save(folder / "large.png")
    Image.fromarray(np.kron(mask, np.ones((2, 2), np.uint8)).repeat(2, 1)[:, :20]).save(folder / "large-mask.png")
    return folder


def edit(run: Path, words: str, out: Path) -> np.ndarray:
    task, *rest = words.format(tmp=run).split()
    assert main(["edit", task, str(run / "run"), *rest, "--out", str(out)]) == 0
    return np.load(out / "samples.npz")["arr_0"]


def test_the_command_inpaints(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "inpaint --image {tmp}/a.png --mask {tmp}/mask.png --num 3 --resamples 2 --jump 3"
    result = edit(run, words, tmp_path / "o")
    assert "picture and mask" in capsys.readouterr().out
    picture = np.asarray(Image.open(run / "a.png"))[..., None]
    kept = np.asarray(Image.open(run / "mask.png")) == 0
    assert result.shape == (3, 8, 8, 1) and (result[:, kept] == picture[kept]).all()
    assert len({image.tobytes() for image in result}) == 3
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"edit.png", "samples.npz"}
    assert min(Image.open(tmp_path / "o" / "edit.png").size) > 100
    again = edit(run, words + " --batch-size 2", tmp_path / "p")
    assert np.abs(result.astype(int) - again).max() <= 1
    edit(run, "inpaint --image {tmp}/a.png --mask {tmp}/mask.png --num 1", tmp_path / "q")  # the defaults fit 12 steps


def test_the_command_starts_and_varies(run: Path, tmp_path: Path) -> None:
    start = edit(run, "start --image {tmp}/a.png --strength 0.5", tmp_path / "o")
    varied = edit(run, "variations --image {tmp}/a.png --num 14 --strength 0.5", tmp_path / "p")
    assert start.shape == (1, 8, 8, 1) and varied.shape == (14, 8, 8, 1)
    assert np.abs(varied[:1].astype(int) - start).max() <= 1
    other = edit(run, "start --image {tmp}/a.png --strength 0.5 --seed 1 --sampler ddim --steps 6", tmp_path / "q")
    assert not np.array_equal(other, start)


def test_the_command_interpolates(run: Path, tmp_path: Path) -> None:
    frames = edit(run, "interpolate --image {tmp}/a.png --to {tmp}/b.png --frames 5 --refine 9", tmp_path / "o")
    assert frames.shape == (5, 8, 8, 1)
    with Image.open(tmp_path / "o" / "edit.gif") as film:
        assert getattr(film, "n_frames", 1) == 5
    noise = edit(run, "interpolate --image {tmp}/a.png --to {tmp}/b.png --how noise --strength 0.3", tmp_path / "p")
    assert noise.shape == (9, 8, 8, 1)


def test_pictures_of_another_size_are_fitted_with_their_mask(run: Path, tmp_path: Path) -> None:
    words = "inpaint --image {tmp}/large.png --mask {tmp}/large-mask.png --num 1 --fit resize_crop --resamples 1"
    assert edit(run, words, tmp_path / "o").shape == (1, 8, 8, 1)


def test_a_class_is_asked_for_where_there_are_classes() -> None:
    def label(asked: int | None, classes: int | None, dropout: float = 0.0) -> int | None:
        pipeline: Any = SimpleNamespace(num_classes=classes, process=SimpleNamespace(label_dropout=dropout))
        return _class_label(EditCommand("start", "RUN", image="x.png", label=asked), pipeline)

    assert label(None, None) is None and label(3, 10) == 3
    assert label(None, 10, dropout=0.1) == 10  # the class that stands for none
    for asked, classes, message in ((3, None, "without classes"), (None, 10, "0 .. 9"), (10, 10, "0 .. 9")):
        with pytest.raises(ConfigError, match=f"--class is {asked}: .*{message}"):
            label(asked, classes)


def test_two_processes_edit_the_same(run: Path, tmp_path: Path) -> None:
    words = ["edit", "interpolate", str(run / "run"), "--image", str(run / "a.png"), "--to", str(run / "b.png")]
    words += ["--frames", "3", "--steps", "6", "--batch-size", "1", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fastddpm", "--", *words, str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("edit.png") == 1
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert a.shape == b.shape == (3, 8, 8, 1) and np.abs(a - b).max() <= 1


BAD = {
    "no task": ("", 5, "{{inpaint,start,variations,interpolate}} is missing"),
    "unknown task": ("outpaint {run} --image {tmp}/a.png", 5, "inpaint"),
    "no image": ("start {run}", 5, "--image"),
    "no mask": ("inpaint {run} --image {tmp}/a.png", 5, "inpaint needs --mask: a picture of the image's size, white"),
    "no end": ("interpolate {run} --image {tmp}/a.png", 5, "interpolate needs --to"),
    "another task's": ("start {run} --image {tmp}/a.png --mask {tmp}/mask.png", 5, "--mask is not an option of start"),
    "missing image": ("start {run} --image {tmp}/none.png", 4, "--image {tmp}/none.png cannot be read: No such file"),
    "missing mask": ("inpaint {run} --image {tmp}/a.png --mask {tmp}/none.png", 4, "--mask {tmp}/none.png cannot be"),
    "a folder": ("start {run} --image {run}", 4, "--image {run} cannot be read"),
    "no picture": (
        "start {run} --image {run}/config.json",
        4,
        "--image {run}/config.json cannot be decoded: it is not",
    ),
    "wrong size": ("start {run} --image {tmp}/wide.png", 4, "is 16x8 pixels (width x height), the model takes 8x8: "),
    "mask's size": ("inpaint {run} --image {tmp}/a.png --mask {tmp}/wide.png", 4, "16x8 pixels (width x height) and"),
    "black": ("inpaint {run} --image {tmp}/a.png --mask {tmp}/black.png", 5, "the mask is black: there is nothing"),
    "white": ("inpaint {run} --image {tmp}/a.png --mask {tmp}/white.png", 5, "the mask is white: "),
    "strength": ("start {run} --image {tmp}/a.png --strength 1.5", 5, "strength is 1.5: it must be above 0 and at"),
    "no strength": ("start {run} --image {tmp}/a.png --strength 0", 5, "strength is 0.0"),
    "no results": ("variations {run} --image {tmp}/a.png --num 0", 5, "--num is 0: it must be at least 1"),
    "frames": ("interpolate {run} --image {tmp}/a.png --to {tmp}/b.png --frames 1", 5, "--frames is 1: it must be"),
    "ancestral": ("interpolate {run} --image {tmp}/a.png --to {tmp}/b.png --sampler ddpm", 5, "take ddim with eta 0"),
    "strength of inversion": (
        "interpolate {run} --image {tmp}/a.png --to {tmp}/b.png --strength 0.5",
        5,
        "--strength is for --how noise",
    ),
    "jump": (
        "inpaint {run} --image {tmp}/a.png --mask {tmp}/mask.png --jump 12",
        5,
        "jump is 12: to resample, it must",
    ),
    "jump 0": ("inpaint {run} --image {tmp}/a.png --mask {tmp}/mask.png --jump 0", 5, "jump is 0"),
    "too many steps": ("start {run} --image {tmp}/a.png --steps 13", 5, "13"),
    "a class": ("start {run} --image {tmp}/a.png --class 3", 5, "--class is 3"),
    "a colour": ("start {run} --image {tmp}/a.png --background nocolour", 5, "--background is 'nocolour'"),
    "no net": ("start {tmp}/none --image {tmp}/a.png", 6, "{tmp}/none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, expected = BAD[name]
    places = {"tmp": run, "run": run / "run"}
    assert main(["edit", *words.format(**places).split(), "--out", str(tmp_path / "o")]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastddpm: error: "), lines
    assert expected.format(**places) in lines[0], lines[0]
