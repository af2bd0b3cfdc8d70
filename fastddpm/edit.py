"""What `fastddpm edit` does: read the pictures, edit them on all ranks, write results beside what they came from."""

import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .editing import Interpolation, inpaint, repaint_walk, start_from, start_step
from .errors import ConfigError, DataError
from .files import expand, writable_folder
from .generate import Callback, draw_shared
from .images import ImageProblem, decode_image, parse_background
from .machine import DTYPES, make_accelerator, settle_precision
from .pictures import captioned, grid, save_animation, save_picture, save_samples
from .pipeline import Pipeline, load_pipeline
from .samplers import Sampler

if TYPE_CHECKING:
    from .cli import EditCommand

_NEEDED = object()
# The options that a task takes beside those of all, with their defaults.
TASKS: dict[str, dict[str, Any]] = {
    "inpaint": {"mask": _NEEDED, "num": 4, "resamples": 10, "jump": None},
    "start": {"strength": 0.6, "num": 1},
    "variations": {"strength": 0.5, "num": 16},
    "interpolate": {"to": _NEEDED, "frames": 9, "how": "inversion", "strength": 0.5, "refine": 5},
}
_MEANING = {
    "mask": "a picture of the image's size, white where to paint and black where to keep",
    "to": "the picture to end at",
}
SHOWN = 256  # a picture of more is larger than a viewer takes
WIDEST = 12  # pictures in a row


def run_edit(command: "EditCommand") -> int:
    """Do `command.task` to `command.image` with the net of `command.source`; returns the exit code.

    Raises:
        ConfigError: an option that is missing, out of range or of another task; a folder that cannot be written.
        DataError: a picture or a mask that cannot be read or used.
        CheckpointError: no weights at the source, or weights that do not fit.
    """
    options = _options(command)
    if command.batch_size < 1:
        raise ConfigError(f"--batch-size is {command.batch_size}: it must be at least 1")
    out = writable_folder(expand(command.out or f"edited/{command.task}"), "output folder")
    precision, why = settle_precision(command.precision)
    acc = make_accelerator(precision)
    if why is not None and acc.is_main_process:
        print(f"precision {precision}: {why}", file=sys.stderr)
    pipeline = load_pipeline(command.source, acc.device)
    pipeline.unet.cast_weights(DTYPES[precision])
    sampler = _sampler(command, options, pipeline, precision)
    start = time.perf_counter()
    inputs, count, calls, draw = _task(command, options, pipeline, sampler, acc.device)
    images = draw_shared(
        count, pipeline.shape, command.batch_size, calls, draw, "editing" if acc.is_main_process else None
    )
    if not acc.is_main_process:
        return 0
    print(f"{count} images in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    save_samples(images, out / "samples.npz")
    save_picture(_sheet(inputs, images[:SHOWN]), out / "edit.png")
    print(f"picture    {out / 'edit.png'}  (in the first row: {' and '.join(inputs)})")
    if command.task == "interpolate":
        save_animation([grid(image[None]) for image in images], out / "edit.gif", frame_ms=120)
        print(f"animation  {out / 'edit.gif'}")
    print(f"samples    {out / 'samples.npz'}  (arr_0, uint8 {list(images.shape)})")
    return 0


def _options(command: "EditCommand") -> dict[str, Any]:
    """The task's own options, defaults filled in."""
    takes = TASKS[command.task]
    given = {name: getattr(command, name) for name in dict.fromkeys(name for task in TASKS.values() for name in task)}
    for name, value in given.items():
        if value is not None and name not in takes:
            valid = ", ".join(f"--{other}" for other in takes)
            raise ConfigError(f"--{name} is not an option of {command.task}: its own are {valid}")
    options = {name: default if given[name] is None else given[name] for name, default in takes.items()}
    for name, value in options.items():
        if value is _NEEDED:
            raise ConfigError(f"{command.task} needs --{name}: {_MEANING[name]}")
        if name in ("num", "frames") and value < (least := 2 if name == "frames" else 1):
            raise ConfigError(f"--{name} is {value}: it must be at least {least}")
    if command.task == "interpolate":
        if command.strength is not None and options["how"] == "inversion":
            raise ConfigError("--strength is for --how noise: inversion goes all the way to x_T")
        if command.refine is not None and options["how"] == "noise":
            raise ConfigError("--refine is for --how inversion: noise inverts nothing")
    return options


def _sampler(command: "EditCommand", options: dict[str, Any], pipeline: Pipeline, precision: str) -> Sampler:
    """The sampler asked for, with the task's defaults."""
    inverted = command.task == "interpolate" and options["how"] == "inversion"
    usual = {"inpaint": 250, "interpolate": 100}.get(command.task)
    num_steps = command.steps
    if num_steps is None and usual is not None:
        num_steps = min(usual, pipeline.process.num_timesteps)
    given = {"variance": command.variance, "spacing": command.spacing}
    sampler = command.sampler or ("ddim" if inverted else "ddpm")
    if command.variance is not None and sampler != "ddpm":
        raise ConfigError(f"--variance is {command.variance} and the sampler is {sampler}: only ddpm has it")
    if command.spacing is not None and sampler == "heun":
        raise ConfigError(f"--spacing is {command.spacing} and the sampler is heun, which has a grid of its own")
    return Sampler.of(
        pipeline.process,
        pipeline.unet,
        pipeline.schedule,
        sampler=sampler,
        num_steps=num_steps,
        eta=command.eta,
        guidance=command.guidance,
        dtype=DTYPES[precision],
        seed=command.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


_Draw = Callable[[torch.Tensor, Callback], torch.Tensor]


def _task(
    command: "EditCommand", options: dict[str, Any], pipeline: Pipeline, sampler: Sampler, device: torch.device
) -> tuple[dict[str, np.ndarray], int, int, _Draw]:
    """What a task reads, how many pictures it makes, of how many network calls each, and the function that makes some.

    The function takes int64 [n], which of the pictures, and a callback for each network call.
    """
    picture = _read("image", command.image, pipeline, command)
    inputs = {"picture": picture}
    label = _class_label(command, pipeline)

    def labels(numbers: torch.Tensor) -> torch.Tensor | None:
        return None if label is None else torch.full_like(numbers, label)

    num_steps = len(sampler.timesteps)
    if command.task == "inpaint":
        inputs["mask"] = mask = _read_mask(options["mask"], pipeline, command)
        resamples = options["resamples"]
        jump = max(1, min(10, num_steps // 10)) if options["jump"] is None else options["jump"]
        walk = repaint_walk(num_steps, jump, resamples)
        calls = sum(there > here for here, there in pairwise(walk))
        fixed = {"resamples": resamples, "jump": jump, "device": device}
        return (
            inputs,
            options["num"],
            calls,
            lambda numbers, callback: inpaint(
                sampler, picture, mask, numbers, class_labels=labels(numbers), callback=callback, **fixed
            ),
        )
    if command.task == "interpolate":
        inputs["the other"] = other = _read("to", options["to"], pipeline, command)
        count = options["frames"]
        own = {name: options[name] for name in ("how", "strength", "refine")}
        way = Interpolation(sampler, picture, other, class_label=label, device=device, **own)
        weights = way.weights(count)
        return (
            inputs,
            count,
            num_steps - way.first_step,
            # A rank's surplus frames, which are cut off again, are the last one.
            lambda numbers, callback: way.frames(weights[numbers.clamp(max=count - 1)], callback),
        )
    strength = options["strength"]
    return (
        inputs,
        options["num"],
        num_steps - start_step(sampler, strength),
        lambda numbers, callback: start_from(
            sampler, picture, strength, numbers, device=device, class_labels=labels(numbers), callback=callback
        ),
    )


def _read(option: str, path: str, pipeline: Pipeline, command: "EditCommand") -> np.ndarray:
    """A picture as the model takes it, uint8 [H, W, C]."""
    channels, *size = pipeline.shape
    return _decode(option, path, (size[0], size[1]), channels, command)


def _read_mask(path: str, pipeline: Pipeline, command: "EditCommand") -> np.ndarray:
    """The mask, uint8 [H, W], 255 where to paint; fitted to the model as the picture is.

    Raises DataError, if the file is not of the size of the picture's.
    """
    picture, mask = (_upright_size(expand(name)) for name in (command.image, path))
    if None not in (picture, mask) and picture != mask:
        raise DataError(
            f"--mask {path} is {mask[0]}x{mask[1]} pixels (width x height) and --image {command.image} "  # type: ignore[index]
            f"{picture[0]}x{picture[1]}: they must be of one size"  # type: ignore[index]
        )
    _, height, width = pipeline.shape
    gray = _decode("mask", path, (height, width), 1, command)[..., 0]
    return np.where(gray >= 128, np.uint8(255), np.uint8(0))


def _decode(option: str, path: str, size: tuple[int, int], channels: int, command: "EditCommand") -> np.ndarray:
    try:
        background = None if command.background is None else parse_background(command.background)
        return decode_image(expand(path).read_bytes(), size, channels, command.fit, background)
    except OSError as error:
        raise DataError(f"--{option} {path} cannot be read: {error.strerror or error}") from error
    except ImageProblem as problem:
        raise DataError(f"--{option} {path} {_renamed(problem)}") from problem
    except ConfigError as error:
        raise ConfigError(_renamed(error)) from error


def _renamed(error: Exception) -> str:
    """A message about a data set's options in the names of ours."""
    return str(error).replace("data.fit=", "--fit ").replace("data.background", "--background")


def _upright_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a picture file from its header; None where it has none, of which decoding says more."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    except Exception:  # PIL's plug-ins raise anything on damaged files
        return None


def _sheet(inputs: dict[str, np.ndarray], images: np.ndarray) -> Image.Image:
    """The inputs in the first row, the results in the rows below."""
    num, channels = len(images), images.shape[-1]
    first = []
    for image in inputs.values():
        if image.ndim == 2:  # a mask, whose white would not be told from the page
            image = np.repeat(np.minimum(image, 208)[..., None], channels, axis=-1)
            if channels == 4:
                image[..., 3] = 255
        first.append(image)
    columns = num if num <= WIDEST else math.ceil(math.sqrt(num))
    starts = range(0, num, columns)
    rows = {f"{start} .. {min(start + columns, num) - 1}": images[start : start + columns] for start in starts}
    return captioned({"\n".join(inputs): np.stack(first), **rows})


def _class_label(command: "EditCommand", pipeline: Pipeline) -> int | None:
    """The class asked for; unset, the one that stands for none where the net has learned it."""
    classes = pipeline.num_classes
    if classes is None:
        if command.label is not None:
            raise ConfigError(f"--class is {command.label}: {command.source} was trained without classes")
        return None
    if command.label is None and pipeline.process.label_dropout > 0:
        if command.guidance != 1:
            raise ConfigError(
                f"--guidance is {command.guidance} and no --class is given: there is nothing to guide to; valid are "
                f"classes 0 .. {classes - 1}"
            )
        return classes
    if command.label is None or not 0 <= command.label < classes:
        raise ConfigError(f"--class is {command.label}: {command.source} has the classes 0 .. {classes - 1}")
    return command.label
