"""Pictures of samples: a grid, and a filmstrip from x_T to x_0. Pixels are enlarged without smoothing."""

import math
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from .files import replace_file


def grid(images: np.ndarray, columns: int | None = None, *, gap: int = 1, min_side: int = 512) -> Image.Image:
    """Images side by side, row by row.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3 (other channel counts show their first channel).
        columns: images per row; unset: about as many as rows.
        gap: pixels between images, before enlarging.
        min_side: small pictures are enlarged by a whole factor until their longer side reaches this.
    """
    n, height, width, channels = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    images = images if channels == 3 else images[..., :1].repeat(3, axis=-1)
    padded = np.full((rows * columns, height + gap, width + gap, 3), 255, np.uint8)
    padded[:n, :height, :width] = images
    sheet = rearrange(padded, "(r c) h w k -> (r h) (c w) k", r=rows)
    sheet = np.pad(sheet, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    scale = max(1, math.ceil(min_side / max(sheet.shape[:2])))
    return Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))


def filmstrip(frames: np.ndarray) -> Image.Image:
    """One row per image, time from left (x_T) to right (x_0).

    Args:
        frames: uint8 [F, N, H, W, C].
    """
    return grid(rearrange(frames, "f n h w c -> (n f) h w c"), columns=frames.shape[0])


def film_steps(num_steps: int, num_frames: int = 12) -> list[int]:
    """Which of the states 0 (x_T) .. num_steps (x_0) a filmstrip shows, both ends among them, evenly spaced."""
    return sorted({round(f) for f in np.linspace(0, num_steps, min(num_frames, num_steps + 1))})


def save_picture(picture: Image.Image, path: Path) -> None:
    """Replace a picture file as a whole."""
    replace_file(path, picture.save)


def save_samples(images: np.ndarray, path: Path) -> None:
    """Write uint8 [N, H, W, C] as arr_0 of an .npz, the layout this field's evaluators read."""
    replace_file(path, lambda temporary: np.savez(temporary, arr_0=images))
