"""One optimiser step: noise, predict, loss, gradient, clip, optimiser, EMA. Nothing in it waits for the device.

What a sample meets (augmentation, a hidden label, an estimate of its own as a further input) is decided by numbers of
its place in the training sequence, as its timestep and noise are.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .augment import apply_augmentation, draw_augmentation
from .averages import PowerAverages
from .config import EMAConfig, OptimConfig
from .diffusion import Noised, TrainingProcess
from .errors import ConfigError
from .graphs import capture
from .optim import as_line, clip_factor, ema_decay, learning_rate, make_optimizer, update_ema
from .sharding import gradients_kept, is_sharded, local, total_norm
from .unet import UNet

QUARTILES = 4
FIXED_POINT = 2.0**24  # of sums of losses: integers add up to the same in any order and over any restart
LARGEST_LOSS = 2.0**22
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
        augment: probability of each augmentation, whose parameters the network is told (augment.py).
        flip: mirror each image with probability 1/2 before its augmentation, instead of in `process`.

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
        augment: float = 0.0,
        flip: bool = False,
    ) -> None:
        self.unet, self.process, self.optim, self.ema = unet, process, optim, ema
        self.augment, self.flip = augment, flip
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
        self.power_averages = PowerAverages([local(w) for w in self.weights], ema.widths) if ema.widths else None
        # Sums of losses (in FIXED_POINT) and numbers of samples by quartile of t, since they were last read.
        self.quartiles = torch.zeros(2, QUARTILES, dtype=torch.int64, device=self.device)
        self._gather: Callable[[Tensor], Tensor] | None = None
        if accelerator is not None and accelerator.num_processes > 1:
            self._gather = accelerator.gather
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.t = torch.zeros(0, dtype=torch.int64, device=self.device)
        """int64 [N]: timesteps of the last micro-batch; a graph's next replay overwrites them."""
        self.graph = _Graph(self) if graph else None

    def __call__(
        self, images: Tensor, ordinals: Tensor, step: int, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Optimiser step `step` = 0, 1, ... on one micro-batch.

        Args:
            images: uint8 or float [N, C, H, W] on the device, as TrainingProcess.noise takes them.
            ordinals: int64 [N] on the device, places of the images in the training sequence.
            step: the step's number, on which learning rate and EMA decay depend.
            labels: int64 [N] on the device, classes 0 .. K-1, -1 for none; of a conditional network only.

        Returns:
            losses float32 [N] and the gradient's norm before clipping, float32 []; the next call may overwrite them.
        """
        if self.graph is not None:
            return self.graph(images, ordinals, step, labels)
        losses = self.accumulate(images, ordinals, labels)
        return losses, self.update(step)

    def accumulate(
        self, images: Tensor, ordinals: Tensor, labels: Tensor | None = None, *, last: bool = True
    ) -> Tensor:
        """Add a micro-batch's gradient to the weights'; losses float32 [N]. Processes meet in the last one only."""
        share = self.share if self.share is not None else torch.full((), 1.0 / len(images), device=self.device)
        grad_scale = share if self.scaler is None else self.scaler.scale(share)
        process, told = self.process, {}
        if self.augment:
            matrices, told["augment"] = draw_augmentation(
                ordinals, seed=process.seed, p=self.augment, size=(images.shape[2], images.shape[3]), flip=self.flip
            )
            images = apply_augmentation(images, matrices)
            if process.bounded:  # whose decoder knows 8-bit levels only
                images = ((images + 1) * 127.5).round() / 127.5 - 1
        noised = process.noise(images, ordinals, self.dtype)
        if labels is not None:
            told["class_labels"] = process.hide_labels(labels, ordinals, self.unet.config.num_class_embeds)
        with self.unet.noise_address(process.seed, ordinals):
            x_t = noised.x_t
            if process.self_conditioning:
                x_t = torch.cat((x_t, self._estimate(noised, ordinals, told)), dim=1)
            with contextlib.nullcontext() if last else self.no_sync():
                prediction = self.model(x_t, noised.t, return_dict=False, **told)[0]
                losses, grad = process.loss_and_grad(prediction.detach(), noised, ordinals, images, grad_scale)
                # 0, or NaN where a loss is not finite though its gradient is (a square that overflows): with the
                # gradient it reaches every process, which then all skip this step.
                grad.add_((losses.sum() * 0.0).to(grad.dtype))
                # The loss kernel has the gradient already: the backward pass starts at the prediction.
                torch.autograd.backward(prediction, grad)
        self.t = noised.t
        # As they are, not as importance weights them: a quartile's mean is of the samples that fell in it.
        self._count(noised.t, losses if noised.importance is None else losses / noised.importance)
        if process.history is not None:
            self._seen.append((ordinals, noised.t, losses))
        return losses

    @torch.no_grad()
    def _estimate(self, noised: Noised, ordinals: Tensor, told: dict[str, Tensor]) -> Tensor:
        """x_0_hat [N, C, H, W] of half of the samples, without any estimate before it, and 0 for the others."""
        x_t = noised.x_t
        first = self.unet(torch.cat((x_t, torch.zeros_like(x_t)), dim=1), noised.t, return_dict=False, **told)[0]
        return self.process.estimate(first, noised, ordinals).to(x_t.dtype)

    def _count(self, t: Tensor, losses: Tensor) -> None:
        quartile = (t * QUARTILES).div(self.process.schedule.num_timesteps, rounding_mode="floor")
        within = quartile[:, None] == torch.arange(QUARTILES, device=t.device)
        within &= losses.isfinite()[:, None]  # the others are in numerics.jsonl
        bounded = losses.float().nan_to_num(0.0, 0.0, 0.0).clamp(max=LARGEST_LOSS)
        fixed = (bounded * FIXED_POINT).round().to(torch.int64)
        self.quartiles += torch.stack((torch.where(within, fixed[:, None], 0), within.to(torch.int64))).sum(1)

    def _tell_history(self) -> None:
        """Losses of the whole step, of all processes in order of position, for the timesteps of the next."""
        if self.process.history is None:
            return
        ordinals, t, losses = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        if self._gather is not None:
            ordinals, t, losses = (self._gather(column.contiguous()) for column in (ordinals, t, losses))
        order = ordinals.argsort()
        self.process.history.update(t[order], losses[order])

    def update(self, step: int) -> Tensor:
        """Clip, optimiser and EMA with the accumulated gradient, which is dropped; returns its norm, float32 [].

        Where the norm is not finite, weights, moments and averages stay as they are.
        """
        width_weights = self.power_averages.weights(step) if self.power_averages is not None else []
        return self._update(
            learning_rate(self.optim, step, self.horizon), 1.0 - ema_decay(self.ema, step), width_weights
        )

    def _update(
        self, lr: float | Tensor, ema_weight: float | Tensor, width_weights: Sequence[float | Tensor] = ()
    ) -> Tensor:
        self._tell_history()
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
        weights = self.lines if self.sharded else self.weights
        update_ema(self.average_lines, weights, ema_weight, applied)
        if self.power_averages is not None:
            self.power_averages.update([local(w) for w in self.weights], width_weights, applied)
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
        self.width_weights = [torch.zeros((), device=step.device) for _ in step.ema.widths]

    def __call__(
        self, images: Tensor, ordinals: Tensor, number: int, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        step = self.step
        self.lr.fill_(learning_rate(step.optim, number, step.horizon))
        self.ema_weight.fill_(1.0 - ema_decay(step.ema, number))
        if step.power_averages is not None:
            for place, weight in zip(self.width_weights, step.power_averages.weights(number), strict=True):
                place.fill_(weight)
        shapes = (images.shape, images.dtype, images.stride(), ordinals.shape, labels is None)
        if shapes != self.shapes:
            self.shapes, self.captured, self.eager_steps = shapes, None, 0
            self.images, self.ordinals = images.clone(), ordinals.clone()
            self.labels = None if labels is None else labels.clone()
        self.images.copy_(images)
        self.ordinals.copy_(ordinals)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
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
        losses = self.step.accumulate(self.images, self.ordinals, self.labels)
        return losses, self.step._update(self.lr, self.ema_weight, self.width_weights)
