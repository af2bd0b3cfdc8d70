"""One optimiser step: noise, predict, loss, gradient, clip, optimiser, EMA. Nothing in it waits for the device."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .config import EMAConfig, OptimConfig
from .diffusion import TrainingProcess
from .errors import ConfigError
from .graphs import capture
from .optim import as_line, clip_factor, ema_decay, learning_rate, make_optimizer, update_ema
from .sharding import gradients_kept, is_sharded, local, total_norm
from .unet import UNet

EAGER_STEPS = 3  # before a graph is captured: libraries choose their algorithms and allocate in them


class TrainStep:
    """DDPM's training step (Ho et al. 2020, algorithm 1) on one process's images, all of it on the device.

    A step is one call, or with accumulation several calls of `accumulate` and one of `update`.

    Args:
        unet: the network, on its device; its parameters are trained, in their own dtype.
        ema_unet: a copy of it, which becomes the average of its weights; sharded if the network is.
        process: noising and loss.
        optim, ema: of the config.
        dtype: of activations and the prediction: float32, bfloat16 or float16.
        horizon: step at which the learning rate's decay ends; by default optim.horizon.
        share: weight of one image in this process's gradient; by default 1 over the images of a call.
        accelerator: prepares model and optimiser for its processes and loss scale; by default there is one process.
        graph: capture the whole step in a CUDA graph, after a few steps without, and again when shapes change.

    Raises:
        ConfigError: where no graph can be captured: without CUDA, with several processes, or with a loss scale.
    """

    def __init__(
        self,
        unet: UNet,
        ema_unet: UNet,
        process: TrainingProcess,
        optim: OptimConfig,
        ema: EMAConfig,
        *,
        dtype: torch.dtype = torch.float32,
        horizon: int | None = None,
        share: float | None = None,
        accelerator: Accelerator | None = None,
        graph: bool = False,
    ) -> None:
        self.unet, self.process, self.optim, self.ema = unet, process, optim, ema
        self.dtype = unet.compute_dtype = ema_unet.compute_dtype = dtype
        self.horizon = horizon or optim.horizon
        self.weights = list(unet.parameters())
        self.averages = list(ema_unet.parameters())
        self.device = self.weights[0].device
        self.scaler = accelerator.scaler if accelerator is not None else None
        if graph:
            processes = accelerator.num_processes if accelerator is not None else 1
            _check_graph(self.device, processes, self.scaler is not None)
        self.model: nn.Module = unet
        self.no_sync: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.sharded = is_sharded(unet)
        if self.sharded:  # accelerate would wrap it once more
            self.no_sync = lambda: gradients_kept(unet)
        elif accelerator is not None:
            self.model = accelerator.prepare(unet)
            # The net casts its own inputs and weights: off with the wrapper that runs it under autocast, where norms
            # are fp32, and turns its prediction into fp32.
            accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.no_sync = lambda: accelerator.no_sync(self.model)
        # The optimiser sees each weight's memory as a line: torch's fused Adam on a CPU copies gradients that are in
        # channels_last order, and mixes up tensors of one parameter that differ in their order. Taken now, because
        # preparing the model for several processes gives its weights other memory. Of a sharded net this process has
        # some rows of each weight, or none.
        self.lines = [nn.Parameter(as_line(local(w))) for w in self.weights]
        self.average_lines = [as_line(local(a)) for a in self.averages] if self.sharded else self.averages
        self.optimizer = make_optimizer(optim, self.lines, capturable=graph)
        if accelerator is not None:
            self.optimizer = accelerator.prepare(self.optimizer)
        self.share = None if share is None else torch.full((), share, device=self.device)
        self.graph = _Graph(self) if graph else None

    def __call__(self, images: Tensor, ordinals: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Optimiser step `step` = 0, 1, ... on one micro-batch.

        Args:
            images: uint8 or float [N, C, H, W] on the device, as TrainingProcess.noise takes them.
            ordinals: int64 [N] on the device, places of the images in the training sequence.
            step: the step's number, on which learning rate and EMA decay depend.

        Returns:
            losses float32 [N] and the gradient's norm before clipping, float32 []; the next call may overwrite them.
        """
        if self.graph is not None:
            return self.graph(images, ordinals, step)
        losses = self.accumulate(images, ordinals)
        return losses, self.update(step)

    def accumulate(self, images: Tensor, ordinals: Tensor, last: bool = True) -> Tensor:
        """Add a micro-batch's gradient to the weights'; losses float32 [N]. Processes meet in the last one only."""
        share = self.share if self.share is not None else torch.full((), 1.0 / len(images), device=self.device)
        grad_scale = share if self.scaler is None else self.scaler.scale(share)
        noised = self.process.noise(images, ordinals, self.dtype)
        with contextlib.nullcontext() if last else self.no_sync():
            with self.unet.noise_address(self.process.seed, ordinals):
                prediction = self.model(noised.x_t, noised.t, return_dict=False)[0]
            losses, grad = self.process.loss_and_grad(prediction.detach(), noised, ordinals, images, grad_scale)
            # 0, or NaN where a loss is not finite though its gradient is (a square that overflows): with the gradient
            # it reaches every process, which then all skip this step.
            grad.add_((losses.sum() * 0.0).to(grad.dtype))
            # The loss kernel has the gradient already: the backward pass starts at the prediction.
            torch.autograd.backward(prediction, grad)
        return losses

    def update(self, step: int) -> Tensor:
        """Clip, optimiser and EMA with the accumulated gradient, which is dropped; returns its norm, float32 [].

        Where the norm is not finite, weights, moments and averages stay as they are.
        """
        return self._update(learning_rate(self.optim, step, self.horizon), 1.0 - ema_decay(self.ema, step))

    def _update(self, lr: float | Tensor, ema_weight: float | Tensor) -> Tensor:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # torch's own, inside accelerate's
        optimizer.param_groups[0]["lr"] = lr
        for line, weight in zip(self.lines, self.weights, strict=True):
            grad, weight.grad = weight.grad, None
            if grad is not None and self.sharded:
                line.grad = as_line(local(grad), like=local(weight))
            else:
                line.grad = None if grad is None else as_line(grad, like=weight)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        grads = [line.grad for line in self.lines if line.grad is not None]
        norm = total_norm(grads, sharded=self.sharded)
        if self.optim.clip_norm is not None:
            if self.scaler is None and optimizer.defaults["fused"]:
                # The fused optimisers divide by this where they read the gradient: no pass of its own.
                optimizer.grad_scale = 1.0 / clip_factor(norm, self.optim.clip_norm)
            else:
                torch._foreach_mul_(grads, clip_factor(norm, self.optim.clip_norm))
        # The norm is that of all processes, so all take the same decision. On a GPU the fused optimisers take it where
        # the norm is (with a loss scale, by the scaler's own flag), so that nothing on the host waits for it.
        applied = None if self.device.type == "cpu" else torch.isfinite(norm)
        if applied is not None and self.scaler is None and optimizer.defaults["fused"]:
            optimizer.found_inf = 1.0 - applied.float()
            self.optimizer.step()
        elif self.scaler is not None or bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            return norm
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.average_lines, self.lines if self.sharded else self.weights, ema_weight, applied)
        return norm


def _check_graph(device: torch.device, num_processes: int, scaled: bool) -> None:
    reasons = {
        f"the step runs on {device.type}": device.type != "cuda",
        f"{num_processes} processes exchange gradients in it": num_processes > 1,
        "fp16's loss scale is adjusted on the host (use bf16)": scaled,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"a training step cannot be captured in a CUDA graph: {reason}; leave out --graph")


class _Graph:
    """The whole step in a CUDA graph; what changes from step to step is read from device memory."""

    def __init__(self, step: TrainStep) -> None:
        self.step, self.eager_steps = step, 0
        self.shapes: tuple[object, ...] = ()
        self.captured: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(step.device)
        self.lr, self.ema_weight = (torch.zeros((), device=step.device) for _ in range(2))

    def __call__(self, images: Tensor, ordinals: Tensor, number: int) -> tuple[Tensor, Tensor]:
        step = self.step
        self.lr.fill_(learning_rate(step.optim, number, step.horizon))
        self.ema_weight.fill_(1.0 - ema_decay(step.ema, number))
        shapes = (images.shape, images.dtype, images.stride(), ordinals.shape)
        if shapes != self.shapes:
            self.shapes, self.captured, self.eager_steps = shapes, None, 0
            self.images, self.ordinals = images.clone(), ordinals.clone()
        self.images.copy_(images)
        self.ordinals.copy_(ordinals)
        if self.captured is None and self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            self.stream.wait_stream(torch.cuda.current_stream(step.device))
            with torch.cuda.stream(self.stream):
                results = self._run()
            torch.cuda.current_stream(step.device).wait_stream(self.stream)
            return results
        with torch.cuda.device(step.device):
            if self.captured is None:
                self.captured, self.results = capture(self._run, self.stream, "leave out --graph")
            self.captured.replay()
        return self.results

    def _run(self) -> tuple[Tensor, Tensor]:
        losses = self.step.accumulate(self.images, self.ordinals)
        return losses, self.step._update(self.lr, self.ema_weight)
