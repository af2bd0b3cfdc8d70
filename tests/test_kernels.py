"""The kernels against their references, from the table of ops: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_checks import (
    DEVICE,
    FAST_USUAL,
    FAST_WORST,
    check_close,
    check_op,
    in_float64,
    of_tensors,
    one_sample,
    outputs,
)

import fastddpm_kernels as fk
from fastddpm_kernels import OPS, Case, Op, Stream, launch, philox

triton_here = pytest.mark.skipif(not fk.HAS_TRITON, reason="needs triton")
IMPLS = ["reference", pytest.param("triton", marks=triton_here)]
FORMATS = [pytest.param(False, id="nchw"), pytest.param(True, id="nhwc")]
VARIANTS = [pytest.param(op, variant, id=f"{op.name}-{variant}") for op in OPS.values() for variant in op.variants]
TYPED = [
    pytest.param(op, variant, dtype, id=f"{op.name}-{variant}-{str(dtype)[6:]}")
    for op in OPS.values()
    for variant in op.variants
    for dtype in op.dtypes
]
# One element; odd; whole groups of 8 pixels; whole groups of 4 with many channels; channels beyond the groups.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 3, 4, 8), (2, 12, 2, 4), (1, 20, 2, 4)]

# Golden values of the layout: seed 1234, sample 7, c2 = 3, c3 = 1, quads 0 and 1.
GOLDEN_WORDS = [[0xD2190375, 0xD7BE9C29, 0xE2E76FD1, 0x59DD4F40], [0xF343D160, 0xA9FC8ED9, 0x6142B7DA, 0x6AEC473F]]
GOLDEN_NORMALS = [
    [0.34597925, -0.52488841, -0.29130756, 0.39552536],
    [-0.16432418, -0.27395327, -1.20920664, 0.68803043],
]

# Golden values of a plain step: seed 1234, image 7, step 0.
GOLDEN_STEP = [0.69693208, -0.97090203, 0.23654932, 1.62749326]


# ---- The addresses and the words


def test_random123_known_answers() -> None:
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for seed, counter, words in (
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (ones, ones, ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(w):08x}" for w in fk.philox_words(seed, *counter)) == words


def test_grid_of_words_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references' work-horse, by numpy and by torch alone."""
    quads, c1, c2 = torch.arange(2**32 - 9, 2**32), torch.randint(2**32, (7,)), torch.randint(2**32, (7,))
    w0, w1, w2, w3 = (w.flatten() for w in fk.philox_words(2**61 + 5, quads, c1[:, None], c2[:, None], 0x904))
    for module in (philox.numpy, None):
        monkeypatch.setattr(philox, "numpy", module)
        even, odd = philox.philox_grid(philox.split_seed(2**61 + 5), quads, c1, c2, 0x904)
        assert even.shape[1] % philox.PAD == 0
        assert torch.equal(even[:, :63], torch.stack((w0, w2))) and torch.equal(odd[:, :63], torch.stack((w3, w1)))


def test_golden_words() -> None:
    words = fk.philox_words(1234, torch.arange(2), 7, 3, 1)
    assert torch.stack(words, 1).tolist() == GOLDEN_WORDS


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_normals(impl: str) -> None:
    ordinals = torch.tensor([7], device=DEVICE)
    kwargs: dict[str, Any] = {"shape": (1, 2, 4), "seed": 1234, "stream": Stream.EPS}
    by_step = fk.draw_normal(ordinals, step=3, impl=impl, **kwargs)
    by_ordinal = fk.draw_normal(ordinals + (3 << 32), impl=impl, **kwargs)
    assert torch.equal(by_step, by_ordinal)
    torch.testing.assert_close(by_step[0, 0].cpu(), torch.tensor(GOLDEN_NORMALS), atol=2e-5, rtol=0)


def test_stream_layout_is_frozen() -> None:
    assert fk.STREAM_VERSION == 0
    names = ("EPS", "TIMESTEP", "FLIP", "DROPOUT", "X_T", "Z", "OFFSET", "LABEL", "SELF_CONDITION", "AUGMENT")
    assert [(s.name, int(s)) for s in Stream] == list(
        zip((*names, "RENOISE", "BOUND", "PROBE"), range(1, 14), strict=True)
    )
    assert fk.stream_tag(Stream.DROPOUT, 0x1234) == 0x123404
    for kind, layer in ((256, 0), (1, 65536), (1, -1)):
        with pytest.raises(ValueError, match="stream kind"):
            fk.stream_tag(kind, layer)


@pytest.mark.parametrize("impl", IMPLS)
def test_timesteps_and_flips_are_at_their_addresses(impl: str) -> None:
    ordinals = torch.tensor([0, 1, 2**32 + 5, 2**62 + 2**33 + 9], device=DEVICE)
    c1, c2 = ordinals.cpu() & 0xFFFFFFFF, ordinals.cpu() >> 32
    for num_timesteps in (1, 1000, 2**31):
        t, flip = fk.draw_timesteps(ordinals, num_timesteps, seed=2**62 + 1, impl=impl)
        assert t.tolist() == ((fk.philox_words(2**62 + 1, 0, c1, c2, 2)[0] * num_timesteps) >> 32).tolist()
        assert flip.tolist() == (fk.philox_words(2**62 + 1, 0, c1, c2, 3)[0] >> 31).bool().tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_mask_is_at_its_addresses(impl: str) -> None:
    ordinals, (c, h, w), p = torch.tensor([3, 2**40], device=DEVICE), (3, 5, 7), 0.3
    y = fk.dropout(torch.ones(2, c, h, w, device=DEVICE), p, ordinals, layer=9, seed=11, impl=impl).cpu()
    elements = torch.arange(c * h * w)
    words = torch.stack(
        fk.philox_words(
            11, elements // 8, (ordinals.cpu() & 0xFFFFFFFF)[:, None], (ordinals.cpu() >> 32)[:, None], 0x904
        )
    )
    word = words.gather(0, (elements % 8 // 2).expand(1, 2, -1))[0]
    half = torch.where(elements % 2 == 0, word & 0xFFFF, word >> 16)
    keep = (half >= round(p * 65536)).view(2, h, w, c).permute(0, 3, 1, 2)
    assert torch.equal(y != 0, keep)
    assert torch.equal(y[keep], torch.full_like(y[keep], 65536 / (65536 - round(p * 65536))))


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_format_changes_no_value(impl: str) -> None:
    kwargs: dict[str, Any] = {"shape": (3, 4, 8), "seed": 5, "stream": Stream.X_T, "impl": impl}
    ordinals = torch.arange(2, device=DEVICE)
    plain, last = (fk.draw_normal(ordinals, channels_last=x, **kwargs) for x in (False, True))
    assert torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)
    flat = fk.draw_normal(ordinals, **{**kwargs, "shape": (1, 1, 96)}).view(2, 4, 8, 3).permute(0, 3, 1, 2)
    assert torch.equal(plain, flat), "elements are counted in H, W, C order"


@pytest.mark.parametrize("impl", IMPLS)
def test_uniforms_are_at_their_addresses(impl: str) -> None:
    """(word k of quad q >> 8) 2^-24 is element 4 q + k, exactly, also of long rows and high words of the ordinal."""
    ordinals = torch.tensor([0, 5, 2**32 + 5, 2**62 + 2**33 + 9], device=DEVICE)
    c1, c2 = ordinals.cpu()[:, None] & 0xFFFFFFFF, ordinals.cpu()[:, None] >> 32
    for num in (1, 4, 10, 33001):
        words = fk.philox_words(2**62 + 1, torch.arange(-(-num // 4)), c1, c2, int(Stream.AUGMENT))
        expected = (torch.stack(words, -1).flatten(1)[:, :num] >> 8).double() * 2.0**-24
        made = fk.draw_uniform(ordinals, num, seed=2**62 + 1, stream=Stream.AUGMENT, impl=impl)
        assert made.dtype == torch.float32 and torch.equal(made.cpu().double(), expected)


# ---- Every op against its reference


@triton_here
@pytest.mark.parametrize("channels_last", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
@pytest.mark.usefixtures("poisoned_empty")
def test_triton_agrees_with_reference(
    op: Op, variant: str, shape: tuple[int, int, int, int], channels_last: bool
) -> None:
    check_op(op, Case(shape, op.dtypes[0], channels_last, DEVICE, variant))


@triton_here
@pytest.mark.parametrize(("op", "variant", "dtype"), [p for p in TYPED if p.values[2] != torch.float32])
@pytest.mark.usefixtures("poisoned_empty")
def test_triton_agrees_in_half_precision(op: Op, variant: str, dtype: torch.dtype) -> None:
    check_op(op, Case((2, 3, 4, 8), dtype, True, DEVICE, variant))


@triton_here
@pytest.mark.parametrize("channels_last", FORMATS)
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
@pytest.mark.usefixtures("poisoned_empty")
def test_many_tiles(monkeypatch: pytest.MonkeyPatch, op: Op, variant: str, channels_last: bool) -> None:
    """Small tiles, so that several passes, unrolled groups and a ragged end are run."""
    monkeypatch.setattr(launch, "INTERPRETER_GROUPS", 2)
    monkeypatch.setattr(launch, "ELEMENTS_PER_PASS", 24)
    monkeypatch.setattr(launch, "ELEMENTS_PER_THREAD", 48)
    check_op(op, Case((2, 3, 5, 8), op.dtypes[0], channels_last, DEVICE, variant))


@triton_here
@hypothesis.settings(max_examples=12, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    op=st.sampled_from(sorted(OPS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.sampled_from((1, 2, 3, 4, 6, 8, 12))),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**62),
)
def test_any_shape(op: str, shape: tuple[int, int, int, int], channels_last: bool, seed: int) -> None:
    for variant in OPS[op].variants:
        check_op(OPS[op], Case(shape, OPS[op].dtypes[0], channels_last, DEVICE, variant, seed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
@pytest.mark.usefixtures("poisoned_empty")
def test_runs_are_equal_and_samples_independent(op: Op, variant: str, impl: str) -> None:
    """Bitwise: twice the same, and sample k alone is sample k of the batch."""
    kwargs = {**op.example(Case((3, 3, 5, 6), op.dtypes[0], True, DEVICE, variant)), "impl": impl}
    batch = outputs(op.public(**kwargs))
    for first, second in zip(batch, outputs(op.public(**kwargs)), strict=True):
        assert torch.equal(first, second)
    for k in range(3):
        for whole, alone in zip(batch, outputs(op.public(**one_sample(kwargs, k))), strict=True):
            assert torch.equal(whole[k : k + 1], alone)


@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_reference_does_not_depend_on_the_batch_at_chunk_edges(op: Op, variant: str) -> None:
    """The references cut their work into chunks and vectors; neither may show in the result."""
    kwargs = {**op.example(Case((37, 3, 31, 33), op.dtypes[0], True, DEVICE, variant)), "impl": "reference"}
    batch = outputs(op.public(**kwargs))
    for k in (0, 10, 36):
        for whole, alone in zip(batch, outputs(op.public(**one_sample(kwargs, k))), strict=True):
            assert torch.equal(whole[k : k + 1], alone)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_inputs_with_gaps(op: Op, variant: str, impl: str) -> None:
    """Sliced inputs give what dense copies of them give, in either order of axes."""
    if op.name.startswith("group_norm_silu"):
        pytest.skip("takes dense channels_last images only")
    for channels_last in (False, True):
        wide = op.example(Case((4, 3, 6, 16), op.dtypes[0], channels_last, DEVICE, variant))
        sliced, dense = dict(wide, impl=impl), dict(wide, impl=impl)
        kept = torch.channels_last if channels_last else torch.contiguous_format
        for name, value in wide.items():
            if name in PER_SAMPLE_IMAGES:
                sliced[name] = of_tensors(lambda x: x[::2, :, 1:, ::2], value)
                dense[name] = of_tensors(lambda x: x.clone(memory_format=kept), sliced[name])  # noqa: B023
            elif isinstance(value, torch.Tensor) and value.shape[:1] == (4,):
                sliced[name] = value[::2]
                dense[name] = sliced[name].clone()
        if op.name == "draw_normal":
            continue
        for a, b in zip(outputs(op.public(**sliced)), outputs(op.public(**dense)), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


PER_SAMPLE_IMAGES = ("x_0", "prediction", "x_t", "x", "history", "guide", "variance", "noise")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_no_samples(op: Op, variant: str, impl: str) -> None:
    for result in outputs(op.public(**op.example(Case((0, 3, 4, 4), variant=variant, device=DEVICE)), impl=impl)):
        assert result.shape[0] == 0


@triton_here
def test_prediction_and_images_in_different_orders() -> None:
    kwargs = OPS["diffusion_loss_and_grad"].example(Case((2, 3, 4, 8), device=DEVICE, variant="v-flip-weighted"))
    plain = fk.diffusion_loss_and_grad(**kwargs, impl="triton")
    kwargs["x_0"] = kwargs["x_0"].contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, plain, fk.diffusion_loss_and_grad(**kwargs, impl="triton")))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_the_network_is_not_hidden(impl: str) -> None:
    kwargs = OPS["reverse_step"].example(Case((1, 3, 4, 4), device=DEVICE, variant="with_x_0"))
    kwargs["prediction"][0, 1, 2, 3] = float("nan")
    for result in fk.reverse_step(**kwargs, impl=impl):
        assert int(result.isnan().sum()) == 1 and bool(result[0, 1, 2, 3].isnan())


# ---- Gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", OPS["diffusion_loss"].variants)
@pytest.mark.parametrize("channels_last", FORMATS)
def test_loss_gradient(impl: str, variant: str, channels_last: bool) -> None:
    """By autograd with a random upstream gradient, and by the op that makes it in the same pass."""
    kwargs = OPS["diffusion_loss"].example(
        Case((3, 3, 5, 6), channels_last=channels_last, device=DEVICE, variant=variant)
    )
    upstream = torch.randn(3, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def grad_of(function: Any, arguments: dict[str, Any]) -> torch.Tensor:
        prediction = arguments["prediction"].detach().clone().requires_grad_()
        losses = function(**{**arguments, "prediction": prediction})
        (grad,) = torch.autograd.grad(losses, prediction, upstream.to(losses.dtype))
        return grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    grad = grad_of(lambda **k: fk.diffusion_loss(**k, impl=impl), kwargs)
    base = grad_of(fk.diffusion_loss_reference, kwargs)
    check_close("autograd", grad, base, grad_of(fk.diffusion_loss_reference, in_float64(kwargs)))

    weights = kwargs.get("weights", torch.ones(3, device=DEVICE))
    scaled = {**kwargs, "weights": weights * upstream}
    losses, direct = fk.diffusion_loss_and_grad(**scaled, grad_scale=torch.tensor(1.0, device=DEVICE), impl=impl)
    check_close("one pass", direct, grad, grad_of(fk.diffusion_loss_reference, in_float64(kwargs)))
    assert not direct.requires_grad and not losses.requires_grad
    by_float = fk.diffusion_loss_and_grad(**scaled, grad_scale=1.0, impl=impl)[1]
    assert torch.equal(by_float, direct)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_gradient(impl: str) -> None:
    kwargs = OPS["dropout"].example(Case((2, 3, 5, 7), channels_last=True, device=DEVICE, variant="p=0.5"))
    x = kwargs["x"].requires_grad_()
    y = fk.dropout(**kwargs, impl=impl)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, torch.where(y != 0, upstream * 2.0, torch.zeros_like(upstream)))
    assert grad.stride() == x.stride()
    assert fk.dropout(x, 0.0, kwargs["ordinals"], layer=0, seed=0) is x


# ---- The reverse step and the losses against their formulas


def assert_same(x: Any, y: Any) -> None:
    """Bitwise on a CPU; a GPU's compiler may fuse a multiply-add of one variant's kernel and not of another's."""
    torch.testing.assert_close(x, y, rtol=0.0, atol=0.0 if DEVICE == "cpu" else 1e-6)


def step_by_definition(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The reverse step as its module's docstring has it, in float64: x_next, x_0_hat and the next history."""
    row = dict(zip(fk.REVERSE_COLUMNS, kwargs["coefficients"].double()[int(kwargs["row"])].tolist(), strict=True))
    x, prediction = kwargs["x_t"].double(), kwargs["prediction"].double()
    h1, h2 = (*(h.double() for h in kwargs.get("history", ())), 0.0, 0.0)[:2]
    if "guide" in kwargs:
        guide = kwargs["guide"].double()
        prediction = guide + row["W"] * (prediction - guide)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    z = kwargs.get("noise")
    if z is None:
        where: dict[str, Any] = {"seed": kwargs["seed"], "stream": Stream.Z, "step": int(kwargs["row"])}
        z = fk.draw_normal(kwargs["images"], shape, **where, dtype=torch.float64, impl="reference")
    deviation = 1.0
    if "variance" in kwargs:
        frac = (kwargs["variance"].double() + 1.0) / 2.0
        deviation = (frac * row["log_max"] + (1.0 - frac) * row["log_min"]).exp().sqrt()
    x_0 = (row["A"] * x + row["B"] * prediction).clamp(row["lo"], row["hi"])
    noise = row["F"] * deviation * z.double() if row["F"] else 0.0
    return (
        row["C"] * x_0 + row["E"] * x + row["H"] * h1 + row["G"] * h2 + noise,
        x_0,
        row["P1"] * x_0 + row["Q1"] * x + row["R1"] * h1 + row["S1"] * h2,
        row["P2"] * x_0 + row["Q2"] * x + row["R2"] * h1 + row["S2"] * h2,
    )


@pytest.mark.parametrize("variant", OPS["reverse_step"].variants)
def test_reverse_step_is_its_definition(variant: str) -> None:
    kwargs = OPS["reverse_step"].example(Case((2, 3, 5, 4), channels_last=True, device=DEVICE, variant=variant))
    kwargs["return_x_0"] = True
    made = outputs(fk.reverse_step(**in_float64(kwargs), impl="reference"))
    assert len(made) == 2 + len(kwargs.get("history", ()))
    for result, expected in zip(made, step_by_definition(kwargs), strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_step(impl: str) -> None:
    """A plain step of before there was guidance or history: to the last bits of fp32."""
    kwargs = OPS["reverse_step"].example(Case((1, 1, 1, 4), device=DEVICE, variant="noisy"))
    kwargs |= {"images": torch.tensor([7], device=DEVICE), "seed": 1234, "row": torch.tensor(0, device=DEVICE)}
    kwargs["x_t"] = torch.tensor([0.5, -1.0, 0.25, 2.0], device=DEVICE).view(1, 1, 1, 4)
    kwargs["prediction"] = torch.tensor([-0.25, 0.5, 1.0, -3.0], device=DEVICE).view(1, 1, 1, 4)
    first = torch.tensor([1.5, -0.75, 0.3, 0.7, 9.0, 0.125, -1.0, 1.0], device=DEVICE)
    kwargs["coefficients"] = torch.nn.functional.pad(first, (0, 12), value=9.0)[None]
    made = fk.reverse_step(**kwargs, impl=impl)
    assert isinstance(made, torch.Tensor)
    tolerance = 3e-7 if DEVICE == "cpu" else FAST_USUAL
    torch.testing.assert_close(made.flatten().cpu(), torch.tensor(GOLDEN_STEP), atol=tolerance, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_reverse_step_returns(impl: str) -> None:
    kwargs = OPS["reverse_step"].example(Case((2, 3, 4, 4), device=DEVICE, variant="h2-noiseless"))
    history = kwargs.pop("history")
    for num in range(3):
        plain = fk.reverse_step(**kwargs, history=history[:num], impl=impl)
        pair = fk.reverse_step(**{**kwargs, "return_x_0": True}, history=history[:num], impl=impl)
        assert isinstance(pair, tuple) and isinstance(pair[1], torch.Tensor)
        if num == 0:
            assert isinstance(plain, torch.Tensor) and len(pair) == 2
            assert_same(plain, pair[0])
            continue
        assert isinstance(plain, tuple) and plain[1] is None and len(plain) == len(pair) == 3
        assert isinstance(plain[2], tuple) and len(plain[2]) == num
        assert_same(outputs((plain[0], *plain[2])), outputs((pair[0], *pair[2])))


@pytest.mark.parametrize("impl", IMPLS)
def test_reverse_step_of_a_net_with_two_outputs(impl: str) -> None:
    """Prediction and variance as the halves of one tensor give what copies of them give."""
    for channels, channels_last in ((3, True), (3, False), (1, True), (1, False)):
        case = Case((2, channels, 5, 7), torch.bfloat16, channels_last, DEVICE, "learned")
        kwargs = OPS["reverse_step"].example(case)
        both = case.place(torch.cat((kwargs["prediction"], kwargs["variance"]), dim=1))
        halves = {"prediction": both[:, :channels], "variance": both[:, channels:]}
        assert torch.equal(fk.reverse_step(**{**kwargs, **halves}, impl=impl), fk.reverse_step(**kwargs, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_weight_of_1_is_no_guidance_and_no_noise_is_none(impl: str) -> None:
    """Bit for bit: W = 1 whatever the guide, F = 0 whatever the noise, and noisy=False where F is 0."""
    kwargs = OPS["reverse_step"].example(Case((2, 3, 4, 8), device=DEVICE, variant="guided-learned"))
    kwargs["coefficients"][:, fk.REVERSE_COLUMNS.index("W")] = 1.0
    kwargs["coefficients"][:, fk.REVERSE_COLUMNS.index("F")] = 0.0
    kwargs["guide"], kwargs["variance"] = kwargs["guide"] * 1e3, kwargs["variance"] * 1e3
    made = fk.reverse_step(**kwargs, impl=impl)
    del kwargs["guide"], kwargs["variance"]
    assert_same(made, fk.reverse_step(**kwargs, impl=impl))
    assert_same(made, fk.reverse_step(**{**kwargs, "noisy": False}, impl=impl))
    assert_same(made, fk.reverse_step(**kwargs, noise=kwargs["x_t"] * 1e3, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["prediction", "guide", "variance", "x_t"])
def test_a_nan_of_the_net_comes_out_as_one(impl: str, name: str) -> None:
    kwargs = OPS["reverse_step"].example(Case((2, 3, 4, 8), device=DEVICE, variant="guided-learned"))
    kwargs[name][1, 2, 3, 4] = math.nan
    out = fk.reverse_step(**kwargs, impl=impl)
    assert isinstance(out, torch.Tensor) and out.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("impl", IMPLS)
def test_huber_between_square_and_absolute_value(impl: str) -> None:
    """2 c (sqrt(d^2 + c^2) - c), which nears d^2 for large c and 2 c |d| for small; and its gradient."""
    kwargs = OPS["diffusion_loss_and_grad"].example(Case((2, 1, 1, 8), device=DEVICE, variant="eps"))
    shape, num = (1, 1, 8), 8
    eps = fk.draw_normal(kwargs["ordinals"], shape, seed=kwargs["seed"], stream=Stream.EPS, dtype=torch.float64)
    d = kwargs["prediction"].double() - eps
    scale = float(kwargs["grad_scale"]) / num
    for c in (1e-3, 0.3, 2.0, 1e4):
        losses, grad = fk.diffusion_loss_and_grad(**kwargs, huber=c, impl=impl)
        root = (d.square() + c * c).sqrt()
        tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
        if DEVICE == "cuda":
            tolerance["atol"] = 4 * FAST_WORST
        torch.testing.assert_close(losses, (2 * c * d.square() / (root + c)).mean((1, 2, 3)), **tolerance)
        torch.testing.assert_close(grad, scale * 2 * c * d / root, **tolerance)
        assert bool((losses <= d.square().mean((1, 2, 3)) + tolerance["atol"]).all())
        assert bool((losses <= 2 * c * d.abs().mean((1, 2, 3)) + tolerance["atol"]).all())


# ---- Statistics of the noise


def draw(seed: int = 1, stream: int = Stream.EPS, step: int | None = None, first: int = 0) -> torch.Tensor:
    ordinals = torch.arange(first, first + 64)
    return fk.draw_normal(ordinals, (1, 64, 64), seed=seed, stream=stream, step=step).double().view(64, -1)


def test_normals_are_normal() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = draw().flatten()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(x.numpy())) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x.numpy())) < 4 * math.sqrt(24 / n)
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    tails = (x.abs() > 3.0).double().mean()
    assert abs(tails - 0.0026998) < 4 * math.sqrt(0.0027 / n)
    for lag in (1, 2, 3, 4, 64, 4096):
        assert abs((x[lag:] * x[:-lag]).mean()) < 4.5 / math.sqrt(n)


def test_streams_are_independent() -> None:
    base = draw()
    limit = 4.5 / math.sqrt(base.numel())
    others = {
        "seed": draw(seed=2),
        "high word of the seed": draw(seed=1 + 2**32),
        "stream": draw(stream=Stream.X_T),
        "layer": draw(stream=fk.stream_tag(Stream.EPS, layer=1)),
        "step": draw(step=1),
        "samples": draw(first=64),
        "high word of the ordinal": draw(first=2**32),
    }
    for name, other in others.items():
        assert abs((base * other).mean()) < limit, name
    among = torch.corrcoef(base)[~torch.eye(64, dtype=torch.bool)]
    assert among.abs().max() < 5.5 / math.sqrt(base.shape[1])
    assert torch.equal(base, draw(step=0)), "step 0 is the address of ordinals below 2^32"


def test_timesteps_are_uniform_and_flips_fair() -> None:
    t, flip = fk.draw_timesteps(torch.arange(100_000), 100, seed=3)
    counts = torch.bincount(t, minlength=100).double()
    assert counts.numel() == 100 and ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * math.sqrt(2 * 99)
    assert abs(flip.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(100_000)


def test_uniforms_are_uniform() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = fk.draw_uniform(torch.arange(4096), 33, seed=3, stream=Stream.AUGMENT).double()
    assert x.min() >= 0.0 and x.max() < 1.0
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-3
    centred = (x - 0.5) * math.sqrt(12.0)
    assert abs(centred.mean()) < 4 / math.sqrt(x.numel()) and abs(centred.square().mean() - 1) < 4 / math.sqrt(
        x.numel()
    )
    among = torch.corrcoef(centred.T)[~torch.eye(33, dtype=torch.bool)]
    assert among.abs().max() < 5 / math.sqrt(4096)
    other = fk.draw_uniform(torch.arange(4096), 33, seed=3, stream=Stream.LABEL).double()
    assert abs((centred * (other - 0.5)).mean()) < 2 / math.sqrt(x.numel())


def test_dropout_keeps_its_share() -> None:
    x = torch.ones(8, 16, 32, 32)
    for layer, p in ((0, 0.1), (1, 0.1), (2, 0.5)):
        y = fk.dropout(x, p, torch.arange(8), layer=layer, seed=1)
        assert abs((y == 0).double().mean() - p) < 4.5 * math.sqrt(p * (1 - p) / x.numel())


# ---- The ops in PyTorch's machinery


@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_opcheck(op: Op, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every custom op that the public op calls passes torch.library.opcheck with the arguments it is given."""
    calls = []
    call = torch._library.custom_ops.CustomOpDef.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((self, args))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", recorded)
    for shape, channels_last in (((2, 3, 4, 6), True), ((2, 1, 4, 6), False), ((2, 1, 4, 6), True)):
        kwargs = op.example(Case(shape, op.dtypes[0], channels_last, DEVICE, variant))
        if "prediction" in kwargs and op.name == "diffusion_loss":
            kwargs["prediction"].requires_grad_()
        op.public(**kwargs, impl="triton" if DEVICE == "cuda" else "reference")
    monkeypatch.undo()
    assert len(calls) == 3
    for custom_op, args in calls:
        torch.library.opcheck(custom_op, args)


@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_compiles_as_one_graph(op: Op, variant: str) -> None:
    kwargs = op.example(Case((2, 3, 4, 6), op.dtypes[0], True, DEVICE, variant))
    compiled = torch.compile(op.public, fullgraph=True, backend="aot_eager", dynamic=False)
    for eager, traced in zip(outputs(op.public(**kwargs)), outputs(compiled(**kwargs)), strict=True):
        assert torch.equal(eager, traced) and eager.stride() == traced.stride()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_training_step_compiles_with_inductor() -> None:
    case = Case((2, 3, 4, 8), device=DEVICE, variant="uint8-flip", channels_last=True)
    kwargs = OPS["add_noise"].example(case)
    scale = torch.ones(1, device=DEVICE, requires_grad=True)

    def step(x_0: torch.Tensor, dtype: torch.dtype, flip: torch.Tensor, **schedule: Any) -> torch.Tensor:
        x_t = fk.add_noise(x_0, flip=flip, dtype=dtype, **schedule)
        hidden = fk.dropout(x_t * scale, 0.1, schedule["ordinals"], layer=0, seed=1)
        return fk.diffusion_loss(hidden, target="v", x_0=x_0, flip=flip, **schedule).sum()

    eager = step(**kwargs)
    (expected,) = torch.autograd.grad(eager, scale)
    compiled = torch.compile(step, fullgraph=True)(**kwargs)
    (grad,) = torch.autograd.grad(compiled, scale)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grad, expected)
    torch._dynamo.reset()


def test_autocast_changes_nothing() -> None:
    for op in OPS.values():
        kwargs = op.example(Case((2, 3, 4, 6), device=DEVICE, variant=op.variants[0]))
        plain = outputs(op.public(**kwargs))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            cast = outputs(op.public(**kwargs))
        assert all(map(torch.equal, plain, cast)), op.name


# ---- Which implementation runs, and what is refused


def test_implementations_are_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinals = torch.arange(2)
    with pytest.raises(ValueError, match="triton, reference"):
        fk.draw_timesteps(ordinals, 10, seed=0, impl="cuda")
    monkeypatch.setattr("fastddpm_kernels._dispatch.interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run on a cpu tensor"):
        fk.draw_timesteps(ordinals, 10, seed=0, impl="triton")
    monkeypatch.setattr("fastddpm_kernels._dispatch.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the triton package"):
        fk.draw_timesteps(ordinals, 10, seed=0, impl="triton")


def test_needs_nothing_but_torch() -> None:
    """Without triton, as on macOS or Windows, and numpy: the references work, the kernels say what is missing."""
    code = """
import sys
sys.modules["triton"] = sys.modules["numpy"] = None
import torch
import fastddpm_kernels as fk
x = fk.draw_normal(torch.tensor([7]), (1, 1, 4), seed=1234, stream=1, step=3)
print([round(v, 4) for v in x.flatten().tolist()])
try:
    fk.draw_normal(torch.tensor([7]), (1, 1, 4), seed=1234, stream=1, impl="triton")
except RuntimeError as error:
    print(error)
assert not any(name == "fastddpm" or name.startswith("fastddpm.") for name in sys.modules)
"""
    folder = Path(fk.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    first, second = done.stdout.splitlines()[-2:]
    assert first == "[0.346, -0.5249, -0.2913, 0.3955]"
    assert "needs the triton package" in second


def bad_calls() -> dict[str, tuple[str, Any, type[Exception], str]]:
    """name: (op, change to its example arguments, error, what the message says)."""
    return {
        "seed": ("add_noise", {"seed": -1}, ValueError, "seed must be in"),
        "seed too large": ("draw_normal", {"seed": 2**63}, ValueError, "seed must be in"),
        "step": ("draw_normal", {"step": 2**32}, ValueError, "step must be in"),
        "shape": ("draw_normal", {"shape": (3, 4)}, ValueError, r"shape must be \(C, H, W\)"),
        "T": ("draw_timesteps", {"num_timesteps": 0}, ValueError, "num_timesteps must be in"),
        "ordinals": ("draw_timesteps", {"ordinals": torch.zeros(2)}, ValueError, "ordinals must be torch.int64"),
        "t": ("add_noise", {"t": torch.zeros(3, dtype=torch.int64)}, ValueError, "t must have shape"),
        "table": ("add_noise", {"sqrt_alpha_bar": torch.ones(1000).bfloat16()}, ValueError, "must be float32"),
        "tables": ("add_noise", {"sqrt_alpha_bar": torch.ones(3)}, ValueError, "the tables differ in length"),
        "images": ("add_noise", {"x_0": torch.zeros(2, 3, 4)}, ValueError, r"x_0 must be \[N, C, H, W\]"),
        "flip": ("add_noise", {"flip": torch.zeros(2)}, ValueError, "flip must be torch.bool"),
        "target": ("diffusion_loss", {"target": "epsilon"}, ValueError, "use one of eps, x_0, v"),
        "x_0": ("diffusion_loss", {"target": "v"}, ValueError, "needs x_0"),
        "x_0 shape": ("diffusion_loss", {"target": "v", "x_0": torch.zeros(2, 1, 4, 4)}, ValueError, "must match"),
        "weights": ("diffusion_loss", {"weights": torch.ones(1)}, ValueError, "weights must have shape"),
        "scale": ("diffusion_loss_and_grad", {"grad_scale": torch.ones(2)}, ValueError, "must hold one element"),
        "uniform num": ("draw_uniform", {"num": 0}, ValueError, "num must be in"),
        "uniform stream": ("draw_uniform", {"stream": -1}, ValueError, "stream must be in"),
        "huber": ("diffusion_loss", {"huber": 0.0}, ValueError, "huber must be None or finite"),
        "huber infinite": ("diffusion_loss_and_grad", {"huber": math.inf}, ValueError, "huber must be None or finite"),
        "row": ("reverse_step", {"row": torch.tensor(1.0)}, ValueError, "row must be one int64"),
        "columns": (
            "reverse_step",
            {"coefficients": torch.zeros(5, 8)},
            ValueError,
            r"must be \[S, 20\], got \(5, 8\)",
        ),
        "history": ("reverse_step", {"history": torch.zeros(2, 3, 4, 4)}, ValueError, "tuple of at most 2 tensors"),
        "long history": ("reverse_step", {"history": (torch.zeros(2, 3, 4, 4),) * 3}, ValueError, "tensors, got 3"),
        "history shape": (
            "reverse_step",
            {"history": (torch.zeros(2, 3, 4, 5),)},
            ValueError,
            r"history\[0\] .*match x_t",
        ),
        "history dtype": (
            "reverse_step",
            {"history": (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).half())},
            ValueError,
            r"history\[1\] must be float32",
        ),
        "guide": ("reverse_step", {"guide": torch.zeros(1, 3, 4, 4)}, ValueError, "guide .* must match x_t"),
        "variance": ("reverse_step", {"variance": torch.zeros(2, 6, 4, 4)}, ValueError, "variance .* must match x_t"),
        "noise": (
            "reverse_step",
            {"noise": torch.zeros(2, 3, 4, 4).long()},
            ValueError,
            "noise must be floating point",
        ),
        "p": ("dropout", {"p": 1.0}, ValueError, "must be in"),
        "layer": ("dropout", {"layer": 65536}, ValueError, "layer"),
        "x": ("dropout", {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, ValueError, "floating point"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name: str) -> None:
    op_name, change, error, message = bad_calls()[name]
    op = OPS[op_name]
    with pytest.raises(error, match=message):
        op.public(**{**op.example(Case((2, 3, 4, 4), variant=op.variants[0])), **change})


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_a_half_word_that_equals_the_threshold(impl: str) -> None:
    """The edge itself: p = half / 65536 keeps the element of that half-word, the next p drops it."""
    word = int(fk.philox_words(7, 0, 3, 0, fk.stream_tag(fk.Stream.DROPOUT, 2))[0])
    x, ordinals = torch.ones(1, 1, 2, 4, device=DEVICE), torch.tensor([3], device=DEVICE)
    half = word & 0xFFFF
    kept, dropped = (
        fk.dropout(x, p / 65536, ordinals, layer=2, seed=7, impl=impl)[0, 0, 0, 0] for p in (half, half + 1)
    )
    assert kept > 0 and dropped == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl: str) -> None:
    case = Case((2, 3, 4, 4), torch.float32, False, DEVICE, "eps")
    kwargs = OPS["diffusion_loss"].example(case)
    prediction = kwargs.pop("prediction").requires_grad_()
    losses = fk.diffusion_loss(prediction, **kwargs, impl=impl)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(losses.sum(), prediction, create_graph=True)


def test_losses_do_not_depend_on_the_default_dtype() -> None:
    case = Case((2, 3, 64, 64), torch.float32, True, DEVICE, "eps")
    kwargs = OPS["diffusion_loss"].example(case)
    expected = fk.diffusion_loss(**kwargs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fk.diffusion_loss(**kwargs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_would_be_silently_wrong_is_refused() -> None:
    x_0 = torch.zeros(1, 1, 2, 2, device=DEVICE)
    t = ordinals = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tables = (torch.full((3,), 0.5, device=DEVICE),) * 2
    with pytest.raises(ValueError, match="must be uint8"):
        fk.add_noise(x_0.long(), t, ordinals, *tables, seed=0)
    with pytest.raises(ValueError, match="dtype must be floating point"):
        fk.add_noise(x_0, t, ordinals, *tables, seed=0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="float64 is for impl='reference'"):
        fk.add_noise(x_0, t, ordinals, tables[0].double(), tables[1].double(), seed=0, impl="triton")
    with pytest.raises(ValueError, match="must be uint8"):
        fk.diffusion_loss(x_0, t, ordinals, *tables, seed=0, target="v", x_0=x_0.bool())
    with pytest.raises(ValueError, match="weights requires a gradient"):
        fk.diffusion_loss(x_0, t, ordinals, *tables, seed=0, weights=torch.ones(1, device=DEVICE, requires_grad=True))
    with pytest.raises(ValueError, match="stream must be in"):
        fk.draw_normal(ordinals, (1, 2, 2), seed=0, stream=2**32 + 6)
