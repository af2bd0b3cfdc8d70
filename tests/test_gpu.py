"""Trainer and sampler on a GPU: every precision trains, resume is exact, and the noise is the CPU's."""

import json
from pathlib import Path

import pytest
import torch

from fastddpm.checkpoint import Checkpoints
from fastddpm.config import Config, preset
from fastddpm.generate import draw_images
from fastddpm.pipeline import load_pipeline
from fastddpm.samplers import Sampler
from fastddpm.trainer import Trainer
from fastddpm.unet import UNet

pytestmark = pytest.mark.gpu


def small(run: Path, **changes) -> Config:
    values = {
        "run": str(run),
        "steps": 12,
        "log_every": 1,
        "save_every": 5,
        "sample_every": 0,
        "data": {"flip": True},
        "model": {"dropout": 0.1},
        "optim": {"horizon": 12, "warmup_steps": 2},
    }
    return preset("digits", **(values | changes))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("gpu") / "run"
    trainer = Trainer(small(run))
    assert trainer.accelerator.device.type == "cuda"
    trainer.train()
    return run


@pytest.mark.parametrize(("precision", "rel"), [("bf16", 0.05), ("fp16", 0.02)])
def test_mixed_precision_follows_fp32(tmp_path, whole, precision, rel):
    Trainer(small(tmp_path / "run", precision=precision)).train()
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=rel)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_goes_on_exactly(tmp_path, precision):
    Trainer(small(tmp_path / "a", precision=precision)).train()
    Trainer(small(tmp_path / "b", precision=precision, steps=7)).train()
    Trainer(small(tmp_path / "b", precision=precision)).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = (Checkpoints(tmp_path / name).load(Checkpoints(tmp_path / name).all()[-1]) for name in "ab")
    assert a.scaler == b.scaler and bool(a.scaler) == (precision == "fp16")
    assert all(torch.equal(a.optimizer[k], b.optimizer[k]) for k in a.optimizer)


def test_the_first_loss_is_the_cpus(tmp_path, whole):
    """Same samples, timesteps, flips, dropout masks and noise: only arithmetic differs."""
    trainer = Trainer(small(tmp_path / "cpu"))
    (batch,) = list(trainer.data.batches(0, 0, 1, 64, workers=0))
    on_cpu = trainer.train_step.process.noise(batch.images, batch.ordinals)
    on_gpu = trainer.train_step.process.noise(batch.images.cuda(), batch.ordinals.cuda())
    assert torch.equal(on_cpu.t, on_gpu.t.cpu()) and torch.equal(on_cpu.flip, on_gpu.flip.cpu())
    assert (on_cpu.x_t - on_gpu.x_t.cpu()).abs().max() < 1e-3
    network = trainer.unet.cpu().train()
    with network.noise_address(0, batch.ordinals):
        prediction = network(on_cpu.x_t, on_cpu.t).sample
    loss = trainer.train_step.process.loss(prediction, on_cpu, batch.ordinals).mean().item()
    assert losses(whole)[0] == pytest.approx(loss, rel=1e-4)


def test_samples_are_the_cpus(whole):
    drawn = []
    for device in ("cpu", "cuda"):
        pipeline = load_pipeline(str(whole), device)
        sampler = Sampler(pipeline.unet, pipeline.schedule, sampler="ddim", num_steps=10, eta=1.0, seed=3)
        images = draw_images(sampler, 8, shape=(1, 8, 8), batch_size=4, device=torch.device(device), num_film=2)
        drawn.append(images.images.astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 2


def test_a_training_step_does_not_wait_for_the_device(tmp_path, monkeypatch):
    """Between log lines nothing may synchronise: a step only queues work."""
    trainer = Trainer(small(tmp_path / "run", steps=6, log_every=1000, save_every=1000))
    monkeypatch.setattr(trainer, "save", lambda: None)
    plain, steps = trainer._optimizer_step, []

    def watched(*arguments):
        # The first steps allocate and choose algorithms; batches are pinned, so copies do not wait either.
        torch.cuda.set_sync_debug_mode("error" if len(steps) >= 3 else "default")
        try:
            steps.append(plain(*arguments))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "_optimizer_step", watched)
    trainer.train()
    assert len(steps) == 6


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_finished_pictures_are_those_of_a_cpu_within_two_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 steps of DDIM in fp32 without TF32: at most 2 of 255 levels apart on 99.9 % of the values."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # An untrained net's eps would lead to black and white alone; taken as v, its pictures have all levels.
    config = preset(name, diffusion={"prediction": "v"})
    net = UNet(config.network(), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # as drawn, the net says nothing: its last layer is nearly zero
        for weight in net.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    pictures = []
    for device in ("cpu", "cuda"):
        sampler = Sampler.of(
            config.diffusion,
            net.to(device),
            config.diffusion.noise_schedule(),
            sampler="ddim",
            num_steps=50,
            seed=5,
        )
        shape = (config.channels, *config.model.image_size)
        drawn = draw_images(sampler, 4, shape=shape, batch_size=4, device=torch.device(device))
        pictures.append(drawn.images.astype(int))
    apart = abs(pictures[0] - pictures[1])
    assert (apart <= 2).mean() >= 0.999, f"largest difference {apart.max()}"
    assert ((pictures[0] > 5) & (pictures[0] < 250)).mean() > 0.3, "the pictures are black and white"
