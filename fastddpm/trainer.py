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
from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor

from .averages import rewind_snapshots, write_snapshots
from .checkpoint import AsyncWriter, Checkpoints, State, load_into, load_optimizer, optimizer_tensors
from .compiling import compile_unet
from .config import RUNTIME_FIELDS, Config, Precision, differences, flatten, read_config, read_facts, to_dict
from .data import Batch, ImageData, open_data, resolve_source
from .diffusion import TrainingProcess
from .errors import CheckpointError, ConfigError, DataError, FastDDPMError, NumericsError
from .files import expand, lock_folder, writable_folder, write_json
from .generate import draw_images
from .guard import Guard, Mailbox, StepNumbers
from .interrupt import StopRequest, follow_launcher
from .machine import (
    DTYPES,
    flushed_denormals,
    join_processes,
    make_accelerator,
    memory_bytes,
    settle_precision,
    versions,
)
from .optim import learning_rate
from .order import BatchPlan
from .pictures import grid, save_picture
from .pipeline import write_pipeline
from .preflight import check as check_before_training
from .quality import RunQuality, best_record
from .runlog import Progress, RunLog, read_status, write_status
from .samplers import Sampler
from .sharding import Peers, check_sharding, local, rows, shard, total_norm
from .step import FIXED_POINT, QUARTILES, TrainStep
from .unet import UNet
from .watch import HANG_EXIT_CODE, HangWatch

# Below this fp16's loss scale has stopped protecting anything: gradients overflow at every scale.
SMALLEST_SCALE = 2.0**-10
# Share of the training sequence that data.bad_image=skip may replace, judged against one epoch at least.
MAX_REPLACED = 0.001
REPLACED_SHOWN = 10
OWN = ("average-", "loss history/")  # how names begin of what checkpoints hold beside the optimiser's moments
FIRST_WORD = 2.0  # seconds for another rank to say why it ended
SHORTEST_EPOCH = 10_000  # of a stream of unknown length


@dataclass(frozen=True)
class Outcome:
    """How a call of Trainer.train ended."""

    run: Path
    step: int
    """Optimiser steps done, over all starts of the run."""
    finished: bool
    """False if a signal stopped the run before its last step."""


@dataclass(frozen=True)
class _Done:
    """One optimiser step of this process, its numbers still on the device."""

    number: int
    """Counted from 1."""
    losses: list[Tensor]
    """float32 [n] per micro-batch."""
    norm: Tensor
    rows: list[Tensor]
    """int64 [n] per micro-batch, on the host."""
    t: list[Tensor]
    """int64 [n] per micro-batch, on the device."""
    replaced: list[str]
    """Messages about images in whose place another was taken."""


class Trainer:
    """Trains one run folder; `Trainer(config).train()` starts it or goes on where it was.

    Args:
        config: the whole run; see `fastddpm.preset`.
        allow_change: fields that may differ from those of the run's first start although the run is another with
            them; "data" for images that have changed.
        replay: a step, counted from 1: nothing is written, and the trainer stands before that step, for `replay`.

    Raises:
        ConfigError: a field, the device or the stored config of the run folder does not fit.
        DataError: the data cannot be opened, or do not pass what is checked before any training.
        CheckpointError: there are checkpoints and none can be used.
    """

    def __init__(self, config: Config, *, allow_change: Collection[str] = (), replay: int | None = None) -> None:
        config.check()
        follow_launcher()
        # Later than the watch over hanging processes, which says more than a collective that gives up.
        self._patience = timedelta(seconds=2 * config.hang_timeout + 600 if config.hang_timeout else 365 * 86400)
        join_processes(self._patience)
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
        self.sharded = config.sharding == "fsdp2" and acc.num_processes > 1  # alone there is nothing to share out
        if self.sharded:
            check_sharding(precision=config.precision, compiled=config.compile, graph=config.graph)
        self.run, self._lock = _run_folder(config), None
        if replay is None:
            writable_folder(self.run, "run folder")
            self._lock = lock_folder(self.run) if acc.is_main_process else None
        self.step = 0
        try:
            self._open(config, allow_change, replay)
        except FastDDPMError as error:
            # Not of a config that is refused: the run is as it was.
            if replay is None and not isinstance(error, ConfigError):
                self._write_failure(error)
            raise

    def _open(self, config: Config, allow_change: Collection[str], replay: int | None) -> None:
        """The constructor from the point on where the run folder is this process's own."""
        acc = self.accelerator
        self.config, self.changes = resolve(config, self.run, allow_change)
        if replay is None:
            for name in ("checkpoints", "unet", "scheduler", "samples"):  # a refusal now, not at the first save
                writable_folder(self.run / name, "run folder")
        # On all ranks at once: datasets locks its cache, and a rank that waits for a file is not in a collective that
        # times out while another prepares a large set.
        self.data: ImageData = open_data(self.config.data, self.config.model.image_size, self.config.channels)
        self.config = self._with_classes(self.config)
        peers = Peers(self._patience) if self.sharded else None
        self.checkpoints = Checkpoints(self.run, self.config.keep, peers)
        self.writer = AsyncWriter(self.checkpoints, self._export) if self.config.save_async else None
        self._check_data("data" in allow_change)
        if replay is None:
            self._check_before_training()
        self.unet = UNet(self.config.network(), seed=self.config.seed)
        if not self.sharded:  # otherwise layer by layer
            self.unet.to(acc.device)
        self.ema_unet = copy.deepcopy(self.unet).eval()
        if self.sharded:
            for net in (self.unet, self.ema_unet):
                shard(net, acc.device)
        self.names = [name for name, _ in self.unet.named_parameters()]
        self.weights = list(self.unet.parameters())
        self.averages = list(self.ema_unet.parameters())
        self.schedule = self.config.diffusion.noise_schedule()
        process = TrainingProcess.of(
            self.config.diffusion,
            seed=self.config.seed,
            # The mirror image of what was turned is not what the network is told: augmentation mirrors first.
            flip=self.config.data.flip and not self.config.data.augment,
            batch_size=self.config.batch_size,
            device=acc.device,
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
            augment=self.config.data.augment,
            flip=self.config.data.flip,
        )
        self.log, self.events = RunLog(self.run), RunLog(self.run, "numerics.jsonl")
        self.qualities = RunLog(self.run, "quality.jsonl")
        self.quality: RunQuality | None = None
        if self.config.eval.every and replay is None:
            self.quality = RunQuality(self.config, acc.device, self.say)
        self._replayed = replay or 0
        self.samples_seen = 0
        self.replaced = 0
        self.guard = Guard()
        if replay is None:
            self._resume()
        else:
            self._go_before(replay)

    def _check_data(self, allowed: bool) -> None:
        """The order is a function of what there is to order: data that have changed since the first start are refused.

        What the data came to then is in RUN/config.json; a start that saved nothing binds nothing.
        """
        stored = read_facts(self.run) if self.checkpoints.all() else None
        if stored is None or stored.get("data") == self._data_facts or allowed:
            return
        then = stored.get("data") or {}
        numbers = f"has {self.data.num_images} images and had {then.get('num_images')}"
        if self.data.num_images == then.get("num_images"):
            numbers = "is not as it was (other files, rows or a filter that gives others)"
        raise DataError(
            f"{self.config.data.source} {numbers} when {self.run} was started, so the order would be another: restore "
            "the data, choose another --run, or go on in the new order with --allow-change data"
        )

    def _with_classes(self, config: Config) -> Config:
        """The config with the number of classes of the data, where it is conditional and names none.

        Raises:
            DataError: the data have no labels, or more classes than the network is told.
        """
        if not config.conditional:
            return config
        found, source = self.data.num_classes, config.data.source
        if self.data.label_column is None:
            raise DataError(
                f"conditional is set and {source} has no labels that can be used"
                f"{f' ({self.data.warning})' if self.data.warning else ''}: name their column with "
                "--data.label-column, or leave out --conditional"
            )
        named = config.model.num_class_embeds
        if named is None and found is None:
            raise DataError(f"{source} does not say how many classes it has: give --model.num-class-embeds")
        if named is not None and found is not None and found > named:
            raise DataError(
                f"{source} has {found} classes and model.num_class_embeds is {named}: give at least {found}"
            )
        model = dataclasses.replace(config.model, num_class_embeds=named or found)
        return dataclasses.replace(config, model=model)

    @property
    def _data_facts(self) -> dict[str, Any]:
        return {"num_images": self.data.num_images, "identity": self.data.identity}

    def _check_before_training(self) -> None:
        """On rank 0; what it refuses ends all ranks alike."""
        told: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                world = self.accelerator.num_processes
                warnings = check_before_training(self.config, self.data, world, run_folder=self.run)
            except FastDDPMError as error:
                told = [error]
            else:
                told = [warnings]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(told)
        if isinstance(told[0], FastDDPMError):
            raise told[0]
        for warning in told[0]:
            self.say(f"warning: {warning}")

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        refused: dict[Path, str] = {}
        if newest is not None:
            path, refused = newest
            for newer, reason in refused.items():
                self.say(f"warning: not used: {newer}: {reason}")
            state = self.checkpoints.load(path, rows(self.unet))
            self._restore(state, path)
            self.say(f"going on at step {self.step} from {path}")
        self._check_steps()
        for change in self.changes:
            self.say(f"warning: from step {self.step} on this is another run: {change}")
        if self.config.steps > self._horizon and self.config.optim.decay != "constant":
            self.say(
                f"warning: the learning rate is 0 from step {self._horizon} on, the horizon of the first start; a "
                "run that may be prolonged needs --optim.horizon from the start"
            )
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside(refused)
            self.checkpoints.sweep()
            self.log.rewind(self.step)
            self.events.rewind(self.step)
            self.qualities.rewind(self.step)
            # Of the last step of a run that is prolonged too: a run of so many steps at once would not have it.
            rewind_snapshots(self.run, self.step, self._snapshot_every if self.step < self.config.steps else 1)
            stored = read_facts(self.run) if newest is not None else None
            changes = [
                *((stored or {}).get("changes") or []),
                *({"step": self.step, "change": c} for c in self.changes),
            ]
            facts = {"versions": versions(), "data": self._data_facts, "config": to_dict(self.config)}
            write_json(self.run / "config.json", facts | ({"changes": changes} if changes else {}))
            self._spare_best()
            if newest is not None:
                self._export(state, path)  # a kill may have come between the checkpoint and the pipeline files
        self.accelerator.wait_for_everyone()
        self._unmeasured = self._missing_measurement()

    def _check_steps(self) -> None:
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:  # also a barrier: everyone has read the stored config before it is replaced
            raise CheckpointError(f"the processes found different checkpoints (steps {steps}): is {self.run} shared?")

    def _go_before(self, number: int) -> None:
        """Stand where the run stood before step `number`: the last checkpoint up to there, and the steps since."""
        if number < 1:
            raise ConfigError(f"step {number}: steps are counted from 1")
        for change in (read_facts(self.run) or {}).get("changes") or []:
            if change.get("step", 0) >= number:
                self.say(
                    f"warning: from step {change['step']} on this became another run ({change['change']}); earlier "
                    "steps are replayed with the config of today and will not be the same"
                )
        for path in reversed(self.checkpoints.all()):
            if int(path.name.removeprefix("step-")) >= number:
                continue
            if (reason := self.checkpoints.verify(path)) is None:
                self._restore(self.checkpoints.load(path, rows(self.unet)), path)
                break
            self.say(f"warning: not used: {path}: {reason}")
        self._check_steps()
        self.say(f"replaying steps {self.step + 1} to {number}")

    def _restore(self, state: State, path: Path) -> None:
        load_into(self.unet, state.model, str(path / "model.safetensors"))
        load_into(self.ema_unet, state.ema, str(path / "ema.safetensors"))
        kept = {key: value for key, value in state.optimizer.items() if not self._is_own(key)}
        load_optimizer(self.optimizer, self.names, self.weights, kept)
        self._load_own(state.optimizer, path)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(dict(state.scaler))
        self.step, self.samples_seen = state.step, state.samples_seen
        self.guard = Guard.from_facts(state.facts.get("guard") or {})
        quartiles = torch.tensor(state.facts.get("quartiles") or [[0] * QUARTILES] * 2, dtype=torch.int64)
        # Of all processes together: the first one goes on from them.
        self.train_step.quartiles.copy_(quartiles if self.accelerator.is_main_process else quartiles * 0)
        self.replaced = int(state.facts.get("replaced_images") or 0)

    def _own_tensors(self) -> dict[str, Tensor]:
        """What steps carry besides weights, their average and the optimiser, under names as the optimiser's moments.

        Power-function averages as "weight/average-WIDTH", past losses by timestep as "loss history/NAME".
        """
        tensors: dict[str, Tensor] = {}
        averages, history = self.train_step.power_averages, self.train_step.process.history
        if averages is not None:
            for width, average in zip(averages.widths, averages.averages, strict=True):
                tensors |= {f"{n}/{OWN[0]}{width!r}": a for n, a in zip(self.names, average, strict=True)}
        if history is not None:
            tensors |= {f"{OWN[1]}{name}": tensor for name, tensor in history.tensors().items()}
        return tensors

    @staticmethod
    def _is_own(key: str) -> bool:
        return key.rpartition("/")[2].startswith(OWN[0]) or key.startswith(OWN[1])

    def _load_own(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Go on from them; what an allowed change has added begins here: averages with these weights, losses unknown.

        Raises:
            CheckpointError: something is missing though the config has not changed.
        """
        own, weights = self._own_tensors(), dict(zip(self.names, self.weights, strict=True))
        with torch.no_grad():
            for key, place in own.items():
                if key in tensors and tensors[key].shape == place.shape:
                    place.copy_(tensors[key])
                elif not self.changes:
                    raise CheckpointError(f"{path} has no {key} of shape {list(place.shape)}, which this config needs")
                elif not key.startswith(OWN[1]):
                    place.copy_(local(weights[key.rpartition("/")[0]]))

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
            NumericsError: three steps in a row, or more than ten in a thousand, had to be skipped because a loss or
                gradient was not finite; nothing of them is in the checkpoints.
            DataError: an image cannot be read or does not fit, or too many had to be replaced.
            CheckpointError: a checkpoint cannot be written.
        """
        try:
            # Around all of it: a second signal must not end the process between a save and what the status says.
            with StopRequest(self.replaced, self._patience) as stop:
                try:
                    self._write_status("running")
                    finished = (self.step >= self.config.steps and not self._unmeasured) or self._loop(stop)
                    if self.writer is not None:
                        self.writer.drain()
                    self._write_status("done" if finished else "preempted")
                except BaseException as error:
                    self._write_failure(error)
                    raise
        finally:
            if self.writer is not None:
                self.writer.wait()  # the lock is this run's until nothing is being written
            if self._lock is not None:
                self._lock.close()
        return Outcome(self.run, self.step, finished)

    def _write_status(self, status: str, **facts: Any) -> None:
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # the disk may be what went wrong
                write_status(self.run, status, self.step, **facts)

    def _write_failure(self, error: BaseException) -> None:
        """status.json from whichever rank knows what happened: to the others a collective has only broken off."""
        own = isinstance(error, FastDDPMError)
        if not own:
            if not self.accelerator.is_main_process:
                return
            if self.accelerator.num_processes > 1:
                time.sleep(FIRST_WORD)
                if read_status(self.run).get("status") == "failed":
                    return
        reason = " ".join(str(error).split()) or type(error).__name__
        code = error.exit_code if isinstance(error, FastDDPMError) else 1
        with contextlib.suppress(OSError):
            write_status(self.run, "failed", self.step, reason=reason, exit_code=code)

    def _report_hang(self, message: str) -> None:
        with contextlib.suppress(OSError):
            write_status(self.run, "failed", self.step, reason=message, exit_code=HANG_EXIT_CODE)

    def _loop(self, stop: StopRequest) -> bool:
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
        mailbox = Mailbox(acc.device)
        watch = HangWatch(config.hang_timeout, self._report_hang)
        try:
            with flushed_denormals(), contextlib.closing(self._batches(config.steps)) as batches:
                if self.data.warning is not None:
                    progress.say(f"warning: {self.data.warning}")
                clock = _Clock()
                if self._unmeasured:
                    watch.at(self.step, "measuring quality")
                    with clock.paused():
                        self.measure_quality(progress)
                while self.step < config.steps and not stopped:
                    done = self._optimizer_step(batches, clock, watch)
                    self.step += 1
                    self.samples_seen += config.batch_size
                    clock.images += config.batch_size
                    progress.step()
                    mailbox.put(done.number, done.norm, done.losses, done.rows, done.t)
                    watch.at(self.step, "agreeing whether to stop")
                    self._tell_replaced(done.replaced, stop.total, progress)
                    stopped = stop.agreed(len(done.replaced))
                    logged = self.step % config.log_every == 0
                    saved = self.step == config.steps or stopped or self.step % config.save_every == 0
                    saved = saved or self._eval_due
                    if logged or saved:  # what is written down counts every step up to here
                        stopped = stop.settle()
                        saved = saved or stopped
                    self._judge(mailbox.take(everything=logged or saved), progress)
                    self._count_replaced(stop.total)
                    if logged:
                        self._write_record(clock.close_window(self._record(done)), progress)
                        self.train_step.quartiles.zero_()
                    if self._snapshot_due():
                        watch.at(self.step, "saving")
                        with clock.paused():
                            self._write_snapshots()
                    if saved:
                        watch.at(self.step, "saving")
                        with clock.paused():
                            self.save()
                        self._write_status("running")
                    if self._eval_due and not stopped:
                        watch.at(self.step, "measuring quality")
                        with clock.paused():
                            self.measure_quality(progress)
                    if config.sample_every and self.step % config.sample_every == 0 and not stopped:
                        watch.at(self.step, "sampling")
                        with clock.paused():
                            self.draw_grid()
        finally:
            watch.close()
            progress.close()
            if config.trackers:
                acc.end_training()
        return self.step >= config.steps

    def replay(self) -> dict[str, Any]:
        """Compute the step that `replay` of the constructor names, as the run did, and write nothing.

        Returns:
            step, samples_seen, loss, grad_norm and lr as in log.jsonl (bitwise on as many processes as the run had),
            and positions, rows, t and losses of all images, in order of position.
        """
        number = self._replayed
        self.unet.train()
        clock, watch = _Clock(), HangWatch(0.0, lambda message: None)
        with flushed_denormals(), contextlib.closing(self._batches(number)) as batches:
            while self.step < number:
                if self.step % self.config.log_every == 0:  # where the run wrote a line, and began anew
                    self.train_step.quartiles.zero_()
                done = self._optimizer_step(batches, clock, watch)
                self.step += 1
                self.samples_seen += self.config.batch_size
        mailbox = Mailbox(self.accelerator.device)
        mailbox.put(done.number, done.norm, done.losses, done.rows, done.t)
        (numbers,) = mailbox.take(everything=True)
        return self._record(done) | self._images_of(numbers)

    def _batches(self, last_step: int) -> Generator[Batch, None, None]:
        acc, config = self.accelerator, self.config
        return self.data.batches(
            config.seed,
            first_step=self.step,
            last_step=last_step,
            batch_size=config.batch_size,
            rank=acc.process_index,
            world=acc.num_processes,
            accumulation=config.accumulation,
            workers=config.data.workers,
            device=acc.device,
            offset=self.samples_seen - self.step * config.batch_size,
            labels=self._labels,
        )

    @property
    def _labels(self) -> range | None:
        """What the network can be told: the classes, and -1 for none where it has a class of its own."""
        classes = self.config.model.num_class_embeds
        if classes is None or not self.config.conditional:
            return None
        return range(-1 if self.config.diffusion.label_dropout else 0, classes)

    def _optimizer_step(self, batches: Iterator[Batch], clock: "_Clock", watch: HangWatch) -> _Done:
        """One optimiser step over accumulation micro-batches; the host waits for nothing but data."""
        config, step, number = self.config, self.train_step, self.step + 1
        losses: list[Tensor] = []
        rows: list[Tensor] = []
        timesteps: list[Tensor] = []
        replaced: list[str] = []
        for micro in range(config.accumulation):
            watch.at(number, "reading data")
            with clock.waiting():
                batch = next(batches, None)
            if batch is None:
                raise DataError(f"{config.data.source} gave no more images at step {number}: start again to go on")
            watch.at(number, "computing")
            rows.append(batch.rows)
            replaced += batch.replaced
            labels = batch.labels if config.conditional else None
            if step.graph is not None:
                loss, norm = step(batch.images, batch.ordinals, self.step, labels)
            else:
                loss = step.accumulate(batch.images, batch.ordinals, labels, last=micro == config.accumulation - 1)
            losses.append(loss)
            timesteps.append(step.t)
        if step.graph is None:
            norm = step.update(self.step)
        return _Done(number, losses, norm, rows, timesteps, replaced)

    def _record(self, done: _Done) -> dict[str, Any]:
        """What log.jsonl says of a step. Called on all ranks; the host waits for the device."""
        total = torch.stack([loss.sum() for loss in done.losses]).sum()
        loss = self.accelerator.reduce(total * self._share, reduction="mean")
        numbers = torch.stack((loss, done.norm)).tolist()
        record = {"step": done.number, "samples_seen": self.samples_seen, "loss": numbers[0], "grad_norm": numbers[1]}
        record["lr"] = learning_rate(self.config.optim, done.number - 1, self._horizon)
        sums, counts = self.accelerator.reduce(self.train_step.quartiles.clone(), reduction="sum").tolist()
        record["loss_quartiles"] = [s / FIXED_POINT / n if n else None for s, n in zip(sums, counts, strict=True)]
        if self.guard.num_skipped:
            record["skipped_steps"] = self.guard.num_skipped
        if self.replaced:
            record["replaced_images"] = self.replaced
        return record

    def _images_of(self, numbers: StepNumbers) -> dict[str, list[Any]]:
        """positions, rows, t and losses of a step's images over all ranks, in order of position."""
        config, acc = self.config, self.accelerator
        # Step `number` ended at samples_seen when it was the last; positions are of the plan, not of the device.
        offset = self.samples_seen - self.step * config.batch_size
        plan = BatchPlan(config.batch_size, acc.num_processes, config.accumulation, offset)
        own = [plan.positions(numbers.number - 1, index, acc.process_index) for index in range(config.accumulation)]
        columns = (torch.from_numpy(np.concatenate(own)), numbers.rows, numbers.t, numbers.losses)
        positions, rows, t, losses = (acc.gather(column.to(acc.device)).cpu() for column in columns)
        order = positions.argsort()
        found = {"positions": positions[order], "rows": rows[order], "t": t[order], "losses": losses[order]}
        return {name: column.tolist() for name, column in found.items()}

    def _judge(self, arrived: Iterable[StepNumbers], progress: Progress) -> None:
        """Count and write down steps that were skipped, and spikes. Every rank sees the same norms, in step.

        Raises:
            NumericsError: too many steps were skipped.
        """
        for numbers in arrived:
            if math.isfinite(numbers.norm):
                usual = self.guard.spike(numbers.norm)
                if usual is not None:
                    self._note({"step": numbers.number, "event": "spike", "grad_norm": numbers.norm, "usual": usual})
                    progress.say(f"step {numbers.number}: gradient norm {numbers.norm:.3g}, usually {usual:.3g}")
                continue
            images = self._images_of(numbers)
            bad = [i for i, loss in enumerate(images["losses"]) if not math.isfinite(loss)]
            scaler = self.accelerator.scaler
            if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
                raise NumericsError(
                    f"fp16's loss scale has fallen to {scaler.get_scale():g}: all gradients overflow; use bf16 or fp32"
                )
            if scaler is not None and not bad:
                continue  # how fp16's loss scale finds its size
            self.guard.skip(numbers.number)
            self._note({"step": numbers.number, "event": "skipped", "grad_norm": numbers.norm, **images})
            named = ", ".join(self.data.name_row(images["rows"][i]) for i in bad[:5])
            which = f"rows with such a loss: {named}{', ...' if len(bad) > 5 else ''}"
            if not bad:
                which = f"all losses finite, largest in {self.data.name_row(_row_of_largest(images))}"
            progress.say(f"warning: step {numbers.number} is skipped, its gradient is not finite ({which})")
            self.guard.check(numbers.number, which)

    def _note(self, event: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.events.write(event)

    def _tell_replaced(self, messages: list[str], told: int, progress: Progress) -> None:
        """The first few, on the rank that met them."""
        for message in messages[: max(0, REPLACED_SHOWN - told)]:
            line = f"warning: another image is taken in its place: {message}"
            if progress.enabled:
                progress.say(line)
            else:
                print(f"rank {self.accelerator.process_index}: {line}", file=sys.stderr, flush=True)

    def _count_replaced(self, total: int) -> None:
        """Raise a DataError, on all ranks at the same step, where too many images had to be replaced."""
        self.replaced = total
        seen = max(self.samples_seen, self.data.num_images or SHORTEST_EPOCH)
        if total > MAX_REPLACED * seen:
            raise DataError(
                f"{self.config.data.source}: {total} of {seen:,} images could not be used, more than "
                f"{MAX_REPLACED:.1%}: mend or remove them (data.bad_image=error names the next one)"
            )

    def _write_record(self, record: dict[str, Any], progress: Progress) -> None:
        record["memory_bytes"] = memory_bytes(self.accelerator.device)
        if self.accelerator.is_main_process:
            self.log.write(record)
        if self.config.trackers:
            told = {k: v for k, v in record.items() if k not in ("step", "loss_quartiles")}
            told |= {f"loss_quartile_{q}": v for q, v in enumerate(record["loss_quartiles"], 1) if v is not None}
            self.accelerator.log(told, step=record["step"])
        progress.report(record)

    def _snapshot_due(self) -> bool:
        due = self.step % self._snapshot_every == 0 or self.step == self.config.steps
        return due and self.train_step.power_averages is not None

    @property
    def _snapshot_every(self) -> int:
        return self.config.ema.snapshot_every or self.config.save_every

    def _write_snapshots(self) -> None:
        """Of the power-function averages, ahead of the checkpoint of the same step. Called on all ranks.

        Raises:
            CheckpointError: they cannot be written, on any rank.
        """
        assert self.train_step.power_averages is not None
        failure: list[CheckpointError | None] = [None]
        try:
            parameters = dict(zip(self.names, self.weights, strict=True))
            main = self.accelerator.is_main_process
            write_snapshots(self.run, self.step, self.train_step.power_averages, parameters, main=main)
        except CheckpointError as error:
            failure = [error]
        if self.accelerator.num_processes > 1:
            failure = gather_object(failure)
        for found in failure:
            if found is not None:
                raise found

    def save(self) -> None:
        """Commit a checkpoint, then replace the pipeline files with its averages; with save_async, begin to.

        Called on all ranks.
        """
        norm = total_norm([local(tensor) for tensor in (*self.averages, *self.weights)], sharded=self.sharded)
        if not norm.isfinite():
            raise NumericsError(f"the weights of step {self.step} are not finite; they are not saved: lower optim.lr")
        failure: list[CheckpointError | None] = [None]
        quartiles = self.accelerator.reduce(self.train_step.quartiles.clone(), reduction="sum")
        if self.sharded or self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = State(
                step=self.step,
                samples_seen=self.samples_seen,
                model=self.unet.state_dict(),
                ema=self.ema_unet.state_dict(),
                optimizer=optimizer_tensors(self.optimizer, self.names, self.weights) | self._own_tensors(),
                scaler=scaler.state_dict() if scaler is not None else {},
                facts={
                    "guard": self.guard.to_facts(),
                    "replaced_images": self.replaced,
                    "quartiles": quartiles.tolist(),
                },
                rows=rows(self.unet),
            )
            try:
                if self.writer is not None:
                    self.writer.save(state)
                else:
                    self._export(state, self.checkpoints.save(state))
            except CheckpointError as error:
                failure = [error]
        if self.accelerator.num_processes > 1:  # else the others would wait for a rank that has ended
            failure = gather_object(failure)
        for found in failure:
            if found is not None:
                raise found

    def _export(self, state: State, path: Path) -> None:
        """Make the run folder a diffusers pipeline of the averages in a checkpoint that is committed."""
        if self.accelerator.is_main_process:
            # Of a sharded run no process has them all in memory.
            ema = self.checkpoints.tensors(path, "ema") if self.sharded else state.ema
            try:
                write_pipeline(self.run, self.config.network(), self.config.diffusion, ema)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"the pipeline files of {self.run} cannot be written: {error}") from error

    @property
    def _eval_due(self) -> bool:
        every = self.config.eval.every
        return self.quality is not None and self.step > 0 and self.step % every == 0

    def _missing_measurement(self) -> bool:
        """Whether a kill or a signal has come between this checkpoint and its measurement; rank 0 says so for all."""
        if not self._eval_due:
            return False
        told = [self.step not in [record["step"] for record in self.qualities.records()]]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(told)
        return told[0]

    def measure_quality(self, progress: Progress) -> None:
        """Measure samples of the averaged weights, write RUN/quality.jsonl, keep the best checkpoint. On all ranks."""
        assert self.quality is not None
        config, ours = self.config, self.config.eval
        sampler = Sampler.of(
            config.diffusion,
            self.ema_unet,
            self.schedule,
            sampler=ours.sampler,
            num_steps=ours.steps or min(50, config.diffusion.num_timesteps),
            guidance=ours.guidance,
            dtype=DTYPES[config.precision],
            seed=config.seed,
        )
        measured = self.quality.measure(sampler)
        values = {name: figure["value"] for name, figure in measured.figures.items()}
        record = {"step": self.step, "samples_seen": self.samples_seen} | values | {"features": measured.facts}
        if self.accelerator.is_main_process:
            self.qualities.write(record)
            self._spare_best()
        if config.trackers:
            self.accelerator.log(values, step=self.step)
        progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._unmeasured = False
        self.accelerator.wait_for_everyone()

    def _spare_best(self) -> None:
        """The best of the checkpoints that are there is not pruned, and named in RUN/best.json."""
        there = {int(path.name.removeprefix("step-")) for path in self.checkpoints.all()} | {self.step}
        records = [record for record in self.qualities.records() if record["step"] in there]
        best = best_record(records, self.config.eval.metrics[0])
        self.checkpoints.spared = None if best is None else best["step"]
        if best is None:
            (self.run / "best.json").unlink(missing_ok=True)
        else:
            write_json(self.run / "best.json", best | {"checkpoint": f"checkpoints/step-{best['step']:08d}"})

    def draw_grid(self) -> Path:
        """Sample a grid with the averaged weights into RUN/samples. Called on all ranks."""
        config, acc = self.config, self.accelerator
        sampler = Sampler.of(
            config.diffusion,
            self.ema_unet,
            self.schedule,
            sampler=config.grid.sampler,
            num_steps=config.grid.steps,
            eta=config.grid.eta if config.grid.sampler == "ddim" else 0.0,
            guidance=config.grid.guidance,
            dtype=DTYPES[config.precision],
            seed=config.seed,
        )
        drawn = draw_images(
            sampler,
            config.grid.num,
            shape=(config.channels, *config.model.image_size),
            batch_size=config.grid.batch_size,
            device=acc.device,
            classes=range(config.model.num_class_embeds) if config.model.num_class_embeds is not None else None,
        )
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        if acc.is_main_process:
            classes = config.model.num_class_embeds
            save_picture(grid(drawn.images, classes if classes is not None and classes <= 20 else None), path)
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


def _row_of_largest(images: dict[str, list[Any]]) -> int:
    losses: list[float] = images["losses"]
    row: int = images["rows"][losses.index(max(losses))]
    return row


def resolve(config: Config, run: Path, allow_change: Collection[str] = ()) -> tuple[Config, list[str]]:
    """Fill what depends on the machine or on the run folder: absolute source, the first start's horizon and classes.

    Returns:
        The config, and the allowed changes against the stored one, as "name: stored -> wanted".

    Raises:
        ConfigError: if the folder holds a run of another config (lists every field that differs and is not allowed
            to), or a name in allow_change is none of a field.
    """
    fields = flatten(to_dict(config)).keys() | {"data"}
    for name in allow_change:
        if name not in fields or name in RUNTIME_FIELDS:
            why = "may always change" if name in RUNTIME_FIELDS else "is not a field of the config"
            raise ConfigError(f"allow-change {name}: it {why}")
    stored = read_config(run) if Checkpoints(run).all() else None  # a start that saved nothing binds nothing
    horizon = config.optim.horizon or (stored.optim.horizon if stored else None) or config.steps
    model = config.model
    if config.conditional and model.num_class_embeds is None and stored is not None:  # the data's, at the first start
        model = dataclasses.replace(model, num_class_embeds=stored.model.num_class_embeds)
    config = dataclasses.replace(
        config,
        run=str(run),
        model=model,
        data=dataclasses.replace(
            config.data,
            source=resolve_source(config.data.source),
            mix=tuple(resolve_source(source) for source in config.data.mix),
        ),
        optim=dataclasses.replace(config.optim, horizon=horizon),
    )
    changed = differences(stored, config) if stored is not None else []
    refused = [change for change in changed if change.partition(":")[0] not in allow_change]
    if stored is not None and refused:
        if stored.preset != config.preset:
            raise ConfigError(
                f"{run} was started with --preset {stored.preset}, not {config.preset}: give the options of its first "
                "start again, or choose another --run"
            )
        names = " ".join(change.partition(":")[0] for change in refused)
        raise ConfigError(
            f"{run} is a run of another config ({'; '.join(refused)}): use these values or another --run, or go on "
            f"as another run from here with --allow-change {names}"
        )
    return config, changed
