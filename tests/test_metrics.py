"""Frechet, kernel and inception distances, precision and recall: closed forms, brute force, scipy, torchmetrics."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddpm import metrics
from fastddpm.errors import ConfigError, DataError, NumericsError
from fastddpm.metrics import (
    FeatureSums,
    check_metrics,
    draw_subset,
    frechet_distance,
    gaussian_distance,
    inception_score,
    kernel_distance,
    neighbour_radii,
    precision_recall,
    unbiased_mmd,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated, skewed, of a mean that is not 0, as a network's are."""
    return (normal(num, dim, seed=seed) @ normal(dim, dim, seed=seed + 1) / dim**0.5).relu() + 0.3 * seed


def rotation(dim: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed))[0]


def by_sqrtm(a: Tensor, b: Tensor) -> float:
    """The distance as the paper writes it, from whole sets."""
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    difference = (a.mean(0) - b.mean(0)).square().sum().item()
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    return difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root).real


# The Frechet distance.


@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50), st.floats(0, 20), st.floats(-50, 50), st.floats(0, 20))
def test_in_one_dimension_it_is_of_means_and_standard_deviations(mean_a, spread_a, mean_b, spread_b):
    given_ = [torch.tensor([[v]], dtype=torch.float64) for v in (mean_a, spread_a**2, mean_b, spread_b**2)]
    found = gaussian_distance(given_[0][0], given_[1], given_[2][0], given_[3])
    expected = (mean_a - mean_b) ** 2 + (spread_a - spread_b) ** 2
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def commuting(rank_a: int, rank_b: int, seed: int = 3) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """Gaussians of one basis, of spreads over six decades, that have no spread beyond a rank; and their distance."""
    dim = 24
    basis = rotation(dim, seed)
    spread_a, spread_b = (10 ** (3 * normal(dim, seed=s).clamp(-1, 1)) for s in (seed + 1, seed + 2))
    spread_a[rank_a:], spread_b[: dim - rank_b] = 0, 0
    means = normal(2, dim, seed=seed + 3)
    covariances = [basis * spread.square() @ basis.T for spread in (spread_a, spread_b)]
    expected = (means[0] - means[1]).square().sum() + (spread_a - spread_b).square().sum()
    return (means[0], covariances[0], means[1], covariances[1]), float(expected)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(24, 24), (24, 7), (10, 18), (12, 12), (24, 0), (0, 0)])
def test_of_covariances_that_commute_it_is_of_the_standard_deviations_singular_or_not(rank_a, rank_b):
    given_, expected = commuting(rank_a, rank_b)
    assert gaussian_distance(*given_) == pytest.approx(expected, rel=1e-9)


def test_directions_without_spread_add_nothing():
    """Most of the features of a network can be dead; square roots of rounded eigenvalues would be seen."""
    dim, rank = 200, 20
    wide = normal(400, rank, seed=1) @ normal(rank, dim, seed=2) + normal(dim, seed=3)
    a, b = FeatureSums.of(wide[:300]), FeatureSums.of(0.9 * wide[100:] + 0.1)
    basis = torch.linalg.qr(normal(rank, dim, seed=2).T)[0]
    outside = torch.eye(dim, dtype=torch.float64) - basis @ basis.T
    across = (outside @ (a.mean - b.mean)).square().sum().item()
    expected = by_sqrtm(wide[:300] @ basis, (0.9 * wide[100:] + 0.1) @ basis) + across
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) <= 1e-12 * float(a.covariance.trace())


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_it_agrees_with_the_root_of_the_product_by_scipy(dim):
    a, b = features(3 * dim + 10, dim, seed=1), features(2 * dim + 10, dim, seed=2)
    found = frechet_distance(FeatureSums.of(a), FeatureSums.of(b))
    assert found == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(FeatureSums.of(b), FeatureSums.of(a)) == pytest.approx(found, rel=1e-12)
    turn, shift = rotation(dim), normal(dim, seed=5)
    moved = [FeatureSums.of(x @ turn + shift) for x in (a, b)]
    assert frechet_distance(*moved) == pytest.approx(found, rel=1e-9)
    shifted = frechet_distance(FeatureSums.of(a), FeatureSums.of(a + shift))
    assert shifted == pytest.approx(float(shift.square().sum()), rel=1e-9)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_sums_by_batches_of_any_number_of_processes_are_those_of_the_whole(processes, batch):
    """A rank may have had no image; features are float32, as networks give them."""
    sets = [features(203, 16, seed=s).float() for s in (1, 2)]
    merged = []
    for table in sets:
        ranks = [FeatureSums.zeros(16) for _ in range(processes)]
        for index, part in enumerate(table.split(batch)):
            ranks[index % max(processes - 1, 1)].add(part)
        ranks[0].add(table[:0])
        total = torch.stack([rank.flat() for rank in ranks]).sum(0)  # what an all-reduce does
        merged.append(FeatureSums.from_flat(total))
        added = ranks[0]
        for rank in ranks[1:]:
            added = added + rank
        assert added.n == merged[-1].n == 203
        np.testing.assert_allclose(added.outer, merged[-1].outer, rtol=1e-12)
        np.testing.assert_allclose(merged[-1].mean, table.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged[-1].covariance, np.cov(table.double().numpy(), rowvar=False), atol=1e-13)
    whole = frechet_distance(*(FeatureSums.of(table) for table in sets))
    assert frechet_distance(*merged) == pytest.approx(whole, rel=1e-10)


def test_sums_take_any_float_type_and_numpy_and_are_float64():
    table = features(40, 3, seed=1)
    for given_ in (table.bfloat16(), table.float(), table.float().numpy()):
        sums = FeatureSums.of(given_)
        assert sums.sum.dtype == sums.outer.dtype == sums.flat().dtype == torch.float64
        exact = torch.as_tensor(given_).double()
        np.testing.assert_allclose(sums.outer, exact.T @ exact, rtol=1e-14)


def test_a_feature_of_large_mean_keeps_its_covariance():
    table = 1000 + features(300, 4, seed=1)
    np.testing.assert_allclose(FeatureSums.of(table).covariance, np.cov(table.numpy(), rowvar=False), atol=1e-9)


# The kernel distance.


def brute_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a.dot(b)) / len(a) + 1) ** 3

    own = [math.fsum(kernel(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return math.fsum(own) - 2 * math.fsum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_mmd_of_a_subset_is_the_sum_over_pairs():
    x, y = features(9, 5, seed=1), features(12, 5, seed=2)
    assert unbiased_mmd(x, y) == pytest.approx(brute_mmd(x, y), rel=1e-12)
    assert unbiased_mmd(x.float(), y.float()) == pytest.approx(brute_mmd(x, y), rel=1e-5)


def test_kernel_distance_is_the_mean_over_the_seeds_subsets():
    x, y = features(30, 4, seed=1), features(25, 4, seed=2)
    drawn = [draw_subset(30, 25, seed=7, index=index, size=8) for index in range(5)]
    assert all(len(set(rows.tolist())) == 8 for pair in drawn for rows in pair)
    values = [brute_mmd(x[a], y[b]) for a, b in drawn]
    mean, stderr = kernel_distance(x, y, seed=7, subsets=5, subset_size=8)
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert stderr == pytest.approx(np.std(values, ddof=1) * math.sqrt(1 / 5 + 8 / 17), rel=1e-12)
    assert kernel_distance(x.numpy(), y.numpy(), seed=7, subsets=5, subset_size=8) == (mean, stderr)
    assert kernel_distance(x, y, seed=8, subsets=5, subset_size=8)[0] != mean
    whole, unknown = kernel_distance(x[:25], y, seed=7, subsets=3, subset_size=25)
    assert whole == pytest.approx(brute_mmd(x[:25], y), rel=1e-12) and math.isnan(unknown)
    assert math.isnan(kernel_distance(x, y, seed=7, subsets=1, subset_size=8)[1])


def exact_mmd(shift: float) -> float:
    """Of N(0, I) and N(shift, I) in two dimensions: the kernel is a polynomial, so moments give it."""

    def mean_of_kernel(a: float, b: float) -> float:
        nodes, weights = np.polynomial.hermite_e.hermegauss(6)
        weights = weights / weights.sum()
        total = 0.0
        for (i, u), (j, v), (k, s), (m, t) in itertools.product(enumerate(nodes), repeat=4):
            weight = weights[i] * weights[j] * weights[k] * weights[m]
            total += weight * (((u + a) * (s + b) + (v + a) * (t + b)) / 2 + 1) ** 3
        return total

    return mean_of_kernel(0, 0) + mean_of_kernel(shift, shift) - 2 * mean_of_kernel(0, shift)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_has_no_bias_and_a_standard_error_that_is_not_too_small(shift):
    """Over many pairs of sets; at 0 the expectation is 0. The error is near where the sets differ, else too large."""
    repeats, num = 150, 60
    x, y = normal(repeats, num, 2, seed=1), shift + normal(repeats, num, 2, seed=2)
    options = {"seed": 0, "subsets": 12, "subset_size": 15}
    found = np.array([metrics.kernel_distance(*pair, **options) for pair in zip(x, y, strict=True)])
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - exact_mmd(shift)) < 3 * spread / math.sqrt(repeats)
    claimed = math.sqrt((found[:, 1] ** 2).mean())
    assert 0.9 * spread < claimed < 2.5 * spread
    if shift == 0:
        assert (np.abs(found[:, 0]) < 3 * found[:, 1]).mean() > 0.95
    assert exact_mmd(0) == pytest.approx(0, abs=1e-12) and exact_mmd(0.5) > 0.5


# The inception score.


def probabilities(num: int, num_classes: int, seed: int = 0) -> Tensor:
    return (3 * normal(num, num_classes, seed=seed)).softmax(1)


def test_inception_score_of_known_sets():
    sure = torch.eye(10, dtype=torch.float64).repeat(20, 1)
    assert inception_score(sure) == pytest.approx((10, 0), rel=1e-12, abs=1e-9)
    assert inception_score(sure[:, :1] * 0 + torch.full((1, 7), 1 / 7)) == pytest.approx((1, 0), abs=1e-6)
    alike = probabilities(1, 10).repeat(50, 1)
    assert inception_score(alike, splits=5) == pytest.approx((1, 0), abs=1e-9)
    two = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1]]
    assert inception_score(two, splits=1)[0] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize(("num", "splits"), [(100, 10), (103, 10), (7, 7), (12, 1)])
def test_inception_score_is_the_exponential_of_the_mean_divergence(num, splits):
    table = probabilities(num, 6)
    scores = []
    for part in range(splits):
        rows = table[part * num // splits : (part + 1) * num // splits].numpy()
        divergence = [sum(p * math.log(p / q) for p, q in zip(row, rows.mean(0), strict=True)) for row in rows]
        scores.append(math.exp(sum(divergence) / len(rows)))
    assert inception_score(table, splits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9, abs=1e-12)


# Precision and recall.


def brute_precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def share(of: np.ndarray, among: np.ndarray) -> float:
        radii = [
            sorted(np.linalg.norm(a - b) for j, b in enumerate(among) if j != i)[k - 1] for i, a in enumerate(among)
        ]
        inside = [any(np.linalg.norm(x - a) <= r for a, r in zip(among, radii, strict=True)) for x in of]
        return float(np.mean(inside))

    return share(fake.numpy(), real.numpy()), share(real.numpy(), fake.numpy())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_brute_force_in_blocks_of_any_size(k):
    real, fake = normal(43, 3, seed=1), normal(37, 3, seed=2) + torch.tensor([1.2, 0, 0])
    expected = brute_precision_recall(real, fake, k)
    assert min(expected) > 0 and max(expected) < 1
    for batch in (1, 8, 37, 43, 512):
        assert precision_recall(real, fake, k, batch) == expected
    assert precision_recall(fake, real, k) == expected[::-1]
    assert precision_recall((real + 100).float(), (fake + 100).float().numpy(), k) == expected


def test_precision_and_recall_of_constructed_sets():
    real = normal(60, 4, seed=1)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    # Two modes, of which one is drawn: all that is drawn is real, half of what is real is drawn.
    modes = torch.cat((real, 1000 + normal(60, 4, seed=2)))
    precision, recall = precision_recall(modes, real + 1e-3)
    assert precision == 1 and 0.45 < recall <= 0.5
    # And one mode too many.
    precision, recall = precision_recall(real + 1e-3, modes)
    assert recall == 1 and 0.45 < precision <= 0.5


def test_copies_are_inside_balls_without_extent_and_ties_at_the_radius_are_inside():
    copies = normal(20, 300, seed=1).repeat_interleave(4, 0)
    of_all = copies.view(20, 4, 300)[:, :3].flip(0).flatten(0, 1)
    assert precision_recall(copies, of_all, k=2) == (1, 1)
    assert precision_recall(copies, of_all + 1e-4, k=2) == (0, 0)
    line = torch.arange(10, dtype=torch.float64)[:, None] * torch.full((1, 30), 0.1, dtype=torch.float64) + 7.3
    assert precision_recall(line, line + 0.1, k=1) == (1, 1)
    assert precision_recall(line, line + 0.101, k=1) == (0.9, 0.9)


# torchmetrics, where it is installed.


class Given(torch.nn.Module):
    """A feature extractor whose images are their own features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def theirs(name: str) -> Any:
    """A module of torchmetrics.image; its classes warn of the memory that they take."""
    return pytest.importorskip(f"torchmetrics.image.{name}")


def relative(found: float, expected: float) -> float:
    print(f"relative difference {abs(found / expected - 1):.1e}")
    return abs(found / expected - 1)


def test_frechet_distance_agrees_with_torchmetrics():
    real, fake = features(400, 64, seed=1), features(300, 64, seed=2)
    metric = theirs("fid").FrechetInceptionDistance(Given(64))
    for part in real.split(100):
        metric.update(part, real=True)
    for part in fake.split(100):
        metric.update(part, real=False)
    assert relative(frechet_distance(FeatureSums.of(real), FeatureSums.of(fake)), float(metric.compute())) < 1e-9


@pytest.mark.filterwarnings("ignore:Metric")
def test_kernel_distance_agrees_with_torchmetrics_on_the_same_subsets(monkeypatch):
    real, fake = features(200, 16, seed=1), features(150, 16, seed=2)
    metric = theirs("kid").KernelInceptionDistance(Given(16), subsets=10, subset_size=50)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = kernel_distance(real, fake, seed=5, subsets=10, subset_size=50)
    drawn = iter([rows for index in range(10) for rows in draw_subset(200, 150, seed=5, index=index, size=50)])
    monkeypatch.setattr(torch, "randperm", lambda num: next(drawn))
    mean, std = map(float, metric.compute())
    assert relative(ours[0], mean) < 1e-9
    assert relative(ours[1], std * math.sqrt(10 / 9) * math.sqrt(1 / 10 + 50 / 100)) < 1e-9


@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inception_score_agrees_with_torchmetrics_on_the_same_splits(monkeypatch, dtype):
    logits = (3 * normal(200, 10)).to(dtype)
    metric = theirs("inception").InceptionScore(Given(10), splits=10)
    metric.update(logits)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    mean, std = map(float, metric.compute())
    ours = inception_score(logits.softmax(1))
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative(ours[0], mean) < limit
    assert relative(ours[1], std * math.sqrt(9 / 10)) < limit  # theirs has one less below the line


# What cannot be measured.


def test_what_cannot_be_had_is_said_before_anything_is_drawn():
    enough = {"num_real": 2000, "num_fake": 2000, "dim": 64, "num_classes": 10}
    check_metrics(metrics.FEATURE_METRICS, **enough)
    check_metrics(["fid"], **enough | {"num_fake": 65})
    check_metrics(["kid"], **enough | {"num_real": 1000, "num_classes": None})
    check_metrics(["precision"], **enough | {"num_real": 4})
    for name, changed, said in [
        ("fjd", {}, "unknown metric 'fjd': valid are fid, kid, is, precision, recall"),
        ("fid", {"num_fake": 64}, "fid: the covariance of 64 features needs 65 images: the generated set has 64"),
        ("fid", {"dim": 2048}, "fid: the covariance of 2048 features needs 2049 images: the real set has 2000"),
        ("kid", {"num_fake": 999}, "kid: subsets of 1000 images need as many: the generated set has 999"),
        ("kid", {"subset_size": 1}, "kid: 1 subsets of 1 images: at least 1 of 2 are needed"),
        ("is", {"num_classes": None}, "is: the extractor gives no probabilities of classes"),
        ("is", {"num_fake": 9}, "is: 10 splits of 9 images: 1 .. 9 are valid"),
        ("precision", {"num_real": 3}, "precision and recall: k = 3 needs 4 images: the real set has 3"),
        ("recall", {"k": 0}, "precision and recall: k is 0: at least 1 neighbour is needed"),
    ]:
        with pytest.raises(ConfigError) as caught:
            check_metrics([name], **enough | changed)
        assert said in str(caught.value) and "\n" not in str(caught.value)


def raises(kind: type[Exception], said: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sets_that_cannot_be_compared_are_refused():
    x = features(20, 4, seed=1)
    sums, few, other = FeatureSums.of(x), FeatureSums.of(x[:4]), FeatureSums.of(x[:, :3])
    raises(ConfigError, "needs 5 images: the second set has 4", lambda: frechet_distance(sums, few))
    raises(DataError, "features of 4 and of 3 dimensions", lambda: frechet_distance(sums, other))
    raises(DataError, "sums of 3 features do not add to sums of 4", lambda: sums + other)
    raises(DataError, "features of 3 dimensions do not add to sums of 4", lambda: sums.add(x[:, :3]))
    raises(DataError, "features of shape [20]", lambda: FeatureSums.of(x[:, 0]))
    raises(DataError, "are no feature sums", lambda: FeatureSums.from_flat(sums.flat()[:-1]))
    raises(DataError, "are no feature sums", lambda: FeatureSums.from_flat(sums.flat().float()))
    raises(DataError, "are no feature sums", lambda: FeatureSums.from_flat(torch.zeros((), dtype=torch.float64)))
    for call in (
        lambda y: kernel_distance(x, y, seed=0, subsets=2, subset_size=5),
        lambda y: precision_recall(x, y),
    ):
        raises(DataError, "features of 4 and of 3 dimensions", lambda call=call: call(x[:, :3]))
    raises(ConfigError, "the second set has 4", lambda: kernel_distance(x, x[:4], seed=0, subset_size=5))
    raises(ConfigError, "0 subsets", lambda: kernel_distance(x, x, seed=0, subsets=0, subset_size=5))
    raises(ConfigError, "k = 3 needs 4 images: the generated set has 3", lambda: precision_recall(x, x[:3]))
    raises(ConfigError, "no probabilities of classes", lambda: inception_score(None))
    raises(ConfigError, "10 splits of 5 images", lambda: inception_score(probabilities(5, 3)))
    raises(DataError, "probabilities of image 0", lambda: inception_score(normal(20, 3)))


def test_features_that_are_not_finite_are_refused():
    x = features(20, 4, seed=1)
    broken = x.clone()
    broken[7, 2] = math.nan
    said = "features of image 7 have NaN or infinite values"
    raises(NumericsError, said, lambda: kernel_distance(x, broken, seed=0, subsets=2, subset_size=5))
    raises(NumericsError, said, lambda: precision_recall(broken, x))
    raises(NumericsError, "first set", lambda: frechet_distance(FeatureSums.of(broken), FeatureSums.of(x)))
    raises(NumericsError, "probabilities of image 7", lambda: inception_score(broken))


# Each check above, seen to fail.


def biased_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    return float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())


def without_means(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    return gaussian_distance(mean_a, covariance_a, mean_a, covariance_b)


def by_eigenvalues_of_the_product(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    cross = torch.linalg.eigvals(covariance_a @ covariance_b).sqrt().real.sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def without_shared_images(x: Tensor, y: Tensor, **options: Any) -> tuple[float, float]:
    """The deviation of subsets over the root of their number, as if they shared no image."""
    mean, stderr = kernel_distance(x, y, **options)
    size, num = options["subset_size"], min(len(x), len(y))
    return mean, stderr / math.sqrt(1 + options["subsets"] * size / (num - size))


def kernel_of_another_scale(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T + 1) ** 3


PLANTED = [
    (
        "kernel_distance",
        without_shared_images,
        lambda: test_kernel_distance_has_no_bias_and_a_standard_error_that_is_not_too_small(0.5),
    ),
    ("unbiased_mmd", biased_mmd, lambda: test_kernel_distance_is_the_mean_over_the_seeds_subsets()),
    (
        "unbiased_mmd",
        biased_mmd,
        lambda: test_kernel_distance_has_no_bias_and_a_standard_error_that_is_not_too_small(0.0),
    ),
    ("_kernel", kernel_of_another_scale, lambda: test_mmd_of_a_subset_is_the_sum_over_pairs()),
    ("gaussian_distance", without_means, lambda: test_it_agrees_with_the_root_of_the_product_by_scipy(5)),
    *(
        (
            "neighbour_radii",
            lambda x, k, batch, off=off: neighbour_radii(x, k + off, batch),
            lambda: test_precision_and_recall_agree_with_brute_force_in_blocks_of_any_size(3),
        )
        for off in (-1, 1)
    ),
    ("_ROUNDING", 0.0, lambda: test_copies_are_inside_balls_without_extent_and_ties_at_the_radius_are_inside()),
    ("gaussian_distance", by_eigenvalues_of_the_product, lambda: test_directions_without_spread_add_nothing()),
]


@pytest.mark.parametrize(("name", "wrong", "check"), PLANTED)
def test_planted_bugs_are_found(name, wrong, check, monkeypatch):
    monkeypatch.setattr(metrics, name, wrong)
    with pytest.raises(AssertionError):
        check()
