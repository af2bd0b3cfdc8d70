"""What `fastddpm sample` does: load, draw on all ranks, write the pictures and the array."""

import shlex
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .compiling import compile_unet
from .errors import ConfigError
from .files import expand, writable_folder
from .generate import draw_images
from .machine import DTYPES, make_accelerator, settle_precision
from .pictures import filmstrip, grid, save_picture, save_samples, write_film
from .pipeline import Pipeline, load_pipeline
from .samplers import Sampler
from .unet import UNet

if TYPE_CHECKING:
    from .cli import SampleCommand

FILM_IMAGES = 8
GRID_IMAGES = 256  # a picture of more is larger than a viewer takes


def run_sample(command: "SampleCommand") -> int:
    """Draw `command.num` images from `command.source` into `command.out`; returns the exit code.

    Raises:
        ConfigError: a value that cannot be run, or a folder that cannot be written.
        CheckpointError: no weights at the source, or weights that do not fit.
    """
    for name, value in (("num", command.num), ("batch-size", command.batch_size)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}: it must be at least 1")
    if not 0 <= command.seed < 2**63:
        raise ConfigError(f"--seed is {command.seed}: it must be in 0 .. 2^63 - 1")
    out = writable_folder(expand(command.out), "output folder")
    precision, why = settle_precision(command.precision)
    acc = make_accelerator(precision)
    if why is not None and acc.is_main_process:
        print(f"precision {precision}: {why}", file=sys.stderr)
    pipeline = load_pipeline(command.source, acc.device)
    guide = None if command.guide is None else load_guide(command.guide, pipeline, acc.device)
    sampler = make_sampler(command, pipeline, guide, DTYPES[precision])
    if command.compile:
        for net in (pipeline.unet, guide):
            if net is not None:
                compile_unet(net)
    num_classes = pipeline.num_classes
    for label in command.labels if num_classes is not None else ():
        if num_classes is not None and not 0 <= label < num_classes:
            raise ConfigError(f"class {label} does not exist: valid are 0 .. {num_classes - 1}")
    if num_classes is not None and not command.labels and acc.is_main_process:
        print(f"classes 0 .. {num_classes - 1} in turn: --class chooses", file=sys.stderr)
    start = time.perf_counter()
    drawn = draw_images(
        sampler,
        command.num,
        shape=pipeline.shape,
        batch_size=command.batch_size,
        device=acc.device,
        num_film=FILM_IMAGES,
        classes=command.labels or None,
        progress=acc.is_main_process,
    )
    if not acc.is_main_process:
        return 0
    seconds = time.perf_counter() - start
    print(f"{command.num} images in {seconds:.1f} s ({command.num / seconds:.2f} images/s)", file=sys.stderr)
    save_samples(drawn.images, out / "samples.npz")
    save_picture(filmstrip(drawn.film), out / "filmstrip.png")
    columns = num_classes if num_classes is not None and num_classes <= 20 and not command.labels else None
    save_picture(grid(drawn.images[:GRID_IMAGES], columns), out / "grid.png")  # a column a class
    assert drawn.movie is not None  # this is rank 0
    movie = write_film(out / "denoising", *drawn.movie)
    print(f"grid       {out / 'grid.png'}")
    print(f"filmstrip  {out / 'filmstrip.png'}  (x_T on the left, x_0 on the right)")
    print(f"film       {movie}  (x_T to x_0, the estimates of x_0 beneath)")
    print(f"samples    {out / 'samples.npz'}  (arr_0, uint8 {list(drawn.images.shape)})")
    few = min(50, pipeline.process.num_timesteps)
    other = f"ddim --steps {few}" if command.sampler == "ddpm" else "ddpm"
    same = "".join(f" --class {label}" for label in command.labels[:1]) if len(command.labels) == 1 else ""
    same += f" --guidance {command.guidance:g}" if command.guidance != 1 and command.guide is None else ""
    print(
        f"next       fastddpm sample {shlex.quote(command.source)} --num {command.num} --sampler {other}{same} "
        f"--seed {command.seed + 1} --out {shlex.quote(command.out + '-' + other.split()[0])}"
    )
    return 0


def load_guide(source: str, pipeline: Pipeline, device: torch.device) -> UNet:
    """The network of another model that is to guide the pipeline's (autoguidance).

    Raises:
        CheckpointError: as load_pipeline.
        ConfigError: if the two do not go together: images, classes, process or what they predict differ.
    """
    guide = load_pipeline(source, device)
    mine, theirs = pipeline.process, guide.process
    for what, own, other in (
        ("images of shape", pipeline.shape, guide.shape),
        ("prediction", mine.prediction, theirs.prediction),
        ("timesteps", mine.num_timesteps, theirs.num_timesteps),
        ("self-conditioning", mine.self_conditioning, theirs.self_conditioning),
    ):
        if own != other:
            raise ConfigError(f"--guide {source} does not fit: its {what} is {other}, the model's {own}")
    if not np.allclose(pipeline.schedule.alpha_bar, guide.schedule.alpha_bar, rtol=1e-6, atol=0):
        raise ConfigError(f"--guide {source} does not fit: its noise schedule is another than the model's")
    # Without classes it is the guide of classifier-free guidance, in a network of its own.
    if guide.num_classes not in (None, pipeline.num_classes):
        known = pipeline.num_classes or "none"
        raise ConfigError(f"--guide {source} does not fit: it has {guide.num_classes} classes, the model {known}")
    return guide.unet


def make_sampler(command: "SampleCommand", pipeline: Pipeline, guide: UNet | None, dtype: torch.dtype) -> Sampler:
    """The sampler that the options ask for, its networks cast to dtype.

    Raises:
        ConfigError: options that do not go together, or with the model.
    """
    if command.guidance == 1:
        for name, given in (
            ("guide", command.guide is not None),
            ("guidance-interval", command.guidance_interval is not None),
            ("guidance-rescale", command.guidance_rescale != 0),
        ):
            if given:
                raise ConfigError(f"--{name} is given and --guidance is 1, which is none: give --guidance above 1")
    if command.variance is not None and command.sampler != "ddpm":
        raise ConfigError(f"--variance is {command.variance} and the sampler is {command.sampler}: only ddpm has it")
    if command.spacing is not None and command.sampler == "heun":
        raise ConfigError(f"--spacing is {command.spacing} and the sampler is heun, which has a grid of its own")
    given_or_own: dict[str, Any] = {
        "variance": command.variance,
        "spacing": command.spacing,
        "dynamic_threshold": command.threshold,
    }
    for net in (pipeline.unet, guide):
        if net is not None:
            net.cast_weights(dtype)
    make = partial(
        Sampler.of,
        pipeline.process,
        pipeline.unet,
        pipeline.schedule,
        sampler=command.sampler,
        num_steps=command.steps,
        eta=command.eta,
        churn=command.churn,
        guidance=command.guidance,
        guidance_interval=command.guidance_interval,
        guidance_rescale=command.guidance_rescale,
        guide=guide,
        dtype=dtype,
        seed=command.seed,
        graph=command.graph,
        **{name: value for name, value in given_or_own.items() if value is not None},
    )
    sampler = make()
    if command.temperature == 1:
        return sampler
    if not sampler.table.column("F").any():
        raise ConfigError(
            f"--temperature is {command.temperature} and the sampler is {command.sampler}, which as it is set draws no "
            "noise to scale"
        )
    return make(temperature=command.temperature)
