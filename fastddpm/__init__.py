"""fastddpm: a trainer and sampler of pixel-space diffusion models.

    from fastddpm import Trainer, preset
    Trainer(preset("digits", run="runs/mine", steps=500)).train()

Names are loaded when first used: importing the package does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PRESETS, Config, preset
    from .data import DataConfig, open_data
    from .diffusion import NoiseSchedule, ProcessConfig, TrainingProcess
    from .errors import CheckpointError, ConfigError, DataError, FastDDPMError, NumericsError
    from .generate import draw_images
    from .pipeline import load_pipeline
    from .samplers import SAMPLERS, Sampler, to_uint8
    from .trainer import Trainer
    from .unet import UNet, UNetConfig

_HOMES = {
    "config": ("PRESETS", "Config", "preset"),
    "data": ("DataConfig", "open_data"),
    "diffusion": ("NoiseSchedule", "ProcessConfig", "TrainingProcess"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "FastDDPMError", "NumericsError"),
    "generate": ("draw_images",),
    "pipeline": ("load_pipeline",),
    "samplers": ("SAMPLERS", "Sampler", "to_uint8"),
    "trainer": ("Trainer",),
    "unet": ("UNet", "UNetConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "SAMPLERS",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "FastDDPMError",
    "NoiseSchedule",
    "NumericsError",
    "ProcessConfig",
    "Sampler",
    "Trainer",
    "TrainingProcess",
    "UNet",
    "UNetConfig",
    "draw_images",
    "load_pipeline",
    "open_data",
    "preset",
    "to_uint8",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
