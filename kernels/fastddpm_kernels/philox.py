"""Addressable random numbers: Philox4x32-10 words and the normals made of them, as plain torch.

Every number is a pure function of (seed, stream, sample, element), so it does not depend on the batch, the device, the
number of processes or a restart. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    key     = (seed low, seed high)
    counter = (c0 quad index in the sample, c1 and c2 low and high words of the sample's ordinal, c3 stream tag)
    u1 = w 2^-32 + 2^-33, theta = int32(w') 2 pi / 2^32, r = sqrt(-2 ln u1), normals r cos(theta), r sin(theta)
    with (w, w') = (w0, w1) and (w2, w3)

Elements are counted in H, W, C order whatever the memory format: e = (h W + w) C + c, and the quad is e // 4.
"""

from __future__ import annotations

import enum
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

numpy: ModuleType | None
try:
    import numpy
except ImportError:  # torch runs without it
    numpy = None

STREAM_VERSION = 0

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
MASK = 0xFFFFFFFF
# Quads per pass of the reference: its buffers (about 1 MB) stay in a core's cache, and it is under the size at which
# torch cuts an elementwise loop over threads.
CHUNK_QUADS = 8192
# torch computes the end of a loop with other code than its vectors, and log, sin and cos may then differ in the last
# bit: buffers are padded to whole vectors, so that a sample's noise never depends on where in a batch it lies.
PAD = 64


class Stream(enum.IntEnum):
    """What a random number is for: the lowest byte of the stream tag. Frozen with STREAM_VERSION."""

    EPS = 1  # training noise
    TIMESTEP = 2
    FLIP = 3
    DROPOUT = 4
    X_T = 5  # initial noise of sampling
    Z = 6  # noise of the reverse steps
    OFFSET = 7  # training noise that is the same in all pixels of a channel
    LABEL = 8  # whether a sample's label is dropped
    SELF_CONDITION = 9  # whether a sample is given an estimate of its own
    AUGMENT = 10  # parameters of a sample's augmentation
    RENOISE = 11  # noise that goes back up the chain: RePaint's jumps, starts from an image
    BOUND = 12  # noise of the bound's Monte Carlo estimate
    PROBE = 13  # Hutchinson's probes


def stream_tag(kind: int, layer: int = 0) -> int:
    """Counter word c3: STREAM_VERSION << 24 | layer << 8 | kind. `layer` numbers dropout layers, 0 to 65535."""
    if not 0 <= int(kind) < 256 or not 0 <= layer < 65536:
        raise ValueError(
            f"stream kind must be in [0, 256) and layer in [0, 65536), got kind {int(kind)}, layer {layer}"
        )
    return STREAM_VERSION << 24 | layer << 8 | int(kind)


def split_seed(seed: int) -> tuple[int, int]:
    """The Philox key of a seed in [0, 2^63): its low and high 32 bits. Raises ValueError outside the range."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    return seed & MASK, seed >> 32


def philox_words(
    seed: int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (c0, c1, c2, c3) under the key (seed & 0xffffffff, seed >> 32).

    Counters are int64 tensors (or ints) holding uint32 values and broadcast against each other; the four results are
    int64 tensors holding uint32 values. seed: int in [0, 2^64) here, so that Random123's known answers can be asked
    for (the ops take [0, 2^63)).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    device = next((c.device for c in (c0, c1, c2, c3) if isinstance(c, Tensor)), torch.device("cpu"))
    a, b, c, d = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (c0, c1, c2, c3))
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(NUM_ROUNDS):
        # int64 products wrap modulo 2^64: the shift brings sign bits along, the mask takes them off.
        p0, p1 = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((p1 >> 32) ^ b ^ k0) & MASK, p1 & MASK, ((p0 >> 32) ^ d ^ k1) & MASK, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    w0, w1, w2, w3 = torch.broadcast_tensors(a, b, c, d)
    return w0, w1, w2, w3


def philox_grid(key: tuple[int, int], quads: Tensor, c1: Tensor, c2: Tensor, c3: Tensor | int) -> tuple[Tensor, Tensor]:
    """Words of every (sample, quad), the work-horse of the references: in place and few torch calls.

    quads [q], c1 and c2 [n], all int64; c3 an int or int64 [q]. Returns (even, odd), int64 [2, m] with m = n q rounded
    up to PAD, samples outermost: even = words 0 and 2, odd = words 3 and 1 (the order in which the rounds leave them).
    """
    n, q = c1.shape[0], quads.shape[0]
    size = -(-n * q // PAD) * PAD
    keys = [tuple((k + r * w) & MASK for k, w in zip(key, WEYL, strict=True)) for r in range(NUM_ROUNDS)]
    even = torch.empty(2, size, dtype=torch.int64, device=c1.device)
    odd = torch.empty_like(even)
    if numpy is not None and c1.device.type == "cpu":
        words = [x.numpy().view(numpy.uint64) if isinstance(x, Tensor) else x for x in (even, odd, quads, c1, c2, c3)]
        _first_rounds(words, keys)
        _rounds_numpy(words[0], words[1], keys[2:])
    else:
        _first_rounds([even, odd, quads, c1, c2, c3], keys)
        _rounds_torch(even, odd, keys[2:])
    return even, odd


def _first_rounds(words: list[Any], keys: list[tuple[int, ...]]) -> None:
    """The first two rounds, of torch tensors or numpy arrays: they act on values of the sample or the quad alone."""
    even, odd, quads, c1, c2, c3 = words
    n, q = c1.shape[0], quads.shape[0]
    p0, p1 = quads * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
    a, b = ((p1 >> 32) ^ c1 ^ keys[0][0]) & MASK, p1 & MASK  # by sample
    c, d = ((p0 >> 32) ^ c3 ^ keys[0][1]) & MASK, p0 & MASK  # by quad
    p0, p1 = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
    even[0, : n * q].reshape(n, q)[...] = ((p1 >> 32) & MASK ^ keys[1][0])[None, :] ^ b[:, None]
    even[1, : n * q].reshape(n, q)[...] = ((p0 >> 32) & MASK ^ keys[1][1])[:, None] ^ d[None, :]
    odd[0, : n * q].reshape(n, q)[...] = (p0 & MASK)[:, None]
    odd[1, : n * q].reshape(n, q)[...] = (p1 & MASK)[None, :]


def _rounds_torch(even: Tensor, odd: Tensor, keys: list[tuple[int, ...]]) -> None:
    """Rounds in place on (even, odd) as `philox_grid` returns them. Scalars are tensors and rows are sliced once."""
    multipliers, mask, shift = torch.tensor((*MULTIPLIERS, MASK, 32), device=even.device).split((2, 1, 1))
    product, high = torch.empty_like(even), torch.empty_like(even)
    (even_0, even_2), (odd_3, odd_1), (high_0, high_1) = even.unbind(0), odd.unbind(0), high.unbind(0)
    for key in torch.tensor(keys, device=even.device)[:, :, None].unbind(0):
        torch.mul(even, multipliers[:, None], out=product)
        torch.bitwise_right_shift(product, shift, out=high)
        torch.bitwise_xor(high_1, odd_1, out=even_0)
        torch.bitwise_xor(high_0, odd_3, out=even_2)
        even.bitwise_xor_(key).bitwise_and_(mask)
        torch.bitwise_and(product, mask, out=odd)


def _rounds_numpy(even: Any, odd: Any, keys: list[tuple[int, ...]]) -> None:
    """`_rounds_torch` on uint64 arrays: half the time, by cheaper calls and a shift that brings no sign."""
    assert numpy is not None
    multipliers = numpy.array(MULTIPLIERS, dtype=numpy.uint64)[:, None]
    mask, shift = numpy.uint64(MASK), numpy.uint64(32)
    product, high = numpy.empty_like(even), numpy.empty_like(even)
    for key in numpy.array(keys, dtype=numpy.uint64)[:, :, None]:
        numpy.multiply(even, multipliers, out=product)
        numpy.right_shift(product, shift, out=high)
        numpy.bitwise_xor(high[1], odd[1], out=even[0])
        numpy.bitwise_xor(high[0], odd[0], out=even[1])
        numpy.bitwise_xor(even, key, out=even)
        numpy.bitwise_and(product, mask, out=odd)


def split_ordinals(ordinals: Tensor) -> tuple[Tensor, Tensor]:
    """Counter words c1, c2 of int64 ordinals: their low and high 32 bits."""
    return ordinals & MASK, (ordinals >> 32) & MASK


def normals_reference(
    seed: int, c1: Tensor, c2: Tensor, c3: int, num_elements: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normals [N, num_elements] in element order for the samples (c1, c2), int64 [N] each.

    The words are exact and the transform is float64, rounded to dtype at the end. Runs on c1's device; on one without
    float64 (MPS) the numbers are made on the CPU and moved.
    """
    if c1.device.type == "mps":
        return normals_reference(seed, c1.cpu(), c2.cpu(), c3, num_elements, dtype).to(c1.device)
    key = split_seed(seed)
    num_samples, num_quads = c1.shape[0], -(-num_elements // 4)
    out = torch.empty(num_samples, num_quads, 4, dtype=dtype, device=c1.device)
    quads_step = min(num_quads, CHUNK_QUADS)
    samples_step = max(1, CHUNK_QUADS // max(1, quads_step))
    for quad in range(0, num_quads, max(1, quads_step)):
        quads = torch.arange(quad, min(quad + quads_step, num_quads), device=c1.device)
        for sample in range(0, num_samples, samples_step):
            samples = slice(sample, sample + samples_step)
            even, odd = philox_grid(key, quads, c1[samples], c2[samples], c3)
            block = out[samples, quad : quad + quads_step]
            size, shape = block.shape[0] * block.shape[1], block.shape[:2]
            radius = even.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
            # The lower half of a little-endian int64 read as int32 is the word with its sign.
            angle = odd.view(torch.int32)[:, 0::2].to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
            product, wave = torch.empty_like(angle), torch.empty_like(angle)
            for first, function in ((0, torch.cos), (1, torch.sin)):
                function(angle, out=wave)
                torch.mul(radius[0], wave[1], out=product[0])
                torch.mul(radius[1], wave[0], out=product[1])
                block[..., first].copy_(product[0, :size].view(shape))
                block[..., first + 2].copy_(product[1, :size].view(shape))
    return out.view(num_samples, num_quads * 4)[:, :num_elements]
