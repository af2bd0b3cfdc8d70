"""dropout: masks addressed by (seed, layer, sample, element), so that they survive restarts and any number of processes.

One counter serves 8 elements: c0 = e // 8, half-word k = e % 8 is word k // 2 (low 16 bits if k is even, else high);
an element is kept where its half-word >= round(p 65536), and kept values are scaled by the exact kept share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, is_channels_last
from .philox import CHUNK_QUADS, Stream, philox_grid, split_ordinals, split_seed, stream_tag

HALVES = 65536


def dropout(x: Tensor, p: float, ordinals: Tensor, *, layer: int, seed: int) -> Tensor:
    """Zero each element of x with probability round(p 65536) / 65536 and scale the rest to keep the mean.

    x [N, C, H, W] floating point; elements are counted in H, W, C order whatever the memory format. p in [0, 1);
    ordinals int64 [N] on x's device; layer: the index of the dropout layer, 0 to 65535. Differentiable in x (the mask
    is kept, one byte an element). Returns x's dtype and memory format.
    Raises ValueError or TypeError for arguments out of shape or range.
    """
    check_images("x", x)
    check_per_sample("ordinals", ordinals, x.shape[0], torch.int64, x.device)
    split_seed(seed)
    threshold = dropout_threshold(p)
    if threshold == 0:
        return x
    keep = _dropout_mask_op(ordinals, list(x.shape[1:]), threshold, layer, seed, is_channels_last(x))
    return torch.where(keep, x * (HALVES / (HALVES - threshold)), 0.0)


def dropout_threshold(p: float) -> int:
    """round(p 65536), the half-words below which elements are dropped. Raises ValueError unless 0 <= p < 1."""
    threshold = round(p * HALVES) if 0.0 <= p < 1.0 else HALVES
    if threshold >= HALVES:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return threshold


def dropout_mask_reference(
    ordinals: Tensor, shape: tuple[int, int, int], threshold: int, *, layer: int, seed: int, channels_last: bool
) -> Tensor:
    """The mask of kept elements, bool [N, C, H, W] for shape (C, H, W), in plain torch."""
    if ordinals.device.type == "mps":  # int64 products are slow there, and the words must agree bit for bit
        mask = dropout_mask_reference(
            ordinals.cpu(), shape, threshold, layer=layer, seed=seed, channels_last=channels_last
        )
        return mask.to(ordinals.device)
    num_channels, height, width = shape
    num_samples, num_elements = ordinals.shape[0], num_channels * height * width
    num_counters = -(-num_elements // 8)
    c1, c2 = split_ordinals(ordinals)
    keep = torch.empty(num_samples, num_counters, 8, dtype=torch.bool, device=ordinals.device)
    counters_step = max(1, min(num_counters, CHUNK_QUADS))
    samples_step = max(1, CHUNK_QUADS // counters_step)
    for counter in range(0, num_counters, counters_step):
        counters = torch.arange(counter, min(counter + counters_step, num_counters), device=ordinals.device)
        for sample in range(0, num_samples, samples_step):
            samples = slice(sample, sample + samples_step)
            even, odd = philox_grid(
                split_seed(seed), counters, c1[samples], c2[samples], stream_tag(Stream.DROPOUT, layer)
            )
            block = keep[samples, counter : counter + counters_step]
            size = block.shape[0] * block.shape[1]
            for word, row in ((0, even[0]), (1, odd[1]), (2, even[1]), (3, odd[0])):
                # int32 halves of the little-endian word: [..., 0] the low 16 bits, [..., 1] the high ones.
                halves = row[:size].view(torch.int16).view(*block.shape[:2], 4)[..., :2].to(torch.int32)
                torch.ge(halves.bitwise_and_(HALVES - 1), threshold, out=block[..., 2 * word : 2 * word + 2])
    images = keep.view(num_samples, -1)[:, :num_elements].reshape(num_samples, height, width, num_channels)
    return images.permute(0, 3, 1, 2).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@torch.library.custom_op("fastddpm_kernels::dropout_mask", mutates_args=())
def _dropout_mask_op(
    ordinals: Tensor, shape: list[int], threshold: int, layer: int, seed: int, channels_last: bool
) -> Tensor:
    num_channels, height, width = shape
    return dropout_mask_reference(
        ordinals, (num_channels, height, width), threshold, layer=layer, seed=seed, channels_last=channels_last
    )


@_dropout_mask_op.register_fake
def _(ordinals: Tensor, shape: list[int], threshold: int, layer: int, seed: int, channels_last: bool) -> Tensor:
    return torch.empty(
        (ordinals.shape[0], *shape),
        dtype=torch.bool,
        device=ordinals.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
