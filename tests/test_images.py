"""Decoding: every mode either converted by its stated rule or refused, and the four ways to reach the model's size."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddpm.images import ImageProblem, decode_image

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def decode(data: bytes, channels: int = 3, size: tuple[int, int] = (5, 7), fit: Any = "exact") -> np.ndarray:
    pixels = decode_image(data, size, channels, fit)
    assert pixels.dtype == np.uint8 and pixels.shape == (*size, channels) and pixels.flags.c_contiguous
    return pixels


def luma(colour: np.ndarray) -> np.ndarray:
    return colour.astype(np.float64) @ [0.299, 0.587, 0.114]


def test_gray_and_colour() -> None:
    assert np.array_equal(decode(encode(COLOUR)), COLOUR)
    assert np.array_equal(decode(encode(GRAY), 1)[..., 0], GRAY)
    assert np.array_equal(decode(encode(GRAY), 3), np.repeat(GRAY[..., None], 3, axis=2))
    assert np.abs(decode(encode(COLOUR), 1)[..., 0] - luma(COLOUR)).max() <= 1


def test_sixteen_bits_are_rounded_not_clipped() -> None:
    values = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    values[0, :4] = (0, 128, 129, 65535)
    for data in (encode(values), encode(values, "TIFF"), encode(values.astype(">u2"), "TIFF")):
        assert np.array_equal(decode(data, 1)[..., 0], np.floor(values / 257 + 0.5).astype(np.uint8))


@pytest.mark.parametrize(("dtype", "word"), [(np.float32, "float"), (np.int32, "32-bit integer")])
def test_float_and_32_bit_pixels_are_refused(dtype: type, word: str) -> None:
    with pytest.raises(ImageProblem, match=f"{word} pixels, whose range is unknown"):
        decode(encode(GRAY.astype(dtype), "TIFF"))


def test_other_modes_go_through_rgb() -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(GRAY).convert("1")
    assert set(np.unique(decode(encode(bilevel), 1))) <= {0, 255}
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    assert np.array_equal(decode(encode(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    assert np.abs(decode(encode(cmyk, "TIFF"), 1)[..., 0] - luma(np.asarray(cmyk.convert("RGB")))).max() <= 1


def test_opaque_alpha_is_dropped_and_partial_transparency_refused() -> None:
    alpha = np.full((5, 7), 255, np.uint8)
    opaque = np.dstack([COLOUR, alpha])
    assert np.array_equal(decode(encode(opaque)), COLOUR)
    assert np.array_equal(decode(encode(np.dstack([GRAY, alpha])), 1)[..., 0], GRAY)
    alpha[4, 6] = 254
    palette = Image.fromarray(COLOUR).quantize(16)
    used = int(np.asarray(palette)[0, 0])
    black = GRAY.copy()
    black[2, 2] = 0
    for data in (
        encode(np.dstack([COLOUR, alpha])),
        encode(np.dstack([GRAY, alpha])),
        encode(palette, transparency=used),
        encode(black, transparency=0),
        encode(black.astype(np.uint16), transparency=0),
    ):
        for channels in (1, 3):
            with pytest.raises(ImageProblem, match="is partly transparent: flatten it"):
                decode(data, channels)
    # A transparent colour that no pixel has leaves the image opaque.
    assert np.array_equal(decode(encode(np.maximum(GRAY, 1), transparency=0), 1)[..., 0], np.maximum(GRAY, 1))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animations_are_refused(file_format: str) -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageProblem, match="has 2 frames"):
        decode(data)


def test_photographs_with_embedded_previews_are_taken() -> None:
    frames = [Image.fromarray(np.full((5, 7, 3), level, np.uint8)) for level in (200, 10)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(decode(data).astype(int) - 200).max() <= 2


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    assert np.array_equal(decode(encode(COLOUR, exif=exif), size=(7, 5)), np.rot90(COLOUR, -1))


def test_damaged_files_are_refused_whatever_pil_raises() -> None:
    whole = encode(COLOUR)
    jpeg = encode(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    for data in (b"", b"not an image", whole[:40], whole[:-30], jpeg[: len(jpeg) // 2], whole[:20] + whole[40:]):
        with pytest.raises(ImageProblem, match="cannot be decoded") as caught:
            decode(data, size=(64, 64) if data.startswith(jpeg[:3]) else (5, 7))
        assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_exact_names_both_sizes_and_the_options() -> None:
    with pytest.raises(ImageProblem, match=r"is 7x5 pixels \(width x height\), the model takes 6x8") as caught:
        decode(encode(COLOUR), size=(8, 6))
    assert "data.fit=resize, crop or resize_crop" in str(caught.value)


def test_crop_takes_the_centre() -> None:
    assert np.array_equal(decode(encode(COLOUR), size=(3, 3), fit="crop"), COLOUR[1:4, 2:5])
    assert np.array_equal(decode(encode(COLOUR), size=(5, 4), fit="crop"), COLOUR[:, 1:5])
    with pytest.raises(ImageProblem, match=r"cannot be cropped from it: choose data\.fit=resize or resize_crop"):
        decode(encode(COLOUR), size=(6, 3), fit="crop")


def test_resize_is_antialiased_and_stretches() -> None:
    stripes = np.zeros((64, 96), np.uint8)
    stripes[:, ::2] = 255
    small = decode(encode(stripes), 1, (16, 16), "resize")
    # Columns taken without filtering would be 0 or 255; the filter is cut off at the border.
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 2
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8) * 2, (64, 96))
    wide = decode(encode(np.ascontiguousarray(ramp)), 1, (16, 24), "resize")[8, :, 0].astype(float)
    assert np.abs(wide[2:-2] - (np.arange(2, 22) * 4 + 1.5) * 2).max() <= 1
    # Palette images are converted first; PIL would resize them by nearest neighbour.
    colours = decode(encode(Image.fromarray(stripes).convert("P")), 1, (16, 16), "resize")
    assert np.array_equal(colours, small)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (33, 31), (8, 12)])
def test_resize_crop_keeps_proportions_and_centre(height: int, width: int) -> None:
    # A linear field has a known value at every point of the source, so the crop box can be read off the result.
    y, x = np.mgrid[0:height, 0:width]
    size = (16, 24)
    scale = min(height / size[0], width / size[1])
    for axis, field in ((0, y), (1, x)):
        pixels = decode(encode((field * 2).astype(np.uint8)), 1, size, "resize_crop")[..., 0].astype(float)
        centres = (np.arange(size[axis]) - (size[axis] - 1) / 2) * scale + ((height, width)[axis] - 1) / 2
        profile = pixels[8] if axis else pixels[:, 12]
        assert np.abs(profile[4:-4] - 2 * centres[4:-4]).max() <= 1.1
