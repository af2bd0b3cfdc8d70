"""The rule by which an implementation of an op counts as right, shared by the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels import Case, Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Arguments that hold one entry per sample.
PER_SAMPLE = (
    *("x_0", "t", "ordinals", "flip", "prediction", "weights", "x_t", "images", "x"),
    *("residual", "skip", "scale", "shift", "dy", "dtotal", "mean", "rstd"),
    *("history", "guide", "variance", "noise"),
)
# NVIDIA's approximate lg2, sin and cos: all normals within 1e-3 of the exact ones, 99.99 % within 2e-5.
FAST_WORST, FAST_USUAL, FAST_SHARE = 1e-3, 2e-5, 0.9999


def outputs(result: Any) -> tuple[Tensor, ...]:
    """An op's results as a flat tuple, without the None of one that was not asked for."""
    if isinstance(result, tuple):
        return tuple(x for each in result for x in outputs(each))
    return () if result is None else (result,)


def of_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The function of a tensor, or of the tensors of a tuple; anything else is returned as it is."""
    if isinstance(value, tuple):
        return tuple(of_tensors(function, each) for each in value)
    return function(value) if isinstance(value, Tensor) else value


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating-point tensor, and the output dtype, in float64."""
    wide = {name: of_tensors(lambda x: x.double() if x.is_floating_point() else x, v) for name, v in kwargs.items()}
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    return wide


def check_close(
    name: str, fused: Tensor, base: Tensor, truth: Tensor, *, factor: float = 2.0, scale: float | None = None
) -> None:
    """error(fused) <= factor (error(base) + floor scale), base being the reference in the tested dtype.

    factor is 4 for gradients that are sums over samples and pixels; scale is max|truth| unless given.
    On a GPU noise may differ by what its fast functions are allowed, a few values in 10,000 by more.
    """
    assert fused.dtype == base.dtype and fused.shape == base.shape and fused.stride() == base.stride(), name
    if not fused.is_floating_point():
        assert torch.equal(fused, base), name
        return
    assert bool(fused.isfinite().all()), f"{name}: not finite (an element that nobody wrote?)"
    error, base_error = (fused.double() - truth).abs(), (base.double() - truth).abs().max()
    size = truth.abs().max() if scale is None else torch.as_tensor(scale, dtype=truth.dtype, device=truth.device)
    allowed = factor * (base_error + FLOORS[fused.dtype] * size)
    report = f"{name}: error {error.max():.3e}, of the reference {base_error:.3e}, allowed {allowed:.3e}"
    if fused.device.type == "cpu":
        assert bool(error.max() <= allowed), report
        return
    noise_scale = torch.maximum(size, torch.ones_like(size))
    assert bool(error.max() <= allowed + FAST_WORST * noise_scale), report
    usual = (error <= allowed + FAST_USUAL * noise_scale).double().mean()
    assert bool(usual >= FAST_SHARE) or bool((error > allowed + FAST_USUAL * noise_scale).sum() <= 2), report


def check_op(op: Op, case: Case, implementation: Callable[..., Any] | None = None) -> None:
    """Run an implementation (default: the Triton one) on the case's example and hold it to `check_close`."""
    kwargs = op.example(case)
    fused = outputs((implementation or op.triton)(**kwargs))
    base = outputs(op.reference(**kwargs))
    truth = outputs(op.reference(**in_float64(kwargs)))
    for i, (f, b, t) in enumerate(zip(fused, base, truth, strict=True)):
        check_close(f"{op.name}[{i}] {case}", f, b, t)


def one_sample(kwargs: dict[str, Any], k: int) -> dict[str, Any]:
    """The arguments for sample k alone."""

    def per_sample(name: str, value: Any) -> bool:
        return name in PER_SAMPLE or (name == "add" and value.dim() == 2)

    return {
        name: of_tensors(lambda x: x[k : k + 1], value) if per_sample(name, value) else value
        for name, value in kwargs.items()
    }
