"""Pictures: grids of samples, filmstrips and animations between x_T and x_0, plots of curves.

Pixels of images are enlarged without smoothing.
"""

import math
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from .errors import ConfigError
from .files import replace_file

_INK, _FRAME, _RULE = (40, 40, 40), (120, 120, 120), (228, 228, 228)
# Okabe and Ito's, which the colour-blind tell apart as well; without their yellow, which is faint on white.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0))
_SMOOTH = 3  # lines are drawn this many times larger and then reduced


def grid(images: np.ndarray, columns: int | None = None, *, gap: int = 1, min_side: int = 512) -> Image.Image:
    """Images side by side, row by row.

    Args:
        images: uint8 [N, H, W, C]: gray, RGB, RGBA (shown over white), or another C, of which the first channel is
            shown, such as gray with alpha.
        columns: images per row; unset: about as many as rows.
        gap: pixels between images, before enlarging.
        min_side: small pictures are enlarged by a whole factor until their longer side reaches this.
    """
    n, height, width, _ = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    padded = np.full((rows * columns, height + gap, width + gap, 3), 255, np.uint8)
    padded[:n, :height, :width] = _as_rgb(images)
    sheet = rearrange(padded, "(r c) h w k -> (r h) (c w) k", r=rows)
    sheet = np.pad(sheet, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    scale = max(1, math.ceil(min_side / max(sheet.shape[:2])))
    return Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))


def _as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of uint8 [..., C]."""
    channels = images.shape[-1]
    if channels == 4:
        colour, alpha = images[..., :3].astype(np.uint16), images[..., 3:].astype(np.uint16)
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return images if channels == 3 else images[..., :1].repeat(3, axis=-1)


def filmstrip(frames: np.ndarray) -> Image.Image:
    """One row per image, time from left (x_T) to right (x_0).

    Args:
        frames: uint8 [F, N, H, W, C].
    """
    return grid(rearrange(frames, "f n h w c -> (n f) h w c"), columns=frames.shape[0])


def captioned(
    rows: Mapping[str, np.ndarray], *, title: str = "", columns: Sequence[str] = (), min_side: int = 512
) -> Image.Image:
    """A grid with a label before each row, a caption over each column and a title.

    Args:
        rows: label, which may have several lines -> its images uint8 [n, H, W, C] from left to right, C as for grid.
        columns: captions, each over one column; one that does not fit into its column and the free ones beside it is
            left out.
        min_side: images are enlarged by a whole factor until the longer side of the grid reaches this.
    """
    longest = max(len(images) for images in rows.values())
    height, width, _ = next(iter(rows.values())).shape[1:]
    cells = np.full((len(rows), longest, height, width, 3), 255, np.uint8)
    for cell, images in zip(cells, rows.values(), strict=True):
        cell[: len(images)] = _as_rgb(images)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    lines = max(label.count("\n") + 1 for label in rows)
    sheet = grid(rearrange(cells, "r n h w c -> (r n) h w c"), longest, min_side=min_side)
    scale = sheet.height // (len(rows) * (height + 1) + 1)
    row_height, column_width = (height + 1) * scale, (width + 1) * scale
    stretch = max(0, lines * _LINE + 4 - row_height)  # labels of many lines push the rows of small images apart
    left = 16 + max(math.ceil(small.getlength(line)) for label in rows for line in label.split("\n"))
    head = 10 + (26 if title else 0)
    top = head + (20 if columns else 0)
    right = max(left + sheet.width, math.ceil(large.getlength(title)) + 16) + 8
    picture = Image.new("RGB", (right, top + sheet.height + len(rows) * stretch + 8), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((8, 8), title, _INK, large, anchor="lt")
    free = 8  # where the last caption ends
    for number, text in enumerate(columns):
        middle, half = left + (number + 0.5) * column_width, small.getlength(text) / 2
        if text and middle - half >= free and middle + half <= right:
            draw.text((middle, head), text, _INK, small, anchor="mt")
            free = round(middle + half + 8)
    for number, label in enumerate(rows):
        y = top + number * (row_height + stretch)
        band = sheet.crop((0, number * row_height, sheet.width, (number + 1) * row_height + scale))
        picture.paste(band, (left, y + stretch // 2))
        contents = label.split("\n")
        first = y + (row_height + scale + stretch) / 2 - (len(contents) - 1) * _LINE / 2
        for line, content in enumerate(contents):
            draw.text((8, first + line * _LINE), content, _INK, small, anchor="lm")
    return picture


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on white."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


_LINE = 18  # height of a line of a label


def film(rows: Mapping[str, np.ndarray], captions: Sequence[str] = ()) -> list[Image.Image]:
    """Frames of an animation: in each, a labelled row of images for each entry.

    Args:
        rows: label -> uint8 [F, N, H, W, C]: of F frames, the images from left to right.
        captions: a title for each frame; none: no titles.

    Returns:
        F pictures of one size.
    """
    counts = {len(frames) for frames in rows.values()}
    if len(counts) != 1 or (captions and len(captions) not in counts):
        raise ValueError(f"rows of {sorted(counts)} frames and {len(captions)} captions: there must be one number")
    shown = captions or [""] * counts.pop()
    # Titles differ in length; in a picture of the longest the frames have one size.
    pictures = [captioned({label: f[i] for label, f in rows.items()}, title=text) for i, text in enumerate(shown)]
    size = max(p.width for p in pictures), max(p.height for p in pictures)
    return [_on_canvas(picture, size) for picture in pictures]


def _on_canvas(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, "white")
    canvas.paste(picture, (0, 0))
    return canvas


def trajectory(states: np.ndarray, estimates: np.ndarray, captions: Sequence[str] = ()) -> list[Image.Image]:
    """Frames from x_T to x_0, in each the states x_t with the estimates of x_0 that the network makes of them beneath.

    Args:
        states, estimates: uint8 [F, N, H, W, C], x_T first and x_0 last.
        captions: a title for each frame, such as "t = 731".
    """
    return film({"x_t": states, "estimate\nof x_0": estimates}, captions)


_FRAME_MS, _HOLD_MS = 60, 2000
_FORMATS = (".gif", ".mp4")


def save_animation(
    frames: Sequence[Image.Image], path: Path, *, frame_ms: int = _FRAME_MS, hold_ms: int = _HOLD_MS
) -> None:
    """Replace an animation file: .gif, or .mp4 where the program ffmpeg is installed.

    A GIF has one palette, chosen once for all frames, and no dithering: nothing flickers that does not move.

    Args:
        frames: RGB pictures of one size, at least one.
        path: its suffix chooses the format.
        frame_ms: time of a frame; GIF counts in steps of 10 ms, and viewers slow down below 20.
        hold_ms: time of the last frame.

    Raises:
        ConfigError: another suffix; .mp4 and no ffmpeg, or one that fails.
    """
    check_animation(path)
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    replace_file(path, lambda temporary: write(frames, temporary, frame_ms, hold_ms))


def check_animation(path: Path) -> None:
    """Raise a ConfigError unless an animation can be written as the suffix says, before any work is done for it."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ConfigError(f"{path} does not end in {' or '.join(_FORMATS)}, which animations are written as")
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ConfigError(f"{path}: for .mp4 the program ffmpeg is needed and is not on the PATH: take .gif")


def write_film(
    stem: Path, states: np.ndarray, estimates: np.ndarray, captions: Sequence[str] = (), *, suffix: str = ".gif"
) -> Path:
    """Write the trajectory of states and estimates (see there) as STEM.gif or STEM.mp4 and return that path.

    Raises:
        ConfigError: as save_animation.
    """
    path = stem.with_name(stem.name + suffix)
    save_animation(trajectory(states, estimates, captions), path)
    return path


_PALETTE_FRAMES = 16
_CHUNK_COLOURS = 1 << 16


def _write_gif(frames: Sequence[Image.Image], path: Path, frame_ms: int, hold_ms: int) -> None:
    palette = _palette(frames)
    first, *rest = [_with_palette(frame, palette) for frame in frames]
    durations = [frame_ms] * len(rest) + [hold_ms]
    # Named, the palette is written once and not with every frame; optimised, PIL would sort it anew for each.
    options = {"palette": palette.tobytes(), "optimize": False, "duration": durations, "loop": 0}
    first.save(path, "GIF", save_all=True, append_images=rest, **options)


def _palette(frames: Sequence[Image.Image]) -> np.ndarray:
    """uint8 [256, 3] for all frames: every gray where there are no colours, else what some of the frames need."""
    chosen = [frames[i] for i in film_steps(len(frames) - 1, _PALETTE_FRAMES)]
    pixels = np.concatenate([np.asarray(frame.convert("RGB")) for frame in chosen])
    if (pixels == pixels[..., :1]).all():
        return np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    own = np.array([(255, 255, 255), _INK], np.uint8)  # paper and text stay exactly what they are
    reduced = Image.fromarray(pixels).quantize(256 - len(own), Image.Quantize.MEDIANCUT, kmeans=1)
    colours = np.array(reduced.getpalette(), np.uint8).reshape(-1, 3)[: 256 - len(own)]
    return np.concatenate([colours, own, np.zeros((256 - len(own) - len(colours), 3), np.uint8)])


def _with_palette(frame: Image.Image, palette: np.ndarray) -> Image.Image:
    """The frame with each pixel's nearest colour of a palette; PIL's own search is up to 4 levels off, white too."""
    pixels = np.asarray(frame.convert("RGB")).astype(np.int32)
    codes, places = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], np.int32), return_inverse=True)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).astype(np.float32)
    known = palette.astype(np.float32)
    lengths = (known**2).sum(1)
    parts = [colours[first : first + _CHUNK_COLOURS] for first in range(0, len(colours), _CHUNK_COLOURS)]
    nearest = np.concatenate([(lengths - 2 * part @ known.T).argmin(1) for part in parts])
    picture = Image.fromarray(nearest.astype(np.uint8)[places].reshape(pixels.shape[:2]))
    picture.putpalette(palette.tobytes())
    return picture


def _write_mp4(frames: Sequence[Image.Image], path: Path, frame_ms: int, hold_ms: int) -> None:
    width, height = (side + side % 2 for side in frames[0].size)  # the codec takes even sides only
    shown = [np.asarray(_on_canvas(frame.convert("RGB"), (width, height))).tobytes() for frame in frames]
    shown += shown[-1:] * (hold_ms // frame_ms)
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{1000 / frame_ms:.6g}", "-i", "-"]
    command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    done = subprocess.run(command, input=b"".join(shown), capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"ffmpeg cannot write the .mp4: {said[-1] if said else 'it says nothing'}; take .gif")


def film_steps(num_steps: int, num_frames: int = 12) -> list[int]:
    """Which of the states 0 (x_T) .. num_steps (x_0) a filmstrip shows, both ends among them, evenly spaced."""
    return sorted({round(f) for f in np.linspace(0, num_steps, min(num_frames, num_steps + 1))})


def save_picture(picture: Image.Image, path: Path) -> None:
    """Replace a picture file as a whole."""
    replace_file(path, picture.save)


def save_samples(images: np.ndarray, path: Path) -> None:
    """Write uint8 [N, H, W, C] as arr_0 of an .npz, the layout this field's evaluators read."""
    replace_file(path, lambda temporary: np.savez(temporary, arr_0=images))


def curve_plot(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    log_x: bool = False,
    dots: Collection[str] = (),
    size: tuple[int, int] = (900, 540),
) -> Image.Image:
    """Curves in one pair of axes, with ticks, labels and, of several, a legend above them.

    Args:
        curves: name -> (x, y), numbers [n] each. A curve is interrupted where a value is not finite or, on a
            logarithmic axis, not above 0.
        log_y, log_x: logarithmic axes.
        dots: names of curves that are drawn as points and not joined, such as measurements.
        size: (width, height) of the picture in pixels.

    Raises:
        ValueError: x and y of a curve differ in length, or no curve has a point to show.
    """
    points = {name: _points(name, *curve, log_x, log_y) for name, curve in curves.items()}
    shown = np.concatenate([np.empty((0, 2)), *points.values()])
    shown = shown[np.isfinite(shown).all(axis=1)]
    if not len(shown):
        raise ValueError(f"the plot {title!r} has no point to show")
    (x_low, x_high), x_ticks = _axis(shown[:, 0], log_x, 0.0)
    (y_low, y_high), y_ticks = _axis(shown[:, 1], log_y, 0.04)
    width, height = size
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    left = 30 + 14 + max(math.ceil(small.getlength(text)) for _, text in y_ticks)
    lines = _legend_lines(list(curves), small, width - left - 20) if len(curves) > 1 else []
    top, right, bottom = 44 + 22 * len(lines), width - 24, height - 58

    def place(values: np.ndarray) -> np.ndarray:
        across = left + (values[:, 0] - x_low) / (x_high - x_low) * (right - left)
        down = bottom - (values[:, 1] - y_low) / (y_high - y_low) * (bottom - top)
        return np.stack([across, down], axis=1)

    picture = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), "white")
    draw = ImageDraw.Draw(picture)
    across = [(place(np.array([[value, y_low]]))[0, 0], text) for value, text in x_ticks]
    down = [(place(np.array([[x_low, value]]))[0, 1], text) for value, text in y_ticks]
    for x, _ in across:
        draw.line([(x * _SMOOTH, top * _SMOOTH), (x * _SMOOTH, bottom * _SMOOTH)], _RULE, _SMOOTH)
    for y, _ in down:
        draw.line([(left * _SMOOTH, y * _SMOOTH), (right * _SMOOTH, y * _SMOOTH)], _RULE, _SMOOTH)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(curves)}
    # Points lie on top: what is measured is not to be hidden by the curve it is compared with.
    for name in sorted(points, key=lambda name: name in dots):
        placed = place(points[name]) * _SMOOTH
        for run in _unbroken(placed):
            _draw_run(draw, run, colours[name], name in dots)
    picture = picture.resize(size, Image.Resampling.BOX)

    draw = ImageDraw.Draw(picture)
    draw.rectangle([left, top, right, bottom], outline=_FRAME)
    draw.text((width / 2, 14), title, _INK, large, anchor="mt")
    for x, text in across:
        draw.text((x, bottom + 8), text, _INK, small, anchor="mt")
    for y, text in down:
        draw.text((left - 8, y), text, _INK, small, anchor="rm")
    draw.text(((left + right) / 2, height - 12), x_label, _INK, small, anchor="mb")
    upright = Image.new("RGB", (math.ceil(small.getlength(y_label)) + 4, 20), "white")
    ImageDraw.Draw(upright).text((2, 10), y_label, _INK, small, anchor="lm")
    upright = upright.rotate(90, expand=True)
    picture.paste(upright, (6, round((top + bottom - upright.height) / 2)))
    for number, line in enumerate(lines):
        x, y = float(left), 48 + 22 * number
        for name in line:
            key = [(x, y), (x + 22, y)]
            if name in dots:
                draw.ellipse([x + 8, y - 3, x + 14, y + 3], colours[name])
            else:
                draw.line(key, colours[name], 2)
            draw.text((x + 28, y), name, _INK, small, anchor="lm")
            x += _KEY + small.getlength(name)
    return picture


_KEY = 52  # of a legend's entry, beside its name
_TICKS = 6


def _points(name: str, x: ArrayLike, y: ArrayLike, log_x: bool, log_y: bool) -> np.ndarray:
    """float64 [n, 2], as logarithms to base 10 on logarithmic axes; NaN where there is nothing to show."""
    columns = [np.asarray(values, dtype=np.float64).ravel() for values in (x, y)]
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"curve {name!r} has {len(columns[0])} values of x and {len(columns[1])} of y")
    for i, log in enumerate((log_x, log_y)):
        if log:
            columns[i] = np.log10(np.where(columns[i] > 0, columns[i], np.nan))
    points = np.stack(columns, axis=1)
    return np.where(np.isfinite(points).all(axis=1, keepdims=True), points, np.nan)


def _unbroken(points: np.ndarray) -> list[np.ndarray]:
    """The runs of points [n, 2] between those that are NaN."""
    known = np.isfinite(points[:, 0])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], known.astype(np.int8), [0]])))
    return [points[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _draw_run(draw: ImageDraw.ImageDraw, run: np.ndarray, colour: tuple[int, int, int], dotted: bool) -> None:
    radius = 3 * _SMOOTH if dotted else _SMOOTH
    if dotted or len(run) == 1:  # a line of one point would not be seen
        for x, y in run.tolist():
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    else:
        draw.line([(x, y) for x, y in run.tolist()], colour, 2 * _SMOOTH, joint="curve")


def _axis(values: np.ndarray, log: bool, margin: float) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    """Limits of an axis around finite values (logarithms if log), and its ticks: place and text."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):  # one value, or what rounding has made of it
        spread = 0.5 if log or low == 0 else abs(low) / 10
        low, high = low - spread, high + spread
    else:
        low, high = low - margin * (high - low), high + margin * (high - low)
    if not log:
        step = _nice((high - low) / _TICKS)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return (low, high), [(i * step, _number(i * step)) for i in range(first, last + 1)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    if high - low > 2:
        stride = math.ceil((high - low) / (2 * _TICKS))
        marks = [(float(d), _power(d)) for d in decades if d % stride == 0]
    else:
        marks = [(d + math.log10(m), _number(m * 10.0**d)) for d in decades for m in (1, 2, 5)]
    ticks = [(place, text) for place, text in marks if low - 1e-9 <= place <= high + 1e-9]
    if len(ticks) < 2:  # within a factor of two or so
        ticks = [(place, _number(10**place)) for place in np.linspace(low, high, 4)[1:-1].tolist()]
    return (low, high), ticks


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _legend_lines(
    names: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> list[list[str]]:
    """The names of a legend, as many in a line as fit in the width."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for name in names:
        entry = _KEY + font.getlength(name)
        if lines[-1] and used + entry > width:
            lines.append([])
            used = 0.0
        lines[-1].append(name)
        used += entry
    return lines
