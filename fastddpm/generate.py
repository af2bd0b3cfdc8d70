"""Draw many images with a sampler, in batches, on all ranks; image n is the same however many ranks and batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .errors import ConfigError
from .pictures import film_steps
from .runlog import make_bar
from .samplers import SAMPLERS, Sampler, to_uint8


@dataclass(frozen=True)
class Drawn:
    """Samples as 8-bit pictures."""

    images: np.ndarray
    """uint8 [N, H, W, C], in order of image number; empty on ranks other than 0."""
    film: np.ndarray
    """uint8 [F, n, H, W, C]: the first n images from x_T (first frame) to x_0 (last); empty on ranks other than 0."""


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
        num_film: how many of the first images to keep a film of.
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
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    # Equal shares, so that every rank makes the same number of network calls; surplus images are cut off below.
    share = -(-num // world)
    num_steps = len(sampler.timesteps)
    bar = make_bar("sampling", "steps", share * num_steps, enabled=progress)
    images = np.empty((world * share if rank == 0 else 0, *shape[1:], shape[0]), np.uint8)
    films: list[torch.Tensor] = []
    with bar:
        for start in range(0, share, batch_size):
            numbers = rank * share + torch.arange(start, min(start + batch_size, share))
            labels = None if cycle is None else cycle[numbers % len(cycle)]
            filmed = min(num_film, num) - start if rank == 0 else 0
            if filmed > 0:
                x_0, film = _filmed(sampler, numbers, shape, device, labels, filmed, bar)
                films.append(film)
            else:
                x_0 = sampler.sample(
                    numbers, shape, device, class_labels=labels, callback=lambda i, t, x: bar.update(len(x))
                )
            parts = [to_uint8(x_0)]
            if several:  # batch by batch to the host of rank 0, so that no device holds all images
                everyone = [torch.empty_like(parts[0]) for _ in range(world)]
                dist.all_gather(everyone, parts[0])
                parts = everyone
            if rank == 0:
                for owner, part in enumerate(parts):
                    first = owner * share + start
                    images[first : first + len(part)] = part.cpu().numpy()
    movie = torch.cat(films, 1).cpu().numpy() if films else np.empty((0, 0, *images.shape[1:]), np.uint8)
    return Drawn(images[:num], movie)


def _filmed(
    sampler: Sampler,
    numbers: torch.Tensor,
    shape: tuple[int, int, int],
    device: torch.device,
    class_labels: torch.Tensor | None,
    num: int,
    bar: tqdm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of images, and 8-bit copies [F, n, H, W, C] of its first `num` at evenly spaced steps."""
    wanted = set(film_steps(len(sampler.timesteps)))
    frames = []
    for step in sampler.steps(numbers, shape, device, class_labels=class_labels):
        if step.i in wanted:
            frames.append(step.x_t[:num])
        bar.update(len(numbers))
    frames.append(step.x_0_hat[:num])  # the last step of every sampler returns its x_0_hat
    return step.x_0_hat, torch.stack([to_uint8(frame) for frame in frames])
