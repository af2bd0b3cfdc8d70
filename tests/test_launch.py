"""launch/slurm.sh against stand-ins of SLURM's commands, and processes that a launcher has started against devices."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastddpm import machine
from fastddpm.errors import ConfigError
from fastddpm.machine import check_processes

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm.sh"

# What srun does to its task on a signal: TERM ends it at once. Then it passes on the task's exit code.
SRUN = """
echo "$@" >> "$STAND_IN/srun"
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 "$@" &
task=$!
trap 'echo killed >> "$STAND_IN/killed"; kill -KILL $task' TERM
wait $task
"""
SCANCEL = """
echo "$@" >> "$STAND_IN/scancel"
kill -TERM "$(cat "$STAND_IN/trainer")"
"""
SQUEUE = 'echo "${STAND_IN_STATE:-RUNNING}"'
SCONTROL = 'echo "$@" >> "$STAND_IN/scontrol"; exit "${STAND_IN_REQUEUE:-0}"'
# The trainer, under the name that the script calls Python by, unless to read the status file.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
if sys.argv[1] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
folder = pathlib.Path(os.environ["STAND_IN"])
(folder / "arguments").write_text(json.dumps(sys.argv[1:]))
(folder / "timeout").write_text(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
words = " ".join(sys.argv).replace("--run=", "--run ").split()
run = pathlib.Path(words[words.index("--run") + 1])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
def end(status, code, **facts):
    record = {{"status": status, "step": 7, "time": time.time(), **facts}}
    (run / "status.json").write_text(json.dumps(record))
    return code
kind = os.environ["STAND_IN_TRAINER"]
if kind == "broken":
    sys.exit(3)
run.mkdir(parents=True, exist_ok=True)
if kind in ("done", "failed"):
    sys.exit(end("done", 0) if kind == "done" else end("failed", 1, exit_code=4, reason="an image is missing"))
end("running", 0)
(folder / "trainer").write_text(str(os.getpid()))
while not asked:
    time.sleep(0.01)
time.sleep(0.5)
if kind == "slow to save":
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "stuck":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(end("preempted", 1))
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as SLURM does, in a folder of its own."""
    commands = tmp_path / "bin"
    commands.mkdir()
    bodies = {"srun": SRUN, "scancel": SCANCEL, "squeue": SQUEUE, "scontrol": SCONTROL}
    for name, body in bodies.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (commands / "python").write_text(PYTHON)
    for path in commands.iterdir():
        path.chmod(0o755)

    def start(trainer: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN": str(tmp_path),
            "STAND_IN_TRAINER": trainer,
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURMD_NODENAME": "node17",
        }
        command = ["bash", str(SCRIPT), "--preset", "digits", *arguments]
        return subprocess.Popen(command, env=environment | more, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    return start


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    said = job.communicate(timeout=20)[1]
    return job.returncode, said


def stop(job: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """TERM to the script alone, as --signal=B:TERM has SLURM send it, once the trainer trains; and once more."""
    deadline = time.monotonic() + 20
    while not (folder / "trainer").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # of the 0.5 s that the trainer saves
    job.send_signal(signal.SIGTERM)
    return end(job)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_the_step_is_one_launcher_per_node_with_all_that_it_has_to_know(slurm, tmp_path):
    code, _ = end(slurm("done", "--steps", "9"))
    assert code == 0
    (srun,) = lines(tmp_path / "srun")
    for option in ("--ntasks-per-node=1", "--cpus-per-task=16", "--kill-on-bad-exit=0", "--wait=300"):
        assert option in srun.split()
    arguments = json.loads((tmp_path / "arguments").read_text())
    expected = "-m torch.distributed.run --node-rank 0 --nnodes 2 --nproc-per-node 8 --master-addr node17 --master-port"
    assert " ".join(arguments).startswith(expected)
    rest = arguments[arguments.index("--master-port") + 2 :]
    assert " ".join(rest) == "-m fastddpm -- train --preset digits --steps 9 --run runs/slurm-4242"
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments[2:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.master_port) == ("2", "8", 24242)
    assert (tmp_path / "timeout").read_text() == "240"


def test_done_is_not_queued_again(slurm, tmp_path):
    code, said = end(slurm("done", "--run=given"))
    assert (code, lines(tmp_path / "scontrol")) == (0, [])
    assert "done at step 7" in said and (tmp_path / "given" / "status.json").exists()


def test_a_failure_is_not_queued_again_and_its_exit_code_is_the_trainers(slurm, tmp_path):
    code, said = end(slurm("failed"))
    assert (code, lines(tmp_path / "scontrol")) == (4, [])
    assert "failed at step 7: an image is missing" in said


def test_term_is_forwarded_and_waited_for_and_the_job_queued_again_once(slurm, tmp_path):
    job = slurm("trains", "--run", "given")
    code, said = stop(job, tmp_path)
    assert code == 0 and "saved at step 7 and queued again" in said
    assert set(lines(tmp_path / "scancel")) == {"--signal=TERM 4242"}
    assert lines(tmp_path / "scontrol") == ["requeue 4242"]
    assert not (tmp_path / "killed").exists()  # by an srun that was sent TERM itself
    assert json.loads((tmp_path / "given" / "status.json").read_text())["status"] == "preempted"


@pytest.mark.parametrize("more", [{"STAND_IN_STATE": "COMPLETING"}, {"STAND_IN_REQUEUE": "1"}])
def test_a_cancelled_job_stays_cancelled(slurm, tmp_path, more):
    code, said = stop(slurm("trains", **more), tmp_path)
    assert code == 130 and "saved at step 7 and not queued again" in said
    assert len(lines(tmp_path / "scontrol")) == len(more.get("STAND_IN_REQUEUE", ""))


def test_a_start_that_fails_at_once_is_not_queued_again_by_an_old_status(slurm, tmp_path):
    run = tmp_path / "given"
    run.mkdir()
    (run / "status.json").write_text('{"status": "preempted", "step": 3}')
    code, said = end(slurm("broken", "--run", "given"))
    assert (code, lines(tmp_path / "scontrol")) == (3, [])
    assert "ended with exit code 3 before the first step" in said


def test_trainers_that_are_killed_are_started_again_only_if_they_got_on(slurm, tmp_path):
    code, said = stop(slurm("stuck"), tmp_path)
    assert (code, lines(tmp_path / "scontrol")) == (137, [])
    assert "were killed (exit code 137)" in said
    (tmp_path / "trainer").unlink()
    code, _ = stop(slurm("slow to save"), tmp_path)
    assert (code, lines(tmp_path / "scontrol")) == (0, ["requeue 4242"])


def test_the_script_is_what_sbatch_takes():
    text = SCRIPT.read_text()
    before_commands = text[: text.index("PYTHON=")]
    assert os.access(SCRIPT, os.X_OK)
    assert all(line.startswith("#") or not line for line in before_commands.splitlines())
    directives = re.findall(r"^#SBATCH --(\S+)", text, re.M)
    assert directives == re.findall(r"^#SBATCH --(\S+)", before_commands, re.M)  # sbatch reads none behind a command
    assert {"signal=B:TERM@300", "requeue", "open-mode=append", "ntasks-per-node=1"} <= set(directives)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def processes(monkeypatch: pytest.MonkeyPatch, gpus: int, **environment: str) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_processes()


def test_processes_are_checked_against_devices(monkeypatch):
    processes(monkeypatch, 0)
    processes(monkeypatch, 0, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    processes(monkeypatch, 0, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    processes(monkeypatch, 2, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")  # two machines
    processes(monkeypatch, 2, WORLD_SIZE="4", LOCAL_RANK="1")
    with pytest.raises(
        ConfigError, match=r"2 processes were launched on a machine without a GPU: .*ACCELERATE_USE_CPU"
    ):
        processes(monkeypatch, 0, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="8 processes were launched on this machine and 4 GPUs are visible"):
        processes(monkeypatch, 4, WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
    with pytest.raises(ConfigError, match="3 processes were launched on this machine and 2 GPUs are visible"):
        processes(monkeypatch, 2, WORLD_SIZE="4", LOCAL_RANK="2")


def test_a_precision_is_not_measured_by_processes_that_cannot_train(monkeypatch):
    monkeypatch.setattr(machine, "PartialState", lambda **_: pytest.fail("accelerate was asked"))
    with pytest.raises(ConfigError, match="without a GPU"):
        processes(monkeypatch, 0, WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="without a GPU"):
        machine.settle_precision("auto")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_two_processes_without_a_gpu_end_with_exit_code_5(tmp_path):
    """By torchrun, whose own exit code is always 1: each trainer's is in its report."""
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastddpm"),
            *("--", "train", "--preset", "digits", "--run", str(tmp_path / "run")),
        ],
        env=environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, since others may keep it busy: launcher and both trainers together, 7 s where it takes 5 s.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert ended.returncode != 0 and re.search(r"exitcode *: 5\b", ended.stderr), ended.stderr
    assert "error: 2 processes were launched on a machine without a GPU" in ended.stderr
    assert "fastddpm/machine.py" not in ended.stderr  # a line, no traceback
    assert not (tmp_path / "run").exists()
    assert seconds < 15
