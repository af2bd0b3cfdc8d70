"""Ho's CIFAR-10 preset through the command line on real images: streamed or not, on one process or two, interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CIFAR10 = os.environ.get("FASTDDPM_CIFAR10", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.isdir(CIFAR10), reason="FASTDDPM_CIFAR10 does not name a folder of CIFAR-10 as parquet"
    ),
]


def _start(run: Path, world: int, *more: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    separator = ["--"] if world > 1 else []  # torchrun takes --run for its own --run-path otherwise
    command = [
        *(sys.executable, *launcher, "-m", "fastddpm", *separator, "train", "--preset", "cifar10"),
        *("--data.source", f"parquet:{CIFAR10}", "--run", str(run), "--batch-size", "4", "--log-every", "1"),
        *("--optim.horizon", "10", "--sample-every", "0", "--data.workers", "1", "--precision", "fp32", *more),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("streaming", ["--data.streaming", "--data.no-streaming"])
def test_one_process_interrupted_then_two_give_the_losses_of_an_uninterrupted_run(tmp_path, streaming):
    whole = _start(tmp_path / "whole", 1, "--steps", "4", streaming)
    assert whole.wait() == 0, whole.stderr.read()

    first = _start(tmp_path / "run", 1, "--steps", "1000", streaming)
    for line in first.stderr:
        if line.startswith("step 1/"):
            first.send_signal(signal.SIGINT)
            break
    rest = first.stderr.read()
    assert first.wait() == 130 and "go on with the same command" in rest

    second = _start(tmp_path / "run", 2, "--steps", "4", streaming)
    said = second.stderr.read()
    assert second.wait() == 0, said
    assert "going on at step" in said
    for (a, x), (b, y) in zip(_losses(tmp_path / "whole"), _losses(tmp_path / "run"), strict=True):
        assert a == b and x == pytest.approx(y, rel=1e-4)
