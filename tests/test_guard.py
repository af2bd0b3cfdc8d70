"""The numerics guard: counting, spikes, and what the trainer does with a step that is not finite."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import losses, records, small

from fastddpm.checkpoint import Checkpoints
from fastddpm.diffusion import TrainingProcess
from fastddpm.errors import NumericsError
from fastddpm.guard import MAX_IN_WINDOW, WINDOW, Guard, Mailbox
from fastddpm.trainer import Trainer

ROOT = Path(__file__).parents[1]


def skip_all(guard: Guard, numbers: list[int]) -> None:
    for number in numbers:
        guard.skip(number)
        guard.check(number, "row 5")


def test_three_in_a_row_are_too_many_and_two_are_not() -> None:
    skip_all(Guard(), [7, 8, 10, 11, 13])
    with pytest.raises(NumericsError, match=r"3 steps in a row .* step 9 \(row 5\).*replay RUN --step 9"):
        skip_all(Guard(), [7, 8, 9])


def test_more_than_ten_in_a_thousand_are_too_many() -> None:
    spaced = [1 + 2 * i for i in range(MAX_IN_WINDOW)]
    skip_all(Guard(), [*spaced, spaced[0] + WINDOW])  # the first has left the window
    with pytest.raises(NumericsError, match="11 of the last 1000 steps"):
        skip_all(Guard(), [*spaced, spaced[0] + WINDOW - 1])


@given(st.lists(st.integers(1, 5000), unique=True, max_size=40))
def test_a_window_holds_the_last_thousand_steps(numbers: list[int]) -> None:
    guard = Guard()
    for number in sorted(numbers):
        guard.skip(number)
        assert guard.skipped == [n for n in sorted(numbers) if number - WINDOW < n <= number]
    assert guard.num_skipped == len(numbers)


def test_spikes_are_noted_against_the_usual_norm_and_do_not_become_usual() -> None:
    guard = Guard()
    assert all(guard.spike(norm) is None for norm in (500.0, 0.0, *(2.0,) * 200))
    usual = math.exp(guard.log_norm)
    assert usual == pytest.approx(2.0, rel=0.2)
    assert guard.spike(10.1 * usual) == pytest.approx(usual)
    assert guard.spike(10.1 * usual) == pytest.approx(usual)
    assert guard.spike(9.0 * usual) is None


def test_the_guard_survives_json_exactly() -> None:
    guard = Guard()
    for i in range(150):
        guard.spike(0.1 + math.sin(i) ** 2)
    skip_all(guard, [3, 9])
    again = Guard.from_facts(json.loads(json.dumps(guard.to_facts())))
    assert again == guard and Guard.from_facts({}) == Guard()


def test_the_mailbox_gives_each_steps_own_numbers_back() -> None:
    mailbox = Mailbox(torch.device("cpu"))
    for lag in (0, 2):
        mailbox.lag = lag
        came = []
        for number in range(1, 6):
            rows = [torch.tensor([number]), torch.tensor([number + 10])]
            parts = [torch.tensor([float(number)]), torch.tensor([number + 0.5])]
            times = [torch.tensor([number * 7]), torch.tensor([2**23 + number])]
            mailbox.put(number, torch.tensor(number * 2.0), parts, rows, times)
            came += list(mailbox.take())
            assert len(came) == max(0, number - lag)
        came += list(mailbox.take(everything=True))
        assert [(n.number, n.norm, n.losses.tolist(), n.rows.tolist(), n.t.tolist()) for n in came] == [
            (i, 2.0 * i, [i, i + 0.5], [i, i + 10], [i * 7, 2**23 + i]) for i in range(1, 6)
        ]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str = "grad") -> None:
    """Image 3 of each of these steps (of batches of 16) gets a gradient, or only a loss, that is not finite."""
    plain = TrainingProcess.loss_and_grad

    def poisoned(self, prediction, noised, ordinals, x_0, grad_scale):
        loss, grad = plain(self, prediction, noised, ordinals, x_0, grad_scale)
        hit = torch.tensor([p // 16 + 1 in steps and p % 16 == 3 for p in ordinals.tolist()])
        if what == "grad":
            grad = torch.where(hit.view(-1, 1, 1, 1), float("nan"), grad)
        return torch.where(hit, float("inf"), loss), grad

    monkeypatch.setattr(TrainingProcess, "loss_and_grad", poisoned)


@pytest.mark.parametrize("what", ["grad", "loss"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_is_skipped_and_written_down(tmp_path, monkeypatch, what, accumulation) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, {3}, what)
    Trainer(small(run, steps=2, accumulation=accumulation)).train()
    before = Checkpoints(run).load(Checkpoints(run).all()[-1])
    Trainer(small(run, steps=3, accumulation=accumulation)).train()
    after = Checkpoints(run).load(Checkpoints(run).all()[-1])
    assert after.samples_seen == 48
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = getattr(before, kind), getattr(after, kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    Trainer(small(run, accumulation=accumulation)).train()
    (event,) = (json.loads(line) for line in (run / "numerics.jsonl").read_text().splitlines())
    assert event["event"] == "skipped" and event["step"] == 3 and event["positions"] == list(range(32, 48))
    assert [i for i, loss in enumerate(event["losses"]) if loss is None] == [3]
    assert len(event["rows"]) == len(event["t"]) == 16 and all(0 <= t < 1000 for t in event["t"])
    lines = records(run)
    assert lines[2]["loss"] is None and all(math.isfinite(r["loss"]) for r in lines if r["step"] != 3)
    assert "skipped_steps" not in lines[1] and lines[-1]["skipped_steps"] == 1


def test_skipping_is_part_of_the_run_killed_or_not(tmp_path, monkeypatch) -> None:
    poison(monkeypatch, {2, 5, 6})
    Trainer(small(tmp_path / "calm")).train()
    for steps in (4, 6, 8):
        Trainer(small(tmp_path / "stopped", steps=steps)).train()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "calm")
    a, b = (Checkpoints(tmp_path / name).load(Checkpoints(tmp_path / name).all()[-1]) for name in ("calm", "stopped"))
    assert a.facts == b.facts and a.facts["guard"]["skipped"] == [2, 5, 6]
    assert all(torch.equal(a.ema[name], b.ema[name]) for name in a.ema)


def test_three_bad_steps_end_the_run_naming_the_rows(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, {4, 5, 6})
    with pytest.raises(NumericsError, match=r"3 steps in a row .* step 6 \(rows with such a loss: row \d+"):
        Trainer(small(run, save_every=5)).train()
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    assert [path.name for path in Checkpoints(run).all()] == ["step-00000005"]


_POISONED = """
import sys, torch
from fastddpm.diffusion import TrainingProcess
plain, calls = TrainingProcess.loss_and_grad, iter(range(1, 10**9))
def poisoned(self, *args):
    loss, grad = plain(self, *args)
    import os
    return loss, grad * float("nan") if os.environ["RANK"] == "1" and next(calls) in BAD else grad
BAD = eval(sys.argv.pop(1))
TrainingProcess.loss_and_grad = poisoned
from fastddpm.cli import main
sys.exit(main())
"""


def test_bad_on_one_rank_is_skipped_on_all(tmp_path) -> None:
    """Two processes, NaN on rank 1 alone: one skip at the same step, everything finite and equal on both."""
    script = tmp_path / "poisoned.py"
    script.write_text(_POISONED)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = ["train", "--preset", "digits", "--run", str(tmp_path / "run"), "--batch-size", "16", "--log-every", "1"]
    options += ["--sample-every", "0", "--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]

    def start(bad: str, steps: str) -> subprocess.CompletedProcess:
        command = [*launcher, str(script), bad, *options, "--steps", steps, "--optim.horizon", "9"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = start("{3}", "6")
    assert done.returncode == 0, done.stderr
    (event,) = (json.loads(line) for line in (tmp_path / "run" / "numerics.jsonl").read_text().splitlines())
    assert event["step"] == 3 and event["event"] == "skipped" and event["positions"] == list(range(32, 48))
    lines = records(tmp_path / "run")
    assert [r["step"] for r in lines] == list(range(1, 7)) and math.isfinite(lines[-1]["grad_norm"])
    state = Checkpoints(tmp_path / "run").load(Checkpoints(tmp_path / "run").all()[-1])
    assert all(t.isfinite().all() for t in [*state.model.values(), *state.ema.values(), *state.optimizer.values()])
    failed = start("{1, 2, 3}", "9")
    assert failed.returncode != 0 and "3 steps in a row" in failed.stderr and "step 9" in failed.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and status["exit_code"] == 3
