"""How good a run's samples are: distances between features of samples and of real images, on all ranks.

Each rank draws an equal share of the samples, rounds them to 8 bits and takes their features; sums of features, in
float64, are added over ranks, and where a metric needs the features themselves they come together in order of image
number. So 1, 2 or 4 processes give the same figures for the same 8-bit images.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .config import Config
from .data import ImageData, open_data
from .errors import ConfigError
from .features import Extractor, Reference, open_extractor, reference_statistics
from .generate import Callback, draw_shared
from .metrics import (
    FEATURE_METRICS,
    SUBSET_SIZE,
    FeatureSums,
    check_metrics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from .samplers import Sampler, to_uint8

__all__ = ["FEATURE_METRICS", "Quality", "RunQuality", "best_record", "measure_quality"]

LESS_IS_BETTER = {"fid", "kid"}
_NEED_FEATURES = {"kid", "precision", "recall"}  # of single images, and not their sums alone
MOST_FEATURES = 50_000
"""Real images, at most, whose features are kept one by one."""
SHOWN = 64
"""Samples that are kept as pictures."""


@dataclass
class Quality:
    """Figures by the metric's name, and what they are of."""

    figures: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    pictures: np.ndarray
    """uint8 [n, H, W, C]: the first samples; empty on ranks other than 0."""
    remarks: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        lines = []
        for name, values in self.figures.items():
            spread = next((f" +- {values[key]:.4g}" for key in ("stderr", "std") if values.get(key) is not None), "")
            lines.append(f"{name:10} {values['value']:.6g}{spread}")
        return "\n".join(lines)


def measure_quality(
    metrics: Collection[str],
    sampler: Sampler,
    data: ImageData,
    rows: np.ndarray,
    extractor: Extractor,
    *,
    num_samples: int,
    shape: tuple[int, int, int],
    device: torch.device,
    batch_size: int = 64,
    seed: int = 0,
    subset_size: int | None = None,
    progress: bool = False,
    reference: Reference | None = None,
    say: Callable[[str], object] = print,
) -> Quality:
    """Draw samples and compare them with real images. Called on all ranks, all of which get the figures.

    Args:
        metrics: names of FEATURE_METRICS.
        sampler: draws images 0 .. num_samples - 1 of its seed, of a conditional network all classes in turn.
        data, rows: the real images: rows (int64) as ImageData numbers them.
        extractor: the same weights on every rank.
        shape: (C, H, W) of an image.
        seed: of KID's subsets.
        subset_size: of KID; None: 1000, or half of the smaller set where that is less.
        progress: show a bar on stderr, if that is a terminal.
        reference: of these rows, as reference_of gives it; None: from its file, or taken now.
        say: told, in a line, of work that takes long.

    Raises:
        ConfigError: too few images for a metric, no probabilities for the inception score, or ranks with extractors of
            different weights.
        DataError: a real image that cannot be used.
        NumericsError: a sample that holds values which are not numbers.
    """
    names = list(dict.fromkeys(metrics))
    subset = subset_size or min(SUBSET_SIZE, len(rows) // 2, num_samples // 2)
    check_metrics(
        names,
        num_real=len(rows),
        num_fake=num_samples,
        dim=extractor.dim,
        num_classes=extractor.num_classes,
        subset_size=subset,
    )
    check_alike(extractor)
    if reference is None:
        reference = reference_of(names, data, rows, extractor, say)
    fake = _draw(names, sampler, num_samples, shape, device, batch_size, extractor, progress)
    place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    real_features, fake_features = reference.features.to(place), fake.features.to(place)
    figures: dict[str, dict[str, Any]] = {}
    if "fid" in names:
        figures["fid"] = {"value": frechet_distance(_on_host(reference.sums), fake.sums)}
    if "kid" in names:
        value, stderr = kernel_distance(real_features, fake_features, seed=seed, subset_size=subset)
        figures["kid"] = {"value": value, "stderr": stderr if math.isfinite(stderr) else None, "subset_size": subset}
    if "is" in names:
        value, std = inception_score(fake.probabilities)
        figures["is"] = {"value": value, "std": std}
    if {"precision", "recall"}.intersection(names):
        both = dict(zip(("precision", "recall"), precision_recall(real_features, fake_features), strict=True))
        figures |= {name: {"value": both[name]} for name in names if name in both}
    facts = {
        "num_samples": num_samples,
        "num_reference": len(rows),
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "sampler": sampler.sampler,
        "sampler_steps": len(sampler.timesteps),
        "sampler_seed": sampler.seed,
        "sampler_guidance": sampler.guidance,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        **{
            f"extractor_{key}": value
            for key, value in extractor.about.items()
            if isinstance(value, int | float | str) and key != "file"
        },
    }
    return Quality({name: figures[name] for name in names}, facts, fake.pictures, list(extractor.remarks))


def reference_of(
    metrics: Collection[str],
    data: ImageData,
    rows: np.ndarray,
    extractor: Extractor,
    say: Callable[[str], object],
) -> Reference:
    """Statistics of the real images, with their features one by one where a metric needs them."""
    kept = min(len(rows), MOST_FEATURES) if _NEED_FEATURES.intersection(metrics) else 0
    return reference_statistics(data, rows, extractor, num_features=kept, say=say)


class RunQuality:
    """Quality of a run's averaged weights while it trains: opened at the start, so that what is missing is said then.

    Args:
        config: eval says what is measured.
        device: of the networks.
        say: told, in a line, of work that takes long.

    Raises:
        ConfigError, DataError, CheckpointError: as open_extractor and measure_quality, before anything is drawn; images
            that are streamed without a number.
    """

    def __init__(self, config: Config, device: torch.device, say: Callable[[str], object]) -> None:
        # Every row once: no shares of a mixture, and of a stream one lane, whose epochs leave nothing out.
        own = dataclasses.replace(config.data, weights=(), bad_image="error", lanes=1)
        data = open_data(own, config.model.image_size, config.channels)
        self.config, self.data, self.device, self.say = config, data, device, say
        if data.num_images is None:
            raise ConfigError(f"eval.every is set and {config.data.source} does not say how many images it has")
        rows = data.rows_at(np.arange(data.num_images), 0)
        assert rows is not None
        self.rows = np.unique(rows)
        ours = config.eval
        self.extractor = open_extractor(
            ours.features, device=device, data=data, weights=ours.features_weights, epochs=ours.features_epochs, say=say
        )
        for remark in self.extractor.remarks:
            say(remark)
        subset = min(SUBSET_SIZE, len(self.rows) // 2, ours.num_samples // 2)
        check_metrics(
            ours.metrics,
            num_real=len(self.rows),
            num_fake=ours.num_samples,
            dim=self.extractor.dim,
            num_classes=self.extractor.num_classes,
            subset_size=subset,
        )
        check_alike(self.extractor)
        self.reference = reference_of(ours.metrics, data, self.rows, self.extractor, say)

    def measure(self, sampler: Sampler) -> Quality:
        """Called on all ranks."""
        ours = self.config.eval
        return measure_quality(
            ours.metrics,
            sampler,
            self.data,
            self.rows,
            self.extractor,
            num_samples=ours.num_samples,
            shape=(self.config.channels, *self.config.model.image_size),
            device=self.device,
            batch_size=ours.batch_size,
            seed=self.config.seed,
            reference=self.reference,
            say=self.say,
        )


def best_record(records: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best line of quality.jsonl by a metric, the earliest of equals; None where there is none.

    Only lines that were measured as the last one was: a distance of fewer samples, or in other features, is another.
    """
    known = [record for record in records if record.get(metric) is not None]
    alike = [record for record in known if record.get("features") == known[-1].get("features")]
    sign = 1 if metric in LESS_IS_BETTER else -1
    return min(alike, key=lambda record: sign * record[metric], default=None)


@dataclass
class _Drawn:
    sums: FeatureSums
    features: Tensor
    """float32 [N, D] on the host, in order of image number."""
    probabilities: Tensor | None
    pictures: np.ndarray


def _draw(
    metrics: Collection[str],
    sampler: Sampler,
    num: int,
    shape: tuple[int, int, int],
    device: torch.device,
    batch_size: int,
    extractor: Extractor,
    progress: bool,
) -> _Drawn:
    """Features of images 0 .. num - 1, of all ranks on each of them."""
    world, share = _world(), -(-num // _world())
    classes = sampler.num_classes
    sums = FeatureSums.zeros(extractor.dim, "cpu" if device.type == "mps" else device)  # which has no float64
    one_by_one = bool(_NEED_FEATURES.intersection(metrics))
    features = torch.zeros(share if one_by_one else 0, extractor.dim)
    probabilities = torch.zeros(share, extractor.num_classes or 0) if "is" in metrics else None
    first = _rank() * share

    def draw(numbers: Tensor, callback: Callback) -> Tensor:
        labels = None if classes is None else numbers % classes
        x_0 = sampler.sample(numbers, shape, device, class_labels=labels, callback=callback)
        found, logits = extractor(to_uint8(x_0))
        own = len(numbers) - max(0, int(numbers[-1]) + 1 - num)  # surplus images make shares equal, and do not count
        if own > 0:
            sums.add(found[:own].to(sums.sum.device))
        place = slice(int(numbers[0]) - first, int(numbers[0]) - first + len(numbers))
        if one_by_one:
            features[place] = found.float().cpu()
        if probabilities is not None and logits is not None:
            probabilities[place] = logits.float().softmax(1).cpu()
        return x_0

    title = "sampling" if progress else None
    pictures = draw_shared(num, shape, batch_size, len(sampler.timesteps), draw, title, keep=SHOWN)
    flat = sums.flat()
    if world > 1:
        dist.all_reduce(flat)
        features = _gathered(features, device)
        probabilities = None if probabilities is None else _gathered(probabilities, device)
    return _Drawn(
        FeatureSums.from_flat(flat.cpu()),
        features[:num],
        None if probabilities is None else probabilities[:num],
        pictures,
    )


def _gathered(own: Tensor, device: torch.device) -> Tensor:
    """The shares of all ranks [world * n, D], one behind the other, on the host."""
    everyone = [torch.empty_like(own, device=device) for _ in range(_world())]
    dist.all_gather(everyone, own.to(device))
    return torch.cat([part.cpu() for part in everyone])


def _on_host(sums: FeatureSums) -> FeatureSums:
    return FeatureSums.from_flat(sums.flat().cpu())


def check_alike(extractor: Extractor) -> None:
    if _world() == 1:
        return
    versions: list[Any] = [None] * _world()
    dist.all_gather_object(versions, extractor.version)
    if len(set(versions)) > 1:
        raise ConfigError(
            f"the processes have {extractor.name} extractors of different weights, as machines without a shared cache "
            "train them: give all of them one file with --features-weights"
        )


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
