"""Times every op of fastddpm_kernels against plain PyTorch, eager and compiled, and appends one JSON line each.

    python benchmarks/kernels.py                     # the machine's GPU, or its CPU (references against plain PyTorch)
    python benchmarks/kernels.py --ops add_noise --graph

An implementation is timed only if it is right on the same inputs: ours against the float64 reference, plain PyTorch
with our noise put in place of its own. Plain PyTorch is written as a trainer would write it that knows the formula:
the noise of x_t is kept for the loss, the gradient is computed with the loss. `ideal_bytes` counts every image-sized
input and output of our op once, for all implementations; buffers rotate over more than twice a GPU's L2. At the sizes
of CIFAR-10 a kernel's work is 1-2 us and the launch is what is timed; --graph replays calls from a CUDA graph instead.
In a training step these kernels are at most half a per cent: what they save is launches, memory and host work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import append, copy_rate, environment, results_path, timings
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from fastddpm_kernels import OPS, Case, Op, Stream, draw_normal, stream_tag

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
    losses = error.square().mean(dim=(1, 2, 3))
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
    noise: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    a, b, c, e, _h, f, low, high = coefficients.index_select(0, row.reshape(1))[0].unbind()
    x_0_hat = (a * x_t + b * prediction.float()).clamp(low, high)
    out = c * x_0_hat + e * x_t + f * (torch.randn_like(x_t) if noise is None else noise)
    return (out, x_0_hat) if return_x_0 else out


def plain_dropout(x: Tensor, p: float, **_: Any) -> Tensor:
    return F.dropout(x, p)


RIVALS: dict[str, Callable[..., Any]] = {
    "draw_timesteps": plain_draw_timesteps,
    "draw_normal": plain_draw_normal,
    "add_noise": plain_add_noise,
    "diffusion_loss": plain_diffusion_loss,
    "diffusion_loss_and_grad": plain_diffusion_loss,
    "reverse_step": plain_reverse_step,
    "dropout": plain_dropout,
}
# Ops whose results are random numbers alone: a rival's are other numbers, and there is nothing to compare.
DRAWS = ("draw_timesteps", "draw_normal", "dropout")
DIRECTIONS = {"diffusion_loss_and_grad": "forward+backward"}


# The workloads.


@dataclass(frozen=True)
class Workload:
    """An op's variant at a size."""

    op: str
    variant: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool = True


def workloads(device: str) -> list[Workload]:
    """What is timed by default: training sizes, and sizes at which a GPU's memory is the limit."""
    if device == "cpu":
        sizes, low = [(64, 1, 8, 8), (16, 3, 32, 32)], torch.float32
        hidden = (16, 256, 16, 16)
    else:
        sizes, low = [(128, 3, 32, 32), (64, 3, 64, 64), (512, 3, 256, 256)], torch.bfloat16
        hidden = (128, 256, 32, 32)
    return [
        Workload("draw_timesteps", "", sizes[-1], torch.float32),
        *(
            Workload(op, variant, size, dtype, channels_last)
            for size in sizes
            for op, variant, dtype, channels_last in (
                ("draw_normal", "x_T", torch.float32, True),
                ("add_noise", "uint8", low, True),
                ("add_noise", "uint8-flip", low, True),
                ("add_noise", "uint8-flip", low, False),
                ("diffusion_loss_and_grad", "eps", low, True),
                ("diffusion_loss_and_grad", "v-flip-weighted", low, True),
                ("reverse_step", "noisy", low, True),
            )
        ),
        Workload("dropout", "p=0.1", hidden, low),
    ]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def noise_of(op: Op, kwargs: Kwargs, like: Tensor) -> Tensor:
    """The noise that the op's reference draws for these arguments."""
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
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor) and x.dim() == 4)


def errors(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """The worst error of each result."""
    return [float((r.double() - t.double()).abs().max()) for r, t in zip(results, truth, strict=False)]


def is_right(results: tuple[Tensor, ...], base: tuple[Tensor, ...], truth: tuple[Tensor, ...], fast: bool) -> bool:
    """error <= 2 (error of the reference in the same dtype + floor max|truth|), and the room of fast normals."""
    for result, b, t in zip(results, base, truth, strict=False):
        if not result.is_floating_point():
            if not torch.equal(result, b):
                return False
            continue
        scale = float(t.abs().max())
        allowed = 2.0 * (errors((b,), (t,))[0] + FLOORS[result.dtype] * scale) + FAST_NOISE * max(1.0, scale) * fast
        if not errors((result,), (t,))[0] <= allowed:
            return False
    return True


def in_float64(kwargs: Kwargs) -> Kwargs:
    """The same arguments in float64, the reference's as truth."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    return {**wide, "dtype": torch.float64} if "dtype" in wide else wide


@dataclass
class Candidate:
    """An implementation: `run` for timing, and how wrong it is (None where there is nothing to compare)."""

    run: Callable[[Kwargs, int], Any]
    correct: bool
    error: float | None


def candidates(op: Op, kwargs: Kwargs, device: str, copies: int) -> tuple[dict[str, Candidate], float | None]:
    """The implementations that run here, each checked; and plain PyTorch's error."""
    torch._dynamo.reset()
    truth = as_tuple(op.reference(**in_float64(kwargs)))
    base = as_tuple(op.reference(**kwargs))
    ours = "triton" if device == "cuda" else "reference"
    results = as_tuple(op.public(**kwargs, impl=ours))
    right = is_right(results, base, truth, device == "cuda")
    found = {ours: Candidate(lambda k, i: op.public(**k, impl=ours), right, max(errors(results, truth)))}

    rival = RIVALS[op.name]
    takes_noise = op.name not in DRAWS
    for name, function in (("eager", rival), ("torch.compile", torch.compile(rival, dynamic=False))):
        if not takes_noise:
            found[name] = Candidate(lambda k, i, f=function: f(**k), True, None)
            continue
        image = next(v for v in kwargs.values() if isinstance(v, Tensor) and v.dim() == 4)
        noise = noise_of(op, kwargs, image)
        results = as_tuple(function(**kwargs, noise=noise))
        right = is_right(results, base, truth, device == "cuda")
        # The loss reads the noise that the noising kept; the others draw theirs.
        run: Callable[[Kwargs, int], Any] = lambda k, i, f=function: f(**k)  # noqa: E731
        if op.name.startswith("diffusion_loss"):
            noises = [noise.clone() for _ in range(copies)]
            run = lambda k, i, f=function, n=noises: f(**k, noise=n[i])  # noqa: E731
        found[name] = Candidate(run, right, max(errors(results, truth)))
    return found, found["eager"].error


def rotating(candidate: Candidate, inputs: list[Kwargs]) -> Callable[[int], Any]:
    """Calls that read another copy of the inputs each time and write elsewhere than the last len(inputs) calls did."""
    written: list[Any] = [None] * len(inputs)

    def call(i: int) -> None:
        place = i % len(inputs)
        written[place] = candidate.run(inputs[place], place)

    return call


def in_graph(function: Callable[[int], Any], calls: int) -> Callable[[int], Any]:
    """A replay of `calls` captured calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(i)
    return lambda _: graph.replay()


def measure(workload: Workload, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a workload's implementations, interleaved; one record each (times are None for a wrong one)."""
    op = OPS[workload.op]
    case = Case(workload.shape, workload.dtype, workload.channels_last, device, workload.variant)
    kwargs = op.example(case)
    with torch.no_grad():
        read = image_bytes(kwargs.values())
        ideal = read + image_bytes(as_tuple(op.public(**kwargs)))
        # By the smaller of what is read and what is written, so that neither stays in the L2 from call to call.
        smaller = min(b for b in (read, ideal - read) if b) if ideal else 1 << 30
        copies = 1 + min(MOST_COPIES, ROTATE_BYTES[device] // smaller)
        found, torch_error = candidates(op, kwargs, device, copies)
    inputs = [op.example(case) for _ in range(copies)]
    functions = {name: rotating(candidate, inputs) for name, candidate in found.items() if candidate.correct}
    captured = max(20, copies) if options.graph else 1
    peaks = {}
    with torch.no_grad():
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
    records = []
    for name, candidate in found.items():
        record: dict[str, Any] = {
            "op": op.name,
            "variant": workload.variant,
            "impl": name,
            "graph": options.graph,
            "direction": DIRECTIONS.get(op.name, "forward"),
            "dtype": str(workload.dtype).removeprefix("torch."),
            "shape": list(workload.shape),
            "memory_format": "channels_last" if workload.channels_last else "contiguous",
            "p20_ms": None,
            "p50_ms": None,
            "p80_ms": None,
            "repetitions": options.repetitions,
            "peak_memory_bytes": peaks.get(name),
            "ideal_bytes": ideal,
            "error": candidate.error,
            "torch_error": torch_error,
            "correct": candidate.correct,
        }
        if name in timed:
            timing = asdict(timed[name])
            record |= {key: timing[key] / captured for key in ("p20_ms", "p50_ms", "p80_ms")}
            record["gb_per_s"] = ideal / record["p50_ms"] / 1e6 if ideal else None
            record["copy_share"] = record["gb_per_s"] / options.copy_gb_per_s if ideal else None
            record["images_per_s"] = workload.shape[0] / record["p50_ms"] * 1e3
        records.append(record)
    return records


def report(records: list[dict[str, Any]]) -> str:
    """One line: ours, the better of eager and torch.compile, and the ratio."""
    ours, *rivals = records
    head = f"{ours['op']:<24}{ours['variant']:<17}{'x'.join(map(str, ours['shape'])):<16}{ours['memory_format']:<14}"
    if not ours["correct"]:
        return f"{head}{ours['impl']} is WRONG: error {ours['error']:.2e}, of torch {ours['torch_error']}"
    best = min((r for r in rivals if r["p50_ms"]), key=lambda r: r["p50_ms"], default=None)
    line = f"{head}{ours['p50_ms'] * 1e3:>10.1f} us"
    if ours["copy_share"]:
        line += f" {ours['gb_per_s']:>8.1f} GB/s {ours['copy_share']:>5.0%} of copy"
    if best is not None:
        line += f"   {best['impl']} {best['p50_ms'] * 1e3:.1f} us: {best['p50_ms'] / ours['p50_ms']:.2f}x"
    return line


def main() -> int:
    """Run the workloads; 1 if one of our implementations was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", choices=sorted(OPS), default=sorted(OPS), help="only these ops")
    parser.add_argument("--shape", help="N,C,H,W: one size instead of the default ones")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the activations instead of the default ones")
    parser.add_argument("--graph", action="store_true", help="time calls replayed from a CUDA graph")
    parser.add_argument("--repetitions", type=int, default=50, help="samples of each implementation")
    parser.add_argument("--sample-ms", type=float, default=5.0, help="milliseconds of calls in one sample")
    parser.add_argument(
        "--out", type=Path, help="file to append to (default: benchmarks/results/DEVICE/DATE-COMMIT.jsonl)"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.graph and options.device != "cuda":
        parser.error("--graph needs a GPU")

    chosen = []
    for workload in workloads(options.device):
        if workload.op in options.ops:
            shape = tuple(map(int, options.shape.split(","))) if options.shape else workload.shape
            dtype = (
                DTYPES[options.dtype] if options.dtype and workload.dtype in OPS[workload.op].dtypes else workload.dtype
            )
            changed = Workload(workload.op, workload.variant, shape, dtype, workload.channels_last)
            if changed not in chosen:
                chosen.append(changed)

    facts = environment(options.device)
    options.copy_gb_per_s = copy_rate(options.device)
    path = options.out or results_path(facts)
    print(f"{facts['device']}: copy {options.copy_gb_per_s:.0f} GB/s, torch {facts['torch']}, triton {facts['triton']}")
    wrong = 0
    for workload in chosen:
        records = measure(workload, options.device, options)
        wrong += not records[0]["correct"]
        print(report(records), flush=True)
        if not options.no_record:
            for record in records:
                append(path, {**record, "copy_gb_per_s": options.copy_gb_per_s, **facts})
    if not options.no_record:
        print(f"wrote {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
