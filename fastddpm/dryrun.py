"""`fastddpm train --dry-run`: what a config amounts to, found without data and without allocating anything.

Memory is counted by taking the trainer's own step on torch's fake tensors, which have shapes and storages but no
values, and adding up what is alive at each moment: so mixed precision, recomputation and the order in which the
backward pass frees what it has used are in it. What libraries hold besides (a CUDA context, workspaces of convolutions,
gaps between blocks) is not.
"""

import json
import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import Config, to_dict
from .diffusion import TrainingProcess
from .errors import ConfigError
from .flops import flops_per_image
from .machine import DTYPES, _measured_precision
from .step import TrainStep
from .unet import UNet

GIB = 2.0**30
MASTER_BYTES = 4 * 4  # of a parameter between steps, fp32 each: weight, two moments of Adam, average


class _Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks, self.now, self.peak = masks, 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (self.masks or tensor.dtype != torch.bool):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def step_bytes(config: Config, images: int, dtype: torch.dtype, *, fused: bool, world: int = 1) -> int:
    """Peak memory of a training step's tensors: weights, moments, average, gradient and activations.

    Args:
        images: of a micro-batch.
        dtype: of activations.
        fused: the norms are single kernels, as on a GPU and with --compile on a CPU; else torch's own operators,
            which keep more.
        world: processes, several of which hold the gradient all the time.
    """
    with torch.device("meta"):
        nets = [UNet(config.network()) for _ in range(2)]
    # The kernels draw dropout masks again in the backward pass; "reference", which stands for them, keeps them.
    with FakeTensorMode(), _Alive(masks=not fused) as alive:
        unet, ema_unet = (_faked(net) for net in nets)
        unet.shared.impl = "reference" if fused else None
        diffusion = config.diffusion
        process = TrainingProcess.of(
            diffusion, seed=0, flip=config.data.flip, batch_size=config.batch_size, device=torch.device("cpu")
        )
        augment = config.data.augment
        step = TrainStep(unet.train(), ema_unet.eval(), process, config.optim, config.ema, dtype=dtype, augment=augment)
        moments = [torch.empty_like(weight) for weight in step.weights for _ in range(2)]
        if world > 1 or config.accumulation > 1:
            for weight in step.weights:
                weight.grad = torch.zeros_like(weight)
        shape = images, config.channels, *config.model.image_size
        x_0 = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        # The optimiser and the average add nothing to what is alive at the end of the backward pass.
        labels = torch.empty(images, dtype=torch.int64) if config.conditional else None
        step.accumulate(x_0, torch.empty(images, dtype=torch.int64), labels)
        del moments
    return alive.peak


def _faked(net: UNet) -> UNet:
    """A net of the meta device with parameters of the fake CPU: on "meta" convolutions forget the memory's order."""
    for module in net.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
            setattr(module, name, nn.Parameter(empty))
    return net


def describe(config: Config, world: int = 1) -> str:
    """The config as JSON, then parameter count, GFLOP per image and a memory estimate per process.

    The memory is that on this machine's device and, where that is a CPU, on a GPU too.

    Raises:
        ConfigError: if the config cannot be run.
    """
    config.check()
    if config.conditional and config.model.num_class_embeds is None:
        raise ConfigError("a dry run opens no data: say how many classes there are with --model.num-class-embeds")
    images = config.micro_batch(world)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(config.network()).parameters())
    flop = flops_per_image(config.network())
    lines = [
        json.dumps(to_dict(config), indent=2),
        f"parameters   {parameters:,}",
        f"compute      {flop / 1e9:.3f} GFLOP per image forward, {3 * flop / 1e9:.3f} forward and backward",
    ]
    state, shared, note = parameters * (MASTER_BYTES + 4 * len(config.ema.widths)), 0.0, ""
    if config.sharding == "fsdp2" and world > 1:
        # Weights, moments, averages and, after the backward pass, gradients.
        shared = (state + 4 * parameters) * (1 - 1 / world)
        state, note = state // world, f", shared out among {world} processes (without the layer that is gathered)"
    for device, precision in _devices(config):
        fused = device == "GPU" or config.compile
        total = max(0.0, step_bytes(config, images, DTYPES[precision], fused=fused, world=world) - shared)
        lines.append(
            f"memory       about {total / GIB:.2f} GiB per process on a {device} in {precision}: {state / GIB:.2f} "
            f"weights, moments and average, {(total - state) / GIB:.2f} gradient and activations of {images} images"
            f"{note}"
        )
    return "\n".join(lines)


def _devices(config: Config) -> list[tuple[str, str]]:
    """(GPU or CPU, precision) for which memory is estimated, this machine's device first."""
    # As accelerate reads it.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    automatic = config.precision == "auto"
    if torch.cuda.is_available() and not on_cpu:
        return [("GPU", _measured_precision(torch.device("cuda"))[0] if automatic else config.precision)]
    gpu = ("GPU", "bf16" if automatic else config.precision)
    if config.precision == "fp16":  # which no CPU trains in
        return [gpu]
    return [("CPU", _measured_precision(torch.device("cpu"))[0] if automatic else config.precision), gpu]
