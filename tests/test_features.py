"""Features of images: the classifier's training and its file, networks of other libraries, reference statistics."""

import dataclasses
import json
import math
import shutil
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_data import one_line, private_cache, write_folder, write_parquet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastddpm import features
from fastddpm.data import DataConfig, ImageData, open_data
from fastddpm.errors import CheckpointError, ConfigError
from fastddpm.features import (
    Classifier,
    Extractor,
    identity_of,
    open_extractor,
    read_reference,
    reference_statistics,
    train_classifier,
)
from fastddpm.order import Purpose, derive_key, permute

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DIGITS = DataConfig("digits", flip=False)
FEW = DataConfig("digits", flip=False, filter="label < 2")


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Trained once for the file, and never the user's."""
    folder = tmp_path_factory.mktemp("features")
    with private_cache(folder):
        yield folder / "cache"


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_data(DIGITS, (8, 8), 1)


@pytest.fixture(scope="module")
def classifier(digits) -> Extractor:
    return open_extractor("classifier", device="cpu", data=digits, epochs=8, say=quiet)


def pictures(n: int, size: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, size, size, channels), dtype=torch.uint8, generator=generator)


def folder_of_kept() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "fastddpm-features"


def kept_files(kind: str) -> set[Path]:
    return set(folder_of_kept().glob(f"{kind}-*.safetensors"))


def stripes(n: int) -> tuple[Tensor, Tensor]:
    """Rows or columns of light and dark, and which."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 100, (n, 1, 8, 8), generator=generator)
    rows = (torch.arange(8)[:, None] % 2 * 100).expand(8, 8)
    classes = torch.arange(n) % 2
    return (noise + torch.where(classes.bool()[:, None, None, None], rows, rows.T)).to(torch.uint8), classes


# The classifier


def test_held_out_digits_are_told_apart(classifier, digits):
    """Eight of the 24 epochs; the whole training is in the slow test."""
    assert (classifier.dim, classifier.num_classes, classifier.shape) == (64, 10, (8, 8, 1))
    assert classifier.about["accuracy"] >= 0.93 and classifier.about["held_out"] == 179
    assert classifier.about["trained_on"] == 1797 - 179
    (line,) = classifier.remarks
    assert f"{classifier.about['accuracy']:.1%} right of 179 held-out images of split train of digits" in line
    batch = digits.decode_rows(np.arange(400))
    _, logits = classifier(batch.images.permute(0, 2, 3, 1))
    assert (logits.argmax(1) == batch.labels).float().mean() > 0.95


@pytest.mark.slow
def test_a_whole_training_tells_95_in_100_held_out_digits_and_more(digits):
    assert open_extractor("classifier", device="cpu", data=digits, say=quiet).about["accuracy"] >= 0.97


def test_held_out_images_are_not_trained_on():
    """White images of a class of their own are learned in an epoch or two, but not where all of them are held out."""
    images, classes = stripes(200)
    held = permute(np.arange(200), 200, derive_key(features._ORDER_SEED, 0, Purpose.ROWS))[:20]
    for rows, right in ((held, 0.0), (held + 1, 1.0)):
        seen, told = images.clone(), classes.clone()
        seen[rows % 200], told[rows % 200] = 255, 2
        net, accuracy, held_out = train_classifier(seen, told, 3, epochs=8, flip=False, device=CPU)
        white = net(torch.ones(1, 1, 8, 8))[1].argmax().item() == 2
        assert held_out == 20 and white == bool(right)
        assert accuracy == 0 if not right else accuracy > 0.9


def test_two_trainings_give_equal_weights_and_leave_the_global_generators_alone():
    images, classes = stripes(200)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, accuracy, _ = train_classifier(images, classes, 2, epochs=3, flip=True, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            second, _, _ = train_classifier(images, classes, 2, epochs=3, flip=True, device=CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert accuracy == 1.0
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.requires_grad


def test_the_weights_begin_the_same_everywhere():
    """Golden values of the integer generator: the first kernels do not depend on torch's."""
    net = features._make_classifier((8, 8), 1, 10, CPU)
    features._set_weights(net)
    weight = net.convs[0].weight.detach()
    assert weight.shape == (32, 1, 3, 3)
    np.testing.assert_allclose(weight.flatten()[:4].numpy(), GOLDEN, rtol=1e-6)
    for conv in net.convs:  # variance 2 / fan_in
        assert conv.weight.var().item() == pytest.approx(2 / conv.weight[0].numel(), rel=0.2)
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in net.norms)


GOLDEN = [-0.17791986465454102, 0.4240676462650299, -0.3621501326560974, 0.11999376118183136]


@pytest.mark.parametrize(
    ("size", "channels", "dim", "left"),
    [((8, 8), 1, 64, 4), ((5, 7), 2, 64, 4), ((16, 16), 3, 64, 8), ((32, 32), 3, 256, 8), ((96, 64), 3, 256, 6)],
)
def test_the_network_follows_the_size(size, channels, dim, left):
    net = features._make_classifier(size, channels, 3, CPU)
    features._set_weights(net)
    seen = []
    net.convs[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    found, logits = net(torch.zeros(2, channels, *size))
    assert found.shape == (2, dim) and logits.shape == (2, 3)
    assert seen[0][2] <= left + 6 and len(net.convs) >= 4
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def test_moves_and_mirrors_against_the_plain_way():
    x = torch.rand(4, 2, 5, 6)
    down, right = torch.tensor([0, 1, -2, 0]), torch.tensor([0, -1, 2, 1])
    mirrored = torch.tensor([False, False, True, True])
    moved = features._moved(x, down, right, mirrored)
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    for n in range(4):
        top, left = 3 - int(down[n]), 3 - int(right[n])
        wanted = padded[n, :, top : top + 5, left : left + 6]
        # Mirrored first, then moved: so the columns that are repeated are the mirrored image's.
        if mirrored[n]:
            turned = F.pad(x[n].flip(-1)[None], (3, 3, 3, 3), mode="replicate")[0]
            wanted = turned[:, top : top + 5, left : left + 6]
        assert torch.equal(moved[n], wanted), n


def test_features_do_not_depend_on_the_batch_nor_on_memory_order(classifier):
    images = pictures(37)
    together, logits = classifier(images)
    assert together.dtype == logits.dtype == torch.float32 and together.shape == (37, 64)
    assert not together.requires_grad and not together.is_inference()
    alone = torch.cat([classifier(images[n : n + 1])[0] for n in range(37)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    turned = classifier(images.flip(0))[0].flip(0)
    torch.testing.assert_close(together, turned, rtol=1e-5, atol=1e-6)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(classifier(strided)[0], together)
    assert classifier(images[:0])[0].shape == (0, 64)


def test_features_are_plain_fp32_inside_autocast(classifier):
    images = pictures(5)
    plain, _ = classifier(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier(images)[0], plain)


@pytest.mark.parametrize("wrong", [pictures(2).float(), pictures(2)[0], pictures(2).to(torch.int64)])
def test_only_8_bit_images_have_features(classifier, wrong):
    with pytest.raises(TypeError, match="uint8"):
        classifier(wrong)


def test_images_of_another_shape_are_refused(classifier):
    message = one_line(lambda: classifier(pictures(2, 16)), ConfigError)
    assert "8x8x1" in message and "16x16x1" in message


# What is kept


def test_a_second_opening_reads_the_file(classifier, digits, monkeypatch):
    monkeypatch.setattr(features, "train_classifier", lambda *args, **more: pytest.fail("trained again"))
    again = open_extractor("classifier", device="cpu", data=open_data(DIGITS, (8, 8), 1), epochs=8, say=quiet)
    assert again.version == classifier.version and again.about == classifier.about
    images = pictures(4)
    assert torch.equal(again(images)[0], classifier(images)[0])
    path = Path(again.about["file"])
    assert path in kept_files("classifier") and not [p for p in path.parent.iterdir() if p.name.startswith(".")]
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["accuracy"] == again.about["accuracy"] and told["size"] == [8, 8] and len(told["labels"]) == 10


def test_each_part_of_the_key_makes_another_classifier(digits, monkeypatch):
    """Training stands still here: what counts is how often it is asked for."""
    trained = []

    def train(images, classes, num_classes, **more):
        trained.append(more)
        net = features._make_classifier(tuple(images.shape[2:]), images.shape[1], num_classes, CPU)
        features._set_weights(net)
        return net, 0.5, 1

    monkeypatch.setattr(features, "train_classifier", train)

    def ask(config: DataConfig = FEW, size: tuple[int, int] = (8, 8), channels: int = 1, epochs: int = 1) -> int:
        before = len(trained)
        data = open_data(config, size, channels)
        open_extractor("classifier", device="cpu", data=data, epochs=epochs, say=quiet)
        return len(trained) - before

    assert ask() == 1 and ask() == 0
    assert ask(epochs=2) == 1
    assert ask(dataclasses.replace(FEW, flip=True)) == 1
    assert ask(dataclasses.replace(FEW, filter="label < 3")) == 1
    assert ask(channels=3) == 1
    assert ask(dataclasses.replace(FEW, fit="resize"), (6, 6)) == 1
    assert ask(dataclasses.replace(FEW, fit="resize_crop"), (6, 6)) == 1
    assert ask(dataclasses.replace(FEW, fit="resize"), (7, 6)) == 1
    monkeypatch.setattr(features, "_VERSION", 10_000)
    assert ask() == 1 and ask() == 0
    identity = identity_of(digits)
    assert identity != identity_of(open_data(dataclasses.replace(DIGITS, background="white"), (8, 8), 1))
    assert {"split", "data", "fingerprint"} <= identity.keys() and identity["fingerprint"]


def test_the_split_is_part_of_the_key(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", range(30))
    identities = [
        identity_of(open_data(DataConfig(f"parquet:{tmp_path}", split=split), (8, 8), 3)) for split in ("train", "test")
    ]
    assert identities[0] != identities[1]


@pytest.mark.parametrize("damage", ["cut", "byte", "stranger", "empty", "about"])
def test_a_damaged_file_is_made_anew(digits, damage, monkeypatch):
    images, classes = stripes(200)
    calls = []

    def train(*args, **more):
        calls.append(1)
        return original(images, classes, 10, epochs=1, flip=False, device=CPU)

    original = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", train)

    def ask() -> Extractor:
        return open_extractor("classifier", device="cpu", data=digits, epochs=3, say=quiet)

    path = Path(ask().about["file"])
    whole, version, before = path.read_bytes(), ask().version, len(calls)
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "byte":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "stranger":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(whole.replace(b"accuracy", b"accuracx"))
    assert ask().version == version
    assert len(calls) == before + 1
    ask()
    assert len(calls) == before + 1


def test_without_a_place_to_write_it_works_all_the_same(digits, monkeypatch, tmp_path):
    images, classes = stripes(100)
    net, *rest = train_classifier(images, classes, 10, epochs=1, flip=False, device=CPU)
    monkeypatch.setattr(features, "train_classifier", lambda *args, **more: (net, *rest))
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
        found = open_extractor("classifier", device="cpu", data=digits, epochs=1, say=quiet)
    assert found.about["file"] is None
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "is_caching_enabled", lambda: False)
        again = open_extractor("classifier", device="cpu", data=digits, epochs=1, say=quiet)
    assert again.about["file"] is None and again.version == found.version


def test_who_comes_second_waits_for_the_first(digits, monkeypatch):
    """Two at once, as processes are to each other: a lock is of an open file."""
    images, classes = stripes(100)
    net, *rest = train_classifier(images, classes, 10, epochs=1, flip=False, device=CPU)
    calls = []

    def train(*args, **more):
        calls.append(1)
        time.sleep(0.5)
        return net, *rest

    monkeypatch.setattr(features, "train_classifier", train)
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(open_extractor, "classifier", device="cpu", data=digits, epochs=77, say=quiet) for _ in range(2)
        ]
        versions = {task.result().version for task in asked}
    assert len(versions) == len(calls) == 1


def test_a_classifier_from_a_file_needs_no_data(classifier, tmp_path):
    path = tmp_path / "taken along.safetensors"
    shutil.copy(classifier.about["file"], path)
    found = open_extractor("classifier", device="cpu", weights=str(path))
    assert found.version == classifier.version and found.shape == (8, 8, 1)
    images = pictures(3)
    assert torch.equal(found(images)[0], classifier(images)[0])


def test_a_file_that_is_no_classifier_is_refused(classifier, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    ask = lambda: open_extractor("classifier", device="cpu", weights=str(path))  # noqa: E731
    assert "x.safetensors" in one_line(ask, CheckpointError)
    shutil.copy(classifier.about["file"], path)
    monkeypatch.setattr(features, "_VERSION", 10_000)
    assert "version 1 of the code" in one_line(ask, CheckpointError)


# Bad data


def test_data_without_labels(tmp_path):
    write_folder(tmp_path, [f"{n}.png" for n in range(30)])
    data = open_data(DataConfig(f"folder:{tmp_path}"), (8, 8), 3)
    message = one_line(lambda: open_extractor("classifier", device="cpu", data=data))
    assert "has no labels" in message and "--features" in message and str(tmp_path) in message


def test_one_label_only(digits):
    data = open_data(dataclasses.replace(DIGITS, filter="label == 3"), (8, 8), 1)
    message = one_line(lambda: open_extractor("classifier", device="cpu", data=data))
    assert "1 different label in 183 images" in message and "filter" in message


def test_too_few_images_and_rows_without_a_label(tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    write_parquet(few / "train-00000-of-00001.parquet", range(12))
    data = open_data(DataConfig(f"parquet:{few}"), (8, 8), 3)
    assert "12 labelled images, too few" in one_line(lambda: open_extractor("classifier", device="cpu", data=data))

    partly = tmp_path / "partly"
    partly.mkdir()
    labels = [(-1, 0, 1)[row % 3] for row in range(60)]
    write_parquet(partly / "train-00000-of-00001.parquet", range(60), label=labels)
    data = open_data(DataConfig(f"parquet:{partly}"), (8, 8), 3)
    found = open_extractor("classifier", device="cpu", data=data, epochs=1, say=quiet)
    assert found.about["trained_on"] + found.about["held_out"] == 40 and found.num_classes == 2


def test_labels_that_are_all_different(tmp_path):
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(30), kinds, label=list(range(30)))
    data = open_data(DataConfig(f"parquet:{tmp_path}", label_column="label"), (8, 8), 3)
    message = one_line(lambda: open_extractor("classifier", device="cpu", data=data))
    assert "30 different labels in 30 images (column label)" in message


def test_a_stream_that_counts_its_rows(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(60))
    data = open_data(DataConfig(f"parquet:{tmp_path}", streaming=True, lanes=1), (8, 8), 3)
    found = open_extractor("classifier", device="cpu", data=data, epochs=1, say=quiet)
    assert found.about["trained_on"] + found.about["held_out"] == 60


# Names and networks of other libraries


@pytest.mark.parametrize("name", ["", "inceptoin", "timm", "timm:", "classifier:x", "torchvision", ":x"])
def test_unknown_names_list_the_valid_ones(name):
    message = one_line(lambda: open_extractor(name, device="cpu"), ConfigError)
    assert repr(name) in message and "classifier, inception, torchvision:NAME, timm:NAME" in message


def test_other_values_that_cannot_be(digits, tmp_path):
    assert "has no images" in one_line(lambda: open_extractor("classifier", device="cpu"), ConfigError)
    message = one_line(lambda: open_extractor("classifier", device="cpu", data=digits, epochs=0), ConfigError)
    assert "--features-epochs is 0" in message
    missing = str(tmp_path / "none.pth")
    for name in ("classifier", "inception", "timm:resnet18"):
        message = one_line(lambda name=name: open_extractor(name, device="cpu", weights=missing), ConfigError)
        assert "none.pth" in message and "--features-weights" in message


@pytest.mark.parametrize("name", ["inception", "torchvision:resnet18", "timm:resnet18"])
def test_what_is_not_installed_says_how(name, monkeypatch):
    for module in ("torch_fidelity", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, module, None)
    message = one_line(lambda: open_extractor(name, device="cpu"), ConfigError)
    assert "pip install 'fastddpm[eval]'" in message and name in message


class TinyNet(nn.Module):
    """Stands for a classifier of a library: a convolution, a mean, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.inner = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.inner(x.mean((2, 3))).tanh()
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MEAN, STD, SIZE = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 20


@pytest.fixture
def libraries(monkeypatch) -> None:
    """Stand-ins for torchvision, timm and torch-fidelity with the calls that are made of them."""
    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    transforms = types.SimpleNamespace(crop_size=[SIZE], mean=MEAN, std=STD)

    def known(name: str) -> None:
        if name != "tiny":
            raise ValueError(f"Unknown model {name}")

    def weights_of(name: str):
        known(name)
        return types.SimpleNamespace(DEFAULT=types.SimpleNamespace(transforms=lambda: transforms))

    models.get_model_weights = weights_of
    models.get_model = lambda name, weights: known(name) or TinyNet()
    vision.models, vision.__version__ = models, "0.0"
    timm = types.ModuleType("timm")

    def create_model(name: str, pretrained: bool, pretrained_cfg_overlay: dict) -> nn.Module:
        if name != "tiny":
            raise RuntimeError("Unknown model")
        assert pretrained
        net = TinyNet()
        net.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return net

    config = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD}
    timm.create_model, timm.is_model, timm.__version__ = create_model, lambda name: name == "tiny", "0.0"
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda net: config)
    package = types.ModuleType("torch_fidelity")
    inception = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inception.URL_INCEPTION_V3 = "https://example.invalid/weights-inception-0.pth"

    class Inception(nn.Module):
        def __init__(self, name: str, features_list: list[str], path: str) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.stem, self.fc = nn.Conv2d(3, 2048, 1), nn.Linear(2048, 1008)
            self.load_state_dict(torch.load(path))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            features = self.stem((x.float() - 128) / 128).mean((2, 3))
            return features, features @ self.fc.weight.T

    inception.FeatureExtractorInceptionV3 = Inception
    for module in (vision, models, timm, package, inception):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def prepared(images: Tensor) -> Tensor:
    """What a network of the stand-ins is given, the plain way."""
    x = images.permute(0, 3, 1, 2).float().repeat(1, 3 // images.shape[3], 1, 1)
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_a_librarys_network_gives_what_is_before_its_last_layer(libraries, library, suffix, size, channels, tmp_path):
    net = TinyNet()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": net.state_dict()}, path)
    else:
        save_file(net.state_dict(), path)
    found = open_extractor(f"{library}:tiny", device="cpu", weights=str(path))
    assert (found.name, found.dim, found.num_classes, found.shape) == (f"{library}:tiny", 5, 4, None)
    images = pictures(6, size, channels)
    given, logits = found(images)
    x = prepared(images)
    wanted = net.inner(net.stem(x).relu().mean((2, 3))).tanh()
    torch.testing.assert_close(given, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, net(x).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given[2:3], found(images[2:3])[0], rtol=1e-5, atol=1e-6)
    message = one_line(lambda: found(pictures(1, 8, 4)), ConfigError)
    assert "4 channels" in message


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_of_a_librarys_network_that_do_not_do(libraries, library, tmp_path):
    name = f"{library}:tiny"
    message = one_line(lambda: open_extractor(name, device="cpu"), ConfigError)
    assert name in message and "--features-weights FILE" in message
    path = tmp_path / "w.pth"
    ask = lambda: open_extractor(name, device="cpu", weights=str(path))  # noqa: E731
    path.write_bytes(b"no archive")
    assert "w.pth" in one_line(ask, CheckpointError)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "w.pth" in one_line(ask, CheckpointError)
    torch.save(nn.Linear(2, 2), path)  # a pickled module, which is not unpickled
    assert "w.pth" in one_line(ask, CheckpointError)
    torch.save([1], path)
    assert "w.pth" in one_line(ask, CheckpointError)
    torch.save(TinyNet().state_dict(), path)
    message = one_line(lambda: open_extractor(f"{library}:tinny", device="cpu", weights=str(path)), ConfigError)
    assert f"{library}:tinny" in message


def test_weights_are_part_of_the_version_and_no_generator_is_touched(libraries, tmp_path):
    versions = set()
    for number in range(2):
        torch.save(TinyNet().state_dict(), tmp_path / f"{number}.pth")
        state = torch.get_rng_state()
        versions.add(open_extractor("timm:tiny", device="cpu", weights=str(tmp_path / f"{number}.pth")).version)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(versions) == 2


def test_inception_from_a_file_from_the_cache_and_never_from_elsewhere_unasked(libraries, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    downloads = []

    def download(url: str, **more) -> None:
        downloads.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    message = one_line(lambda: open_extractor("inception", device="cpu"), ConfigError)
    assert "--features-weights" in message and "--features-download" in message and not downloads
    message = one_line(lambda: open_extractor("inception", device="cpu", download=True, say=quiet), ConfigError)
    assert "no route to host" in message and len(downloads) == 1

    path = tmp_path / "checkpoints" / "weights-inception-0.pth"
    path.parent.mkdir()
    path.write_bytes(b"half a download")
    assert path.name in one_line(lambda: open_extractor("inception", device="cpu"), CheckpointError)
    torch.save({"stem.weight": torch.rand(2048, 3, 1, 1), "stem.bias": torch.rand(2048)}, path)
    assert path.name in one_line(lambda: open_extractor("inception", device="cpu"), CheckpointError)
    state = nn.ModuleDict({"stem": nn.Conv2d(3, 2048, 1), "fc": nn.Linear(2048, 1008)}).state_dict()
    torch.save(state, path)
    found = open_extractor("inception", device="cpu")
    assert (found.dim, found.num_classes) == (2048, 1008) and len(downloads) == 1
    given, logits = found(pictures(2))
    assert given.shape == (2, 2048) and logits.shape == (2, 1008)
    torch.testing.assert_close(found(pictures(2).expand(-1, -1, -1, 3))[0], given)
    local = tmp_path / "local.pth"
    shutil.move(path, local)
    assert open_extractor("inception", device="cpu", weights=str(local)).version == found.version


# Reference statistics


def some_rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


def test_reference_statistics_are_those_of_the_features(classifier, digits):
    rows = np.arange(3, 150, dtype=np.int64)
    found = reference_statistics(digits, rows, classifier, num_features=20, batch_size=64, say=quiet)
    table = classifier(digits.decode_rows(rows).images.permute(0, 2, 3, 1))[0].double()
    assert found.sums.n == len(rows)
    torch.testing.assert_close(found.sums.sum, table.sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.sums.outer, table.T @ table, rtol=1e-5, atol=1e-4)
    assert found.features.shape == (20, 64) and found.features.dtype == torch.float32
    nearest = torch.cdist(found.features.double(), table).argmin(1)
    assert len(set(nearest.tolist())) == 20 and nearest.max() - nearest.min() > 100  # from all over
    torch.testing.assert_close(found.features.double(), table[nearest], rtol=1e-5, atol=1e-5)
    whole = reference_statistics(digits, rows, classifier, num_features=10_000, batch_size=50, say=quiet)
    torch.testing.assert_close(whole.features.double(), table, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.sums.flat(), found.sums.flat(), rtol=1e-6, atol=1e-5)


def test_reference_statistics_are_read_again(classifier, digits, monkeypatch):
    said = []
    first = reference_statistics(digits, some_rows(70), classifier, num_features=5, say=said.append)
    assert first.path in kept_files("reference") and len(said) == 1
    counted = dataclasses.replace(classifier, forward=lambda images: pytest.fail("computed again"))
    again = reference_statistics(digits, some_rows(70), counted, num_features=5, say=said.append)
    assert torch.equal(again.sums.flat(), first.sums.flat()) and torch.equal(again.features, first.features)
    assert again.path == first.path and len(said) == 1
    assert json.loads(first.path.with_suffix(".json").read_text())["num_images"] == 70


def test_each_part_of_the_key_makes_other_statistics(classifier, digits, monkeypatch):
    calls = []

    def ask(data: ImageData = digits, num: int = 30, features: int = 0, first: int = 0, **other) -> int:
        before = len(calls)
        extractor = dataclasses.replace(classifier, forward=counted, shape=None, **other)
        reference_statistics(data, first + some_rows(num), extractor, num_features=features, say=quiet)
        return len(calls) - before

    def counted(images: Tensor) -> tuple[Tensor, None]:
        calls.append(len(images))
        return images.float().mean((2, 3))[:, :1].expand(-1, 64), None

    assert ask() == 1 and ask() == 0
    assert ask(num=31) == 1
    assert ask(first=1) == 1
    assert ask(features=4) == 1
    assert ask(name="other") == 1
    assert ask(version="other") == 1
    assert ask(open_data(DIGITS, (8, 8), 3)) == 1
    assert ask(open_data(dataclasses.replace(DIGITS, fit="resize"), (6, 6), 1)) == 1
    assert ask(open_data(dataclasses.replace(DIGITS, filter="label > 4"), (8, 8), 1), num=3) == 1
    monkeypatch.setattr(features, "_VERSION", 10_000)
    assert ask() == 1


def test_damaged_statistics_are_made_anew(classifier, digits):
    ask = lambda: reference_statistics(digits, some_rows(40), classifier, say=quiet)  # noqa: E731
    first = ask()
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:])
    again = ask()
    assert torch.equal(again.sums.flat(), first.sums.flat())
    assert first.path.read_bytes()[-9:] == whole[-9:]


def test_statistics_from_a_file(classifier, digits, tmp_path):
    kept = reference_statistics(digits, some_rows(50), classifier, num_features=7, say=quiet)
    path = tmp_path / "reference.safetensors"
    shutil.copy(kept.path, path)
    found = read_reference(str(path), classifier, (8, 8, 1))
    assert torch.equal(found.sums.flat(), kept.sums.flat()) and torch.equal(found.features, kept.features)

    message = one_line(lambda: read_reference(str(path), classifier, (16, 16, 3)))
    assert "are of 8x8x1 images and these are 16x16x3" in message
    other = dataclasses.replace(classifier, version="1-other")
    message = one_line(lambda: read_reference(str(path), other, (8, 8, 1)))
    assert classifier.version in message and "1-other" in message
    assert "no such file" in one_line(lambda: read_reference(str(tmp_path / "none"), classifier, (8, 8, 1)))
    for wrong in (classifier.about["file"], ROOT / "README.md"):
        assert "reference statistics" in one_line(lambda wrong=wrong: read_reference(str(wrong), classifier, (8, 8, 1)))


def test_images_of_another_size_have_no_statistics(classifier):
    data = open_data(dataclasses.replace(DIGITS, fit="resize"), (6, 6), 1)
    assert "6x6x1" in one_line(lambda: reference_statistics(data, some_rows(5), classifier), ConfigError)


def test_files_hold_tensors_and_text_only(classifier):
    tensors = load_file(classifier.about["file"])
    net = Classifier((8, 8), 1, 10)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in net.state_dict().items()
    }
    assert math.prod(tensors["head.weight"].shape) == 640
