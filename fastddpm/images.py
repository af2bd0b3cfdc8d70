"""One image file or array as uint8 pixels [H, W, C] of the model's size, with every lossy choice made explicit.

PIL alone opens a 16-bit file as white, a float file as black, drops alpha and takes an animation's first frame, all
without a word; here each is either converted by a stated rule or refused. Its errors become one line that says what the
bytes are: cut short and after how many of them, empty, a web page, a Git LFS pointer.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from .data import Fit
from .errors import ConfigError

MAX_PIXELS = 2**28
"""Of one image file, whatever limit PIL has been given: as RGB these take 1 GiB. PIL's own limit is 178,956,970."""

_ORIENTATION = 0x0112  # EXIF tag
_PHOTOMETRIC = 0x0106  # TIFF tag
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of so many channels
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# PIL keeps the high byte of 16-bit colour. Read in the other byte order, the same file gives the low byte.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_WIDE = re.compile(r"(RGBA?;16)([BLN])")
_LEVELS = {"L;2": 85, "L;4": 17}  # what a step of a PNG's 2 or 4 bits is in 8; PIL scales pixels but not tRNS
_BAND_PIXELS = 2**20  # composited at a time


class ImageProblem(ValueError):
    """Why an image cannot be used; the caller, who knows file and row, names them."""


def parse_background(text: str) -> tuple[int, int, int]:
    """The colour (R, G, B), each in 0 .. 255, of a name such as "white" or of #rrggbb.

    Raises ConfigError, which names data.background.
    """
    try:
        colour = ImageColor.getrgb(text)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"data.background is {text!r}: give a colour such as white, gray or #80a0ff") from error
    if len(colour) == 4:
        raise ConfigError(f"data.background is {text!r}: a background has no alpha; give #rrggbb")
    return colour


def decode_image(
    data: bytes,
    size: tuple[int, int],
    channels: int,
    fit: Fit,
    background: tuple[int, int, int] | None = None,
    quote: bool = True,
) -> np.ndarray:
    """Pixels of an encoded image: uint8 [H, W, C], contiguous.

    data: the bytes of a file in any format that PIL reads. size: (H, W) of the result. channels: 1 (gray), 2 (gray and
    alpha), 3 (RGB) or 4 (RGBA).
    The EXIF orientation is applied. Gray to RGB replicates; RGB to gray is the luma 0.299 R + 0.587 G + 0.114 B;
    palette, CMYK and the like go through RGB; colour profiles are ignored. 16-bit gray, and 16-bit RGB of PNG and
    TIFF, become round(v / 257), 12-bit gray round(v 255 / 4095); a TIFF whose 0 is white is inverted.
    background: the colour (R, G, B) behind partly transparent images: round(a v + (1 - a) background) with the file's
    own bits of v and a, before anything is scaled. Without one they are refused; opaque alpha is dropped. With 2 or 4
    channels alpha is kept, 255 where a file has none, and colours are what the file says, not multiplied by it;
    scaling weights them by it, so that what cannot be seen does not bleed into what can.
    fit: "exact" takes images of `size` only; "resize" stretches to it; "crop" takes the centre; "resize_crop" takes
    the largest centred part of the model's proportions and scales it. Scaling is PIL's Lanczos filter, antialiased, of
    the whole image: JPEG's reduced decoding would be faster on huge files, and would give other pixels.
    quote: whether a message may show how bytes begin that are no image. Those of a file that was reached by a path in
    the data are not to be shown: it may be any file.
    Raises MemoryError and, of the operating system, OSError, which say nothing of the image. Raises ImageProblem: not
    decodable, partly transparent, more than one frame, float or 32-bit integer pixels, more
    than 2^28 pixels (said before memory is taken for them), of a size that `fit` does not take; another number of
    channels, which only arrays have.
    """
    if channels not in _MODES:
        raise ImageProblem(
            f"is an image file, which has 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA) channels, and the model takes "
            f"{channels}: store arrays of uint8 with as many"
        )
    try:
        image, rawmode = _load(data)
        image = _flatten(image, rawmode, data, background, keep_alpha=channels in (2, 4))
        if image.mode not in _ALPHA_MODES:
            image = image.convert("L" if channels < 3 else "RGB")
        if channels in (2, 4):
            image = image.convert(_MODES[channels])
        pixels = np.asarray(_fit(image, size, fit))
    except (ImageProblem, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\) exceeds limit of (\d+)", str(error))
        if found is None:
            raise ImageProblem(f"is too large: {error}") from error
        raise _too_large(int(found[1]), int(found[2])) from error
    except Exception as error:  # PIL's plug-ins raise anything from SyntaxError to struct.error on damaged files
        if isinstance(error, OSError) and error.errno is not None:  # too many open files; PIL's own have no number
            raise
        raise ImageProblem(f"cannot be decoded: {_describe(data, error, quote)}") from error
    return np.ascontiguousarray(pixels).reshape(*size, channels)


def fit_array(values: np.ndarray, size: tuple[int, int], channels: int, fit: Fit) -> np.ndarray:
    """Pixels of an image that is stored as an array: uint8 [H, W, C], contiguous.

    values: uint8 [H, W, C] or [C, H, W], whichever has `channels` at C, or [H, W] for one channel. Where both have it,
    the one whose H and W are the model's.
    size, fit: as for decode_image; each channel is scaled by itself, none is taken for alpha.
    Raises ImageProblem: another dtype, shape or number of channels, an order of axes that cannot be told, a size that
    `fit` does not take.
    """
    shape = "x".join(map(str, values.shape))
    if values.dtype != np.uint8:
        raise ImageProblem(f"is an array of {values.dtype}: convert it to uint8, 0 .. 255")
    if values.ndim not in (2, 3) or not values.size:
        raise ImageProblem(f"is an array of shape {shape or '()'}: valid is [H, W, C], [C, H, W] or [H, W]")
    orders = [values[..., None]] if values.ndim == 2 else [values, values.transpose(1, 2, 0)]
    orders = [pixels for pixels in orders if pixels.shape[2] == channels]
    if not orders:
        wanted = f"{channels} channel{'s' if channels > 1 else ''}"
        raise ImageProblem(
            f"is an array of shape {shape}, of which neither the last nor the first axis is the {wanted}"
        )
    if len(orders) > 1:
        orders = [pixels for pixels in orders if pixels.shape[:2] == size]
    if len(orders) != 1:
        raise ImageProblem(
            f"is an array of shape {shape}, whose {channels} channels may be the first axis or the last: store images "
            "of another height and width"
        )
    (pixels,) = orders
    if pixels.shape[:2] != size:
        bands = [np.asarray(_fit(Image.fromarray(pixels[..., c].copy()), size, fit)) for c in range(channels)]
        pixels = np.stack(bands, axis=2)
    return np.ascontiguousarray(pixels)


def _too_large(pixels: int, limit: int) -> ImageProblem:
    return ImageProblem(f"has {pixels:,} pixels, and no more than {limit:,} are decoded: scale it down first")


def _load(data: bytes, low_bytes: bool = False) -> tuple[Image.Image, str]:
    """The upright image and PIL's name of the layout of its pixels in the file.

    low_bytes: of an image whose layout is in _WIDE or "LA;16B", the bytes that PIL drops: the low ones of RGB and RGBA;
    of gray with alpha all four, as RGBA.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = opened
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(image.width * image.height, MAX_PIXELS)
        # An MPO file is a photograph; its further pictures are previews and depth or gain maps.
        if opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
            raise ImageProblem(f"has {frames} frames: keep one picture a file")
        rawmode = _rawmode(opened.tile[0][3]) if opened.tile else ""
        if low_bytes:
            opened.tile = [_with_other_order(tile) for tile in opened.tile]
        image.load()
        _turn_upright(image)
    return image, rawmode


def _turn_upright(image: Image.Image) -> None:
    """Turns the image as its EXIF data say, and leaves it as it is where they cannot be read."""
    try:
        if image.getexif().get(_ORIENTATION, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # of damaged metadata, from struct.error to SyntaxError; pixels are turned before they are edited
        return


def _rawmode(arguments: Any) -> str:
    """Of a tile's arguments, which are a layout or begin with one."""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _with_other_order(tile: Any) -> Any:
    arguments = tile[3]
    rawmode = _rawmode(arguments)
    wide = _WIDE.fullmatch(rawmode)
    other = wide[1] + _OTHER_ORDER[wide[2]] if wide else "RGBA"
    arguments = other if isinstance(arguments, str) else (other, *arguments[1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _flatten(
    image: Image.Image, rawmode: str, data: bytes, background: tuple[int, int, int] | None, keep_alpha: bool
) -> Image.Image:
    """The image without alpha and in a mode whose conversion to L or RGB keeps its meaning.

    keep_alpha: LA or RGBA where there is alpha.
    """
    # Until Pillow 11.2 a 16-bit PNG opened in mode I. A PGM of more than 8 bits does, its values scaled to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint16)[..., None]
        if rawmode == "I;12":
            values = ((values.astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # zero is white; PIL inverts 8 bits only
            values = np.uint16(65535) - values
        return _from_16_bits(values, image, background, keep_alpha)
    if rawmode == "LA;16B":
        four = np.asarray(_load(data, low_bytes=True)[0]).astype(np.uint16)
        return _from_16_bits(four[..., ::2] << 8 | four[..., 1::2], image, background, keep_alpha)
    if _WIDE.fullmatch(rawmode) and image.mode in ("RGB", "RGBA"):
        low = np.asarray(_load(data, low_bytes=True)[0])
        return _from_16_bits(np.asarray(image).astype(np.uint16) << 8 | low, image, background, keep_alpha)
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ImageProblem(f"has {kind} pixels, whose range is unknown: convert it to 8 or 16 bits first")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        if rawmode in _LEVELS and "transparency" in image.info:
            image.info["transparency"] *= _LEVELS[rawmode]
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        if keep_alpha:
            return image
        if image.getchannel("A").getextrema() == (255, 255):
            return image.convert("RGB")
        values = np.asarray(image)
        return _composite(values[..., :3], values[..., 3], background)
    return image


def _from_16_bits(
    values: np.ndarray, image: Image.Image, background: tuple[int, int, int] | None, keep_alpha: bool
) -> Image.Image:
    """An L or RGB image of uint16 [H, W, C], the last of 2 or 4 channels alpha, else with a transparent colour."""
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1]
    elif "transparency" in image.info:
        key = np.array(image.info["transparency"], dtype=np.uint16)
        alpha = np.where((values == key).all(axis=2), np.uint16(0), np.uint16(65535))
    if alpha is not None and keep_alpha:
        values = np.concatenate([values, alpha[..., None]], axis=2)
    elif alpha is not None and alpha.min() < 65535:
        return _composite(values, alpha, background)
    # In bands of rows, whose wider integers take little memory.
    reduced = np.empty(values.shape, np.uint8)
    for rows in _bands(values):
        reduced[rows] = (values[rows].astype(np.uint32) + 128) // 257
    return Image.fromarray(reduced.squeeze(2) if values.shape[2] == 1 else reduced)


def _composite(values: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] | None) -> Image.Image:
    """RGB image of values [H, W, 1 or 3] over the background by alpha [H, W], uint8 or uint16, rounded once."""
    if background is None:
        raise ImageProblem("is partly transparent: flatten it, or give a colour to put behind it by data.background")
    top = int(np.iinfo(values.dtype).max)
    scale = top // 255
    behind = np.array(background, dtype=np.uint64) * np.uint64(scale)
    whole = np.uint64(top * scale)  # odd, so that no value lies half way
    result = np.empty((*alpha.shape, 3), np.uint8)
    for rows in _bands(values):
        a = alpha[rows][..., None].astype(np.uint64)
        mixed = values[rows].astype(np.uint64) * a + behind * (np.uint64(top) - a)
        result[rows] = (mixed + whole // np.uint64(2)) // whole
    return Image.fromarray(result)


def _bands(values: np.ndarray) -> list[slice]:
    rows = max(1, _BAND_PIXELS // values.shape[1])
    return [slice(first, first + rows) for first in range(0, values.shape[0], rows)]


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


# How files begin that PIL reads, where it says of one that it cannot identify it.
_IMAGES = {
    "PNG": re.compile(rb"\x89PNG"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "GIF": re.compile(rb"GIF8"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "BMP": re.compile(rb"BM....\0\0\0\0", re.S),
    "WebP": re.compile(rb"RIFF....WEBP", re.S),
}
# What else is found under an image's name: its beginning in lower case, without white space before it.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"<!doctype html": "an HTML page, as a failed download leaves",
    b"<html": "an HTML page, as a failed download leaves",
    b"<svg": "an SVG drawing, which PIL does not read",
    b"<?xml": "an XML document",
    b"%pdf": "a PDF document",
    b"{": "JSON",
    b"[": "JSON",
    b"pk\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"par1": "a parquet file",
    b"\x93numpy": "a NumPy array",
}
_CUT_SHORT = re.compile(r"truncat|unexpected end|not enough|incomplete|eof|buffer is not large enough", re.I)


def _describe(data: bytes, error: Exception, quote: bool) -> str:
    """What is wrong with bytes that PIL does not decode."""
    if not data:
        return "it is empty (0 bytes)"
    if not data.strip(b"\0"):
        return f"its {len(data):,} bytes are all zero, as a disk or a broken copy leaves"
    detail = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        kind = _kind(data)
        if kind is None:
            return f"it is not an image but {_name_other(data, quote)}"
        detail = f"a {kind} file that is damaged in or behind its header"
    declared = _declared_bytes(data)
    ends_early = data.startswith(b"\x89PNG") and b"IEND" not in data[-64:]
    if declared > len(data) or ends_early or isinstance(error, EOFError) or _CUT_SHORT.search(detail):
        whole = f" of {declared:,}" if declared > len(data) else ""
        return f"it is cut short after {len(data):,}{whole} bytes ({detail})"
    return detail


def _kind(data: bytes) -> str | None:
    """The format of which an unreadable file has the beginning."""
    return next((name for name, magic in _IMAGES.items() if magic.match(data)), None)


def _declared_bytes(data: bytes) -> int:
    """How long the file says that it is, in the formats that do; else 0."""
    if _kind(data) == "WebP":
        return 8 + int.from_bytes(data[4:8], "little")
    return int.from_bytes(data[2:6], "little") if _kind(data) == "BMP" else 0


def _name_other(data: bytes, quote: bool) -> str:
    head = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, name in _OTHERS.items():
        if head.lower().startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return f"of a format that this PIL does not read ({data[8:12].decode('ascii', 'replace')}, as HEIC and video)"
    if not quote:
        return "of a format that PIL does not read"
    text = head[:40].decode("utf-8", "replace")
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"text that begins {' '.join(text.split())!r}"
    return f"of a format that PIL does not read (its first bytes are {data[:8].hex(' ')})"
