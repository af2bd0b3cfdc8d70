"""Kernels of fastddpm: addressable noise, fused noising, loss, reverse step and norms, in Triton with torch references.

Imports torch alone; triton is needed for impl="triton" only. The references run anywhere torch runs.
"""

from ._triton import HAS_TRITON
from .draws import (
    DRAW_NORMAL,
    DRAW_TIMESTEPS,
    DRAW_UNIFORM,
    draw_normal,
    draw_normal_reference,
    draw_normal_triton,
    draw_timesteps,
    draw_timesteps_reference,
    draw_timesteps_triton,
    draw_uniform,
    draw_uniform_reference,
    draw_uniform_triton,
)
from .dropout import DROPOUT, dropout, dropout_reference, dropout_triton
from .group_norm import (
    GROUP_NORM_SILU,
    GROUP_NORM_SILU_BACKWARD,
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_backward_reference,
    group_norm_silu_backward_triton,
    group_norm_silu_reference,
    group_norm_silu_triton,
)
from .loss import (
    DIFFUSION_LOSS,
    DIFFUSION_LOSS_AND_GRAD,
    TARGETS,
    diffusion_loss,
    diffusion_loss_and_grad,
    diffusion_loss_and_grad_reference,
    diffusion_loss_and_grad_triton,
    diffusion_loss_reference,
    diffusion_loss_triton,
)
from .native import native_available
from .noising import ADD_NOISE, add_noise, add_noise_reference, add_noise_triton
from .ops import Case, Op
from .philox import STREAM_VERSION, Stream, philox_words, stream_tag
from .reverse import COLUMNS as REVERSE_COLUMNS
from .reverse import REVERSE_STEP, reverse_step, reverse_step_reference, reverse_step_triton

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        DRAW_TIMESTEPS,
        DRAW_NORMAL,
        DRAW_UNIFORM,
        ADD_NOISE,
        DIFFUSION_LOSS,
        DIFFUSION_LOSS_AND_GRAD,
        REVERSE_STEP,
        DROPOUT,
        GROUP_NORM_SILU,
        GROUP_NORM_SILU_BACKWARD,
    )
}

__all__ = [
    "HAS_TRITON",
    "OPS",
    "REVERSE_COLUMNS",
    "STREAM_VERSION",
    "TARGETS",
    "Case",
    "Op",
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
    "draw_uniform",
    "draw_uniform_reference",
    "draw_uniform_triton",
    "dropout",
    "dropout_reference",
    "dropout_triton",
    "group_norm_silu",
    "group_norm_silu_backward",
    "group_norm_silu_backward_reference",
    "group_norm_silu_backward_triton",
    "group_norm_silu_reference",
    "group_norm_silu_triton",
    "native_available",
    "philox_words",
    "reverse_step",
    "reverse_step_reference",
    "reverse_step_triton",
    "stream_tag",
]
