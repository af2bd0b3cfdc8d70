"""Grids and filmstrips: every pixel where it belongs."""

import numpy as np
from PIL import Image

from fastddpm.pictures import film_steps, filmstrip, grid, save_picture, save_samples


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
