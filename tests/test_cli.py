"""The command line as a contract: options, exit codes, one-line errors, the files it writes."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastddpm_kernels
from fastddpm.cli import main
from fastddpm.config import Config, preset
from fastddpm.diffusion import TrainingProcess
from fastddpm.dryrun import step_bytes
from fastddpm.step import TrainStep
from fastddpm.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[1]
TINY = (
    *("--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4", "--batch-size", "8"),
    *("--log-every", "1", "--sample-every", "0", "--diffusion.num-timesteps", "12"),
)


def train(run: Path, *more: str) -> int:
    return main(["train", "--preset", "digits", "--run", str(run), "--steps", "2", *TINY, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert train(folder) == 0
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    shaken = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in load_file(weights).items()}
    save_file(shaken, weights)  # after two steps the network is still nearly 0, and samples would not depend on it
    return folder


def _array(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"].astype(int)


def test_train_writes_the_run_folder(run):
    names = {p.name for p in run.iterdir()}
    assert {"config.json", "log.jsonl", "checkpoints", "model_index.json", "unet", "scheduler"} <= names
    stored = json.loads((run / "config.json").read_text())
    assert {"torch", "accelerate", "datasets", "fastddpm", "python"} <= stored["versions"].keys()
    assert stored["config"]["data"]["source"] == "digits" and stored["config"]["optim"]["horizon"] == 2


def test_sample_writes_grid_filmstrip_and_array(run, tmp_path, capsys):
    assert main(["sample", str(run), "--num", "5", "--batch-size", "2", "--seed", "3", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    for name in ("grid.png", "filmstrip.png"):
        assert str(tmp_path / name) in captured.out
        assert Image.open(tmp_path / name).size[0] > 100
    assert "fastddpm sample" in captured.out and "images/s" in captured.err and "images/s" not in captured.out


def test_samples_do_not_depend_on_the_batch_size(run, tmp_path):
    for batch in ("1", "4"):
        assert main(["sample", str(run), "--num", "4", "--batch-size", batch, "--out", str(tmp_path / batch)]) == 0
    a, b = (_array(tmp_path / batch) for batch in ("1", "4"))
    assert np.abs(a - b).max() <= 1
    films = [np.asarray(Image.open(tmp_path / batch / "filmstrip.png")).shape for batch in ("1", "4")]
    assert films[0] == films[1]


def test_samples_depend_on_the_weights(run, tmp_path):
    """The two tests around this one compare pictures that the network has made, not clipped noise."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(weights).items()}, weights)
    for source, out in ((run, "a"), (other, "b")):
        assert main(["sample", str(source), "--num", "4", "--out", str(tmp_path / out)]) == 0
    assert np.abs(_array(tmp_path / "a") - _array(tmp_path / "b")).mean() > 10


def test_sample_by_ddim_with_eta_and_other_precision(run, tmp_path):
    options = ["--num", "2", "--sampler", "ddim", "--steps", "4", "--eta", "0.5", "--precision", "bf16"]
    assert main(["sample", str(run), *options, "--out", str(tmp_path)]) == 0
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape[0] == 2


def test_two_processes_sample_the_same_images(run, tmp_path):
    arguments = ["sample", str(run), "--num", "5", "--batch-size", "2"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fastddpm", "--", *arguments, "--out", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grid.png") == 1
    a, b = (_array(tmp_path / name) for name in ("one", "two"))
    assert a.shape == b.shape and np.abs(a - b).max() <= 1


@pytest.mark.parametrize("spelling", ["--sample_every", "--sample-every"])
def test_underscores_are_accepted(tmp_path, spelling, capsys):
    assert main(["train", "--preset", "digits", "--run", str(tmp_path), "--dry-run", spelling, "7"]) == 0
    assert '"sample_every": 7' in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["--data.no-streaming", "--no-data.streaming", "--no-data.flip"])
def test_booleans(spelling, capsys):
    assert main(["train", "--preset", "cifar10", "--dry-run", spelling]) == 0
    name = spelling.rsplit(".", 1)[1].removeprefix("no-")
    assert f'"{name}": false' in capsys.readouterr().out


def test_dry_run_says_what_a_config_amounts_to_and_touches_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "--preset", "cifar10", "--run", str(folder), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "35,746,307" in out and "12.4" in out and "GFLOP" in out and "GiB" in out
    assert json.loads(out[: out.index("\n}") + 2])["optim"]["lr"] == 2e-4
    assert not folder.exists()


def _measured_bytes(config: Config, images: int, dtype: torch.dtype, impl: str | None) -> int:
    """The peak of a CPU step by torch's own allocator: its second step's, and what was there before."""
    net = UNet(config.model).train()
    net.shared.impl = impl
    process = TrainingProcess(config.diffusion.noise_schedule(), flip=config.data.flip)
    step = TrainStep(net, copy.deepcopy(net).eval(), process, config.optim, config.ema, dtype=dtype)
    shape = images, config.model.in_channels, *config.model.image_size
    x_0 = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    step(x_0, torch.arange(images), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(x_0, torch.arange(images), 1)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(w.numel() for w in step.weights) * 16 + x_0.numel()
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


SMALL = UNetConfig(
    sample_size=32,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    dropout=0.2,
)


@pytest.mark.parametrize("impl", [None, "native"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("model", "dtype"), [(None, torch.float32), (SMALL, torch.float32), (SMALL, torch.bfloat16)])
def test_the_estimate_of_memory_is_within_a_tenth_of_what_a_step_takes(model, dtype, recompute, impl):
    if impl is not None and fastddpm_kernels.native_available():
        pytest.skip("no C++ compiler")
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("convolutions in bf16 make copies in fp32 on this processor")
    config = preset("digits")
    model = dataclasses.replace(model or config.model, checkpoint_activations=recompute)
    config = dataclasses.replace(config, model=model)
    measured = _measured_bytes(config, 16, dtype, impl)
    estimate = step_bytes(config, 16, dtype, fused=impl is not None)
    state = sum(p.numel() for p in UNet(model).parameters()) * 16
    assert estimate == pytest.approx(measured, rel=0.1)
    assert estimate - state == pytest.approx(measured - state, rel=0.1)


def test_several_processes_and_micro_batches_hold_the_gradient():
    config = dataclasses.replace(preset("digits"), model=SMALL)
    weights = sum(p.numel() for p in UNet(SMALL).parameters()) * 4
    one = step_bytes(config, 4, torch.float32, fused=True)
    for more in (
        step_bytes(config, 4, torch.float32, fused=True, world=2),
        step_bytes(dataclasses.replace(config, accumulation=2), 4, torch.float32, fused=True),
    ):
        assert one + 0.5 * weights < more < one + 1.1 * weights


def test_the_estimate_names_device_and_precision(capsys, monkeypatch):
    def lines(*options: str) -> list[str]:
        assert main(["train", "--preset", "digits", "--dry-run", *options]) == 0
        return [line.split(":")[0].split(" per process ")[1] for line in capsys.readouterr().out.splitlines()[-2:]
                if line.startswith("memory ")]  # fmt: skip

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("fastddpm.machine.product_rate", lambda dtype: 1e12 if dtype == torch.float32 else 1e11)
    assert lines("--precision", "auto") == ["on a CPU in fp32", "on a GPU in bf16"]
    assert lines("--precision", "bf16") == ["on a CPU in bf16", "on a GPU in bf16"]
    assert lines("--precision", "fp16") == ["on a GPU in fp16"]


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_shows_the_contract(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help", *(["--preset", "digits"] if command == "train" else [])])
    assert end.value.code in (0, None)
    out = capsys.readouterr().out
    flags = {
        "train": "preset run data.source data.streaming seed steps batch-size precision log-every save-every "
        "sample-every dry-run model.block-out-channels optim.lr",
        "sample": "num sampler steps eta seed batch-size out precision",
    }[command]
    for flag in flags.split():
        assert f"--{flag}" in out, flag
    if command == "train":
        assert "default: digits" in out  # the preset supplies the defaults


def test_usage_and_version(capsys):
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    assert "train" in capsys.readouterr().out


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


BAD = {
    "unknown command": (
        "tarin",
        5,
        "unknown command 'tarin': valid are train, replay, sample, edit, evaluate, explain, ema, plan",
    ),
    "train alone": ("train", 5, "train needs a preset: --preset digits, cifar10"),
    "no such user": ("train --preset digits --run /proc/nowhere/r", 5, "/proc/nowhere/r cannot be written"),
    "infinite": ("train --preset digits --run {tmp}/r --optim.lr inf", 5, "optim.lr is inf"),
    "seed below zero": ("train --preset digits --run {tmp}/r --seed -1", 5, "seed is -1"),
    "checkpoints is a file": ("train --preset digits --run {tmp}/occupied", 5, "{tmp}/occupied/checkpoints"),
    "grid.png is a folder": ("sample {run} --num 1 --out {tmp}/o", 5, "grid.png"),
    "a config of nonsense": ("train --preset digits --run {tmp}/nonsense", 5, "{tmp}/nonsense/config.json: data is 5"),
    "unknown preset": ("train --preset cfar10", 5, "unknown preset 'cfar10': valid are digits, cifar10"),
    "unknown field": ("train --preset digits --data.sorce x", 5, "did you mean --data.source"),
    "unknown top field": ("train --preset digits --foo 3", 5, "unknown option --foo: valid are --preset, --run"),
    "wrong choice": ("train --preset digits --precision fp8", 5, "fp32"),
    "wrong type": ("train --preset digits --steps many", 5, "--steps"),
    "missing value": ("train --preset digits --steps", 5, "--steps"),
    "negative steps": ("train --preset digits --steps -3", 5, "steps is -3"),
    "stray word": ("train --preset digits x", 5, "unexpected argument 'x'"),
    "no source": ("train --preset images64 --run {tmp}/r", 5, "data.source is not set"),
    "missing folder": ("train --preset digits --run {tmp}/r --data.source folder:{tmp}/none", 4, "{tmp}/none"),
    "folder without images": ("train --preset digits --run {tmp}/r --data.source folder:{tmp}/empty", 4, "{tmp}/empty"),
    "missing parquet": ("train --preset digits --run {tmp}/r --data.source parquet:{tmp}/none", 4, "{tmp}/none"),
    "no label column": ("train --preset digits --run {tmp}/r --data.label-column species", 4, "species"),
    "no image column": ("train --preset digits --run {tmp}/r --data.image-column photo", 4, "photo"),
    "broken image": ("train --preset digits --run {tmp}/r --data.source folder:{tmp}/broken", 4, "bad.png"),
    "wrong size": ("train --preset digits --run {tmp}/r --model.sample-size 16", 4, "data.fit"),
    "cannot halve": ("train --preset cifar10 --run {tmp}/r --model.sample-size 36", 5, "36"),
    "fp16 on a CPU": ("train --preset digits --run {tmp}/r --precision fp16", 5, "fp16 needs a GPU"),
    "run folder is a file": ("train --preset digits --run {tmp}/file", 5, "{tmp}/file cannot be written"),
    "out is a file": ("sample {run} --out {tmp}/file", 5, "{tmp}/file cannot be written"),
    "batch does not divide": ("train --preset digits --run {tmp}/r --accumulation 3", 5, "does not divide"),
    "another preset": ("train --preset cifar10 --run {run}", 5, "{run} was started with --preset digits"),
    "another config": ("train --preset digits --run {run} --seed 9", 5, "seed: 0 -> 9"),
    "not a config": ("train --preset digits --run {tmp}/foreign", 5, "is not the config of a fastddpm run"),
    "unknown tracker": ("train --preset digits --run {tmp}/r --trackers nosuch", 5, "nosuch"),
    "sample nothing": ("sample {tmp}/none --out {tmp}/o", 6, "{tmp}/none"),
    "sample without source": ("sample --out {tmp}/o", 5, "SOURCE"),
    "sample empty run": ("sample {tmp}/empty --out {tmp}/o", 6, "{tmp}/empty"),
    "too many steps": ("sample {run} --steps 13 --out {tmp}/o", 5, "13"),
    "eta out of range": ("sample {run} --sampler ddim --eta 2 --out {tmp}/o", 5, "eta is 2"),
    "no images asked": ("sample {run} --num 0 --out {tmp}/o", 5, "--num is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code(name, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "file", b"")
    _write(tmp_path / "foreign" / "config.json", b'{"model_type": "bert"}')
    _write(tmp_path / "occupied" / "checkpoints", b"")
    _write(tmp_path / "nonsense" / "config.json", b'{"versions": {}, "config": {"data": 5}}')
    (tmp_path / "nonsense" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "foreign" / "checkpoints" / "step-00000001").mkdir(parents=True)
    if name == "grid.png is a folder":
        (tmp_path / "o" / "grid.png").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "broken").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "broken" / f"{i}.png")
    _write(tmp_path / "broken" / "bad.png", b"\x89PNG\r\n\x1a\n not a picture")
    command, code, expected = BAD[name]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    words = [word.format(tmp=tmp_path, run=run) for word in command.split()]
    if words[:3] == ["train", "--preset", "digits"]:
        words[3:3] = TINY
    assert main(words) == code
    captured = capsys.readouterr()
    lines = [
        line for line in captured.err.splitlines() if not line.startswith(("step ", "1 images in ", "training on "))
    ]
    assert len(lines) == 1 and lines[0].startswith("fastddpm: error: ")
    assert expected.format(tmp=tmp_path, run=run) in lines[0]
    assert "Traceback" not in captured.err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_an_error_on_every_rank_is_no_traceback(run, tmp_path):
    """Two processes, a source that is not there: each says so in one line."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["train", "--preset", "digits", "--run", str(tmp_path / "r"), *TINY, "--data.source", "folder:/no/where"]
    done = subprocess.run(
        [*launcher, "-m", "fastddpm", "--", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastddpm")]
    assert any(line.startswith("fastddpm: error: ") and "/no/where" in line for line in ours)
    assert "fastddpm/trainer.py" not in done.stderr


def test_the_module_is_the_same_program(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "fastddpm", "train", "--preset", "nosuch"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5 and done.stderr.startswith("fastddpm: error: unknown preset")


def test_dry_run_shares_out_what_a_sharded_run_shares(monkeypatch):
    """Weights, moments, averages and gradients by the number of processes; activations are each process's own."""
    from fastddpm.dryrun import describe

    def gib(sharding: str) -> list[float]:
        config = preset("digits", model={"block_out_channels": (64, 128)}, batch_size=64, sharding=sharding)
        line = next(line for line in describe(config, world=4).splitlines() if line.startswith("memory"))
        assert ("shared out among 4 processes" in line) == (sharding == "fsdp2")
        return [float(word) for word in line.split() if re.fullmatch(r"\d+\.\d+", word)]

    (whole, state, _), (shared, fourth, _) = gib("none"), gib("fsdp2")
    assert fourth == pytest.approx(state / 4, abs=0.006)
    assert whole - shared == pytest.approx(1.25 * (state - fourth), abs=0.015)
