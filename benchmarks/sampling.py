"""Times sampling, 50-step DDIM and 1000-step ancestral, against diffusers' pipelines: eager, compiled, with graphs.

    python -m benchmarks.sampling                    # this machine's GPU, or its CPU
    python -m benchmarks.sampling --batches 1 --samplers ddim --minutes 2

Everyone has the same weights and takes steps at the same kind of timesteps, with the images left on the device. All
steps of a sampler cost the same, so a call takes --steps-timed of them and times are scaled to all (--full takes all);
the starting noise of a call is part of it. Ours is timed only if each of its DDIM states follows from the one before it
as float64 arithmetic with diffusers' net has it, within the bounds of its precision; a pipeline if its net's prediction
does. The ancestral sampler is the same code with other coefficients, which the tests hold against diffusers' scheduler.
bf16 is bf16 weights with diffusers, whose state is then bf16 too; ours keeps it in fp32.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from fastddpm.compiling import compile_unet
from fastddpm.diffusion import ProcessConfig, to_diffusers_scheduler
from fastddpm.errors import ConfigError
from fastddpm.flops import flops_per_image
from fastddpm.machine import keep_memory
from fastddpm.samplers import Sampler, coefficient_rows
from fastddpm.unet import UNetConfig

from .kernels import FLOORS
from .record import (
    Rates,
    append,
    copy_rate,
    environment,
    interleaved,
    make_record,
    matmul_rate,
    quantiles,
    results_path,
    synchronize,
)
from .rivals import (
    DTYPE_NAMES,
    NETS,
    SEED,
    Missing,
    absent,
    compile_options,
    diffusers_net,
    image_shape,
    load,
    our_net,
    random_weights,
    true_net,
)

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
STEPS = {"ddim": 50, "ancestral": 1000}
PROCESS = ProcessConfig(variance="fixed_small")
GATE_IMAGES = 2  # of a batch, or its only one
GATE_STEPS = 4


@dataclass
class Candidate:
    """A sampler, ready to be called."""

    name: str
    ours: bool
    dtype: torch.dtype
    memory_format: str
    call: Callable[[], Any]
    """Takes the timed steps."""
    errors: Callable[[Truth], tuple[float, float, float]]
    """Error, that of plain PyTorch in the precision, both over the largest entry, and error over what is allowed."""


class Truth:
    """Predictions and DDIM states in float64 from the net that is the truth."""

    def __init__(
        self, config: UNetConfig, weights: Mapping[str, Tensor], device: str, dtypes: Sequence[torch.dtype]
    ) -> None:
        net, self.name = true_net(config, weights)
        self.schedule = PROCESS.noise_schedule()
        self._nets = {dtype: copy.deepcopy(net).eval().to(device, dtype) for dtype in {torch.float64, *dtypes}}

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The net's prediction in float64 arithmetic, or in another dtype's."""
        prediction: Tensor = self._nets[dtype](x_t.to(dtype), t)
        return prediction.double()

    def compare(
        self,
        outputs: Sequence[tuple[Tensor, Tensor, int, Tensor]],
        dtype: torch.dtype,
        rows: Sequence[Sequence[float]] | None,
    ) -> tuple[float, float, float]:
        """The worst over (x_t, t, step, output), which are predictions, or with rows the states they lead to."""
        found = []
        for x_t, t, i, output in outputs:
            true, base = self.predict(x_t, t, torch.float64), self.predict(x_t, t, dtype)
            if rows is not None:
                true, base = (_ddim_state(rows[i], x_t.double(), prediction) for prediction in (true, base))
            largest = float(true.abs().max())
            error = float((output.double() - true).abs().max()) / largest
            base_error = float((base - true).abs().max()) / largest
            found.append((error, base_error, error / (2 * (base_error + FLOORS[dtype]))))
        return max(found, key=lambda errors: (math.isnan(errors[2]), errors[2]))


def _ddim_state(row: Sequence[float], x_t: Tensor, prediction: Tensor) -> Tensor:
    """The deterministic step that a row of coefficients describes: x_0_hat clipped, then C x_0_hat + E x_t."""
    A, B, C, E, _, _, low, high = (float(value) for value in row[:8])
    return C * (A * x_t + B * prediction).clamp(low, high) + E * x_t


def ours(
    config: UNetConfig,
    weights: Mapping[str, Tensor],
    device: str,
    batch: int,
    kind: str,
    timed: int,
    *,
    dtype: torch.dtype,
    compiled: bool = False,
    graph: bool = False,
) -> Candidate:
    """Our Sampler. Raises ConfigError where it cannot be compiled."""
    unet = our_net(config, weights).to(device).eval()
    unet.cast_weights(dtype)
    if compiled:
        compile_unet(unet)
    images, shape = torch.arange(batch), image_shape(config)
    make = partial(Sampler, unet, PROCESS.noise_schedule(), variance="fixed_small", dtype=dtype, seed=SEED, graph=graph)
    sampler = make(sampler="ddim" if kind == "ddim" else "ddpm", num_steps=timed)

    def errors(truth: Truth) -> tuple[float, float, float]:
        checked = make(sampler="ddim", num_steps=GATE_STEPS)
        states: list[Tensor] = []
        # Every step is checked by itself: a difference in one would grow in those that follow.
        for step in checked.steps(images, shape, device):
            states.append(step.x_t[:GATE_IMAGES])
            last = step.x_0_hat[:GATE_IMAGES]
        rows = coefficient_rows(truth.schedule, checked.timesteps, sampler="ddim").tolist()
        timesteps = torch.from_numpy(checked.timesteps).to(device)
        outputs = [
            (x_t, timesteps[i].expand(len(x_t)), i, after)
            for i, (x_t, after) in enumerate(zip(states, [*states[1:], last], strict=True))
        ]
        return truth.compare(outputs, dtype, rows)

    words = (DTYPE_NAMES[dtype], "compiled" * compiled, "graph" * graph)
    return Candidate(
        " ".join(("ours", *filter(None, words))),
        ours=True,
        dtype=dtype,
        memory_format="channels_last",
        call=lambda: sampler.sample(images, shape, device),
        errors=errors,
    )


def pipeline(
    config: UNetConfig,
    weights: Mapping[str, Tensor],
    device: str,
    batch: int,
    kind: str,
    timed: int,
    *,
    dtype: torch.dtype,
    channels_last: bool = False,
    compiled: Mapping[str, Any] | None = None,
    label: str = "",
) -> Candidate:
    """diffusers' DDIMPipeline or DDPMPipeline. Raises Missing."""
    diffusers = load("diffusers")
    net: nn.Module = diffusers_net(config, weights).to(device, dtype).eval()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled is not None:
        forward = torch.compile(net.forward, dynamic=False, options=dict(compiled))

        def on_device(x_t: Tensor, t: Tensor) -> Any:
            """The pipelines leave t on the host, for which torch.compile would do without its graphs."""
            torch.compiler.cudagraph_mark_step_begin()
            return forward(x_t, t.to(device, non_blocking=True))

        net.forward = on_device  # type: ignore[method-assign]
    facts = to_diffusers_scheduler(PROCESS)
    scheduler = {"ddim": diffusers.DDIMScheduler, "ancestral": diffusers.DDPMScheduler}[kind].from_config(facts)
    pipe = {"ddim": diffusers.DDIMPipeline, "ancestral": diffusers.DDPMPipeline}[kind](net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def errors(truth: Truth) -> tuple[float, float, float]:
        generator = torch.Generator().manual_seed(SEED)
        x_t = torch.randn(batch, *image_shape(config), generator=generator).to(device, dtype)
        outputs = []
        for t in (999, 371, 20):
            # As its pipelines call it: one timestep for the batch.
            with torch.no_grad():
                output = net(x_t.contiguous(memory_format=layout), torch.tensor(t)).sample[:GATE_IMAGES].clone()
            outputs.append((x_t[:GATE_IMAGES], torch.full((len(output),), t, device=device), 0, output))
        return truth.compare(outputs, dtype, None)

    return Candidate(
        " ".join(filter(None, ("diffusers", DTYPE_NAMES[dtype], "channels_last" * channels_last, label))),
        ours=False,
        dtype=dtype,
        memory_format="channels_last" if channels_last else "contiguous",
        call=lambda: pipe(batch_size=batch, num_inference_steps=timed, output_type="pt"),
        errors=errors,
    )


Build = Callable[..., Candidate]


def builders(options: argparse.Namespace) -> list[tuple[str, bool, Build]]:
    """Name, whether it is compiled, and the maker of everything to compare; what takes long to compile last."""
    on_gpu = options.device == "cuda"
    found: list[tuple[str, bool, Build]] = []
    for dtype in (DTYPES[name] for name in options.precision):
        ways: list[dict[str, Any]] = [{}]
        if not options.quick:
            ways.append({"compiled": True})
        if on_gpu:
            ways += [{"graph": True}, {"compiled": True, "graph": True}]
        found += [(" ".join(("ours", DTYPE_NAMES[dtype], *w)), False, partial(ours, dtype=dtype, **w)) for w in ways]
        forms: list[dict[str, Any]] = [{}, {"channels_last": True}]
        if not options.no_compile:
            # The layout is optimised by itself where there is no backward pass.
            forms.append({"channels_last": True, "compiled": compile_options("default", False), "label": "compiled"})
            if on_gpu:
                graphs = compile_options("reduce-overhead", False)
                forms.append({"channels_last": True, "compiled": graphs, "label": "compiled, graphs"})
        for form in forms:
            name = " ".join(filter(None, ("diffusers", DTYPE_NAMES[dtype], form.get("label") or " ".join(form))))
            found.append((name, "compiled" in form, partial(pipeline, dtype=dtype, **form)))
    present = [item for item in found if item[0].partition(" ")[0] not in options.absent]
    return sorted(present, key=lambda item: item[1])


def measure(
    batch: int,
    kind: str,
    options: argparse.Namespace,
    facts: dict[str, Any],
    rates: Mapping[torch.dtype, Rates],
    seconds: float,
) -> list[dict[str, Any]]:
    """Compare everything that can be had on a batch and a sampler, within about `seconds`."""
    device, end = options.device, time.perf_counter() + seconds
    config = NETS[options.net].config
    weights = random_weights(config)
    truth = Truth(config, weights, device, [DTYPES[precision] for precision in options.precision])
    steps = STEPS[kind]
    timed = steps if options.full else min(steps, options.steps_timed)
    found: list[dict[str, Any]] = []
    functions: dict[str, Callable[[], Any]] = {}
    for label, compiles, build in builders(options):
        if compiles and time.perf_counter() > end - 0.4 * seconds:
            print(f"skipped, --minutes leave no time to compile it: {label}", flush=True)
            continue
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            start = time.perf_counter()
            candidate = build(config, weights, device, batch, kind, timed)
            error, torch_error, worst = candidate.errors(truth)
            peak = None
            if worst <= 1:
                candidate.call()  # captures
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                candidate.call()
                synchronize(device)
                peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else None
                functions[candidate.name] = candidate.call
        except (Missing, ConfigError) as reason:
            print(f"skipped: {label}: {reason}", flush=True)
            continue
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"skipped, the device's memory is too small: {label}", flush=True)
            continue
        except Exception as failure:
            if label.startswith("ours"):
                raise
            line = (str(failure) or type(failure).__name__).splitlines()[0]
            print(f"skipped, it fails: {label}: {type(failure).__name__}: {line}", flush=True)
            continue
        found.append(
            {
                "candidate": candidate,
                "peak_memory_bytes": peak,
                "error": error,
                "torch_error": torch_error,
                "error_over_allowed": worst,
                "warmup_s": time.perf_counter() - start,
            }
        )
    left = max(0.0, end - time.perf_counter())
    samples = interleaved(functions, device=device, rounds=options.rounds, seconds=left) if functions else {}
    clocks = environment(device)["clocks"]  # under load, not as they were when the run began
    records = []
    for fields in found:
        candidate = fields.pop("candidate")
        ms = [each * steps / timed for each in samples.get(candidate.name, [])]
        timing = quantiles(ms) if ms else None
        records.append(
            make_record(
                "sampling",
                f"{options.net}, {kind} {steps} steps, batch {batch}, {DTYPE_NAMES[candidate.dtype]}",
                candidate.name,
                ours=candidate.ours,
                correct=fields["error_over_allowed"] <= 1,
                facts=facts | {"clocks": clocks},
                rates=rates[candidate.dtype],
                timing=timing,
                direction="sampling",
                dtype=str(candidate.dtype).removeprefix("torch."),
                shape=(batch, *image_shape(config)),
                memory_format=candidate.memory_format,
                images=batch,
                gflop_per_image=steps * flops_per_image(config) / 1e9,
                truth=truth.name,
                ms_per_step=timing["p50_ms"] / steps if timing else None,
                steps_timed=timed,
                **fields,
            )
        )
    return records


def line(record: Mapping[str, Any]) -> str:
    """A record in words."""
    head = f"{record['case']}: {record['impl']:<44}"
    if not record["correct"]:
        return (
            f"{head} WRONG: error {record['error']:.1e}, of torch {record['torch_error']:.1e}, "
            f"{record['error_over_allowed']:.1f} of what is allowed"
        )
    if not record["p50_ms"]:
        return f"{head} not timed"
    memory = record["peak_memory_bytes"]
    return (
        f"{head}{record['ms_per_step']:>10.2f} ms/step {record['images_per_s']:>9.2f} images/s "
        f"{record['matmul_share'] or 0:>6.1%} of matmul" + (f" {memory / 2**30:>6.1f} GiB" if memory else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batches and samplers; 1 if one of our implementations was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--net", choices=sorted(NETS), default="cifar10", help="default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 64 512 on a GPU, 1 16 on a CPU")
    parser.add_argument("--samplers", nargs="+", choices=sorted(STEPS), default=list(STEPS), help="default: both")
    parser.add_argument(
        "--precision", nargs="+", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 and bf16 on a CPU"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time for everything (default: %(default)g)")
    parser.add_argument("--rounds", type=int, help="most calls of each (default: 20 on a GPU, 10 on a CPU)")
    parser.add_argument("--steps-timed", type=int, help="steps of a call (default: 50 on a GPU, 3 on a CPU)")
    parser.add_argument("--full", action="store_true", help="all steps in each call")
    parser.add_argument("--no-compile", action="store_true", help="leave rivals' torch.compile out (nothing is kept)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small net, 2 rounds, no torch.compile")
    parser.add_argument("--out", type=Path, help="file to append to (default: in benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.precision = options.precision or (["bf16"] if on_gpu else ["fp32", "bf16"])
    if not on_gpu:
        keep_memory()  # as fastddpm sample does, here for everyone
    options.rounds = options.rounds or (20 if on_gpu else 10)
    options.steps_timed = options.steps_timed or (50 if on_gpu else 3)
    options.batches = options.batches or ([1, 64, 512] if on_gpu else [1, 16])
    if options.quick:
        options.no_compile, options.net, options.batches = True, "small", options.batches[:1]
        options.rounds, options.steps_timed = 2, 2
    # A baseline without torch.compile would flatter us: such lines go nowhere but where --out says.
    keeps = not options.no_record and (options.out is not None or not options.no_compile)
    torch.set_flush_denormal(True)
    # Past its limit torch.compile goes on uncompiled without a word.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    options.absent = absent()
    if "diffusers" in options.absent:
        print(f"skipped: {options.absent['diffusers']}", flush=True)
    facts = environment(options.device)
    copied = copy_rate(options.device)
    rates = {DTYPES[p]: Rates(copied, matmul_rate(options.device, DTYPES[p])) for p in options.precision}
    path = options.out or results_path(facts)
    print(f"{facts['device']}: copy {copied:.0f} GB/s, torch {facts['torch']}", flush=True)
    cases = [(batch, kind) for kind in options.samplers for batch in options.batches]
    wrong, end = 0, time.perf_counter() + 60 * options.minutes
    for i, (batch, kind) in enumerate(cases):
        seconds = max(0.0, end - time.perf_counter()) / (len(cases) - i)
        if seconds == 0.0:
            print(f"skipped, --minutes are over: {kind}, batch {batch}", flush=True)
            continue
        records = measure(batch, kind, options, facts, rates, seconds)
        for record in records:
            print(line(record), flush=True)
            if keeps:
                append(path, record)
        wrong += sum(record["ours"] and not record["correct"] for record in records)
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()
    if keeps:
        print(f"wrote {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
