"""Images/s of the training step against the number of processes, and what a model of communication makes of it.

    python -m benchmarks.scaling                     # NCCL on this machine's GPUs, or gloo on its CPU
    python -m benchmarks.scaling --processes 1 2 4 --net cifar10 --batch 64
    python -m benchmarks.scaling --plan              # only the prediction up to 1024 GPUs

Each number of processes is started here (torch.multiprocessing) and runs the trainer's step on made-up images: noise,
U-Net in DistributedDataParallel, loss, clip, Adam, EMA. The batch is per process. A count is reported only if the
gradient its processes agree on is that of one process on all their images (dropout masks included). On a CPU the cores
are shared out evenly once, so that one process has as many as each of several. Beside the measured rate stands the one
that benchmarks/communication.py predicts from the all-reduce measured there and the step of one process.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastddpm.diffusion import ProcessConfig, TrainingProcess
from fastddpm.flops import flops_per_image
from fastddpm.unet import UNet, UNetConfig

from .communication import Link, Net, draw_plan, plan, predict
from .record import (
    ROOT,
    Rates,
    append,
    copy_rate,
    environment,
    make_record,
    matmul_rate,
    quantiles,
    read_records,
    results_path,
    synchronize,
)

NETS = {
    "small": UNetConfig(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        dropout=0.1,
    ),
    "cifar10": UNetConfig(dropout=0.1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rounding of one pass in the dtype, against the norm of the gradient.
GATES = {"float32": 1e-4, "bfloat16": 3e-2}
GATE_BATCH = 2
SEED = 1234


def batch_of(config: UNetConfig, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made-up uint8 images [count, C, H, W] of the ordinals first .. first + count - 1, and these."""
    height, width = config.image_size
    ordinals = torch.arange(first, first + count)
    image = torch.randint(256, (config.in_channels, height, width), generator=torch.Generator().manual_seed(0))
    images = (image + 37 * ordinals[:, None, None, None]).to(torch.uint8)
    return images.to(device).contiguous(memory_format=torch.channels_last), ordinals.to(device)


class Step:
    """The trainer's optimiser step on one micro-batch."""

    def __init__(self, config: UNetConfig, dtype: torch.dtype, device: torch.device, processes: int):
        self.net, self.device = UNet(config, seed=SEED).to(device), device
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():  # Ho's layers that begin at zero would hide a wrong gradient of the others
            for weight in self.net.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(device))
        self.net.compute_dtype = dtype if dtype != torch.float32 else None
        self.dtype = dtype
        self.weights: list[Tensor] = list(self.net.parameters())
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.Adam(self.weights, lr=2e-4, fused=True)
        self.process = TrainingProcess(ProcessConfig().noise_schedule(), seed=SEED, flip=True)
        self.model: nn.Module = self.net
        if processes > 1:
            self.model = DistributedDataParallel(self.net, gradient_as_bucket_view=True)

    def backward(self, model: nn.Module, images: Tensor, ordinals: Tensor) -> None:
        """Gradients of the mean loss, into the weights."""
        noised = self.process.noise(images, ordinals, self.dtype)
        with self.net.noise_address(SEED, ordinals):
            prediction = model(noised.x_t, noised.t, return_dict=False)[0]
        _, grad = self.process.loss_and_grad(prediction.detach(), noised, ordinals, images, 1.0 / len(images))
        torch.autograd.backward(prediction, grad)

    def __call__(self, images: Tensor, ordinals: Tensor) -> None:
        self.backward(self.model, images, ordinals)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, list(self.weights), 1e-4)


def gradient_error(step: Step, config: UNetConfig, rank: int, processes: int) -> float:
    """Norm of the difference of the processes' gradient to one process's on all their images, over the norm."""
    step.backward(step.model, *batch_of(config, rank * GATE_BATCH, GATE_BATCH, step.device))
    shared = [weight.grad.detach().clone() for weight in step.weights if weight.grad is not None]
    step.optimizer.zero_grad(set_to_none=True)
    step.backward(step.net, *batch_of(config, 0, processes * GATE_BATCH, step.device))
    alone = [weight.grad.detach().clone() for weight in step.weights if weight.grad is not None]
    step.optimizer.zero_grad(set_to_none=True)
    difference = torch.stack(torch._foreach_norm(torch._foreach_sub(shared, alone))).norm()
    return float(difference / torch.stack(torch._foreach_norm(alone)).norm())


def all_reduce_link(device: torch.device, processes: int, num_bytes: int) -> tuple[float, float]:
    """GB/s (NCCL's busbw) and the latency of a hop in us, as in communication.Link, of this machine's all-reduce."""

    def median_ms(size: int) -> float:
        x = torch.ones(size // 4, device=device)
        samples = []
        for i in range(12):
            dist.barrier()
            synchronize(device.type)
            start = time.perf_counter()
            dist.all_reduce(x)
            synchronize(device.type)
            samples += [(time.perf_counter() - start) * 1e3] if i >= 2 else []
        return float(quantiles(samples)["p50_ms"])

    latency_ms, ms = median_ms(256), median_ms(num_bytes)
    share = 2 * (processes - 1) / processes
    return share * num_bytes / ms / 1e6, latency_ms * 1e3 / (2 * (processes - 1))


def worker(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    """One process of a count; the first one writes what it has seen."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous{processes}",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=120),
        )
    config = NETS[options.net]
    step = Step(config, DTYPES[options.dtype], device, processes)
    num_bytes = 4 * sum(weight.numel() for weight in step.weights)
    found: dict[str, Any] = {"parameters": num_bytes // 4, "error": None}
    if processes > 1:
        found["error"] = gradient_error(step, config, rank, processes)
        bandwidth, latency = all_reduce_link(device, processes, min(num_bytes, 25 << 20))
        found |= {"all_reduce_gb_per_s": bandwidth, "hop_latency_us": latency}
    images, ordinals = batch_of(config, rank * options.batch, options.batch, device)
    samples: list[float] = []
    for i in range(options.warmup + options.steps):
        if processes > 1:
            dist.barrier()
        synchronize(device.type)
        start = time.perf_counter()
        step(images, ordinals + i * processes * options.batch)
        if processes > 1:
            dist.barrier()  # a step has ended when the last process has
        synchronize(device.type)
        samples += [(time.perf_counter() - start) * 1e3] if i >= options.warmup else []
    if device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if rank == 0:
        Path(folder, f"{processes}.json").write_text(json.dumps(found | {"samples_ms": samples}))
    if processes > 1:
        dist.destroy_process_group()


def run(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start the processes and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (processes, folder, options), nprocs=processes)
        found: dict[str, Any] = json.loads(Path(folder, f"{processes}.json").read_text())
    return found


def measure(options: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A record for each number of processes, printed as it comes."""
    config = NETS[options.net]
    rates = Rates(copy_rate(options.device), matmul_rate(options.device, DTYPES[options.dtype]))
    gflop_per_image = 3 * flops_per_image(config) / 1e9
    shape = (options.batch, config.in_channels, *config.image_size)
    records: list[dict[str, Any]] = []
    alone_ms = None
    for processes in options.processes:
        found = run(processes, options)
        timing = quantiles(found.pop("samples_ms"))
        error, num_parameters = found.pop("error"), found.pop("parameters")
        predicted = None
        if processes == 1:
            alone_ms = timing["p50_ms"]
        elif alone_ms is not None:
            net = Net(options.net, num_parameters, options.batch, shape[1:], 1.0, "")
            link = Link("", found["all_reduce_gb_per_s"], found["hop_latency_us"], "")
            predicted = predict(net, processes, link, link, per_machine=processes, compute_ms=alone_ms).images_per_s
        record = make_record(
            "scaling",
            f"{options.net}, batch {options.batch} per process, {options.dtype}",
            f"{processes} process{'es' * (processes > 1)}",
            ours=True,
            correct=error is None or error <= GATES[options.dtype],
            facts=facts,
            rates=rates,
            timing=timing,
            direction="training step",
            dtype=options.dtype,
            shape=shape,
            memory_format="channels_last",
            images=processes * options.batch,
            gflop_per_image=gflop_per_image,
            error=error,
            processes=processes,
            parameters=num_parameters,
            backend={"cuda": "nccl", "cpu": "gloo"}[options.device] if processes > 1 else None,
            threads=options.threads,
            predicted_images_per_s=predicted,
            **found,
        )
        # GFLOP of all processes' images against the matmul rate of as many devices (a CPU is one, shared).
        if record["matmul_share"] and options.device == "cuda":
            record["matmul_share"] /= processes
        records.append(record)
        print(line(record, records[0]), flush=True)
        if not options.no_record and (options.out or not options.quick):
            append(options.out or results_path(facts), record)
    return records


def line(record: dict[str, Any], first: dict[str, Any]) -> str:
    """A record in words."""
    head = f"{record['case']}: {record['impl']:<12}"
    if not record["correct"]:
        return f"{head} WRONG: gradient off by {record['error']:.1e} of its norm"
    words = f"{head}{record['p50_ms']:>9.1f} ms {record['images_per_s']:>9.1f} images/s"
    if record["predicted_images_per_s"]:
        ratio = record["images_per_s"] / first["images_per_s"] if first["images_per_s"] else math.nan
        words += (
            f" {ratio:>6.2f} x {first['impl']}, predicted {record['predicted_images_per_s']:.1f}; all-reduce "
            f"{record['all_reduce_gb_per_s']:.2f} GB/s, {record['hop_latency_us']:.0f} us a hop"
        )
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and predict; 1 if a count's gradient was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", help="counts (default: powers of 2 up to the devices)")
    parser.add_argument("--net", choices=sorted(NETS), help="default: cifar10 on GPUs, small on a CPU")
    parser.add_argument("--batch", type=int, help="images per process and step (default: 128 on GPUs, 16 on a CPU)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 on GPUs, float32 on a CPU")
    parser.add_argument("--steps", type=int, help="timed steps (default: 200 on GPUs, 10 on a CPU)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 steps, kept only where --out says")
    parser.add_argument("--plan", action="store_true", help="measure nothing, only predict")
    parser.add_argument("--picture", type=Path, help="draw the prediction into this PNG (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="file to append to (default: in benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    devices = torch.cuda.device_count() if on_gpu else max(2, min(8, os.cpu_count() or 2))
    options.processes = sorted(options.processes or (2**k for k in range(devices.bit_length()) if 2**k <= devices))
    if options.processes[0] < 1 or (on_gpu and options.processes[-1] > devices):
        parser.error(f"--processes {options.processes}: this machine has {devices} GPUs, at least one is needed")
    options.net = options.net or ("cifar10" if on_gpu else "small")
    options.batch = options.batch or (128 if on_gpu else 16)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.steps = options.steps or (200 if on_gpu else 10)
    if options.quick:
        options.steps, options.warmup, options.processes = 2, 1, options.processes[:2]
    options.threads = max(1, (os.cpu_count() or 1) // options.processes[-1])
    records: list[dict[str, Any]] = []
    if not options.plan:
        records = measure(options, environment(options.device))
    known = read_records(ROOT / "benchmarks" / "results") + records
    if options.plan or on_gpu:
        print(plan(known))
    if options.picture:
        draw_plan(known, options.picture)
    return 0 if all(record["correct"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
