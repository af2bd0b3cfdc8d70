"""What every test relies on: the interpreter where there is no GPU, markers skipped by what the machine has."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

# Prepared and decoded data sets of the tests stay out of the user's cache; xdist's workers and children share them.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastddpm-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# Before any kernel is decorated: without a GPU every kernel runs in Triton's interpreter.
if NUM_GPUS == 0:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, not pass, what this machine cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and NUM_GPUS < 1:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("multi_gpu") and NUM_GPUS < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))


def _round_to_bfloat16() -> None:
    """Make the interpreter round fp32 to bf16 to nearest even, as GPUs do; it truncates (half of all values differ)."""
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def convert_rounded(data: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return convert(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where((bits & np.uint32(0x7FFFFFFF)) > 0x7F800000, quiet_nan, rounded).astype(np.uint16)

    interpreter._convert_float = convert_rounded


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_to_bfloat16()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin give NaN (floats) or a byte pattern, so that an element nobody writes is seen."""

    def poison(function: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = function(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(float("nan"))
            return x.fill_(True) if x.dtype == torch.bool else x.fill_(0x5A)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
