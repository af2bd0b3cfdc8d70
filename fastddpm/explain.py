"""What `fastddpm explain` does: three pieces of the derivation of DDPM on a run's own images, network and numbers.

forward: q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), so one draw stands for t + 1 steps (Ho et al. 2020,
DDPM, eq. 4). noise: what becomes of samples whose reverse steps take the mean and leave out sigma z (algorithm 2, line
4). bound: from log p(x_0) by Jensen's inequality to L_T + sum L_t + L_0 and to the loss on eps (eqs. 3, 5, 8, 12, 14).
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal

from .bound import decoder_log_likelihood, prior_term, reverse_log_variance, vlb_term
from .config import Config, preset, read_config
from .data import open_data
from .diffusion import NoiseSchedule, check_seed
from .errors import ConfigError, DataError
from .evaluation import network_of, open_split
from .files import expand, replace_file, writable_folder
from .machine import DTYPES, make_accelerator, settle_precision
from .order import spread
from .pictures import captioned, check_animation, curve_plot, film, film_steps, save_animation, save_picture, stacked
from .pipeline import Pipeline, load_pipeline
from .runlog import make_bar
from .samplers import Sampler, to_uint8

if TYPE_CHECKING:
    from .cli import ExplainCommand

SHOWN = {"forward": 8, "noise": 8, "bound": 32}
"""Images of each topic where --num is not given."""
OF_ONE_TOPIC = {"steps": ("noise",), "temperatures": ("noise",), "film": ("forward",)}
MOMENT_VALUES = 1 << 16
"""Pixel values, at least, over which moments of the forward process are taken."""
LEAST_DIVERSITY = 64
"""Images, at least, between which distances are taken."""
MOST_TRAINING = 2048
"""Training images, at most, among which the nearest one is looked for."""
PATHS = 2
"""Chains x_1 .. x_T drawn for each image of the bound."""
LARGEST_Z = 5.0
"""Standard errors that no measurement is away from a formula that holds (once in 2 million)."""

_STRIPS = 4  # images in the filmstrips of forward
_STRIP_FRAMES, _FILM_FRAMES = 11, 60
_DOTS = 24  # measurements shown on a curve


def run_explain(command: "ExplainCommand") -> int:
    """Explain `command.topic`: the text goes to stdout, pictures into the folder, named at the end.

    Returns:
        The exit code.

    Raises:
        ConfigError: a value that cannot be run, no run where one is needed, a folder that cannot be written.
        CheckpointError: no weights in the run, or weights that do not fit.
        DataError: images that cannot be opened or read, or no scikit-learn for the digits.
    """
    num = SHOWN[command.topic] if command.num is None else command.num
    if num < 1:
        raise ConfigError(f"--num is {num}: it must be at least 1")
    check_seed(command.seed)
    for field in dataclasses.fields(command):
        topics = OF_ONE_TOPIC.get(field.name)
        if topics is not None and command.topic not in topics and getattr(command, field.name) != field.default:
            raise ConfigError(f"--{field.name} is an option of explain {' and '.join(topics)}, not of {command.topic}")
    if command.topic != "forward" and not command.run:
        raise ConfigError(f"explain {command.topic} is about a trained network: fastddpm explain {command.topic} RUN")
    run = expand(command.run) if command.run else None
    out = command.out or (str(run / "explain") if run is not None and run.is_dir() else "explain")
    precision, why = settle_precision(command.precision)
    acc = make_accelerator(precision)
    if not acc.is_main_process:
        return 0  # one process explains
    if why is not None and command.topic != "forward":
        print(f"precision {precision}: {why}", file=sys.stderr)
    job = Job(command, num, run, writable_folder(expand(out), "output folder"), acc.device, DTYPES[precision])
    for name, path in TOPICS[command.topic](job).items():
        print(f"{name:10} {path}")
    return 0


class Job(NamedTuple):
    """What is explained, of what, and where to."""

    command: "ExplainCommand"
    num: int
    run: Path | None
    out: Path
    device: torch.device
    dtype: torch.dtype

    def pipeline(self) -> Pipeline:
        """The run's network, in the precision asked for."""
        pipeline = load_pipeline(self.command.run, self.device)
        pipeline.unet.requires_grad_(False)
        pipeline.unet.cast_weights(self.dtype)
        return pipeline


def _own_config(run: Path) -> Config:
    config = read_config(run)
    if config is None:
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    return config


# forward


class Noising(NamedTuple):
    """The forward process at one t: by t + 1 steps, and by one draw."""

    t: int
    chain: Tensor
    """[N, C, H, W], of q(x_t | x_{t-1}), from x_{t-1} of the entry before."""
    closed: Tensor
    """[N, C, H, W], of q(x_t | x_0), with noise of its own at every t."""


def noise_both_ways(schedule: NoiseSchedule, x_0: Tensor, *, seed: int, impl: str | None = None) -> Iterator[Noising]:
    """x_t of all t = 0 .. T-1 in turn, x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z, and in closed form.

    Args:
        schedule: the process.
        x_0: float32 [N, C, H, W] in -1 .. 1; image n has the noise of number n, so the rest do not matter to it.
        seed: of the noise, which is addressed by image and t.
        impl: as in fastddpm_kernels.
    """
    images = torch.arange(len(x_0), device=x_0.device)

    def normals(stream: Stream, t: int) -> Tensor:
        shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
        return draw_normal(images, shape, seed=seed, stream=stream, step=t, impl=impl)

    x_t = x_0
    for t in range(schedule.num_timesteps):
        x_t = math.sqrt(schedule.alpha[t]) * x_t + math.sqrt(schedule.beta[t]) * normals(Stream.Z, t)
        mean, variance = schedule.q_mean_variance(x_0, t)
        yield Noising(t, x_t, mean + variance.sqrt() * normals(Stream.EPS, t))


MOMENTS = ("coefficient", "mean", "variance", "correlation")


def moments(x_t: Tensor, x_0: Tensor, signal: float) -> Tensor:
    """What x_t [N, C, H, W] is made of, over all its values: float64 [4], in the order of MOMENTS, on the device.

    The coefficient of x_0 (least squares), the mean and the variance of x_t - signal x_0, the correlation with x_0.
    """
    x, u = x_t.double().flatten(), x_0.double().flatten()
    rest = x - signal * u
    x_centred, u_centred = x - x.mean(), u - u.mean()
    correlation = (x_centred * u_centred).sum() / (x_centred.square().sum() * u_centred.square().sum()).sqrt()
    return torch.stack([(x * u).sum() / u.square().sum(), rest.mean(), rest.var(), correlation])


def expected_moments(schedule: NoiseSchedule, x_0: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What moments gives for x_t of q(x_t | x_0), x_0 given, and its standard errors: float64 [T, 4] each.

    With M values, s^2 the variance of x_0 and rho = sqrt(alpha_bar) s / sqrt(alpha_bar s^2 + 1 - alpha_bar): errors
    sqrt((1 - alpha_bar) / sum x_0^2), sqrt((1 - alpha_bar) / M), (1 - alpha_bar) sqrt(2 / M) and, to first order,
    (1 - rho^2) sqrt((1 - rho^2 / 2) / M).
    """
    u = x_0.double().flatten()
    count, squares, spread_of_x_0 = u.numel(), float(u.square().sum()), float(u.var(correction=0))
    signal, noise = schedule.alpha_bar, 1 - schedule.alpha_bar
    rho_2 = signal * spread_of_x_0 / (signal * spread_of_x_0 + noise)
    expected = np.stack([np.sqrt(signal), np.zeros_like(signal), noise, np.sqrt(rho_2)], axis=1)
    errors = [
        np.sqrt(noise / squares),
        np.sqrt(noise / count),
        noise * math.sqrt(2 / count),
        (1 - rho_2) * np.sqrt((1 - rho_2 / 2) / count),
    ]
    return expected, np.stack(errors, axis=1)


def explain_forward(job: Job) -> dict[str, Path]:
    """Why one draw is enough: T steps and the closed form side by side."""
    names = ("forward.png", "forward_moments.png", f"forward.{job.command.film}")
    strips, plot, movie = (job.out / name for name in names)
    check_animation(movie)
    config = preset("digits") if job.run is None else _own_config(job.run)
    schedule = config.diffusion.noise_schedule()
    num_timesteps = schedule.num_timesteps
    shape = (config.channels, *config.model.image_size)
    num = max(job.num, -(-MOMENT_VALUES // math.prod(shape)))
    data = open_data(dataclasses.replace(config.data, resident=False), config.model.image_size, config.channels)
    with contextlib.closing(data.batches(config.seed, 0, 1, num, workers=0)) as batches:
        x_0 = next(batches).images.to(job.device).float() / 127.5 - 1

    states = film_steps(num_timesteps, _FILM_FRAMES)  # state s is x_0 after s steps
    pictures = {name: [to_uint8(x_0[: job.num]).cpu().numpy()] for name in ("chain", "closed")}
    measured = torch.empty(num_timesteps, 2, len(MOMENTS), dtype=torch.float64, device=job.device)
    strip = film_steps(num_timesteps, _STRIP_FRAMES)
    kept = sorted({*states, *strip})
    with make_bar("noising", "steps", num_timesteps) as bar:
        for t, chain, closed in noise_both_ways(schedule, x_0, seed=job.command.seed):
            for i, x_t in enumerate((chain, closed)):
                measured[t, i] = moments(x_t, x_0, float(schedule.sqrt_alpha_bar[t]))
            if t + 1 in kept:
                pictures["chain"].append(to_uint8(chain[: job.num]).cpu().numpy())
                pictures["closed"].append(to_uint8(closed[: job.num]).cpu().numpy())
            bar.update()
    found = measured.cpu().numpy()
    expected, errors = expected_moments(schedule, x_0)
    z = (found - expected[:, None]) / errors[:, None]

    print(_forward_text(config, schedule, x_0.numel(), num, found, expected, errors, z))
    labels = {"chain": "step by step", "closed": "one draw"}
    at = {state: i for i, state in enumerate(kept)}
    frames = {name: np.stack(images) for name, images in pictures.items()}
    rows = {
        f"image {n}\n{labels[name]}": frames[name][[at[s] for s in strip], n]
        for n in range(min(job.num, _STRIPS))
        for name in labels
    }
    captions = [_state_name(s, num_timesteps) for s in strip]
    picture = captioned(rows, title="x_0 to x_T by T steps, and each x_t by one draw", columns=captions, min_side=720)
    save_picture(picture, strips)
    save_picture(_moments_plot(schedule, found, z), plot)
    moving = {labels[name]: frames[name][[at[s] for s in states]] for name in labels}
    save_animation(film(moving, [_state_name(s, num_timesteps) for s in states]), movie)
    return {"strips": strips, "moments": plot, "film": movie}


def _state_name(state: int, num_timesteps: int) -> str:
    return {0: "x_0", num_timesteps: "x_T"}.get(state, f"t = {state - 1}")


def _forward_text(
    config: Config,
    schedule: NoiseSchedule,
    num_values: int,
    num_images: int,
    found: np.ndarray,
    expected: np.ndarray,
    errors: np.ndarray,
    z: np.ndarray,
) -> str:
    beta, alpha, alpha_bar, last = schedule.beta, schedule.alpha, schedule.alpha_bar, schedule.num_timesteps - 1
    coefficient, variance = 1.0, 0.0
    worst = 0.0
    for t in range(last + 1):
        coefficient, variance = math.sqrt(alpha[t]) * coefficient, alpha[t] * variance + beta[t]
        worst = max(worst, abs(coefficient - math.sqrt(alpha_bar[t])), abs(variance - (1 - alpha_bar[t])))
    lines = [
        f"Why one draw is enough: {config.diffusion.schedule} schedule, T = {last + 1}, {num_images} images of "
        f"{config.data.source}, {num_values:,} pixel values.",
        "",
        "One step scales what is there and adds fresh noise z ~ N(0, I):",
        "    x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z_t,    alpha_t = 1 - beta_t",
    ]
    if last >= 1:
        lines += [
            "Two steps: the noise of the first is scaled by the second, and independent Gaussians add their variances:",
            "    x_1 = sqrt(alpha_1 alpha_0) x_0 + sqrt(alpha_1 beta_0) z_0 + sqrt(beta_1) z_1",
            f"    alpha_1 beta_0 + beta_1 = {alpha[1]:.6f} x {beta[0]:.6g} + {beta[1]:.6g} = "
            f"{alpha[1] * beta[0] + beta[1]:.6g} = 1 - alpha_1 alpha_0 = {1 - alpha_bar[1]:.6g}",
        ]
    lines += [
        "Every step turns the variance v into alpha v + beta, which keeps v = 1 - alpha_bar, with alpha_bar the",
        "product of all alphas so far: alpha (1 - alpha_bar) + (1 - alpha) = 1 - alpha alpha_bar. The steps are one:",
        "    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)",
        f"    the recursion over all {last + 1} steps and the closed form differ by {worst:.1e} at most",
        "",
        "Measured, the standard error behind it:",
        f"{'':6}  {'what of x_0 is left':^40}  {'variance of the rest':^40}",
        f"{'t':>6}" + f"  {'formula':>9}{'step by step':>13}{'one draw':>10}{'+-':>8}" * 2,
    ]
    for t in sorted({round(share * last) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}):
        cells = f"{t:6}"
        for m in (MOMENTS.index("coefficient"), MOMENTS.index("variance")):
            steps, draw = found[t, :, m]
            cells += f"  {expected[t, m]:9.5f}{steps:13.5f}{draw:10.5f}{errors[t, m]:8.5f}"
        lines.append(cells)
    lines += ["", "Largest distance from the formula over all t, in standard errors (a wrong formula is above 5):"]
    for m, name in enumerate(MOMENTS):
        if not np.isfinite(z[..., m]).all():
            continue  # images of one value have no correlation with anything
        places = np.abs(z[:, :, m]).argmax(0)
        said = [f"{z[places[i], i, m]:+.2f} at t = {places[i]}" for i in range(2)]
        lines.append(f"    {_MOMENT_WORDS[name]:30} step by step {said[0]:>18}    one draw {said[1]:>18}")
    lines += [
        "",
        "Both have the moments of the formula."
        if np.nanmax(np.abs(z)) < LARGEST_Z
        else f"NOT ALL are within {LARGEST_Z:g} standard errors of the formula.",
        f"Training needs x_t at one random t: one draw in place of up to {last + 1}. Along the chain neighbours share",
        "their noise, in closed form each t is drawn anew: the paths differ, each x_t by itself is distributed alike.",
    ]
    if config.diffusion.offset_noise:
        offset = config.diffusion.offset_noise
        lines.append(f"This run's training adds offset noise of {offset:g} to eps, which is left out here.")
    return "\n".join(lines) + "\n"


_MOMENT_WORDS = {
    "coefficient": "coefficient of x_0",
    "mean": "mean of the rest",
    "variance": "variance of the rest",
    "correlation": "correlation with x_0",
}


def _moments_plot(schedule: NoiseSchedule, found: np.ndarray, z: np.ndarray) -> Image.Image:
    t = np.arange(schedule.num_timesteps)
    some = np.array(film_steps(len(t) - 1, _DOTS))
    between = (some[:-1] + some[1:]) // 2 if len(some) > 1 else some  # so that one does not hide the other
    curves = {
        "sqrt(alpha_bar)": (t, schedule.sqrt_alpha_bar),
        "1 - alpha_bar": (t, 1 - schedule.alpha_bar),
        "step by step": (np.tile(some, 2), np.concatenate([found[some, 0, 0], found[some, 0, 2]])),
        "one draw": (np.tile(between, 2), np.concatenate([found[between, 1, 0], found[between, 1, 2]])),
    }
    upper = curve_plot(
        curves,
        title="What of x_0 is left in x_t, and the variance of the noise in it",
        x_label="t",
        y_label="coefficient, variance",
        dots=("step by step", "one draw"),
        size=(900, 420),
    )
    variance = MOMENTS.index("variance")
    lower = curve_plot(
        {"step by step": (t, z[:, 0, variance]), "one draw": (t, z[:, 1, variance])},
        title="Variance: measured less formula",
        x_label="t",
        y_label="standard errors",
        size=(900, 320),
    )
    return stacked([upper, lower])


# noise


def pairwise_distance(images: Tensor) -> tuple[float, float]:
    """Mean distance between two of N >= 3 images [N, C, H, W], and its standard error by the jackknife over images.

    The distance of two images is the root mean square of their difference.
    """
    distances = torch.cdist(*(images.double().flatten(1),) * 2) / math.sqrt(images[0].numel())
    num = len(images)
    of_image = distances.sum(1)
    mean = of_image.sum() / (num * (num - 1))
    without = (of_image.sum() - 2 * of_image) / ((num - 1) * (num - 2))
    error = ((num - 1) / num * (without - without.mean()).square().sum()).sqrt()
    return float(mean), float(error)


def nearest_distance(images: Tensor, others: Tensor) -> float:
    """Mean distance of images [N, C, H, W] to the nearest of others [M, C, H, W], the root mean square difference."""
    distances = torch.cdist(images.double().flatten(1), others.double().flatten(1))
    return float(distances.min(1).values.mean() / math.sqrt(images[0].numel()))


@dataclass(frozen=True)
class NoiseFigures:
    """Samples of one temperature."""

    temperature: float
    seed: int
    x_0: Tensor
    """float32 [N, C, H, W] on the host."""
    diversity: tuple[float, float]
    """Mean pairwise distance and its standard error."""
    spreads: list[float]
    """Standard deviation of x_t over images, pixels in the root mean square, after the steps that were looked at."""
    nearest: float | None


def explain_noise(job: Job) -> dict[str, Path]:
    """Why there is noise at inference: the same seeds with full, reduced and no noise."""
    for temperature in job.command.temperatures:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"--temperatures has {temperature}: each must be a number of at least 0")
    if not job.command.temperatures:
        raise ConfigError("--temperatures is empty: give at least one, such as 1 0.5 0")
    pipeline = job.pipeline()
    training = _training_images(job, pipeline)
    num = max(job.num, LEAST_DIVERSITY)
    samplers = {
        temperature: Sampler.of(
            pipeline.process,
            pipeline.unet,
            pipeline.schedule,
            sampler="ddpm",
            num_steps=job.command.steps,
            temperature=temperature,
            dtype=job.dtype,
            seed=job.command.seed,
        )
        for temperature in job.command.temperatures
    }
    timesteps = next(iter(samplers.values())).timesteps
    looked_at = sorted({round(share * (len(timesteps) - 1)) for share in (0.25, 0.5, 0.75, 1)})
    with make_bar("sampling", "steps", len(samplers) * num * len(timesteps)) as bar:
        found = [
            _sample_at(temperature, sampler, pipeline, num, looked_at, training, job, bar.update)
            for temperature, sampler in samplers.items()
        ]
    print(_noise_text(pipeline, found, timesteps, looked_at, training, num))
    rows = {}
    for figures in found:
        mean, error = figures.diversity
        label = f"temperature {figures.temperature:g}\n{_noise_word(figures.temperature)}\n"
        label += f"diversity {mean:.3f} ± {error:.3f}"
        if figures.nearest is not None:
            label += f"\nto training {figures.nearest:.3f}"
        rows[label] = to_uint8(figures.x_0[: job.num]).numpy()
    captions = [f"image {n}" for n in range(job.num)]
    title = f"The same seeds, noise of each step times the temperature; diversity of {num} images"
    path = job.out / "noise.png"
    save_picture(captioned(rows, title=title, columns=captions, min_side=640), path)
    return {"samples": path}


def _noise_word(temperature: float) -> str:
    if temperature == 0:
        return "mean only"
    return "full noise" if temperature == 1 else f"{'reduced' if temperature < 1 else 'more'} noise"


def _training_images(job: Job, pipeline: Pipeline) -> Tensor | None:
    """Some of the run's training images, float32 [M, C, H, W] on the host; None, and a line, where there are none."""
    if pipeline.config is None:
        return None
    try:
        images = open_split(pipeline.config, pipeline, split=pipeline.config.data.split)
        rows = images.rows[np.sort(spread(MOST_TRAINING, images.num))]
        return images.data.decode_rows(rows).images.float() / 127.5 - 1
    except (ConfigError, DataError) as error:
        print(f"no distances to training images: {error}", file=sys.stderr)
        return None


def _sample_at(
    temperature: float,
    sampler: Sampler,
    pipeline: Pipeline,
    num: int,
    looked_at: list[int],
    training: Tensor | None,
    job: Job,
    progress: Callable[[int], object],
) -> NoiseFigures:
    shape = pipeline.shape
    parts, kept = [], {i: [] for i in looked_at}  # type: ignore[var-annotated]

    def look(i: int, t: int, x: Tensor) -> None:
        if i in kept:
            kept[i].append(x.cpu())
        progress(len(x))

    for numbers in torch.arange(num).split(LEAST_DIVERSITY):
        labels = None if pipeline.num_classes is None else numbers % pipeline.num_classes
        parts.append(sampler.sample(numbers, shape, job.device, callback=look, class_labels=labels).float().cpu())
    x_0 = torch.cat(parts)
    spreads = [float(torch.cat(kept[i]).double().var(0).mean().sqrt()) for i in looked_at]
    nearest = None if training is None else nearest_distance(x_0, training)
    return NoiseFigures(temperature, job.command.seed, x_0, pairwise_distance(x_0), spreads, nearest)


def _noise_text(
    pipeline: Pipeline,
    found: list[NoiseFigures],
    timesteps: np.ndarray,
    looked_at: list[int],
    training: Tensor | None,
    num: int,
) -> str:
    alpha_bar = pipeline.schedule.alpha_bar
    following = [*timesteps[1:].tolist(), None]  # of the state that a step leads to; None: x_0
    levels = [1.0 if following[i] is None else float(alpha_bar[following[i]]) for i in looked_at]
    heads = ["x_0" if following[i] is None else f"t = {following[i]}" for i in looked_at]
    middle = int(timesteps[len(timesteps) // 2])
    start, end = float(alpha_bar[timesteps[0]]), float(alpha_bar[middle])
    # The product of posterior_mean_coef2 = sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar) telescopes.
    left = math.sqrt(start / end) * (1 - end) / (1 - start)
    lines = [
        f"Why there is noise at inference: {num} images of seed {found[0].seed}, {len(timesteps)} ancestral steps,",
        "the noise z of each step times a temperature.",
        "",
        "    x_{t-1} = posterior_mean_coef1 x_0_hat + posterior_mean_coef2 x_t + sigma_t z      (DDPM, algorithm 2)",
        "",
        "The network sees x_t and can name only the average of all x_0 that x_t may come from. A step moves a little",
        "towards it and shrinks the noise in x_t; z gives back what x_{t-1} has to have. Of the noise in x_T the steps",
        f"down to t = {middle} keep the product of posterior_mean_coef2 = {left:.2g}, where the network was trained on",
        f"noise of sqrt(1 - alpha_bar) = {math.sqrt(1 - end):.2g}. Without z, x_t is soon cleaner than any that it was",
        "shown, images stay near the average of the data and run to the same few. With z each decides for itself.",
        "",
        "Standard deviation of x_t between the images"
        + (":" if training is None else "; data: sqrt(alpha_bar variance of the data + 1 - alpha_bar):"),
        f"{'temperature':>12}" + "".join(f"{head:>12}" for head in heads),
    ]
    enough = training is not None and len(training) > 2
    if enough:
        assert training is not None
        variance = float(training.double().var(0).mean())
        row = "".join(f"{math.sqrt(level * variance + 1 - level):12.3f}" for level in levels)
        lines.append(f"{'data':>12}{row}")
    lines += [f"{one.temperature:12g}" + "".join(f"{value:12.3f}" for value in one.spreads) for one in found]
    lines += [
        "",
        "Diversity: mean distance between two images, the root mean square of their difference, pixels in -1 .. 1"
        + ("." if training is None else ";"),
    ]
    if training is not None:
        lines.append(f"nearest: mean distance of an image to the nearest of {len(training)} training images.")
    lines.append(f"{'temperature':>12}{'diversity':>20}" + ("" if training is None else f"{'nearest':>12}"))
    if enough:
        assert training is not None
        mean, error = pairwise_distance(training[torch.from_numpy(np.sort(spread(num, len(training))))])
        lines.append(f"{'data':>12}{f'{mean:.3f} +- {error:.3f}':>20}")
    for one in found:
        mean, error = one.diversity
        nearest = "" if one.nearest is None else f"{one.nearest:12.3f}"
        lines.append(f"{one.temperature:12g}{f'{mean:.3f} +- {error:.3f}':>20}{nearest}")
    return "\n".join(lines) + "\n"


# bound


@dataclass(frozen=True)
class Walk:
    """What the steps of the derivation come to on N chains (x_0, x_1 .. x_T), in nats per dimension, on the host.

    Arrays are float64 [T, N] by t, unless they say otherwise; entry 0 of kl parts is not used.
    """

    log_w: np.ndarray
    """[N]: log p(x_0 .. x_T) - log q(x_1 .. x_T | x_0), of the densities themselves, divided by D."""
    prior: np.ndarray
    """[N]: L_T."""
    terms: np.ndarray
    """L_t, with the clipping that the process has."""
    mean_part: np.ndarray
    """|mu_q - mu_p|^2 / (2 sigma^2 D) of L_t."""
    weight: np.ndarray
    """beta^2 / (2 sigma^2 alpha (1 - alpha_bar)); of learned variances the mean over values, weighted by the error."""
    eps_error: np.ndarray
    """|eps - eps_hat|^2 / D, not clipped."""
    unclipped: np.ndarray
    """mean_part with x_0_hat not clipped."""

    @property
    def bound(self) -> np.ndarray:
        """[N]: L_T + sum L_t + L_0."""
        return self.prior + self.terms.sum(0)


@torch.no_grad()
def walk_bound(
    pipeline: Pipeline,
    images: Tensor,
    labels: Tensor | None,
    numbers: Tensor,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda steps: None,
) -> Walk:
    """Draw one chain x_1 .. x_T from each image by q(x_t | x_{t-1}) and take every quantity of the derivation along it.

    Args:
        pipeline: in eval mode, on the device of the images.
        images: uint8 [N, C, H, W].
        labels: int64 [N] for a conditional network.
        numbers: int64 [N], addresses of the chains' noise.
        seed: of the noise.
        dtype: of the network's input.
        progress: called with 1 after each t.
    """
    process, schedule, device = pipeline.process, pipeline.schedule, images.device
    network = network_of(pipeline.unet, process, schedule, labels, dtype)
    real = torch.float32 if device.type == "mps" else torch.float64
    x_0 = images.to(real) / 127.5 - 1
    shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
    log_w = torch.zeros(len(x_0), dtype=real, device=device)
    columns: dict[str, list[Tensor]] = {name: [] for name in _BY_T}
    x_t = x_0
    for t in range(schedule.num_timesteps):
        before = x_t
        z = draw_normal(numbers.to(device), shape, seed=seed, stream=Stream.BOUND, step=t).to(real)
        x_t = math.sqrt(schedule.alpha[t]) * before + math.sqrt(schedule.beta[t]) * z
        log_w += 0.5 * _mean_of(z.square() + math.log(2 * math.pi * schedule.beta[t]))  # - log q(x_t | x_{t-1})

        at = torch.full((len(x_0),), t, device=device)
        output = network(x_t.float(), at).to(real)
        prediction = output[:, : x_0.shape[1]]
        log_variance = reverse_log_variance(process, schedule, at, output)
        x_0_hat = schedule.predict_x_0(x_t, t, prediction, process.prediction)
        eps_hat = schedule.predict_eps(x_t, t, prediction, process.prediction)
        clipped = x_0_hat.clamp(-process.clip_range, process.clip_range) if process.clip else x_0_hat
        if t == 0:
            log_w += _mean_of(decoder_log_likelihood(x_0, clipped, log_variance))
        else:
            mean, _ = schedule.q_posterior(clipped, x_t, t)
            density = (before - mean).square() / log_variance.exp() + log_variance + math.log(2 * math.pi)
            log_w -= 0.5 * _mean_of(density.expand_as(x_0))

        signal, noise = float(schedule.sqrt_alpha_bar[t]), float(schedule.sqrt_one_minus_alpha_bar[t])
        eps_error = ((x_t - signal * x_0) / noise - eps_hat).square()
        weight = float(schedule.beta[t] ** 2 / (2 * schedule.alpha[t] * noise**2)) / log_variance.exp()
        half = 0.5 * float(schedule.posterior_mean_coef1[t]) ** 2 / log_variance.exp()
        columns["terms"].append(vlb_term(process, schedule, x_0, x_t, at, output))
        columns["mean_part"].append(_mean_of(half * (x_0 - clipped).square()))
        columns["unclipped"].append(_mean_of(half * (x_0 - x_0_hat).square()))
        columns["eps_error"].append(_mean_of(eps_error))
        columns["weight"].append(_mean_of(weight * eps_error) / columns["eps_error"][-1])
        progress(1)
    log_w -= 0.5 * _mean_of(x_t.square() + math.log(2 * math.pi))  # log p(x_T)
    by_t = {name: torch.stack(values).double().cpu().numpy() for name, values in columns.items()}
    prior = prior_term(schedule, x_0, real)
    return Walk(log_w.double().cpu().numpy(), prior.double().cpu().numpy(), **by_t)


_BY_T = ("terms", "mean_part", "weight", "eps_error", "unclipped")


def _mean_of(values: Tensor) -> Tensor:
    """[N]: the mean over all values of each image."""
    return values.flatten(1).mean(1)


def explain_bound(job: Job) -> dict[str, Path]:
    """From log p(x_0) to the three terms to the loss on eps, each line with its number."""
    assert job.run is not None  # run_explain has asked for one
    config = _own_config(job.run)
    pipeline = job.pipeline()
    split = open_split(config, pipeline, split=config.data.split)
    num = min(job.num, split.num)
    images, labels = split.read(0, num, job.device)
    images = images.repeat_interleave(PATHS, 0)
    labels = None if labels is None else labels.repeat_interleave(PATHS, 0)
    with make_bar("bound", "steps", pipeline.schedule.num_timesteps) as bar:
        walk = walk_bound(
            pipeline,
            images,
            labels,
            torch.arange(len(images)),
            seed=job.command.seed,
            dtype=job.dtype,
            progress=bar.update,
        )
    what = f"{job.run.name}: {num} images of split {split.split} of {split.source}"
    text = _bound_text(what, pipeline, walk, images[0].numel())
    print(text)
    files = {"text": job.out / "bound.txt", "terms": job.out / "bound.png"}
    replace_file(files["text"], lambda path: path.write_text(text))
    save_picture(_bound_plot(walk, job.run.name), files["terms"])
    return files


def _figure(values: np.ndarray) -> str:
    """Mean and standard error of values [N], which belong to images by PATHS, in bits."""
    of_image = values.reshape(-1, PATHS).mean(1) / math.log(2)
    error = of_image.std(ddof=1) / math.sqrt(len(of_image)) if len(of_image) > 1 else math.nan
    mean = round(float(of_image.mean()), 5) + 0.0  # no -0.00000
    return f"{mean:10.5f}" + (f" +- {error:.5f}" if math.isfinite(error) else "")


def _bound_text(what: str, pipeline: Pipeline, walk: Walk, num_values: int) -> str:
    process, num_timesteps = pipeline.process, pipeline.schedule.num_timesteps
    log_w = walk.log_w.reshape(-1, PATHS)
    top = log_w.max(1, keepdims=True)
    # Of densities themselves, not per dimension: the average of w is taken before the logarithm.
    inside = top[:, 0] + np.log(np.exp(num_values * (log_w - top)).mean(1)) / num_values
    gained = np.repeat(inside, PATHS) - walk.log_w
    middle, first = walk.terms[1:].sum(0), walk.terms[0]
    means = walk.mean_part[1:].sum(0)

    def line(formula: str, values: np.ndarray) -> str:
        return f"    {formula:75}{_figure(values)}"

    lines = [
        f"The bound of {what}, D = {num_values} values each,",
        f"T = {num_timesteps}, {PATHS} chains x_1 .. x_T for each image. Numbers are costs in bits per dimension,",
        "-log p / (D log 2), +- one standard error over images. Index t = 0 .. T-1: x_t is the state after t + 1 steps",
        "of noise, and the one before it at t = 0 is x_0.",
        "",
        "1. What is wanted is an integral over everything that may have led to x_0, "
        f"{num_timesteps * num_values:,} variables:",
        "    log p(x_0) = log integral p(x_T) p(x_{T-1} | x_T) ... p(x_0 | x_1) dx_1 ... dx_T",
        "",
        "2. It is an average over chains that the forward process draws; here over a few of them inside the logarithm:",
        line("log p(x_0) = log E_q[w],  w = p(x_0 .. x_T) / q(x_1 .. x_T | x_0)", -np.repeat(inside, PATHS)),
        "",
        "3. Jensen's inequality takes the logarithm inside the average, where it can be estimated without bias:",
        line("log p(x_0) >= E_q[log w]", -walk.log_w),
        line(f"so of the gap KL(q(x_1 .. x_T | x_0) || p(x_1 .. x_T | x_0)) {PATHS} chains show", gained),
        "",
        "4. By Bayes' rule q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0); the last two",
        "   factors cancel along the chain, and three terms are left, -E_q[log w] = L_T + sum L_t + L_0:",
        line("L_T = KL(q(x_T | x_0) || p(x_T))", walk.prior),
        line("sum of L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t = 1 .. T-1", middle),
        line("L_0 = -log p(x_0 | x_1), x_0 one of 256 levels", first),
        line("their sum", walk.bound),
        line("line 3 less the sum, on the same chains", -walk.log_w - walk.bound),
        "",
        "5. Both distributions of an L_t are Gaussian, of variance sigma_q^2 = posterior_variance and sigma^2, so",
        "    L_t = (log(sigma^2 / sigma_q^2) + sigma_q^2 / sigma^2 - 1) / 2 + |mu_q - mu_p|^2 / (2 sigma^2 D)",
        line("sum of the variances' part", middle - means),
        line("sum of the means' part, mu_q - mu_p = posterior_mean_coef1 (x_0 - x_0_hat)", means),
        "",
        "6. x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps ties an error in x_0 to one in eps,",
        "   x_0 - x_0_hat = sqrt((1 - alpha_bar) / alpha_bar) (eps_hat - eps), so the means' part is",
        "    beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps - eps_hat|^2 / D",
        "",
        f"{'t':>8}{'weight':>14}{'eps error':>14}{'product':>14}{'means part':>14}{'clipped':>14}{'L_t':>14}",
    ]
    bits = 1 / math.log(2)
    shown = sorted({max(1, round(share * (num_timesteps - 1))) for share in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 1)})
    for t in shown if num_timesteps > 1 else ():
        weight, error = walk.weight[t], walk.eps_error[t]
        cells = [weight.mean(), error.mean(), (weight * error).mean() * bits, walk.unclipped[t].mean() * bits]
        cells += [walk.mean_part[t].mean() * bits, walk.terms[t].mean() * bits]
        lines.append(f"{t:8}" + "".join(f"{cell:14.5g}" for cell in cells))
    lines += [
        "   (product, means part, clipped and L_t in bits per dimension; clipped: with x_0_hat clipped as in sampling)",
        "",
        "7. The loss of training leaves the weight out and takes t at random:",
        f"    L_simple = E |eps - eps_hat|^2 / D{'':41}{walk.eps_error.mean():10.5f}",
    ]
    if num_timesteps > 1:
        weight, half = walk.weight.mean(1), num_timesteps // 2
        lines += [
            f"   The weight goes from {weight[1]:.4g} at t = 1 to {weight[half]:.4g} at t = {half}: the bound counts",
            "   most the steps in which nothing can be seen. With weight 1 it comes out a little looser, and noisier",
            "   steps, which decide what is in the image, get the network's attention.",
        ]
    if process.prediction != "eps" or process.loss != "simple":
        lines.append(
            f"   This run predicts {process.prediction} and trains with the loss {process.loss}: eps_hat follows from "
            "x_t and its prediction."
        )
    return "\n".join(lines) + "\n"


def _bound_plot(walk: Walk, name: str) -> Image.Image:
    t, bits = np.arange(min(1, len(walk.terms) - 1), len(walk.terms)), 1 / math.log(2)
    terms, means = walk.terms[t].mean(1) * bits, walk.mean_part[t].mean(1) * bits
    curves = {"L_t": (t, terms)}
    if (np.abs(terms - means) > 1e-6 * terms).any():  # with fixed_small the variances are equal
        curves |= {"the means' part": (t, means), "the variances' part": (t, terms - means)}
    upper = curve_plot(
        curves,
        title=f"Terms of the bound of {name}",
        x_label="t",
        y_label="bits per dimension",
        log_y=True,
        size=(900, 420),
    )
    lower = curve_plot(
        {"weight": (t, walk.weight[t].mean(1)), "eps error": (t, walk.eps_error[t].mean(1))},
        title="The means' part: weight and error of eps, of which L_simple is the mean over t",
        x_label="t",
        y_label="weight, |eps - eps_hat|^2 / D",
        log_y=True,
        size=(900, 380),
    )
    return stacked([upper, lower])


TOPICS: dict[str, Callable[[Job], dict[str, Path]]] = {
    "forward": explain_forward,
    "noise": explain_noise,
    "bound": explain_bound,
}
