"""Times every op of fastddpm_kernels against plain PyTorch, eager and compiled, and appends one JSON line each.

    python -m benchmarks.kernels                     # the machine's GPU, or its CPU (references against plain PyTorch)
    python -m benchmarks.kernels --ops add_noise --graph

An implementation is timed only if it is right on the same inputs: ours against the float64 reference, plain PyTorch
with our noise put in place of its own. Plain PyTorch is written as a trainer would write it that knows the formula:
the noise of x_t is kept for the loss, the gradient is computed with the loss. `ideal_bytes` counts every image-sized
input and output of our op once, for all implementations; buffers rotate over more than twice a GPU's L2. At the sizes
of CIFAR-10 a kernel's work is 1-2 us and the launch is what is timed; --graph replays calls from a CUDA graph instead.
In a training step noising, loss and reverse step are at most half a per cent: what they save is launches, memory and
host work. A backward is timed alone, on a graph that is kept; group_norm_silu moves 2 tensors forward and 3 backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import OPS, Case, Op, Stream, draw_normal, stream_tag
from fastddpm_kernels._dispatch import IMPLS
from fastddpm_kernels.dropout import dropout_reference

from .record import Rates, Timing, append, copy_rate, environment, make_record, results_path, timings

FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FAST_NOISE = 1e-3  # what approximate normals may be off by on a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROTATE_BYTES = {"cuda": 256 << 20, "cpu": 0}
MOST_COPIES = 1023
Kwargs = dict[str, Any]


# The rivals, in plain PyTorch: `noise` is given when they are checked, and drawn when they are timed.


def plain_draw_timesteps(ordinals: Tensor, num_timesteps: int, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.randint_like(ordinals, num_timesteps), torch.rand(ordinals.shape, device=ordinals.device) < 0.5


def plain_draw_normal(ordinals: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.randn(ordinals.shape[0], *shape, dtype=dtype, device=ordinals.device)


def plain_draw_uniform(ordinals: Tensor, num: int, **_: Any) -> Tensor:
    return torch.rand(ordinals.shape[0], num, device=ordinals.device)


def plain_image(x_0: Tensor, flip: Tensor | None) -> Tensor:
    x = x_0.float() / 127.5 - 1.0 if x_0.dtype == torch.uint8 else x_0.float()
    return x if flip is None else torch.where(flip[:, None, None, None], x.flip(-1), x)


def plain_add_noise(
    x_0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    dtype: torch.dtype,
    flip: Tensor | None = None,
    noise: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    x = plain_image(x_0, flip)
    eps = torch.randn_like(x) if noise is None else noise
    x_t = sqrt_alpha_bar[t][:, None, None, None] * x + sqrt_one_minus_alpha_bar[t][:, None, None, None] * eps
    return x_t.to(dtype), eps


def plain_diffusion_loss(
    prediction: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor,
    target: str = "eps",
    x_0: Tensor | None = None,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    huber: float | None = None,
    grad_scale: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    goal = noise
    if x_0 is not None:
        goal = plain_image(x_0, flip)
        if target == "v":
            scale, sigma = (table[t][:, None, None, None] for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar))
            goal = scale * noise - sigma * goal
    error = prediction.float() - goal
    values = error.square()
    if huber is not None:
        root = (values + huber**2).sqrt()
        values, error = 2.0 * huber * (root - huber), error * (huber / root)
    losses = values.mean(dim=(1, 2, 3))
    losses = losses if weights is None else losses * weights
    if grad_scale is None:
        return losses
    scale = grad_scale * 2.0 / prediction[0].numel()
    scale = scale if weights is None else (scale * weights)[:, None, None, None]
    return losses, (error * scale).to(prediction.dtype)


def plain_reverse_step(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    return_x_0: bool,
    noisy: bool,
    history: tuple[Tensor, ...] = (),
    guide: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    **_: Any,
) -> Any:
    columns = coefficients.index_select(0, row.reshape(1))[0].unbind()
    a, b, c, e, h, f, low, high, w, log_min, log_max, g, *carried = columns
    predicted = prediction.float()
    if guide is not None:
        predicted = torch.lerp(guide.float(), predicted, w)
    x_0_hat = (a * x_t + b * predicted).clamp(low, high)
    out = c * x_0_hat + e * x_t
    for factor, past in zip((h, g), history, strict=False):
        out = out + factor * past
    if noisy:
        if variance is not None:
            f = f * (0.5 * torch.lerp(log_min, log_max, 0.5 * (variance.float() + 1))).exp()
        out = out + f * (torch.randn_like(x_t) if noise is None else noise)
    if history:
        rows = (carried[:4], carried[4:])[: len(history)]
        values = (x_0_hat, x_t, *history)
        carried_on = tuple(sum(k * v for k, v in zip(row_, values, strict=False)) for row_ in rows)
        return out, x_0_hat if return_x_0 else None, carried_on
    return (out, x_0_hat) if return_x_0 else out


def plain_dropout(x: Tensor, p: float, **_: Any) -> Tensor:
    return F.dropout(x, p)


def plain_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    noise: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if add is not None:
        x = x + add[..., None, None]
    if residual is not None:
        x = x + residual
    h = F.group_norm(x if skip is None else torch.cat((x, skip), 1), num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    h = F.silu(h)
    if p:
        h = F.dropout(h, p) if noise is None else h * noise
    return h if residual is None else (h, x)


def norm_reference(**kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """plain_group_norm_silu with our dropout: the truth, by autograd, since the op's own reference has no gradient."""
    kept = {key: kwargs.pop(key) for key in ("p", "ordinals", "layer", "seed") if key in kwargs}
    results = plain_group_norm_silu(**kwargs)
    if not kept:
        return results
    y, *total = as_tuple(results)
    y = dropout_reference(y, **kept)
    return (y, total[0]) if total else y


RIVALS: dict[str, Callable[..., Any]] = {
    "draw_timesteps": plain_draw_timesteps,
    "draw_normal": plain_draw_normal,
    "draw_uniform": plain_draw_uniform,
    "add_noise": plain_add_noise,
    "diffusion_loss": plain_diffusion_loss,
    "diffusion_loss_and_grad": plain_diffusion_loss,
    "reverse_step": plain_reverse_step,
    "dropout": plain_dropout,
    "group_norm_silu": plain_group_norm_silu,
}
# What gets a gradient; ops that are not here have no backward.
LEAVES = {
    "diffusion_loss": ("prediction",),
    "dropout": ("x",),
    "group_norm_silu": ("x", "weight", "bias", "add", "residual", "skip", "scale", "shift"),
}
# Ops whose results are random numbers alone: a rival's are other numbers, and there is nothing to compare.
DRAWS = ("draw_timesteps", "draw_normal", "draw_uniform", "dropout")
FAST_NORMALS = ("add_noise", "diffusion_loss", "diffusion_loss_and_grad", "reverse_step", "draw_normal")


# The workloads.


@dataclass(frozen=True)
class Workload:
    """An op's variant at a size."""

    op: str
    variant: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool = True
    backward: bool = False

    @property
    def direction(self) -> str:
        """What a call computes."""
        if self.op == "diffusion_loss_and_grad":
            return "forward+backward"
        return "backward" if self.backward else "forward"

    def inputs(self, device: str) -> Kwargs:
        """The op's keyword arguments."""
        case = Case(self.shape, self.dtype, self.channels_last, device, self.variant)
        return group_norm_inputs(case) if self.op == "group_norm_silu" else OPS[self.op].example(case)


def group_norm_inputs(case: Case) -> Kwargs:
    """What a residual block of Ho's net (add, dropout, residual, skip) or of ADM's (film) hands to its norms."""
    num_samples, channels, height, width = case.shape
    skip = channels // 3 if "skip" in case.variant else 0

    def normal(argument: str, *shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=case.generator(argument)) + mean).to(case.device, case.dtype)

    kwargs: Kwargs = {
        "x": case.place(normal("x", num_samples, channels - skip, height, width)),
        "weight": normal("weight", channels, mean=1.0),
        "bias": normal("bias", channels),
        "num_groups": 32 if channels % 32 == 0 else 8,
        "eps": 1e-6,
    }
    if skip:
        kwargs["skip"] = case.place(normal("skip", num_samples, skip, height, width))
    if "residual" in case.variant:
        kwargs["residual"] = case.place(normal("residual", num_samples, channels - skip, height, width))
    if "add" in case.variant:
        kwargs["add"] = normal("add", num_samples, channels)
    if "film" in case.variant:
        kwargs |= {"scale": normal("scale", num_samples, channels), "shift": normal("shift", num_samples, channels)}
    if "dropout" in case.variant:
        kwargs |= {"p": 0.1, "ordinals": torch.arange(num_samples, device=case.device), "layer": 3, "seed": case.seed}
    return kwargs


def workloads(device: str) -> list[Workload]:
    """What is timed by default: sizes of Ho's CIFAR-10 and an ADM-like 64x64 net, and 1 GiB (a GPU's memory rate)."""
    if device == "cpu":
        sizes, low = [(64, 1, 8, 8), (16, 3, 32, 32)], torch.float32
        hidden = [(16, 256, 16, 16)]
        norms = [("", (16, 128, 32, 32)), ("add+dropout", (16, 256, 16, 16)), ("film+dropout", (2, 192, 64, 64))]
    else:
        sizes, low = [(128, 3, 32, 32), (32, 3, 64, 64), (43690, 3, 64, 64)], torch.bfloat16
        hidden = [(128, 256, 32, 32), (2048, 256, 32, 32)]
        norms = [
            *(("", shape) for shape in ((128, 128, 32, 32), (128, 256, 16, 16), (128, 256, 4, 4))),
            *(("add+dropout", shape) for shape in ((128, 128, 32, 32), (128, 256, 16, 16))),
            ("residual", (128, 128, 32, 32)),
            *(("skip", shape) for shape in ((128, 384, 32, 32), (128, 768, 8, 8))),
            *(("film+dropout", (32, *rest)) for rest in ((192, 64, 64), (384, 32, 32), (576, 16, 16), (768, 8, 8))),
            *(("add", shape) for shape in ((4096, 128, 32, 32), (512, 256, 64, 64))),
        ]
    image_ops: tuple[tuple[str, str, torch.dtype, bool, bool], ...] = (
        ("draw_normal", "x_T", torch.float32, True, False),
        ("add_noise", "uint8", low, True, False),
        ("add_noise", "uint8-flip", low, True, False),
        ("add_noise", "uint8-flip", low, False, False),
        ("diffusion_loss", "eps", low, True, False),
        ("diffusion_loss", "eps", low, True, True),
        ("diffusion_loss_and_grad", "eps", low, True, False),
        ("diffusion_loss_and_grad", "v-flip-weighted", low, True, False),
        ("diffusion_loss_and_grad", "eps-huber", low, True, False),
        *(("reverse_step", variant, low, True, False) for variant in ("noisy", "guided", "learned", "h1-noiseless")),
    )
    both = (False, True)
    return [
        Workload("draw_timesteps", "", sizes[-1], torch.float32),
        Workload("draw_uniform", "", sizes[0], torch.float32),
        *(Workload(op, variant, size, dtype, *how) for size in sizes for op, variant, dtype, *how in image_ops),
        *(Workload("dropout", "p=0.1", size, low, True, backward) for size in hidden for backward in both),
        *(Workload("group_norm_silu", *norm, low, True, backward) for norm in norms for backward in both),
    ]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """The results as a flat tuple, without the None of one that was not asked for."""
    if isinstance(result, tuple):
        return tuple(x for each in result for x in as_tuple(each))
    return () if result is None else (result,)


def of_tensors(function: Callable[[Tensor], Tensor], kwargs: Kwargs) -> Kwargs:
    """The arguments with the function of each tensor, and of the tensors in a tuple."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return function(value) if isinstance(value, Tensor) else value

    return {key: of(value) for key, value in kwargs.items()}


def noise_of(op: Op, kwargs: Kwargs, like: Tensor) -> Tensor:
    """The noise that the op's reference draws for these arguments; for a norm, the scaled mask of its dropout."""
    if op.name == "group_norm_silu":
        shape = (like.shape[0], kwargs["weight"].shape[0], *like.shape[2:])
        ones = torch.ones(shape, dtype=like.dtype, device=like.device).contiguous(memory_format=torch.channels_last)
        return dropout_reference(ones, **{key: kwargs[key] for key in ("p", "ordinals", "layer", "seed")})
    is_step = op.name == "reverse_step"
    return draw_normal(
        kwargs["images" if is_step else "ordinals"],
        (like.shape[1], like.shape[2], like.shape[3]),
        seed=kwargs["seed"],
        stream=stream_tag(Stream.Z if is_step else Stream.EPS),
        step=int(kwargs["row"]) if is_step else None,
        channels_last=like.is_contiguous(memory_format=torch.channels_last),
        impl="reference",
    )


def image_bytes(tensors: Any) -> int:
    """Bytes of the image-sized tensors."""
    return sum(x.numel() * x.element_size() for x in as_tuple(tuple(tensors)) if isinstance(x, Tensor) and x.dim() == 4)


def errors(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """The worst error of each result."""
    return [float((r.double() - t.double()).abs().max()) for r, t in zip(results, truth, strict=False)]


def is_right(results: tuple[Tensor, ...], base: tuple[Tensor, ...], truth: tuple[Tensor, ...], fast: float) -> bool:
    """error <= 2 (error of the reference in the same dtype + floor max|truth|), and `fast`, the room of fast normals.

    4 in place of 2 for what is summed over pixels: losses and the gradients of parameters.
    """
    for result, b, t in zip(results, base, truth, strict=False):
        if not result.is_floating_point():
            if not torch.equal(result, b):
                return False
            continue
        scale = float(t.abs().max())
        factor = 2.0 if result.dim() == 4 else 4.0
        allowed = factor * (errors((b,), (t,))[0] + FLOORS[result.dtype] * scale) + fast * max(1.0, scale)
        if not errors((result,), (t,))[0] <= allowed:
            return False
    return True


def in_float64(kwargs: Kwargs) -> Kwargs:
    """The same arguments in float64, the reference's as truth."""
    wide = of_tensors(lambda x: x.double() if x.is_floating_point() else x, kwargs)
    return {**wide, "dtype": torch.float64} if "dtype" in wide else wide


def contiguous(kwargs: Kwargs) -> Kwargs:
    """The same arguments, images in NCHW order."""
    return of_tensors(Tensor.contiguous, kwargs)


class Backward:
    """Runs a function's backward on a graph made once, with a fixed random upstream gradient."""

    def __init__(self, op: Op, function: Callable[..., Any], kwargs: Kwargs):
        found = {k: kwargs[k].detach().requires_grad_() for k in LEAVES[op.name] if kwargs.get(k) is not None}
        self.leaves = tuple(found.values())
        with torch.enable_grad():
            self.outputs = as_tuple(function(**{**kwargs, **found}))
        self.upstream = tuple(upstream_like(output) for output in self.outputs)

    def __call__(self) -> tuple[Tensor, ...]:
        """The leaves' gradients."""
        return torch.autograd.grad(self.outputs, self.leaves, self.upstream, retain_graph=True)


def upstream_like(output: Tensor) -> Tensor:
    """Random normals in an output's dtype and memory format: the same numbers for every implementation.

    Rounded to bf16, so that the truth in float64 gets the same gradient.
    """
    generator = torch.Generator(output.device).manual_seed(7)
    numbers = torch.randn(output.shape, generator=generator, device=output.device).bfloat16()
    return torch.empty_like(output).copy_(numbers)


@dataclass
class Candidate:
    """An implementation: `call` for timing on `prepare`d inputs, and how wrong it is (None: nothing to compare)."""

    call: Callable[..., Any]
    correct: bool
    error: float | None
    ours: bool = False
    prepare: Callable[[Kwargs], Kwargs] = dict


def candidates(
    workload: Workload, kwargs: Kwargs, device: str, compiled: bool
) -> tuple[dict[str, Candidate], float | None]:
    """The implementations that run here, each checked; and plain PyTorch's error."""
    op = OPS[workload.op]
    torch._dynamo.reset()

    def results_of(function: Callable[..., Any], arguments: Kwargs) -> tuple[Tensor, ...]:
        if workload.backward:
            return Backward(op, function, arguments)()
        return as_tuple(function(**arguments))

    reference = norm_reference if op.name == "group_norm_silu" else op.reference
    truth = results_of(reference, in_float64(kwargs))
    base = results_of(reference, kwargs)
    fast = FAST_NOISE if device == "cuda" and op.name in FAST_NORMALS else 0.0
    found = {}
    for impl in ("triton",) if device == "cuda" else [impl for impl in IMPLS if impl != "triton"]:
        public = partial(op.public, impl=impl)
        try:
            results = results_of(public, kwargs)
        except (ValueError, RuntimeError) as refusal:
            if device == "cuda" or impl == "reference":
                raise
            print(f"{op.name} has no impl {impl!r} here: {refusal}")
            continue
        found[impl] = Candidate(public, is_right(results, base, truth, fast), max(errors(results, truth)), ours=True)

    rival, takes_noise = RIVALS[op.name], op.name not in DRAWS and (op.name != "group_norm_silu" or "p" in kwargs)
    functions = {"eager": rival} | ({"torch.compile": torch.compile(rival, dynamic=False)} if compiled else {})
    layouts: dict[str, Callable[[Kwargs], Kwargs]] = {"": dict}
    if op.name == "group_norm_silu":
        layouts[" NCHW"] = contiguous
    image = next((v for v in kwargs.values() if isinstance(v, Tensor) and v.dim() == 4), None)
    noise = noise_of(op, kwargs, image) if takes_noise and image is not None else None
    given = {} if noise is None else {"noise": noise}
    for (name, function), (layout, prepare) in product(functions.items(), layouts.items()):
        right, error = True, None
        if op.name not in DRAWS:
            results = results_of(function, prepare({**kwargs, **given}))
            right, error = is_right(results, base, truth, fast), max(errors(results, truth))
            if op.name.startswith("diffusion_loss"):  # it reads the noise that the noising kept; the others draw theirs
                prepare = lambda arguments: {**arguments, "noise": given["noise"].clone()}  # noqa: E731
        found[name + layout] = Candidate(function, right, error, prepare=prepare)
    return found, found["eager"].error


def rotating(candidate: Candidate, workload: Workload, inputs: list[Kwargs]) -> Callable[[int], Any]:
    """Calls that read another copy of the inputs each time and write elsewhere than the last len(inputs) calls did."""
    prepared = [candidate.prepare(kwargs) for kwargs in inputs]
    calls: list[Callable[[], Any]] = [
        Backward(OPS[workload.op], candidate.call, kwargs) if workload.backward else partial(candidate.call, **kwargs)
        for kwargs in prepared
    ]
    written: list[Any] = [None] * len(inputs)

    def call(i: int) -> None:
        place = i % len(inputs)
        written[place] = calls[place]()

    return call


def in_graph(function: Callable[[int], Any], calls: int) -> Callable[[int], Any]:
    """A replay of `calls` captured calls, on the current stream: a backward runs on the stream of its forward."""
    for i in range(3):
        function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(calls):
            function(i)
    return lambda _: graph.replay()


def ideal_traffic(workload: Workload, kwargs: Kwargs) -> tuple[int, int]:
    """Bytes of the image-sized tensors that a call has to read and to write, each counted once."""
    op = OPS[workload.op]
    results = image_bytes(as_tuple(op.public(**kwargs)))
    if not workload.backward:
        return image_bytes(kwargs.values()), results
    # A residual went into the sum that the backward reads, and its gradient is x's.
    kwargs = {key: value for key, value in kwargs.items() if key != "residual"}
    leaves = image_bytes(kwargs.get(name) for name in LEAVES[op.name])
    # A dropout's mask can be drawn again: its backward has no need of x.
    return results + (0 if op.name == "dropout" else image_bytes(kwargs.values())), leaves


def measure(
    workload: Workload, device: str, rates: Rates, facts: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time a workload's implementations, interleaved; one record each (times are None for a wrong one)."""
    kwargs = workload.inputs(device)
    with torch.no_grad():
        traffic = ideal_traffic(workload, kwargs)
        # By the smaller of what is read and what is written, so that neither stays in the L2 from call to call.
        smaller = min((b for b in traffic if b), default=1 << 30)
        copies = 1 + min(MOST_COPIES, ROTATE_BYTES[device] // smaller)
        found, torch_error = candidates(workload, kwargs, device, not options.no_compile)
        inputs = [workload.inputs(device) for _ in range(copies)]
        functions = {name: rotating(c, workload, inputs) for name, c in found.items() if c.correct}
        captured = max(20, copies) if options.graph else 1
        peaks = {}
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                function(0)
                peaks[name] = torch.cuda.max_memory_allocated() - held
        if options.graph:
            functions = {name: in_graph(function, captured) for name, function in functions.items()}
        timed = timings(functions, device, repetitions=options.repetitions, sample_ms=options.sample_ms)
    dtype, layout = str(workload.dtype).removeprefix("torch."), "NHWC" if workload.channels_last else "NCHW"
    size = "x".join(map(str, workload.shape))
    case = " ".join(filter(None, (workload.op, workload.variant, workload.direction, dtype, size, layout)))
    return [
        make_record(
            "kernels",
            case + " in a graph" * options.graph,
            name,
            ours=candidate.ours,
            correct=candidate.correct,
            facts=facts,
            rates=rates,
            timing=per_call(timed[name], captured) if name in timed else None,
            direction=workload.direction,
            dtype=dtype,
            shape=workload.shape,
            memory_format="channels_last" if workload.channels_last and "NCHW" not in name else "contiguous",
            ideal_bytes=sum(traffic),
            images=workload.shape[0],
            peak_memory_bytes=peaks.get(name),
            error=candidate.error,
            torch_error=torch_error,
            op=workload.op,
            variant=workload.variant,
            graph=options.graph,
        )
        for name, candidate in found.items()
    ]


def per_call(timing: Timing, calls: int) -> dict[str, float | int]:
    """The fields of a record, of samples in which a call was `calls` calls."""
    return {key: getattr(timing, key) / calls for key in ("p20_ms", "p50_ms", "p80_ms")} | {
        "repetitions": timing.repetitions
    }


def report(records: list[dict[str, Any]]) -> str:
    """A line for each of ours that is wrong, and one for our fastest, the best of plain PyTorch and the ratio."""
    head = f"{records[0]['case']:<66}"
    lines = [
        f"{head}{r['impl']} is WRONG: error {r['error']:.2e}, of torch {r['torch_error']}"
        for r in records
        if r["ours"] and not r["correct"]
    ]
    ours, best = (
        min((r for r in records if r["p50_ms"] and r["ours"] is side), key=lambda r: r["p50_ms"], default=None)
        for side in (True, False)
    )
    if ours is not None:
        line = f"{head}{ours['impl']:<10}{ours['p50_ms'] * 1e3:>9.1f} us"
        if ours["copy_share"]:
            line += f" {ours['gb_per_s']:>8.1f} GB/s {ours['copy_share']:>5.0%} of copy"
        if best is not None:
            line += f"   {best['impl']} {best['p50_ms'] * 1e3:.1f} us: {best['p50_ms'] / ours['p50_ms']:.2f}x"
        lines.append(line)
    return "\n".join(lines)


def size_of(words: str) -> tuple[int, int, int, int]:
    """The size that "N,C,H,W" names."""
    num_samples, channels, height, width = map(int, words.split(","))
    return num_samples, channels, height, width


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    """The default workloads with the command line's ops, shape and dtype, each once; of --quick one for each op."""
    chosen: dict[Workload, None] = {}
    for workload in workloads(options.device):
        if workload.op in options.ops:
            shape = size_of(options.shape) if options.shape else workload.shape
            fits = options.dtype and workload.dtype in OPS[workload.op].dtypes
            dtype = DTYPES[options.dtype] if fits else workload.dtype
            chosen[replace(workload, shape=shape, dtype=dtype)] = None
    if not options.quick:
        return list(chosen)
    return list({(w.op, w.backward): w for w in reversed(chosen)}.values())[::-1]


def main() -> int:
    """Run the workloads; 1 if one of our implementations was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", choices=sorted(RIVALS), default=sorted(RIVALS), help="only these ops")
    parser.add_argument("--shape", help="N,C,H,W: one size instead of the default ones")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the activations instead of the default ones")
    parser.add_argument("--graph", action="store_true", help="time calls replayed from a CUDA graph")
    parser.add_argument("--repetitions", type=int, default=50, help="samples of each implementation")
    parser.add_argument("--sample-ms", type=float, default=5.0, help="milliseconds of calls in one sample")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (no records are kept)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: each op once, 2 samples, --no-compile")
    parser.add_argument(
        "--out", type=Path, help="file to append to (default: benchmarks/results/DEVICE/DATE-COMMIT.jsonl)"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.graph and options.device != "cuda":
        parser.error("--graph needs a GPU")
    if options.quick:
        options.no_compile, options.repetitions, options.sample_ms = True, 2, 0.1
    # A baseline without torch.compile would flatter us: such lines go nowhere but where --out says.
    keeps = not options.no_record and (options.out is not None or not options.no_compile)
    torch._functorch.config.donated_buffer = False  # or a compiled backward runs once only

    facts, rates = environment(options.device), Rates(copy_rate(options.device))
    path = options.out or results_path(facts)
    print(f"{facts['device']}: copy {rates.copy_gb_per_s:.0f} GB/s, torch {facts['torch']}, triton {facts['triton']}")
    wrong = 0
    with torch.cuda.stream(torch.cuda.Stream()) if options.graph else nullcontext():
        for workload in chosen_workloads(options):
            try:
                records = measure(workload, options.device, rates, facts, options)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"skipped, the device's memory is too small: {workload}", flush=True)
                continue
            wrong += any(r["ours"] and not r["correct"] for r in records)
            print(report(records), flush=True)
            if keeps:
                for record in records:
                    append(path, record)
    if keeps:
        print(f"wrote {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
