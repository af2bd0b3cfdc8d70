"""Is a run exact and unbreakable? Kills it, stops it, damages its files and feeds it bad data, and counts.

    python -m benchmarks.chaos                        # every row; at most 80 minutes on 2 cores
    python -m benchmarks.chaos --case kill --case save
    python -m benchmarks.chaos --quick                # few repetitions of each, for tests

Everything runs on the CPU (several processes over gloo), mostly through the real command line (chaos_runs.py). A row
passes if all of its counts are full; one that falls short fails the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .chaos_cases import elastic, hang, kill, launch, numerics, quiet, signals
from .chaos_files import data, plan, save
from .chaos_runs import Count, Session, say
from .record import append, environment, results_path

CASES: dict[str, Callable[[Session], None]] = {
    "plan": plan,
    "kill": kill,
    "elastic": elastic,
    "quiet": quiet,
    "save": save,
    "signals": signals,
    "numerics": numerics,
    "data": data,
    "launch": launch,
    "hang": hang,
}


def table(counts: Sequence[Count]) -> str:
    """All lines, in columns."""
    lines = [f"{'row':<9}{'right':>7} {'of':>4}{'s':>7}  {'':<5} what"]
    for count in counts:
        verdict = "pass" if count.passed else "FAIL"
        lines.append(f"{count.case:<9}{count.right:>7} {count.of:>4}{count.seconds:>7.0f}  {verdict:<5} {count.what}")
        lines += [f"{'':<34} - {fault[:400]}" for fault in count.wrong[:8]]
    passed = sum(count.passed for count in counts)
    return "\n".join([*lines, f"{passed} of {len(counts)} lines pass, {sum(c.seconds for c in counts):.0f} s of work"])


def main(arguments_: Sequence[str] | None = None) -> int:
    """Run the rows; 1 if one falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="run this row only (repeatable)")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--quick", action="store_true", help="few repetitions, kept only where --out says")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave the runs in this folder (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="file to append to (default: in benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments_)
    if options.list:
        for name, case in CASES.items():
            print(f"{name:<9} {(case.__doc__ or '').splitlines()[0]}")
        return 0
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        session = Session(folder.resolve(), options.quick, options.seed)
        begin = time.monotonic()
        for name in options.case or CASES:
            say(f"{name}: {CASES[name].__doc__}")
            try:
                CASES[name](session)
            except Exception as error:
                traceback.print_exc()
                whole = Count(name, "the row as a whole")
                whole.add([f"{type(error).__name__}: {error}"], "ended early")
                session.counts.append(whole)
        print(table(session.counts))
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    if not options.no_record and (options.out or not options.quick):
        facts = environment("cpu")
        for count in session.counts:
            line = {"workload": "chaos", "correct": count.passed, "seed": options.seed, **asdict(count), **facts}
            append(options.out or results_path(facts), line)
    return 0 if session.counts and all(count.passed for count in session.counts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
