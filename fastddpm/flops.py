"""Arithmetic of one pass of the U-Net, counted from the shapes that its layers see on the meta device."""

import torch
from torch import Tensor, nn

from .blocks import Attention
from .unet import UNet, UNetConfig


def flops_per_image(config: UNetConfig) -> float:
    """FLOP of one forward pass for one image of sample_size; forward and backward together take 3 x as many.

    Twice the multiply-adds of the convolutions, the linear layers and the two products of each attention; norms,
    activations and sums, which are bound by memory, are not counted.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += 2 * module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            total += 2 * module.weight.numel() * (output.numel() // module.out_features)
        elif isinstance(module, Attention):
            pixels = inputs[0].shape[2] * inputs[0].shape[3]
            total += 2 * 2 * pixels * pixels * module.to_q.out_features

    with torch.device("meta"), torch.no_grad():
        unet = UNet(config).eval()
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | Attention):
                module.register_forward_hook(count)
        class_labels = None
        if config.class_embed_type == "identity":
            class_labels = torch.zeros(1, config.time_channels)
        elif config.conditional:
            class_labels = torch.zeros(1, dtype=torch.int64)
        unet(torch.zeros(1, config.in_channels, *config.image_size), 0, class_labels)
    return float(total)
