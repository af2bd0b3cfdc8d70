"""Benchmarks cannot rot: each runs here, small; the report shows what lost and hides what is wrong."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as all_parts
from benchmarks import kernels, record, report
from benchmarks.communication import (
    BACKWARD_SHARE,
    ETHERNET,
    INFINIBAND,
    NETS,
    NVLINK,
    Link,
    all_reduce_ms,
    exposed_ms,
    plan,
    predict,
    with_measured,
)
from fastddpm_kernels import OPS

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if '\nif __name__ == "__main__"' in p.read_text())
FACTS = {
    **{
        "device": "Some GPU",
        "device_type": "cuda",
        "clocks": None,
        "driver": "1.2",
        "torch": "2.13.0",
        "triton": "3.9",
    },
    **{
        "accelerate": "1",
        "cuda": "13",
        "python": "3.11",
        "commit": "0123456789",
        "dirty": False,
        "command": "python x",
    },
    "utc": "2026-01-02T03:04:05+00:00",
}
# STYLE of a record: what every line says.
FIELDS = {
    *("workload", "case", "impl", "ours", "direction", "dtype", "shape", "memory_format", "p20_ms", "p50_ms", "p80_ms"),
    *("repetitions", "peak_memory_bytes", "ideal_bytes", "gb_per_s", "copy_gb_per_s", "copy_share", "images_per_s"),
    *("gflop_per_image", "matmul_tflops", "matmul_share", "error", "torch_error", "correct", "device", "clocks"),
    *("driver", "torch", "triton", "accelerate", "python", "commit", "dirty", "utc", "command"),
}


def made_up(impl: str, ms: float, *, ours: bool = False, correct: bool = True, **changes):
    values = {
        **{"workload": "train_step", "case": "net A", "direction": "step", "dtype": "bfloat16"},
        **{"shape": (128, 3, 32, 32), "memory_format": "channels_last", "images": 128, "gflop_per_image": 37.3},
        "facts": FACTS,
        **changes,
    }
    timing = {"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "repetitions": 200}
    rates = record.Rates(copy_gb_per_s=4000.0, matmul_tflops=700.0)
    workload, case = values.pop("workload"), values.pop("case")
    return record.make_record(workload, case, impl, ours=ours, correct=correct, rates=rates, timing=timing, **values)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        import_module(f"benchmarks.{name}").main()
    assert done.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kernels", "scaling", "train_step", "sampling"])
def test_quick_runs_write_complete_records(name, tmp_path):
    out = tmp_path / "records.jsonl"
    done = run(name, "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    records = record.read_records(tmp_path)
    assert any(r["ours"] for r in records)
    for line in records:
        assert line.keys() >= FIELDS, FIELDS - line.keys()
        assert line["workload"] == name and line["command"].startswith(f"python -m benchmarks.{name} --quick")
        assert line["correct"], line
        assert 0 < line["p20_ms"] <= line["p50_ms"] <= line["p80_ms"]
    assert report.main(["--results", str(tmp_path), "--no-pictures"]) == 0
    assert records[0]["case"] in (tmp_path / "README.md").read_text()


# The record.


def test_the_rates_of_a_record():
    line = made_up("x", 2.0, ideal_bytes=4 * 10**9)
    assert line["gb_per_s"] == pytest.approx(2000.0) and line["copy_share"] == pytest.approx(0.5)
    assert line["images_per_s"] == pytest.approx(64_000)
    # 128 images x 37.3 GFLOP in 2 ms are 2387.2 TFLOP/s.
    assert line["matmul_share"] == pytest.approx(2387.2 / 700)


def test_a_wrong_record_has_no_time():
    line = made_up("x", 2.0, correct=False, ideal_bytes=1, error=1.0)
    timed = ("p20_ms", "p50_ms", "p80_ms", "gb_per_s", "copy_share", "images_per_s", "matmul_share")
    assert all(line[key] is None for key in timed) and line["repetitions"] == 0 and line.keys() >= FIELDS


def test_candidates_take_turns():
    calls = []
    timed = record.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))},
        device="cpu",
        rounds=7,
        seconds=0.0,
    )
    assert "".join(calls) == "abbaabbaab"  # the first 5 rounds are always taken, no more after 0 seconds
    assert [len(ms) for ms in timed.values()] == [5, 5] and min(timed["b"]) >= 10  # it sleeps
    assert record.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        **{"p20_ms": 2.0, "p50_ms": 3.5, "p80_ms": 5.0},
        "repetitions": 6,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_workloads(device):
    timed = {(w.op, w.backward) for w in kernels.workloads(device)}
    assert {op for op, _ in timed} == OPS.keys() - {"group_norm_silu_backward"}  # which is a backward of the first
    assert timed >= {(op, True) for op in kernels.LEAVES}


@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [("", 2, 3), ("add+dropout", 2, 3), ("film+dropout", 2, 3), ("skip", 2, 3), ("residual", 4, 4)],
)
def test_ideal_traffic_of_a_norm(variant, forward, backward):
    """In tensors: a residual's sum is written too, and its gradient is x's."""
    workload = kernels.Workload("group_norm_silu", variant, (2, 24, 4, 4), torch.bfloat16)
    kwargs, size = workload.inputs("cpu"), 2 * 24 * 4 * 4 * 2
    assert sum(kernels.ideal_traffic(workload, kwargs)) == forward * size
    assert sum(kernels.ideal_traffic(replace(workload, backward=True), kwargs)) == backward * size


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    """The gate of the kernels' benchmark, forward and backward, for ours and for a rival."""
    options = SimpleNamespace(no_compile=True, graph=False, repetitions=1, sample_ms=0.01)
    loss = OPS["diffusion_loss"]
    small = kernels.Workload("diffusion_loss", "eps", (2, 3, 4, 4), torch.float32)
    for workload in (small, replace(small, backward=True)):
        records = kernels.measure(workload, "cpu", record.Rates(1.0), FACTS, options)
        assert [(r["impl"], r["ours"], r["correct"]) for r in records] == [
            ("reference", True, True),
            ("eager", False, True),
        ]
        with monkeypatch.context() as patch:
            wrong = replace(loss, public=lambda *a, **k: loss.public(*a, **k) * 1.01)
            patch.setitem(kernels.OPS, "diffusion_loss", wrong)
            patch.setitem(kernels.RIVALS, "diffusion_loss", lambda **k: kernels.plain_diffusion_loss(**k) * 0.99)
            records = kernels.measure(workload, "cpu", record.Rates(1.0), FACTS, options)
        assert [(r["correct"], r["p50_ms"]) for r in records] == [(False, None), (False, None)]


# The report.


def test_a_lost_row_is_shown_against_the_best_rival():
    records = [
        made_up("ours", 10.0, ours=True),
        made_up("ours compiled", 8.0, ours=True),
        made_up("eager", 9.0),
        made_up("torch.compile", 6.0),
    ]
    text = report.tables(records)
    (row,) = [line for line in text.splitlines() if "lost" in line and line.startswith("|")]
    assert row == "| net A | ours compiled | 8.000 | 85.3% of matmul | torch.compile | 6.000 | **0.75x, lost** |"


def test_a_false_row_is_named_and_never_plotted(tmp_path):
    records = [
        made_up("ours", 10.0, ours=True),
        made_up("too good", 1.0, correct=False, error=0.5),
        made_up("eager", 20.0),
        made_up("ours", 1.0, ours=True, correct=False, case="net B", error=0.5),
        made_up("eager", 20.0, case="net B"),
    ]
    found = report.cases(records, "train_step", FACTS["device"])
    assert [case.ratio for case in found] == [2.0, None]
    assert [report.plottable(case) for case in found] == [True, False]
    text = report.tables(records)
    assert "wrong: error 5.0e-01" in text and "**ours is wrong**" in text
    # A line that claims a time though it is wrong is still not believed.
    records[1] |= {"p50_ms": 1.0, "images_per_s": 128e3}
    assert report.cases(records, "train_step", FACTS["device"])[0].ratio == 2.0
    pictures = {}
    for name, lines in (("with", records), ("without", [records[0], records[2]])):
        report.pictures(lines, tmp_path / name)
        pictures[name] = (tmp_path / name / "some-gpu" / "train_step.png").read_bytes()
    assert pictures["with"] == pictures["without"]


def test_the_newest_run_counts_and_runs_are_not_mixed():
    older = FACTS | {"utc": "2026-01-01T00:00:00+00:00"}
    records = [
        made_up("ours", 10.0, ours=True),
        made_up("eager", 12.0),
        made_up("eager", 5.0, facts=older),
        made_up("ours", 1.0, ours=True, facts=older),
    ]
    (case,) = report.cases(records, "train_step", FACTS["device"])
    assert case.ratio == 1.2


def test_what_was_never_run_is_said():
    assert report.never_run([]) == ["GPU rows: never run", "CPU rows: never run"]
    text = report.tables([made_up("ours", 10.0, ours=True)])
    assert "- CPU rows: never run" in text and "- GPU, sampling: never run" in text
    assert "GPU, training step: never run" not in text and "no rival was run" in text
    assert "ours: never run" in report.tables([made_up("eager", 10.0)])


def test_the_report_of_the_same_records_has_the_same_bytes(tmp_path):
    scaling = [
        made_up(
            f"{n}", 10.0 + n, ours=True, workload="scaling", processes=n, predicted_images_per_s=None, images=128 * n
        )
        for n in (1, 2)
    ]
    kernel = [made_up("triton", 1.0, ours=True, workload="kernels"), made_up("eager", 2.0, workload="kernels")]
    written = []
    for name in ("a", "b"):
        for line in (made_up("ours", 10.0, ours=True), made_up("eager", 12.0), *kernel, *scaling):
            record.append(tmp_path / name / "x.jsonl", line)
        assert report.main(["--results", str(tmp_path / name)]) == 0
        written.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.*")})
    assert written[0] == written[1]
    assert {p.split("/")[-1] for p in written[0]} >= {"README.md", "kernels.png", "train_step.png", "scaling.png"}


def test_half_a_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match=r"x\.jsonl:2 is not JSON"):
        record.read_records(tmp_path)


# The model of communication, against cases worked out by hand.

FAST, SLOW = Link("", 100.0, 5.0, ""), Link("", 10.0, 20.0, "")


@pytest.mark.parametrize(
    ("gpus", "ms"),
    [
        (1, 0.0),
        (2, 1.0 + 0.01),  # 2 x 1/2 x 100 MB over 100 GB/s; 2 hops of 5 us
        (8, 1.75 + 0.07),  # 2 x 7/8; 14 hops
        (16, 1.75 + 0.07 + 1.25 + 0.04),  # and 2 x 1/2 x 12.5 MB over 10 GB/s; 2 hops of 20 us
        (64, 1.75 + 0.07 + 2.1875 + 0.12),  # 2 x 7/8 x 12.5 MB; 2 log2(8) hops
    ],
)
def test_all_reduce(gpus, ms):
    assert all_reduce_ms(100e6, gpus, FAST, SLOW) == pytest.approx(ms)


@pytest.mark.parametrize(
    ("backward", "bucket", "count", "ms"),
    [
        (12.0, 1.0, 4, 1.0),  # the link waits: only the last bucket is left
        (12.0, 3.0, 4, 3.0),  # each ends as the next is ready
        (12.0, 5.0, 4, 11.0),  # ready at 3, done at 8, 13, 18, 23
        (12.0, 5.0, 1, 5.0),  # nothing to hide behind
    ],
)
def test_exposed(backward, bucket, count, ms):
    assert exposed_ms(backward, bucket, count) == pytest.approx(ms)


def test_a_prediction():
    net = replace(NETS[0], parameters=13_107_200, batch=10, image_shape=(3, 10, 10), images_per_s=1000.0)  # 2 buckets
    row = predict(net, 2, FAST, SLOW)
    # 25 MiB over 100 GB/s are 0.262144 ms; the backward takes 6 of 10 ms, so that only the second one is exposed.
    assert row.all_reduce_ms == pytest.approx(2 * (0.262144 + 0.01)) and row.exposed_ms == pytest.approx(0.272144)
    assert BACKWARD_SHARE == 0.6 and row.step_ms == pytest.approx(10.272144)
    assert row.images_per_s == pytest.approx(20 / 10.272144e-3) and row.efficiency == pytest.approx(10 / 10.272144)
    assert row.sent_bytes == 52_428_800 and row.data_bytes_per_s == pytest.approx(300 * row.images_per_s)
    assert row.hidden == pytest.approx(0.5)
    assert predict(net, 1, FAST, SLOW).step_ms == 10.0
    assert predict(net, 16, FAST, SLOW).data_bytes_per_s == pytest.approx(
        150 * predict(net, 16, FAST, SLOW).images_per_s
    )


def test_more_gpus_never_train_slower_in_all():
    for net in NETS:
        rates = [predict(net, 8 * 2**k, NVLINK, INFINIBAND).images_per_s for k in range(8)]
        assert rates == sorted(rates)
        assert predict(net, 64, NVLINK, ETHERNET).efficiency < predict(net, 64, NVLINK, INFINIBAND).efficiency <= 1


def test_measurements_take_the_place_of_assumptions():
    nets, link = with_measured([])
    assert (nets, link) == (NETS, NVLINK)
    on_cpu = FACTS | {"device_type": "cpu"}
    link_of = {"workload": "scaling", "processes": 8, "all_reduce_gb_per_s": 222.0, "hop_latency_us": 4.0}
    records = [
        made_up("ours", 10.0, ours=True),
        made_up("ours wrong", 1.0, ours=True, correct=False),
        made_up("rival", 1.0),
        made_up("ours on a CPU", 1.0, ours=True, facts=on_cpu),
        made_up("8", 10.0, ours=True, **link_of),
        made_up("8", 10.0, ours=True, **(link_of | {"all_reduce_gb_per_s": 1.0}), facts=on_cpu),
    ]
    nets, link = with_measured(records)
    assert [net.images_per_s for net in nets] == [12_800, NETS[1].images_per_s]
    assert (link.gb_per_s, link.latency_us) == (222.0, 4.0)
    text = plan(records)
    assert "measured: ours, Some GPU" in text and "measured: 8 x Some GPU" in text and "not measured" in text


# All parts in one go.


def test_a_part_that_is_late_is_ended_with_its_children(tmp_path):
    out, ticks = tmp_path / "slow.jsonl", tmp_path / "ticks"
    grandchild = f"import time\nfor _ in range(500): open({str(ticks)!r}, 'a').write('x'); time.sleep(0.02)"
    code = (
        f"import subprocess, sys; print('begun')\nopen({str(out)!r}, 'w').write('{{}}\\n{{\"half')\n"
        f"subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    outcome = all_parts.run(all_parts.Part("slow", ("-c", code), 1.0), tmp_path, 4.0)
    assert outcome.state == "out of time after 4 s" and outcome.records == 1
    assert out.read_text() == "{}\n" and (tmp_path / "slow.log").read_text() == "begun\n"
    seen = ticks.read_text()
    time.sleep(0.3)
    assert 0 < len(seen) < 500 and ticks.read_text() == seen


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("pass", "ok"),
        ("import no_such_package.part", "skipped: no_such_package is missing"),
        ("import benchmarks.no_such_module", "failed (exit 1)"),  # our own fault, not the machine's
        ("raise SystemExit(7)", "failed (exit 7)"),
        ("print('No module named no_such_package')", "ok"),
    ],
)
def test_how_a_part_ended(code, state, tmp_path):
    assert all_parts.run(all_parts.Part("x", ("-c", code), 1.0), tmp_path, 60.0).state == state


def test_all_sums_up_and_fails_if_a_part_failed(tmp_path, monkeypatch, capsys):
    chosen = [
        all_parts.Part("good", ("-c", "import sys; open(sys.argv[1], 'w').write('{}\\n' * 2)", "{out}"), 1.0),
        all_parts.Part("bad", ("-c", "raise SystemExit(2)"), 1.0),
    ]
    monkeypatch.setattr(all_parts, "parts", lambda quick: chosen)
    assert all_parts.main(["--minutes", "1", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(o["part"], o["state"], o["records"]) for o in summary] == [
        ("good", "ok", 2),
        ("bad", "failed (exit 2)", 0),
    ]
    assert "failed (exit 2)" in capsys.readouterr().out
    assert all_parts.main(["--minutes", "1", "--out", str(tmp_path), "--parts", "good"]) == 0
    assert all_parts.main(["--minutes", "0", "--out", str(tmp_path), "--parts", "good"]) == 0
    assert "no time is left" in capsys.readouterr().out


def test_every_file_with_gpu_tests_is_a_part():
    names = {part.name for part in all_parts.parts(quick=False)}
    assert names >= {
        "test_gpu",
        "test_kernels_gpu",
        "train_step",
        "kernels",
        "kernels-graph",
        "sampling",
        "scaling",
        "report",
    }
