"""The watch over hanging collectives: who is named, from the table alone and with a process that really stops."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm.watch import PHASES, HangWatch, Post, culprits

ROOT = Path(__file__).parents[1]


def post(step: int, phase: str, beat: int = 1, seconds: float = 700.0) -> Post:
    assert phase in PHASES
    return Post(step, phase, seconds, beat, "node7")


def test_a_rank_that_is_behind_is_named_with_what_it_does() -> None:
    before = {0: post(8, "computing"), 1: post(8, "reading data"), 2: post(8, "computing")}
    after = {rank: p._replace(beat=2) for rank, p in before.items()}
    ranks, message = culprits(before, after)
    assert ranks == [1]
    assert message == (
        "rank 1 on node7 has been reading data at step 8 for 700 s, and the others wait for it at step 8, computing"
    )
    ranks, message = culprits(before, {**after, 0: post(7, "saving", 2)})
    assert ranks == [0] and "rank 0 on node7 has been saving at step 7" in message


def test_a_rank_whose_posts_have_ended_is_named_before_one_that_is_behind() -> None:
    before = {0: post(8, "reading data"), 1: post(8, "computing"), 2: post(8, "computing")}
    after = {0: post(8, "reading data", 2), 1: post(8, "computing", 2), 2: before[2]}
    ranks, message = culprits(before, after)
    assert ranks == [2] and "rank 2 on node7 does not answer (last seen at step 8, computing)" in message


def test_a_rank_that_never_came_is_named() -> None:
    ranks, message = culprits({0: post(1, "computing"), 1: None}, {0: post(1, "computing", 2), 1: None})
    assert ranks == [1] and "rank 1 does not answer (it has not begun)" in message


@pytest.mark.parametrize("phase", PHASES)
def test_nobody_is_named_where_all_are_at_one_place(phase: str) -> None:
    """All in a collective: something is wrong between them. All at work: nothing is."""
    before = {rank: post(8, phase) for rank in range(3)}
    ranks, message = culprits(before, {rank: p._replace(beat=2) for rank, p in before.items()})
    assert ranks == []
    assert "network" in message if phase in ("computing", "agreeing whether to stop") else message is None


def test_one_process_is_not_watched() -> None:
    watch = HangWatch(0.1, lambda message: pytest.fail(message))
    assert watch._threads == []
    watch.close()


def start(tmp_path: Path, world: int, patch: str, *options: str) -> subprocess.Popen:
    """The digits on `world` processes, which run `patch` first and write their process numbers into tmp_path."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = tmp_path / "patched.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"
        "from fastddpm.step import TrainStep\n"
        "from fastddpm.trainer import Trainer\n"
        f"{patch}\n"
        "from fastddpm.cli import main\n"
        "sys.exit(main())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--"]
    options = ("--run", str(tmp_path / "run"), "--steps", "90", "--batch-size", "12", *options)
    options += ("--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4", "--hang-timeout", "4")
    command = [*launcher, str(script), "train", "--preset", "digits", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(process: subprocess.Popen, tmp_path: Path) -> None:
    """At once: the launcher gives stopped processes 30 s, and they are in sessions of their own."""
    for number in [process.pid, *(int(path.read_text()) for path in tmp_path.glob("pid*"))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    process.stderr.close()


STOPPED = """
plain = TrainStep.update
def update(self, step):
    if step == 5 and rank == {}: os.kill(os.getpid(), signal.SIGSTOP)
    return plain(self, step)
TrainStep.update = update
"""
ASLEEP = """
plain = Trainer._batches
def batches(self, last):
    for i, batch in enumerate(plain(self, last)):
        if i == 5 and rank == {}: time.sleep(600)
        yield batch
Trainer._batches = batches
"""
SLOW = """
def draw_grid(self):
    time.sleep(15)
Trainer.draw_grid = draw_grid
"""


@pytest.mark.parametrize(
    ("world", "culprit", "patch", "says"),
    [
        (2, 1, STOPPED, "does not answer"),
        (3, 1, ASLEEP, "has been reading data at step 6"),
        pytest.param(2, 0, STOPPED, "does not answer", marks=pytest.mark.slow),
        pytest.param(3, 0, ASLEEP, "has been reading data at step 6", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_holds_up_the_others_ends_the_run_with_its_rank(tmp_path, world, culprit, patch, says) -> None:
    """One of them stopped by SIGSTOP, or asleep in its reader: another says so instead of waiting for ever."""
    process = start(tmp_path, world, patch.format(culprit), "--sample-every", "0")
    try:
        said = next(line for line in process.stderr if "no progress for" in line)
        assert said.startswith(f"fastddpm (rank {1 if culprit == 0 else 0}): error:")
        named = {int(rank) for rank in re.findall(r"rank (\d+)", said.split("error:")[1])}
        assert named == {culprit} and says in said
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["status"] == "failed" and f"rank {culprit}" in status["reason"] and status["exit_code"] == 1
    finally:
        end(process, tmp_path)


def test_work_that_takes_long_on_all_processes_is_no_hang(tmp_path) -> None:
    process = start(tmp_path, 2, SLOW, "--steps", "2", "--sample-every", "1", "--optim.horizon", "2")
    try:
        said = process.stderr.read()
        assert process.wait() == 0, said
    finally:
        end(process, tmp_path)


def test_every_phase_of_the_trainer_is_known() -> None:
    """One that is not would end a run as soon as another process looks at the table."""
    text = (Path(__file__).parents[1] / "fastddpm" / "trainer.py").read_text()
    named = re.findall(r"watch\.at\([^,]+, \"([^\"]+)\"\)", text)
    assert len(named) >= 6 and set(named) <= set(PHASES)
    with pytest.raises(ValueError, match="is not in"):
        HangWatch(0.0, lambda message: None).at(1, "thinking")
