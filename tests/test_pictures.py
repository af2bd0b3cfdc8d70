"""Grids, filmstrips, animations and plots: every pixel where it belongs."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from fastddpm.errors import ConfigError
from fastddpm.pictures import (
    captioned,
    curve_plot,
    film,
    film_steps,
    filmstrip,
    grid,
    save_animation,
    save_picture,
    save_samples,
    stacked,
    trajectory,
    write_film,
)


def test_grid_places_images_row_by_row_and_enlarges_without_smoothing():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40 + np.zeros((5, 4, 6, 1), np.uint8)
    picture = np.asarray(grid(images, columns=3, gap=1, min_side=50))
    scale = picture.shape[0] // 11
    assert picture.shape == (11 * scale, 22 * scale, 3) and scale >= 2
    small = picture[::scale, ::scale]
    for n in range(5):
        row, column = divmod(n, 3)
        tile = small[1 + row * 5 : 5 + row * 5, 1 + column * 7 : 7 + column * 7]
        assert (tile == n * 40).all()
    assert (small[0] == 255).all() and (small[6:, 15:] == 255).all()
    assert set(np.unique(picture)) == {0, 40, 80, 120, 160, 255}


def test_colour_is_kept_and_other_channel_counts_show_their_first():
    image = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(grid(image, gap=0, min_side=1)), image[0])
    two = image[..., :2]
    assert np.array_equal(np.asarray(grid(two, gap=0, min_side=1))[..., 2], image[0, ..., 0])


def test_filmstrip_has_a_row_per_image_and_time_from_left_to_right():
    frames = np.zeros((4, 2, 1, 1, 1), np.uint8)
    frames[:, 0], frames[:, 1] = np.arange(4).reshape(4, 1, 1, 1), 10 + np.arange(4).reshape(4, 1, 1, 1)
    picture = np.asarray(filmstrip(frames))
    scale = picture.shape[1] // 9
    assert picture[scale :: 2 * scale, scale :: 2 * scale, 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_film_steps_hold_both_ends():
    assert film_steps(1000)[0] == 0 and film_steps(1000)[-1] == 1000 and len(film_steps(1000)) == 12
    assert film_steps(3) == [0, 1, 2, 3]


def test_files(tmp_path):
    images = np.zeros((2, 3, 4, 1), np.uint8)
    save_samples(images, tmp_path / "samples.npz")
    save_picture(grid(images), tmp_path / "grid.png")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 3, 4, 1)
    assert Image.open(tmp_path / "grid.png").mode == "RGB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "samples.npz"]


def test_rgba_is_shown_over_white():
    image = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [0, 0, 0, 127]]], np.uint8)
    picture = np.asarray(grid(image[None], gap=0, min_side=1))
    exact = 255 - image[0, :, 3:] / 255 * (255.0 - image[0, :, :3])
    assert np.array_equal(picture[0], np.round(exact)) and picture[0, :2].tolist() == [[10, 20, 30], [255] * 3]
    five = np.random.default_rng(1).integers(0, 256, (1, 2, 2, 5), dtype=np.uint8)
    assert np.array_equal(np.asarray(grid(five, gap=0, min_side=1)), five[0, ..., :1].repeat(3, -1))


def tiles(picture, levels):
    """Where each of the colours (gray levels) lies: level -> (left, top, right, bottom) of its pixels."""
    pixels = np.asarray(picture)
    found = {}
    for level in levels:
        y, x = np.nonzero((pixels == level).all(-1))
        found[level] = x.min(), y.min(), x.max() + 1, y.max() + 1
    return found


@pytest.mark.parametrize("label", ["one line", "a label\nof\nseveral\nlines"])
def test_captioned_rows_hold_their_images_whole(label):
    levels = np.array([[3, 6, 9], [13, 16, 19]], np.uint8)
    images = levels[:, :, None, None, None] + np.zeros((2, 3, 4, 6, 1), np.uint8)
    picture = captioned({label: images[0], "other": images[1][:2]}, title="A title", columns=["a", "b", "c"])
    where = tiles(picture, [3, 6, 9, 13, 16])
    sizes = {(right - left, bottom - top) for left, top, right, bottom in where.values()}
    ((width, height),) = sizes
    assert width % 6 == 0 and width // 6 == height // 4 >= 2
    assert [where[level][0] for level in (3, 6, 9)] == sorted(where[level][0] for level in (3, 6, 9))
    assert where[3][0] == where[13][0] and where[6][0] == where[16][0] and where[13][1] >= where[3][3]
    pixels = np.asarray(picture)
    assert not (pixels == 19).all(-1).any()  # the second row has one image less
    ink = (pixels < 200).all(-1)
    for level, rows in ((3, slice(where[3][1], where[3][3])), (13, slice(where[13][1], where[13][3]))):
        assert ink[rows, : where[level][0] - 2].any()  # its label
    for level in (3, 6, 9):  # its caption
        assert ink[22 : where[level][1], where[level][0] : where[level][2]].any()
    assert ink[:24].any()


def test_captions_that_do_not_fit_are_left_out():
    images = np.zeros((40, 2, 2, 1), np.uint8)
    names = [f"a long caption {n}" for n in range(40)]
    few = np.asarray(captioned({"row": images}, columns=names, min_side=40)) < 128
    alone = np.asarray(captioned({"row": images}, columns=[names[0]], min_side=40)) < 128
    # Captions do not overlap: between those that are shown there are empty columns as wide as a space at least.
    written = few[:26].any((0, 2))
    assert written.sum() > alone[:26].any((0, 2)).sum() and not written.all()


def test_films_are_of_one_size_and_trajectories_have_the_estimates_beneath():
    states = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1, 1) * 10 + np.full((4, 2, 3, 3, 1), 5, np.uint8)
    frames = trajectory(states, states + 100, ["t = 9", "t = 5", "a caption that is wider than all the images" * 2, ""])
    assert len(frames) == 4 and len({frame.size for frame in frames}) == 1
    for i, frame in enumerate(frames):
        where = tiles(frame, [10 * i + 5, 10 * i + 105])
        assert where[10 * i + 5][3] <= where[10 * i + 105][1]
    with pytest.raises(ValueError, match="there must be one number"):
        film({"a": states, "b": states[:3]})
    with pytest.raises(ValueError, match="there must be one number"):
        film({"a": states}, ["one"])


def blocks(data):
    """(global palette, number of local palettes, number of frames) of a GIF, by its own structure."""
    assert data[:6] == b"GIF89a" and data[10] & 0x80
    at = 13 + 3 * (2 << (data[10] & 7))
    palette, local, frames = data[13:at], 0, 0
    while data[at] != 0x3B:
        if data[at] == 0x21:
            at += 2
        else:
            assert data[at] == 0x2C
            flags, frames = data[at + 9], frames + 1
            at += 10
            if flags & 0x80:
                local, at = local + 1, at + 3 * (2 << (flags & 7))
            at += 1
        while data[at]:
            at += data[at] + 1
        at += 1
    return palette, local, frames


def read_gif(path):
    with Image.open(path) as image:
        return [(frame.convert("RGB").copy(), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]


def test_gray_animations_are_exact_and_hold_their_last_frame(tmp_path):
    states = np.random.default_rng(2).integers(0, 256, (7, 3, 4, 4, 1), dtype=np.uint8)
    path = write_film(tmp_path / "denoising", states, states[::-1])
    assert path == tmp_path / "denoising.gif" and [p.name for p in tmp_path.iterdir()] == ["denoising.gif"]
    read = read_gif(path)
    for (shown, _), frame in zip(read, trajectory(states, states[::-1]), strict=True):
        assert np.array_equal(np.asarray(shown), np.asarray(frame))
    assert [duration for _, duration in read] == [60] * 6 + [2000]
    palette, local, frames = blocks(path.read_bytes())
    assert palette == np.arange(256, dtype=np.uint8).repeat(3).tobytes() and local == 0 and frames == 7


def test_colours_of_an_animation_have_one_palette_and_do_not_flicker(tmp_path):
    """A part that does not move has the same colours in all frames, whatever moves beside it."""
    rng = np.random.default_rng(3)
    still = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    frames = []
    for i in range(9):
        moving = np.full((24, 24, 3), (28 * i, 255 - 28 * i, 100), np.uint8)
        frames.append(Image.fromarray(np.concatenate([still, moving], axis=1)))
    save_animation(frames, tmp_path / "a.gif", frame_ms=40, hold_ms=500)
    read = read_gif(tmp_path / "a.gif")
    assert [duration for _, duration in read] == [40] * 8 + [500]
    parts = [np.asarray(frame)[:, :24] for frame, _ in read]
    assert all(np.array_equal(part, parts[0]) for part in parts)
    for frame, (shown, _) in zip(frames, read, strict=True):
        error = np.abs(np.asarray(frame).astype(int) - np.asarray(shown))
        assert error.mean() < 12 and error[:, 24:].mean() < 12
    assert blocks((tmp_path / "a.gif").read_bytes())[1:] == (0, 9)


def test_one_frame_and_frames_that_are_alike(tmp_path):
    frame = Image.new("RGB", (5, 3), "gray")
    save_animation([frame], tmp_path / "one.gif")
    assert len(read_gif(tmp_path / "one.gif")) == 1
    save_animation([frame] * 3, tmp_path / "three.gif", frame_ms=50, hold_ms=300)
    assert sum(duration for _, duration in read_gif(tmp_path / "three.gif")) == 400


FFMPEG = """#!/bin/sh
for last; do :; done
echo "$@" > {folder}/arguments
cat > "$last"
exit {code}
"""


def test_mp4_goes_through_ffmpeg_where_there_is_one(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (5, 3), (i, 2 * i, 3)) for i in range(3)]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=None)
    with pytest.raises(ConfigError, match=r"a\.mp4: for \.mp4 the program ffmpeg is needed .* take \.gif$"):
        save_animation(frames, tmp_path / "a.mp4")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(FFMPEG.format(folder=tmp_path, code=0))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    save_animation(frames, tmp_path / "a.mp4", frame_ms=100, hold_ms=500)
    pixels = np.frombuffer((tmp_path / "a.mp4").read_bytes(), np.uint8).reshape(-1, 4, 6, 3)  # even sides
    assert len(pixels) == 3 + 5 and (pixels[2:] == pixels[2]).all()
    assert (pixels[1, :3, :5] == (1, 2, 3)).all() and (pixels[1, 3] == 255).all()
    arguments = (tmp_path / "arguments").read_text()
    assert "-s 6x4 -r 10 " in arguments and arguments.strip().endswith(".a.mp4")
    program.write_text("#!/bin/sh\necho Unknown encoder >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"^ffmpeg cannot write the \.mp4: Unknown encoder; take \.gif$"):
        save_animation(frames, tmp_path / "b.mp4")
    assert not list(tmp_path.glob("*b.mp4"))
    with pytest.raises(ConfigError, match=r"film\.webm does not end in \.gif or \.mp4"):
        save_animation(frames, tmp_path / "film.webm")


def frame_of(picture):
    """(left, top, right, bottom) of the axes' frame."""
    pixels = np.asarray(picture).astype(int)
    gray = (np.abs(pixels - 120) < 3).all(-1)
    rows, columns = np.flatnonzero(gray.mean(1) > 0.4), np.flatnonzero(gray.mean(0) > 0.4)
    return columns.min(), rows.min(), columns.max(), rows.max()


BLUE = np.array([0, 114, 178])


def curve_of(picture):
    """For each column of pixels the middle of the first curve's colour, NaN where there is none."""
    pixels = np.asarray(picture).astype(int)
    close = (np.abs(pixels - BLUE) < 40).all(-1)
    return np.array([np.flatnonzero(column).mean() if column.any() else np.nan for column in close.T])


@pytest.mark.parametrize("log_y", [False, True])
def test_curves_pass_where_their_values_are(log_y):
    x = np.linspace(0, 50, 200)
    y = 10 ** (x / 10 - 2)
    picture = curve_plot({"only": (x, y)}, title="t", x_label="x", y_label="y", log_y=log_y, size=(600, 400))
    assert picture.size == (600, 400) and picture.mode == "RGB"
    left, top, right, bottom = frame_of(picture)
    values = np.log10(y) if log_y else y
    low, high = values.min(), values.max()
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    columns = np.arange(left + 4, right - 4)
    at = np.interp((columns - left) / (right - left) * 50, x, values)
    expected = bottom - (at - low) / (high - low) * (bottom - top)
    found = curve_of(picture)[columns]
    slope = np.abs(np.gradient(expected))
    assert (np.abs(found - expected) < 1.5 + slope).all()


def test_curves_break_where_they_have_no_value():
    x = np.arange(9.0)
    y = np.array([1, 2, 3, np.nan, 5, 6, 0, 8, 9])
    for log_y, gaps in ((False, [(2, 4)]), (True, [(2, 4), (5, 7)])):
        picture = curve_plot({"a": (x, y)}, title="", x_label="", y_label="", log_y=log_y)
        left, _, right, _ = frame_of(picture)
        found = curve_of(picture)
        for first, last in gaps:
            middle = left + (first + last) / 2 / 8 * (right - left)
            assert np.isnan(found[round(middle) - 20 : round(middle) + 20]).all()
        assert np.isfinite(found[round(left + 0.5 / 8 * (right - left))])


@pytest.mark.parametrize(
    ("y", "log_y"),
    [([0.0, 0.0], False), ([5.0, 5.0], False), ([5.0, 5.0], True), ([1.0, 1.1], True), ([1e-30, 1e30], True)],
)
def test_any_range_has_axes(y, log_y):
    curve_plot({"a": ([0, 1], y)}, title="t", x_label="x", y_label="y", log_y=log_y)
    curve_plot({"a": ([7], y[:1])}, title="t", x_label="x", y_label="y", log_y=log_y, log_x=True)


def test_legends_name_all_curves_and_wrap_without_covering_them():
    x = np.arange(5)
    one = curve_plot({"a": (x, x)}, title="t", x_label="x", y_label="y", size=(500, 400))
    many = curve_plot({f"curve number {i}": (x, x + i) for i in range(9)}, title="t", x_label="x", y_label="y", dots=())
    assert frame_of(many)[1] > frame_of(one)[1]
    narrow = {f"curve number {i}": (x, x + i) for i in range(9)}
    wrapped = curve_plot(narrow, title="t", x_label="x", y_label="y", size=(500, 400), dots=("curve number 2",))
    assert frame_of(wrapped)[1] >= frame_of(one)[1] + 3 * 22 - 2
    for colours in (many, wrapped):
        assert (np.abs(np.asarray(colours).astype(int) - BLUE) < 3).all(-1)[: frame_of(colours)[1]].any()


def test_plots_of_nothing_are_refused():
    for curves in ({}, {"a": ([], [])}, {"a": ([1, 2], [np.nan, np.inf])}):
        with pytest.raises(ValueError, match="the plot 'empty' has no point to show"):
            curve_plot(curves, title="empty", x_label="", y_label="")
    with pytest.raises(ValueError, match="curve 'a' has 2 values of x and 3 of y"):
        curve_plot({"a": ([1, 2], [1, 2, 3])}, title="", x_label="", y_label="")


def test_stacked_pictures_are_all_there():
    picture = stacked([Image.new("RGB", (4, 2), "red"), Image.new("RGB", (6, 3), "blue")])
    assert picture.size == (6, 5) and picture.getpixel((0, 1)) == (255, 0, 0)
    assert picture.getpixel((5, 1)) == (255, 255, 255) and picture.getpixel((5, 4)) == (0, 0, 255)
