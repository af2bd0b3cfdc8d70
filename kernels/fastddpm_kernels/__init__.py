"""Kernels of fastddpm: addressable noise, fused noising, loss and reverse step, in Triton with torch references.

Imports torch alone; triton is needed for impl="triton" only. The references run anywhere torch runs.
"""

from .draws import (
    draw_normal,
    draw_normal_reference,
    draw_normal_triton,
    draw_timesteps,
    draw_timesteps_reference,
    draw_timesteps_triton,
)
from .dropout import dropout, dropout_mask_reference
from .loss import (
    TARGETS,
    diffusion_loss,
    diffusion_loss_and_grad,
    diffusion_loss_and_grad_reference,
    diffusion_loss_and_grad_triton,
    diffusion_loss_reference,
    diffusion_loss_triton,
)
from .noising import add_noise, add_noise_reference, add_noise_triton
from .philox import STREAM_VERSION, Stream, philox_words, stream_tag
from .reverse import reverse_step, reverse_step_reference, reverse_step_triton

__all__ = [
    "STREAM_VERSION",
    "TARGETS",
    "Stream",
    "add_noise",
    "add_noise_reference",
    "add_noise_triton",
    "diffusion_loss",
    "diffusion_loss_and_grad",
    "diffusion_loss_and_grad_reference",
    "diffusion_loss_and_grad_triton",
    "diffusion_loss_reference",
    "diffusion_loss_triton",
    "draw_normal",
    "draw_normal_reference",
    "draw_normal_triton",
    "draw_timesteps",
    "draw_timesteps_reference",
    "draw_timesteps_triton",
    "dropout",
    "dropout_mask_reference",
    "philox_words",
    "reverse_step",
    "reverse_step_reference",
    "reverse_step_triton",
    "stream_tag",
]
