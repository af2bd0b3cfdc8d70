"""Decoding of one image file into uint8 pixels [H, W, C] of the model's size, with every lossy choice made explicit.

PIL alone opens a 16-bit file as white, a float file as black, drops alpha and takes an animation's first frame, all
without a word; here each is either converted by a stated rule or refused.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .data import Fit

_ORIENTATION = 0x0112  # EXIF tag
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class ImageProblem(ValueError):
    """Why an image cannot be used; the caller, who knows file and row, names them."""


def decode_image(data: bytes, size: tuple[int, int], channels: int, fit: Fit) -> np.ndarray:
    """Pixels of an encoded image: uint8 [H, W, C], contiguous.

    data: the bytes of a file in any format that PIL reads. size: (H, W) of the result. channels: 1 or 3.
    The EXIF orientation is applied. Gray to RGB replicates; RGB to gray is the luma 0.299 R + 0.587 G + 0.114 B;
    palette, CMYK and the like go through RGB; colour profiles are ignored. 16-bit gray v becomes round(v / 257).
    fit: "exact" takes images of `size` only; "resize" stretches to it; "crop" takes the centre; "resize_crop" takes
    the largest centred part of the model's proportions and scales it. Scaling is PIL's Lanczos filter, antialiased.
    Raises ImageProblem: not decodable, partly transparent, more than one frame, float or 32-bit integer pixels, of a
    size that `fit` does not take.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image: Image.Image = opened
            # An MPO file is a photograph; its further pictures are previews and depth or gain maps.
            if opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
                raise ImageProblem(f"has {frames} frames: keep one picture a file")
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            image = _flatten(image).convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(_fit(image, size, fit))
    except ImageProblem:
        raise
    except UnidentifiedImageError as error:
        raise ImageProblem("cannot be decoded: it is not an image, or of a format that PIL does not read") from error
    except Exception as error:  # PIL's plug-ins raise anything from SyntaxError to struct.error on damaged files
        raise ImageProblem(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error
    return np.ascontiguousarray(pixels).reshape(*size, channels)


def _flatten(image: Image.Image) -> Image.Image:
    """The image without alpha and in a mode whose conversion to L or RGB keeps its meaning."""
    # Until Pillow 11.2 a 16-bit PNG opened in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info and (values == image.info["transparency"]).any():
            raise ImageProblem("is partly transparent: flatten it onto a background first")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ImageProblem(f"has {kind} pixels, whose range is unknown: convert it to 8 or 16 bits first")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ImageProblem("is partly transparent: flatten it onto a background first")
        return image.convert("RGB")
    return image


def _fit(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """The image (mode L or RGB) at size (H, W)."""
    height, width = size
    if image.size == (width, height):
        return image
    is_size = f"is {image.width}x{image.height} pixels (width x height), the model takes {width}x{height}"
    if fit == "exact":
        raise ImageProblem(f"{is_size}: choose data.fit=resize, crop or resize_crop")
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if fit == "crop":
        if image.width < width or image.height < height:
            raise ImageProblem(f"{is_size}, which cannot be cropped from it: choose data.fit=resize or resize_crop")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    # One resampling straight from the crop box: no intermediate size to round to, so proportions are kept exactly.
    scale = min(image.width / width, image.height / height)
    x, y = max(0.0, (image.width - scale * width) / 2), max(0.0, (image.height - scale * height) / 2)
    box = (x, y, image.width - x, image.height - y)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
