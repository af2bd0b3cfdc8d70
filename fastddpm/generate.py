"""Draw many images with a sampler, in batches, on all ranks; image n is the same however many ranks and batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .errors import ConfigError
from .pictures import film_steps
from .runlog import make_bar
from .samplers import SAMPLERS, Sampler, to_uint8

MOVIE_FRAMES = 60

Callback = Callable[[int, Any, torch.Tensor], object]
"""Told of each step of a sampler: its number, its timestep, the state it gave."""


class Movie(NamedTuple):
    """The first n images on their way, at up to MOVIE_FRAMES states from x_T (first) to x_0 (last)."""

    states: np.ndarray
    """uint8 [F, n, H, W, C]."""
    estimates: np.ndarray
    """uint8 [F, n, H, W, C]: the x_0_hat that the network makes of each state; of the last the image itself."""
    captions: list[str]
    """What to write over each frame."""


@dataclass(frozen=True)
class Drawn:
    """Samples as 8-bit pictures."""

    images: np.ndarray
    """uint8 [N, H, W, C], in order of image number; empty on ranks other than 0."""
    film: np.ndarray
    """uint8 [F, n, H, W, C]: the first n images from x_T (first frame) to x_0 (last); empty on ranks other than 0."""
    movie: Movie | None = None
    """The same images in more frames; None where no film was asked for, and on ranks other than 0."""


def draw_images(
    sampler: Sampler,
    num: int,
    *,
    shape: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    num_film: int = 0,
    classes: Sequence[int] | None = None,
    progress: bool = False,
) -> Drawn:
    """Draw images 0 .. num - 1 of the sampler's seed, each rank an equal share of them, and gather them on rank 0.

    Args:
        shape: (C, H, W) of one image.
        batch_size: images per network call on each rank.
        num_film: how many of the first images to keep a film of, as far as rank 0 draws them.
        classes: image n is of the class classes[n % len(classes)]; None: all classes of the network in turn, 0, 1, 2,
            ..., or none of an unconditional one.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        ConfigError: a class that does not exist, or classes of an unconditional network; a sampler that begins with
            images.
    """
    if not SAMPLERS[sampler.sampler].to_image:
        raise ConfigError(f"sampler {sampler.sampler} leads from images to noise: it draws none")
    if classes is None and sampler.num_classes is not None:
        classes = range(sampler.num_classes)
    cycle = None if classes is None else torch.tensor(list(classes))
    num_steps, on_first = len(sampler.timesteps), not _several() or dist.get_rank() == 0
    films: list[Movie] = []

    def draw(numbers: torch.Tensor, callback: Callback) -> torch.Tensor:
        labels = None if cycle is None else cycle[numbers % len(cycle)]
        filmed = min(num_film, num) - int(numbers[0]) if on_first else 0
        if filmed <= 0:
            return sampler.sample(numbers, shape, device, class_labels=labels, callback=callback)
        x_0, film = _filmed(sampler, numbers, shape, device, labels, filmed, callback)
        films.append(film)
        return x_0

    images = draw_shared(num, shape, batch_size, num_steps, draw, "sampling" if progress else None)
    if not films:
        return Drawn(images, np.empty((0, 0, *images.shape[1:]), np.uint8))
    states, estimates = (np.concatenate([getattr(f, name) for f in films], 1) for name in ("states", "estimates"))
    places = _kept_states(num_steps)
    strip = [places.index(state) for state in film_steps(num_steps)]
    moving = [places.index(state) for state in film_steps(num_steps, MOVIE_FRAMES)]
    captions = [films[0].captions[i] for i in moving]
    return Drawn(images, states[strip], Movie(states[moving], estimates[moving], captions))


def draw_shared(
    num: int,
    shape: tuple[int, int, int],
    batch_size: int,
    calls: int,
    draw: Callable[[torch.Tensor, Callback], torch.Tensor],
    title: str | None = None,
    keep: int | None = None,
) -> np.ndarray:
    """Pictures 0 .. num - 1, uint8 [num, H, W, C], an equal share of them drawn on each rank; empty on other ranks.

    Args:
        shape: (C, H, W) of one picture.
        batch_size: pictures that a rank draws at a time.
        calls: of the network for each picture.
        draw: makes the pictures of these numbers (int64 [n] on the host) as float32 [n, C, H, W] in -1 .. 1, and tells
            its callback of each call, as Sampler.sample does.
        title: of the progress bar on stderr, if that is a terminal; None: no bar.
        keep: the pictures that are wanted, of the first ones that rank 0 draws; None: all, which are then gathered.
    """
    several = _several()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    # Equal shares, so that every rank makes the same number of network calls; surplus images are cut off below.
    share = -(-num // world)
    held = world * share if keep is None else min(keep, num, share)
    images = np.empty((held if rank == 0 else 0, *shape[1:], shape[0]), np.uint8)
    with make_bar(title or "", "steps", share * calls, enabled=title is not None) as bar:
        for start in range(0, share, batch_size):
            numbers = rank * share + torch.arange(start, min(start + batch_size, share))
            drawn = draw(numbers, lambda i, t, x: bar.update(len(x)))
            if keep is not None and (rank > 0 or start >= held):
                continue
            parts = [to_uint8(drawn)]
            if several and keep is None:  # batch by batch to the host of rank 0, so that no device holds all images
                everyone = [torch.empty_like(parts[0]) for _ in range(world)]
                dist.all_gather(everyone, parts[0])
                parts = everyone
            if rank == 0:
                for owner, part in enumerate(parts):
                    first = owner * share + start
                    part = part[: len(images) - first]
                    images[first : first + len(part)] = part.cpu().numpy()
    return images[:num]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _kept_states(num_steps: int) -> list[int]:
    """The states 0 (x_T) .. num_steps (x_0) that a filmstrip or a movie shows."""
    return sorted({*film_steps(num_steps), *film_steps(num_steps, MOVIE_FRAMES)})


def _filmed(
    sampler: Sampler,
    numbers: torch.Tensor,
    shape: tuple[int, int, int],
    device: torch.device,
    class_labels: torch.Tensor | None,
    num: int,
    callback: Callback,
) -> tuple[torch.Tensor, Movie]:
    """One batch of images, and the way of its first `num` at the states of _kept_states."""
    wanted = set(_kept_states(len(sampler.timesteps)))
    states, estimates, captions = [], [], []

    def keep(state: torch.Tensor, estimate: torch.Tensor, caption: str) -> None:
        # As bytes on the host at once: of large images the frames would fill the device.
        states.append(to_uint8(state[:num]).cpu().numpy())
        estimates.append(to_uint8(estimate[:num]).cpu().numpy())
        captions.append(caption)

    for step in sampler.steps(numbers, shape, device, class_labels=class_labels):
        if step.i in wanted:
            keep(step.x_t, step.x_0_hat, f"t = {step.t:.4g}")
        callback(step.i, step.t, step.x_0_hat)
    keep(step.x_0_hat, step.x_0_hat, "x_0")  # the last step of every sampler returns its x_0_hat
    return step.x_0_hat, Movie(np.stack(states), np.stack(estimates), captions)
