"""What `fastddpm evaluate` does: measure a run on images of a split, on all ranks, every image counted once.

Images are cut into batches and the bound's timesteps into parts, whatever the number of processes; each (batch, part)
is measured by one process and all sums are taken in one order afterwards. So 1, 2 or 4 processes give the same figures.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from .bound import Network, bound_terms, make_strata, prior_term
from .config import Config, read_config
from .data import DataConfig, ImageData, open_data
from .diffusion import NoiseSchedule, ProcessConfig, check_seed
from .errors import ConfigError, DataError, NumericsError
from .features import open_extractor
from .files import expand, writable_folder, write_json
from .likelihood import BITS_OF_BIN, dequantise, draw_probes, ode_log_likelihood
from .machine import DTYPES, make_accelerator, settle_precision
from .pictures import curve_plot, grid, save_picture
from .pipeline import Pipeline, load_pipeline
from .quality import FEATURE_METRICS, measure_quality
from .runlog import make_bar, to_json
from .samplers import Sampler
from .unet import UNet

if TYPE_CHECKING:
    from .cli import EvaluateCommand

QUARTILES = 4
# Into so many parts the timesteps of a batch are cut, to share out few batches among many processes.
_PARTS = 8
_LOOKED_AT = 8  # images whose channels are compared with the model's


def run_evaluate(command: "EvaluateCommand") -> int:
    """Measure `command.run` by `command.metrics`: a JSON line on stdout, tables on stderr, files in the folder.

    Returns:
        The exit code.

    Raises:
        ConfigError: a value that cannot be run, no run folder, a folder that cannot be written.
        CheckpointError: no weights in the run, or weights that do not fit.
        DataError: images that cannot be opened, read or taken as they are, or that have no label a network needs.
        NumericsError: a figure that is not finite.
    """
    _check(command)
    run = expand(command.run)
    config = read_config(run)
    if config is None:
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    make_strata(config.diffusion.num_timesteps, command.every)  # says so before anything is loaded if it cannot
    of_features = [name for name in dict.fromkeys(command.metrics) if name not in METRICS]
    out = writable_folder(expand(command.out) if command.out else run / "evaluation", "output folder")
    precision, why = settle_precision(command.precision)
    acc = make_accelerator(precision)
    main = acc.is_main_process
    pipeline = load_pipeline(str(run), acc.device)
    pipeline.unet.requires_grad_(False)
    pipeline.unet.cast_weights(DTYPES[precision])
    if main and why is not None:
        print(f"precision  {precision}: {why}", file=sys.stderr)
    record: dict[str, Any] = {}
    if of_features:
        record |= _measure_features(command, config, pipeline, of_features, DTYPES[precision], out, main)
    if len(of_features) < len(set(command.metrics)):
        record |= _measure_likelihoods(command, config, pipeline, precision, out, main)
    if main:
        print(to_json(record))
    return 0


def _measure_features(
    command: "EvaluateCommand",
    config: Config,
    pipeline: Pipeline,
    metrics: Sequence[str],
    dtype: torch.dtype,
    out: Path,
    main: bool,
) -> dict[str, Any]:
    """Distances between features of samples and of real images."""
    split = command.split or (config.data.split if command.source is None else "train")
    real = open_split(config, pipeline, source=command.source, split=split, num=command.num)
    sampler = Sampler.of(
        pipeline.process,
        pipeline.unet,
        pipeline.schedule,
        sampler=command.sampler,
        num_steps=command.sampler_steps or min(50, pipeline.process.num_timesteps),
        guidance=command.guidance,
        dtype=dtype,
        seed=command.seed,
    )
    if main:
        print(f"images     {real.num} of split {real.split} of {real.source}", file=sys.stderr)
    device = pipeline.unet.device

    def say(line: str) -> None:
        if main:
            print(line, file=sys.stderr)

    extractor = open_extractor(
        command.features,
        device=device,
        data=open_split(config, pipeline, split=config.data.split).data if command.features == "classifier" else None,
        weights=command.features_weights,
        download=command.features_download,
        epochs=command.features_epochs,
        say=say,
    )
    quality = measure_quality(
        metrics,
        sampler,
        real.data,
        real.rows,
        extractor,
        num_samples=command.num_samples,
        shape=pipeline.shape,
        device=device,
        batch_size=command.batch_size,
        seed=command.seed,
        progress=main,
        say=say,
    )
    record: dict[str, Any] = dict(quality.figures)
    record["features"] = quality.facts | {"source": real.source, "split": real.split}
    if main:
        print("\n".join([*quality.remarks, quality.table()]), file=sys.stderr)
        write_json(out / "quality.json", json.loads(to_json(record)))
        save_picture(grid(quality.pictures), out / "quality.png")
        print(f"samples    {out / 'quality.png'}", file=sys.stderr)
    return record


def _measure_likelihoods(
    command: "EvaluateCommand", config: Config, pipeline: Pipeline, precision: str, out: Path, main: bool
) -> dict[str, Any]:
    """The bound, and the likelihood by the ODE, of images of the split."""
    images = open_split(config, pipeline, source=command.source, split=command.split, num=command.num)
    if main:
        print("\n".join(images.remarks), file=sys.stderr)
    facts = {"source": images.source, "split": images.split, "seed": command.seed, "precision": precision}
    title = f"{expand(command.run).resolve().name}: {images.num} images of {images.split}"
    record: dict[str, Any] = {}
    for metric in [name for name in dict.fromkeys(command.metrics) if name in METRICS]:
        figures = METRICS[metric](command, pipeline, images, DTYPES[precision], main)
        record[metric] = figures.summary() | {"split": images.split}
        if main:
            details = {metric: record[metric]} | figures.details() | facts
            write_json(out / f"{metric}.json", json.loads(to_json(details)))
            print(figures.table(), file=sys.stderr)
            if (plot := figures.plot(title)) is not None:
                save_picture(plot, out / f"{metric}.png")
                print(f"curve      {out / f'{metric}.png'}", file=sys.stderr)
    return record


def _check(command: "EvaluateCommand") -> None:
    if not command.metrics:
        raise ConfigError(f"--metrics is empty: valid are {', '.join((*METRICS, *FEATURE_METRICS))}")
    for name, value in (
        ("num", command.num),
        ("batch-size", command.batch_size),
        ("every", command.every),
        ("steps", command.steps),
        ("probes", command.probes),
        ("num-samples", command.num_samples),
        ("sampler-steps", command.sampler_steps),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}: it must be at least 1")
    check_seed(command.seed)


@dataclass
class SplitImages:
    """The images that are measured, numbered 0 .. num - 1: a split's rows in ascending order."""

    data: ImageData
    rows: np.ndarray
    """int64 [num], as ImageData numbers rows."""
    source: str
    split: str
    remarks: list[str]
    """What has to be said of them."""
    num_classes: int | None
    """Of a conditional network."""
    no_class: int | None
    """What a conditional network is told of an image without a label, if it has learned that."""

    @property
    def num(self) -> int:
        return len(self.rows)

    def read(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Images first .. last - 1 as uint8 [n, C, H, W], and the labels int64 [n] that the network is told.

        Raises:
            DataError: an image that cannot be used, or without a label that the network knows.
        """
        rows = self.rows[first:last]
        batch = self.data.decode_rows(rows)
        if self.num_classes is None:
            return batch.images.to(device), None
        if batch.labels is None:
            raise DataError(f"{self.source} has no labels, and the run is conditional: give another --source")
        labels = batch.labels.clone()
        if self.no_class is not None:
            labels[labels == -1] = self.no_class
        known = (batch.labels < self.num_classes) & (labels >= 0)
        if not known.all():
            place = int((~known).nonzero()[0])
            raise DataError(
                f"{self.data.name_row(int(rows[place]))} has the label {int(batch.labels[place])}: the network knows "
                f"0 .. {self.num_classes - 1}"
            )
        return batch.images.to(device), labels.to(device)


def open_split(
    config: Config, pipeline: Pipeline, *, source: str | None = None, split: str | None = None, num: int | None = None
) -> SplitImages:
    """The first `num` images of a split (all if None) of the run's own source or of another.

    Images are never mirrored. The bound is one on the pixels that the model has: where the run scales or cuts images to
    its size a remark says so, elsewhere images of another size are refused.

    Args:
        split: None: test, but of the digits, which have no other, the images the run was trained on.

    Raises:
        ConfigError, DataError: as open_data; more images are asked for than there are.
    """
    own = config.data
    name = source or own.source
    only = name == "digits" and split is None
    chosen = split or ("train" if only else "test")
    if source is None:
        # Every row once: no shares of a mixture, and of a stream one lane, whose epochs leave nothing out.
        data_config = dataclasses.replace(own, split=chosen, weights=(), bad_image="error", lanes=1)
    else:
        data_config = DataConfig(source=source, split=chosen, fit=own.fit, background=own.background)
    channels, height, width = pipeline.shape
    data = open_data(data_config, (height, width), channels)
    if data.num_images is None:
        raise ConfigError(f"{name}: the stream does not tell how many images it has: give another --source")
    if num is not None and num > data.num_images:
        raise ConfigError(f"--num is {num}: split {chosen} of {name} has {data.num_images} images")
    rows = data.rows_at(np.arange(data.num_images), 0)
    assert rows is not None  # the number of images is known
    rows = np.sort(rows)[:num]
    which = "" if len(rows) == data.num_images else f"the first {len(rows)} of "
    remarks = [f"images     {which}split {chosen} of {name}: {data.num_images} images, {width}x{height}"]
    if only:
        remarks.append("           the digits have no test split: the run was trained on these images")
    elif chosen == own.split and name == own.source:
        remarks.append("           the run was trained on this split")
    if data_config.fit != "exact":
        remarks.append(
            f"           images of another size are brought to {width}x{height} (fit {data_config.fit}): bits/dim are "
            "of these pixels and compare with those of the same scaling only"
        )
    if (colour := _other_channels(data_config, data, rows[:_LOOKED_AT])) is not None:
        remarks.append(f"           {colour}")
    if data.warning:
        remarks.append(f"warning    {data.warning}")
    no_class = pipeline.num_classes if pipeline.process.label_dropout > 0 else None
    return SplitImages(data, rows, name, chosen, remarks, pipeline.num_classes, no_class)


def _other_channels(config: DataConfig, data: ImageData, rows: np.ndarray) -> str | None:
    """What to say where images of `rows` are in colour and the model is not, or the other way round.

    Raises:
        DataError: an image that cannot be used.
    """
    images = data.decode_rows(rows).images
    if data.channels == 3 and (images == images[:, :1]).all():
        return "images are gray: the model has three channels and counts each value three times"
    if data.channels == 1 and config.source != "digits":
        with contextlib.suppress(DataError):  # which columns of arrays are not in colour
            images = open_data(config, data.size, 3).decode_rows(rows).images
        if not (images == images[:, :1]).all():
            return "images are in colour: the model is gray, and bits/dim are of their brightness"
    return None


def network_of(
    unet: UNet, process: ProcessConfig, schedule: NoiseSchedule, labels: Tensor | None, dtype: torch.dtype
) -> Network:
    """The network of a batch as the bound asks it: with the batch's labels, in its dtype.

    One that was trained on its own estimate is asked twice, the second time with the x_0_hat that it gave without one:
    an estimate of the step before, as in sampling, would not be a function of x_t.
    """
    told = {} if labels is None else {"class_labels": labels}

    def ask(x_t: Tensor, t: Tensor) -> Tensor:
        return unet(x_t.to(dtype), t, return_dict=False, **told)[0]

    def ask_twice(x_t: Tensor, t: Tensor) -> Tensor:
        first = ask(torch.cat((x_t, torch.zeros_like(x_t)), dim=1), t)
        estimate = _estimate(process, schedule, x_t, t, first[:, : x_t.shape[1]].to(x_t.dtype))
        return ask(torch.cat((x_t, estimate), dim=1), t)

    return ask_twice if process.self_conditioning else ask


def _estimate(process: ProcessConfig, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """x_0_hat, clipped as the process says, at t that may lie between two timesteps."""
    near, beyond = t.floor().long(), t.ceil().long()
    x_0_hat = schedule.predict_x_0(x_t, near, prediction, process.prediction)
    if t.is_floating_point():
        share = (t - near).view(-1, 1, 1, 1)
        x_0_hat = torch.lerp(x_0_hat, schedule.predict_x_0(x_t, beyond, prediction, process.prediction), share)
    return x_0_hat.clamp(-process.clip_range, process.clip_range) if process.clip else x_0_hat


@dataclass(frozen=True)
class BoundFigures:
    """The bound of a set of images, in bits per dimension, as measured."""

    prior: np.ndarray
    """float64 [num]: L_T of each image."""
    middle: np.ndarray
    """float64 [num]: the sum of its L_t, t = 1 .. T-1."""
    first: np.ndarray
    """float64 [num]: its L_0."""
    parts: np.ndarray
    """float64 [T]: what timestep t adds to the sum over images, of those that were measured at it."""
    counts: np.ndarray
    """int64 [T]: images that were measured at t."""
    sizes: np.ndarray
    """int64 [T]: timesteps that t stood for."""

    @cached_property
    def totals(self) -> np.ndarray:
        """float64 [num]: the bound of each image."""
        return self.prior + self.middle + self.first

    @property
    def curve(self) -> np.ndarray:
        """float64 [T]: mean L_t, NaN where no image was measured."""
        weight = np.where(self.counts > 0, self.counts * self.sizes, np.nan)
        return self.parts / weight

    @property
    def quartiles(self) -> list[tuple[int, int, float]]:
        """(first t, last t, bits per dimension) of each quarter of 0 .. T-1 that has a timestep."""
        total = len(self.parts)
        edges = [-(-total * q // QUARTILES) for q in range(QUARTILES + 1)]
        return [
            (first, end - 1, math.fsum(self.parts[first:end]) / len(self.prior))
            for first, end in itertools.pairwise(edges)
            if end > first
        ]

    def summary(self) -> dict[str, Any]:
        """L_T, L_t (their sum over t = 1 .. T-1) and L_0, their sum, and its standard error over images.

        Raises:
            NumericsError: if one is not finite.
        """
        means = {"L_T": _mean(self.prior), "L_t": _mean(self.middle), "L_0": _mean(self.first)}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NumericsError(f"{name} of the bound is {mean}: the network's predictions are not finite")
        total = means["L_T"] + means["L_t"] + means["L_0"]
        return {**means, "total_bits_per_dim": total, "stderr": _stderr(self.totals), "num_images": len(self.prior)}

    def details(self) -> dict[str, Any]:
        """Plain values beside the summary: quartiles of t, and the mean L_t by t (NaN where not measured)."""
        return {
            "quartiles": [{"first_t": a, "last_t": b, "bits_per_dim": bits} for a, b, bits in self.quartiles],
            "bits_per_dim_by_t": self.curve.tolist(),
            "num_images_by_t": self.counts.tolist(),
            "every": int(self.sizes.max()),
        }

    def table(self) -> str:
        """The terms and the quartiles of t as lines for people."""
        summary = self.summary()
        total, stderr = summary["total_bits_per_dim"], summary["stderr"]
        rows = [(f"t = {first} .. {last}", bits) for first, last, bits in self.quartiles]
        rows += [("L_T", summary["L_T"]), ("L_t", summary["L_t"]), ("L_0", summary["L_0"]), ("total", total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}  {'bits/dim':>12}  {'share':>7}"]
        lines += [
            f"{name:{width}}  {bits:{'12.6f' if abs(bits) >= 1e-4 else '12.2e'}}  {bits / total:7.1%}"
            for name, bits in rows
        ]
        lines[-1] += "" if stderr is None else f"  +- {stderr:.6f} over {summary['num_images']} images"
        lines.insert(len(rows) - 3, "")
        return "\n".join(lines)

    def plot(self, title: str) -> Image.Image | None:
        """L_t by t as a picture, on a logarithmic axis."""
        known = self.counts > 0
        curves = {"L_t": (np.flatnonzero(known), self.curve[known])}
        return curve_plot(curves, title=title, x_label="t", y_label="L_t in bits/dim", log_y=True)


@dataclass(frozen=True)
class LikelihoodFigures:
    """Negative log-likelihoods under the probability-flow ODE, in bits per dimension."""

    bits: np.ndarray
    """float64 [num, probes]."""
    num_steps: int

    def summary(self) -> dict[str, Any]:
        """Mean, its standard error over images, and of that what the estimate of the divergence adds.

        Raises:
            NumericsError: if the mean is not finite.
        """
        num, probes = self.bits.shape
        mean = _mean(self.bits.mean(1))
        if not math.isfinite(mean):
            raise NumericsError(f"the log-likelihood is {mean}: the network's predictions are not finite")
        hutchinson = None
        if probes > 1:
            hutchinson = math.sqrt(math.fsum(self.bits.var(1, ddof=1) / probes)) / num
        return {
            "bits_per_dim": mean,
            "stderr": _stderr(self.bits.mean(1)),
            "hutchinson_stderr": hutchinson,
            "num_images": num,
            "steps": self.num_steps,
        }

    def details(self) -> dict[str, Any]:
        """Plain values beside the summary."""
        return {"probes": self.bits.shape[1]}

    def table(self) -> str:
        """The summary as a line for people."""
        summary = self.summary()
        errors = {"over images": summary["stderr"], "of the divergence": summary["hutchinson_stderr"]}
        shown = [f"+- {error:.6f} {name}" for name, error in errors.items() if error is not None]
        return "  ".join([f"ODE        {summary['bits_per_dim']:.6f} bits/dim", *shown])

    def plot(self, title: str) -> Image.Image | None:
        """There is nothing to plot."""
        return None


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _stderr(values: np.ndarray) -> float | None:
    """Standard error of the mean of values [num]; None of one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


class Figures(Protocol):
    """What a metric has measured."""

    def summary(self) -> dict[str, Any]: ...
    def details(self) -> dict[str, Any]: ...
    def table(self) -> str: ...
    def plot(self, title: str) -> Image.Image | None: ...


def measure_bound(
    pipeline: Pipeline,
    images: SplitImages,
    *,
    batch_size: int = 64,
    every: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> BoundFigures:
    """The bound of every image, measured by all ranks; all of them get the figures.

    Args:
        pipeline: in eval mode, on the device to work on.
        batch_size: images per network call.
        every: of make_strata.
        seed: of the noise.
        dtype: of the network's input.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        ConfigError, DataError: as make_strata and SplitImages.read.
    """
    process, schedule, device = pipeline.process, pipeline.schedule, pipeline.unet.device
    strata = make_strata(schedule.num_timesteps, every)
    batches = [(start, min(start + batch_size, images.num)) for start in range(0, images.num, batch_size)]
    prior, first = np.zeros(images.num), np.zeros(images.num)
    middle = np.zeros((images.num, _PARTS))
    parts = np.zeros((len(batches), schedule.num_timesteps))
    counts = np.zeros(schedule.num_timesteps)
    rank, world = _ranks()
    tasks = [(batch, part) for batch in range(len(batches)) for part in range(_PARTS)][rank::world]
    kept: dict[Any, Tensor] = {}
    last, x_0, labels = -1, None, None
    bar = make_bar("bound", "calls", sum(len(strata[part::_PARTS]) for _, part in tasks), enabled=progress)
    with bar, pipeline.unet.frozen(kept):
        for batch, part in tasks:
            start, end = batches[batch]
            if batch != last:
                last, (x_0, labels) = batch, images.read(start, end, device)
            assert x_0 is not None
            if part == 0:
                wide = torch.float32 if device.type == "mps" else torch.float64
                prior[start:end] = _host(prior_term(schedule, x_0, wide))
            network = network_of(pipeline.unet, process, schedule, labels, dtype)
            numbers = torch.arange(start, end)
            found = []
            for terms in bound_terms(process, schedule, network, x_0, numbers, strata[part::_PARTS], seed=seed):
                found.append(terms)
                bar.update()
            # Read once, when all of the part is under way.
            values = _host(torch.stack([terms.values for terms in found])) if found else ()
            for terms, value in zip(found, values, strict=True):
                weighted = value * terms.stratum.size
                np.add.at(parts[batch], terms.t.numpy(), weighted)
                np.add.at(counts, terms.t.numpy(), 1)
                if terms.stratum.first == 0:
                    first[start:end] = value
                else:
                    middle[start:end, part] += weighted
    # Each entry was filled by one process and is 0 in the others: adding them up rounds nothing.
    prior, first, middle, parts, counts = (
        _over_ranks(array, device) for array in (prior, first, middle, parts, counts)
    )
    sizes = np.concatenate([np.full(stratum.size, stratum.size) for stratum in strata])
    nats = 1 / math.log(2)
    return BoundFigures(
        prior * nats, middle.sum(1) * nats, first * nats, parts.sum(0) * nats, counts.astype(np.int64), sizes
    )


def measure_likelihood(
    pipeline: Pipeline,
    images: SplitImages,
    *,
    batch_size: int = 64,
    num_steps: int = 50,
    num_probes: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> LikelihoodFigures:
    """log p of every image under the probability-flow ODE, measured by all ranks; all of them get the figures.

    Arguments and errors as for measure_bound and ode_log_likelihood.
    """
    process, schedule, device = pipeline.process, pipeline.schedule, pipeline.unet.device
    bits = np.zeros((images.num, num_probes))
    rank, world = _ranks()
    starts = range(0, images.num, batch_size)[rank::world]
    wide = torch.float32 if device.type == "mps" else torch.float64
    bar = make_bar("likelihood", "calls", 4 * num_steps * len(starts), enabled=progress)
    with bar:
        for start in starts:
            end = min(start + batch_size, images.num)
            x_0, labels = images.read(start, end, device)
            network = network_of(pipeline.unet, process, schedule, labels, dtype)

            def counted(x_t: Tensor, t: Tensor, network: Network = network) -> Tensor:
                bar.update()
                return network(x_t.float(), t)

            numbers = torch.arange(start, end, device=device)
            channels, height, width = x_0.shape[1:]
            x = dequantise(x_0, numbers, seed=seed, dtype=wide)
            probes = draw_probes(numbers, (channels, height, width), num_probes, seed=seed)
            log_p = ode_log_likelihood(process, schedule, counted, x, probes, num_steps=num_steps)
            bits[start:end] = _host(log_p).T / (-math.log(2) * x[0].numel()) + BITS_OF_BIN
    return LikelihoodFigures(_over_ranks(bits, device), num_steps)


METRICS: dict[str, Callable[["EvaluateCommand", Pipeline, SplitImages, torch.dtype, bool], Figures]] = {
    "nll": lambda command, pipeline, images, dtype, progress: measure_bound(
        pipeline,
        images,
        batch_size=command.batch_size,
        every=command.every,
        seed=command.seed,
        dtype=dtype,
        progress=progress,
    ),
    "nll_ode": lambda command, pipeline, images, dtype, progress: measure_likelihood(
        pipeline,
        images,
        batch_size=command.batch_size,
        num_steps=command.steps,
        num_probes=command.probes,
        seed=command.seed,
        dtype=dtype,
        progress=progress,
    ),
}


def _ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def _over_ranks(array: np.ndarray, device: torch.device) -> np.ndarray:
    """The float64 sum over all processes."""
    if _ranks()[1] == 1:
        return array
    tensor = torch.from_numpy(array).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
