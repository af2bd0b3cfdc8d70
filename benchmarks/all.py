"""The tests that need a GPU and a selection of the benchmarks in one go, for a machine that is there for ten minutes.

    PYTHONPATH=.:kernels python -m benchmarks.all --minutes 8 --out DIR

Nothing needs to be installed but torch, triton, accelerate and einops. Each part is a process with a time limit of its
own: its share of the time that is left, so that what one does not use goes to the next. A part whose packages are
missing says so and is skipped. DIR gets a log and a .jsonl of each part as they come, summary.json, and the report.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .kernels import RIVALS
from .record import ROOT, append, environment

MISSING = re.compile(r"No module named '?([\w.]+)")
OWN = ("benchmarks", "fastddpm", "fastddpm_kernels", "tests")


@dataclass(frozen=True)
class Part:
    """A child process and its share of the time."""

    name: str
    command: tuple[str, ...]
    """Of python; {out} is the part's .jsonl, {folder} the folder of all, {minutes} nine tenths of its limit."""
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended: state is ok, failed (exit N), out of time, or skipped (and why)."""

    part: str
    state: str
    seconds: float
    records: int


def parts(quick: bool) -> list[Part]:
    """In the order of what is wanted most."""
    tests = sorted(p for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    more = ("--quick", "--out", "{out}") if quick else ("--out", "{out}")
    timed = more if quick else ("--minutes", "{minutes}", *more)
    kernels = ("-m", "benchmarks.kernels", *more)
    few = ("--repetitions", "10", "--sample-ms", "2", "--ops")
    norms, others = "group_norm_silu", sorted(set(RIVALS) - {"group_norm_silu"})
    return [
        *(Part(p.stem, ("-m", "pytest", "-v", "-m", "gpu", f"tests/{p.name}"), 1.5) for p in tests),
        Part("train_step", ("-m", "benchmarks.train_step", *timed), 4),
        Part("kernels", kernels if quick else (*kernels, *few, norms), 3),
        Part("sampling", ("-m", "benchmarks.sampling", *timed), 2),
        Part("scaling", ("-m", "benchmarks.scaling", *more), 1),
        *([] if quick else [Part("kernels-graph", (*kernels, "--graph", *few, *others), 2)]),
        Part("report", ("-m", "benchmarks.report", "--results", "{folder}"), 0.3),
    ]


def run(part: Part, folder: Path, limit: float) -> Outcome:
    """Run a part for at most `limit` seconds; its output goes to the screen and to a log, line by line."""
    out = folder / f"{part.name}.jsonl"
    out.unlink(missing_ok=True)
    values = {"{out}": str(out), "{folder}": str(folder), "{minutes}": f"{0.9 * limit / 60:.2f}"}
    command = [sys.executable, *(values.get(word, word) for word in part.command)]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    start, late, words = time.monotonic(), threading.Event(), ""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a late part takes its own children along
    )

    def end() -> None:
        late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        assert child.stdout is not None
        with (folder / f"{part.name}.log").open("w") as log:
            for line in child.stdout:
                words += line
                print(f"  {line}", end="", flush=True)
                log.write(line)
                log.flush()
        code = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    missing = [name for name in MISSING.findall(words) if name.split(".")[0] not in OWN]
    state = "ok" if code == 0 else f"failed (exit {code})"
    if late.is_set():
        state = f"out of time after {limit:.0f} s"
    elif code and missing:
        state = f"skipped: {missing[-1]} is missing"
    return Outcome(part.name, state, round(time.monotonic() - start, 1), lines_of(out))


def lines_of(path: Path) -> int:
    """Whole lines of a file; a part that was killed while it wrote leaves half a one, which is cut off."""
    if not path.exists():
        return 0
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return whole.count("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if one failed (one that is skipped or out of time has not)."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of every part (always on a CPU)")
    names = [part.name for part in parts(quick=False)]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    options = parser.parse_args(arguments)
    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment("cuda" if on_gpu else "cpu")
    append(folder / "machine.log", facts)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, python {facts['python']}", flush=True)

    chosen = [part for part in parts(options.quick or not on_gpu) if part.name in options.parts]
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    for i, part in enumerate(chosen):
        left = end - time.monotonic()
        limit = left * part.share / sum(p.share for p in chosen[i:])
        if limit < 1:
            outcomes.append(Outcome(part.name, "skipped: no time is left", 0.0, 0))
        else:
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            outcomes.append(run(part, folder, limit))
        (folder / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    print(f"\n{'part':<24}{'seconds':>8}{'records':>9}  state")
    for o in outcomes:
        print(f"{o.part:<24}{o.seconds:>8.1f}{o.records:>9}  {o.state}")
    print(f"everything is in {folder}")
    return int(any(outcome.state.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
