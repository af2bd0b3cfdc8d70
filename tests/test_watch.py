"""The watch over hanging collectives: who is named, from the table alone and with a process that really stops."""

import json
import os
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


def test_nobody_is_named_where_all_wait_at_one_place() -> None:
    before = {rank: post(8, "computing") for rank in range(3)}
    ranks, message = culprits(before, {rank: p._replace(beat=2) for rank, p in before.items()})
    assert ranks == [] and "network" in message


def test_one_process_is_not_watched() -> None:
    watch = HangWatch(0.1, lambda message: pytest.fail(message))
    assert watch._thread is None
    watch.close()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_run_with_its_rank(tmp_path, stopped) -> None:
    """Two processes, one of them stopped by SIGSTOP in training: the other says so instead of waiting for ever."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = tmp_path / "stop.py"
    script.write_text(
        "import os, signal, sys\n"
        "from fastddpm.step import TrainStep\n"
        "plain = TrainStep.update\n"
        "def update(self, step):\n"
        f"    if step == 5 and os.environ['RANK'] == '{stopped}': os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return plain(self, step)\n"
        "TrainStep.update = update\n"
        "from fastddpm.cli import main\n"
        "sys.exit(main())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    options = ["train", "--preset", "digits", "--run", str(tmp_path / "run"), "--sample-every", "0", "--steps", "90"]
    options += ["--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4", "--hang-timeout", "4"]
    process = subprocess.Popen(
        [*launcher, str(script), *options], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said = ""
        for line in process.stderr:
            if "no progress for" in line:
                said = line
                break
        assert f"fastddpm (rank {1 - stopped}): error: no progress for" in said
        assert f"rank {stopped}" in said.split("error:")[1] and "does not answer" in said
        if stopped == 1:  # rank 0 writes the run folder
            assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher gives stopped processes 30 s
        process.wait()
        process.stderr.close()
