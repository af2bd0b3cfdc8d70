"""`fastddpm train --dry-run`: what a config amounts to, found without data and without allocating anything."""

import json

import torch
from torch import Tensor

from .config import Config, to_dict
from .flops import flops_per_image
from .unet import UNet

GIB = 2.0**30


def saved_bytes(config: Config) -> int:
    """Bytes that the backward pass of one image keeps (weights not counted), counted on the meta device."""
    with torch.device("meta"):
        unet = UNet(config.model)
    unet.train()
    weights = {id(p.untyped_storage()) for p in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor.untyped_storage()) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(1, config.model.in_channels, *config.model.image_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(x, torch.zeros(1, dtype=torch.int64, device="meta")).sample
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total // (1 if config.precision == "fp32" else 2)


def describe(config: Config, world: int = 1) -> str:
    """The config as JSON, then parameter count, GFLOP per image and a memory estimate per process.

    Raises:
        ConfigError: if the config cannot be run.
    """
    config.check()
    images = config.micro_batch(world)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(config.model).parameters())
    flop = flops_per_image(config.model)
    # fp32 each: weights, gradient, two moments of Adam, average.
    state, activations = parameters * 4 * 5, saved_bytes(config) * images
    lines = (
        json.dumps(to_dict(config), indent=2),
        f"parameters   {parameters:,}",
        f"compute      {flop / 1e9:.3f} GFLOP per image forward, {3 * flop / 1e9:.3f} forward and backward",
        f"memory       about {(state + activations) / GIB:.2f} GiB per process: {state / GIB:.2f} weights, gradient, "
        f"moments and average, {activations / GIB:.2f} activations of {images} images",
    )
    return "\n".join(lines)
