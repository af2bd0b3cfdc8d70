"""The run folder as a diffusers pipeline: written by the trainer, read by sample; local folders and Hub ids alike.

RUN/model_index.json   unet/config.json + diffusion_pytorch_model.safetensors (EMA)   scheduler/scheduler_config.json
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import load_into, read_safetensors
from .config import Config, read_config
from .diffusion import NoiseSchedule, ProcessConfig, from_diffusers_scheduler, to_diffusers_scheduler
from .errors import CheckpointError, ConfigError
from .files import expand, replace_file, write_json
from .unet import UNet, UNetConfig, convert_old_keys

# The layout of these files has not changed since this version of diffusers.
DIFFUSERS_VERSION = "0.35.0"
WEIGHTS = "diffusion_pytorch_model"


def write_pipeline(run: Path, model: UNetConfig, process: ProcessConfig, ema: dict[str, Tensor]) -> None:
    """Write or replace the pipeline files of a run folder; once written, it loads in diffusers at any instant.

    Args:
        ema: state dict of the averaged weights, any device. What tells a network its augmentation is left out: without
            an augmentation, as in all sampling, it adds nothing.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in ema.items()
        if not name.startswith("augment_embedding.")
    }
    replace_file(
        run / "unet" / f"{WEIGHTS}.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"})
    )
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    write_json(run / "unet" / "config.json", model.to_diffusers() | version)
    write_json(run / "scheduler" / "scheduler_config.json", to_diffusers_scheduler(process) | version)
    if model.conditional or process.self_conditioning:
        (run / "model_index.json").unlink(missing_ok=True)
        return  # DDPMPipeline would give the network no class, and no estimate: such a folder holds a UNet2DModel
    # Last: the file that says "this is a pipeline" appears when everything it names is there.
    index = {
        "_class_name": "DDPMPipeline",
        **version,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_json(run / "model_index.json", index)


@dataclass
class Pipeline:
    """A network with its weights, and the process it was trained for."""

    unet: UNet
    process: ProcessConfig
    schedule: NoiseSchedule
    config: Config | None = None
    """Of a run folder: everything the run is a function of."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images: an input for self-conditioning holds an estimate of as many channels too."""
        model = self.unet.config
        return (model.in_channels // (2 if self.process.self_conditioning else 1), *model.image_size)

    @property
    def num_classes(self) -> int | None:
        """Classes that can be asked for; None of an unconditional net. One that stands for no class is not counted."""
        count = self.unet.config.num_class_embeds
        return None if count is None else count - (self.process.label_dropout > 0)


def load_pipeline(source: str, device: torch.device | str = "cpu") -> Pipeline:
    """Load a run folder, a diffusers pipeline or model folder, or a Hub id such as google/ddpm-cifar10-32.

    The layout of old repositories (everything at the root) and their attention names are understood. Weights are read
    from safetensors, or from a .bin by torch.load(weights_only=True); nothing is unpickled beyond tensors.

    Returns:
        The pipeline with the network in eval mode, fp32, channels_last, on `device`.

    Raises:
        CheckpointError: if there is nothing at `source`, or weights do not fit their config.json.
        ConfigError: if the model or the scheduler uses something that is not supported.
    """
    root = _locate(source)
    run = _run_config(root)
    if run is not None and not (root / "scheduler" / "scheduler_config.json").is_file():
        raise CheckpointError(f"{source} has no weights yet: they are written at the run's first save")
    model_folder = root / "unet" if (root / "unet").is_dir() else root
    facts = _read_config(model_folder / "config.json", source)
    name = facts.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ConfigError(f"{source} holds a {name}; only UNet2DModel can be loaded")
    try:
        config = UNetConfig.from_diffusers(facts)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{model_folder / 'config.json'} has a value of the wrong kind: {error}") from error
    unet = UNet(config)
    load_into(unet, convert_old_keys(_read_weights(model_folder, source)), f"{model_folder} (its weights)")
    if run is not None:
        process = run.diffusion
        schedule = process.noise_schedule()
    else:
        process, schedule = _read_scheduler(root, source)
    return Pipeline(unet.eval().to(device), process, schedule, run)


def _run_config(root: Path) -> Config | None:
    """The config of a run folder; None for a folder of anyone else's."""
    try:
        facts = json.loads((root / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return read_config(root) if isinstance(facts, dict) and "config" in facts and "versions" in facts else None


def _read_scheduler(root: Path, source: str) -> tuple[ProcessConfig, NoiseSchedule]:
    places = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    path = next((place for place in places if place.is_file()), None)
    try:
        return from_diffusers_scheduler(_read_config(path, source) if path else {})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} has a value of the wrong kind: {error}") from error


def _locate(source: str) -> Path:
    path = expand(source)
    if path.is_dir():
        if any((path / name).is_file() for name in ("model_index.json", "config.json", "unet/config.json")):
            return path
        raise CheckpointError(f"{source} is neither a run folder with weights nor a diffusers model folder")
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1 or path.parent.is_dir():
        raise CheckpointError(f"{source} is not a folder: give a run folder, a diffusers folder or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["model_index.json", "*config.json", "unet/*", "scheduler/*", f"{WEIGHTS}*"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} is no local folder and the Hub did not give it: {first}") from error


def _read_config(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{source}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{source}: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {path} is not a table of settings")
    return value


def _read_weights(folder: Path, source: str) -> dict[str, Tensor]:
    single, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if index.is_file():
        shards = sorted(set(_read_config(index, source)["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if os.path.basename(shard) != shard:
                raise CheckpointError(f"{index} names {shard}, which is not a file of its own folder")
            tensors |= read_safetensors(folder / shard)
        return tensors
    legacy = folder / f"{WEIGHTS}.bin"
    if legacy.is_file():
        try:
            loaded = torch.load(legacy, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for a damaged or a hostile file
            raise CheckpointError(f"{legacy} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise CheckpointError(f"{legacy} is not a table of tensors")
        return loaded
    raise CheckpointError(f"{source} has no {WEIGHTS}.safetensors and no {WEIGHTS}.bin in {folder}")
