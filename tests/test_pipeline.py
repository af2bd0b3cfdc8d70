"""The run folder in diffusers, and diffusers' folders in fastddpm: same weights, same pictures, no conversion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from fastddpm.config import preset
from fastddpm.errors import CheckpointError, ConfigError
from fastddpm.pipeline import load_pipeline, write_pipeline
from fastddpm.samplers import Sampler, to_uint8
from fastddpm.trainer import Trainer
from fastddpm.unet import UNet
from fastddpm_kernels import Stream, draw_normal

T = 40


def _config(run: Path, **diffusion):
    return preset(
        "digits",
        run=str(run),
        steps=3,
        batch_size=8,
        sample_every=0,
        model={"block_out_channels": (8, 16), "norm_num_groups": 4},
        diffusion={"num_timesteps": T} | diffusion,
    )


def _trained(folder: Path, **diffusion) -> Path:
    """A run whose averages have been shaken: Ho's zero-scale layers would make the network's output nearly 0."""
    trainer = Trainer(_config(folder, **diffusion))
    trainer.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.averages:
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    trainer.step += 1
    trainer.save()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return _trained(tmp_path_factory.mktemp("pipeline") / "run")


@pytest.mark.parametrize(
    "diffusion",
    [
        {"schedule": "linear", "variance": "fixed_large"},
        {"schedule": "cosine", "variance": "fixed_small"},
        {"schedule": "sigmoid", "variance": "fixed_small", "prediction": "v"},
        {"schedule": "linear", "variance": "fixed_large", "prediction": "x_0", "clip": False},
    ],
)
def test_ddpm_pipeline_draws_our_images_when_fed_our_noise(tmp_path, monkeypatch, diffusion):
    """DDPMPipeline over the run's T, its draws replaced by our x_T and z: within one 8-bit level in fp32."""
    folder = _trained(tmp_path / "run", **diffusion)
    numbers, shape, seed = torch.arange(4), (1, 8, 8), 5
    draws = [draw_normal(numbers, shape, seed=seed, stream=Stream.X_T)]
    draws += [draw_normal(numbers, shape, seed=seed, stream=Stream.Z, step=i) for i in range(T)]
    feed = iter(draws)
    for module in ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_args, **_kwargs: next(feed))
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=4, num_inference_steps=T, output_type="np").images

    loaded = load_pipeline(str(folder))
    process = loaded.process
    sampler = Sampler(
        loaded.unet,
        loaded.schedule,
        prediction=process.prediction,
        variance=process.variance,
        clip=process.clip,
        clip_range=process.clip_range,
        spacing=process.spacing,
        seed=seed,
    )
    ours = to_uint8(sampler.sample(numbers, shape)).numpy()
    difference = np.abs(ours.astype(int) - np.rint(theirs * 255).astype(int))
    assert difference.max() <= 1
    assert ours.std() > 20  # the comparison is of pictures, not of one grey


def test_ddim_scheduler_from_the_run_folder_draws_our_images(run):
    """Their scheduler read from our scheduler_config.json, their U-Net from our weights, 10 steps, eta 0."""
    numbers, shape = torch.arange(3), (1, 8, 8)
    unet = UNet2DModel.from_pretrained(run / "unet")
    scheduler = DDIMScheduler.from_pretrained(run / "scheduler")
    scheduler.set_timesteps(10)
    x = draw_normal(numbers, shape, seed=1, stream=Stream.X_T)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    loaded = load_pipeline(str(run))
    sampler = Sampler(
        loaded.unet, loaded.schedule, sampler="ddim", num_steps=10, seed=1, spacing=loaded.process.spacing
    )
    torch.testing.assert_close(sampler.sample(numbers, shape), x, rtol=1e-4, atol=1e-4)
    blind = Sampler(
        lambda x, t: torch.zeros_like(x), loaded.schedule, sampler="ddim", num_steps=10, seed=1, spacing="trailing"
    )
    assert (blind.sample(numbers, shape) - x).abs().mean() > 0.1  # the network matters to the pictures


def test_the_run_folder_holds_the_averaged_weights(run):
    exported = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    average, last = load_file(newest / "ema.safetensors"), load_file(newest / "model.safetensors")
    assert all(torch.equal(exported[k], average[k]) for k in average)
    assert any(not torch.equal(exported[k], last[k]) for k in last)


def test_no_temporary_files_are_left(run):
    assert [p.name for p in run.rglob(".*") if p.is_file()] == [".lock"]


def _old_layout(run: Path, folder: Path, binary: bool) -> None:
    """As google/ddpm-cifar10-32 lies on the Hub: everything at the root, attention under its names of 2022."""
    folder.mkdir()
    weights = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in weights.items():
        for new, then in names.items():
            name = name.replace(f".{new}.", f".{then}.")
        old[name] = tensor
    assert old.keys() != weights.keys()
    if binary:
        torch.save(old, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(old, folder / "diffusion_pytorch_model.safetensors")
    for name, source in (
        ("config.json", "unet/config.json"),
        ("scheduler_config.json", "scheduler/scheduler_config.json"),
    ):
        (folder / name).write_text((run / source).read_text())


@pytest.mark.parametrize("binary", [False, True])
def test_old_attention_names_and_root_level_layout_load(run, tmp_path, binary):
    _old_layout(run, tmp_path / "old", binary)
    a, b = load_pipeline(str(run)), load_pipeline(str(tmp_path / "old"))
    assert a.process == b.process
    assert all(
        torch.equal(x, y) for x, y in zip(a.unet.state_dict().values(), b.unet.state_dict().values(), strict=True)
    )


def test_sharded_weights_and_a_bare_model_folder_load(run, tmp_path):
    UNet2DModel.from_pretrained(run / "unet").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    a, b = load_pipeline(str(run)), load_pipeline(str(tmp_path / "model"))
    assert all(
        torch.equal(x, y) for x, y in zip(a.unet.state_dict().values(), b.unet.state_dict().values(), strict=True)
    )


def test_a_pickled_weight_file_with_code_is_refused(run, tmp_path):
    _old_layout(run, tmp_path / "evil", binary=True)
    torch.save({"x": Path}, tmp_path / "evil" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        load_pipeline(str(tmp_path / "evil"))


def test_weights_of_another_architecture_are_named(run, tmp_path):
    (tmp_path / "unet").mkdir()
    facts = json.loads((run / "unet" / "config.json").read_text()) | {"block_out_channels": [8, 32]}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(facts))
    weights = (run / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"another architecture: .* have another shape"):
        load_pipeline(str(tmp_path))


def test_damaged_weights_are_named(run, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((run / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pipeline(str(tmp_path))


def test_other_pipelines_and_missing_things_are_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_pipeline(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="neither a run folder"):
        load_pipeline(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match="UNet2DConditionModel"):
        load_pipeline(str(tmp_path))
    (tmp_path / "config.json").write_text('{"versions": {}, "config": {}}')
    with pytest.raises(CheckpointError, match="no weights yet"):
        load_pipeline(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        load_pipeline("nobody/no-such-model")


def test_files_are_replaced_while_a_reader_reads(tmp_path):
    """The folder loads at any instant: a reader in a loop beside a writer in a loop never fails."""
    import threading

    config = _config(tmp_path)
    state = UNet(config.model).state_dict()
    write_pipeline(tmp_path, config.model, config.diffusion, state)
    failures: list[BaseException] = []
    reads = 0
    done = threading.Event()

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            try:
                load_pipeline(str(tmp_path))
                reads += 1
            except BaseException as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        write_pipeline(tmp_path, config.model, config.diffusion, state)
    done.set()
    reader.join()
    assert failures == [] and reads > 0
