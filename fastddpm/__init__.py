"""fastddpm: a trainer and sampler of pixel-space diffusion models.

    from fastddpm import Trainer, preset
    Trainer(preset("digits", run="runs/mine", steps=500)).train()

Names are loaded when first used: importing the package does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averages import PowerAverages
    from .bound import vlb_term
    from .config import PRESETS, Config, preset
    from .data import DataConfig, open_data
    from .diffusion import NoiseSchedule, ProcessConfig, TrainingProcess
    from .editing import inpaint, interpolate, start_from, variations
    from .errors import CheckpointError, ConfigError, DataError, FastDDPMError, NumericsError
    from .generate import draw_images
    from .objectives import LOSSES
    from .pipeline import load_pipeline
    from .samplers import Sampler, to_uint8
    from .schedules import SCHEDULES
    from .solvers import SAMPLERS
    from .trainer import Trainer
    from .unet import UNet, UNetConfig

_HOMES = {
    "averages": ("PowerAverages",),
    "bound": ("vlb_term",),
    "config": ("PRESETS", "Config", "preset"),
    "data": ("DataConfig", "open_data"),
    "diffusion": ("NoiseSchedule", "ProcessConfig", "TrainingProcess"),
    "editing": ("inpaint", "interpolate", "start_from", "variations"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "FastDDPMError", "NumericsError"),
    "generate": ("draw_images",),
    "objectives": ("LOSSES",),
    "pipeline": ("load_pipeline",),
    "samplers": ("Sampler", "to_uint8"),
    "schedules": ("SCHEDULES",),
    "solvers": ("SAMPLERS",),
    "trainer": ("Trainer",),
    "unet": ("UNet", "UNetConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LOSSES",
    "PRESETS",
    "SAMPLERS",
    "SCHEDULES",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "FastDDPMError",
    "NoiseSchedule",
    "NumericsError",
    "PowerAverages",
    "ProcessConfig",
    "Sampler",
    "Trainer",
    "TrainingProcess",
    "UNet",
    "UNetConfig",
    "draw_images",
    "inpaint",
    "interpolate",
    "load_pipeline",
    "open_data",
    "preset",
    "start_from",
    "to_uint8",
    "variations",
    "vlb_term",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
