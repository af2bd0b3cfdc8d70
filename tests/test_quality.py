"""Distances of samples from real images: one process's figures are those of several, and of plain recomputation."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import private_cache

from fastddpm.cli import main
from fastddpm.config import preset
from fastddpm.data import DataConfig, open_data
from fastddpm.errors import ConfigError
from fastddpm.features import Extractor
from fastddpm.generate import draw_images
from fastddpm.metrics import FeatureSums, frechet_distance, inception_score, kernel_distance, precision_recall
from fastddpm.quality import FEATURE_METRICS, best_record, measure_quality
from fastddpm.samplers import Sampler
from fastddpm.trainer import Trainer
from fastddpm.unet import UNet

ROOT = Path(__file__).parents[1]
DIM = 6
CPU = torch.device("cpu")


def extractor_of(classes: int | None = 4, version: str = "1") -> Extractor:
    """Random projections of the pixels, as features and as logits."""
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(64, DIM, generator=generator), torch.randn(64, 4, generator=generator)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = images.float().flatten(1) / 255
        return x @ projections[0], x @ projections[1] if classes is not None else None

    return Extractor("stand-in", version, DIM, classes, CPU, forward)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    config = preset("digits", model={"block_out_channels": (8, 16), "norm_num_groups": 4})
    return Sampler.of(
        config.diffusion, UNet(config.network()).eval(), config.diffusion.noise_schedule(), sampler="ddim", num_steps=3
    )


def measured(sampler: Sampler, metrics=FEATURE_METRICS, **changes):
    data = open_data(DataConfig(source="digits"), (8, 8), 1)
    arguments = {"num_samples": 50, "shape": (1, 8, 8), "device": CPU, "batch_size": 16, "say": lambda line: None}
    extractor = changes.pop("extractor", extractor_of())
    rows = changes.pop("rows", np.arange(120))
    return measure_quality(metrics, sampler, data, rows, extractor, **arguments | changes)


def test_figures_are_those_of_the_features_taken_by_hand(tmp_path: Path, sampler: Sampler) -> None:
    with private_cache(tmp_path):
        found = measured(sampler)
    extractor, data = extractor_of(), open_data(DataConfig(source="digits"), (8, 8), 1)
    drawn = draw_images(sampler, 50, shape=(1, 8, 8), batch_size=50, device=CPU).images
    fake, logits = extractor(torch.from_numpy(drawn))
    real, _ = extractor(data.decode_rows(np.arange(120)).images.permute(0, 2, 3, 1).contiguous())
    fid = frechet_distance(FeatureSums.of(real), FeatureSums.of(fake))
    assert found.figures["fid"]["value"] == pytest.approx(fid, rel=1e-5)
    kid, stderr = kernel_distance(real, fake, seed=0, subset_size=25)
    assert (found.figures["kid"]["value"], found.figures["kid"]["stderr"]) == pytest.approx((kid, stderr), rel=1e-4)
    assert logits is not None
    score, std = inception_score(logits.softmax(1))
    assert (found.figures["is"]["value"], found.figures["is"]["std"]) == pytest.approx((score, std), rel=1e-4)
    both = precision_recall(real, fake)
    assert (found.figures["precision"]["value"], found.figures["recall"]["value"]) == pytest.approx(both)
    assert np.array_equal(found.pictures, drawn) and found.facts["num_samples"] == 50


def test_batches_do_not_matter(tmp_path: Path, sampler: Sampler) -> None:
    with private_cache(tmp_path):
        a, b = (measured(sampler, batch_size=size).figures for size in (7, 50))
    for name, values in a.items():
        assert values["value"] == pytest.approx(b[name]["value"], rel=1e-6)


def test_what_cannot_be_measured_is_said_before_anything_is_drawn(tmp_path: Path, sampler: Sampler) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn")

    dead = dataclasses.replace(extractor_of(None), forward=never)
    with private_cache(tmp_path):
        for changes, words in (
            ({"num_samples": DIM}, rf"\b{DIM + 1}\b"),
            ({"rows": np.arange(DIM)}, rf"\b{DIM + 1}\b"),
            ({"metrics": ("is",)}, "probabilities"),
            ({"metrics": ("nicer",)}, "unknown metric 'nicer'"),
            ({"metrics": ("kid",), "subset_size": 60}, "60"),
        ):
            with pytest.raises(ConfigError, match=words):
                measured(sampler, extractor=dead, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "run"
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    config = preset("digits", run=str(folder), steps=4, sample_every=0, model=small, conditional=True)
    Trainer(config).train()
    return folder


def test_two_processes_print_what_one_does(run: Path, tmp_path: Path) -> None:
    """An odd number of samples: one of two equal shares has a surplus image, which counts for nothing."""
    options = ["evaluate", str(run), "--metrics", "fid,kid,is,precision,recall", "--num-samples", "151", "--num", "300"]
    options += ["--sampler-steps", "2", "--batch-size", "32", "--features-epochs", "1"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    found = []
    for world in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if world == 2 else []
        command = [sys.executable, *launcher, "-m", "fastddpm", *(["--"] if world == 2 else []), *options]
        out = ["--out", str(tmp_path / f"out{world}")]
        done = subprocess.run([*command, *out], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    one, two = found
    assert one["features"] == two["features"] and one["features"]["num_samples"] == 151
    for name in FEATURE_METRICS:
        assert one[name]["value"] == pytest.approx(two[name]["value"], rel=1e-6)
    assert json.loads((tmp_path / "out2" / "quality.json").read_text()) == two
    assert (tmp_path / "out1" / "quality.png").is_file()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--num-samples", "0"], 5, "--num-samples is 0"),
        (["--features", "vgg"], 5, "--features is 'vgg': valid are"),
        (["--features", "inception"], 5, "inception"),
        (["--sampler-steps", "5000"], 5, "number of sampling steps is 5000"),
        (["--guidance", "2"], 5, "guidance is 2.0"),
        (["--split", "validation"], 4, "validation"),
    ],
)
def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys, options: list[str], code: int, words: str) -> None:
    with private_cache(tmp_path):
        assert main(["evaluate", str(run), "--metrics", "fid", "--out", str(tmp_path / "out"), *options]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and words in errors[0]


def test_the_best_checkpoint_is_kept_and_a_measurement_that_is_missing_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddpm.quality.open_extractor", lambda *_, **__: extractor_of())
    run = tmp_path / "run"
    values = {
        **{"run": str(run), "steps": 6, "save_every": 100, "sample_every": 0, "keep": 1, "log_every": 6},
        "model": {"block_out_channels": (8, 16), "norm_num_groups": 4},
        "eval": {"every": 2, "num_samples": 20, "steps": 2, "metrics": ("precision", "fid")},
    }
    with private_cache(tmp_path / "cache"):
        Trainer(preset("digits", **values)).train()
        lines = (run / "quality.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == [2, 4, 6] and all(r["fid"] > 0 for r in records)
        best = max(records, key=lambda r: r["precision"])  # the first of equals
        assert json.loads((run / "best.json").read_text())["step"] == best["step"]
        kept = {path.name for path in (run / "checkpoints").glob("step-*")}
        assert f"step-{best['step']:08d}" in kept and "step-00000006" in kept and len(kept) <= 3
        (run / "quality.jsonl").write_text("\n".join(lines[:2]) + "\n")
        Trainer(preset("digits", **values | {"steps": 7})).train()
        assert (run / "quality.jsonl").read_text().splitlines() == lines


def test_a_smaller_distance_and_a_larger_precision_are_better() -> None:
    records = [{"step": s, "fid": f, "precision": p} for s, f, p in ((1, 3.0, 0.2), (2, 2.0, 0.3), (3, 2.0, 0.1))]
    for metric, step in (("fid", 2), ("precision", 2)):
        found = best_record(records, metric)
        assert found is not None and found["step"] == step
    assert best_record([], "fid") is None
    other = {"step": 4, "fid": 2.5, "features": {"num_samples": 7}}  # of fewer samples: it compares with no other
    assert best_record([*records, other], "fid") == other


def test_what_a_run_cannot_measure_is_said_at_its_start(tmp_path: Path) -> None:
    for changes, words in (
        ({"metrics": ("nll",)}, r"eval\.metrics has 'nll': valid are fid, kid"),
        ({"sampler": "ddim_inverse"}, r"eval\.sampler is 'ddim_inverse'"),
        ({"steps": 4000}, r"eval\.steps is 4000"),
        ({"guidance": 2.0}, r"eval\.guidance is 2\.0"),
        ({"features": "inception"}, "inception"),
        ({"num_samples": 0}, r"eval\.num_samples is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            Trainer(preset("digits", run=str(tmp_path / "run"), eval={"every": 5, **changes}))
