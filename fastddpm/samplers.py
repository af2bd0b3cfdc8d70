"""Samplers: running the tables of solvers.py from noise x_T to images x_0, through one fused step for all of them.

Guidance, thresholds, learned variances and the network's own last estimate (self-conditioning) come in between.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal, reverse_step

from .diffusion import NoiseSchedule, ProcessConfig, check_seed
from .errors import ConfigError, NumericsError
from .graphs import capture
from .schedules import check_choice
from .solvers import COLUMNS, SAMPLERS, Table, coefficient_rows, make_table, timestep_spacing

__all__ = ["COLUMNS", "SAMPLERS", "Sampler", "Step", "Stepped", "coefficient_rows", "timestep_spacing", "to_uint8"]


class Step(NamedTuple):
    """One step of sampling: its number i, its timestep t, the state x_t before it, the x_0_hat it made."""

    i: int
    t: float
    x_t: Tensor
    x_0_hat: Tensor


class Stepped(NamedTuple):
    """What Sampler.step made: the state after it and the x_0_hat it was made of, float32 [N, C, H, W]."""

    x_next: Tensor
    x_0_hat: Tensor


class _State(NamedTuple):
    """What a step works on, all on the device."""

    x: Tensor
    images: Tensor
    class_labels: Tensor | None
    row: Tensor
    """int64 [1]: number of the step, counted on by the step itself."""
    history: tuple[Tensor, ...]
    """h1, h2 of the solver."""
    x_0_hat: Tensor | None
    """The last estimate, which a self-conditioned network is given; None for others."""


class _After(NamedTuple):
    """What a step leaves of the state, and x_0_hat if anything needs it."""

    x: Tensor
    history: tuple[Tensor, ...]
    x_0_hat: Tensor | None


class _Tables(NamedTuple):
    """A table on the device: float32 rows for the kernel, timesteps for the network."""

    coefficients: Tensor
    timesteps: Tensor
    reading: Tensor | None
    """A, B, W [R, 3] where x_0_hat is made outside the kernel, whose own are then 0, 1, 1."""
    told: list[Any]
    """The timesteps once more, on the host."""


_StepFunction = Callable[[_State], _After]
# Casts of the weights of the network, and of the guide.
_Kept = tuple[dict[Any, Tensor], dict[Any, Tensor]]


def _check_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"a CUDA graph cannot be captured on {device.type}: sample without graph")


class _StepGraph:
    """One step of sampling as a CUDA graph on tensors of its own, replayed once a step with no other host work."""

    def __init__(self, step: _StepFunction, state: _State) -> None:
        _check_cuda(state.x.device)
        self.state = _State(
            state.x.clone(),
            state.images.clone(),
            None if state.class_labels is None else state.class_labels.clone(),
            state.row.clone(),
            tuple(h.clone() for h in state.history),
            None if state.x_0_hat is None else state.x_0_hat.clone(),
        )
        self.step = step  # holds what the captured kernels read: the tables of the sampler, the weights' casts
        self.device = state.x.device
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their algorithms and allocate in the first calls
                step(self.state)
                self.state.row.copy_(state.row)
        torch.cuda.current_stream(self.device).wait_stream(stream)

        def run() -> Tensor | None:
            after = step(self.state)
            self.state.x.copy_(after.x)
            for own, new in zip(self.state.history, after.history, strict=True):
                own.copy_(new)
            if self.state.x_0_hat is not None and after.x_0_hat is not None:
                self.state.x_0_hat.copy_(after.x_0_hat)
            return after.x_0_hat

        self.captured, self.x_0_hat = capture(run, stream, "sample without --graph")

    def start(self, state: _State) -> _StepFunction:
        """Take over a batch at its first step; the function returned replays a step."""
        pairs = [(self.state.x, state.x), (self.state.images, state.images), (self.state.row, state.row)]
        pairs += zip(self.state.history, state.history, strict=True)
        for own, new in ((self.state.class_labels, state.class_labels), (self.state.x_0_hat, state.x_0_hat)):
            if own is not None and new is not None:
                pairs.append((own, new))
        for own, new in pairs:
            own.copy_(new)
        return self._replay

    def _replay(self, _: _State) -> _After:
        with torch.cuda.device(self.device):
            self.captured.replay()
        return _After(self.state.x, self.state.history, self.x_0_hat)


@contextmanager
def _frozen(unet: object, kept: dict[Any, Tensor]) -> Iterator[None]:
    """Casts of the weights are taken from and put into `kept` inside, if the network is one of ours."""
    frozen = getattr(unet, "frozen", None)
    with frozen(kept) if frozen is not None else nullcontext():
        yield


class Sampler:
    """Draws images with a network. Image n is a function of (seed, n) and the network alone, whatever its batch."""

    def __init__(
        self,
        unet: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        prediction: str = "eps",
        sampler: str = "ddpm",
        num_steps: int | None = None,
        eta: float = 0.0,
        churn: float = 0.0,
        variance: str = "fixed_large",
        temperature: float = 1.0,
        clip: bool = True,
        clip_range: float = 1.0,
        dynamic_threshold: float | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        null_class: int | None = None,
        guide: Callable[..., Any] | None = None,
        self_conditioning: bool = False,
        spacing: str = "trailing",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        impl: str | None = None,
        graph: bool = False,
    ) -> None:
        """
        Args:
            unet: called as unet(x_t, t) or unet(x_t, t, class_labels=labels) with x_t [N, C, H, W] of `dtype` and t
                int64 [N] (float32 for heun, whose levels lie between the timesteps); returns the prediction, or a tuple
                that begins with it, or an object with it as .sample. Of 2C channels the last C are the learned
                variance's. It should be in eval mode; autocast is the caller's.
            schedule: the process it was trained for.
            prediction: what it predicts: eps, x_0 or v.
            sampler: a name of SAMPLERS.
            num_steps: 1 .. T, a network evaluation each (heun: two, but for the last); None: all T.
            eta: ddim's share of fresh noise, 0 .. 1.
            churn: heun's, at least 0.
            variance: ddpm's: fixed_large, fixed_small (for fewer steps than T) or learned_range.
            temperature: factor of the noise z of every step; 1 is the sampler itself, 0 takes the means.
            clip, clip_range: whether and to what x_0_hat is clipped (static thresholding).
            dynamic_threshold: clip x_0_hat of each image to this quantile of its absolute values instead, at least to
                clip_range, and scale it back to clip_range (Imagen, section 2.3); None: static.
            guidance: w >= 0 in guide + w (prediction - guide); 1 is none, and costs nothing.
            guidance_interval: share of T, low and high, in which w acts (Kynkaanniemi et al. 2024); None: everywhere.
            guidance_rescale: share, 0 .. 1, of the guided prediction brought to the standard deviation of the
                unguided one (Lin et al. 2024, section 3.4).
            null_class: the class that stands for none; its prediction is the guide (Ho & Salimans 2022).
            guide: another, weaker network that gives the guide's prediction, for the same class if it has classes
                (autoguidance, Karras et al. 2024); None: the network itself for null_class.
            self_conditioning: the network gets torch.cat((x_t, its last x_0_hat), 1), zeros at first.
            spacing: which timesteps are kept, see timestep_spacing (heun: EDM's grid instead).
            dtype: of the network's input; state and coefficients are float32.
            seed: of all noise, 0 .. 2^63 - 1.
            impl: "triton", "reference" or None (by device), as in fastddpm_kernels.
            graph: replay each step, network and all, as one CUDA graph, captured at the first batch of a shape. The
                weights are read then: make another Sampler when they have changed.

        Raises:
            ConfigError: if a name or a value is not valid, or guidance is asked for and there is nothing to guide by.
        """
        check_seed(seed)
        check_choice("sampler", sampler, list(SAMPLERS))
        if not 0 <= guidance_rescale <= 1:
            raise ConfigError(f"guidance_rescale is {guidance_rescale}: it must be in 0 .. 1")
        if dynamic_threshold is not None and not 0 < dynamic_threshold <= 1:
            raise ConfigError(f"dynamic_threshold is {dynamic_threshold}: it must be above 0 and at most 1")
        if dynamic_threshold is not None and not clip:
            raise ConfigError(f"dynamic_threshold is {dynamic_threshold} and clip off: it is a way of clipping")
        if not 0 < clip_range < math.inf:
            raise ConfigError(f"clip_range is {clip_range}: it must be above 0")
        if guidance != 1 and guide is None and null_class is None:
            raise ConfigError(
                f"guidance is {guidance}: it needs a network that was trained with hidden classes "
                "(--diffusion.label-dropout), or a guide (--guide)"
            )
        self._levels = SAMPLERS[sampler].levels(
            schedule, schedule.num_timesteps if num_steps is None else num_steps, spacing
        )
        self._options: dict[str, Any] = {
            "sampler": sampler,
            "prediction": prediction,
            "variance": variance,
            "eta": eta,
            "churn": churn,
            "temperature": temperature,
            "clip_range": clip_range if clip and dynamic_threshold is None else None,
            "guidance": guidance,
            "guidance_interval": guidance_interval,
        }
        self.table = make_table(self._levels, **self._options)
        self.timesteps, self.rows = self.table.timesteps, self.table.rows
        self._noisy = bool(self.table.column("F").any())
        self.sampler, self.schedule = sampler, schedule
        self.unet, self.guide = unet, guide if guidance != 1 else None
        self.null_class = null_class if guidance != 1 and guide is None else None
        self.guidance, self.guidance_rescale = guidance, guidance_rescale if guidance != 1 else 0.0
        self.dynamic_threshold, self.clip_range = dynamic_threshold, clip_range
        self.self_conditioning = self_conditioning
        self.dtype, self.seed, self.impl, self.graph = dtype, seed, impl, graph
        config = getattr(unet, "config", None)
        classes = getattr(config, "num_class_embeds", None)
        self.num_classes: int | None = classes if null_class is None or classes is None else classes - 1
        """Classes of the network, without the null class; None where it has none, or is not one of ours."""
        self._kept: _Kept = {}, {}
        self._on_device: dict[tuple[str, int], _Tables] = {}
        self._captured: tuple[object, _StepGraph] | None = None

    @classmethod
    def of(cls, process: ProcessConfig, unet: Callable[..., Any], schedule: NoiseSchedule, **options: Any) -> "Sampler":
        """The sampler of a trained process: what the process says, where `options` (of __init__) do not say otherwise.

        Raises:
            ConfigError: as __init__.
        """
        own: dict[str, Any] = {
            "prediction": process.prediction,
            "variance": process.variance,
            "clip": process.clip,
            "clip_range": process.clip_range,
            "dynamic_threshold": process.dynamic_threshold,
            "spacing": process.spacing,
            "self_conditioning": process.self_conditioning,
        }
        kind = getattr(getattr(unet, "config", None), "class_embed_type", None)
        if kind is not None:
            raise ConfigError(
                f"the model's class_embed_type is {kind}: only classes that are numbers (num_class_embeds) can be "
                "sampled"
            )
        if not options.get("clip", True):
            own["dynamic_threshold"] = None
        classes = getattr(getattr(unet, "config", None), "num_class_embeds", None)
        if process.label_dropout > 0 and classes is not None:
            own["null_class"] = classes - 1
        return cls(unet, schedule, **(own | options))

    def sample(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        *,
        x_T: Tensor | None = None,
        first_step: int = 0,
        callback: Callable[[int, Any, Tensor], object] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Draw images, in one batch; no step waits for the device.

        Args:
            images: int64 [N], numbers of the images, 0 .. 2^32 - 1.
            shape: (C, H, W).
            x_T: float32 [N, C, H, W], in place of our own initial noise; it is not changed. ddim_inverse starts from
                it: it is the image.
            first_step: number of the step to begin with, from a state x_T of that step's noise level.
            callback: called as callback(i, t, x) after step i, which was at timestep t, with the state it gave.
            class_labels: int64 [N], handed to the network.

        Returns:
            float32 [N, C, H, W], in -1 .. 1 where x_0_hat is clipped to that, in the memory format of x_T (our own:
            channels_last).

        Raises:
            ConfigError: if an image number or a class is out of range, classes are missing or not wanted, shapes do not
                fit, or a sampler cannot begin at first_step.
        """
        x = x_T
        for i, t, _, x, _ in self._run(
            images, shape, device, x_T, first_step, class_labels, return_x_0=False, watched=callback is not None
        ):
            if callback is not None:
                callback(i, t, x)
        assert x is not None  # there is at least one step
        return x

    def steps(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        *,
        x_T: Tensor | None = None,
        first_step: int = 0,
        class_labels: Tensor | None = None,
    ) -> Iterator[Step]:
        """The same, step by step, for filmstrips: yields (i, t, x_t, x_0_hat), float32 [N, C, H, W].

        x_t is the state that the network sees in step i (x_T in the first), x_0_hat the clipped estimate it leads to;
        that of the last step is the image that sample returns (but for ddim_inverse). heun yields twice a step, once
        for each evaluation. Arguments and errors as for sample.
        """
        for i, t, x_t, _, x_0_hat in self._run(
            images, shape, device, x_T, first_step, class_labels, return_x_0=True, watched=True
        ):
            assert x_0_hat is not None
            yield Step(i, t, x_t, x_0_hat)

    @torch.no_grad()
    def step(
        self,
        i: int,
        x_t: Tensor,
        images: Tensor,
        *,
        z: Tensor | None = None,
        class_labels: Tensor | None = None,
        x_0_hat: Tensor | None = None,
    ) -> Stepped:
        """Step number i alone, from any state; for samplers whose steps need nothing of the steps before.

        Casts of the weights are kept from call to call: make another Sampler when the weights have changed.

        Args:
            x_t: float32 [N, C, H, W] on the device to compute on, of the noise level of step i.
            images: int64 [N], as for sample.
            z: noise of the step, float32 like x_t; None: that of the step's address, as in sample.
            class_labels: as for sample.
            x_0_hat: the last estimate, for a self-conditioned network; None: none yet.

        Raises:
            ConfigError: for a sampler with a history, or arguments as for sample.
        """
        if self.table.num_history:
            raise ConfigError(
                f"{self.sampler} has no single steps, each needs what the one before left: take ddpm or ddim"
            )
        if not 0 <= i < len(self.timesteps):
            raise ConfigError(f"step {i} does not exist: valid are 0 .. {len(self.timesteps) - 1}")
        channels, height, width = x_t.shape[1:]
        state = self._state(images, (channels, height, width), x_t.device, x_t, i, class_labels)
        if x_0_hat is not None and self.self_conditioning:
            state = state._replace(x_0_hat=x_0_hat)
        after = self._stepping(self._tables(x_t.device, i), self._kept, z=z, return_x_0=True)(state)
        assert after.x_0_hat is not None
        return Stepped(after.x, after.x_0_hat)

    @torch.no_grad()
    def _run(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str,
        x_T: Tensor | None,
        first_step: int,
        class_labels: Tensor | None,
        *,
        return_x_0: bool,
        watched: bool,
    ) -> Iterator[tuple[int, float, Tensor, Tensor, Tensor | None]]:
        """Yield i, t, the state before, the state after, and x_0_hat if asked for; watched: states may be kept."""
        self._check_first(first_step, x_T)
        # All that a step reads is on the device before the first: a host value would make every step wait.
        state = self._state(images, shape, device, x_T, first_step, class_labels)
        tables = self._tables(device, first_step)
        step = self._stepping(tables, ({}, {}), z=None, return_x_0=return_x_0)
        # A graph's tensors are overwritten by its next step: copied for whoever may keep them.
        copies = self.graph and (return_x_0 or watched)
        advance = self._graphed(step, state, (return_x_0, self._opening(first_step))) if self.graph else step
        timesteps = tables.told
        for i in range(first_step, len(timesteps)):
            before = state.x
            after = advance(state)
            if copies or (self.graph and i == len(timesteps) - 1):
                x_0_hat = None if after.x_0_hat is None else after.x_0_hat.clone()
                after = after._replace(x=after.x.clone(), x_0_hat=x_0_hat)
            own = after.x_0_hat if self.self_conditioning else None
            state = state._replace(x=after.x, history=after.history, x_0_hat=own)
            yield i, timesteps[i], before, after.x, after.x_0_hat

    def _stepping(self, tables: _Tables, kept: _Kept, *, z: Tensor | None, return_x_0: bool) -> _StepFunction:
        """The function that takes the step of state.row, and counts the row on."""
        return_x_0 = return_x_0 or self.self_conditioning

        def step(state: _State) -> _After:
            t = tables.timesteps[state.row].expand(len(state.images))
            with _frozen(self.unet, kept[0]), _frozen(self.guide, kept[1]):
                # Not around a yield: the nets may be used otherwise in between.
                prediction, guide, learned = self._predict(state, t)
            if tables.reading is not None:
                prediction, guide = self._x_0_hat(state, tables.reading, prediction, guide), None
            result = reverse_step(
                state.x,
                prediction,
                tables.coefficients,
                state.row[0],
                state.images,
                seed=self.seed,
                history=state.history,
                guide=guide,
                variance=learned,
                noise=z,
                noisy=self._noisy,
                return_x_0=return_x_0,
                impl=self.impl,
            )
            state.row.add_(1)
            if isinstance(result, Tensor):
                return _After(result, (), None)
            return _After(result[0], result[2] if len(result) == 3 else (), result[1])

        return step

    def _predict(self, state: _State, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The network's prediction, the guide's, and the learned variance."""
        x = state.x.to(self.dtype)
        if state.x_0_hat is not None:
            x = torch.cat((x, state.x_0_hat.to(self.dtype)), 1)
        labels, channels = state.class_labels, state.x.shape[1]
        if self.null_class is not None:
            # With and without class in one call of 2N: the weights are read once and half as many kernels launched.
            labels = None if labels is None else torch.cat((labels, torch.full_like(labels, self.null_class)))
            output, other = _call(self.unet, torch.cat((x, x)), torch.cat((t, t)), labels).chunk(2)
        else:
            output, other = _call(self.unet, x, t, labels), None
            if self.guide is not None:
                config = getattr(self.guide, "config", None)
                wanted = config is None or getattr(config, "num_class_embeds", None) is not None
                other = _call(self.guide, x, t, labels if wanted else None)
        prediction, learned = _split(output, state.x)
        guide = None if other is None else _split(other, state.x)[0]
        if self.table.learned and learned is None:
            raise ConfigError(
                f"variance is learned_range and the network returned {channels} channels: valid are {2 * channels}"
            )
        return prediction, guide, learned if self.table.learned else None

    def _x_0_hat(self, state: _State, reading: Tensor, prediction: Tensor, guide: Tensor | None) -> Tensor:
        """x_0_hat float32, where an image's values depend on each other (rescaled guidance, dynamic thresholds)."""
        a, b, w = reading.index_select(0, state.row)[0].unbind()
        prediction = prediction.float()
        if guide is not None:
            guided = guide.float() + w * (prediction - guide.float())
            if self.guidance_rescale:
                own, other = _deviation(prediction), _deviation(guided)
                ratio = torch.where(other > 0, own / torch.where(other > 0, other, 1.0), 1.0)
                guided = guided * (self.guidance_rescale * ratio + (1 - self.guidance_rescale))
            prediction = guided
        x_0_hat = a * state.x + b * prediction
        if self.dynamic_threshold is None:
            return x_0_hat
        limit = _quantile(x_0_hat.abs(), self.dynamic_threshold).clamp(min=self.clip_range)
        return torch.minimum(torch.maximum(x_0_hat, -limit), limit) * (self.clip_range / limit)

    def _check_first(self, first_step: int, x_T: Tensor | None) -> None:
        steps, each = len(self.timesteps), self.table.evaluations
        if not 0 <= first_step < steps:
            raise ConfigError(f"first_step is {first_step}: it must be in 0 .. {steps - 1}")
        if first_step % each:
            raise ConfigError(f"first_step is {first_step}: {self.sampler} begins a step at every {each}nd evaluation")
        if x_T is None and (first_step or not SAMPLERS[self.sampler].to_image):
            where = f"at step {first_step}" if first_step else "from images"
            raise ConfigError(f"{self.sampler} begins {where}: give the state to begin with as x_T")

    def _opening(self, first_step: int) -> int:
        """Which of the tables serves a run that begins at first_step: with a history, one of its own."""
        return first_step if self.table.num_history else 0

    def _tables(self, device: torch.device | str, first_step: int) -> _Tables:
        """The table on the device, made once; rows before first_step are not used."""
        key = str(torch.device(device)), self._opening(first_step)
        if key not in self._on_device:
            table = self.table
            rows, told = table.rows.copy(), table.timesteps.copy()
            if key[1]:  # nothing is known of the steps before: their places keep the numbers of rows, and so of z
                rest = self._from(key[1])
                rows[key[1] :], told[key[1] :] = rest.rows, rest.timesteps
            reading = None
            if self.guidance_rescale or self.dynamic_threshold is not None:
                columns = [COLUMNS.index(name) for name in ("A", "B", "W")]
                reading = torch.tensor(rows[:, columns], dtype=torch.float32).to(device)
                rows[:, columns] = 0.0, 1.0, 1.0
            whole = told.dtype.kind == "i"
            timesteps = torch.tensor(told, dtype=torch.int64 if whole else torch.float32)
            coefficients = torch.tensor(rows, dtype=torch.float32).to(device)
            self._on_device[key] = _Tables(coefficients, timesteps.to(device), reading, told.tolist())
        return self._on_device[key]

    def _from(self, first_step: int) -> Table:
        return make_table(self._levels.start(first_step // self.table.evaluations), **self._options)

    def _graphed(self, step: _StepFunction, state: _State, kind: tuple[bool, int]) -> _StepFunction:
        """`step` from a CUDA graph, captured anew where the shapes are others than the last batch's."""
        labels = state.class_labels
        key = state.x.shape, state.x.stride(), state.x.device, None if labels is None else labels.shape, kind
        if self._captured is None or self._captured[0] != key:
            self._captured = None  # its memory is free before the next is captured
            self._captured = key, _StepGraph(step, state)
        return self._captured[1].start(state)

    def _state(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str,
        x_T: Tensor | None,
        first_step: int,
        class_labels: Tensor | None,
    ) -> _State:
        """What the first step works on, on the device."""
        if images.ndim != 1 or not len(images) or images.dtype != torch.int64:
            raise ConfigError(f"images is {images.dtype} {list(images.shape)}: give int64 numbers [N], at least one")
        # Numbers already on a device are not looked at: that would wait for it.
        if images.device.type == "cpu" and not 0 <= int(images.min()) <= int(images.max()) < 2**32:
            raise ConfigError("image numbers must be in 0 .. 2^32 - 1")
        class_labels = self._labels(images, class_labels)
        images = images.to(device)
        if x_T is None:
            x_T = draw_normal(images, shape, seed=self.seed, stream=Stream.X_T, channels_last=True, impl=self.impl)
        elif x_T.shape != (len(images), *shape):
            raise ConfigError(f"x_T has the shape {list(x_T.shape)}: valid is {[len(images), *shape]}")
        x = x_T.to(device, torch.float32)
        return _State(
            x,
            images,
            None if class_labels is None else class_labels.to(device),
            torch.full((1,), first_step, dtype=torch.int64, device=device),
            tuple(torch.zeros_like(x) for _ in range(self.table.num_history)),
            torch.zeros_like(x) if self.self_conditioning else None,
        )

    def _labels(self, images: Tensor, class_labels: Tensor | None) -> Tensor | None:
        if class_labels is None:
            if self.num_classes is not None:
                raise ConfigError(f"the network is conditional: give class_labels, each in 0 .. {self.num_classes - 1}")
            if self.null_class is not None:
                raise ConfigError("guidance by the class that stands for none needs class_labels")
            return None
        if class_labels.shape != images.shape:
            raise ConfigError(f"class_labels has the shape {list(class_labels.shape)}: valid is {[len(images)]}")
        config = getattr(self.unet, "config", None)
        if self.num_classes is None and config is not None and getattr(config, "class_embed_type", None) is None:
            raise ConfigError("a class is asked for and the network has none: it was trained without --conditional")
        if self.num_classes is not None and class_labels.device.type == "cpu":
            # The null class may be asked for: it stands for no class.
            embeds = self.num_classes + (self.unet.config.num_class_embeds > self.num_classes)  # type: ignore[attr-defined]
            wrong = class_labels[(class_labels < 0) | (class_labels >= embeds)]
            if len(wrong):
                raise ConfigError(f"class {int(wrong[0])} does not exist: valid are 0 .. {self.num_classes - 1}")
            known = getattr(getattr(self.guide, "config", None), "num_class_embeds", None)
            if known is not None and (highest := int(class_labels.max())) >= known:
                raise ConfigError(f"class {highest} is not one of the guide's: valid are 0 .. {known - 1}")
        return class_labels


def _call(net: Callable[..., Any], x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """What a network returns, whatever it is wrapped in."""
    output = net(x, t) if labels is None else net(x, t, class_labels=labels)
    output = getattr(output, "sample", output)
    return output if isinstance(output, Tensor) else output[0]


def _split(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output as the prediction, and the learned variance where it has twice the channels."""
    n, channels, *size = x.shape
    if output.shape == (n, 2 * channels, *size):
        return output[:, :channels], output[:, channels:]
    if output.shape != x.shape:
        raise ConfigError(
            f"the network returned {list(output.shape)} for x_t {list(x.shape)}: valid is the same shape, or twice the "
            "channels (learned variance)"
        )
    return output, None


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each image [N, 1, 1, 1]."""
    return x.std(dim=(1, 2, 3), keepdim=True, correction=0)


def _quantile(x: Tensor, q: float) -> Tensor:
    """Quantile of each image [N, 1, 1, 1], linear between its values; torch.quantile's own waits for the device."""
    values = x.flatten(1).sort(dim=1).values
    place = q * (values.shape[1] - 1)
    low = min(int(place), max(values.shape[1] - 2, 0))
    high = min(low + 1, values.shape[1] - 1)
    return torch.lerp(values[:, low], values[:, high], place - low)[:, None, None, None]


def to_uint8(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in -1 .. 1 as uint8 [N, H, W, C]: round((x + 1) 127.5), clamped to 0 .. 255.

    Raises:
        NumericsError: if a value is not finite, naming the first such image; a byte would hide it.
    """
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise NumericsError(f"sample {first} of {len(x)} holds values that are not numbers: the network has diverged")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
