"""dropout: masks addressed by (seed, layer, sample, element), which survive restarts and any number of processes.

One counter serves 8 elements: c0 = e // 8, half-word k = e % 8 is word k // 2 (low 16 bits if k is even, else high);
an element is kept where its half-word >= round(p 65536), and kept values are scaled by the exact kept share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import check_images, check_per_sample, is_channels_last, resolve_impl
from ._triton import interpreting, tl, triton
from .launch import LAUNCH, on_device, seed_words, signed_word
from .ops import Case, Kwargs, Op, example_floats, example_ordinals
from .philox import CHUNK_QUADS, Stream, philox_grid, split_ordinals, split_seed, stream_tag
from .tiles import join_4, philox, split_ordinal

HALVES = 65536


@triton.jit(do_not_specialize=["threshold", "tag", "seed_low", "seed_high"])
def _dropout_mask_kernel(
    ordinals_ptr,  # [N] int64
    keep_ptr,  # [N, D] uint8, memory order CHANNELS_LAST or not
    threshold,
    tag,
    seed_low,
    seed_high,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c1, c2 = split_ordinal(tl.load(ordinals_ptr + n))
    c3 = tag.to(tl.uint32, bitcast=True)
    key_0 = seed_low.to(tl.uint32, bitcast=True)
    key_1 = seed_high.to(tl.uint32, bitcast=True)
    counters = tile * BLOCK + tl.arange(0, BLOCK)
    word_0, word_1, word_2, word_3 = philox(counters.to(tl.uint32), c1, c2, c3, key_0, key_1)
    words = join_4(word_0, word_1, word_2, word_3, BLOCK)
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK, 8)).to(tl.int32)
    elements = counters[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = elements < C * PLANE
    offs = elements if CHANNELS_LAST else (elements % C) * PLANE + elements // C
    keep_ptr += n * (C * PLANE)
    tl.store(keep_ptr + offs, (halves >= threshold).to(tl.uint8), mask=mask)


def dropout(x: Tensor, p: float, ordinals: Tensor, *, layer: int, seed: int, impl: str | None = None) -> Tensor:
    """Zero each element of x with probability round(p 65536) / 65536 and scale the rest to keep the mean.

    x [N, C, H, W] floating point; elements are counted in H, W, C order whatever the memory format. p in [0, 1);
    ordinals int64 [N] on x's device; layer: the index of the dropout layer, 0 to 65535. Differentiable in x (the mask
    is kept, one byte an element). Returns x's dtype and memory format. With p = 0 it returns x itself. impl says how
    the mask is drawn. Raises ValueError for arguments out of shape or range.
    """
    check_images("x", x)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    check_per_sample("ordinals", ordinals, x.shape[0], torch.int64, x.device)
    split_seed(seed)
    threshold = dropout_threshold(p)
    if threshold == 0:
        return x
    tag, impl = stream_tag(Stream.DROPOUT, layer), resolve_impl(impl, x.device)
    keep = _dropout_mask_op(ordinals, list(x.shape[1:]), threshold, tag, seed, is_channels_last(x), impl)
    return _apply(x, keep, threshold)


def dropout_reference(x: Tensor, p: float, ordinals: Tensor, *, layer: int, seed: int) -> Tensor:
    """`dropout` in plain torch."""
    shape, threshold, tag = (x.shape[1], x.shape[2], x.shape[3]), dropout_threshold(p), stream_tag(4, layer)
    return _apply(x, dropout_mask_reference(ordinals, shape, threshold, tag, seed, is_channels_last(x)), threshold)


def dropout_triton(x: Tensor, p: float, ordinals: Tensor, *, layer: int, seed: int) -> Tensor:
    """`dropout` with its mask drawn by one Triton launch."""
    shape, threshold, tag = (x.shape[1], x.shape[2], x.shape[3]), dropout_threshold(p), stream_tag(4, layer)
    return _apply(x, _launch_mask(ordinals, shape, threshold, tag, seed, is_channels_last(x)), threshold)


def dropout_threshold(p: float) -> int:
    """round(p 65536): half-words below it drop their element. Raises ValueError unless it is in [0, 65536)."""
    threshold = round(p * HALVES) if 0.0 <= p < 1.0 else HALVES
    if threshold >= HALVES:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return threshold


def _apply(x: Tensor, keep: Tensor, threshold: int) -> Tensor:
    return torch.where(keep, x, 0.0).mul_(HALVES / (HALVES - threshold))


def dropout_mask_reference(
    ordinals: Tensor, shape: tuple[int, int, int], threshold: int, tag: int, seed: int, channels_last: bool
) -> Tensor:
    """The kept elements, bool [N, C, H, W] for shape (C, H, W)."""
    if ordinals.device.type == "mps":  # the words must agree bit for bit: made where int64 products are known to
        return dropout_mask_reference(ordinals.cpu(), shape, threshold, tag, seed, channels_last).to(ordinals.device)
    num_channels, height, width = shape
    num_samples, num_elements = ordinals.shape[0], num_channels * height * width
    num_counters = -(-num_elements // 8)
    key = split_seed(seed)
    c1, c2 = split_ordinals(ordinals)
    keep = torch.empty(num_samples, num_counters, 8, dtype=torch.bool, device=ordinals.device)
    counters_step = max(1, min(num_counters, CHUNK_QUADS))
    samples_step = max(1, CHUNK_QUADS // counters_step)
    for counter in range(0, num_counters, counters_step):
        counters = torch.arange(counter, min(counter + counters_step, num_counters), device=ordinals.device)
        for sample in range(0, num_samples, samples_step):
            samples = slice(sample, sample + samples_step)
            even, odd = philox_grid(key, counters, c1[samples], c2[samples], tag)
            block = keep[samples, counter : counter + counters_step]
            size = block.shape[0] * block.shape[1]
            words = torch.empty(*block.shape[:2], 4, dtype=torch.int32, device=keep.device)
            for word, row in enumerate((even[0], odd[1], even[1], odd[0])):
                words[..., word] = row[:size].view(block.shape[:2])  # keeps the low 32 bits
            # Little-endian halves, low before high, compared as unsigned numbers: both sides less 2^15.
            halves = words.view(torch.int16).bitwise_xor_(-(2**15))
            torch.ge(halves, threshold - 2**15, out=block)
    images = keep.view(num_samples, num_counters * 8)[:, :num_elements]
    images = images.reshape(num_samples, height, width, num_channels).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _launch_mask(
    ordinals: Tensor, shape: tuple[int, int, int], threshold: int, tag: int, seed: int, channels_last: bool
) -> Tensor:
    """`dropout_mask_reference` as one Triton launch."""
    keep = _empty_mask(ordinals, shape, channels_last)
    if keep.numel() == 0:
        return keep
    plane = shape[1] * shape[2]
    if shape[0] * plane > 2**30:  # offsets within a sample are 32 bits wide
        raise ValueError(f"a sample of {shape[0] * plane} elements is too large for the kernels: the limit is 2^30")
    num_counters = -(-shape[0] * plane // 8)
    block = 1 << (num_counters - 1).bit_length() if interpreting() else 64
    num_tiles = -(-num_counters // block)
    with on_device(keep):
        _dropout_mask_kernel[(ordinals.shape[0] * num_tiles,)](
            ordinals.contiguous(),
            keep.view(torch.uint8),
            threshold,
            signed_word(tag),
            *seed_words(seed),
            C=shape[0],
            PLANE=plane,
            CHANNELS_LAST=channels_last,
            BLOCK=block,
            TILES=num_tiles,
            **LAUNCH,
        )
    return keep


def _empty_mask(ordinals: Tensor, shape: tuple[int, int, int], channels_last: bool) -> Tensor:
    return torch.empty(
        (ordinals.shape[0], *shape),
        dtype=torch.bool,
        device=ordinals.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


@torch.library.custom_op("fastddpm_kernels::dropout_mask", mutates_args=())
def _dropout_mask_op(
    ordinals: Tensor, shape: list[int], threshold: int, tag: int, seed: int, channels_last: bool, impl: str
) -> Tensor:
    function = _launch_mask if impl == "triton" else dropout_mask_reference
    return function(ordinals, (shape[0], shape[1], shape[2]), threshold, tag, seed, channels_last)


@_dropout_mask_op.register_fake
def _(
    ordinals: Tensor, shape: list[int], threshold: int, tag: int, seed: int, channels_last: bool, impl: str
) -> Tensor:
    return _empty_mask(ordinals, (shape[0], shape[1], shape[2]), channels_last)


def _example(case: Case) -> Kwargs:
    return {
        "x": example_floats(case, "x"),
        "p": 0.1 if case.variant == "p=0.1" else 0.5,
        "ordinals": example_ordinals(case),
        "layer": 21,
        "seed": 2**62 + case.seed,
    }


DROPOUT = Op(
    "dropout",
    dropout,
    dropout_reference,
    dropout_triton,
    _example,
    ("p=0.1", "p=0.5"),
    (torch.float32, torch.bfloat16, torch.float16),
)
