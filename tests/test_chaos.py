"""benchmarks/chaos.py: its counts can fall short, its comparison sees every difference, and its fast rows pass."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import chaos, chaos_files
from benchmarks.chaos_runs import BATCH, Count, Life, Run, Session, Stalled, faults_of, unequal
from fastddpm.checkpoint import Checkpoints
from fastddpm.order import BatchPlan

STEPS = 3


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path / "chaos", quick=True)


def shortfalls(session: Session) -> list[str]:
    assert session.counts
    return [f"{c.what}: {c.right} of {c.of}, {c.wrong}" for c in session.counts if not c.passed]


def test_a_count_passes_only_when_it_is_full() -> None:
    count = Count("kill", "kills")
    assert not count.passed  # nothing was done
    assert count.add([], "one") and count.add(True) and count.passed
    assert not count.add(["another loss"], "three")
    assert (count.right, count.of, count.wrong) == (2, 3, ["three: another loss"])
    assert not count.passed
    assert "2    3" in chaos.table([count]) and "FAIL" in chaos.table([count])


def test_what_a_row_raises_makes_it_fall_short(session: Session) -> None:
    with session.count("kill", "kills") as count:
        count.add(True)
        raise Stalled("it hangs")
    assert not count.passed and count.wrong == ["ended early: Stalled: it hangs"]
    assert faults_of(lambda: [][0]) == ["IndexError: list index out of range"]


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["a bit is another"], 1)])
def test_the_table_the_records_and_the_exit_code(tmp_path, monkeypatch, capsys, faults, code) -> None:
    def row(session: Session) -> None:
        with session.count("made", "made up") as count:
            count.add(True)
            count.add(faults, "second")

    monkeypatch.setattr(chaos, "CASES", {"made": row, "broken": lambda session: 1 / 0})
    out = tmp_path / "out.jsonl"
    assert chaos.main(["--quick", "--case", "made", "--out", str(out)]) == code
    printed = capsys.readouterr().out
    assert ("FAIL" in printed) == bool(faults) and "made up" in printed and all(f in printed for f in faults)
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"utc", "commit", "device", "command", "torch"} <= record.keys()
    found = [record[name] for name in ("workload", "case", "right", "of", "correct")]
    assert found == ["chaos", "made", 2 - code, 2, not faults]
    assert chaos.main(["--quick", "--case", "broken", "--no-record"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def made_run(folder: Path) -> Run:
    """A run of three steps that nobody has trained."""
    run = Run(folder / "run", folder / "cache", {"steps": STEPS})
    checkpoint = run.folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    for name in ("model", "ema", "optimizer"):
        save_file({"w": torch.arange(4.0)}, checkpoint / f"{name}.safetensors")
    rows = [{"step": s, "loss": 1.0 / s, "grad_norm": 2.0 / s, "lr": 0.1, "images_per_s": 5.0} for s in (1, 2, 3)]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.beside("witness").mkdir()
    seen = [[p, f"digest {p}"] for p in range(STEPS * BATCH)]
    (run.beside("witness") / "samples-0-1").write_text(json.dumps(seen) + "\n" + "[[3, ")  # torn by a kill
    (run.beside("witness") / "samples-0-2").write_text(json.dumps(seen[-BATCH:]) + "\n")  # a step computed again
    return run


def _edit_log(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Run], None]:
    def damage(run: Run) -> None:
        rows = run.log()
        change(rows)
        (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return damage


def _see(*seen: tuple[int, str]) -> Callable[[Run], Any]:
    return lambda run: (run.beside("witness") / "samples-1-9").write_text(json.dumps(seen) + "\n")


def _flip(name: str) -> Callable[[Run], None]:
    def damage(run: Run) -> None:
        path = run.checkpoints()[-1] / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    return damage


DIFFERENCES = {
    "1 positions gave another sample": _see((5, "another image")),
    "1 of 48 positions are other samples": _see((STEPS * BATCH, "one too many")),
    "positions are other samples": lambda run: shutil.rmtree(run.beside("witness")),
    "the log has 2 rows": _edit_log(lambda rows: rows.pop(1)),
    "the log has 4 rows": _edit_log(lambda rows: rows.append(rows[-1])),
    "loss differs in 1 rows, first at step 2": _edit_log(lambda rows: rows[1].update(loss=np.nextafter(0.5, 1))),
    "loss differs in 1 rows, first at step 3": _edit_log(lambda rows: rows[2].update(loss=None)),
    "grad_norm differs in 1 rows": _edit_log(lambda rows: rows[0].update(grad_norm=2.0000001)),
    "lr differs in 1 rows": _edit_log(lambda rows: rows[0].update(lr=0.2)),
    **{f"{name}.safetensors is not the reference's bytes": _flip(name) for name in ("model", "ema", "optimizer")},
    "left behind: .writing-7-0": lambda run: (run.folder / "checkpoints" / ".writing-7-0").mkdir(),
}


@pytest.mark.parametrize("words", DIFFERENCES)
def test_the_comparison_sees(tmp_path: Path, words: str) -> None:
    run, reference = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    assert unequal(run, reference) == []
    DIFFERENCES[words](run)
    assert any(words in fault for fault in unequal(run, reference))


def test_the_comparison_within_a_tolerance(tmp_path: Path) -> None:
    run, reference = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    _edit_log(lambda rows: rows[1].update(loss=0.5 * (1 + 9e-6)))(run)
    _flip("model")(run)
    assert unequal(run, reference, 1e-5) == []
    _edit_log(lambda rows: rows[1].update(loss=0.5 * (1 + 2e-5)))(run)
    assert unequal(run, reference, 1e-5)


def test_a_reference_that_saw_too_little_proves_nothing(tmp_path: Path) -> None:
    run, reference = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    for each in (run, reference):
        shutil.rmtree(each.beside("witness"))
    assert "the reference saw 0 positions" in unequal(run, reference)[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_plan_row_sees_positions_that_are_shared_and_rows_that_come_twice(monkeypatch, streamed) -> None:
    assert chaos_files.check_plan(128, 4, 2, 5000, streamed)[0] == []
    with monkeypatch.context() as patch:
        owner, attribute = (chaos_files.LaneOrder, "locate") if streamed else (chaos_files, "rows_at")
        plain = getattr(owner, attribute)
        if streamed:
            patch.setattr(owner, attribute, lambda self, lane, index: plain(self, lane, index // 2))
        else:
            patch.setattr(owner, attribute, lambda positions, *more, **named: plain(positions // 2, *more, **named))
        assert any("epoch 0 has" in fault for fault in chaos_files.check_plan(128, 4, 2, 5000, streamed)[0])
    shared = BatchPlan.positions
    monkeypatch.setattr(BatchPlan, "positions", lambda self, step, index, rank: shared(self, step, index, rank // 2))
    faults = chaos_files.check_plan(128, 4, 2, 5000, streamed)[0]
    assert any("not read exactly once" in fault for fault in faults)


def early(run: Path, first: int, background: bool, report: Any) -> None:
    """A saver that reports what it is about to save."""
    step = first
    while True:
        step += 1
        report.send(step)
        Checkpoints(run, keep=2).save(chaos_files.make_state(step))


def in_place(run: Path, first: int, background: bool, report: Any) -> None:
    """A saver that writes where it will be read, and is in the middle of it whenever it has reported."""
    step, elsewhere = first, Checkpoints(run / "elsewhere")
    following = elsewhere.save(chaos_files.make_state(step + 1))
    while True:
        step, whole = step + 1, following
        folder = run / "checkpoints" / f"step-{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in sorted(whole.iterdir(), reverse=True):
            shutil.copy(path, folder)
            time.sleep(0.1)
        following = elsewhere.save(chaos_files.make_state(step + 1))
        report.send(step)


def test_kills_while_saving(session: Session) -> None:
    for background in (False, True):
        chaos_files.kill_while_saving(session, 4, background)
    assert [(c.right, c.of) for c in session.counts] == [(4, 4)] * 2, shortfalls(session)


@pytest.mark.parametrize(("saver", "words"), [(early, "was reported"), (in_place, "not complete")])
def test_kills_while_saving_see(session: Session, saver: Any, words: str) -> None:
    chaos_files.kill_while_saving(session, 5, background=False, saver=saver)
    assert any(words in fault for fault in session.counts[0].wrong), session.counts[0]


def test_a_saver_that_saves_nothing_falls_short(session: Session) -> None:
    chaos_files.kill_while_saving(session, 3, background=False, saver=idle)
    assert "ended before its first save" in session.counts[0].wrong[0]


def idle(run: Path, first: int, background: bool, report: Any) -> None:
    """A saver that ends."""


def test_disks_damage_and_malice(session: Session) -> None:
    for row in (chaos_files.disks, chaos_files.damage, chaos_files.malice):
        row(session)
    assert shortfalls(session) == []


def test_damage_that_is_not_seen_falls_short(session: Session, monkeypatch) -> None:
    monkeypatch.setattr(Checkpoints, "verify", lambda self, path: None)
    chaos_files.damage(session)
    assert any("is used" in fault for fault in session.counts[0].wrong)


def test_a_pickle_that_is_loaded_falls_short(session: Session, monkeypatch) -> None:
    def load(self: Checkpoints, path: Path) -> None:
        for file in path.glob("*.safetensors"):
            with contextlib.suppress(pickle.UnpicklingError):
                pickle.loads(file.read_bytes())

    monkeypatch.setattr(Checkpoints, "load", load)
    chaos_files.malice(session)
    assert any("its code ran" in fault for fault in session.counts[0].wrong)


def test_faulty_images(session: Session) -> None:
    chaos_files.data(session)
    assert shortfalls(session) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kill", "elastic", "quiet", "signals", "plan", "launch"])
def test_quick_rows_through_processes(session: Session, name: str) -> None:
    chaos.CASES[name](session)
    assert shortfalls(session) == []


def test_the_end_of_a_life_takes_those_who_have_left_its_group(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True).wait()"
    life = Life([sys.executable, "-c", code], dict(os.environ), tmp_path / "said.err")
    assert life.wait_until(lambda: len(life.members()) == 2, 20.0)
    other = life.members()[1]
    life.end()
    assert life.process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(other) or psutil.Process(other).status() == psutil.STATUS_ZOMBIE
