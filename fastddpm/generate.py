"""Draw many images with a sampler, in batches, on all ranks; image n is the same however many ranks and batches."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .pictures import film_steps
from .runlog import make_bar
from .samplers import Sampler, to_uint8


@dataclass(frozen=True)
class Drawn:
    """Samples as 8-bit pictures."""

    images: np.ndarray
    """uint8 [N, H, W, C], in order of image number, the same on all ranks."""
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
    progress: bool = False,
) -> Drawn:
    """Draw images 0 .. num - 1 of the sampler's seed, each rank an equal share of them, and gather them on all ranks.

    Args:
        shape: (C, H, W) of one image.
        batch_size: images per network call on each rank.
        num_film: how many of the first images to keep a film of.
        progress: show a bar on stderr, if that is a terminal.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    # Equal shares, so that every rank makes the same number of network calls; surplus images are cut off below.
    share = -(-num // world)
    num_steps = len(sampler.timesteps)
    bar = make_bar("sampling", "steps", share * num_steps, enabled=progress)
    parts: list[torch.Tensor] = []
    film: list[torch.Tensor] = []
    with bar:
        for start in range(0, share, batch_size):
            numbers = rank * share + torch.arange(start, min(start + batch_size, share))
            if rank == 0 and start == 0 and num_film:
                x_0, film = _filmed(sampler, numbers, shape, device, min(num_film, num), bar)
            else:
                x_0 = sampler.sample(numbers, shape, device, callback=lambda i, t, x: bar.update(len(x)))
            parts.append(to_uint8(x_0))
    images = torch.cat(parts)
    if several:
        gathered = torch.empty((world * share, *images.shape[1:]), dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(gathered, images)
        images = gathered
    movie = torch.stack(film).cpu().numpy() if film else np.empty((0, 0, *images.shape[1:]), np.uint8)
    return Drawn(images[:num].cpu().numpy(), movie)


def _filmed(
    sampler: Sampler, numbers: torch.Tensor, shape: tuple[int, int, int], device: torch.device, num: int, bar: tqdm
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One batch of images, and 8-bit copies of the first `num` at evenly spaced steps, x_T and x_0 among them."""
    wanted = set(film_steps(len(sampler.timesteps)))
    frames = []
    for step in sampler.steps(numbers, shape, device):
        if step.i in wanted:
            frames.append(to_uint8(step.x_t[:num]))
        bar.update(len(numbers))
    # The last step returns its x_0_hat, in both samplers.
    frames.append(to_uint8(step.x_0_hat[:num]))
    return step.x_0_hat, frames
