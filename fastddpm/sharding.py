"""Sharded training (FSDP2): each process holds its rows of every weight, gradient, moment and average.

torch's fully_shard gathers the weights of one layer at a time, before its forward and before its backward pass, and
scatters the mean of its gradients (Zhao et al. 2023, "PyTorch FSDP"; rows = dimension 0, which is cut into equal parts
of which the last may be shorter or empty). What a process holds of a weight is ordinary local memory, so optimiser,
clipping and averages are element by element on it; only the gradient's norm is a sum over the processes.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .blocks import Attention, Downsample, ResnetBlock, Upsample
from .errors import ConfigError
from .unet import UNet

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Which part of a weight a process holds: rows start .. stop - 1 of dimension 0 of a tensor of `shape`."""

    start: int
    stop: int
    shape: tuple[int, ...]


def check_sharding(*, precision: str, compiled: bool, graph: bool) -> None:
    """Raises ConfigError for what is not right with --sharding fsdp2, naming it."""
    reasons = {
        "precision fp16 (its loss scale is judged by each process alone): use bf16 or fp32": precision == "fp16",
        "--compile (layers are gathered by hooks that a compiled block skips): leave it out": compiled,
        "--graph (processes exchange weights within a step): leave it out": graph,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"--sharding fsdp2 does not go with {reason}")


def shard(unet: UNet, device: torch.device) -> None:
    """Share a net's parameters out among all processes, in place; called on all of them with equal nets.

    Each residual block, attention and resampling is gathered by itself, the rest with the net. The net may lie on the
    host: its layers are moved to the device one by one, so that no device ever holds all of it. From then on its
    parameters are DTensors in plain (contiguous) order; names, forward, noise_address and frozen are as before, but
    every forward pass is a meeting of all processes.

    Raises:
        ConfigError: if there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("--sharding fsdp2 needs several processes: launch it as launch/fsdp2.yaml says")
    # Blocks hand on views and nothing writes into them; torch says so once per layer and process all the same.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    unet.shared.sharded = True
    for parameter in unet.parameters():  # fully_shard takes no other order; convolutions turn their copies around
        parameter.data = parameter.data.contiguous()
    layers = [m for m in unet.modules() if isinstance(m, ResnetBlock | Attention | Downsample | Upsample)]
    for module in (*layers, unet):
        # Also the root's: torch would leave it gathered after a forward pass without a backward one, and the next
        # would compute with weights from before the optimiser's steps in between.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been called on it."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its own memory, without a gradient; all of a plain tensor."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # or it would be an operation that has a gradient, some 10 us each
            tensor = tensor.to_local()
    return tensor.detach()


def rows(module: nn.Module) -> dict[str, Rows]:
    """By parameter name, what this process holds of a sharded net; empty for one that is not sharded."""
    held = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            most = -(-parameter.shape[0] // dist.get_world_size())  # rows of all processes but the last ones
            start = min(dist.get_rank() * most, parameter.shape[0])
            held[name] = Rows(start, start + len(local(parameter)), tuple(parameter.shape))
    return held


@contextmanager
def gradients_kept(unet: nn.Module) -> Iterator[None]:
    """Inside, backward passes add to whole gradients on each process and send none (weights are gathered still)."""
    assert isinstance(unet, FSDPModule)
    unet.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        unet.set_requires_gradient_sync(True)


def total_norm(tensors: Iterable[Tensor], *, sharded: bool) -> Tensor:
    """The 2-norm over all tensors, float32 [] on their device; sharded: over all processes' parts, the same on each.

    The host does not wait for it.
    """
    norm = torch.nn.utils.get_total_norm(tensors)
    if not sharded:
        return norm
    square = norm.square()
    dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0's host, an empty one elsewhere; called on all processes.

    Weight by weight, so that a device holds one of them at most. A net that is not sharded gives its own state dict.
    """
    whole = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not dist.is_initialized() or dist.get_rank() == 0:
            whole[name] = full.to("cpu")
        del full
    return whole


class Peers:
    """All processes of a run, which agree on small facts through a group of their own.

    Its own, and on the host: a thread that writes a checkpoint may meet the other writers while training goes on.
    Made by all processes at once.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, value: T) -> list[T]:
        """What each process gave, by rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


class Alone:
    """One process, with which nobody has to agree."""

    rank, world = 0, 1

    def exchange(self, value: T) -> list[T]:
        """What this process gave."""
        return [value]
