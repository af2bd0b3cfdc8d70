"""For benchmarks/chaos.py: runs of the real command line, watched and compared bit by bit, and the counts they make.

A run that is recorded goes through `child`, which is fastddpm with a witness: for each position of the training
sequence a digest of image, t, flip and x_t, and for each process a digest of its weights, averages and moments at the
end. The witness is also where faults are planted that no file or signal can cause.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .record import ROOT

T = TypeVar("T")

LAUNCHERS = ("trainer", "torchrun", "accelerate")
BATCH = 16
LIMIT_S = 240.0  # for anything that is waited for: a run that stalls is a result, not a reason to stall
# A net of 40,000 parameters with every random stream in use: a step takes 20 to 30 ms, a start 5 s.
OPTIONS: dict[str, Any] = {
    "preset": "digits",
    "steps": 200,
    "batch-size": BATCH,
    "log-every": 1,
    "save-every": 4,
    "sample-every": 0,
    "data.flip": True,
    "data.workers": 0,
    "model.block-out-channels": (8, 16),
    "model.norm-num-groups": 4,
    "model.dropout": 0.2,
    "optim.warmup-steps": 10,
}


ROWS = 600  # images of the made data set: epochs of 37.5 steps, streamed of 37
TOLERANCE = 1e-5


class Stalled(Exception):
    """Something that was waited for did not come."""


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Command-line options: True is a flag, None leaves an option out, a tuple becomes several values."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return words


def surroundings(cache: Path, processes: int = 1) -> dict[str, str]:
    """Environment of a child: this clone's code, one thread, the CPU, no network, data sets prepared in `cache`."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return theirs | ours | ({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {})


class Life:
    """One start of a command, in a session of its own; its words go to a file."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], said: Path, **more: Any) -> None:
        self.said = said
        self.mark = uuid.uuid4().hex
        with said.open("wb") as words, said.with_suffix(".out").open("wb") as printed:
            self.process = subprocess.Popen(
                command,
                env={**environ, "CHAOS_LIFE": self.mark},
                cwd=ROOT,
                stdout=printed,
                stderr=words,
                start_new_session=True,
                **more,
            )

    @property
    def words(self) -> str:
        """What has been written to stderr."""
        return self.said.read_text(errors="replace")

    @property
    def printed(self) -> str:
        """What has been written to stdout."""
        return self.said.with_suffix(".out").read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step reported, -1 before training begins."""
        found = re.findall(r"^(?:step (\d+)/|going on at step (\d+)|training on .* steps (\d+) to)", self.words, re.M)
        return int(next(filter(None, found[-1]))) if found else -1

    def wait_until(self, holds: Callable[[], bool], limit_s: float = LIMIT_S, pause_s: float = 0.002) -> bool:
        """Wait for something; False if the process ended first. Raises Stalled after limit_s."""
        deadline = time.monotonic() + limit_s
        while not holds():
            if self.process.poll() is not None:
                return holds()
            if time.monotonic() > deadline:
                self.end()
                raise Stalled(f"{limit_s:.0f} s without what was waited for; last words: {self.last_words()}")
            time.sleep(pause_s)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Wait until a step has been reported; False if the process ended first."""
        return self.wait_until(lambda: self.step >= step)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """The exit code. Raises Stalled after limit_s, with everything ended."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise Stalled(f"not ended after {limit_s:.0f} s; last words: {self.last_words()}") from None

    def last_words(self) -> str:
        """The end of stderr on one line."""
        lines = [line.strip() for line in self.words.splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line.lower()]
        return " | ".join(errors[:3] or lines[-3:])[-600:] or "none"

    def ranks(self, processes: int) -> list[int]:
        """Process ids of the trainers by rank, once they are all there."""
        found: dict[int, int] = {}

        def complete() -> bool:
            found.clear()
            try:
                for child in psutil.Process(self.process.pid).children():
                    if "RANK" in (environ := child.environ()):
                        found[int(environ["RANK"])] = child.pid
            except psutil.Error:
                return False
            return len(found) == processes

        if not self.wait_until(complete, 60.0, 0.05):
            raise Stalled(f"the launcher ended without {processes} processes; last words: {self.last_words()}")
        return [found[rank] for rank in range(processes)]

    def members(self) -> list[int]:
        """Ids of all its processes, found by their environment: torchrun gives each trainer a session of its own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("CHAOS_LIFE") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return sorted(found, key=lambda pid: pid != self.process.pid)

    def send(self, number: signal.Signals) -> None:
        """A signal to all its processes, the launcher first."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """SIGKILL for whatever is left."""
        while self.members():
            self.send(signal.SIGKILL)
        self.process.wait()


@dataclass
class Run:
    """A run folder and the command that starts it, the same each time; options are changes to OPTIONS."""

    folder: Path
    cache: Path
    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    launcher: str | None = None
    """One of LAUNCHERS; by default the trainer alone, and torchrun for several processes."""
    orders: dict[str, Any] | None = field(default_factory=dict)
    """Of the witness (see `child`); None starts fastddpm as users do."""
    lives: int = 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int({**OPTIONS, **self.options}["steps"])

    def beside(self, name: str) -> Path:
        """A file or folder that belongs to the run but is not in its folder."""
        return self.folder.with_name(f"{self.folder.name}-{name}")

    def command(self) -> list[str]:
        """The command line."""
        words = ["train", *arguments({**OPTIONS, "run": str(self.folder), **self.options})]
        launcher = self.launcher or ("trainer" if self.processes == 1 else "torchrun")
        module = [] if self.orders is not None else ["-m", "fastddpm"]
        if self.orders is not None:
            script = self.beside("witness.py")
            script.write_text(
                f"import os\nos.environ['CHAOS_ORDERS'] = {json.dumps(self._orders())!r}\n"
                "from benchmarks.chaos_runs import child\n"
                "if __name__ == '__main__':\n    raise SystemExit(child())\n"
            )
            module = [str(script)]
        if launcher == "accelerate":
            return [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *module, *words]
        if launcher == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            return [*torchrun, str(self.processes), *module, "--", *words]
        return [sys.executable, *module, *words]

    def _orders(self) -> dict[str, Any]:
        folder = self.beside("witness")
        folder.mkdir(parents=True, exist_ok=True)
        return {"folder": str(folder), **(self.orders or {})}

    def start(self, environ: Mapping[str, str] | None = None, **more: Any) -> Life:
        """Start it once; `more` goes to Popen."""
        self.lives += 1
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        said = self.beside(f"life{self.lives}.err")
        return Life(self.command(), {**surroundings(self.cache, self.processes), **(environ or {})}, said, **more)

    def complete(self, limit_s: float = LIMIT_S) -> Run:
        """Start it and let it end. Raises Stalled if it does not end well."""
        life = self.start()
        code = life.wait(limit_s)
        life.end()
        if code:
            raise Stalled(f"exit {code}: {life.last_words()}")
        return self

    def log(self) -> list[dict[str, Any]]:
        """RUN/log.jsonl."""
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def status(self) -> dict[str, Any]:
        """RUN/status.json, empty if there is none."""
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def is_saving(self) -> bool:
        """Whether a checkpoint is half written at this moment."""
        try:
            return any(name.startswith(".writing-") for name in os.listdir(self.folder / "checkpoints"))
        except OSError:
            return False

    def tensors(self) -> dict[str, str]:
        """Digests of model, EMA and optimiser in the last checkpoint."""
        last = self.checkpoints()[-1:]
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for c in last for p in c.glob("*.safetensors")}

    def samples(self) -> dict[int, set[str]]:
        """Digests of image, t, flip and x_t seen at each position, by all processes in all lives of the run."""
        seen: dict[int, set[str]] = {}
        for path in sorted(self.beside("witness").glob("samples-*")):
            for line in path.read_text().split("\n")[:-1]:  # a kill may have torn the last one
                for position, digest in json.loads(line):
                    seen.setdefault(position, set()).add(digest)
        return seen


def unequal(run: Run, reference: Run, tolerance: float = 0.0, every: int = 1) -> list[str]:
    """In what a run differs from its reference, empty if in nothing.

    Samples at every position, and which positions; the log's rows (each step that is a multiple of `every` once); with
    tolerance 0 the last checkpoint's tensors bit by bit, else loss and gradient norm within that relative distance.
    """
    found = []
    ours, theirs = run.samples(), reference.samples()
    if run.orders is None:  # started without a witness
        ours = theirs
    if len(theirs) != reference.steps * BATCH:
        found.append(f"the reference saw {len(theirs)} positions, not {reference.steps * BATCH}")
    if several := [p for p, digests in ours.items() if len(digests) > 1]:
        found.append(f"{len(several)} positions gave another sample when they were read again (first: {min(several)})")
    if other := [p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p)]:
        found.append(f"{len(other)} of {len(theirs)} positions are other samples (first: {min(other)})")
    log = run.log()
    wanted = [r for r in reference.log() if r["step"] % every == 0]
    if [r["step"] for r in log] != [r["step"] for r in wanted]:
        found.append(f"the log has {len(log)} rows where the reference has {len(wanted)}, or in another order")
    for name in ("loss", "grad_norm", "lr"):
        apart = [
            (r["step"], r[name], w[name])
            for r, w in zip(log, wanted, strict=False)
            if not _near(r[name], w[name], 0.0 if name == "lr" else tolerance)
        ]
        if apart:
            step, mine, right = apart[0]
            found.append(f"{name} differs in {len(apart)} rows, first at step {step}: {mine!r}, not {right!r}")
    if tolerance == 0.0:
        a, b = run.tensors(), reference.tensors()
        if not b:
            found.append("the reference has no checkpoint")
        found += [
            f"{name} is not the reference's bytes" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)
        ]
    if left := [p.name for p in (run.folder / "checkpoints").glob(".*")]:
        found.append(f"left behind: {', '.join(left)}")
    return found


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= tolerance * abs(b)


def largest_distance(run: Run, reference: Run) -> float:
    """The largest relative difference of loss or gradient norm over the log."""
    pairs = zip(run.log(), reference.log(), strict=False)
    return max(abs(r[n] - w[n]) / abs(w[n]) for r, w in pairs for n in ("loss", "grad_norm"))


@dataclass
class Count:
    """One line of the table: what was done, and how many of how many came out right."""

    case: str
    what: str
    right: int = 0
    of: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What went wrong, a line each."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Full, and not of nothing."""
        return self.of > 0 and self.right == self.of and not self.wrong

    def add(self, faults: Sequence[str] | bool, what: str = "") -> bool:
        """One more: right if `faults` is empty (or True); `what` names it where it is not."""
        found = [] if faults is True else ["it does not hold"] if faults is False else list(faults)
        self.of += 1
        self.right += not found
        self.wrong += [f"{what}: {fault}" if what else fault for fault in found]
        for fault in found:
            say(f"  {self.case}: WRONG: {what}: {fault}")
        return not found


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


class Session:
    """What the rows of one call share: a folder, its data set and caches, and the counts."""

    def __init__(self, folder: Path, quick: bool = False, seed: int = 0) -> None:
        self.folder, self.quick, self.seed = folder, quick, seed
        self.cache = folder / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.counts: list[Count] = []
        self._names = 0
        self._lock = threading.Lock()

    def number(self, full: int, quick: int) -> int:
        """A repetition count."""
        return quick if self.quick else full

    @contextlib.contextmanager
    def count(self, case: str, what: str) -> Iterator[Count]:
        """A line of the table; whatever is raised inside counts as wrong."""
        count, begin = Count(case, what), time.monotonic()
        with self._lock:
            self.counts.append(count)
        try:
            yield count
        except Exception as error:
            if not isinstance(error, Stalled):
                traceback.print_exc()
            count.add([f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"], "ended early")
        count.seconds = time.monotonic() - begin
        say(f"{case}: {count.what}: {count.right} of {count.of}, {count.seconds:.0f} s")

    def folder_of(self, name: str) -> Path:
        """A new folder."""
        with self._lock:
            self._names += 1
            path = self.folder / f"{self._names:03d}-{name}"
        path.mkdir(parents=True)
        return path

    def run(self, name: str, **more: Any) -> Run:
        """A run of its own; options, processes, launcher and orders as Run has them."""
        return Run(self.folder_of(name) / "run", self.cache, **more)

    def side_by_side(self, action: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
        """Results of the calls, two at a time; the first error is raised when all have ended."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(action, *call) for call in calls]
        return [future.result() for future in futures]

    def parquet(self) -> str:
        """The source of ROWS digits in three files of small row groups."""
        folder = self.folder / "digits"
        with self._lock:
            if not folder.exists():
                write_digits(folder)
        return f"parquet:{folder}"


def write_digits(folder: Path, files: Sequence[int] = (250, 250, 100), group: int = 40) -> None:
    """The first digits of scikit-learn as parquet files of so many rows, in row groups of `group` rows."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    folder.mkdir(parents=True)
    start = 0
    for number, rows in enumerate(files):
        chosen = range(start, start + rows)
        write_parquet(
            folder / f"train-{number:05d}-of-{len(files):05d}.parquet",
            [{"bytes": encode(Image.fromarray(pixels[i])), "path": f"{i}.png"} for i in chosen],
            [int(digits.target[i]) for i in chosen],
            group,
        )
        start += rows


def encode(image: Image.Image, form: str = "PNG", **more: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def write_parquet(path: Path, images: Sequence[Any], labels: Sequence[int], group: int = 1000) -> None:
    """A file with columns image and label, as datasets writes them; labels may lie outside the ten classes."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )
    schema = features.arrow_schema
    table = pa.table(
        {"image": pa.array(images, schema.field("image").type), "label": pa.array(labels, pa.int64())}, schema
    )
    pq.write_table(table, path, row_group_size=group)


def faults_of(action: Callable[..., list[str]], *args: Any) -> list[str]:
    """What the action finds wrong; whatever it raises is wrong too."""
    try:
        return action(*args)
    except Exception as error:
        if not isinstance(error, Stalled):
            traceback.print_exc()
        return [f"{type(error).__name__}: {error}"]


def child() -> int:
    """fastddpm with a witness; the process's exit code.

    CHAOS_ORDERS is a JSON table: folder (of the witness), nan ({"rank", "steps"}: the gradient of these steps, counted
    from 0, becomes NaN on that rank), bytes (true: count what is sent for gradients).
    """
    orders = json.loads(os.environ["CHAOS_ORDERS"])
    folder, rank = Path(orders["folder"]), int(os.environ.get("RANK", "0"))
    _record_samples(folder / f"samples-{rank}-{os.getpid()}")
    _record_state(folder / f"state-{rank}")
    if "nan" in orders and orders["nan"]["rank"] == rank:
        _plant_nan(set(orders["nan"]["steps"]))
    if orders.get("bytes"):
        _count_bytes(folder / f"bytes-{rank}")
    from fastddpm.__main__ import main

    return main()


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(plain, arguments by name, args, kwargs)` in a method's place."""
    plain = getattr(owner, name)
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return around(plain, bound.arguments, args, kwargs)

    setattr(owner, name, wrapped)


def _record_samples(path: Path) -> None:
    from fastddpm.diffusion import TrainingProcess

    file = path.open("ab", buffering=0)

    def around(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        noised = plain(*args, **kwargs)
        images = named["x_0"].permute(0, 2, 3, 1).contiguous()
        rows = []
        for i, position in enumerate(named["ordinals"].tolist()):
            digest = hashlib.blake2b(images[i].numpy().tobytes(), digest_size=8)
            digest.update(f"{int(noised.t[i])} {bool(noised.flip[i])}".encode())
            digest.update(noised.x_t[i].detach().contiguous().numpy().tobytes())
            rows.append((position, digest.hexdigest()))
        file.write(json.dumps(rows).encode() + b"\n")
        return noised

    _wrap(TrainingProcess, "noise", around)


def _record_state(path: Path) -> None:

    from fastddpm.trainer import Trainer

    def around(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        outcome = plain(*args, **kwargs)
        trainer = named["self"]
        moments = [m for line in trainer.train_step.lines for m in trainer.optimizer.state.get(line, {}).values()]
        tensors = [*trainer.weights, *trainer.averages, *moments]
        tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # its own shard
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
        finite = all(bool(tensor.detach().isfinite().all()) for tensor in tensors)
        path.write_text(json.dumps({"digest": digest.hexdigest(), "finite": finite}))
        return outcome

    _wrap(Trainer, "train", around)


def _plant_nan(steps: set[int]) -> None:
    from fastddpm.diffusion import TrainingProcess

    def around(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        losses, grad = plain(*args, **kwargs)
        return losses, grad * float("nan") if int(named["ordinals"][0]) // BATCH in steps else grad

    _wrap(TrainingProcess, "loss_and_grad", around)


def _count_bytes(path: Path) -> None:
    """A line for each micro-batch: is it a step's last, bytes of gradients, bytes of all else since the one before."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from fastddpm.step import TrainStep

    sent = {"gradients": 0, "others": 0}
    file = path.open("ab", buffering=0)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and ours are strings
        sent["gradients"] += bucket.buffer().nbytes
        sent["others"] -= bucket.buffer().nbytes  # it goes through all_reduce, which is counted below
        return allreduce_hook(state, bucket)

    def prepared(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> None:
        plain(*args, **kwargs)
        model = named["self"].model
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, hook)

    def micro_batch(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        losses = plain(*args, **kwargs)
        file.write(json.dumps({"last": named["last"], **sent}).encode() + b"\n")
        sent.update(gradients=0, others=0)
        return losses

    def small(plain: Callable[..., Any], named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        tensor = next((v for v in named.values() if hasattr(v, "nbytes")), None)
        sent["others"] += tensor.nbytes if tensor is not None else 0
        return plain(*args, **kwargs)

    _wrap(TrainStep, "__init__", prepared)
    _wrap(TrainStep, "accumulate", micro_batch)
    for name in ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce"):
        _wrap(dist, name, small)
