"""Augmentation: what the network is told is what was done, exactly nothing for nothing, the same image in any batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import augment
from fastddpm.augment import AUGMENT_PARAMETERS, apply_augmentation, draw_augmentation
from fastddpm_kernels import draw_timesteps

MANY = torch.arange(20_000)


def images(num: int, channels: int = 3, size: tuple[int, int] = (8, 8), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, *size), dtype=torch.uint8, generator=generator)


def plain(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def matrix(linear: list[list[float]], shift: tuple[float, float] = (0.0, 0.0), num: int = 1) -> Tensor:
    """[num, 2, 3] of one linear part and one shift."""
    return torch.tensor([[*row, s] for row, s in zip(linear, shift, strict=True)])[None].repeat(num, 1, 1)


IDENTITY = [[1.0, 0.0], [0.0, 1.0]]


def matrix_of(parameters: Tensor, size: tuple[int, int]) -> Tensor:
    """The way back from the result, float64 [N, 2, 3], from what the network is told, by matrix products."""
    q = parameters.double()
    zero, one = torch.zeros(len(q), dtype=torch.float64), torch.ones(len(q), dtype=torch.float64)

    def pack(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack((a, b, c, d), 1).view(-1, 2, 2)

    flips = pack(1 - 2 * q[:, 0], zero, zero, 1 - 2 * q[:, 1])
    scaling = torch.linalg.inv(2 ** (q[:, 2] / 5)[:, None, None] * torch.eye(2, dtype=torch.float64))
    # Counter-clockwise with y downwards: the content at angle a came from angle 0.
    turned = pack(q[:, 3] + 1, -q[:, 4], q[:, 4], q[:, 3] + 1)
    stretched = torch.linalg.inv(torch.linalg.matrix_exp(math.log(2) / 5 * pack(q[:, 5], q[:, 6], q[:, 6], -q[:, 5])))
    linear = flips @ scaling @ turned @ stretched
    moved = torch.stack((q[:, 7] * size[1] / 8 * one, q[:, 8] * size[0] / 8), 1)[..., None]
    return torch.cat((linear, -linear @ moved), 2)


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_the_network_is_told_exactly_what_was_done(p: float) -> None:
    matrices, parameters = draw_augmentation(MANY[:2000], seed=5, p=p, size=(8, 12))
    assert matrices.shape == (2000, 2, 3) and parameters.shape == (2000, AUGMENT_PARAMETERS)
    torch.testing.assert_close(matrices.double(), matrix_of(parameters, (8, 12)), rtol=1e-5, atol=2e-6)


def test_a_wrong_size_of_the_scaling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "SCALE", 0.25)
    matrices, parameters = draw_augmentation(MANY[:50], seed=5, p=1.0, size=(8, 12))
    assert (matrices - matrix_of(parameters, (8, 12))).abs().max() > 0.05


def test_an_image_to_which_nothing_is_done_has_zeros_and_is_what_it_was_bitwise() -> None:
    """(1 - p)^7 of all, without a negative zero; others come out as they were by two flips and a turn only."""
    matrices, parameters = draw_augmentation(MANY, seed=1, p=0.12, size=(8, 8))
    nothing = (parameters == 0).all(1)
    assert float(nothing.float().mean()) == pytest.approx(0.88**7, abs=0.015)
    undone = (parameters == torch.tensor([1.0, 1, 0, -2, 0, 0, 0, 0, 0])).all(1)
    assert torch.equal(nothing | undone, (matrices == matrix(IDENTITY)).flatten(1).all(1))
    assert not torch.signbit(parameters[nothing]).any() and not torch.signbit(matrices[nothing]).any()
    x = images(64)
    result = apply_augmentation(x, matrices[:64])
    kept = nothing[:64]
    assert torch.equal(result[kept], plain(x[kept])) and kept.sum() > 10
    assert not any(torch.equal(a, plain(b)) for a, b in zip(result[~kept], x[~kept], strict=True))


def test_flips_that_are_not_told_come_first_and_are_those_of_training() -> None:
    """By the coin of the training process: the augmentation of the mirrored image, to rounding."""
    x, ordinals = images(60, 2, (8, 6)), MANY[:60]
    coin = draw_timesteps(ordinals, 1000, seed=7)[1]
    mirrored = torch.where(coin[:, None, None, None], x.flip(3), x)
    for p in (0.0, 0.6):
        matrices, parameters = draw_augmentation(ordinals, seed=7, p=p, size=(8, 6))
        flipped, same = draw_augmentation(ordinals, seed=7, p=p, size=(8, 6), flip=True)
        assert torch.equal(parameters, same)
        got, expected = apply_augmentation(x, flipped), apply_augmentation(mirrored, matrices)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.0 if p == 0 else 2e-5)
    assert 10 < coin.sum() < 50


def test_without_a_probability_nothing_is_done() -> None:
    matrices, parameters = draw_augmentation(MANY, seed=2, p=0.0, size=(8, 8))
    assert not parameters.any() and (matrices == matrix(IDENTITY)).all()
    assert draw_augmentation(MANY[:0], seed=2, p=0.5, size=(8, 8))[0].shape == (0, 2, 3)


def test_all_parameters_have_their_distributions() -> None:
    """Each with probability p, and independently; of those that happen, normal, uniform over the circle, or 1."""
    p = 0.4
    _, q = draw_augmentation(MANY, seed=3, p=p, size=(8, 8))
    x_flip, y_flip, scaling, cos, sin, squeeze_x, squeeze_y, right, down = q.double().unbind(1)
    num = len(MANY)
    near = 4 * math.sqrt(p * (1 - p) / num)
    for flag in (x_flip, y_flip):
        assert set(flag.tolist()) == {0.0, 1.0} and flag.mean() == pytest.approx(p, abs=near)
    squeeze = torch.hypot(squeeze_x, squeeze_y)
    for z in (scaling, right, down):
        assert (z != 0).double().mean() == pytest.approx(p, abs=near)
        assert stats.kstest(z[z != 0].numpy(), stats.norm.cdf).pvalue > 1e-3
    assert (squeeze != 0).double().mean() == pytest.approx(p, abs=near)
    happened = squeeze != 0
    assert stats.kstest(squeeze[happened].numpy(), stats.halfnorm.cdf).pvalue > 1e-3
    doubled = torch.atan2(squeeze_y, squeeze_x)[happened]
    assert stats.kstest(doubled.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    # Turned only: whole numbers, a third of each. Rotated: all over the circle.
    quarters = {(0.0, 0.0): 0, (-1.0, 1.0): 1, (-2.0, 0.0): 2, (-1.0, -1.0): 3}
    found = [quarters.get(pair) for pair in zip(cos.tolist(), sin.tolist(), strict=True)]
    counts = [found.count(k) for k in (0, 1, 2, 3, None)]
    expected = [(1 - p) ** 2, *(p * (1 - p) / 3,) * 3, p]
    assert stats.chisquare(counts, np.array(expected) * num).pvalue > 1e-3
    rotated = torch.tensor([k is None for k in found])
    angle = torch.atan2(sin, cos + 1)[rotated]
    assert stats.kstest(angle.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    gates = torch.stack((x_flip, y_flip, scaling, rotated.double(), squeeze, right)).ne(0).double()
    assert (torch.corrcoef(gates) - torch.eye(6)).abs().max() < 4 / math.sqrt(num)
    assert abs(float(torch.corrcoef(torch.stack((right, down)))[0, 1])) < 4 / math.sqrt(num)


def test_what_is_done_to_an_image_depends_on_seed_and_ordinal_alone() -> None:
    """The same bits in any batch, at any place in it; another seed or ordinal gives others."""
    ordinals = torch.tensor([7, 2**40 + 3, 0, 12345, *range(100, 190)])
    matrices, parameters = draw_augmentation(ordinals, seed=9, p=0.7, size=(6, 10))
    x = images(len(ordinals), 2, (6, 10))
    together = apply_augmentation(x, matrices)
    for i in (0, 1, 2, 3, 50, len(ordinals) - 1):
        alone = draw_augmentation(ordinals[i : i + 1], seed=9, p=0.7, size=(6, 10))
        assert torch.equal(alone[0], matrices[i : i + 1]) and torch.equal(alone[1], parameters[i : i + 1])
        assert torch.equal(apply_augmentation(x[i : i + 1], alone[0]), together[i : i + 1])
    backwards = draw_augmentation(ordinals.flip(0), seed=9, p=0.7, size=(6, 10))[0]
    assert torch.equal(apply_augmentation(x.flip(0), backwards).flip(0), together)
    assert not torch.equal(draw_augmentation(ordinals, seed=10, p=0.7, size=(6, 10))[0], matrices)
    assert len(parameters.unique(dim=0)) > 80


def test_golden_values() -> None:
    """The layout of the draws is frozen: another place of a draw changes every run."""
    _, q = draw_augmentation(torch.tensor([1]), seed=4, p=1.0, size=(8, 8))
    golden = [1.0, 1.0, -0.9155828, -0.2659072, 0.6790492, -0.05195189, 0.2049455, 0.0102107, -0.1090113]
    torch.testing.assert_close(q[0], torch.tensor(golden), rtol=1e-6, atol=1e-6)
    _, q = draw_augmentation(torch.tensor([14, 19, 21, 24]), seed=4, p=0.3, size=(8, 8))
    done = [[0, 1, 0, -1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, -1, -1, 1.013483, 1.759783], [1, 0, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(q, torch.tensor([[*row, 0.0, 0.0] for row in done]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 10), (1, 1), (1, 5)])
def test_flips_are_exact(size: tuple[int, int]) -> None:
    x = images(4, 3, size)
    assert torch.equal(apply_augmentation(x, matrix([[-1, 0], [0, 1]], num=4)), plain(x).flip(3))
    assert torch.equal(apply_augmentation(x, matrix([[1, 0], [0, -1]], num=4)), plain(x).flip(2))


@pytest.mark.parametrize("side", [8, 7])
def test_turns_are_exact_and_counter_clockwise(side: int) -> None:
    """As drawn: images that were turned only, and mirrored too."""
    _, parameters = draw_augmentation(MANY, seed=1, p=0.2, size=(side, side))
    matrices, _ = draw_augmentation(MANY, seed=1, p=0.2, size=(side, side))
    seen = set()
    for i, q in enumerate(parameters.tolist()):
        turn = {(0.0, 0.0): 0, (-1.0, 1.0): 1, (-2.0, 0.0): 2, (-1.0, -1.0): 3}.get((q[3], q[4]))
        case = (q[0], q[1], turn)
        if any(q[k] for k in (2, 5, 6, 7, 8)) or turn is None or case in seen:
            continue
        seen.add(case)
        x = images(1, 2, (side, side), seed=i)
        expected = plain(x)
        if q[0]:
            expected = expected.flip(3)
        if q[1]:
            expected = expected.flip(2)
        expected = torch.rot90(expected, turn, (2, 3))
        assert torch.equal(apply_augmentation(x, matrices[i : i + 1]), expected)
    assert len(seen) == 16


def test_shifts_by_whole_pixels_are_exact_and_mirror_at_the_edge() -> None:
    x = images(2, 1, (5, 6))
    result = apply_augmentation(x, matrix(IDENTITY, (-2.0, 1.0), num=2))
    truth = np.pad(plain(x).numpy(), ((0, 0), (0, 0), (0, 1), (2, 0)), mode="reflect")[:, :, 1:, :6]
    assert np.array_equal(result.numpy(), truth)
    # Many widths away too: the mirror images go on without end.
    far = apply_augmentation(x, matrix(IDENTITY, (10.0 * 5, 8.0 * 4), num=2))
    assert torch.equal(far, plain(x))


@settings(max_examples=25, deadline=None)
@given(
    angle=st.floats(-math.pi, math.pi),
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    shape=st.lists(st.floats(-0.4, 0.4), min_size=6, max_size=6),
)
def test_quadratics_are_met_exactly(angle: float, x: float, y: float, shape: list[float]) -> None:
    """Keys' convolution reproduces polynomials of degree 2: where nothing beyond the edge is seen, to rounding."""
    size, inner = 21, 5
    at = torch.arange(size, dtype=torch.float64) - 10
    xs, ys = at[None, :].expand(size, -1) / 10, at[:, None].expand(-1, size) / 10

    def value(u: Tensor, v: Tensor) -> Tensor:
        a, b, c, d, e, f = shape
        return (a + b * u + c * v + d * u * u + e * u * v + f * v * v) / 3

    c, s = math.cos(angle), math.sin(angle)
    given_images = value(xs, ys).float()[None, None]
    got = apply_augmentation(given_images, matrix([[c, -s], [s, c]], (x, y)))[0, 0].double()
    truth = value(c * xs - s * ys + x / 10, s * xs + c * ys + y / 10)
    part = slice(10 - inner, 10 + inner + 1)
    torch.testing.assert_close(got[part, part], truth[part, part], rtol=0, atol=2e-6)


def test_another_cubic_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """a = -3/4, which torch's grid_sample takes, does not even meet a ramp."""

    def keys(f: Tensor, a: float = -0.75) -> list[Tensor]:
        def outer(d: Tensor) -> Tensor:
            return a * (d**3 - 5 * d**2 + 8 * d - 4)

        def inner(d: Tensor) -> Tensor:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1

        return [outer(1 + f), inner(f), inner(1 - f), outer(2 - f)]

    monkeypatch.setattr(augment, "_cubic", keys)
    ramp = (torch.arange(21) / 20 - 0.5).expand(1, 1, 21, 21).contiguous()
    got = apply_augmentation(ramp, matrix(IDENTITY, (0.25, 0.0)))[0, 0]
    assert (got - ramp[0, 0] - 0.25 / 20)[5:16, 5:16].abs().max() > 1e-3


def test_smooth_pictures_are_those_of_an_independent_resampler() -> None:
    """scipy's cubic spline at the same places; both are close to the picture itself where it is smooth."""
    generator = np.random.default_rng(0)
    rough = generator.standard_normal((24, 24))
    smooth = ndimage.gaussian_filter(rough, 2.0, mode="mirror")
    smooth = smooth / np.abs(smooth).max() * 0.9
    matrices, _ = draw_augmentation(torch.arange(30), seed=8, p=1.0, size=(24, 24))
    grown = torch.linalg.matrix_norm(matrices[:, :, :2], ord=2) <= 1  # larger in all directions: nothing is smoothed
    x = torch.from_numpy(smooth).float()[None, None].expand(30, 1, 24, 24)
    got = apply_augmentation(x, matrices)[:, 0].numpy()
    at = np.arange(24) - 11.5
    ys, xs = np.meshgrid(at, at, indexing="ij")
    for i, m in enumerate(matrices.double().numpy()):
        places = [m[1, 0] * xs + m[1, 1] * ys + m[1, 2] + 11.5, m[0, 0] * xs + m[0, 1] * ys + m[0, 2] + 11.5]
        theirs = ndimage.map_coordinates(smooth, places, order=3, mode="mirror")
        assert np.abs(got[i] - theirs).max() < (0.02 if grown[i] else 0.1)
    assert grown.sum() > 2


def test_an_image_made_smaller_does_not_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved, the finest stripes are grey; without smoothing they are black or white all over."""
    stripes = (torch.arange(32) % 2 * 2.0 - 1).expand(1, 1, 32, 32).contiguous()
    for pattern, linear in ((stripes, [[2, 0], [0, 1]]), (stripes.mT, [[1, 0], [0, 2]])):
        for shift in ((0.0, 0.0), (0.5, 0.5)):
            got = apply_augmentation(pattern.contiguous(), matrix(linear, shift))[0, 0, 8:24, 8:24]
            assert got.abs().max() < 1e-6
    # Along the stripes nothing shrinks, and they stay as they are.
    along = apply_augmentation(stripes, matrix([[1, 0], [0, 2]]))[0, 0, :, 8:24]
    assert torch.equal(along, stripes[0, 0, :, 8:24])
    monkeypatch.setattr(augment, "_smoothed", lambda x, _: x)
    assert apply_augmentation(stripes, matrix([[2, 0], [0, 1]], (0.5, 0.0))).abs().min() == 1


def test_smoothing_adds_the_variance_of_the_footprint() -> None:
    """Second moments of a smoothed point against (M M^T - I)+ / 6, at most 1/2 in all, by an eigendecomposition."""
    matrices, _ = draw_augmentation(torch.arange(200), seed=6, p=1.0, size=(9, 9))
    m = matrices[:, :, :2].double()
    values, vectors = torch.linalg.eigh(m @ m.mT - torch.eye(2, dtype=torch.float64))
    truth = vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT / 6
    truth *= (0.5 / truth.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0.5))[:, None, None]
    point = torch.zeros(200, 1, 9, 9)
    point[:, :, 4, 4] = 1
    spread = augment._smoothed(point, matrices)[:, 0].double()
    at = torch.arange(9, dtype=torch.float64) - 4
    torch.testing.assert_close(spread.sum((1, 2)), torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-6)
    moments = [(spread * a * b).sum((1, 2)) for a, b in ((at, at), (at, at[:, None]), (at[:, None], at[:, None]))]
    for got, expected in zip(moments, (truth[:, 0, 0], truth[:, 0, 1], truth[:, 1, 1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert values.max() > 1 and (values < 0).any()


def test_results_stay_in_range_and_keep_the_memory_order() -> None:
    matrices, _ = draw_augmentation(torch.arange(16), seed=6, p=1.0, size=(8, 8))
    x = images(16)
    ordered = x.contiguous(memory_format=torch.channels_last)
    a, b = apply_augmentation(x, matrices), apply_augmentation(ordered, matrices)
    assert a.dtype == torch.float32 and a.abs().max() <= 1
    assert torch.equal(a, b) and a.is_contiguous() and b.stride() == ordered.stride()
    assert torch.equal(apply_augmentation(plain(x), matrices), a)
    before = plain(x)
    apply_augmentation(before, matrices)
    assert torch.equal(before, plain(x))


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values refuse to be read: what this runs through never asks for one."""
    with FakeTensorMode():
        matrices, parameters = draw_augmentation(torch.arange(5), seed=1, p=0.3, size=(8, 8), flip=True)
        result = apply_augmentation(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), matrices)
    assert parameters.shape == (5, 9) and result.shape == (5, 3, 8, 8)
