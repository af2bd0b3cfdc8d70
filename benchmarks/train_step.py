"""Times the whole training step (data, noise, forward, backward, clip, optimiser, EMA) of ours and its rivals.

    python -m benchmarks.train_step                              # this machine's GPU, or its CPU
    python -m benchmarks.train_step --cases cifar10:128:0.1 --minutes 5
    python -m benchmarks.train_step --script train_unconditional.py   # diffusers' real script as well

Everyone gets the same images, initial weights, precision, dropout, clipping and EMA at every step; ours has the
optimiser settings of diffusers' script, whose loop benchmarks/rivals.py makes, as it is and tuned. Candidates of a case
take turns. One of ours is timed only if its prediction and all its gradients, dropout masks included, are those of
diffusers' net in float64 within the bounds of its precision, its optimiser and EMA have moved once a step, and (in a
CUDA graph) its losses are those of the same steps taken eagerly. Rivals are held to the same, lucidrains' net, which is
another one, against itself; the real script is taken on trust and timed by itself, by what it logs. Building, compiling
and capturing is warmup_s, not part of a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from fastddpm.compiling import compile_unet
from fastddpm.config import EMAConfig, OptimConfig
from fastddpm.diffusion import ProcessConfig, TrainingProcess
from fastddpm.errors import ConfigError
from fastddpm.flops import flops_per_image
from fastddpm.machine import keep_memory
from fastddpm.step import TrainStep

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
    SCRIPT,
    SEED,
    TRAINING_STEPS,
    Candidate,
    Form,
    Missing,
    Net,
    Truth,
    Verdict,
    absent,
    compile_options,
    diffusers_step,
    image_shape,
    lucidrains_net,
    lucidrains_step,
    made_up_images,
    our_net,
    random_weights,
    shuffled,
    true_net,
    with_dropout,
)

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
OPTIM = OptimConfig(
    name="adamw",
    lr=SCRIPT["learning_rate"],
    betas=(SCRIPT["adam_beta1"], SCRIPT["adam_beta2"]),
    adam_eps=SCRIPT["adam_epsilon"],
    weight_decay=SCRIPT["adam_weight_decay"],
    warmup_steps=SCRIPT["lr_warmup_steps"],
    decay="cosine",
    horizon=TRAINING_STEPS,
    clip_norm=SCRIPT["max_grad_norm"],
)
EMA = EMAConfig(decay=SCRIPT["ema_max_decay"])
WARMUP_STEPS = {"cuda": 6, "cpu": 2}  # a CUDA graph of ours is captured at the fourth, torch.compile's at the third
SAME_LOSSES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the same steps, eager and in a graph


@dataclass(frozen=True)
class Case:
    """What is compared."""

    net: str
    batch: int
    dropout: float

    @classmethod
    def parse(cls, words: str) -> Case:
        """NET:BATCH:DROPOUT."""
        net, batch, dropout = words.split(":")
        if net not in NETS:
            raise ValueError(net)
        return cls(net, int(batch), float(dropout))

    def name(self, dtype: torch.dtype) -> str:
        return f"{self.net}, batch {self.batch}, dropout {self.dropout:g}, {DTYPE_NAMES[dtype]}"


CASES = {
    "cuda": ("cifar10:128:0.1", "adm64:32:0.1", "cifar10:32:0.1", "cifar10:512:0.1", "adm64:8:0.1"),
    "cpu": ("cifar10:16:0", "cifar10:16:0.1"),
}
QUICK = ("small:8:0.1",)


def our_step(
    net: Net,
    weights: Mapping[str, Tensor],
    images: Tensor,
    batch: int,
    device: str,
    *,
    dtype: torch.dtype,
    compiled: bool = False,
    graph: bool = False,
) -> Candidate:
    """The trainer's step on one process. Raises ConfigError where it cannot be compiled."""
    unet = our_net(net.config, weights).to(device).train()
    ema_unet = copy.deepcopy(unet).eval()
    if compiled:
        compile_unet(unet)
    process = TrainingProcess(ProcessConfig().noise_schedule(), seed=SEED)
    train_step = TrainStep(unet, ema_unet, process, OPTIM, EMA, dtype=dtype, graph=graph)
    batches = shuffled(images, batch, device)
    number = 0

    def step() -> Tensor:
        nonlocal number
        ordinals = torch.arange(number * batch, (number + 1) * batch, device=device)
        losses, _ = train_step(next(batches), ordinals, number)
        number += 1
        return losses

    words = (DTYPE_NAMES[dtype], "compiled" * compiled, "graph" * graph)
    return Candidate(
        " ".join(("ours", *filter(None, words))),
        ours=True,
        dtype=dtype,
        memory_format="channels_last",
        batch=batch,
        step=step,
        predict=lambda x_t, t: unet(x_t, t)[0],
        parameters=list(unet.parameters()),
        averages=list(ema_unet.parameters()),
        optimizer=train_step.optimizer,
        gflop_per_image=flops_per_image(net.config) / 1e9,
        compiled=compiled,
        masks=partial(unet.noise_address, SEED),
        training=unet.train,
    )


Build = Callable[[], Candidate]


def builders(case: Case, weights: Mapping[str, Tensor], options: argparse.Namespace) -> list[tuple[str, bool, Build]]:
    """Name, whether it is compiled, and how it is made, of everything to compare; what takes long to compile last."""
    net, device = with_dropout(NETS[case.net], case.dropout), options.device
    images = made_up_images(net.config, case.batch * max(4, 1024 // case.batch))
    on_gpu = device == "cuda"
    found: list[tuple[str, bool, Build]] = []
    for dtype in (DTYPES[name] for name in options.precision):
        forms = [Form(dtype), Form(dtype, channels_last=True), Form(dtype, channels_last=True, tuned=True)]
        ways: list[dict[str, Any]] = [{}]
        if not options.quick:
            ways.append({"compiled": True})
        if on_gpu:
            ways += [{"graph": True}, {"compiled": True, "graph": True}]
        for way in ways:
            make = partial(our_step, net, weights, images, case.batch, device, dtype=dtype, **way)
            found.append((" ".join(("ours", DTYPE_NAMES[dtype], *way)), False, make))
        if not options.no_compile:
            tuned, default = Form(dtype, tuned=True), compile_options("default", False)
            last = replace(tuned, channels_last=True)
            if on_gpu:
                forced, graphs = compile_options("default", True), compile_options("reduce-overhead", True)
                forms += [
                    replace(tuned, compile=default, label="compiled"),
                    replace(last, compile=forced, label="compiled, layout forced"),
                    replace(last, compile=graphs, label="compiled, layout forced, graphs"),
                ]
                if options.autotune:
                    autotuned = compile_options("max-autotune", True)
                    forms.append(replace(last, compile=autotuned, label="compiled, layout forced, max-autotune"))
            else:
                forms.append(replace(last, compile=default, label="compiled"))
        for form in forms:
            make = partial(diffusers_step, net.config, weights, images, case.batch, device, form)
            found.append((f"diffusers {form.words}", form.compile is not None, make))
        for form in forms[:2]:
            make = partial(lucidrains_step, net, images, case.batch, device, form)
            found.append((f"lucidrains {form.words}", False, make))
    present = [item for item in found if item[0].partition(" ")[0] not in options.absent]
    return sorted(present, key=lambda item: item[1])


@dataclass
class Prepared:
    """A candidate that has been warmed up and held against the truth."""

    candidate: Candidate
    verdict: Verdict
    correct: bool
    warmup_s: float
    ema_weight: float
    peak_memory_bytes: int | None
    """Weights, optimiser, averages and one step; None on a CPU, whose processes have one peak for all."""
    truth: str


def prepare(build: Build, truths: Mapping[bool, tuple[Truth, str]], device: str) -> Prepared:
    """Build a candidate, hold it against the truth and take its first steps."""
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    start = time.perf_counter()
    candidate = build()
    seconds = time.perf_counter() - start
    truth, name = truths[not candidate.name.startswith("lucidrains")]
    checking = time.perf_counter()
    verdict = truth.check(candidate)
    # What is compiled compiles in the check already.
    start = checking if candidate.compiled else time.perf_counter()
    for _ in range(WARMUP_STEPS[device]):
        candidate()
    synchronize(device)
    seconds += time.perf_counter() - start
    weight, peak = candidate.ema_weight(), None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        candidate()
        peak = torch.cuda.max_memory_allocated() - held
    counted = candidate.optimizer_steps() == candidate.calls and 0 < weight < 1
    return Prepared(candidate, verdict, verdict.correct and counted, seconds, weight, peak, name)


def measure(
    case: Case, options: argparse.Namespace, facts: dict[str, Any], rates: Mapping[torch.dtype, Rates], seconds: float
) -> list[dict[str, Any]]:
    """Compare everything that can be had on a case, within about `seconds`."""
    device, end = options.device, time.perf_counter() + seconds
    net = with_dropout(NETS[case.net], case.dropout)
    weights, shape = random_weights(net.config), image_shape(net.config)
    exact, name = true_net(net.config, weights)
    dtypes, few = [DTYPES[precision] for precision in options.precision], math.gcd(case.batch, 2)
    truths = {True: (Truth(exact, shape, device, dtypes, few), name)}
    found: list[Prepared] = []
    for label, compiles, build in builders(case, weights, options):
        if compiles and time.perf_counter() > end - 0.4 * seconds:
            print(f"skipped, --minutes leave no time to compile it: {label}", flush=True)
            continue
        try:
            if label.startswith("lucidrains") and False not in truths:
                truths[False] = Truth(lucidrains_net(net), shape, device, dtypes, few), "its own float64"
            prepared = prepare(build, truths, device)
        except (Missing, ConfigError) as reason:
            print(f"skipped: {label}: {reason}", flush=True)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"skipped, the device's memory is too small: {label}", flush=True)
        except Exception as error:
            if label.startswith("ours"):
                raise
            line = (str(error) or type(error).__name__).splitlines()[0]
            print(f"skipped, it fails: {label}: {type(error).__name__}: {line}", flush=True)
        else:
            found.append(prepared)
            print(f"ready after {prepared.warmup_s:.1f} s: {prepared.candidate.name}", flush=True)
    compare_losses(found)
    # A rival that is wrong is not timed either.
    timed = {p.candidate.name: p.candidate for p in found if p.correct}
    per_call = options.steps_per_call

    def several(candidate: Candidate) -> None:
        for _ in range(per_call):
            candidate()

    calls = {name: partial(several, candidate) for name, candidate in timed.items()}
    left = max(0.0, end - time.perf_counter())
    rounds = -(-options.steps // per_call)
    samples = interleaved(calls, device=device, rounds=rounds, seconds=left) if calls else {}
    clocks = environment(device)["clocks"]  # under load, not as they were when the run began
    records = []
    for p in found:
        c = p.candidate
        p.correct &= c.optimizer_steps() == c.calls
        ms = [each / per_call for each in samples.get(c.name, [])]
        records.append(
            make_record(
                "train_step",
                case.name(c.dtype),
                c.name,
                ours=c.ours,
                correct=p.correct,
                facts=facts | {"clocks": clocks},
                rates=rates[c.dtype],
                timing=quantiles(ms) if ms else None,
                direction="training step",
                dtype=str(c.dtype).removeprefix("torch."),
                shape=(case.batch, *shape),
                memory_format=c.memory_format,
                images=case.batch,
                gflop_per_image=3 * c.gflop_per_image,
                peak_memory_bytes=p.peak_memory_bytes,
                error=p.verdict.error,
                torch_error=p.verdict.torch_error,
                error_over_allowed=p.verdict.worst,
                truth=p.truth,
                parameters=sum(w.numel() for w in c.parameters),
                dropout=case.dropout,
                warmup_s=p.warmup_s,
                steps_timed=per_call * len(ms),
                optimizer_steps=c.optimizer_steps(),
                steps=c.calls,
                ema_weight=p.ema_weight,
            )
        )
    return records


def compare_losses(found: Sequence[Prepared]) -> None:
    """Ours in a CUDA graph is wrong unless the losses of its last warm-up step are those of the same eager steps."""
    for p in found:
        if p.candidate.name.endswith("graph"):
            name, mine = f"ours {DTYPE_NAMES[p.candidate.dtype]}", p.candidate.losses
            theirs = next((q.candidate.losses for q in found if q.candidate.name == name), None)
            p.correct &= (
                mine is not None
                and theirs is not None
                and bool((mine - theirs).norm() <= SAME_LOSSES[p.candidate.dtype] * theirs.norm())
            )


def run_script(
    path: Path, case: Case, precision: str, options: argparse.Namespace, facts: dict[str, Any], rates: Rates
) -> dict[str, Any]:
    """A record of diffusers' real script, by itself, on the same images as PNG files; timed by what it logs each step.

    Its last steps' intervals are taken; the first fifth, in which it warms up, is left out. Raises Missing.
    """
    try:
        from PIL import Image
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise Missing(f"{error.name} is missing, in which the script logs: pip install tensorboard") from error
    config = with_dropout(NETS[case.net], case.dropout).config
    steps = max(10, min(options.steps, 250))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        (folder / "model").mkdir()
        for i, image in enumerate(made_up_images(config, case.batch * steps).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "model" / "config.json").write_text(json.dumps(config.to_diffusers()))
        command = [
            *(sys.executable, str(path), "--train_data_dir", str(folder / "images"), "--use_ema", "--num_epochs", "1"),
            *("--model_config_name_or_path", str(folder / "model"), "--resolution", str(config.image_size[0])),
            *("--train_batch_size", str(case.batch), "--mixed_precision", {"fp32": "no"}.get(precision, precision)),
            *("--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache"), "--eval_batch_size", "1"),
            *("--ddpm_num_inference_steps", "1", "--checkpointing_steps", str(10 * steps)),
        ]
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **on_cpu})
        if done.returncode:
            raise Missing(f"{path} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        (events,) = {p.parent for p in (folder / "out").rglob("events.out.tfevents*") if p.parent.name != "out"}
        log = EventAccumulator(str(events))
        log.Reload()
        times = [event.wall_time for event in log.Scalars("loss")]
    late = times[len(times) // 5 :]
    dtype = DTYPES[precision]
    return make_record(
        "train_step",
        case.name(dtype),
        f"diffusers {precision} (the script itself)",
        ours=False,
        correct=True,
        facts=facts,
        rates=rates,
        timing=quantiles([(b - a) * 1e3 for a, b in pairwise(late)]),
        direction="training step",
        dtype=str(dtype).removeprefix("torch."),
        shape=(case.batch, *image_shape(config)),
        memory_format="contiguous",
        images=case.batch,
        gflop_per_image=3 * flops_per_image(config) / 1e9,
        dropout=case.dropout,
        interleaved=False,
        truth=None,
    )


def line(record: Mapping[str, Any]) -> str:
    """A record in words."""
    head = f"{record['case']}: {record['impl']:<52}"
    if not record["correct"]:
        return (
            f"{head} WRONG: error {record['error']:.1e}, of torch {record['torch_error']:.1e}, "
            f"{record['error_over_allowed']:.1f} of what is allowed; {record['steps']} steps, optimiser "
            f"{record['optimizer_steps']}, EMA weight {record['ema_weight']:.2g}"
        )
    if not record["p50_ms"]:
        return f"{head} not timed"
    memory = record["peak_memory_bytes"]
    return (
        f"{head}{record['p50_ms']:>10.1f} ms {record['images_per_s']:>9.1f} images/s "
        f"{record['gflop_per_image']:>7.1f} GFLOP/image {record['matmul_share'] or 0:>6.1%} of matmul"
        + (f" {memory / 2**30:>6.1f} GiB" if memory else "")
    )


def case_of(words: str) -> Case:
    """An argument of --cases."""
    try:
        return Case.parse(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{words!r}: give NET:BATCH:DROPOUT with a net of {', '.join(NETS)}, such as cifar10:128:0.1"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of our implementations was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=case_of,
        metavar="NET:BATCH:DROPOUT",
        help=f"default: {' '.join(CASES['cuda'])} on a GPU, {' '.join(CASES['cpu'])} on a CPU",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 and bf16 on a CPU"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all cases (default: %(default)g)")
    parser.add_argument("--steps", type=int, help="most steps of each (default: 200 on a GPU, 50 on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave rivals' torch.compile out (nothing is kept)")
    parser.add_argument("--autotune", action="store_true", help="rivals in torch.compile's max-autotune as well (slow)")
    parser.add_argument("--script", type=Path, help="diffusers' train_unconditional.py, to be run as it is as well")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small net, 2 rounds, no torch.compile")
    parser.add_argument("--out", type=Path, help="file to append to (default: in benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.precision = options.precision or (["bf16"] if on_gpu else ["fp32", "bf16"])
    options.steps = options.steps or (200 if on_gpu else 50)
    options.steps_per_call = 10 if on_gpu else 1  # so that the host can run ahead of a GPU, as it does in training
    if options.quick:
        options.no_compile, options.steps, options.steps_per_call = True, 2, 1
    cases = options.cases or [Case.parse(words) for words in (QUICK if options.quick else CASES[options.device])]
    # A baseline without torch.compile would flatter us: such lines go nowhere but where --out says.
    keeps = not options.no_record and (options.out is not None or not options.no_compile)
    torch.set_flush_denormal(True)  # as our trainer does, here for everyone
    if not on_gpu:
        keep_memory()  # likewise
    # Past its limit torch.compile goes on uncompiled without a word.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    options.absent = absent()
    for reason in options.absent.values():
        print(f"skipped: {reason}", flush=True)
    facts = environment(options.device)
    copied = copy_rate(options.device)
    rates = {DTYPES[p]: Rates(copied, matmul_rate(options.device, DTYPES[p])) for p in options.precision}
    path = options.out or results_path(facts)
    reached = ", ".join(f"{DTYPE_NAMES[dtype]} {r.matmul_tflops:.1f}" for dtype, r in rates.items())
    print(f"{facts['device']}: copy {copied:.0f} GB/s, matmul TFLOP/s {reached}, torch {facts['torch']}", flush=True)
    wrong, end = 0, time.perf_counter() + 60 * options.minutes
    for i, case in enumerate(cases):
        seconds = max(0.0, end - time.perf_counter()) / (len(cases) - i)
        if seconds == 0.0:
            print(f"skipped, --minutes are over: {case}", flush=True)
            continue
        records = measure(case, options, facts, rates, seconds)
        for precision in options.precision if options.script else ():
            try:
                records.append(run_script(options.script, case, precision, options, facts, rates[DTYPES[precision]]))
            except Missing as reason:
                print(f"skipped: the script itself: {reason}", flush=True)
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
