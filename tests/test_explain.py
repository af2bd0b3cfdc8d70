"""Explanations: moments, weights and terms against independent formulas, and what the commands print and write."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import fastddpm.explain
from fastddpm.cli import main
from fastddpm.config import Config, preset, to_dict
from fastddpm.diffusion import NoiseSchedule, ProcessConfig
from fastddpm.explain import (
    MOMENTS,
    expected_moments,
    moments,
    nearest_distance,
    noise_both_ways,
    pairwise_distance,
    walk_bound,
)
from fastddpm.files import write_json
from fastddpm.pipeline import write_pipeline
from fastddpm.unet import UNet
from fastddpm_kernels import Stream, draw_normal

pytest.importorskip("sklearn")

T = 12


def write_run(folder: Path, **changes: Any) -> Config:
    """A run folder with a network that has not been trained, whose zero-scale layers have been shaken."""
    model = {"block_out_channels": (8, 16), "norm_num_groups": 4} | changes.pop("model", {})
    diffusion = {"num_timesteps": T} | changes.pop("diffusion", {})
    config = preset("digits", run=str(folder), model=model, diffusion=diffusion, **changes)
    torch.manual_seed(0)
    unet = UNet(config.network())
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    write_pipeline(folder, config.network(), config.diffusion, unet.state_dict())
    write_json(folder / "config.json", {"config": to_dict(config), "versions": {}, "num_images": 1797})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "run"
    write_run(folder)
    return folder


def explain(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["explain", *args]) == 0
    return capsys.readouterr().out


def named_files(out: str) -> list[Path]:
    """The files that the last lines name, all of which must be there."""
    paths = [Path(line.split()[1]) for line in out.strip().splitlines()[-3:] if len(line.split()) == 2]
    assert paths and all(path.is_file() for path in paths)
    return paths


# forward


def schedule_of(name: str = "linear", num_timesteps: int = T) -> NoiseSchedule:
    return NoiseSchedule.from_name(name, num_timesteps)


def test_the_chain_is_the_recursion_and_no_image_depends_on_its_batch() -> None:
    schedule = schedule_of()
    x_0 = torch.linspace(-1, 1, 3 * 2 * 2 * 5).reshape(3, 2, 2, 5)
    numbers, expected = torch.arange(3), x_0.double()
    for t, chain, closed in noise_both_ways(schedule, x_0, seed=7):
        z = draw_normal(numbers, (2, 2, 5), seed=7, stream=Stream.Z, step=t).double()
        eps = draw_normal(numbers, (2, 2, 5), seed=7, stream=Stream.EPS, step=t).double()
        expected = (1 - schedule.beta[t]) ** 0.5 * expected + schedule.beta[t] ** 0.5 * z
        alpha_bar = np.prod(1 - schedule.beta[: t + 1])
        assert torch.allclose(chain.double(), expected, atol=1e-5)
        assert torch.allclose(closed.double(), alpha_bar**0.5 * x_0.double() + (1 - alpha_bar) ** 0.5 * eps, atol=1e-5)
    both = list(noise_both_ways(schedule, x_0, seed=7))
    for one, many in zip(noise_both_ways(schedule, x_0[:1], seed=7), both, strict=True):
        assert torch.equal(one.chain, many.chain[:1]) and torch.equal(one.closed, many.closed[:1])


def test_standard_errors_are_those_of_many_repetitions() -> None:
    """Each moment of q(x_t | x_0) has the mean and the standard deviation that its formula says."""
    schedule, rng = schedule_of("cosine", 5), np.random.default_rng(0)
    x_0 = torch.from_numpy(rng.choice([-1.0, -0.5, 0.3, 1.0], 400)).reshape(1, 1, 20, 20)
    expected, errors = expected_moments(schedule, x_0)
    for t in range(5):
        signal, noise = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
        found = np.array(
            [
                moments(signal * x_0 + noise * torch.from_numpy(rng.standard_normal((1, 1, 20, 20))), x_0, signal)
                for _ in range(600)
            ]
        )
        z = (found - expected[t]) / errors[t]
        assert np.abs(z.mean(0)).max() < 5 / math.sqrt(600), MOMENTS
        assert np.abs(z.std(0) - 1).max() < 0.12, MOMENTS  # 4 standard errors of 600


def test_forward_agrees_and_writes_its_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path) -> None:
    out = explain(capsys, "forward", str(run), "--num", "3", "--out", str(tmp_path))
    assert "cosine schedule, T = 12, 1024 images of digits, 65,536 pixel values" in out
    assert "Both have the moments of the formula." in out and "NOT ALL" not in out
    beta = ProcessConfig(schedule="cosine", num_timesteps=T).noise_schedule().beta
    assert f"= {1 - (1 - beta[0]) * (1 - beta[1]):.6g}" in out
    assert [path.name for path in named_files(out)] == ["forward.png", "forward_moments.png", "forward.gif"]
    with Image.open(tmp_path / "forward.gif") as film:
        assert film.n_frames == T + 1
    assert {path.name for path in tmp_path.iterdir()} == {"forward.png", "forward_moments.png", "forward.gif"}


def test_forward_needs_no_run_and_notices_a_wrong_chain(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = fastddpm.explain.noise_both_ways

    def wrong(schedule: NoiseSchedule, x_0: torch.Tensor, **options: Any) -> Any:
        planted = SimpleNamespace(**vars(schedule), q_mean_variance=schedule.q_mean_variance)
        planted.beta = schedule.beta * 1.05
        return true(planted, x_0, **options)  # type: ignore[arg-type]

    config = preset("digits", diffusion={"num_timesteps": T})
    monkeypatch.setattr(fastddpm.explain, "preset", lambda name: config)
    monkeypatch.chdir(tmp_path)
    explain(capsys, "forward", "--num", "1")
    assert sorted(path.name for path in (tmp_path / "explain").iterdir())[0] == "forward.gif"
    monkeypatch.setattr(fastddpm.explain, "noise_both_ways", wrong)
    assert "NOT ALL are within 5 standard errors" in explain(capsys, "forward", "--num", "1")


# noise


def test_distances_are_those_of_all_pairs() -> None:
    images = torch.randn(7, 2, 3, 5, generator=torch.Generator().manual_seed(1))
    pairs = [float((images[i] - images[j]).square().mean().sqrt()) for i in range(7) for j in range(7) if i < j]
    mean, error = pairwise_distance(images)
    assert mean == pytest.approx(np.mean(pairs), rel=1e-6)
    left_out = [pairwise_distance(torch.cat([images[:i], images[i + 1 :]]))[0] for i in range(7)]
    assert error == pytest.approx(math.sqrt(6 / 7 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)))
    others = images[:3] + 0.5
    expected = np.mean([min(float((a - b).square().mean().sqrt()) for b in others) for a in images])
    assert nearest_distance(images, others) == pytest.approx(expected, rel=1e-6)


def test_the_standard_error_of_the_diversity_is_that_of_many_sets() -> None:
    generator = torch.Generator().manual_seed(2)
    found = np.array([pairwise_distance(torch.randn(12, 1, 1, 3, generator=generator)) for _ in range(300)])
    assert math.sqrt((found[:, 1] ** 2).mean()) == pytest.approx(found[:, 0].std(), rel=0.25)


def test_noise_shows_all_temperatures(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path) -> None:
    out = explain(capsys, "noise", str(run), "--num", "2", "--steps", "6", "--out", str(tmp_path))
    assert "64 images of seed 0, 6 ancestral steps" in out and "nearest of 1797 training images" in out
    tables = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["0.5"], ["0"])]
    assert [row[0] for row in tables] == ["1", "0.5", "0"] * 2
    assert all(len(row) == 5 for row in tables[:3]) and all(len(row) == 5 and row[2] == "+-" for row in tables[3:])
    assert float(tables[2][1]) < float(tables[1][1]) < float(tables[0][1])  # of x_t after the first step
    (picture,) = named_files(out)
    assert picture == tmp_path / "noise.png"


def test_noise_without_the_runs_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(tmp_path / "run", data={"source": "folder:" + str(tmp_path / "gone")})
    assert main(["explain", "noise", str(tmp_path / "run"), "--steps", "2", "--temperatures", "1"]) == 0
    said = capsys.readouterr()
    assert "no distances to training images: folder:" in said.err and "nearest" not in said.out
    assert (tmp_path / "run" / "explain" / "noise.png").is_file()


# bound


def fake_pipeline(process: ProcessConfig, error: float, channels: int = 1) -> Any:
    """A network that is right about eps for x_0 = 0 but for a part of it."""
    schedule = process.noise_schedule()

    def unet(x_t: torch.Tensor, t: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        signal = schedule.table("sqrt_alpha_bar", dtype=torch.float64)[t].view(-1, 1, 1, 1)
        noise = schedule.table("sqrt_one_minus_alpha_bar", dtype=torch.float64)[t].view(-1, 1, 1, 1)
        eps = x_t.double() * (1 + error * torch.sin(3 * x_t.double())) / (signal**2 + noise**2).sqrt() * noise
        if process.variance == "learned_range":
            return (torch.cat([eps, 0.6 * torch.cos(x_t.double())], dim=1),)
        return (eps,)

    return SimpleNamespace(unet=unet, process=process, schedule=schedule)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_walk_is_what_the_densities_say(variance: Any, clip: bool) -> None:
    """log w and the parts of L_t against torch.distributions, along the same chains."""
    loss: Any = "hybrid" if variance == "learned_range" else "simple"
    process = ProcessConfig(schedule="linear", num_timesteps=T, variance=variance, clip=clip, loss=loss)
    pipeline = fake_pipeline(process, 0.3)
    schedule, numbers = pipeline.schedule, torch.arange(5, 9)
    images = torch.randint(0, 256, (4, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    walk = walk_bound(pipeline, images, None, numbers, seed=11)
    x_0 = images.double() / 127.5 - 1
    log_w, x_t = torch.zeros(4, dtype=torch.float64), x_0
    for t in range(T):
        before = x_t
        z = draw_normal(numbers, (1, 2, 3), seed=11, stream=Stream.BOUND, step=t).double()
        step = Normal((1 - schedule.beta[t]) ** 0.5 * before, schedule.beta[t] ** 0.5)
        x_t = step.mean + step.stddev * z
        log_w -= step.log_prob(x_t).mean((1, 2, 3))
        output = pipeline.unet(x_t.float(), torch.full((4,), t))[0]
        alpha_bar = schedule.alpha_bar[t]
        free = (x_t - (1 - alpha_bar) ** 0.5 * output[:, :1]) / alpha_bar**0.5
        x_0_hat = free.clamp(-1, 1) if clip else free
        sigma_2 = torch.full_like(x_0, float(process.noise_schedule().posterior_variance[max(t, 1)]))
        if variance == "fixed_large" and t:
            sigma_2 = torch.full_like(x_0, float(schedule.beta[t]))
        if variance == "learned_range":
            frac = (output[:, 1:] + 1) / 2
            sigma_2 = torch.exp(frac * math.log(schedule.beta[t]) + (1 - frac) * sigma_2.log())
        p = Normal(schedule.posterior_mean_coef1[t] * x_0_hat + schedule.posterior_mean_coef2[t] * x_t, sigma_2.sqrt())
        if t == 0:
            upper = torch.where(images == 255, torch.ones_like(x_0), p.cdf(x_0 + 1 / 255))
            lower = torch.where(images == 0, torch.zeros_like(x_0), p.cdf(x_0 - 1 / 255))
            decoder = (upper - lower).log().mean((1, 2, 3))
            log_w += decoder
            assert np.allclose(walk.terms[0], -decoder, rtol=1e-6)
            continue
        log_w += p.log_prob(before).mean((1, 2, 3))
        q = Normal(
            schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x_t,
            schedule.posterior_variance[t] ** 0.5,
        )
        apart = ((q.mean - p.mean) ** 2 / (2 * sigma_2)).mean((1, 2, 3))
        assert np.allclose(walk.terms[t], kl_divergence(q, p).mean((1, 2, 3)), rtol=1e-6)
        assert np.allclose(walk.mean_part[t], apart, rtol=1e-6)
        eps = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        assert np.allclose(walk.eps_error[t], (eps - output[:, :1]).square().mean((1, 2, 3)), rtol=1e-6)
        assert np.allclose(walk.weight[t] * walk.eps_error[t], walk.unclipped[t], rtol=1e-9)
        if variance != "learned_range":
            weight = schedule.beta[t] ** 2 / (2 * sigma_2[0, 0, 0, 0] * schedule.alpha[t] * (1 - alpha_bar))
            assert np.allclose(walk.weight[t], weight, rtol=1e-9)
        if not clip:
            assert np.allclose(walk.mean_part[t], walk.unclipped[t], rtol=1e-12)
    log_w += Normal(0, 1).log_prob(x_t).mean((1, 2, 3))
    assert np.allclose(walk.log_w, log_w, rtol=1e-6)


def test_three_terms_are_the_expectation_of_log_w() -> None:
    """The telescoping, by Monte Carlo; with 1.3 times the means' part it would not hold."""
    process = ProcessConfig(schedule="linear", num_timesteps=T, variance="fixed_large", clip=False)
    images = torch.full((4000, 1, 1, 2), 150, dtype=torch.uint8)
    walk = walk_bound(fake_pipeline(process, 0.3), images, None, torch.arange(4000), seed=0)
    difference = -walk.log_w - walk.bound
    error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < 4 * error and error < 0.02 * walk.bound.mean()
    assert abs((difference - 0.3 * walk.mean_part[1:].sum(0)).mean()) > 6 * error
    # Jensen: more chains inside the logarithm give a smaller cost.
    inside = np.log(np.exp(2 * walk.log_w.reshape(-1, 8)).mean(1)) / 2
    assert -inside.mean() < -walk.log_w.mean() - 3 * error


def test_bound_walks_through_its_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path) -> None:
    out = explain(capsys, "bound", str(run), "--num", "4", "--out", str(tmp_path))
    figures = [float(number) for number in re.findall(r"(\S+) \+- \d", out)]
    assert len(figures) == 10
    inside, jensen, gap, prior, middle, first, total, _, variances, means = figures
    assert inside <= jensen and gap == pytest.approx(jensen - inside, abs=2e-5 * abs(jensen))
    assert total == pytest.approx(prior + middle + first, rel=1e-5) and middle == pytest.approx(variances + means)
    text, terms = named_files(out)
    assert text.read_text().strip() in out and terms.name == "bound.png"
    assert "L_simple" in text.read_text() and "The weight goes from" in text.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion": {"variance": "learned_range", "loss": "hybrid"}},
        {"diffusion": {"prediction": "v", "self_conditioning": True, "num_timesteps": 3}},
        {"conditional": True, "model": {"num_class_embeds": 10}, "diffusion": {"label_dropout": 0.1}},
        {"diffusion": {"num_timesteps": 1}},
    ],
    ids=["learned_range", "self_conditioning", "classes", "one step"],
)
def test_every_kind_of_run_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_run(tmp_path / "run", **changes)
    assert "their sum" in explain(capsys, "bound", str(tmp_path / "run"), "--num", "2")
    explain(capsys, "noise", str(tmp_path / "run"), "--temperatures", "0", "--steps", "1")
    assert len(list((tmp_path / "run" / "explain").iterdir())) == 3


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("noise",), 5, "explain noise is about a trained network: fastddpm explain noise RUN"),
        (("bound",), 5, "explain bound is about a trained network"),
        (("bound", "{run}", "--num", "0"), 5, "--num is 0: it must be at least 1"),
        (("forward", "{run}/nothing"), 5, "nothing is not a run folder: it has no config.json"),
        (("noise", "{run}/nothing/at/all"), 6, "is not a folder"),
        (("noise", "{run}", "--temperatures", "-1"), 5, "--temperatures has -1.0: each must be a number of at least 0"),
        (("noise", "{run}", "--steps", "13"), 5, "13"),
        (("forward", "{run}", "--seed", "-1"), 5, "seed is -1"),
        (("forward", "{run}", "--film", "mp4"), 5, "forward.mp4: for .mp4 the program ffmpeg is needed and is not on"),
        (("backward",), 5, "backward"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run: Path,
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    out = () if args[0] == "backward" else ("--out", str(tmp_path))
    assert main(["explain", *(arg.format(run=run) for arg in args), *out]) == code
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("fastddpm: error: ") and words in line and not said.out
