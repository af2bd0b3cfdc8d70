"""Decoding: every mode either converted by its stated rule or refused, and the four ways to reach the model's size."""

import io
import re
import struct
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastddpm.images
from fastddpm.errors import ConfigError
from fastddpm.images import ImageProblem, decode_image, fit_array, parse_background

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def raw_png(rows: list[bytes], width: int, bits: int, colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of packed rows, of kinds that PIL does not write. colour_type: 0 gray, 2 RGB, 4 gray + alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def png_16(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of uint16 [H, W, 1 to 4]."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    return raw_png([row.astype(">u2").tobytes() for row in values], values.shape[1], 16, colour_type, *chunks)


def tiff_16(values: np.ndarray, order: str, compression: int = 1) -> bytes:
    """A TIFF of uint16 [H, W, 3]; order: < or >; compression: 1 none, 8 deflate, which PIL leaves to libtiff."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    data += bytes(len(data) % 2)
    entries = [
        *(
            (256, 3, 1, width),
            (257, 3, 1, height),
            (258, 3, 3, 8),
            (259, 3, 1, compression),
            (262, 3, 1, 2),
            (273, 4, 1, 14),
        ),
        *((277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))),
    ]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        pad = "H2x" if kind == 3 and count == 1 else "I"
        directory += struct.pack(f"{order}HHI{pad}", tag, kind, count, value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI3H", 42, 14 + len(data), 16, 16, 16)
    return head + data + directory + bytes(4)


def over(values: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int], top: int) -> np.ndarray:
    """uint8 [H, W, 3]: the mean of values [H, W, 1 or 3] and background, weighted by alpha, in exact arithmetic."""
    values = np.broadcast_to(values, (*alpha.shape, 3))
    result = np.empty(values.shape, np.uint8)
    for y, x, c in np.ndindex(*values.shape):
        a = Fraction(int(alpha[y, x]), top)
        result[y, x, c] = round(a * int(values[y, x, c]) * 255 / top + (1 - a) * background[c])
    return result


def decode(
    data: bytes, channels: int = 3, size: tuple[int, int] = (5, 7), fit: Any = "exact", background: Any = None
) -> np.ndarray:
    pixels = decode_image(data, size, channels, fit, background)
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


def test_16_bits_of_colour_are_rounded_too() -> None:
    """PIL keeps the high byte, which is another value for half of all pixels."""
    values = RNG.integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    values[0, :4, 0] = (0, 128, 129, 65535)
    rounded = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert (rounded != values >> 8).any()
    files = [tiff_16(values, order, compression) for order in "<>" for compression in (1, 8)]
    for data in (png_16(values), *files):
        assert np.array_equal(decode(data), rounded)
    alpha = np.full((5, 7, 1), 65535, np.uint16)
    assert np.array_equal(decode(png_16(np.dstack([values, alpha]))), rounded)
    assert np.array_equal(decode(png_16(np.dstack([values[..., :1], alpha])), 1), rounded[..., :1])
    turned = Image.Exif()
    turned[0x0112] = 6
    data = png_16(values, chunk(b"eXIf", turned.tobytes().removeprefix(b"Exif\0\0")))
    assert np.array_equal(decode(data, size=(7, 5)), np.rot90(rounded, -1))


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
            with pytest.raises(ImageProblem, match=r"is partly transparent: flatten it.*data\.background"):
                decode(data, channels)
    # A transparent colour that no pixel has leaves the image opaque.
    assert np.array_equal(decode(encode(np.maximum(GRAY, 1), transparency=0), 1)[..., 0], np.maximum(GRAY, 1))


BACKGROUND = (200, 17, 96)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA[0, :3] = (0, 255, 1)


def gray_of(colour: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(colour).convert("L"))[..., None]


def assert_composited(data: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(decode(data, background=BACKGROUND), expected)
    assert np.array_equal(decode(data, 1, background=BACKGROUND), gray_of(expected))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composited_on_the_background(file_format: str) -> None:
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encode(np.dstack([COLOUR, ALPHA]), file_format, **options)
    assert_composited(data, over(COLOUR, ALPHA, BACKGROUND, 255))


def test_alpha_of_gray_and_of_palettes_is_composited() -> None:
    assert_composited(encode(np.dstack([GRAY, ALPHA])), over(GRAY[..., None], ALPHA, BACKGROUND, 255))
    palette = Image.fromarray(COLOUR).quantize(16)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    each = RNG.integers(0, 256, 16, dtype=np.uint8)
    assert_composited(encode(palette, transparency=each.tobytes()), over(colours, each[index], BACKGROUND, 255))
    used = int(index[2, 3])
    one = np.where(index == used, 0, 255)
    assert_composited(encode(palette, transparency=used), over(colours, one, BACKGROUND, 255))
    assert_composited(encode(palette, "GIF", transparency=used), over(colours, one, BACKGROUND, 255))


def test_16_bits_of_alpha_are_composited_and_rounded_once() -> None:
    values = RNG.integers(0, 2**16, (5, 7, 4), dtype=np.uint16)
    values[0, :3, 3] = (0, 65535, 65534)
    assert_composited(png_16(values), over(values[..., :3], values[..., 3], BACKGROUND, 65535))
    gray = values[..., [0, 3]]
    assert_composited(png_16(gray), over(gray[..., :1], gray[..., 1], BACKGROUND, 65535))
    # 65534 of 65535 is not opaque, though its high byte is 255.
    values[..., 3] = 65534
    with pytest.raises(ImageProblem, match="partly transparent"):
        decode(png_16(values))


def test_transparent_colours_are_composited() -> None:
    """A tRNS chunk of gray or RGB, at every depth, compared in the file's own bits."""
    for bits in (1, 2, 4, 8):
        levels = RNG.integers(0, 2**bits, (5, 8), dtype=np.uint8)
        levels[0, :2] = (1, 0)
        unpacked = (levels[..., None] >> np.arange(bits)[::-1]) & 1
        rows = [np.packbits(row.ravel()).tobytes() for row in unpacked]
        data = raw_png(rows, 8, bits, 0, chunk(b"tRNS", struct.pack(">H", 1)))
        scaled = levels[..., None] * (255 // (2**bits - 1))
        expected = over(scaled, np.where(levels == 1, 0, 255), BACKGROUND, 255)
        assert np.array_equal(decode(data, size=(5, 8), background=BACKGROUND), expected), bits
    values = RNG.integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    values[1, 1] = values[0, 0] ^ (0, 0, 1)  # the same high bytes as the transparent one
    for channels in (1, 3):
        some = values[..., :channels]
        key = chunk(b"tRNS", some[0, 0].astype(">u2").tobytes())
        alpha = np.where((some == some[0, 0]).all(axis=2), 0, 65535)
        assert_composited(png_16(some, key), over(some, alpha, BACKGROUND, 65535))
    rgb = np.where(COLOUR == 0, 1, COLOUR)
    data = encode(Image.fromarray(rgb), transparency=tuple(map(int, rgb[3, 3])))
    assert_composited(data, over(rgb, np.where((rgb == rgb[3, 3]).all(axis=2), 0, 255), BACKGROUND, 255))


def test_a_background_changes_no_opaque_image() -> None:
    for data in (encode(COLOUR), encode(np.dstack([COLOUR, np.full((5, 7), 255, np.uint8)]))):
        assert np.array_equal(decode(data, background=BACKGROUND), COLOUR)


def test_large_images_are_composited_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastddpm.images, "_BAND_PIXELS", 14)  # two rows of seven
    assert_composited(encode(np.dstack([COLOUR, ALPHA])), over(COLOUR, ALPHA, BACKGROUND, 255))
    values = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    assert np.array_equal(decode(encode(values), 1)[..., 0], np.floor(values / 257 + 0.5).astype(np.uint8))


def test_backgrounds_are_read_once_and_named() -> None:
    assert parse_background("white") == (255, 255, 255)
    assert parse_background("#80a0ff") == (128, 160, 255)
    for text in ("", "whit", "#80a0f", "#80a0ff40", "rgba(1,2,3,4)", "hsl(900,1%)"):
        with pytest.raises(ConfigError, match=rf"data\.background is {re.escape(repr(text))}") as caught:
            parse_background(text)
        assert "\n" not in str(caught.value)


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


NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")  # the loader ignores them too
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_a_file_cut_short_anywhere_is_refused_or_whole(file_format: str) -> None:
    whole = encode(NOISE, file_format)
    pixels = decode(whole, size=(64, 64))
    for kept in [*range(1, 64), *range(64, len(whole), len(whole) // 40)]:
        try:
            assert np.array_equal(decode(whole[:kept], size=(64, 64)), pixels), kept
        except ImageProblem as problem:
            message = str(problem)
            assert "cannot be decoded" in message and "\n" not in message and "BytesIO" not in message
            if file_format in ("PNG", "JPEG", "WEBP", "BMP") and kept > len(whole) // 2:
                assert f"cut short after {kept:,} " in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty (0 bytes)"),
        (bytes(1234), "its 1,234 bytes are all zero"),
        (b"not an image", "it is not an image but text that begins 'not an image'"),
        (b"\n <!DOCTYPE html><html><body>404", "it is not an image but an HTML page"),
        (b"\xef\xbb\xbf<html>", "it is not an image but an HTML page"),
        (b"<svg xmlns='...'>", "it is not an image but an SVG drawing"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is not an image but an XML document"),
        (b'{"error": 403}', "it is not an image but JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is not an image but a Git LFS pointer"),
        (b"%PDF-1.7 ", "it is not an image but a PDF document"),
        (b"PK\3\4....", "it is not an image but a zip archive"),
        (b"\0\0\0\x18ftypheic....", "of a format that this PIL does not read (heic, as HEIC and video)"),
        (b"\x01\x02\xff\xfe", "of a format that PIL does not read (its first bytes are 01 02 ff fe)"),
        (encode(NOISE)[:7], "it is cut short after 7 bytes (a PNG file that is damaged in or behind its header)"),
        (encode(NOISE)[:20], "it is cut short after 20 bytes (Truncated File Read)"),
        (encode(NOISE, "BMP")[:2000], "it is cut short after 2,000 of 12,342 bytes"),
        (encode(COLOUR)[:50] + b"\0\0\0\0" + encode(COLOUR)[54:], "cannot be decoded"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_image_is_said(data: bytes, words: str) -> None:
    with pytest.raises(ImageProblem, match=re.escape(words)) as caught:
        decode(data)
    assert "cannot be decoded: " in str(caught.value) and "\n" not in str(caught.value)


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes that claim many pixels: PIL's limit, then ours where PIL has been told to have none."""
    header = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageProblem, match=r"^has 1,200,000,000 pixels, and no more than 178,956,970 are decoded"):
        decode(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageProblem, match=r"^has 1,200,000,000 pixels, and no more than 268,435,456 are decoded"):
        decode(bomb)


def test_one_pixel_is_enough() -> None:
    dot = np.array([[[9, 8, 7]]], np.uint8)
    assert np.array_equal(decode(encode(dot), size=(1, 1)), dot)
    assert np.array_equal(decode(encode(dot), fit="resize"), np.broadcast_to(dot, (5, 7, 3)))
    assert np.array_equal(decode(encode(dot), fit="resize_crop"), np.broadcast_to(dot, (5, 7, 3)))
    with pytest.raises(ImageProblem, match="is 1x1 pixels"):
        decode(encode(dot))


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


def tiff_gray(values: np.ndarray, zero_is_white: bool, compression: str | None = None) -> bytes:
    """16-bit gray; PIL writes 0 as black whatever it is told, so the tag is changed in the file."""
    data = bytearray(encode(values, "TIFF", **({} if compression is None else {"compression": compression})))
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8 : at + 10] = struct.pack("<H", 0 if zero_is_white else 1)
    return bytes(data)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_16_bit_tiffs_whose_zero_is_white_are_inverted(compression: str | None) -> None:
    values = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    black = decode(tiff_gray(values, False, compression), 1)[..., 0]
    assert np.array_equal(black, np.floor(values / 257 + 0.5).astype(np.uint8))
    assert np.array_equal(decode(tiff_gray(values, True, compression), 1)[..., 0], 255 - black)


def test_12_bit_tiffs_are_scaled_by_their_range() -> None:
    values = np.array([[0, 4095, 2048, 1], [4095, 16, 100, 4000]], np.uint16)
    packed = b"".join(
        bytes([one >> 4, (one & 15) << 4 | two >> 8, two & 255]) for one, two in values.reshape(-1, 2).tolist()
    )
    tags = [
        (256, 3, 4),
        (257, 3, 2),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 2),
        (279, 4, len(packed)),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory + bytes(4)
    assert np.array_equal(
        decode(data, 1, size=(2, 4))[..., 0], np.floor(values.astype(float) * 255 / 4095 + 0.5).astype(np.uint8)
    )


@pytest.mark.parametrize("largest", [65535, 4095])
def test_pgm_files_of_more_than_8_bits_are_scaled_by_their_range(largest: int) -> None:
    values = RNG.integers(0, largest + 1, (5, 7), dtype=np.uint16)
    data = b"P5 7 5 %d\n" % largest + values.astype(">u2").tobytes()
    difference = decode(data, 1)[..., 0] - values.astype(float) * 255 / largest
    assert np.abs(difference).max() <= 0.5 + 1 / 257  # PIL has rounded it to 16 bits


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_cannot_be_read_turn_nothing() -> None:
    for exif in (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01", b"MM"):
        assert np.array_equal(decode(encode(COLOUR, exif=exif)), COLOUR)


def test_what_the_machine_lacks_is_no_image_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def load(*args: object) -> None:
            raise error

        monkeypatch.setattr(fastddpm.images, "_load", load)

    for error in (MemoryError(), OSError(24, "Too many open files")):
        fail(error)
        with pytest.raises(type(error)):
            decode(encode(COLOUR))
    fail(OSError("broken data stream"))
    with pytest.raises(ImageProblem, match="broken data stream"):
        decode(encode(COLOUR))


def test_content_that_is_not_in_the_data_is_not_quoted() -> None:
    for data in (b"secret=12345", b"\x01\x02\xff\xfe"):
        with pytest.raises(ImageProblem, match=r"it is not an image but of a format that PIL does not read$"):
            decode_image(data, (5, 7), 3, "exact", quote=False)


def test_two_and_four_channels_keep_alpha() -> None:
    """Gray with alpha and RGBA, straight: the file's own values under transparent pixels too."""
    alpha = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    alpha[0, :2] = (0, 255)
    rgba, la = np.dstack([COLOUR, alpha]), np.dstack([GRAY, alpha])
    assert np.array_equal(decode(encode(rgba), 4), rgba)
    assert np.array_equal(decode(encode(la), 2), la)
    assert np.array_equal(decode(encode(la), 4), np.dstack([GRAY, GRAY, GRAY, alpha]))
    gray = decode(encode(rgba), 2)
    assert np.array_equal(gray[..., 1], alpha) and np.array_equal(gray[..., :1], decode(encode(COLOUR), 1))
    for background in (None, (9, 8, 7)):  # which is for models without alpha
        assert np.array_equal(decode(encode(rgba), 4, background=background), rgba)


def test_files_without_alpha_are_opaque_in_two_and_four_channels() -> None:
    for image in (COLOUR, GRAY, Image.fromarray(COLOUR).convert("CMYK"), Image.fromarray(GRAY).convert("P")):
        data = encode(image, "TIFF")
        for channels in (2, 4):
            pixels = decode(data, channels)
            assert (pixels[..., -1] == 255).all() and np.array_equal(pixels[..., :-1], decode(data, channels - 1))


def test_16_bits_of_alpha_are_rounded_and_transparent_colours_are_alpha() -> None:
    for channels in (2, 4):
        values = RNG.integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
        values[0, :3, -1] = (0, 128, 129)
        expected = np.floor(values / 257 + 0.5).astype(np.uint8)
        assert np.array_equal(decode(png_16(values), channels), expected)
    key = chunk(b"tRNS", struct.pack(">HHH", *values[1, 2, :3]))
    keyed = decode(png_16(values[..., :3], key), 4)
    assert np.array_equal(keyed[..., :3], expected[..., :3])
    assert keyed[1, 2, 3] == 0 and (keyed[..., 3] == 0).sum() == 1 and (keyed[..., 3] == 255).sum() == 34
    colour = tuple(int(v) for v in COLOUR[2, 3])
    assert decode(encode(Image.fromarray(COLOUR), transparency=colour), 4)[2, 3].tolist() == [*colour, 0]


def test_scaling_weights_colours_by_alpha() -> None:
    """A red disc on transparent green stays red to its rim; colours scaled by themselves would bleed."""
    y, x = np.mgrid[0:40, 0:40]
    inside = (y - 19.5) ** 2 + (x - 19.5) ** 2 < 15**2
    rgba = np.where(inside[..., None], (255, 0, 0, 255), (0, 255, 0, 0)).astype(np.uint8)
    small = decode(encode(rgba), 4, (10, 10), "resize")
    seen = small[..., 3] > 8
    assert 20 < seen.sum() < 100 and (small[seen][:, 0] >= 250).all() and (small[seen][:, 1] <= 5).all()
    assert len(np.unique(small[..., 3])) > 4  # the rim is antialiased


def test_image_files_have_up_to_four_channels() -> None:
    for channels in (5, 12):
        with pytest.raises(ImageProblem, match=rf"the model takes {channels}: store arrays of uint8"):
            decode(encode(COLOUR), channels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_arrays_are_taken_with_their_channels_last_or_first(channels: int) -> None:
    values = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    for given in (values, values.transpose(2, 0, 1), np.asfortranarray(values)):
        pixels = fit_array(given, (5, 7), channels, "exact")
        assert pixels.flags.c_contiguous and pixels.dtype == np.uint8 and np.array_equal(pixels, values)
    assert np.array_equal(fit_array(values[..., 0], (5, 7), 1, "exact"), values[..., :1])


def test_an_axis_that_may_be_either_is_told_by_the_size_or_refused() -> None:
    values = RNG.integers(0, 256, (3, 7, 3), dtype=np.uint8)
    assert np.array_equal(fit_array(values, (3, 7), 3, "exact"), values)
    assert np.array_equal(fit_array(values, (7, 3), 3, "exact"), values.transpose(1, 2, 0))
    with pytest.raises(ImageProblem, match=r"shape 3x7x3, whose 3 channels may be the first axis or the last"):
        fit_array(values, (6, 6), 3, "resize")
    with pytest.raises(ImageProblem, match=r"shape 4x4x4, whose 4 channels may be"):
        fit_array(np.zeros((4, 4, 4), np.uint8), (4, 4), 4, "exact")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((5, 7, 2), np.float32), r"is an array of float32: convert it to uint8"),
        (np.zeros((5, 7, 2), np.int64), r"is an array of int64: convert"),
        (np.zeros((5, 7, 3), np.uint8), r"shape 5x7x3, of which neither the last nor the first axis is the 2 channels"),
        (np.zeros((5, 7), np.uint8), r"shape 5x7, of which neither .* the 2 channels"),
        (np.zeros((5,), np.uint8), r"shape 5: valid is \[H, W, C\], \[C, H, W\] or \[H, W\]"),
        (np.zeros((0, 7, 2), np.uint8), r"shape 0x7x2: valid is"),
        (np.zeros((6, 7, 2), np.uint8), r"is 7x6 pixels \(width x height\), the model takes 7x5: choose data\.fit"),
    ],
)
def test_arrays_that_cannot_be_used(values: np.ndarray, words: str) -> None:
    with pytest.raises(ImageProblem, match=words):
        fit_array(values, (5, 7), 2, "exact")


@pytest.mark.parametrize("fit", ["resize", "crop", "resize_crop"])
def test_channels_of_arrays_are_scaled_as_those_of_files(fit: Any) -> None:
    colour = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    expected = decode(encode(colour), 3, (8, 9), fit)
    assert np.array_equal(fit_array(colour, (8, 9), 3, fit), expected)
    more = np.concatenate([colour, colour[..., ::-1], 255 - colour[..., :1]], axis=2)
    scaled = fit_array(more, (8, 9), 7, fit)
    assert np.array_equal(scaled[..., :3], expected) and np.array_equal(scaled[..., 5], expected[..., 0])
