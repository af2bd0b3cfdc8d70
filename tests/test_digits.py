"""The quickstart's samples are digits: benchmarks.digits trains three seeds, none dropped, and a judge looks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_samples_of_three_training_seeds_are_plainly_digits_of_every_class(tmp_path):
    command = [sys.executable, "-m", "benchmarks.digits", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(done.stderr.splitlines()[0])
    assert [r["seed"] for r in results] == [0, 1, 2]
    for result in results:
        print(result)
        judge = result["judge"]
        # A judge that calls anything a digit would pass everything.
        assert judge["accuracy"] >= 0.95 and judge["blends"] < 0.3 and judge["noise"] < 0.05
        assert result["plain"] >= 0.8
        assert min(result["classes"]) >= 1
