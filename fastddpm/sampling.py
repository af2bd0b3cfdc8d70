"""What `fastddpm sample` does: load, draw on all ranks, write the pictures and the array."""

import shlex
import sys
import time
from typing import TYPE_CHECKING

from .compiling import compile_unet
from .errors import ConfigError
from .files import expand, writable_folder
from .generate import draw_images
from .machine import DTYPES, make_accelerator, settle_precision
from .pictures import filmstrip, grid, save_picture, save_samples
from .pipeline import load_pipeline
from .samplers import Sampler

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
    process, model = pipeline.process, pipeline.unet.config
    pipeline.unet.cast_weights(DTYPES[precision])
    if command.compile:
        compile_unet(pipeline.unet)
    sampler = Sampler(
        pipeline.unet,
        pipeline.schedule,
        prediction=process.prediction,
        sampler=command.sampler,
        num_steps=command.steps,
        eta=command.eta,
        variance=command.variance or process.variance,
        clip=process.clip,
        clip_range=process.clip_range,
        spacing=command.spacing or process.spacing,
        dtype=DTYPES[precision],
        seed=command.seed,
        graph=command.graph,
    )
    start = time.perf_counter()
    drawn = draw_images(
        sampler,
        command.num,
        shape=(model.in_channels, *model.image_size),
        batch_size=command.batch_size,
        device=acc.device,
        num_film=FILM_IMAGES,
        progress=acc.is_main_process,
    )
    if not acc.is_main_process:
        return 0
    seconds = time.perf_counter() - start
    print(f"{command.num} images in {seconds:.1f} s ({command.num / seconds:.2f} images/s)", file=sys.stderr)
    save_samples(drawn.images, out / "samples.npz")
    save_picture(filmstrip(drawn.film), out / "filmstrip.png")
    save_picture(grid(drawn.images[:GRID_IMAGES]), out / "grid.png")
    print(f"grid       {out / 'grid.png'}")
    print(f"filmstrip  {out / 'filmstrip.png'}  (x_T on the left, x_0 on the right)")
    print(f"samples    {out / 'samples.npz'}  (arr_0, uint8 {list(drawn.images.shape)})")
    few = min(50, process.num_timesteps)
    other = f"ddim --steps {few}" if command.sampler == "ddpm" else "ddpm"
    print(
        f"next       fastddpm sample {shlex.quote(command.source)} --num {command.num} --sampler {other} "
        f"--seed {command.seed + 1} --out {shlex.quote(command.out + '-' + other.split()[0])}"
    )
    return 0
