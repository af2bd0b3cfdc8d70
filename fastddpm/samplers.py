"""Samplers: from noise x_T to images x_0, each one a table with a row of coefficients per step.

x_0_hat = clip(A x_t + B prediction, lo, hi);  x_{t-1} = C x_0_hat + E x_t + F z  (DDPM, algorithm 2; DDIM, eq. 12).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddpm_kernels import Stream, draw_normal, reverse_step

from .diffusion import PREDICTIONS, SPACINGS, VARIANCES, NoiseSchedule, check_seed
from .errors import ConfigError, NumericsError
from .graphs import capture
from .schedules import Array, check_choice, check_timesteps

# Columns of a coefficient row, as fastddpm_kernels.reverse_step reads them; H is for multistep solvers.
COLUMNS = ("A", "B", "C", "E", "H", "F", "lo", "hi")


def timestep_spacing(num_timesteps: int, num_steps: int, spacing: str = "trailing") -> np.ndarray:
    """The timesteps that a sampler of `num_steps` steps visits, int64 [num_steps], descending (as diffusers' do).

    trailing: from T - 1 down by T / num_steps, the choice for few steps (Lin et al. 2024, table 2); leading: multiples
    of T // num_steps, so it starts below T - 1 (at 980 for 50 of 1000); linspace: both T - 1 and 0.

    Raises:
        ConfigError: if num_steps is not in 1 .. num_timesteps, or the spacing is unknown.
    """
    check_choice("spacing", spacing, SPACINGS)
    check_timesteps(num_timesteps)
    if isinstance(num_steps, bool) or num_steps != int(num_steps) or not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"the number of sampling steps is {num_steps}: it must be in 1 .. {num_timesteps} (T)")
    if spacing == "trailing":
        # Cut to num_steps, because the rounding of the stride can let arange go one too far (to timestep -1).
        steps = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))[:num_steps] - 1
    elif spacing == "leading":
        steps = (np.arange(num_steps) * (num_timesteps // num_steps))[::-1]
    else:
        steps = np.round(np.linspace(0, num_timesteps - 1, num_steps))[::-1]
    return steps.astype(np.int64)


def ddpm(alpha_bar_t: Array, alpha_bar_s: Array, *, variance: str = "fixed_large") -> tuple[Array, Array, Array, Array]:
    """C, E, H, F of the ancestral step from t to the next kept timestep s < t (DDPM, eqs. 6 and 7, algorithm 2).

    The steps between are skipped, so beta is that of the whole way, 1 - alpha_bar_t / alpha_bar_s, in mean and variance
    (improved DDPM, eq. 19).

    Args:
        alpha_bar_t, alpha_bar_s: float64 [S], noise level before and after each step; 1 after the last one.
        variance: fixed_small, the posterior's, or fixed_large, beta; no noise in the last step.
    """
    check_choice("variance", variance, VARIANCES)
    beta = 1 - alpha_bar_t / alpha_bar_s
    C = np.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
    E = np.sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    F = np.sqrt(beta if variance == "fixed_large" else beta * (1 - alpha_bar_s) / (1 - alpha_bar_t))
    F[-1] = 0
    return C, E, np.zeros_like(C), F


def ddim(alpha_bar_t: Array, alpha_bar_s: Array, *, eta: float = 0.0) -> tuple[Array, Array, Array, Array]:
    """C, E, H, F of the DDIM step (Song et al. 2021, eqs. 12 and 16), with eps derived again from the clipped x_0_hat.

    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z, where
    eps_hat = (x_t - sqrt(alpha_bar_t) x_0_hat) / sqrt(1 - alpha_bar_t). With the network's eps instead, x_t drifts away
    from what x_0_hat and eps_hat make up as soon as x_0_hat is clipped.

    Args:
        alpha_bar_t, alpha_bar_s: as for ddpm.
        eta: share of fresh noise, 0 (deterministic) to 1 (the ancestral step with fixed small variance).

    Raises:
        ConfigError: if eta is not in 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta}: it must be in 0 .. 1")
    sigma = eta * np.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
    E = np.sqrt(np.maximum(1 - alpha_bar_s - sigma**2, 0) / (1 - alpha_bar_t))
    C = np.sqrt(alpha_bar_s) - E * np.sqrt(alpha_bar_t)
    return C, E, np.zeros_like(C), sigma


SAMPLERS: dict[str, Callable[..., tuple[Array, Array, Array, Array]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
}


def coefficient_rows(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | np.ndarray,
    *,
    sampler: str = "ddpm",
    prediction: str = "eps",
    variance: str = "fixed_large",
    eta: float = 0.0,
    clip_range: float | None = 1.0,
) -> Array:
    """The whole table of a sampler, float64 [S, 8] with the columns of COLUMNS, one row per step.

    Args:
        timesteps: descending, each in 0 .. T-1.
        prediction: what the network predicts; it decides A and B (DDPM eq. 15 for eps).
        variance, eta: options of the samplers; each takes those it knows.
        clip_range: x_0_hat is clipped to -clip_range .. clip_range before anything is made of it; None: not clipped.

    Raises:
        ConfigError: if a name or a value is not valid.
    """
    check_choice("sampler", sampler, list(SAMPLERS))
    check_choice("prediction", prediction, PREDICTIONS)
    if clip_range is not None and not clip_range > 0:
        raise ConfigError(f"clip_range is {clip_range}: it must be above 0")
    alpha_bar_t = schedule.alpha_bar[np.asarray(timesteps)]
    alpha_bar_s = np.append(alpha_bar_t[1:], 1.0)
    signal, noise = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
    A, B = {
        "eps": (1 / signal, -noise / signal),
        "x_0": (np.zeros_like(signal), np.ones_like(signal)),
        "v": (signal, -noise),
    }[prediction]
    solver = SAMPLERS[sampler]
    options = {"variance": variance, "eta": eta}
    known = inspect.signature(solver).parameters
    C, E, H, F = solver(alpha_bar_t, alpha_bar_s, **{name: value for name, value in options.items() if name in known})
    hi = np.full_like(A, np.inf if clip_range is None else clip_range)
    return np.stack([A, B, C, E, H, F, -hi, hi], axis=1)


class Step(NamedTuple):
    """One step of sampling: its number i = 0 .. S-1, its timestep t, the state x_t before it, the x_0_hat it made."""

    i: int
    t: int
    x_t: Tensor
    x_0_hat: Tensor


class _State(NamedTuple):
    """What a step works on, all on the device."""

    x: Tensor
    images: Tensor
    class_labels: Tensor | None
    row: Tensor
    """int64 [1]: number of the step, counted on by the step itself."""


_StepFunction = Callable[[_State], tuple[Tensor, Tensor | None]]


class _StepGraph:
    """One step of sampling as a CUDA graph on tensors of its own, replayed once a step with no other host work."""

    def __init__(self, step: _StepFunction, state: _State) -> None:
        if state.x.device.type != "cuda":
            raise ConfigError(f"a CUDA graph cannot be captured on {state.x.device.type}: sample without graph")
        self.state = state._replace(
            x=state.x.clone(),
            images=state.images.clone(),
            class_labels=None if state.class_labels is None else state.class_labels.clone(),
            row=state.row.clone(),
        )
        self.step = step  # holds what the captured kernels read: the tables of the sampler, the weights' casts
        self.device = state.x.device
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their algorithms and allocate in the first calls
                step(self.state)
                self.state.row.zero_()
        torch.cuda.current_stream(self.device).wait_stream(stream)

        def run() -> Tensor | None:
            x, x_0_hat = step(self.state)
            self.state.x.copy_(x)
            return x_0_hat

        self.captured, self.x_0_hat = capture(run, stream, "sample without --graph")

    def start(self, state: _State) -> _StepFunction:
        """Take over a batch at its first step; the function returned replays a step."""
        self.state.x.copy_(state.x)
        self.state.images.copy_(state.images)
        if state.class_labels is not None and self.state.class_labels is not None:
            self.state.class_labels.copy_(state.class_labels)
        self.state.row.zero_()
        return self._replay

    def _replay(self, _: _State) -> tuple[Tensor, Tensor | None]:
        with torch.cuda.device(self.device):
            self.captured.replay()
        return self.state.x, self.x_0_hat


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
        variance: str = "fixed_large",
        clip: bool = True,
        clip_range: float = 1.0,
        spacing: str = "trailing",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        impl: str | None = None,
        graph: bool = False,
    ) -> None:
        """
        Args:
            unet: called as unet(x_t, t) or unet(x_t, t, class_labels=labels) with x_t [N, C, H, W] of `dtype` and t
                int64 [N]; returns the prediction, or a tuple that begins with it, or an object with it as .sample. It
                should be in eval mode; autocast is the caller's.
            schedule: the process it was trained for.
            prediction: what it predicts: eps, x_0 or v.
            sampler: a name of SAMPLERS.
            num_steps: network evaluations, 1 .. T; None: all T.
            eta: ddim's share of fresh noise, 0 .. 1 (ddpm has none to set).
            variance: ddpm's, fixed_large or fixed_small (for fewer steps than T).
            clip, clip_range: whether and to what x_0_hat is clipped.
            spacing: which timesteps are kept, see timestep_spacing.
            dtype: of the network's input; state and coefficients are float32.
            seed: of all noise, 0 .. 2^63 - 1.
            impl: "triton", "reference" or None (by device), as in fastddpm_kernels.
            graph: replay each step, network and all, as one CUDA graph, captured at the first batch of a shape. The
                weights are read then: make another Sampler when they have changed.

        Raises:
            ConfigError: if a name or a value is not valid.
        """
        check_seed(seed)
        check_choice("variance", variance, VARIANCES)
        num_timesteps = schedule.num_timesteps
        self.timesteps = timestep_spacing(num_timesteps, num_timesteps if num_steps is None else num_steps, spacing)
        self.rows = coefficient_rows(
            schedule,
            self.timesteps,
            sampler=sampler,
            prediction=prediction,
            clip_range=clip_range if clip else None,
            variance=variance,
            eta=eta,
        )
        self.unet, self.dtype, self.seed, self.impl, self.graph = unet, dtype, seed, impl, graph
        self._captured: tuple[object, _StepGraph] | None = None

    def sample(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        *,
        x_T: Tensor | None = None,
        callback: Callable[[int, int, Tensor], object] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Draw images, in one batch; no step waits for the device.

        Args:
            images: int64 [N], numbers of the images, 0 .. 2^32 - 1.
            shape: (C, H, W).
            x_T: float32 [N, C, H, W], in place of our own initial noise; it is not changed.
            callback: called as callback(i, t, x) after step i, which was at timestep t, with the state it gave.
            class_labels: int64 [N], handed to the network.

        Returns:
            float32 [N, C, H, W], in -1 .. 1 where x_0_hat is clipped to that, in the memory format of x_T (our own:
            channels_last).

        Raises:
            ConfigError: if an image number is out of range, or shapes do not fit.
        """
        x = x_T
        for i, t, _, x, _ in self._run(
            images, shape, device, x_T, class_labels, return_x_0=False, watched=callback is not None
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
        class_labels: Tensor | None = None,
    ) -> Iterator[Step]:
        """The same, step by step, for filmstrips: yields (i, t, x_t, x_0_hat), float32 [N, C, H, W].

        x_t is the state that the network sees in step i (x_T in the first), x_0_hat the clipped estimate it leads to;
        that of the last step is the image that sample returns. Arguments and errors as for sample.
        """
        for i, t, x_t, _, x_0_hat in self._run(images, shape, device, x_T, class_labels, return_x_0=True, watched=True):
            assert x_0_hat is not None
            yield Step(i, t, x_t, x_0_hat)

    @torch.no_grad()
    def _run(
        self,
        images: Tensor,
        shape: tuple[int, int, int],
        device: torch.device | str,
        x_T: Tensor | None,
        class_labels: Tensor | None,
        *,
        return_x_0: bool,
        watched: bool,
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
        """Yield i, t, the state before, the state after, and x_0_hat if asked for; watched: states may be kept."""
        images, x = self._start(images, shape, device, x_T)
        if class_labels is not None:
            if class_labels.shape != images.shape:
                raise ConfigError(f"class_labels has the shape {list(class_labels.shape)}: valid is {[len(images)]}")
            class_labels = class_labels.to(device)
        # All that a step reads is on the device before the first: a host value would make every step wait.
        state = _State(x, images, class_labels, torch.zeros(1, dtype=torch.int64, device=device))
        coefficients = torch.tensor(self.rows, dtype=torch.float32).to(device)
        timesteps = torch.tensor(self.timesteps).to(device)
        kept: dict[Any, Tensor] = {}

        def step(state: _State) -> tuple[Tensor, Tensor | None]:
            """The state after the step of state.row, and x_0_hat if asked for; the row counts on."""
            t = timesteps[state.row].expand(len(state.images))
            labels = {} if state.class_labels is None else {"class_labels": state.class_labels}
            with _frozen(self.unet, kept):  # not around a yield: the net may be used otherwise in between
                prediction = _prediction(self.unet(state.x.to(self.dtype), t, **labels), state.x)
            arguments = (state.x, prediction, coefficients, state.row[0], state.images)
            result = reverse_step(*arguments, seed=self.seed, return_x_0=return_x_0, impl=self.impl)
            x, x_0_hat = result if isinstance(result, tuple) else (result, None)
            state.row.add_(1)
            return x, x_0_hat

        # A graph's tensors are overwritten by its next step: copied for whoever may keep them.
        copies = self.graph and (return_x_0 or watched)
        advance = self._graphed(step, state, return_x_0) if self.graph else step
        for i, t in enumerate(self.timesteps.tolist()):
            before = state.x
            after, x_0_hat = advance(state)
            if copies or (self.graph and i == len(self.timesteps) - 1):
                after, x_0_hat = after.clone(), None if x_0_hat is None else x_0_hat.clone()
            state = state._replace(x=after)
            yield i, t, before, after, x_0_hat

    def _graphed(self, step: _StepFunction, state: _State, return_x_0: bool) -> _StepFunction:
        """`step` from a CUDA graph, captured anew where the shapes are others than the last batch's."""
        labels = state.class_labels
        key = state.x.shape, state.x.stride(), state.x.device, None if labels is None else labels.shape, return_x_0
        if self._captured is None or self._captured[0] != key:
            self._captured = None  # its memory is free before the next is captured
            self._captured = key, _StepGraph(step, state)
        return self._captured[1].start(state)

    def _start(
        self, images: Tensor, shape: tuple[int, int, int], device: torch.device | str, x_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Image numbers on the device, and x_T."""
        if images.ndim != 1 or not len(images) or images.dtype != torch.int64:
            raise ConfigError(f"images is {images.dtype} {list(images.shape)}: give int64 numbers [N], at least one")
        # Numbers already on a device are not looked at: that would wait for it.
        if images.device.type == "cpu" and not 0 <= int(images.min()) <= int(images.max()) < 2**32:
            raise ConfigError("image numbers must be in 0 .. 2^32 - 1")
        images = images.to(device)
        if x_T is None:
            x_T = draw_normal(images, shape, seed=self.seed, stream=Stream.X_T, channels_last=True, impl=self.impl)
        elif x_T.shape != (len(images), *shape):
            raise ConfigError(f"x_T has the shape {list(x_T.shape)}: valid is {[len(images), *shape]}")
        return images, x_T.to(device, torch.float32)


def _prediction(output: Any, x: Tensor) -> Tensor:
    prediction = getattr(output, "sample", output)
    prediction = prediction if isinstance(prediction, Tensor) else prediction[0]
    if prediction.shape != x.shape:
        raise ConfigError(
            f"the network returned {list(prediction.shape)} for x_t {list(x.shape)}: valid is the same shape "
            "(learned variances are not supported)"
        )
    return prediction


def to_uint8(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in -1 .. 1 as uint8 [N, H, W, C]: round((x + 1) 127.5), clamped to 0 .. 255.

    Raises:
        NumericsError: if a value is NaN, naming the first such image; a byte would hide it.
    """
    bad = torch.isnan(x).flatten(1).any(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise NumericsError(f"sample {first} of {len(x)} holds values that are not numbers: the network has diverged")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
