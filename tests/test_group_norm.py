"""group_norm_silu against its formula, in every combination that the U-Net uses and in both of the kernels' ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, check_close, in_float64, one_sample, outputs
from torch import Tensor

import fastddpm_kernels as fk
from fastddpm_kernels import Case, native
from fastddpm_kernels import group_norm_kernels as kernels
from fastddpm_kernels.group_norm import GROUP_NORM_SILU, GROUP_NORM_SILU_BACKWARD, VARIANTS, _group_norm_silu_op

triton_here = pytest.mark.skipif(not fk.HAS_TRITON, reason="needs triton")
IMPLS = ["reference", pytest.param("triton", marks=triton_here)]
DIFFERENTIABLE = ("x", "weight", "bias", "add", "residual", "skip", "scale", "shift")
IMAGES = ("x", "residual", "skip")
COMBINATIONS = (*VARIANTS, "add", "add-dropout", "temb-residual", "film-skip-dropout", "add-residual-norm")
# How the kernels are made to cut the little tensors of these tests.
WAYS: dict[str, dict[str, int]] = {
    "one pass": {"ONE_PASS_ELEMENTS": 2**14},
    "one pass in many bundles": {"ONE_PASS_ELEMENTS": 2**9},
    "two passes": {"ONE_PASS_ELEMENTS": 0},
    "two passes in many splits": {
        "ONE_PASS_ELEMENTS": 0,
        "TILE_CHANNELS": 32,
        "LOOP_ELEMENTS": 1,
        "SPLIT_ELEMENTS": 256,
    },
}


@contextmanager
def cut_by(way: str) -> Iterator[None]:
    """The kernels cut as WAYS says."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[way].items():
            patch.setattr(kernels, name, value)
        kernels.cut.cache_clear()
        yield
    kernels.cut.cache_clear()


def example(variant: str, shape: tuple[int, int, int, int], **case: Any) -> dict[str, Any]:
    return GROUP_NORM_SILU.example(Case(shape, device=DEVICE, variant=variant, **case))


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """(y, total) or (y,) by PyTorch's own operators, differentiated by autograd."""
    total = x
    if add is not None:
        total = total + (add if add.dim() == 2 else add[None])[:, :, None, None]
    if residual is not None:
        total = total + residual
    y = torch.group_norm(total if skip is None else torch.cat((total, skip), 1), num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1.0 + scale[:, :, None, None]) + shift[:, :, None, None]
    y = F.silu(y) if silu else y
    if ordinals is not None:
        y = fk.dropout(y, p, ordinals, layer=layer, seed=seed)
    return (y,) if residual is None else (y, total)


def upstream(kwargs: dict[str, Any]) -> list[Tensor]:
    """Random gradients of (y, total), in the layout of the images."""
    generator = torch.Generator().manual_seed(5)
    num_samples, _, height, width = kwargs["x"].shape
    shapes = [(num_samples, kwargs["weight"].shape[0], height, width)]
    if "residual" in kwargs:
        shapes.append(tuple(kwargs["x"].shape))
    return [
        torch.randn(shape, generator=generator)
        .to(DEVICE, kwargs["x"].dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    ]


def run(
    function: Callable[..., Any], kwargs: dict[str, Any], gradients: list[Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The results and the gradient of every differentiable argument."""
    leaves = {name: kwargs[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE if name in kwargs}
    results = outputs(function(**{**kwargs, **leaves}))
    gradients = [gradient.to(result.dtype) for gradient, result in zip(gradients, results, strict=True)]
    grads = torch.autograd.grad(results, list(leaves.values()), gradients)
    return tuple(result.detach() for result in results), dict(zip(leaves, grads, strict=True))


def op(impl: str) -> Callable[..., Any]:
    return functools.partial(fk.group_norm_silu, impl=impl)


def dense(name: str, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def check(kwargs: dict[str, Any], impl: str = "triton") -> None:
    """Results and gradients of the kernels against the formula in float64, by the rule of all kernels."""
    gradients = upstream(kwargs)
    truth, true_grads = run(formula, in_float64(kwargs), gradients)
    base, base_grads = run(op("reference"), kwargs, gradients)
    fused, grads = run(op(impl), kwargs, gradients)
    for name, f, b, t in zip(("y", "total"), fused, base, truth, strict=False):
        assert f.is_contiguous(memory_format=torch.channels_last)
        check_close(name, f, b, dense(name, t))
    for name, grad in grads.items():
        assert grad.dtype == kwargs[name].dtype
        # What is summed over pixels and samples may all but cancel: the error goes with what is summed.
        summed = {"factor": 4.0} if name not in IMAGES else {}
        if name == "add":
            summed["scale"] = float(true_grads["x"].abs().sum((0, 2, 3)).max())
        pair = dense(name, grad), dense(name, base_grads[name])
        check_close(f"gradient of {name}", *pair, dense(name, true_grads[name]), **summed)


# ---- The reference against the formula


@pytest.mark.parametrize("variant", COMBINATIONS)
@pytest.mark.parametrize("shape", [(3, 12, 5, 3), (2, 16, 4, 4), (1, 1, 1, 1), (2, 3, 1, 7)], ids=str)
def test_reference_is_the_formula(variant: str, shape: tuple[int, int, int, int]) -> None:
    kwargs = in_float64(example(variant, shape))
    gradients = upstream(kwargs)
    expected, expected_grads = run(formula, kwargs, gradients)
    results, grads = run(op("reference"), kwargs, gradients)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["temb-residual-skip", "add-film-dropout"])
def test_gradcheck(variant: str) -> None:
    kwargs = in_float64(example(variant, (2, 4, 2, 3)))
    leaves = {name: kwargs[name].requires_grad_() for name in DIFFERENTIABLE if name in kwargs}

    def function(*values: Tensor) -> Any:
        return fk.group_norm_silu(**{**kwargs, **dict(zip(leaves, values, strict=True))}, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=False)


def test_reference_in_half_precision_rounds_once() -> None:
    for variant in ("", "film-dropout", "temb"):
        kwargs = example(variant, (2, 8, 4, 4), dtype=torch.bfloat16)
        wide = fk.group_norm_silu(**{**kwargs, "x": kwargs["x"].float()}, impl="reference")
        assert torch.equal(fk.group_norm_silu(**kwargs, impl="reference"), wide.bfloat16())


# ---- The kernels


@triton_here
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", COMBINATIONS)
@pytest.mark.usefixtures("poisoned_empty")
def test_kernels(variant: str, way: str) -> None:
    with cut_by(way):
        check(example(variant, (2, 16, 5, 7)))


@triton_here
@pytest.mark.parametrize("way", ["one pass", "two passes", "two passes in many splits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("poisoned_empty")
def test_kernels_in_half_precision(dtype: torch.dtype, way: str) -> None:
    with cut_by(way):
        for variant in ("temb-dropout", "add-residual-skip"):
            check(example(variant, (2, 16, 4, 4), dtype=dtype))


@triton_here
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", [1, 3, 4, 6, 12, 18, 36])
@pytest.mark.usefixtures("poisoned_empty")
def test_group_sizes(group: int, way: str) -> None:
    """Groups that are no powers of two, with one source and, cut across a group, with two."""
    with cut_by(way):
        check({**example("film-dropout", (2, 2 * group, 4, 4)), "num_groups": 2})
        kwargs = example("add-residual-skip", (2, 2 * group + 1, 4, 4))  # whose skip has half as many, rounded down
        if group > 1:
            kwargs["skip"] = dense("skip", F.pad(kwargs["skip"], (0, 0, 0, 0, 0, -1)))
            kwargs["weight"], kwargs["bias"] = kwargs["weight"][:-1], kwargs["bias"][:-1]
        check({**kwargs, "num_groups": kwargs["weight"].shape[0] // group})


@triton_here
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("sources", "num_first", "num_skip"), [("apart", 64, 32), ("mixed", 40, 24)])
@pytest.mark.usefixtures("poisoned_empty")
def test_two_sources(sources: str, num_first: int, num_skip: int, way: str) -> None:
    """Tiles that lie in one source each, and tiles that lie in both."""
    with cut_by(way):
        assert kernels.cut(num_first, num_skip, 16, (num_first + num_skip) // 8, 4).sizes()["SOURCES"] == sources
        kwargs = example("add-residual", (2, num_first, 4, 4))
        for name in ("weight", "bias"):
            kwargs[name] = torch.linspace(0.5, 1.5, num_first + num_skip, device=DEVICE)
        kwargs["skip"] = example("", (2, num_skip, 4, 4), seed=2)["x"]
        check({**kwargs, "num_groups": (num_first + num_skip) // 8})


@triton_here
@pytest.mark.parametrize("way", ["one pass", "two passes", "two passes in many splits"])
def test_one_group_and_a_group_for_every_channel(way: str) -> None:
    with cut_by(way):
        for num_groups in (1, 24):
            check({**example("temb-dropout", (1, 24, 3, 5)), "num_groups": num_groups})


@triton_here
@hypothesis.settings(max_examples=20, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    variant=st.sampled_from(COMBINATIONS),
    way=st.sampled_from(sorted(WAYS)),
    num_samples=st.integers(1, 2),
    num_channels=st.integers(1, 24),
    height=st.integers(1, 5),
    width=st.integers(1, 7),
    divisor=st.integers(0, 7),
    seed=st.integers(0, 2**62),
)
def test_any_shape(
    variant: str, way: str, num_samples: int, num_channels: int, height: int, width: int, divisor: int, seed: int
) -> None:
    kwargs = example(variant, (num_samples, num_channels, height, width), seed=seed)
    size = kwargs["weight"].shape[0]
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    num_groups = divisors[divisor % len(divisors)]
    hypothesis.assume(size // num_groups * height * width > 2)  # else the normalised values are a sign or 0
    with cut_by(way):
        check({**kwargs, "num_groups": num_groups})


@triton_here
def test_both_ways_agree() -> None:
    kwargs = example("film-skip-dropout", (2, 32, 6, 6))
    made = []
    for way in WAYS:
        with cut_by(way):
            made.append(run(op("triton"), kwargs, upstream(kwargs)))
    for results, grads in made[1:]:
        for one, other in zip(made[0][0], results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(made[0][1][name], grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_mask_is_that_of_dropout(impl: str) -> None:
    for shape in ((2, 16, 5, 3), (2, 6, 3, 3)):
        for way in WAYS:
            kwargs = {**example("dropout", shape), "p": 0.4}
            with cut_by(way):
                y = fk.group_norm_silu(**kwargs, impl=impl)
                (grad,) = run(op(impl), kwargs, upstream(kwargs))[1]["bias"].unsqueeze(0)
            places = {name: kwargs[name] for name in ("p", "ordinals", "layer", "seed")}
            mask = fk.dropout(torch.ones_like(y), **places, impl="reference")
            assert torch.equal(y != 0, mask != 0)
            whole = fk.group_norm_silu(**{**kwargs, "p": 0.0}, impl=impl)
            torch.testing.assert_close(y, whole * mask, rtol=1e-5, atol=1e-5)
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", ["one pass", "two passes in many splits"])
def test_a_sample_does_not_depend_on_its_batch(impl: str, way: str) -> None:
    """Bitwise, and the same in every run: results, and the gradients that are a sample's own."""
    for variant in ("film-dropout", "temb-residual-skip"):
        kwargs = example(variant, (3, 12, 5, 5))
        gradients = upstream(kwargs)
        with cut_by(way):
            results, grads = run(op(impl), kwargs, gradients)
            again, grads_again = run(op(impl), kwargs, gradients)
            assert all(map(torch.equal, results, again))
            assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
            for k in range(3):
                alone, own = run(op(impl), one_sample(kwargs, k), [g[k : k + 1] for g in gradients])
                assert all(torch.equal(whole[k : k + 1], part) for whole, part in zip(results, alone, strict=True))
                for name in set(grads) - {"weight", "bias"}:
                    assert torch.equal(grads[name][k : k + 1], own[name]), name


@pytest.mark.parametrize("way", WAYS)
@triton_here
def test_large_mean_and_small_deviation(way: str) -> None:
    """Mean 100, deviation 0.1: E[x^2] - E[x]^2 in fp32 is off by more than the variance."""
    for variant in ("", "temb", "add-residual-skip"):
        kwargs = example(variant, (2, 16, 8, 8))
        for name in ("x", "residual", "skip"):
            if name in kwargs:
                kwargs[name] = kwargs[name] * 0.1 + (50.0 if "residual" in kwargs and name != "skip" else 100.0)
        if "add" in kwargs:
            kwargs["add"] *= 0.1
        with cut_by(way):
            check(kwargs)
            y = outputs(fk.group_norm_silu(**kwargs, impl="triton"))[0]
        error = (y.double() - formula(**in_float64(kwargs))[0]).abs().max()
        assert error < 3e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_large_values_of_the_activation(impl: str) -> None:
    """Where exp overflows: silu(u) is u or 0 and its derivative 1 or 0, not NaN."""
    kwargs = example("", (1, 8, 4, 4))
    kwargs["weight"] = torch.full_like(kwargs["weight"], 1e4)
    for way in WAYS:
        with cut_by(way):
            results, grads = run(op(impl), kwargs, upstream(kwargs))
        assert all(bool(r.isfinite().all()) for r in (*results, *grads.values()))
        truth, true_grads = run(formula, in_float64(kwargs), upstream(kwargs))
        torch.testing.assert_close(results[0].double(), truth[0], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(grads["bias"].double(), true_grads["bias"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_group(impl: str) -> None:
    for way in WAYS:
        kwargs = {**example("", (2, 16, 4, 4)), "num_groups": 4}
        kwargs["x"][1, 5, 2, 2] = float("nan")
        with cut_by(way):
            y = fk.group_norm_silu(**kwargs, impl=impl)
            (_, grads) = run(op(impl), kwargs, upstream(kwargs))
        for nan in (y.isnan(), grads["x"].isnan()):
            assert bool(nan[1, 4:8].all()) and int(nan.sum()) == 4 * 16


@pytest.mark.parametrize("impl", IMPLS)
def test_no_samples(impl: str) -> None:
    kwargs = example("temb-residual-skip", (0, 8, 4, 4))
    results, grads = run(op(impl), kwargs, upstream(kwargs))
    assert results[0].shape == (0, 12, 4, 4) and results[1].shape == (0, 8, 4, 4)
    assert torch.equal(grads["weight"], torch.zeros(12, device=DEVICE)) and grads["add"].shape == (0, 8)


@pytest.mark.parametrize("impl", [*IMPLS, "native"])
@pytest.mark.parametrize("way", ["one pass", "two passes in many splits"])
@pytest.mark.usefixtures("poisoned_empty")
def test_no_pixels(impl: str, way: str) -> None:
    """Sums over no pixels are 0, not what the memory held."""
    if impl == "native" and (DEVICE != "cpu" or native.native_available() is not None):
        pytest.skip("needs a CPU and a C++ compiler")
    for variant in ("temb-residual-skip", "film-dropout", "add"):
        for height, width in ((0, 4), (4, 0)):
            kwargs = example(variant, (2, 8, height, width))
            with cut_by(way):
                _, grads = run(op(impl), kwargs, upstream(kwargs))
            for name, grad in grads.items():
                assert torch.equal(grad, torch.zeros_like(kwargs[name])), name


@triton_here
@pytest.mark.parametrize("way", WAYS)
def test_equal_values_have_no_negative_variance(way: str) -> None:
    """What rounding leaves of the deviations of equal values is their mean: less its square, less than 0 at times."""
    x = torch.linspace(1e4, 1e7, 64, device=DEVICE)[:, None, None, None].expand(-1, 6, 5, 7)
    rows = torch.ones(6, device=DEVICE)
    with cut_by(way):
        y = fk.group_norm_silu(dense("x", x), rows, rows, 2, 1e-12, impl="triton")
    assert bool(y.isfinite().all())


@triton_here
@pytest.mark.parametrize("way", WAYS)
def test_an_offset_that_is_not_finite_stays_in_its_group(way: str) -> None:
    """Groups of 3 in tiles of 4 channels: the fourth is the neighbour's."""
    for value in (float("nan"), float("inf")):
        kwargs = {**example("add", (2, 9, 3, 3)), "num_groups": 3}
        kwargs["add"][3] = value
        with cut_by(way):
            results, grads = run(op("triton"), kwargs, upstream(kwargs))
        for image in (results[0], grads["x"]):
            assert bool(image[:, [0, 1, 2, 6, 7, 8]].isfinite().all()) and not bool(image[:, 3:6].isfinite().any())


# ---- Where tensors lie


class Recorder:
    """A kernel that notes the tensors it is given by the names of its arguments."""

    def __init__(self, kernel: Any, given: list[tuple[str, Tensor]]) -> None:
        self.kernel, self.given = kernel, given

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = zip(self.kernel.arg_names, args, strict=False)
            self.given.extend((name, value) for name, value in named if isinstance(value, Tensor))
            self.kernel[grid](*args, **kwargs)

        return launch


def misplaced(x: Tensor) -> Tensor:
    """A copy that starts one element after a multiple of 16 bytes."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].as_strided(x.shape, x.stride()).copy_(x)


@triton_here
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wherever_tensors_lie_kernels_see_one_alignment(
    dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would be compiled again, perhaps within a CUDA graph's capture, and add up in another order."""
    given: list[tuple[str, Tensor]] = []
    launched = [name for name in vars(kernels) if name.endswith("_kernel")]
    for name in launched:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), given))
    for variant in ("temb-residual-skip", "film-skip-dropout"):
        kwargs = example(variant, (1, 6, 3, 5), dtype=dtype)  # no multiple of 16 bytes, whatever is cut off
        moved = {name: misplaced(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        with cut_by(way):
            expected, expected_grads = run(op("triton"), kwargs, upstream(kwargs))
            results = outputs(fk.group_norm_silu(**moved, impl="triton"))
            leaves = {name: moved[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in moved}
            grads = torch.autograd.grad(
                outputs(fk.group_norm_silu(**{**moved, **leaves}, impl="triton")),
                list(leaves.values()),
                [misplaced(gradient) for gradient in upstream(kwargs)],
            )
        assert all(map(torch.equal, results, expected))
        assert all(torch.equal(grad, expected_grads[name]) for name, grad in zip(leaves, grads, strict=True))
    assert {name for name, x in given if x.data_ptr() % 16} == set(kernels.ANY_ALIGNMENT)


# ---- Gradients' forms


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients_of_any_layout(impl: str) -> None:
    """NCHW, a slice of channels and an expanded scalar give what dense channels_last ones give."""
    kwargs = example("temb-residual-skip", (2, 8, 3, 4))
    plain = [gradient.contiguous() for gradient in upstream(kwargs)]
    sliced = [torch.cat((g, g), 1)[:, : g.shape[1]] for g in upstream(kwargs)]
    expanded = [g.flatten()[0].expand(g.shape) for g in upstream(kwargs)]
    _, expected = run(op(impl), kwargs, upstream(kwargs))
    for gradients in (plain, sliced):
        _, grads = run(op(impl), kwargs, gradients)
        assert all(torch.equal(grads[name], expected[name]) for name in grads)
    _, expected = run(op(impl), kwargs, [dense("", g.clone()) for g in expanded])
    _, grads = run(op(impl), kwargs, expanded)
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_used(impl: str, used: int) -> None:
    kwargs = example("temb-residual-skip", (2, 8, 3, 4))
    wide = in_float64(kwargs)
    for arguments in (kwargs, wide):
        for name in DIFFERENTIABLE:
            if name in arguments:
                arguments[name].requires_grad_()
    names = [name for name in DIFFERENTIABLE if name in kwargs]
    gradient = upstream(kwargs)[used]
    result = fk.group_norm_silu(**kwargs, impl=impl)[used]
    grads = torch.autograd.grad(result, [kwargs[name] for name in names], gradient, allow_unused=True)
    truths = torch.autograd.grad(
        formula(**wide)[used], [wide[name] for name in names], gradient.double(), allow_unused=True
    )
    for name, grad, truth in zip(names, grads, truths, strict=True):
        expected = torch.zeros_like(wide[name]) if truth is None else truth
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_have_their_tensors_dtype(impl: str) -> None:
    kwargs = example("temb-film-residual-skip", (2, 8, 4, 4), dtype=torch.bfloat16)
    for name, dtype in (("weight", torch.bfloat16), ("add", torch.float16), ("scale", torch.bfloat16)):
        kwargs[name] = kwargs[name].to(dtype)
    _, grads = run(op(impl), kwargs, upstream(kwargs))
    for name, grad in grads.items():
        assert grad.dtype == kwargs[name].dtype and grad.shape == kwargs[name].shape
    check(kwargs, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_alone_get_gradients(impl: str) -> None:
    """Frozen inputs, and one leaf at a time: what is not asked for is not made."""
    kwargs = example("temb-film-residual-skip", (2, 8, 4, 4))
    gradients = upstream(kwargs)
    _, expected = run(op(impl), kwargs, gradients)
    for name in DIFFERENTIABLE:
        leaf = kwargs[name].detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(fk.group_norm_silu(**{**kwargs, name: leaf}, impl=impl), leaf, gradients)
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl: str) -> None:
    kwargs = example("", (1, 4, 2, 2))
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fk.group_norm_silu(**kwargs, impl=impl).sum(), kwargs["x"], create_graph=True)


# ---- PyTorch's machinery


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    for variant in ("", "temb-residual-skip", "film-dropout"):
        kwargs = example(variant, (2, 4, 2, 3))
        for name in DIFFERENTIABLE:
            if name in kwargs:
                kwargs[name].requires_grad_()
        tensors = [kwargs.get(name) for name in (*DIFFERENTIABLE, "ordinals")]
        threshold = round(65536 * kwargs.get("p", 0.0))
        torch.library.opcheck(
            _group_norm_silu_op, (*tensors, kwargs["num_groups"], 1e-5, True, threshold, 0x1504, 7, impl)
        )


@pytest.mark.parametrize("variant", ["temb-dropout", "film-residual-skip-dropout"])
def test_compiles_as_one_graph(variant: str) -> None:
    impl = "triton" if DEVICE == "cuda" else "reference"  # whether Triton interprets is not traceable
    kwargs = example(variant, (2, 8, 4, 6))
    compiled = torch.compile(op(impl), fullgraph=True, backend="aot_eager", dynamic=False)
    gradients = upstream(kwargs)
    results, grads = run(op(impl), kwargs, gradients)
    traced, traced_grads = run(compiled, kwargs, gradients)
    for eager, other in zip(results, traced, strict=True):
        assert torch.equal(eager, other) and eager.stride() == other.stride()
    assert all(torch.equal(grads[name], traced_grads[name]) for name in grads)
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", IMPLS)
def test_in_a_network_of_convolutions(impl: str) -> None:
    """The layouts that convolutions make and want: no layout is refused on the way, forward or backward."""
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1)
    network = torch.nn.ModuleList((first, second)).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)

    def loss(norm: Callable[..., Any]) -> Tensor:
        hidden = first(x)
        y = outputs(norm(hidden, weight, torch.zeros_like(weight), 2, 1e-5))[0]
        y, total = norm(second(y), weight, torch.zeros_like(weight), 2, 1e-5, residual=hidden)
        return (y.square() + total).sum()

    parameters = [weight, *network.parameters()]
    expected = torch.autograd.grad(loss(formula), parameters)
    for grad, truth in zip(torch.autograd.grad(loss(op(impl)), parameters), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-3, atol=1e-3)


# ---- How it is cut


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((128, 0, 32, 32, 2), (True, 16)),  # one whole sector
        ((256, 0, 16, 16, 2), (True, 32)),
        ((512, 0, 16, 16, 2), (True, 32)),
        ((256, 0, 4, 4, 2), (True, 256)),
        ((256, 128, 32, 32, 2), (False, 64)),  # groups of 12: 48 channels of 1024 pixels do not fit
        ((192, 0, 64, 64, 2), (False, 64)),
        ((576, 0, 16, 16, 2), (False, 64)),  # groups of 18: only 72 channels are whole vectors
        ((512, 256, 8, 8, 2), (True, 120)),
        ((1152, 0, 8, 8, 2), (True, 72)),
    ],
)
def test_cuts_of_the_nets_shapes(shape: tuple[int, int, int, int, int], expected: tuple[bool, int]) -> None:
    num_first, num_skip, height, width, item_bytes = shape
    pieces = kernels.cut(num_first, num_skip, height * width, 32, item_bytes)
    assert (pieces.one_pass, pieces.BUNDLE) == expected


def test_cuts_cover_everything_and_fit() -> None:
    # The last ones: 32 groups of 3, 5, 6, 9, 31, 33 and 35.
    for num_channels in (1, 3, 8, 32, 576, 1152, 1728, 96, 160, 192, 288, 992, 1056, 1120):
        for num_skip in (0, 5, 192):
            channels = num_channels + num_skip
            for num_groups in {1, channels, *(g for g in (8, 16, 32) if channels % g == 0)}:
                for plane in (1, 8, 16, 35, 64, 1024, 4096, 65536):
                    pieces = kernels.cut(num_channels, num_skip, plane, num_groups, 2)
                    assert channels <= pieces.TILES * pieces.BUNDLE and pieces.BUNDLE <= pieces.CHANNELS
                    assert plane <= pieces.SPLITS * pieces.BLOCKS * pieces.ROWS
                    assert plane > (pieces.SPLITS - 1) * pieces.BLOCKS * pieces.ROWS, "a split without rows"
                    assert pieces.ROWS * pieces.CHANNELS <= kernels.ONE_PASS_ELEMENTS
                    merge = pieces.merge()
                    assert merge["PADDED_SPLITS"] * merge["CHANNELS"] <= 2 * kernels.ONE_PASS_ELEMENTS
                    assert merge["BUNDLE"] % pieces.GROUP == 0
                    assert compared(merge) <= 4096
                    if pieces.one_pass:
                        assert pieces.BUNDLE % pieces.GROUP == 0 and pieces.SPLITS == 1
                        assert compared({**pieces.groups(), "CHANNELS": pieces.CHANNELS}) <= 4096


def compared(sizes: dict[str, Any]) -> int:
    """Elements of the comparison by which a tile's sums are spread over its groups."""
    if sizes["BUNDLE"] == sizes["GROUP"] or sizes["FOLD"] == sizes["GROUP"]:
        return 0
    return (sizes["CHANNELS"] // sizes["FOLD"]) ** 2


def test_a_cut_is_made_once() -> None:
    """The search over bundles takes up to milliseconds of Python, at every call."""
    first = kernels.cut(1152, 0, 64, 32, 2)
    assert kernels.cut(1152, 0, 64, 32, 2) is first
    x = torch.empty(1, 24, 7, 9).contiguous(memory_format=torch.channels_last)
    assert kernels._cut_of(x, None, 3) is kernels._cut_of(x, None, 3)


@triton_here
def test_a_sample_too_large_is_named() -> None:
    with pytest.raises(ValueError, match=r"too large for the kernels: the limit is 2\^30"):
        kernels.cut(2**10, 0, 2**20 + 1, 1, 2)


# ---- What is refused


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    """name: (change to an example of 8 + 4 channels, error, what the message says)."""
    image = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    rows = torch.zeros(2, 12)
    return {
        "nchw": ({"x": torch.zeros(2, 8, 4, 4)}, ValueError, r"x is contiguous NCHW: call x.contiguous\(memory_format"),
        "residual nchw": ({"residual": torch.zeros(2, 8, 4, 4)}, ValueError, "residual is contiguous NCHW"),
        "slice": ({"x": torch.cat((image, image), 1)[:, :8]}, ValueError, "x is a view with strides"),
        "x": ({"x": torch.zeros(2, 8, 4)}, ValueError, r"x must be \[N, C, H, W\]"),
        "integers": ({"x": image.long()}, ValueError, "x must be float32"),
        "groups": ({"num_groups": 5}, ValueError, "num_groups=5 does not divide the 12 channels"),
        "no groups": ({"num_groups": 0}, ValueError, "num_groups=0 does not divide"),
        "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
        "weight": ({"weight": torch.ones(8)}, ValueError, r"weight must have shape \[12\], got \[8\]"),
        "bias": ({"bias": torch.ones(12, dtype=torch.int64)}, ValueError, "bias must be floating point"),
        "add": ({"add": torch.ones(12)}, ValueError, r"add must have shape \[8\] or \[2, 8\], got \[12\]"),
        "residual": ({"residual": image[:1]}, ValueError, "residual must have shape"),
        "residual dtype": ({"residual": image.bfloat16()}, ValueError, "residual must have x's dtype"),
        "skip": ({"skip": image[:, :4, :2]}, ValueError, "skip must have shape"),
        "skip dtype": ({"skip": image[:, :4].half()}, ValueError, "skip must have x's dtype"),
        "scale alone": ({"scale": rows}, ValueError, "scale without shift"),
        "shift alone": ({"shift": rows}, ValueError, "shift without scale"),
        "scale": ({"scale": rows[:, :8], "shift": rows}, ValueError, "scale must have shape"),
        "p": ({"p": 1.0}, ValueError, "must be in"),
        "p without ordinals": ({"p": 0.1}, ValueError, "p=0.1 needs ordinals"),
        "ordinals": ({"p": 0.1, "ordinals": torch.zeros(3, dtype=torch.int64)}, ValueError, "ordinals must have shape"),
        "layer": ({"layer": -1}, ValueError, "layer"),
        "seed": ({"seed": -1}, ValueError, "seed must be in"),
        "device": ({"weight": torch.ones(12, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
        "impl": ({"impl": "cuda"}, ValueError, "use one of triton, reference"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name: str) -> None:
    change, error, message = bad_calls()[name]
    kwargs = GROUP_NORM_SILU.example(replace(Case((2, 8, 4, 4)), variant="skip"))
    with pytest.raises(error, match=message):
        fk.group_norm_silu(**{**kwargs, **change})


def bad_backward_calls() -> dict[str, tuple[dict[str, Any], str]]:
    """name: (change to an example of 8 + 4 channels in 4 groups, what the message says)."""
    image, rows = torch.zeros(2, 12, 4, 4), torch.zeros(2, 4)
    return {
        "nchw": ({"x": image[:, :8].contiguous()}, "x is contiguous NCHW"),
        "skip nchw": ({"skip": image[:, :4].contiguous()}, "skip is contiguous NCHW"),
        "skip": ({"skip": image[:1, :4]}, "skip must have shape"),
        "weight": ({"weight": torch.ones(8)}, r"weight must have shape \[12\]"),
        "dy": ({"dy": image[:, :8]}, r"dy must have shape \[2, 12, 4, 4\] to go with x"),
        "dy dtype": ({"dy": image.half()}, "dy must have x's dtype"),
        "dtotal": ({"dtotal": image}, r"dtotal must have shape \[2, 8, 4, 4\]"),
        "mean": ({"mean": rows[:, :3]}, r"mean must have shape \[2, 4\], got \[2, 3\]"),
        "mean of a batch": ({"mean": rows[:1]}, r"mean must have shape \[2, 4\]"),
        "rstd": ({"rstd": rows.flatten()}, r"rstd must have shape \[2, 4\]"),
        "rstd dtype": ({"rstd": rows.bfloat16()}, "rstd must be float32, as the forward makes it"),
        "rstd integers": ({"rstd": rows.long()}, "rstd must be floating point"),
        "device": ({"mean": torch.zeros(2, 4, device="meta")}, "mean is on meta but x is on cpu"),
        "p": ({"p": 0.1}, "p=0.1 needs ordinals"),
    }


@pytest.mark.parametrize("name", bad_backward_calls())
def test_bad_arguments_of_the_backward_are_named(name: str) -> None:
    change, message = bad_backward_calls()[name]
    kwargs = GROUP_NORM_SILU_BACKWARD.example(Case((2, 8, 4, 4), variant="skip"))
    fk.group_norm_silu_backward(**kwargs)
    with pytest.raises(ValueError, match=message):
        fk.group_norm_silu_backward(**{**kwargs, **change})


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_takes_statistics_of_any_layout(impl: str) -> None:
    kwargs = GROUP_NORM_SILU_BACKWARD.example(Case((3, 8, 4, 4), device=DEVICE))
    expected = fk.group_norm_silu_backward(**kwargs, impl=impl)
    for name in ("mean", "rstd"):
        kwargs[name] = kwargs[name].t().contiguous().t()
    assert all(map(torch.equal, fk.group_norm_silu_backward(**kwargs, impl=impl), expected))


@triton_here
def test_float64_is_for_the_reference() -> None:
    with pytest.raises(ValueError, match="float64 is for impl='reference'"):
        fk.group_norm_silu(**in_float64(example("", (1, 4, 2, 2))), impl="triton")
    with pytest.raises(ValueError, match="float64 is for impl='reference'"):
        kwargs = GROUP_NORM_SILU_BACKWARD.example(Case((1, 4, 2, 2), device=DEVICE))
        fk.group_norm_silu_backward(**{**kwargs, "mean": kwargs["mean"].double()}, impl="triton")


def test_layouts_that_are_both_are_taken() -> None:
    for shape in ((2, 6, 1, 1), (2, 1, 3, 4)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        weight = torch.ones(shape[1], device=DEVICE)
        y = fk.group_norm_silu(x, weight, weight, 1, 1e-5, impl="triton" if DEVICE == "cuda" else "reference")
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = formula(x.double(), weight.double(), weight.double(), 1, 1e-5)[0]
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
        assert grad.shape == x.shape


# torch's own operators, the default off the GPU


@pytest.mark.parametrize("given", ["nothing", "add", "residual", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_aten_at_mean_100_and_deviation_one_tenth(dtype: torch.dtype, given: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def image(mean: float) -> Tensor:
        x = mean + 0.1 * torch.randn(2, 16, 8, 8, generator=generator)
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    weight, bias = torch.rand(32 if given == "skip" else 16, generator=generator), torch.zeros(1)
    kwargs: dict[str, Any] = {"skip": image(100)} if given == "skip" else {}
    if given in ("add", "residual"):
        kwargs = {"add": torch.full((2, 16), 90.0)} if given == "add" else {"residual": image(90)}
    arguments = (image(10 if kwargs and given != "skip" else 100), weight, bias.expand(len(weight)), 8, 1e-5)
    results = [fk.group_norm_silu(*arguments, impl=impl, **kwargs) for impl in ("aten", "reference")]
    got, truth = (r[0] if isinstance(r, tuple) else r for r in results)
    # 16-bit sums of 10 and 90 are on a grid that hides the spread: only what both saw can be compared.
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(got.float(), truth.float(), rtol=tolerance, atol=tolerance)


def test_aten_for_parameters_alone_nan_no_pixels_and_hardly_any_dropout() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    fk.group_norm_silu(x, weight, bias, 4, 1e-5, impl="aten").sum().backward()
    assert weight.grad is not None and bias.grad is not None and bool(weight.grad.any())
    empty = torch.empty(2, 8, 0, 4, memory_format=torch.channels_last)
    with torch.no_grad():
        assert fk.group_norm_silu(x, weight, bias, 4, 1e-5, p=1e-6, impl="aten").isfinite().all()
        assert fk.group_norm_silu(empty, weight, bias, 4, 1e-5, impl="aten").shape == (2, 8, 0, 4)
        x[1, 3, 2, 2] = float("nan")
        y = fk.group_norm_silu(x, weight, bias, 4, 1e-5, impl="aten")
    assert y[1, 2:4].isnan().all() and y[0].isfinite().all()


@triton_here
@pytest.mark.parametrize("with_residual", [False, True])
def test_an_offset_does_not_reach_statistics_through_lanes_outside_the_plane(with_residual: bool) -> None:
    """A 3x3 plane fills 9 of 16 rows; x + add has mean 0 and deviation 0.1, where the other rows hold add alone."""
    generator = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(2, 12, 3, 3, generator=generator) - 100.0).contiguous(memory_format=torch.channels_last)
    kwargs: dict[str, Any] = {"add": torch.full((2, 12), 100.0)}
    if with_residual:
        kwargs["residual"] = torch.zeros_like(x)
    arguments = (x.to(DEVICE), torch.ones(12, device=DEVICE), torch.zeros(12, device=DEVICE), 4, 1e-6)
    kwargs = {name: value.to(DEVICE) for name, value in kwargs.items()}
    got, truth = (fk.group_norm_silu(*arguments, impl=impl, **kwargs) for impl in ("triton", "reference"))
    if with_residual:
        got, truth = got[0], truth[0]
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
