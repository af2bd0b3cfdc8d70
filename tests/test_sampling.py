"""`fastddpm sample`: classes, guidance and samplers on small networks with random weights, and what cannot be had."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastddpm import sampling
from fastddpm.cli import SampleCommand, main, parse
from fastddpm.diffusion import ProcessConfig
from fastddpm.errors import ConfigError
from fastddpm.pipeline import Pipeline
from fastddpm.samplers import SAMPLERS
from fastddpm.sampling import load_guide, make_sampler, run_sample
from fastddpm.unet import UNet, UNetConfig

NET = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
)
PROCESS = ProcessConfig(schedule="cosine", num_timesteps=20, variance="fixed_small")


def pipeline_of(process: ProcessConfig = PROCESS, seed: int = 0, **changes: Any) -> Pipeline:
    """A network whose output depends on all that it is given."""
    unet = UNet(dataclasses.replace(NET, **changes), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Pipeline(unet, process, process.noise_schedule())


GUIDABLE = dataclasses.replace(PROCESS, label_dropout=0.1)


def conditional(seed: int = 0) -> Pipeline:
    """Three classes and the one that stands for none."""
    return pipeline_of(GUIDABLE, seed, num_class_embeds=4)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, Pipeline]:
    """What load_pipeline finds."""
    found = {
        "plain": pipeline_of(),
        "guidable": conditional(),
        "weak": conditional(1),
        "unguidable": pipeline_of(num_class_embeds=3),
        "learned": pipeline_of(
            dataclasses.replace(PROCESS, variance="learned_range", loss="hybrid", self_conditioning=True),
            in_channels=2,
            out_channels=2,
        ),
    }
    monkeypatch.setattr(sampling, "load_pipeline", lambda source, device: found[source])
    return found


def draw(out: Path, source: str, *options: str) -> np.ndarray:
    arguments = [source, "--num", "6", "--steps", "4", "--out", str(out), *options]
    assert run_sample(parse(SampleCommand, arguments, "fastddpm sample", None, [])) == 0
    images = np.load(out / "samples.npz")["arr_0"]
    assert images.shape == (6, 8, 8, 1)
    return images.astype(int)


@pytest.mark.parametrize("sampler", [name for name, solver in SAMPLERS.items() if solver.to_image])
def test_every_sampler_is_an_option(sampler: str, sources: dict[str, Pipeline], tmp_path: Path) -> None:
    images = draw(tmp_path, "plain", "--sampler", sampler)
    assert images.std() > 5
    assert np.abs(draw(tmp_path, "plain", "--sampler", sampler, "--batch-size", "4") - images).max() <= 1


def test_classes_and_guidance(sources: dict[str, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    turns = draw(tmp_path, "guidable")
    assert "classes 0 .. 2 in turn: --class chooses" in capsys.readouterr().err
    twos = draw(tmp_path, "guidable", "--class", "2")
    assert "in turn" not in capsys.readouterr().err
    assert (turns[[2, 5]] == twos[[2, 5]]).all() and (turns[[0, 1]] != twos[[0, 1]]).any()
    assert (draw(tmp_path, "guidable", "--class", "0", "1", "2") == turns).all()
    guided = draw(tmp_path, "guidable", "--guidance", "4")
    assert (guided != turns).any()
    assert (draw(tmp_path, "guidable", "--guidance", "4", "--guidance-interval", "0.2", "0.6") != guided).any()
    assert (draw(tmp_path, "guidable", "--guidance", "4", "--guidance-rescale", "0.7") != guided).any()
    assert (draw(tmp_path, "guidable", "--guidance", "4", "--guide", "weak") != guided).any()
    assert (
        draw(tmp_path, "guidable", "--guidance", "4", "--guide", "plain") != guided
    ).any()  # a guide without classes


def test_other_options_reach_the_sampler(sources: dict[str, Pipeline], tmp_path: Path) -> None:
    plain = draw(tmp_path, "plain")
    assert (draw(tmp_path, "plain", "--temperature", "0") != plain).any()
    assert (draw(tmp_path, "plain", "--threshold", "0.5") != plain).any()
    assert (draw(tmp_path, "plain", "--variance", "fixed_large") != plain).any()
    heun = draw(tmp_path, "plain", "--sampler", "heun")
    assert (draw(tmp_path, "plain", "--sampler", "heun", "--churn", "2") != heun).any()


def test_learned_variance_and_self_conditioning(sources: dict[str, Pipeline], tmp_path: Path) -> None:
    learned = draw(tmp_path, "learned")
    assert (draw(tmp_path, "learned", "--variance", "fixed_small") != learned).any()
    draw(tmp_path, "learned", "--sampler", "dpmpp_2m")


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("plain", "--guidance 2", "guidance is 2.0: it needs a network that was trained with hidden classes"),
        ("unguidable", "--guidance 2", "guidance is 2.0: it needs a network that was trained with hidden classes"),
        ("plain", "--class 1", "a class is asked for and the network has none"),
        ("guidable", "--class 4", "class 4 does not exist: valid are 0 .. 2"),
        ("unguidable", "--class -1", "class -1 does not exist: valid are 0 .. 2"),
        ("plain", "--steps 21", "the number of sampling steps is 21: it must be in 1 .. 20"),
        ("plain", "--eta 0.5", "eta is 0.5 and the sampler is ddpm: only ddim has it"),
        ("plain", "--sampler ddim --churn 1", "churn is 1.0 and the sampler is ddim: only heun has it"),
        ("plain", "--sampler ddim --variance fixed_small", "--variance is fixed_small and the sampler is ddim"),
        ("plain", "--threshold 1.5", "dynamic_threshold is 1.5"),
        ("plain", "--temperature -1", "temperature is -1.0"),
        ("guidable", "--guidance-rescale 0.5", "--guidance-rescale is given and --guidance is 1"),
        ("guidable", "--guidance-interval 0 0.5", "--guidance-interval is given and --guidance is 1"),
        ("guidable", "--guide weak", "--guide is given and --guidance is 1"),
        ("guidable", "--guidance 2 --guidance-interval 0.7 0.5", "guidance_interval is (0.7, 0.5)"),
        ("plain", "--guidance 2 --guide weak", "--guide weak does not fit: it has 3 classes, the model none"),
        ("plain", "--variance learned_range", "variance is learned_range and the network returned 1 channels"),
    ],
)
def test_what_cannot_be_had(
    source: str, options: str, message: str, sources: dict[str, Pipeline], tmp_path: Path
) -> None:
    arguments = [source, "--num", "1", "--out", str(tmp_path), *options.split()]
    if "--steps" not in options:
        arguments += ["--steps", "2"]
    with pytest.raises(ConfigError) as caught:
        run_sample(parse(SampleCommand, arguments, "fastddpm sample", None, []))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "guide, message",
    [
        (pipeline_of(sample_size=16), r"its images of shape is \(1, 16, 16\), the model's \(1, 8, 8\)"),
        (pipeline_of(dataclasses.replace(PROCESS, prediction="v")), "its prediction is v, the model's eps"),
        (pipeline_of(dataclasses.replace(PROCESS, num_timesteps=30)), "its timesteps is 30, the model's 20"),
        (pipeline_of(dataclasses.replace(PROCESS, schedule="linear")), "its noise schedule is another"),
    ],
)
def test_guides_that_do_not_fit(guide: Pipeline, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "load_pipeline", lambda source, device: guide)
    with pytest.raises(ConfigError, match=f"--guide other does not fit: {message}"):
        load_guide("other", pipeline_of(), torch.device("cpu"))


def test_classes_that_are_no_numbers() -> None:
    command = parse(SampleCommand, ["x"], "fastddpm sample", None, [])
    with pytest.raises(ConfigError, match="the model's class_embed_type is identity"):
        make_sampler(command, pipeline_of(class_embed_type="identity"), None, torch.float32)


def test_help_names_the_samplers(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = capsys.readouterr().out
    for name in (
        "--class",
        "--guidance",
        "--guide",
        "--churn",
        "--temperature",
        "--threshold",
        "dpmpp_2m_sde",
        "unipc",
    ):
        assert name in text
    assert "ddim_inverse" not in text
