"""The trainer: DDPM's loop (algorithm 1) on accelerate, exact from one position in the training sequence to the next.

A run is a function of its config and seed. accelerate prepares the model and the optimiser only; order, timesteps,
flips, noise and dropout are addressed by the position of a sample, learning rate and EMA decay by the step.
"""

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .checkpoint import Checkpoints, State, load_into, load_optimizer, optimizer_tensors
from .compiling import compile_unet
from .config import Config, Precision, differences, flatten, read_config, read_facts, to_dict
from .data import Batch, ImageData, open_data, resolve_source
from .diffusion import TrainingProcess
from .errors import CheckpointError, ConfigError, DataError, NumericsError
from .files import expand, lock_folder, writable_folder, write_json
from .generate import draw_images
from .interrupt import StopRequest
from .machine import DTYPES, flushed_denormals, make_accelerator, memory_bytes, settle_precision, versions
from .optim import learning_rate
from .pictures import grid, save_picture
from .pipeline import write_pipeline
from .runlog import Progress, RunLog
from .samplers import Sampler
from .step import TrainStep
from .unet import UNet

# Below this fp16's loss scale has stopped protecting anything: gradients overflow at every scale.
SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class Outcome:
    """How a call of Trainer.train ended."""

    run: Path
    step: int
    """Optimiser steps done, over all starts of the run."""
    finished: bool
    """False if a signal stopped the run before its last step."""


class Trainer:
    """Trains one run folder; `Trainer(config).train()` starts it or goes on where it was.

    Args:
        config: the whole run; see `fastddpm.preset`.

    Raises:
        ConfigError: a field, the device or the stored config of the run folder does not fit.
        DataError: the data cannot be opened.
        CheckpointError: there are checkpoints and none can be used.
    """

    def __init__(self, config: Config) -> None:
        config.check()
        precision, why = settle_precision(config.precision, lambda: _stored_precision(config))
        config = dataclasses.replace(config, precision=cast(Precision, precision))
        self.accelerator = make_accelerator(
            config.precision,
            log_with=_trackers(config.trackers),
            project_dir=_run_folder(config),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        acc = self.accelerator
        if why is not None:
            self.say(f"precision {precision}: {why}")
        config.micro_batch(acc.num_processes)
        self.run = writable_folder(_run_folder(config), "run folder")
        self._lock = lock_folder(self.run) if acc.is_main_process else None
        self.config = resolve(config, self.run)
        for name in ("checkpoints", "unet", "scheduler", "samples"):  # a refusal now, not at the first save
            writable_folder(self.run / name, "run folder")
        # On all ranks at once: datasets locks its cache, and a rank that waits for a file is not in a collective that
        # times out while another prepares a large set.
        model = self.config.model
        self.data: ImageData = open_data(self.config.data, model.image_size, model.in_channels)
        self.checkpoints = Checkpoints(self.run, self.config.keep)
        self._check_data()
        self.unet = UNet(self.config.model, seed=self.config.seed)
        self.unet.to(acc.device)
        self.ema_unet = copy.deepcopy(self.unet).eval()
        self.names = [name for name, _ in self.unet.named_parameters()]
        self.weights = list(self.unet.parameters())
        self.averages = list(self.ema_unet.parameters())
        self.schedule = self.config.diffusion.noise_schedule()
        process = TrainingProcess(
            self.schedule, self.config.diffusion.prediction, seed=self.config.seed, flip=self.config.data.flip
        )
        if self.config.compile:
            self.say(f"compiled: {compile_unet(self.unet)}")
            compile_unet(self.ema_unet)
        self.train_step = TrainStep(
            self.unet,
            self.ema_unet,
            process,
            self.config.optim,
            self.config.ema,
            dtype=DTYPES[self.config.precision],
            horizon=self._horizon,
            share=self._share,
            accelerator=acc,
            graph=self.config.graph,
        )
        self.log = RunLog(self.run)
        self.step = 0
        self._resume()

    def _check_data(self) -> None:
        """The order is a function of the number of images: a set that has grown since the first start is refused."""
        stored = read_facts(self.run) if self.checkpoints.all() else None
        if stored is not None and stored.get("num_images") != self.data.num_images:
            raise DataError(
                f"{self.config.data.source} has {self.data.num_images} images and had {stored.get('num_images')} when "
                f"{self.run} was started, so the order would be another: restore the data or choose another --run"
            )

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        refused: dict[Path, str] = {}
        if newest is not None:
            path, refused = newest
            for newer, reason in refused.items():
                self.say(f"warning: not used: {newer}: {reason}")
            self._restore(self.checkpoints.load(path), path)
            self.say(f"going on at step {self.step} from {path}")
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:  # also a barrier: everyone has read the stored config before it is replaced
            raise CheckpointError(f"the processes found different checkpoints (steps {steps}): is {self.run} shared?")
        if self.config.steps > self._horizon and self.config.optim.decay != "constant":
            self.say(
                f"warning: the learning rate is 0 from step {self._horizon} on, the horizon of the first start; a "
                "run that may be prolonged needs --optim.horizon from the start"
            )
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside(refused)
            self.checkpoints.sweep()
            self.log.rewind(self.step)
            facts = {"versions": versions(), "num_images": self.data.num_images, "config": to_dict(self.config)}
            write_json(self.run / "config.json", facts)
            if newest is not None:
                self._export()  # a kill may have come between the checkpoint and the pipeline files
        self.accelerator.wait_for_everyone()

    def _restore(self, state: State, path: Path) -> None:
        if state.samples_seen != state.step * self.config.batch_size:
            raise CheckpointError(
                f"{path} stands at image {state.samples_seen} after {state.step} steps, which is not a multiple of the "
                f"batch size {self.config.batch_size}"
            )
        load_into(self.unet, state.model, str(path / "model.safetensors"))
        load_into(self.ema_unet, state.ema, str(path / "ema.safetensors"))
        load_optimizer(self.optimizer, self.names, self.weights, state.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(dict(state.scaler))
        self.step = state.step

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's own, inside accelerate's wrapper."""
        wrapper: Any = self.train_step.optimizer
        optimizer: torch.optim.Optimizer = wrapper.optimizer
        return optimizer

    @property
    def _share(self) -> float:
        """Weight of one image in this process's mean."""
        return self.accelerator.num_processes / self.config.batch_size

    @property
    def _horizon(self) -> int:
        return self.config.optim.horizon or self.config.steps

    def say(self, message: str) -> None:
        """A line on stderr, from rank 0."""
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)

    def train(self) -> Outcome:
        """Train up to config.steps, or until SIGINT or SIGTERM, after which everything is saved.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of it is saved.
            DataError: an image cannot be read or does not fit.
            CheckpointError: a checkpoint cannot be written.
        """
        try:
            finished = self.step >= self.config.steps or self._loop()
        finally:
            if self._lock is not None:
                self._lock.close()
        return Outcome(self.run, self.step, finished)

    def _loop(self) -> bool:
        """The steps that are left; False if a signal stopped them."""
        config, acc = self.config, self.accelerator
        if config.trackers:
            acc.init_trackers("fastddpm", config={k: str(v) for k, v in flatten(to_dict(config)).items()})
        progress = Progress(
            first_step=self.step, last_step=config.steps, batch_size=config.batch_size, enabled=acc.is_main_process
        )
        images = "a stream of images" if self.data.num_images is None else f"{self.data.num_images:,} images"
        threads = f" of {torch.get_num_threads()} threads" if acc.device.type == "cpu" else ""
        progress.say(
            f"training on {images} of {config.data.source}: {sum(w.numel() for w in self.weights):,} parameters, "
            f"{config.precision}, {acc.num_processes} x {acc.device.type}{threads}, steps {self.step} to {config.steps}"
        )
        self.unet.train()
        stopped = False
        try:
            with StopRequest() as stop, flushed_denormals(), contextlib.closing(self._batches()) as batches:
                if self.data.warning is not None:
                    progress.say(f"warning: {self.data.warning}")
                clock = _Clock()
                while self.step < config.steps and not stopped:
                    logged = (self.step + 1) % config.log_every == 0
                    record = self._optimizer_step(batches, clock, logged)
                    self.step += 1
                    clock.images += config.batch_size
                    progress.step()
                    if record is not None:
                        record = clock.close_window(record)
                        self._write_record(record, progress)
                    stopped = stop.agreed()
                    last = self.step == config.steps or stopped
                    if last or self.step % config.save_every == 0:
                        with clock.paused():
                            self.save()
                    if config.sample_every and self.step % config.sample_every == 0:
                        with clock.paused():
                            self.draw_grid()
        finally:
            progress.close()
            if config.trackers:
                acc.end_training()
        return self.step >= config.steps

    def _batches(self) -> Generator[Batch, None, None]:
        acc, config = self.accelerator, self.config
        return self.data.batches(
            config.seed,
            first_step=self.step,
            last_step=config.steps,
            batch_size=config.batch_size,
            rank=acc.process_index,
            world=acc.num_processes,
            accumulation=config.accumulation,
            workers=config.data.workers,
            device=acc.device,
        )

    def _optimizer_step(self, batches: Iterator[Batch], clock: "_Clock", logged: bool) -> dict[str, Any] | None:
        """One optimiser step over accumulation micro-batches; the log record if this step is logged."""
        config, acc = self.config, self.accelerator
        step, sums = self.train_step, []
        for micro in range(config.accumulation):
            with clock.waiting():
                batch = next(batches)
            if step.graph is not None:
                losses, norm = step(batch.images, batch.ordinals, self.step)
            else:
                losses = step.accumulate(batch.images, batch.ordinals, last=micro == config.accumulation - 1)
            if logged:
                sums.append(losses.sum())
        if step.graph is None:
            norm = step.update(self.step)
        if not logged:
            return None
        # Only here does the host wait for the device, once.
        loss = acc.reduce(torch.stack(sums).sum() * self._share, reduction="mean")
        numbers = torch.stack((loss, norm, step.first_bad_step.float())).tolist()
        self._check_numerics(numbers[0], first_bad_step=numbers[2])
        return {
            "step": self.step + 1,
            "samples_seen": (self.step + 1) * config.batch_size,
            "loss": numbers[0],
            "grad_norm": numbers[1],
            "lr": learning_rate(config.optim, self.step, self._horizon),
        }

    def _check_numerics(self, loss: float | None = None, first_bad_step: float | None = None) -> None:
        bad = int(self.train_step.first_bad_step.item() if first_bad_step is None else first_bad_step)
        if bad >= 0:
            raise NumericsError(
                f"the gradient of step {bad} is not finite; the run stops at step {self.step + 1} and its checkpoints "
                "are from before: lower optim.lr, set optim.clip_norm, or look at the data"
            )
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
            raise NumericsError(
                f"fp16's loss scale has fallen to {scaler.get_scale():g}: every gradient overflows; use bf16 or fp32"
            )
        if scaler is None and loss is not None and not math.isfinite(loss):
            raise NumericsError(f"the loss of step {self.step + 1} is {loss}: lower optim.lr or look at the data")

    def _write_record(self, record: dict[str, Any], progress: Progress) -> None:
        record["memory_bytes"] = memory_bytes(self.accelerator.device)
        if self.accelerator.is_main_process:
            self.log.write(record)
        if self.config.trackers:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        progress.report(record)

    def save(self) -> None:
        """Commit a checkpoint, then replace the pipeline files with the current averages. Called on all ranks."""
        self._check_numerics()
        norms = torch._foreach_norm([*self.averages, *self.weights])
        if not torch.stack(norms).isfinite().all():
            raise NumericsError(f"the weights of step {self.step} are not finite; they are not saved: lower optim.lr")
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = State(
                step=self.step,
                samples_seen=self.step * self.config.batch_size,
                model=self.unet.state_dict(),
                ema=self.ema_unet.state_dict(),
                optimizer=optimizer_tensors(self.optimizer, self.names, self.weights),
                scaler=scaler.state_dict() if scaler is not None else {},
            )
            self.checkpoints.save(state)
            self._export()
        self.accelerator.wait_for_everyone()

    def _export(self) -> None:
        write_pipeline(self.run, self.config.model, self.config.diffusion, self.ema_unet.state_dict())

    def draw_grid(self) -> Path:
        """Sample a grid with the averaged weights into RUN/samples. Called on all ranks."""
        config, acc = self.config, self.accelerator
        sampler = Sampler(
            self.ema_unet,
            self.schedule,
            prediction=config.diffusion.prediction,
            sampler=config.grid.sampler,
            num_steps=config.grid.steps,
            eta=config.grid.eta,
            variance=config.diffusion.variance,
            clip=config.diffusion.clip,
            clip_range=config.diffusion.clip_range,
            spacing=config.diffusion.spacing,
            dtype=DTYPES[config.precision],
            seed=config.seed,
        )
        drawn = draw_images(
            sampler,
            config.grid.num,
            shape=(config.model.in_channels, *config.model.image_size),
            batch_size=config.grid.batch_size,
            device=acc.device,
        )
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        if acc.is_main_process:
            save_picture(grid(drawn.images), path)
        acc.wait_for_everyone()
        return path


class _Clock:
    """Wall time of a log window, without pauses for saving and sampling, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.start, self.waited, self.pauses, self.images = time.perf_counter(), 0.0, 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - begin

    def close_window(self, record: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = max(now - self.start - self.pauses, 1e-9)
        record |= {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.start, self.waited, self.pauses, self.images = now, 0.0, 0.0, 0
        return record


def _run_folder(config: Config) -> Path:
    return expand(config.run or f"runs/{config.preset}")


def _stored_precision(config: Config) -> str | None:
    """What "auto" came to be at the run's first start."""
    run = _run_folder(config)
    stored = read_config(run) if config.precision == "auto" and Checkpoints(run).all() else None
    return stored.precision if stored is not None else None


def _trackers(names: tuple[str, ...]) -> list[str] | None:
    available = [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in available:
            known = ", ".join(sorted(str(t) for t in LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"tracker {name!r} is not installed or not known: accelerate knows {known}")
    return list(names) or None


def resolve(config: Config, run: Path) -> Config:
    """Fill what depends on the machine or on the run folder: absolute source, and the horizon of the first start.

    Raises:
        ConfigError: if the folder holds a run of another config (lists every field that differs).
    """
    stored = read_config(run) if Checkpoints(run).all() else None  # a start that saved nothing binds nothing
    horizon = config.optim.horizon or (stored.optim.horizon if stored else None) or config.steps
    config = dataclasses.replace(
        config,
        run=str(run),
        data=dataclasses.replace(config.data, source=resolve_source(config.data.source)),
        optim=dataclasses.replace(config.optim, horizon=horizon),
    )
    if stored is not None and (changed := differences(stored, config)):
        if stored.preset != config.preset:
            raise ConfigError(
                f"{run} was started with --preset {stored.preset}, not {config.preset}: give the options of its first "
                "start again, or choose another --run"
            )
        raise ConfigError(f"{run} is a run of another config ({'; '.join(changed)}): use these values or another --run")
    return config
