"""Every kernel compiled for GPUs that are not here: instructions per element, registers, spills, memory accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

pytest.importorskip("triton")

HERE = Path(__file__).parent
BUDGETS: dict[str, dict[str, dict[str, float]]] = json.loads((HERE / "kernel_budgets.json").read_text())
NUM_SHARDS = 2
# What the project promises on sm_90, whatever the table says.
CEILINGS = {
    "noise uint8 to bf16, nhwc: _add_noise_kernel": 24,
    "noise uint8 to bf16, nchw: _add_noise_kernel": 24,
    "noise uint8 to bf16, flip, nchw: _add_noise_kernel": 27,
    "noise uint8 to bf16, flip, nhwc: _add_noise_kernel": 38,
    "loss eps, nhwc: _diffusion_loss_kernel": 27,
    "loss eps, nchw: _diffusion_loss_kernel": 27,
    "reverse step, nhwc: _reverse_step_kernel": 32,
    "reverse step, nchw: _reverse_step_kernel": 32,
    "reverse step, guided, nhwc: _reverse_step_kernel": 34.4,
    "reverse step, learned range, nhwc: _reverse_step_kernel": 36.9,
    "reverse step, history, noiseless, nhwc: _reverse_step_kernel": 14.5,  # 3 of them make the next history
    "norm 128@32x32, forward: _group_norm_kernel": 21.5,
    "norm 128@32x32, backward: _group_norm_backward_kernel": 40,
    "norm 192@64x64, forward: _statistics_kernel": 10,
    "norm 192@64x64, forward: _apply_kernel": 11.5,
    "norm 192@64x64, backward: _backward_sums_kernel": 20,
    "norm 192@64x64, backward: _backward_apply_kernel": 20,
}
# Kernels whose time is their launch: a few values a thread.
SMALL = (
    *("_draw_timesteps_kernel", "_draw_uniform_kernel"),
    *("_sum_tiles_kernel", "_merge_statistics_kernel", "_merge_sums_kernel"),
)


def compile_all() -> str:
    """The output of the child processes: this one may have decorated the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    children = [
        subprocess.Popen(
            [sys.executable, HERE / "compile_kernels.py", "--shard", f"{i}/{NUM_SHARDS}"],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(NUM_SHARDS)
    ]
    outputs = []
    for child in children:
        output, errors = child.communicate()
        assert child.returncode == 0, errors[-4000:]
        outputs.append(output)
    return "".join(outputs)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """The figures by (name and kernel, target), compiled once for all of pytest-xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    results = folder / "compiled_kernels.jsonl"
    with FileLock(folder / "compiled_kernels.lock"):
        if not results.exists():
            results.write_text(compile_all())
    found = map(json.loads, results.read_text().splitlines())
    return {(f"{row['name']}: {row['kernel']}", row["target"]): row for row in found}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_budget(rows: dict[tuple[str, str], dict[str, Any]], name: str, target: str) -> None:
    row, budget = rows[name, target], BUDGETS[name][target]
    assert row["instructions"] <= budget["instructions"], "instructions per element"
    assert row["registers"] <= budget["registers"]
    assert row["stack"] == 0 and row["local"] == 0, "spills to local memory"
    if name.startswith("norm "):
        check_norm(row)
        return
    assert row["shared"] == 0, "goes through shared memory"
    # Words travel between threads only for a sum over the tile (5 exchanges in a warp).
    assert row["shuffles"] <= (5 if "loss" in name else 0) or row["kernel"] in SMALL or "dropout mask, nchw" in name
    # A Philox multiply is one wide product; the few others divide by a constant.
    assert row["narrow_multiplies"] <= 2 or row["kernel"] in SMALL
    # Bytes enter as denormals: a multiply-add that flushes them would read 0.
    assert row["flushed_multiply_adds"] == 0
    if row["even"]:
        wide = {"STG.E.64", "STG.E.128"} | ({"STG.E"} if "loss" in name else set())
        assert set(row["stores"]) <= wide, "stores narrower than 8 bytes"


def check_norm(row: dict[str, Any]) -> None:
    """Norms sum over their threads; but images are read and written whole vectors at a time, as they lie."""
    if row["kernel"] in ("_apply_kernel", "_backward_apply_kernel") and "temb" not in row["name"]:
        assert row["shared"] == 0 or "residual" in row["name"], "goes through shared memory"
    if "18@" not in row["name"] and row["kernel"] not in SMALL:
        assert any(load.startswith("LDG.E.128") for load in row["loads"])
        assert row["kernel"] in ("_statistics_kernel", "_backward_sums_kernel") or "STG.E.128" in row["stores"]
        assert not {"STG.E.U16", "LDG.E.U16"} & {*row["loads"], *row["stores"]}


@pytest.mark.parametrize("name", CEILINGS)
def test_promised_ceiling(rows: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
    assert rows[name, "sm_90"]["instructions"] <= CEILINGS[name]


def test_table_is_complete(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    compiled = {name for name, target in rows if target.startswith("sm_")}
    assert compiled == set(BUDGETS), "run python tests/compile_kernels.py --write-budgets"


def test_compiles_without_inline_assembly(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    portable = {name: row for (name, target), row in rows.items() if target == "gfx942"}
    kernels = {row["kernel"] for row in portable.values()}
    assert kernels == {row["kernel"] for row in rows.values()}
    assert all(row["spills"] == 0 for row in portable.values())
