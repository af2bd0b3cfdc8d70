"""Arithmetic of one pass of the U-Net, counted by torch from the operators that it calls on the meta device."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from .unet import UNet, UNetConfig


def flops_per_image(config: UNetConfig) -> float:
    """FLOP of one forward pass for one image of sample_size; forward and backward together take 3 x as many.

    Twice the multiply-adds of the convolutions, the linear layers and the two products of each attention; norms,
    activations and sums, which are bound by memory, are not counted.
    """
    with torch.device("meta"):
        unet = UNet(config).eval()
        x_t = torch.zeros(1, config.in_channels, *config.image_size)
        class_labels = None
        if config.class_embed_type == "identity":
            class_labels = torch.zeros(1, config.time_channels)
        elif config.conditional:
            class_labels = torch.zeros(1, dtype=torch.int64)
        # Attention as its two products, which the counter knows on every device; it does not know addmm_.
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop})
        with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            unet(x_t, 0, class_labels)
    return float(counter.get_total_flops())


def _addmm_flop(self_shape: torch.Size, a_shape: torch.Size, b_shape: torch.Size, **_: object) -> int:
    return int(mm_flop(a_shape, b_shape))
