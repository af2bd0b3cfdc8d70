"""What data-parallel training on n GPUs is predicted to do: a model of its communication, with every constant named.

Gradients are summed in buckets, each as soon as the backward pass has made it (torch's DistributedDataParallel); g GPUs
on each of m machines:

    bucket k of K is ready at k/K of the backward; the link takes one at a time; what outlasts the backward is exposed
    all-reduce of S bytes = 2 (g-1)/g S / B_inside + 2 (m-1)/m S/g / B_between + 2 (g-1) hops inside, 2 log2 m between
    step = compute + exposed;  images/s = n batch / step

(Ring reduce-scatter and all-gather inside a machine, a tree between machines, Thakur et al. 2005; B is NCCL's busbw.)
Not modelled: stragglers, multiprocessors that NCCL takes from the backward, congestion, reading data. The batch per GPU
is fixed: a step has n times the images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GRADIENT_BYTES = 4
"""Of a parameter: fp32, as the trainer sums them."""
BUCKET_BYTES = 25 << 20
"""torch's DistributedDataParallel default."""
BACKWARD_SHARE = 0.6
"""Of a step's compute, the backward pass, which can hide communication (assumed: 2/3, less optimiser and EMA)."""
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
PER_MACHINE = 8


@dataclass(frozen=True)
class Link:
    """What a GPU gets of a link in an all-reduce."""

    name: str
    gb_per_s: float
    latency_us: float
    """Of one hop."""
    source: str


NVLINK = Link("NVLink inside a machine", 360.0, 3.0, "assumed: 80 % of NVLink 4's 450 GB/s per direction")
INFINIBAND = Link("InfiniBand, 400 Gb/s per GPU", 40.0, 10.0, "assumed: 80 % of 50 GB/s")
ETHERNET = Link("Ethernet, 100 Gb/s per machine of 8", 1.25, 30.0, "assumed: 80 % of 12.5 GB/s, over 8 GPUs")


@dataclass(frozen=True)
class Net:
    """What is trained on each GPU."""

    name: str
    parameters: float
    batch: int
    """Images per GPU and step."""
    image_shape: tuple[int, int, int]
    images_per_s: float
    """Of one GPU."""
    source: str

    @property
    def image_bytes(self) -> int:
        """Of a uint8 image."""
        return math.prod(self.image_shape)


NETS = (
    Net("35.7M parameters, 32x32", 35_746_307, 128, (3, 32, 32), 9100.0, "predicted for an H200, not measured"),
    Net("300M parameters, 64x64", 300e6, 32, (3, 64, 64), 557.0, "predicted for an H200 (296M), not measured"),
)


@dataclass(frozen=True)
class Row:
    """The prediction for a number of GPUs."""

    gpus: int
    sent_bytes: float
    """Per GPU and step: 2 (n-1)/n of the gradient."""
    all_reduce_ms: float
    exposed_ms: float
    step_ms: float
    images_per_s: float
    efficiency: float
    """Of n times one GPU."""
    data_bytes_per_s: float
    """uint8 images that a machine must be fed with."""

    @property
    def hidden(self) -> float:
        """Share of the communication behind the backward pass."""
        return 1.0 - self.exposed_ms / self.all_reduce_ms if self.all_reduce_ms else 1.0


def all_reduce_ms(num_bytes: float, gpus: int, inside: Link, between: Link, per_machine: int = PER_MACHINE) -> float:
    """Milliseconds of one all-reduce; see the module's formula. A last machine that is not full counts as one."""
    local, machines = min(gpus, per_machine), math.ceil(gpus / per_machine)
    ms = 2 * (local - 1) / local * num_bytes / inside.gb_per_s / 1e6 + 2 * (local - 1) * inside.latency_us / 1e3
    if machines > 1:
        ms += 2 * (machines - 1) / machines * num_bytes / local / between.gb_per_s / 1e6
        ms += 2 * math.ceil(math.log2(machines)) * between.latency_us / 1e3
    return ms


def exposed_ms(backward_ms: float, bucket_ms: float, num_buckets: int) -> float:
    """Milliseconds of communication after the backward pass has ended."""
    done = 0.0
    for k in range(1, num_buckets + 1):
        done = max(done, backward_ms * k / num_buckets) + bucket_ms
    return done - backward_ms


def predict(
    net: Net, gpus: int, inside: Link, between: Link, *, per_machine: int = PER_MACHINE, compute_ms: float | None = None
) -> Row:
    """The prediction; compute_ms: of a step without communication, in place of net.batch / net.images_per_s."""
    compute_ms = compute_ms or net.batch / net.images_per_s * 1e3
    num_bytes = net.parameters * GRADIENT_BYTES
    num_buckets = math.ceil(num_bytes / BUCKET_BYTES)
    bucket_ms = all_reduce_ms(num_bytes / num_buckets, gpus, inside, between, per_machine)
    exposed = exposed_ms(BACKWARD_SHARE * compute_ms, bucket_ms, num_buckets) if gpus > 1 else 0.0
    step_ms = compute_ms + exposed
    images_per_s = gpus * net.batch / step_ms * 1e3
    return Row(
        gpus=gpus,
        sent_bytes=2 * (gpus - 1) / gpus * num_bytes,
        all_reduce_ms=num_buckets * bucket_ms,
        exposed_ms=exposed,
        step_ms=step_ms,
        images_per_s=images_per_s,
        efficiency=compute_ms / step_ms,
        data_bytes_per_s=images_per_s * net.image_bytes / math.ceil(gpus / per_machine),
    )


def with_measured(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[Net, ...], Link]:
    """NETS and NVLINK with the newest measurements on GPUs in place of what is assumed, where there are any.

    A net's rate comes from our fastest correct train_step record of its batch shape, the link from the all-reduce of a
    scaling record of one machine.
    """
    on_gpus = [
        r for r in sorted(records, key=lambda r: r["utc"]) if r.get("device_type") == "cuda" and r.get("correct")
    ]
    nets = []
    for net in NETS:
        shape = [net.batch, *net.image_shape]
        runs = [r for r in on_gpus if r["workload"] == "train_step" and r["ours"] and r["shape"] == shape]
        runs = [r for r in runs if r["images_per_s"] and r["utc"] == runs[-1]["utc"]]
        if runs:
            best = max(runs, key=lambda r: r["images_per_s"])
            source = f"measured: {best['impl']}, {best['device']}, {best['utc'][:10]}"
            net = replace(net, images_per_s=best["images_per_s"], source=source)
        nets.append(net)
    links = [r for r in on_gpus if r["workload"] == "scaling" and r.get("all_reduce_gb_per_s")]
    if not links:
        return tuple(nets), NVLINK
    last = links[-1]
    return tuple(nets), Link(
        NVLINK.name,
        last["all_reduce_gb_per_s"],
        last["hop_latency_us"],
        f"measured: {last['processes']} x {last['device']}, {last['utc'][:10]}",
    )


def plan(records: Sequence[Mapping[str, Any]]) -> str:
    """The predictions up to 1024 GPUs and their constants, as Markdown."""
    nets, inside = with_measured(records)
    constants = [
        *((f"one GPU, {net.name}, batch {net.batch}", f"{net.images_per_s:,.0f} images/s", net.source) for net in nets),
        *(
            (link.name, f"{link.gb_per_s:g} GB/s, {link.latency_us:g} us a hop", link.source)
            for link in (inside, INFINIBAND, ETHERNET)
        ),
        ("gradient", f"{GRADIENT_BYTES} bytes a parameter, buckets of {BUCKET_BYTES >> 20} MiB", "the trainer's"),
        ("backward pass", f"{BACKWARD_SHARE:.0%} of a step's compute", "assumed"),
        ("machine", f"{PER_MACHINE} GPUs", "assumed"),
    ]
    lines = ["| Constant | Value | Source |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in constants), ""]
    lines.append(
        "Predictions, not measurements. Sent: per GPU and step. Hidden: share of the communication behind the backward "
        "pass. Data: uint8 images a machine must be fed with."
    )
    head = "GPUs | sent, MB | all-reduce, ms | hidden | step, ms | images/s | efficiency | data, MB/s"
    for net in nets:
        for between in (INFINIBAND, ETHERNET):
            lines += ["", f"{net.name}, batch {net.batch} per GPU, {between.name}:", "", f"| {head} |"]
            lines.append("|" + "---|" * (head.count("|") + 1))
            for row in (predict(net, gpus, inside, between) for gpus in GPUS):
                lines.append(
                    f"| {row.gpus} | {row.sent_bytes / 1e6:,.0f} | {row.all_reduce_ms:.2f} | {row.hidden:.0%} | "
                    f"{row.step_ms:.2f} | {row.images_per_s:,.0f} | {row.efficiency:.0%} | "
                    f"{row.data_bytes_per_s / 1e6:,.0f} |"
                )
    return "\n".join(lines)


def draw_plan(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A picture of the predictions: efficiency against the number of GPUs. Needs matplotlib."""
    from matplotlib.figure import Figure

    nets, inside = with_measured(records)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, net in zip(("tab:blue", "tab:orange"), nets, strict=True):
        for style, between in (("-", INFINIBAND), (":", ETHERNET)):
            efficiencies = [100 * predict(net, gpus, inside, between).efficiency for gpus in GPUS]
            label = f"{net.name}; {between.name}"
            axes.plot(GPUS, efficiencies, style, marker=".", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set(ylim=(0, 105), xlabel="GPUs, 8 to a machine", ylabel="% of n times one GPU")
    axes.set_title("Predicted by the model of communication, not measured", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
