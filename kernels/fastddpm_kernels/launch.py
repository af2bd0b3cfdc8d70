"""How a sample is cut into tiles, and the launches: everything about a kernel call that is not the kernel."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._dispatch import is_channels_last
from ._triton import interpreting
from .philox import split_seed

WARP = 32  # one warp a program: sums over a tile need no shared memory
WAVEFRONT = 64  # the warp of AMD's data-centre GPUs
MAX_GROUP = 48  # elements a thread holds at once; more would spill
# Elements a thread handles in one pass of the loop, which is unrolled, and in all. 32 and 64 spread the fixed costs (a
# fifth of the instructions at 8) as far as they matter; unrolling everything would compile for 4 s instead of 0.6.
ELEMENTS_PER_PASS = 32
ELEMENTS_PER_THREAD = 64
# With more tensors to read than this a pass is half as long: the reverse step with guidance, learned variance and two
# of history would need 254 registers a thread, and so needs 130 and no more instructions.
MOST_READ = 4
INLINE_ASM = os.environ.get("FASTDDPM_INLINE_ASM", "1") != "0"  # False: the code of other GPUs on NVIDIA's too
# In the interpreter a program costs 15 ms whatever its size: a tile is then the whole sample, unless a test sets this.
INTERPRETER_GROUPS: int | None = None


@dataclass(frozen=True)
class Tiles:
    """How [N, C, H, W] is cut: the constexpr arguments that every tiled kernel takes (see tiles.py)."""

    C: int
    PLANE: int
    WIDTH: int
    PIXELS: int
    LAYOUT: str
    GROUPS: int
    UNROLL: int
    BLOCKS: int
    TILES: int
    EVEN: bool
    FAST: bool

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments by name."""
        return dict(self.__dict__)


def tiles(
    shape: tuple[int, int, int],
    channels_last: bool,
    item_bytes: int,
    *,
    flip: bool = False,
    num_read: int = 1,
    fast: bool = True,
    threads: int = WARP,
    interpreter: bool = False,
) -> Tiles:
    """Cut samples of shape (C, H, W) whose widest tensor has items of item_bytes.

    A run of PIXELS elements is at most 16 bytes in every tensor: then a thread's run is one load or store. num_read:
    how many tensors of the samples' size a pass holds in registers.
    """
    num_channels, height, width = shape
    size = num_channels * height * width
    if size > 2**30:  # offsets within a sample are 32 bits wide, and the last tile may reach beyond its end
        raise ValueError(f"a sample of {size} elements is too large for the kernels: the limit is 2^30")
    channels_last = channels_last or num_channels == 1
    if channels_last and not flip:
        num_channels, height, width = 1, 1, size
    plane = height * width
    pixels = 1
    for candidate in (8, 4):
        fits = candidate * item_bytes <= 16 and candidate * num_channels <= MAX_GROUP
        if fits and (width if flip else plane) % candidate == 0:
            pixels = candidate
            break
    group = pixels * num_channels if pixels > 1 else 4
    num_groups = -(-size // group)
    whole = 1 << max(0, num_groups - 1).bit_length()
    groups = (INTERPRETER_GROUPS or whole) if interpreter else threads
    num_blocks = max(1, -(-num_groups // groups))
    unroll = _largest_divisor(num_blocks, ELEMENTS_PER_PASS // (group if num_read <= MOST_READ else 2 * group))
    blocks = _largest_divisor(num_blocks // unroll, ELEMENTS_PER_THREAD // (group * unroll))
    return Tiles(
        C=num_channels,
        PLANE=plane,
        WIDTH=width,
        PIXELS=pixels,
        LAYOUT="nhwc" if channels_last else "nchw",
        GROUPS=groups,
        UNROLL=unroll,
        BLOCKS=blocks,
        TILES=num_blocks // (unroll * blocks),
        EVEN=pixels > 1 and num_groups % groups == 0,
        FAST=fast,
    )


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of number that is at most `most` (at least 1)."""
    return max(d for d in range(1, max(1, most) + 1) if number % d == 0)


def tiles_of(x: Tensor, item_bytes: int, *, flip: bool = False, num_read: int = 1) -> Tiles:
    """`tiles` for x [N, C, H, W] as it lies on its device."""
    return tiles(
        (x.shape[1], x.shape[2], x.shape[3]),
        is_channels_last(x),
        item_bytes,
        flip=flip,
        num_read=num_read,
        fast=is_fast(x.device),
        threads=WARP if torch.version.hip is None else WAVEFRONT,
        interpreter=interpreting(),
    )


def is_fast(device: torch.device) -> bool:
    """True where the kernels may use NVIDIA's inline assembly: on its GPUs, unless FASTDDPM_INLINE_ASM=0."""
    return INLINE_ASM and device.type == "cuda" and torch.version.hip is None and not interpreting()


def signed_word(word: int) -> int:
    """A uint32 as the signed 32-bit int of the same bits: always the same argument type, so it recompiles nothing."""
    return word - (word >> 31 << 32)


def seed_words(seed: int) -> tuple[int, int]:
    """The Philox key as two signed words."""
    low, high = split_seed(seed)
    return signed_word(low), signed_word(high)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one, where Triton launches."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    return torch.xpu.device(x.device) if x.device.type == "xpu" else nullcontext()


# Options of every launch. Fusion is explicit: Triton 3.10 turns it off, and the last bits depend on it.
LAUNCH: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
