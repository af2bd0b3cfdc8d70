"""The record of an op: what tests and benchmarks need to run it without knowing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kwargs = dict[str, Any]
NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Case:
    """One set of example inputs. dtype is that of the op's activations; variant is one of the op's variants."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    device: str = "cpu"
    variant: str = ""
    seed: int = 1234

    def generator(self, argument: str) -> torch.Generator:
        """A CPU generator for one argument: every device gets the same inputs, and no two arguments are alike."""
        return torch.Generator().manual_seed(self.seed + int.from_bytes(argument.encode()) % 2**32)

    def place(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] on the case's device and in its memory format."""
        return x.to(self.device).contiguous(
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )


@dataclass(frozen=True)
class Op:
    """An op and its implementations; all three callables take the keyword arguments that `example` makes."""

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    triton: Callable[..., Any]
    example: Callable[[Case], Kwargs]
    variants: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


def example_schedule(case: Case) -> Kwargs:
    """t, ordinals and tables of a cosine-like schedule; the first two samples have t = 0 and t = T - 1."""
    num_samples = case.shape[0]
    alpha_bar = torch.cos(torch.linspace(0.01, 1.56, NUM_TIMESTEPS, dtype=torch.float64)).square()
    t = torch.randint(NUM_TIMESTEPS, (num_samples,), generator=case.generator("t"))
    t[:1], t[1:2] = 0, NUM_TIMESTEPS - 1
    return {
        "t": t.to(case.device),
        "ordinals": example_ordinals(case),
        "sqrt_alpha_bar": alpha_bar.sqrt().float().to(case.device),
        "sqrt_one_minus_alpha_bar": (1.0 - alpha_bar).sqrt().float().to(case.device),
        "seed": 2**62 + case.seed,
    }


def example_ordinals(case: Case) -> Tensor:
    """Ordinals of which some need the high word."""
    ordinals = torch.randint(2**62, (case.shape[0],), generator=case.generator("ordinals"))
    ordinals[::2] &= 0xFFFF
    return ordinals.to(case.device)


def example_images(case: Case) -> Tensor:
    """Random uint8 images."""
    return case.place(torch.randint(256, case.shape, generator=case.generator("images"), dtype=torch.uint8))


def example_flip(case: Case) -> Tensor:
    """Flip flags with both values."""
    return (torch.arange(case.shape[0]) % 2 == 0).to(case.device)


def example_floats(case: Case, argument: str, dtype: torch.dtype | None = None) -> Tensor:
    """Random normals of the dtype (default: the case's) for the named argument."""
    return case.place(torch.randn(case.shape, generator=case.generator(argument)).to(dtype or case.dtype))
