"""Features of images, by which sets of them are compared: networks by name, and statistics of real images kept on disk.

An extractor takes 8-bit pixels and gives the activations before a network's last layer, and the class logits where it
has classes. `classifier` needs no download: a small convolutional network that is trained here on the data set's own
labels and kept beside the decoded images (cache.py). `inception` is the Inception-v3 of Heusel et al. 2017 ("GANs
Trained by a Two Time-Scale Update Rule ...") with its TensorFlow weights, by torch-fidelity, of which torchmetrics'
is a subclass. `torchvision:NAME` and `timm:NAME` take a file of weights. Images are brought to those models' size by
an antialiased bicubic filter (Parmar et al. 2022, "On Aliased Resizing ... in GAN Evaluation").

Whatever is kept is a safetensors file with a digest of its content: a damaged one is made anew. Its key is everything
that it depends on, so that nothing has to be compared when it is read. Files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .data import ImageData
from .errors import CheckpointError, ConfigError, DataError
from .files import expand, replace_file, sha256, write_json
from .library import one_line
from .metrics import FeatureSums
from .order import Purpose, derive_key, permute, random_words
from .stored import digest_of, held

_VERSION = 1  # of the classifier, its training and of how images reach a network: raise it when one of them changes
_FOLDER = "fastddpm-features"
_READ = 512  # images that are decoded together

EPOCHS = 24
"""Of the classifier: 98 % of held-out digits, in 6 s of one core, which 45,000 images of 16x16 take 20 s an epoch."""
MOST_IMAGES = 200_000
"""That the classifier is trained on."""
MOST_BYTES = 2 << 30
"""Of pixels that it is trained on: they are held in memory."""
_HELD_OUT = 10  # one in so many
_FEWEST = 20  # labelled images
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP = 3e-3, 0.02, 0.1
# Seeds of what has nothing to do with a run's: every run on the same data shares one classifier.
_ORDER_SEED, _WEIGHTS_SEED, _SHIFTS_SEED = 0, 1, 2

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""uint8 [N, C, H, W] on the device -> features float [N, D] and logits [N, K] or None."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Extractor:
    """A network that turns 8-bit images into features; open_extractor makes it."""

    name: str
    version: str
    """Of its code and weights: two of the same name and version give the same features up to rounding."""
    dim: int
    """D."""
    num_classes: int | None
    """K; None: no probabilities."""
    device: torch.device
    forward: Forward = field(repr=False)
    shape: tuple[int, int, int] | None = None
    """(H, W, C) of the only images it takes; None: gray and RGB images of any size."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else there is to say of it in a result: plain values."""
    remarks: tuple[str, ...] = ()
    """Lines for people."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [N, D] and logits float32 [N, K] (None where there are no classes), on the device.

        images: uint8 [N, H, W, C] on any device, in any memory order: what has not been rounded to 8 bits has no
        features. All arithmetic is fp32 without TF32, and no layer looks at more than one image, so that features do
        not depend on the batch beyond rounding.

        Raises:
            TypeError: for another dtype or number of dimensions.
            ConfigError: images of another size or number of channels than the network's.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(f"images are {images.dtype} {list(images.shape)}: features are of uint8 [N, H, W, C]")
        self._check_shape(tuple(images.shape[1:]))
        pixels = images.to(self.device).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad(), _plain_fp32(self.device):
            features, logits = self.forward(pixels)
            return features.float(), None if logits is None else logits.float()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.shape is not None and shape != self.shape:
            raise ConfigError(
                f"--features {self.name} is of {_shape(self.shape)} images and these are {_shape(shape)}: train one on "
                "images of this size, or choose other features"
            )
        if self.shape is None and shape[2] not in (1, 3):
            raise ConfigError(f"--features {self.name} takes gray or RGB images and these have {shape[2]} channels")


def _shape(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height}x{channels}"


@contextlib.contextmanager
def _plain_fp32(device: torch.device) -> Iterator[None]:
    """Products in fp32 without TF32, deterministic convolutions, no autocast, whatever the run has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Request(NamedTuple):
    """What open_extractor was asked for."""

    name: str
    model: str
    """What follows the colon of the name."""
    device: torch.device
    data: ImageData | None
    weights: Path | None
    download: bool
    epochs: int
    say: Callable[[str], object]


def open_extractor(
    name: str,
    *,
    device: torch.device | str,
    data: ImageData | None = None,
    weights: str | None = None,
    download: bool = False,
    epochs: int = EPOCHS,
    say: Callable[[str], object] = _to_stderr,
) -> Extractor:
    """The extractor of a name: classifier, inception, torchvision:NAME or timm:NAME.

    Args:
        data: labelled images at the model's resolution that `classifier` is trained on, where nobody has done so yet.
            Training mirrors them where data.config.flip says so.
        weights: a local file: of torch-fidelity's Inception (.pth), of the torchvision or timm model (safetensors, or
            what torch.load reads with weights_only=True), or of a classifier that was trained elsewhere.
        download: let torch-fidelity download its weights; nothing else is ever downloaded.
        epochs: of the classifier's training.
        say: told, in a line, of work that takes long.

    Raises:
        ConfigError: a name that is not known, an extractor that is not installed, weights that cannot be had.
        CheckpointError: weights that cannot be read or are another network's.
        DataError: images without labels, too few of them, images that cannot be used.
    """
    kind, colon, model = name.partition(":")
    if kind not in EXTRACTORS or bool(model) != bool(colon) or bool(model) != (kind in _NAMED):
        valid = ", ".join(f"{known}:NAME" if known in _NAMED else known for known in EXTRACTORS)
        raise ConfigError(f"--features is {name!r}: valid are {valid}")
    if epochs < 1:
        raise ConfigError(f"--features-epochs is {epochs}: it must be at least 1")
    path = None if weights is None else expand(weights)
    if path is not None and not path.is_file():
        raise ConfigError(f"--features-weights {path}: there is no such file")
    request = Request(name, model, torch.device(device), data, path, download, epochs, say)
    with torch.random.fork_rng(devices=[]):  # libraries draw initial weights
        return EXTRACTORS[kind](request)


# What is kept


class _Kept(NamedTuple):
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]
    path: Path | None


def _kept(kind: str, identity: dict[str, Any], compute: Callable[[], tuple[dict[str, np.ndarray], dict]]) -> _Kept:
    """What `compute` returns, arrays and plain values, from the file of `identity` where there is a sound one.

    Processes of a machine wait for the first of them to write it. Where nothing can be written, each computes.
    """
    if not datasets.is_caching_enabled():
        arrays, about = compute()
        return _Kept(arrays, identity | about, None)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER
    path = folder / f"{kind}-{digest_of(identity, _VERSION)}.safetensors"
    if (found := _read(path)) is not None:
        return found
    with held(path.with_suffix(".lock")):
        if (found := _read(path)) is not None:  # another process has written it in the meantime
            return found
        arrays, about = compute()
        about = identity | about
        try:
            _write(path, arrays, about)
        except (OSError, SafetensorError):
            return _Kept(arrays, about, None)
    return _Kept(arrays, about, path)


def _content(arrays: dict[str, np.ndarray], about: str) -> str:
    return digest_of(about, *(part for name in sorted(arrays) for part in (name, arrays[name])))


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    text = json.dumps(about, sort_keys=True)
    metadata = {"about": text, "content": _content(arrays, text)}
    replace_file(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)  # as other files: a shared cache is for all who may read it
    write_json(path.with_suffix(".json"), about)  # for people: nothing reads it


def _read(path: Path) -> _Kept | None:
    """None where there is no file, or one that is damaged or a stranger's."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    about = metadata.get("about", "")
    return _Kept(arrays, json.loads(about), path) if metadata.get("content") == _content(arrays, about) else None


def identity_of(data: ImageData) -> dict[str, Any]:
    """What pixels and labels depend on, plain values: the data set's content, split, columns, size and scaling."""
    config = data.config
    return {
        "data": data.identity,
        # Of a map-style set: a digest by the library of all that it was made from.
        "fingerprint": getattr(data._source.dataset, "_fingerprint", None),
        "split": config.split,
        "columns": [config.image_column, data.label_column],
        "size": list(data.size),
        "channels": data.channels,
        "fit": config.fit,
        "background": config.background,
    }


# The classifier


class Classifier(nn.Module):
    """Convolutions of 3x3 down to about 8x8 (4x4 of images up to 8x8), the mean over what is left, a linear layer.

    size: (H, W), channels: C, num_classes: K. The convolutions double their channels up to D with each halving, each
    is followed by a group norm of groups of 8 channels and a SiLU; D is 64 for images up to 16 pixels, else 256.
    """

    def __init__(self, size: tuple[int, int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.dim = 64 if max(size) <= 16 else 256
        halvings = max(1, math.ceil(math.log2(max(size) / 8)))
        strides = [1] + [2] * halvings + [1] * max(1, 3 - halvings)
        widths = [channels] + [min(self.dim, 32 << number) for number in range(len(strides))]
        widths[-1] = self.dim
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False) for i, stride in enumerate(strides)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(width // 8, width) for width in widths[1:])
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, K] of x [N, C, H, W], about -1 .. 1."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        features = x.mean(dim=(2, 3))
        return features, self.head(features)


def _make_classifier(size: tuple[int, int], channels: int, num_classes: int, device: torch.device) -> Classifier:
    """A classifier whose weights are not set."""
    with torch.device("meta"):  # no draws from the global generator
        net = Classifier(size, channels, num_classes)
    return net.to_empty(device=device)


def _uniform(seed: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1), the same on every machine: splitmix64 from the key of (seed, number)."""
    index = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return (random_words(derive_key(seed, number, Purpose.ROWS), index) >> np.uint64(11)) * 2.0**-53


def _set_weights(net: Classifier) -> None:
    """Kernels uniform with variance 2 / fan_in (He et al. 2015), the last layer's a tenth of that in size."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(net.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.startswith("norms") and name.endswith("weight") else 0.0)
                continue
            bound = math.sqrt(6 / parameter[0].numel()) * (0.1 if name.startswith("head") else 1.0)
            draws = (2 * _uniform(_WEIGHTS_SEED, number, tuple(parameter.shape)) - 1) * bound
            parameter.copy_(torch.from_numpy(draws.astype(np.float32)))


def _scaled(images: Tensor) -> Tensor:
    """uint8 to float32, -1 .. 1."""
    return images.float() / 127.5 - 1


def _moved(x: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Images x [N, C, H, W] moved by so many pixels (int64 [N]), edges repeated, mirrored where told (bool [N])."""
    n, _, height, width = x.shape
    rows = (torch.arange(height, device=x.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) - right[:, None]).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    every = torch.arange(n, device=x.device)[:, None, None]
    # Indices with the channels' slice between them: the result is [N, H, W, C].
    return x[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def train_classifier(
    images: Tensor, classes: Tensor, num_classes: int, *, epochs: int, flip: bool, device: torch.device
) -> tuple[Classifier, float, int]:
    """A classifier of uint8 images [N, C, H, W] and classes int64 [N] (0 .. K-1), both on the host.

    One image in ten is held out. AdamW with a linear warm-up and a cosine to zero over batches of 64 (256 of sets of
    10,000 or more), images moved by up to an eighth of their size and mirrored where `flip`. Weights, order and
    augmentation come from integer arithmetic alone, so that a second training gives the same weights, and one on
    another machine the same but for rounding and what that grows into. No global random state is read or changed.

    Returns:
        The network, the share of held-out images whose class it gives, and their number.
    """
    n, (channels, height, width) = len(images), images.shape[1:]
    net = _make_classifier((height, width), channels, num_classes, device)
    _set_weights(net)
    order = permute(np.arange(n), n, derive_key(_ORDER_SEED, 0, Purpose.ROWS))
    held, rows = np.split(order, [n // _HELD_OUT])
    batch_size = min(len(rows), 64 if n < 10_000 else 256)
    per_epoch = len(rows) // batch_size
    steps, reach = epochs * per_epoch, max(1, max(height, width) // 8)
    images, classes = images.to(device), classes.to(device)
    with torch.enable_grad(), _plain_fp32(device):
        decayed = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        )
        for epoch in range(1, epochs + 1):
            places = permute(np.arange(len(rows)), len(rows), derive_key(_ORDER_SEED, epoch, Purpose.ROWS))
            taken = torch.from_numpy(rows[places]).to(device)
            draws = _uniform(_SHIFTS_SEED, epoch, (3, len(rows)))
            moves = torch.from_numpy(np.floor(draws[:2] * (2 * reach + 1)).astype(np.int64) - reach).to(device)
            mirrored = torch.from_numpy((draws[2] < 0.5) & flip).to(device)
            for number in range(per_epoch):
                done = ((epoch - 1) * per_epoch + number + 0.5) / steps
                share = done / _WARMUP if done < _WARMUP else 0.5 + 0.5 * math.cos(math.pi * (done - _WARMUP) / 0.9)
                for group in optimizer.param_groups:
                    group["lr"] = _LEARNING_RATE * share
                part = slice(number * batch_size, (number + 1) * batch_size)
                x = _moved(_scaled(images[taken[part]]), moves[0, part], moves[1, part], mirrored[part])
                loss = F.cross_entropy(net(x)[1], classes[taken[part]])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    net.requires_grad_(False)
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), _plain_fp32(device):
        for first in range(0, len(held), _READ):
            some = torch.from_numpy(held[first : first + _READ]).to(device)
            right += (net(_scaled(images[some]))[1].argmax(1) == classes[some]).sum()
    return net, int(right) / max(1, len(held)), len(held)


def _read_labelled(data: ImageData) -> tuple[Tensor, Tensor, list[int]]:
    """Labelled images uint8 [N, C, H, W], their classes int64 [N], and the label of each class.

    Raises:
        DataError: no labels, too few images or classes for a classifier, an image that cannot be used.
    """
    name, split = data.config.source, data.config.split
    other = "choose other --features, or train them on another source"
    if data.num_images is None:
        raise DataError(f"{name}: the stream does not tell how many images it has, for --features classifier: {other}")
    if data.label_column is None:
        raise DataError(f"{name} has no labels, which --features classifier is trained on: {other}")
    found = data.rows_at(np.arange(data.num_images), 0)
    assert found is not None  # the number of images is known
    rows = np.unique(found)
    height, width = data.size
    most = min(len(rows), MOST_IMAGES, max(_FEWEST, MOST_BYTES // (height * width * data.channels)))
    chosen = np.sort(rows[permute(np.arange(most), len(rows), derive_key(_ORDER_SEED, 0, Purpose.SOURCES))])
    images, labels = [], []
    for first in range(0, most, _READ):
        batch = data.decode_rows(chosen[first : first + _READ])
        assert batch.labels is not None  # there is a column of them
        labelled = batch.labels >= 0
        images.append(batch.images[labelled].contiguous())
        labels.append(batch.labels[labelled])
    values, classes = torch.unique(torch.cat(labels), return_inverse=True)
    if len(classes) < _FEWEST:
        raise DataError(
            f"split {split} of {name} has {len(classes)} labelled images, too few to train --features classifier "
            f"(at least {_FEWEST}): {other}"
        )
    if not 2 <= len(values) <= len(classes) // 2:
        raise DataError(
            f"split {split} of {name} has {len(values)} different label{'s'[: len(values) != 1]} in {len(classes)} "
            f"images (column {data.label_column}): --features classifier needs from 2 to half as many; {other}, "
            "without a filter that leaves one class"
        )
    return torch.cat(images), classes, values.tolist()


def _open_classifier(request: Request) -> Extractor:
    """A small network that is trained on the data set's own labels, once."""
    data = request.data
    if request.weights is not None:
        kept = _read(request.weights)
        if kept is None or kept.about.get("what") != "classifier":
            raise CheckpointError(f"{request.weights} is not a classifier that this program has written, or is damaged")
        if kept.about["code"] != _VERSION:
            raise CheckpointError(
                f"{request.weights} is a classifier of version {kept.about['code']} of the code, which is at "
                f"{_VERSION}: train it anew"
            )
    elif data is None:
        raise ConfigError("--features classifier has no images to be trained on: name a labelled source, or a file")
    else:
        flip = bool(data.config.flip)
        identity = identity_of(data) | {"epochs": request.epochs, "flip": flip, "code": _VERSION, "what": "classifier"}
        kept = _kept("classifier", identity, lambda: _train(request, data, flip))
    arrays, about, path = kept
    height, width = about["size"]
    net = _make_classifier((height, width), about["channels"], len(about["labels"]), request.device)
    net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    net.requires_grad_(False).eval()
    version = f"{_VERSION}-{digest_of(*(part for name in sorted(arrays) for part in (name, arrays[name])))[:16]}"
    facts = {key: about[key] for key in ("accuracy", "held_out", "trained_on", "source", "split")}
    line = (
        f"classifier {about['accuracy']:.1%} right of {about['held_out']} held-out images of split {about['split']} of "
        f"{about['source']}; {net.dim} features, version {version}"
    )
    return Extractor(
        request.name,
        version,
        net.dim,
        len(about["labels"]),
        request.device,
        lambda images: net(_scaled(images)),
        (height, width, about["channels"]),
        facts | {"file": None if path is None else str(path)},
        (line,),
    )


def _train(request: Request, data: ImageData, flip: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    images, classes, labels = _read_labelled(data)
    request.say(
        f"classifier training on {len(images)} labelled images of split {data.config.split} of {data.config.source}, "
        f"{request.epochs} epochs; kept for later"
    )
    start = time.perf_counter()
    net, accuracy, held_out = train_classifier(
        images, classes, len(labels), epochs=request.epochs, flip=flip, device=request.device
    )
    about = {
        "accuracy": accuracy,
        "held_out": held_out,
        "trained_on": len(images) - held_out,
        "labels": labels,
        "source": data.config.source,
        "seconds": round(time.perf_counter() - start, 2),
        "device": request.device.type,
        "torch": torch.__version__,
    }
    return {name: tensor.cpu().numpy() for name, tensor in net.state_dict().items()}, about


# Networks of other libraries


def _import(module: str, request: Request, library: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision raises RuntimeError where its operators are another torch's
        why = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({one_line(error)})"
        )
        raise ConfigError(
            f"--features {request.name} needs {library}, which {why}: pip install 'fastddpm[eval]', or take --features "
            "classifier"
        ) from error


def _as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _open_inception(request: Request) -> Extractor:
    """Inception-v3 with TensorFlow's weights and its resizing: 2048 pooled features, 1008 logits without their bias."""
    fidelity = _import("torch_fidelity.feature_extractor_inceptionv3", request, "torch-fidelity")
    file = fidelity.URL_INCEPTION_V3.rpartition("/")[2]
    in_cache = Path(torch.hub.get_dir()) / "checkpoints" / file
    path = request.weights or in_cache
    if not path.is_file():
        if not request.download:
            raise ConfigError(
                f"--features inception has no weights: {in_cache} is not there; download {fidelity.URL_INCEPTION_V3} "
                "and give it as --features-weights FILE, or allow the download by --features-download"
            )
        request.say(f"inception  downloading {fidelity.URL_INCEPTION_V3}")
        try:
            torch.hub.load_state_dict_from_url(fidelity.URL_INCEPTION_V3, progress=False, check_hash=True)
        except Exception as error:  # of the network, or of the digest in the file's name
            raise ConfigError(
                f"{fidelity.URL_INCEPTION_V3} cannot be downloaded ({one_line(error)}): give the file as "
                "--features-weights FILE"
            ) from error
    try:
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # torch.load and load_state_dict raise many
        raise _not_the_weights(path, "torch-fidelity's Inception-v3", error) from error
    net.requires_grad_(False).eval().to(request.device)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(_as_rgb(images).contiguous())
        return features, logits

    version = f"{_VERSION}-{sha256(path)[:16]}"
    return Extractor("inception", version, 2048, 1008, request.device, forward, about={"file": str(path)})


def _not_the_weights(path: Path, what: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a file of weights of {what}: {one_line(error)}")


def _load_weights(request: Request) -> tuple[dict[str, Tensor], Path]:
    """Tensors by name of the local file; nothing is unpickled beyond tensors.

    Raises:
        ConfigError: where no file was given.
        CheckpointError: where it cannot be read.
    """
    path = request.weights
    if path is None:
        raise ConfigError(f"--features {request.name} has no weights: give a local file as --features-weights FILE")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), path
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            loaded = loaded.get(key, loaded) if isinstance(loaded.get(key), dict) else loaded
        return loaded, path
    except Exception as error:  # damaged archives raise many
        raise _not_the_weights(path, request.model, error) from error


def _prepared(size: tuple[int, int], mean: Any, std: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 [N, 1 or 3, H, W] to what a network takes: RGB at its size (H, W), (x / 255 - mean) / std per channel."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) for values in (mean, std))

    def prepare(images: Tensor) -> Tensor:
        x = _as_rgb(images).float()
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (x / 255 - mean) / std

    return prepare


def _probed(
    request: Request, forward: Forward, path: Path, library: Any, size: tuple[int, int], net: nn.Module
) -> Extractor:
    """The extractor of `forward`, whose D and K an image tells."""
    net.requires_grad_(False).eval().to(request.device)
    with torch.no_grad(), _plain_fp32(request.device):
        features, logits = forward(torch.zeros(1, 3, *size, dtype=torch.uint8, device=request.device))
    if features.ndim != 2:
        raise ConfigError(
            f"--features {request.name}: before its last layer the network has {list(features.shape[1:])} values per "
            "image, not a vector; choose another"
        )
    version = f"{_VERSION}-{sha256(path)[:16]}-{library.__version__.partition('+')[0]}"
    num_classes = None if logits is None else logits.shape[1]
    about = {"file": str(path), "input_size": list(size)}
    return Extractor(request.name, version, features.shape[1], num_classes, request.device, forward, about=about)


def _open_torchvision(request: Request) -> Extractor:
    """A classifier of torchvision: what its last linear layer is given, and what that gives."""
    vision = _import("torchvision", request, "torchvision")
    models = _import("torchvision.models", request, "torchvision")
    try:
        transform = models.get_model_weights(request.model).DEFAULT.transforms()
        size, mean, std = (transform.crop_size[0],) * 2, transform.mean, transform.std
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initial weights
            net = models.get_model(request.model, weights=None)
        if hasattr(net, "transform_input"):  # of Inception-v3 and GoogLeNet, whose weights are another framework's
            net.transform_input = True
    except Exception as error:  # ValueError of unknown names; of models that are no classifiers, anything
        raise ConfigError(f"--features {request.name}: not a classifier of torchvision: {one_line(error)}") from error
    state, path = _load_weights(request)
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise _not_the_weights(path, request.model, error) from error
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"--features {request.name}: the network has no linear layer; choose another")
    prepare, given = _prepared(size, mean, std, request.device), []
    linear[-1].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        given.clear()
        logits = net(prepare(images))
        return given.pop(), logits

    return _probed(request, forward, path, vision, size, net)


def _open_timm(request: Request) -> Extractor:
    """A network of timm (DINOv2's among them): its pooled features before the classifier, if it has one."""
    timm = _import("timm", request, "timm")
    state, path = _load_weights(request)
    try:
        # Given as pretrained weights they go through the model's own filter of names and are loaded strictly.
        net = timm.create_model(request.model, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except Exception as error:
        if not timm.is_model(request.model.partition(".")[0]):
            raise ConfigError(f"--features {request.name}: timm has no such model") from error
        raise _not_the_weights(path, request.model, error) from error
    found = timm.data.resolve_model_data_config(net)
    size = (found["input_size"][1], found["input_size"][2])
    prepare, last = _prepared(size, found["mean"], found["std"], request.device), net.get_classifier()

    def forward(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = net.forward_head(net.forward_features(prepare(images)), pre_logits=True)
        return features, last(features) if isinstance(last, nn.Linear) else None

    return _probed(request, forward, path, timm, size, net)


EXTRACTORS: dict[str, Callable[[Request], Extractor]] = {
    "classifier": _open_classifier,
    "inception": _open_inception,
    "torchvision": _open_torchvision,
    "timm": _open_timm,
}
_NAMED = ("torchvision", "timm")  # that are followed by a model's name


# Reference statistics


@dataclass(frozen=True)
class Reference:
    """Features of real images, as sums and, of some of them, one by one."""

    sums: FeatureSums
    features: Tensor
    """float32 [M, D], on the host."""
    about: dict[str, Any]
    """What they are of: plain values."""
    path: Path | None
    """The file that keeps them."""


def reference_statistics(
    data: ImageData,
    rows: np.ndarray,
    extractor: Extractor,
    *,
    num_features: int = 0,
    batch_size: int = 256,
    say: Callable[[str], object] = _to_stderr,
) -> Reference:
    """Feature sums of the images of `rows` (int64, as ImageData numbers rows), from the file that keeps them or anew.

    The key of the file: the data's identity, split, size, channels and scaling, the rows, the extractor's name and
    version, num_features and the code's version.

    Args:
        num_features: of so many of the images, or of all if there are fewer, the features are kept too (kernel
            distance, precision and recall need them): the same ones each time, from all over.
        say: told, in a line, of work that takes long.

    Raises:
        ConfigError: images of another size than the extractor's.
        DataError: an image that cannot be used.
    """
    extractor._check_shape((*data.size, data.channels))
    count = min(num_features, len(rows))
    name, split = data.config.source, data.config.split
    identity = identity_of(data) | {
        "what": "reference",
        "rows": digest_of(np.asarray(rows, dtype=np.int64)),
        "num_images": len(rows),
        "num_features": count,
        "extractor": extractor.name,
        "version": extractor.version,
        "code": _VERSION,
    }

    def compute() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        say(f"reference  {extractor.name} features of {len(rows)} images of split {split} of {name}; kept for later")
        chosen = np.zeros(len(rows), dtype=bool)
        if count:
            chosen[permute(np.arange(count), len(rows), derive_key(_ORDER_SEED, 0, Purpose.ROWS))] = True
        where = "cpu" if extractor.device.type == "mps" else extractor.device  # which has no float64
        sums, some = FeatureSums.zeros(extractor.dim, where), []
        for first in range(0, len(rows), batch_size):
            part = slice(first, first + batch_size)
            features, _ = extractor(data.decode_rows(rows[part]).images.permute(0, 2, 3, 1))
            sums.add(features)
            some.append(features[torch.from_numpy(chosen[part]).to(features.device)].cpu())
        kept = torch.cat(some) if some else torch.zeros(0, extractor.dim)
        return {"sums": sums.flat().cpu().numpy(), "features": kept.numpy()}, {"source": name}

    return _reference(_kept("reference", identity, compute))


def _reference(kept: _Kept) -> Reference:
    sums = FeatureSums.from_flat(torch.from_numpy(kept.arrays["sums"]))
    return Reference(sums, torch.from_numpy(kept.arrays["features"]), kept.about, kept.path)


def read_reference(path: str, extractor: Extractor, shape: tuple[int, int, int]) -> Reference:
    """Reference statistics from a file that reference_statistics has kept, perhaps on another machine.

    shape: (H, W, C) of the images that are compared with them.

    Raises:
        DataError: no such file, a damaged one, or statistics of images of another size or of another extractor.
    """
    file = expand(path)
    if not file.is_file():
        raise DataError(f"reference statistics {file}: there is no such file")
    kept = _read(file)
    if kept is None or kept.about.get("what") != "reference":
        raise DataError(f"{file} is damaged or does not hold reference statistics")
    of = (*kept.about["size"], kept.about["channels"])
    if of != shape:
        raise DataError(f"reference statistics {file} are of {_shape(of)} images and these are {_shape(shape)}")
    theirs, ours = (kept.about["extractor"], kept.about["version"]), (extractor.name, extractor.version)
    if theirs != ours:
        raise DataError(
            f"reference statistics {file} are of the features {theirs[0]} version {theirs[1]}, and these are "
            f"{ours[0]} version {ours[1]}"
        )
    return _reference(kept)
