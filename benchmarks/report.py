"""Tables (README.md) and pictures of benchmarks/results from the records that lie there.

    python -m benchmarks.report
    python -m benchmarks.report --results DIR        # of another machine

Of each case the newest run counts. Ours is compared with the fastest rival of the same run; what lost is shown as lost,
what was wrong as wrong, without a time and in no picture, and what was never run is listed. The same records give the
same bytes.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .communication import draw_plan, plan
from .record import ROOT, read_records, slug

Record = Mapping[str, Any]
WORKLOADS = {
    "train_step": "Training step",
    "sampling": "Sampling",
    "kernels": "Kernels",
    "scaling": "Scaling over processes",
    "digits": "Digits",
    "chaos": "Chaos",
}
KINDS = {"cuda": "GPU", "cpu": "CPU"}
END_TO_END = ("train_step", "sampling")


@dataclass(frozen=True)
class Case:
    """The newest run of a case on a device."""

    name: str
    records: tuple[Record, ...]

    @property
    def ours(self) -> Record | None:
        """Our fastest correct implementation."""
        return fastest(r for r in self.records if r["ours"])

    @property
    def rival(self) -> Record | None:
        """The baseline: the fastest correct one that is not ours."""
        return fastest(r for r in self.records if not r["ours"])

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the baseline we are; below 1 we lost. None without one of the two."""
        ours, rival = self.ours, self.rival
        return rival["p50_ms"] / ours["p50_ms"] if ours and rival else None


def fastest(records: Iterable[Record]) -> Record | None:
    """The least median among the correct ones that were timed."""
    return min((r for r in records if r["correct"] and r["p50_ms"]), key=lambda r: r["p50_ms"], default=None)


def cases(records: Sequence[Record], workload: str, device: str) -> list[Case]:
    """The newest run of each case, in the order in which the cases were first run."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["workload"] == workload and record["device"] == device:
            found.setdefault(record["case"], []).append(record)
    newest = {name: max(r["utc"] for r in rows) for name, rows in found.items()}
    return [Case(name, tuple(r for r in rows if r["utc"] == newest[name])) for name, rows in found.items()]


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; head: column names with | between them."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return [*lines, ""]


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def comparison(found: Sequence[Case]) -> list[str]:
    """A row for each case: ours against its baseline."""
    rows = []
    for case in found:
        ours, rival, ratio = case.ours, case.rival, case.ratio
        verdict = "-" if ratio is None else f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x, lost**"
        if ours is None:
            verdict = "**ours is wrong**" if any(r["ours"] for r in case.records) else "ours: never run"
        elif rival is None:
            verdict = "no rival was run"
        share = "-"
        if ours is not None:
            of_matmul = number(ours["matmul_share"], ".1%", " of matmul")
            share = number(ours["copy_share"], ".0%", " of copy") if ours["copy_share"] else of_matmul
        mine = (ours["impl"], number(ours["p50_ms"], ",.3f"), share) if ours else ("-", "-", "-")
        theirs = (rival["impl"], number(rival["p50_ms"], ",.3f")) if rival else ("-", "-")
        rows.append((case.name, *mine, *theirs, verdict))
    return table("case | ours | ms | share | best rival | ms | ratio", rows)


def everything(found: Sequence[Case]) -> list[str]:
    """A row for each implementation."""
    rows = []
    for case in found:
        for r in sorted(case.records, key=lambda r: (not r["correct"], r["p50_ms"] or 0.0)):
            name = f"**{r['impl']}**" if r["ours"] else r["impl"]
            if not r["correct"]:
                rows.append((case.name, name, f"wrong: error {number(r['error'], '.1e')}", *"-----"))
                continue
            memory = r["peak_memory_bytes"]
            rows.append(
                (
                    case.name,
                    name,
                    f"{number(r['p50_ms'], ',.2f')} ({number(r['p20_ms'], ',.2f')} to {number(r['p80_ms'], ',.2f')})",
                    str(r["repetitions"]),
                    number(r["images_per_s"], ",.3g"),
                    number(r["gflop_per_image"], ",.2f"),
                    number(r["matmul_share"], ".1%"),
                    number(memory and memory / 2**20, ",.0f"),
                )
            )
    return table("case | implementation | ms (p20 to p80) | n | images/s | GFLOP/image | of matmul | peak, MiB", rows)


def scaling(found: Sequence[Case]) -> list[str]:
    """A row for each number of processes."""
    rows = []
    for case in found:
        one = next((r["images_per_s"] for r in case.records if r["processes"] == 1), None)
        for r in case.records:
            rate = r["images_per_s"]
            rows.append(
                (
                    case.name,
                    str(r["processes"]),
                    number(rate, ",.1f") if r["correct"] else "**wrong**",
                    number(rate / r["processes"] / one if one and rate else None, ".0%"),
                    number(r["predicted_images_per_s"] if rate else None, ",.1f"),
                    number(r.get("all_reduce_gb_per_s"), ".2f"),
                )
            )
    return table("case | processes | images/s | efficiency | predicted images/s | all-reduce, GB/s", rows)


def digits(records: Sequence[Record]) -> list[str]:
    """A row for each training seed of the newest run."""
    newest = max(r["utc"] for r in records)
    rows = [
        (str(r["seed"]), f"{r['train_seconds']:.0f}", f"{r['plain']:.1%}", str(min(r["classes"])))
        for r in records
        if r["utc"] == newest
    ]
    return table("seed | training, s | plainly a digit | fewest of a class", rows)


def chaos(records: Sequence[Record]) -> list[str]:
    """A row for each count; of each case the newest run."""
    newest = {r["case"]: max(q["utc"] for q in records if q["case"] == r["case"]) for r in records}
    rows = [
        (r["case"], r["what"], f"{r['right']} of {r['of']}", f"{r['seconds']:.0f}", "" if r["correct"] else "**FAIL**")
        for r in records
        if r["utc"] == newest[r["case"]]
    ]
    return table("row | what | right | s | ", rows)


# Workloads whose records are counts and not times, and what writes their tables.
COUNTS: dict[str, Callable[[Sequence[Record]], list[str]]] = {"digits": digits, "chaos": chaos}


def never_run(records: Sequence[Record]) -> list[str]:
    """What has no record: whole kinds of devices, and workloads of the others."""
    lines = []
    for kind, label in KINDS.items():
        seen = {r["workload"] for r in records if kind_of(r) == kind}
        if not seen:
            lines.append(f"{label} rows: never run")
        else:
            lines += [
                f"{label}, {title.lower()}: never run"
                for name, title in WORKLOADS.items()
                if name not in seen | {"chaos"}
            ]
    return lines


def kind_of(record: Record) -> str:
    """cuda or cpu; records from before the field existed have a driver on GPUs only."""
    return str(record.get("device_type") or ("cuda" if record["driver"] else "cpu"))


def tables(records: Sequence[Record]) -> str:
    """The README of the results."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the records beside it. Of each case the newest run; times are",
        "medians. The rival is the fastest correct one of the same run; a ratio below 1 is a case that we lost. A",
        "wrong implementation has no time. Shares are of the rates that a copy or a matrix product reached in the same",
        "process. On a CPU the kernels' rows are of the references, which are there to be right.",
        "",
    ]
    if missing := never_run(records):
        lines += [*(f"- {line}" for line in missing), ""]
    for device in devices(records):
        on_device = [r for r in records if r["device"] == device]
        lines += [f"## {device}", ""]
        for workload, title in WORKLOADS.items():
            rows = [r for r in on_device if r["workload"] == workload]
            if not rows:
                continue
            last = max(rows, key=lambda r: r["utc"])
            versions = f"torch {last['torch']}, triton {last['triton']}, {last['utc'][:10]}, commit "
            lines += [
                f"### {title}",
                "",
                f"{versions}{(last['commit'] or 'unknown')[:8]}{' + changes' * bool(last['dirty'])}",
            ]
            lines += [f"`{last['command']}`", ""]
            if workload in COUNTS:
                lines += COUNTS[workload](rows)
                continue
            found = cases(rows, workload, device)
            lines += scaling(found) if workload == "scaling" else comparison(found)
            lines += everything(found) if workload in END_TO_END else []
            if picture := picture_of(device, workload, found):
                lines += [f"![{title}]({picture})", ""]
    lines += ["## More machines", "", plan(records), "", "![prediction](scaling.png)"]
    return "\n".join(lines) + "\n"


def devices(records: Sequence[Record]) -> list[str]:
    """GPUs first, then by name."""
    return sorted(
        {r["device"] for r in records},
        key=lambda d: (kind_of(next(r for r in records if r["device"] == d)) == "cpu", d),
    )


def picture_of(device: str, workload: str, found: Sequence[Case]) -> str | None:
    """Where the picture of a workload lies, None if nothing of it can be plotted."""
    plotted = any(plottable(case) for case in found) if workload != "scaling" else any(case.ours for case in found)
    return f"{slug(device)}/{workload}.png" if plotted else None


def plottable(case: Case) -> bool:
    """Whether there is something to compare."""
    return case.ratio is not None


def draw_ratios(found: Sequence[Case], title: str, path: Path) -> None:
    """Bars of how many times as fast as the best rival we are."""
    from matplotlib.figure import Figure

    ratios = [(case.name, case.ratio) for case in found if case.ratio is not None][::-1]
    figure = Figure(figsize=(9, 1 + 0.28 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:blue" if ratio >= 1 else "tab:red" for _, ratio in ratios]
    bars = axes.barh([name for name, _ in ratios], [ratio - 1 for _, ratio in ratios], left=1, color=colors)
    axes.bar_label(bars, [f"{ratio:.2f}x" for _, ratio in ratios], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as the best rival (red: lost)")
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=7)
    save(figure, path)


def draw_rates(found: Sequence[Case], title: str, path: Path) -> None:
    """Bars of images/s of every correct implementation, one panel a case."""
    from matplotlib.figure import Figure

    panels = [case for case in found if plottable(case)]
    shown = [
        sorted((r for r in c.records if r["correct"] and r["p50_ms"]), key=lambda r: r["images_per_s"]) for c in panels
    ]
    figure = Figure(figsize=(9, sum(0.6 + 0.25 * len(rows) for rows in shown)), layout="constrained")
    grid = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [1 + len(rows) for rows in shown]}
    )
    for axes, case, rows in zip(grid[:, 0], panels, shown, strict=True):
        colors = ["tab:blue" if r["ours"] else "tab:gray" for r in rows]
        bars = axes.barh([r["impl"] for r in rows], [r["images_per_s"] for r in rows], color=colors)
        axes.bar_label(bars, fmt="{:,.3g}", fontsize=7, padding=2)
        axes.set_title(f"{case.name}, images/s", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.1)
    figure.suptitle(f"{title} (blue: ours)", fontsize=10)
    save(figure, path)


def draw_scaling(found: Sequence[Case], title: str, path: Path) -> None:
    """Images/s against processes, measured and predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, case in enumerate(found):
        rows = [r for r in case.records if r["correct"] and r["images_per_s"]]
        counts = [r["processes"] for r in rows]
        axes.plot(counts, [r["images_per_s"] for r in rows], "o-", color=f"C{i}", label=case.name)
        said = [(r["processes"], r["predicted_images_per_s"]) for r in rows if r["predicted_images_per_s"]]
        axes.plot([n for n, _ in said], [rate for _, rate in said], "x", color=f"C{i}", label="predicted")
    counts = sorted({r["processes"] for case in found for r in case.records})
    axes.set(xlabel="processes", ylabel="images/s", yscale="log", xticks=counts)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture whose bytes depend on what it shows alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what the tables refer to. Needs matplotlib."""
    drawn = []
    for device in devices(records):
        for workload, title in WORKLOADS.items():
            if workload in COUNTS:
                continue
            found = cases(records, workload, device)
            if picture := picture_of(device, workload, found):
                draw = draw_scaling if workload == "scaling" else draw_rates if workload in END_TO_END else draw_ratios
                draw(found, f"{title}, {device}", folder / picture)
                drawn.append(folder / picture)
    draw_plan(records, folder / "scaling.png")
    return [*drawn, folder / "scaling.png"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--no-pictures", action="store_true", help="tables only")
    options = parser.parse_args(arguments)
    records = read_records(options.results)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "README.md").write_text(tables(records))
    print(f"wrote {options.results / 'README.md'}: {len(records)} records")
    print("\n".join(never_run(records)))
    if not options.no_pictures:
        try:
            for path in pictures(records, options.results):
                print(f"wrote {path}")
        except ModuleNotFoundError as error:
            print(f"no pictures: {error.name} is missing (pip install matplotlib)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
