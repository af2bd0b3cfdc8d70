"""Distances between two sets of images by the features of a network: FID, KID, inception score, precision and recall.

Mathematics alone, in float64: which network gave the features is the caller's business, and belongs beside the figure.

    Frechet distance (Heusel et al. 2017, eq. 6), of the Gaussians with the sets' means and covariances:
        |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)
    Kernel distance (Binkowski et al. 2018), with k(x, y) = (x . y / D + 1)^3:
        E k(x, x') + E k(y, y') - 2 E k(x, y), without bias, over subsets
    Inception score (Salimans et al. 2016, section 4): exp E_x KL(p(class | x) || p(class))
    Precision, recall (Kynkaanniemi et al. 2019, eq. 1 and 2): the share of generated images inside the real ones'
        manifold, and the other way round, a manifold being balls that reach to each image's k-th nearest neighbour

The sums of the Frechet distance are merged over processes by addition. The others need all features, in the order of
the images' numbers: with the same order, any number of processes has the same figures.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, DataError, NumericsError

FEATURE_METRICS = ("fid", "kid", "is", "precision", "recall")
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
NEIGHBOURS = 3
# Rounding of a squared distance, as a share of the two squared norms that it is a difference of: an image at exactly
# a ball's radius, or a copy of one whose ball has no extent, is inside.
_ROUNDING = 1e-12

Array = Tensor | np.ndarray


def check_metrics(
    names: Iterable[str],
    *,
    num_real: int,
    num_fake: int,
    dim: int,
    num_classes: int | None,
    subset_size: int = SUBSET_SIZE,
    splits: int = SPLITS,
    k: int = NEIGHBOURS,
) -> None:
    """Say whether the metrics can be had of so many images, before any are drawn.

    Args:
        dim: features of an image.
        num_classes: whose probabilities the extractor gives; None: it gives none.

    Raises:
        ConfigError: an unknown name, too few images, or no probabilities.
    """
    counts = {"real": num_real, "generated": num_fake}
    for name in names:
        if name not in FEATURE_METRICS:
            raise ConfigError(f"unknown metric {name!r}: valid are {', '.join(FEATURE_METRICS)}")
        if name == "fid":
            for whose, num in counts.items():
                _check_covariance(num, dim, whose)
        elif name == "kid":
            _check_subsets(counts, 1, subset_size)
        elif name == "is":
            if num_classes is None:
                raise _no_probabilities()
            _check_splits(num_fake, splits)
        else:
            _check_neighbours(counts, k)


@dataclass(eq=False)
class FeatureSums:
    """What a Frechet distance needs of a set of images: sums that grow by batches and merge by addition.

    The covariance is a difference of sums: of its digits, those of (mean / standard deviation)^2 are lost. float64
    leaves 1e-10 where a feature's mean is a thousand times its spread.
    """

    n: int
    """Images."""
    sum: Tensor
    """float64 [D]: sum of the features."""
    outer: Tensor
    """float64 [D, D]: sum of their outer products."""

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> Self:
        """Sums of no images, of `dim` features, on the device where features will be added."""
        empty = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, empty, torch.zeros(dim, dim, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, features: Array) -> Self:
        """Sums of the features [N, D] of a whole set.

        Raises:
            DataError: features that are not a table.
        """
        table = _table(features)
        sums = cls.zeros(table.shape[1], table.device)
        sums.add(table)
        return sums

    def add(self, features: Array) -> None:
        """Add the features [N, D] (any float dtype, N may be 0) of a batch, in place and without waiting for a GPU.

        Raises:
            DataError: features of another number than D.
        """
        table = _table(features)
        if table.shape[1] != self.dim:
            raise DataError(f"features of {table.shape[1]} dimensions do not add to sums of {self.dim}")
        table = table.to(self.sum.device, torch.float64)
        self.n += len(table)
        self.sum += table.sum(0)
        self.outer.addmm_(table.T, table)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Sums of both sets' images."""
        if other.dim != self.dim:
            raise DataError(f"sums of {other.dim} features do not add to sums of {self.dim}")
        return FeatureSums(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def flat(self) -> Tensor:
        """All of it as float64 [1 + D + D^2]; the sum of several such vectors is the flat form of the merged sums."""
        return torch.cat((self.sum.new_tensor([self.n]), self.sum, self.outer.flatten()))

    @classmethod
    def from_flat(cls, flat: Tensor) -> Self:
        """What flat() made, or a sum of such.

        Raises:
            DataError: a vector that is no such.
        """
        dim = (math.isqrt(max(4 * flat.numel() - 3, 0)) - 1) // 2
        if flat.ndim != 1 or dim < 1 or 1 + dim + dim * dim != flat.numel() or flat.dtype != torch.float64:
            shape = "x".join(map(str, flat.shape)) or "no"
            raise DataError(f"{shape} values of {flat.dtype} are no feature sums: float64 [1 + D + D^2] are")
        return cls(round(float(flat[0])), flat[1 : 1 + dim].clone(), flat[1 + dim :].view(dim, dim).clone())

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return len(self.sum)

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], symmetric, with n - 1 below the line as FID has it."""
        covariance = (self.outer - torch.outer(self.sum, self.sum / self.n)) / (self.n - 1)
        return (covariance + covariance.T) / 2


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """The Frechet distance of two sets of images (squared, as FID has it), at least 0; the order does not matter.

    Raises:
        ConfigError: fewer than D + 1 images in a set, whose covariance then has directions without any spread.
        DataError: sets of different numbers of features.
        NumericsError: features that are not finite.
    """
    if a.dim != b.dim:
        raise DataError(f"features of {a.dim} and of {b.dim} dimensions cannot be compared: they are of two extractors")
    for whose, sums in (("first", a), ("second", b)):
        _check_covariance(sums.n, sums.dim, whose)
        if not sums.outer.isfinite().all():
            raise NumericsError(f"fid: features of the {whose} set have NaN or infinite values")
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """The squared Frechet distance of two Gaussians, float64 [D] and [D, D]; either covariance may be singular.

    With S_a = A A^T and S_b = B B^T the trace of (S_a S_b)^(1/2) is the sum of the singular values of A^T B. These are
    right to a rounding of the largest, where the square roots of the eigenvalues of a product are so only to the root
    of one: a thousand directions without spread would add 1e-5 of the largest variance to a FID, another on each run.
    """
    root_a, root_b = _root(covariance_a), _root(covariance_b)
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    difference = (mean_a.cpu().double() - mean_b.cpu().double()).square().sum()
    spread = covariance_a.trace().cpu().double() + covariance_b.trace().cpu().double()
    return max(float(difference + spread - 2 * cross), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """float64 [D, R] on the CPU, whose product with its transpose is the covariance of rank R.

    Eigenvalues within rounding of 0 are 0: their roots would be large enough to be seen.
    """
    values, vectors = torch.linalg.eigh(covariance.cpu().double())
    kept = values > len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(
    x: Array, y: Array, *, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """The kernel distance of two sets of images: the mean over subsets, and its standard error.

    Subsets share images, so their standard deviation s over the root of their number S is not that error. Given the
    images it is, about the estimate U_n from all of them; and n var U_n does not grow with n (Hoeffding 1948, section
    5), so var U_n <= (m/n) var U_m for subsets of m out of n images, with var U_m = s^2 + var U_n:
        stderr^2 = s^2 (1/S + m / (n - m))
    This is not too small; where the sets are of one distribution it is too large, by up to the root of n/m.

    Args:
        x, y: features [N, D] and [M, D], in the order of the images' numbers.
        seed: of the choice of subsets, a non-negative integer.
        subsets, subset_size: as KID has been published: 100 of 1000 images.

    Returns:
        Mean and standard error. The mean is without bias, so it may be below 0. The error is NaN with one subset,
        or if a set has no more images than a subset.

    Raises:
        ConfigError: a set of fewer images than subset_size, a subset_size below 2, no subsets.
        DataError: sets of different numbers of features.
        NumericsError: features that are not finite.
    """
    x, y = _pair(x, y)
    _check_subsets({"first": len(x), "second": len(y)}, subsets, subset_size)
    values = []
    for index in range(subsets):
        rows_x, rows_y = draw_subset(len(x), len(y), seed=seed, index=index, size=subset_size)
        values.append(unbiased_mmd(x[rows_x.to(x.device)], y[rows_y.to(y.device)]))
    num = min(len(x), len(y))
    if subsets == 1 or num == subset_size:
        return math.fsum(values) / subsets, math.nan
    spread = float(np.std(values, ddof=1))
    return math.fsum(values) / subsets, spread * math.sqrt(1 / subsets + subset_size / (num - subset_size))


def draw_subset(num_x: int, num_y: int, *, seed: int, index: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows int64 [size] of each set, none twice: subset `index` of the seed, whatever other subsets are drawn."""
    rng = np.random.default_rng((seed, index))
    rows_x, rows_y = (rng.choice(num, size, replace=False) for num in (num_x, num_y))
    return torch.from_numpy(rows_x), torch.from_numpy(rows_y)


def unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """The squared maximum mean discrepancy of features [N, D] and [M, D] under k(x, y) = (x . y / D + 1)^3, in float64.

    Pairs of an image with itself are left out (Gretton et al. 2012, eq. 3), so its expectation is that of all images.
    """
    x, y = x.double(), y.double()
    own = math.fsum(_mean_of_pairs(_kernel(z, z)) for z in (x, y))
    return own - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(kernel: Tensor) -> float:
    """Mean of a matrix [N, N] off its diagonal."""
    num = len(kernel)
    return float((kernel.sum() - kernel.trace()) / (num * (num - 1)))


def inception_score(probabilities: Array | None, splits: int = SPLITS) -> tuple[float, float]:
    """The inception score of each of several parts of a set of images: their mean and standard deviation.

    The mean over x of KL(p(class | x) || p(class)) is the entropy of the mean less the mean of the entropies.

    Args:
        probabilities: [N, K], each row of sum 1, in the order of the images' numbers: the parts are runs of N / splits
            images, so that images sorted by class would score too low.
        splits: number of parts, 1 .. N.

    Returns:
        Mean and standard deviation, with `splits` below the line as in the figures of the paper: 0 with one part.

    Raises:
        ConfigError: no probabilities, or fewer images than parts.
        DataError: rows that are not probabilities.
        NumericsError: values that are not finite.
    """
    if probabilities is None:
        raise _no_probabilities()
    table = _finite(_table(probabilities), "probabilities").double()
    _check_splits(len(table), splits)
    totals = table.sum(1)
    # bf16's softmax is within 1e-2 of a sum of 1; logits are not.
    wrong = (table < 0).any(1) | ((totals - 1).abs() > 1e-2)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"probabilities of image {row} are {float(table[row].min()):.3g} at least and sum to "
            f"{float(totals[row]):.3g}: none below 0 and a sum of 1 are valid"
        )
    table = table / totals[:, None]
    scores = []
    for part in range(splits):
        rows = table[part * len(table) // splits : (part + 1) * len(table) // splits]
        entropy, of_mean = torch.special.entr(rows).sum(1).mean(), torch.special.entr(rows.mean(0)).sum()
        scores.append(math.exp(float(of_mean - entropy)))
    return math.fsum(scores) / splits, float(np.std(scores))


def precision_recall(real: Array, fake: Array, k: int = NEIGHBOURS, batch: int = 512) -> tuple[float, float]:
    """Improved precision and recall: shares of images of one set that are in the other's manifold.

    An image is in a set's manifold if it is no further from one of the set's images than that one's k-th nearest
    neighbour in the set, itself not counted.

    Args:
        real, fake: features [N, D] and [M, D], on the device that is to compute. Both are copied to float64.
        k: neighbours, 1 .. min(N, M) - 1.
        batch: rows of distances that are held at a time, batch x max(N, M) of float64; no figure depends on it.

    Returns:
        Precision, the share of fake ones in the real manifold, and recall, the share of real ones in the fake manifold.

    Raises:
        ConfigError: a k that is not smaller than the number of images of each set.
        DataError: sets of different numbers of features.
        NumericsError: features that are not finite.
    """
    real, fake = _pair(real, fake)
    _check_neighbours({"real": len(real), "generated": len(fake)}, k)
    # Distances do not change with the origin; rounding is least about the middle of the images.
    middle = real.double().mean(0)
    real, fake = real.double() - middle, fake.double() - middle
    radii_real, radii_fake = neighbour_radii(real, k, batch), neighbour_radii(fake, k, batch)
    norms_real = real.square().sum(1)
    num_in_real = 0
    in_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(batch), radii_fake.split(batch), strict=True):
        distances = _squared_distances(rows, real)
        distances -= _ROUNDING * (rows.square().sum(1)[:, None] + norms_real)
        num_in_real += int((distances <= radii_real).any(1).sum())
        in_fake |= (distances <= radii[:, None]).any(0)
    return num_in_real / len(fake), int(in_fake.sum()) / len(real)


def neighbour_radii(features: Tensor, k: int, batch: int) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour among the others: float64 [N] of float64 [N, D]."""
    radii = []
    for first in range(0, len(features), batch):
        distances = _squared_distances(features[first : first + batch], features)
        distances.diagonal(first).fill_(math.inf)
        radii.append(distances.topk(k, largest=False, sorted=True).values[:, -1])
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] of [N, D] and [M, D]: by a product of matrices, 20 times faster than by differences at D = 2048."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return squares.addmm_(x, y.T, alpha=-2).clamp_(min=0)


def _table(features: Array) -> Tensor:
    table = torch.as_tensor(features)
    if table.ndim != 2 or table.shape[1] < 1:
        raise DataError(f"features of shape {list(table.shape)}: [images, dimensions] is valid")
    return table


def _finite(table: Tensor, what: str) -> Tensor:
    wrong = ~table.isfinite().all(1)
    if wrong.any():
        raise NumericsError(f"{what} of image {int(wrong.nonzero()[0])} have NaN or infinite values")
    return table


def _pair(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    first, second = _finite(_table(x), "features"), _finite(_table(y), "features")
    if first.shape[1] != second.shape[1]:
        dims = f"{first.shape[1]} and of {second.shape[1]}"
        raise DataError(f"features of {dims} dimensions cannot be compared: they are of two extractors")
    return first, second.to(first.device)


def _check_covariance(num: int, dim: int, whose: str) -> None:
    if num <= dim:
        raise ConfigError(f"fid: the covariance of {dim} features needs {dim + 1} images: the {whose} set has {num}")


def _check_subsets(counts: dict[str, int], subsets: int, subset_size: int) -> None:
    if subsets < 1 or subset_size < 2:
        raise ConfigError(f"kid: {subsets} subsets of {subset_size} images: at least 1 of 2 are needed")
    for whose, num in counts.items():
        if num < subset_size:
            raise ConfigError(f"kid: subsets of {subset_size} images need as many: the {whose} set has {num}")


def _check_splits(num: int, splits: int) -> None:
    if not 1 <= splits <= num:
        raise ConfigError(f"is: {splits} splits of {num} images: 1 .. {num} are valid")


def _check_neighbours(counts: dict[str, int], k: int) -> None:
    if k < 1:
        raise ConfigError(f"precision and recall: k is {k}: at least 1 neighbour is needed")
    for whose, num in counts.items():
        if num <= k:
            raise ConfigError(f"precision and recall: k = {k} needs {k + 1} images: the {whose} set has {num}")


def _no_probabilities() -> ConfigError:
    return ConfigError("is: the extractor gives no probabilities of classes: take one that does, or leave `is` out")
