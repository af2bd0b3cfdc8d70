"""Planted bugs: each change to a kernel's source must make the tests' own check fail, and no change must pass it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, check_op, one_sample, outputs

import fastddpm_kernels as fk
from fastddpm_kernels import OPS, Case

pytestmark = pytest.mark.skipif(not fk.HAS_TRITON, reason="needs triton")
SOURCES = Path(fk.__file__).parent
# Modules that hold kernels, in the order of their imports: a mutant is made of a fresh copy of all of them.
MODULES = (
    *("tiles", "draws", "noising", "loss_kernel", "loss", "reverse", "dropout"),
    *("group_norm_kernels", "group_norm"),
)
ODD, EVEN = (3, 3, 5, 7), (3, 3, 4, 8)


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in a module; op's variant at the shape must no longer pass."""

    name: str
    module: str
    old: str
    new: str
    op: str
    variant: str
    shape: tuple[int, int, int, int] = EVEN
    channels_last: bool = True
    dtype: torch.dtype = torch.float32


BUGS = (
    Bug(
        "last group not written", "tiles", "elements < C * PLANE", "elements + 4 < C * PLANE", "add_noise", "uint8", ODD
    ),
    Bug(
        "nchw written as nhwc",
        "tiles",
        "values[k * C + i]",
        "values[i * PIXELS + k]",
        "add_noise",
        "uint8",
        EVEN,
        False,
    ),
    Bug("mirror off by a group", "tiles", "PIXELS - 1 - columns)", "PIXELS - 2 - columns)", "add_noise", "uint8-flip"),
    Bug("pixels of a group not mirrored", "tiles", "PIXELS - 1 - pixel if", "pixel if", "add_noise", "uint8-flip"),
    Bug("9 rounds", "tiles", "tl.static_range(10)", "tl.static_range(9)", "draw_normal", "x_T"),
    Bug("high word of the ordinal dropped", "tiles", "(ordinal >> 32)", "(ordinal >> 63)", "draw_normal", "x_T"),
    Bug(
        "sine and cosine swapped",
        "tiles",
        "radius * cos, radius * sin",
        "radius * sin, radius * cos",
        "draw_normal",
        "z",
    ),
    Bug("step not in the address", "draws", "if HAS_STEP:", "if False:", "draw_normal", "z"),
    Bug("noise by place in the batch", "noising", "tl.load(ordinals_ptr + n)", "n", "add_noise", "uint8"),
    Bug(
        "alpha_bar in bf16",
        "noising",
        "tl.load(sqrt_alpha_bar_ptr + t)",
        "tl.load(sqrt_alpha_bar_ptr + t).to(tl.bfloat16).to(tl.float32)",
        "add_noise",
        "float-flip",
    ),
    Bug("another sample's alpha_bar", "noising", "tl.load(t_ptr + n)", "tl.load(t_ptr)", "add_noise", "uint8"),
    Bug("flip ignored", "noising", "if flip != 0:", "if flip > 1:", "add_noise", "uint8-flip"),
    Bug("normalised by 128", "noising", "(1.0 / 127.5)", "(1.0 / 128.0)", "add_noise", "uint8"),
    Bug("factor 1 for 2", "loss_kernel", "(2.0 * weight)", "(1.0 * weight)", "diffusion_loss_and_grad", "eps"),
    Bug(
        "masked lanes counted", "loss_kernel", "groups * 4 + k < C * PLANE", "groups >= 0", "diffusion_loss", "eps", ODD
    ),
    Bug(
        "upstream gradient ignored",
        "loss_kernel",
        "tl.load(grad_scale_ptr + (n if SCALE_PER_SAMPLE else 0)) *",
        "1.0 *",
        "diffusion_loss_and_grad",
        "eps",
    ),
    Bug("weights ignored", "loss_kernel", "/ SIZE if WEIGHTED", "/ SIZE if False", "diffusion_loss", "v-flip-weighted"),
    Bug(
        "v with the signs of eps",
        "loss_kernel",
        "sigma if TARGET",
        "-sigma if TARGET",
        "diffusion_loss",
        "v-flip-weighted",
    ),
    Bug("not clipped", "reverse", "low, high, propagate", "-1e9, 1e9, propagate", "reverse_step", "with_x_0"),
    Bug(
        "row not in the address",
        "reverse",
        "image, step, Z_TAG",
        "image, image, Z_TAG",
        "reverse_step",
        "noisy",
    ),
    Bug("noise where F is 0", "reverse", "TWO_LN_2 * f * f", "TWO_LN_2", "reverse_step", "last"),
    Bug("history by F", "reverse", "h = tl.load(coefficients_ptr + 4)", "h = e", "reverse_step", "h1"),
    Bug("next history of x for x_0", "reverse", "x_0_k * p1 + x_k * q1", "x_0_k * q1 + x_k * p1", "reverse_step", "h1"),
    Bug("h2 by S2 in both rows", "reverse", "+ k] * s1", "+ k] * s2", "reverse_step", "h2-noiseless"),
    Bug("h2 of the first sample", "reverse", "h2_ptr += n *", "h2_ptr += 0 *", "reverse_step", "h2-noiseless"),
    Bug(
        "guided away from the condition",
        "reverse",
        "(prediction_k - guide[i * SIZE + k])",
        "(guide[i * SIZE + k] - prediction_k)",
        "reverse_step",
        "guided",
    ),
    Bug("W for W - 1", "reverse", "coefficients_ptr + 8) - 1.0", "coefficients_ptr + 8)", "reverse_step", "guided"),
    Bug(
        "limits of the variance swapped",
        "reverse",
        "(log_max - log_min)",
        "(log_min - log_max)",
        "reverse_step",
        "learned",
    ),
    Bug("variance for deviation", "reverse", "0.36067376022224085", "0.7213475204444817", "reverse_step", "learned"),
    Bug(
        "variance where F is 0",
        "reverse",
        "tl.where(f == 0.0, 0.0, (log_max - log_min) * QUARTER_LOG2_E)",
        "(log_max - log_min) * QUARTER_LOG2_E",
        "reverse_step",
        "learned-last",
    ),
    Bug("given noise without F", "reverse", "given[i * SIZE + k] * f", "given[i * SIZE + k]", "reverse_step", "given"),
    Bug(
        "half the gradient of Huber",
        "loss_kernel",
        "slope = difference * shrink",
        "slope = difference * shrink * 0.5",
        "diffusion_loss_and_grad",
        "eps-huber",
    ),
    Bug("Huber's c not squared", "loss_kernel", "(HUBER * HUBER)", "HUBER", "diffusion_loss_and_grad", "eps-huber"),
    Bug(
        "twice Huber's loss", "loss_kernel", "shrink * 0.5 + 0.5", "shrink * 0.25 + 0.25", "diffusion_loss", "eps-huber"
    ),
    Bug(
        "the square's gradient for Huber's",
        "loss_kernel",
        "slope = difference * shrink",
        "slope = difference",
        "diffusion_loss_and_grad",
        "eps-huber",
    ),
    Bug("23 bits of a word", "draws", "(words >> 8)", "(words >> 9)", "draw_uniform", ""),
    Bug(
        "words of a quad in another order",
        "draws",
        "join_4(word_0, word_1, word_2, word_3, BLOCK)",
        "join_4(word_0, word_2, word_1, word_3, BLOCK)",
        "draw_uniform",
        "",
    ),
    Bug("halves swapped", "dropout", "words & 0xFFFF, words >> 16", "words >> 16, words & 0xFFFF", "dropout", "p=0.1"),
    Bug(
        "another threshold",
        "dropout",
        ">= threshold",
        ">= threshold + 6000",
        "dropout",
        "p=0.1",
        (3, 8, 16, 16),
    ),
)
NORM, NORM_BACKWARD = "group_norm_silu", "group_norm_silu_backward"
NORM_SHAPE, SPLIT = (3, 16, 5, 7), (2, 18, 50, 51)  # on chip, and in several splits and blocks


def norm_bug(
    name: str, old: str, new: str, op: str = NORM, variant: str = "", shape: tuple[int, int, int, int] = NORM_SHAPE
) -> Bug:
    return Bug(name, "group_norm_kernels", old, new, op, variant, shape)


BUGS += (
    norm_bug("unbiased variance", "* share - rest * rest", "* (1.0 / (GROUP * PLANE - 1)) - rest * rest"),
    norm_bug("eps outside the root", "tl.sqrt(variance + EPS)", "(tl.sqrt(variance) + EPS)"),
    norm_bug("masked lanes counted", "d = tl.where(mask, d, 0.0)", "d = d"),
    norm_bug("mean of another group", "c // GROUP\n    tl.store", "c // GROUP // 2 * 2\n    tl.store", NORM, "", SPLIT),
    norm_bug("groups of two", "* FOLD // GROUP", "* FOLD // (2 * GROUP)", NORM, "film-dropout", (3, 12, 5, 7)),
    norm_bug("no SiLU", "y *= _sigmoid(y, FAST)", "y *= 1.0"),
    norm_bug("SiLU on attention's norm", "if SILU:", "if True:", NORM, "norm"),
    norm_bug("scale for 1 + scale", "film = 1.0 + tl.load(scale_ptr", "film = tl.load(scale_ptr", NORM, "film-dropout"),
    norm_bug("shift forgotten", "offset = offset * film + ", "offset = offset * film + 0.0 * ", NORM, "film-dropout"),
    norm_bug("first sample's embedding", "add_ptr + n * add_stride", "add_ptr", NORM, "temb-dropout"),
    norm_bug("another sample's mask", "tl.load(ordinals_ptr + n)", "tl.load(ordinals_ptr)", NORM, "temb-dropout"),
    norm_bug("mask's halves swapped", "words << 16, words)", "words, words << 16)", NORM, "temb-dropout"),
    norm_bug("kept values not scaled", "y * (65536.0 / (65536 - threshold).to(tl.float32))", "y", NORM, "temb-dropout"),
    norm_bug(
        "residual not in the norm",
        "x = total.to(tl.float32)",
        "x = _read(x_ptr, skip_ptr, rows, c, first, mask, C1, C2, SOURCES, VECTOR)",
        NORM,
        "add-residual",
    ),
    norm_bug(
        "add given to the skip",
        "tl.load(add_ptr + c, mask=mask_c & (c < C1), other=0)",
        "tl.load(add_ptr + c, mask=mask_c & (c < C1), other=1)",
        NORM,
        "add-residual-skip",
        (3, 12, 5, 7),
    ),
    norm_bug(
        "skip from its first channels",
        "(c - C1)[None, :], VECTOR), mask=mask_2",
        "(c - c)[None, :], VECTOR), mask=mask_2",
        NORM,
        "skip",
    ),
    norm_bug("splits weighted alike", "apart * num_rows", "apart * (PLANE / SPLITS)", NORM, "", SPLIT),
    norm_bug(
        "spread of the splits forgotten", "squares += apart * apart * num_rows", "squares += 0.0", NORM, "", SPLIT
    ),
    norm_bug("Welford without the new mean", "delta * (x - mean), 0.0)", "delta * delta, 0.0)", NORM, "", SPLIT),
    norm_bug(
        "last block not written", "for block in range(BLOCKS):", "for block in range(BLOCKS - 1):", NORM, "", SPLIT
    ),
    norm_bug("term of the mean forgotten", "k_1[None, :])", "0.0 * k_1[None, :])", NORM_BACKWARD),
    norm_bug("term of the variance forgotten", "d * k_2[None, :]", "d * 0.0", NORM_BACKWARD, "", SPLIT),
    norm_bug(
        "derivative of sigmoid for SiLU",
        "sigmoid * (u * (1.0 - sigmoid) + 1.0)",
        "sigmoid * (1.0 - sigmoid)",
        NORM_BACKWARD,
    ),
    norm_bug("mask not drawn again", "if DROP:\n        du", "if False:\n        du", NORM_BACKWARD, "temb-dropout"),
    norm_bug("gradient of total lost", "if DTOTAL:", "if False:", NORM_BACKWARD, "add-residual"),
    norm_bug(
        "gradient of total into the skip",
        "return mask if SOURCES",
        "return mask if True or SOURCES",
        NORM_BACKWARD,
        "add-residual-skip",
        (3, 6, 5, 7),
    ),
    norm_bug(
        "FiLM missing from the weight's gradient",
        "dun_sum * film, mask",
        "dun_sum, mask",
        NORM_BACKWARD,
        "film-dropout",
    ),
    norm_bug("scale's gradient without bias", "+ du_sum * bias", "+ 0.0 * bias", NORM_BACKWARD, "film-dropout"),
    norm_bug("rstd missing from the weight's gradient", "dun_sum = dud_sum * rstd", "dun_sum = dud_sum", NORM_BACKWARD),
    norm_bug("masked pixels in add's gradient", "tl.where(mask, dx, 0.0)", "dx", NORM_BACKWARD, "temb-dropout"),
)


def mutant(bug: Bug | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The table of ops made from copies of the kernels' modules, with the bug in one of them."""
    ops: dict[str, Any] = {}
    for module in MODULES:
        source = (SOURCES / f"{module}.py").read_text()
        if bug is not None and module == bug.module:
            assert source.count(bug.old) >= 1, f"{bug.name}: {bug.old!r} is no longer in {module}.py"
            source = source.replace(bug.old, bug.new)
        for other in MODULES:
            source = source.replace(f"from .{other} import", f"from .mutant_{other} import")
        source = source.replace('custom_op("fastddpm_kernels::', f'custom_op("mutant_{id(folder)}::')
        path = folder / f"mutant_{module}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"fastddpm_kernels.mutant_{module}", path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        ops.update({value.name: value for value in vars(loaded).values() if isinstance(value, fk.Op)})
    return ops


def check(ops: dict[str, Any], bug: Bug) -> None:
    """The check of test_kernels.py, and that a sample alone is the sample in its batch."""
    case = Case(bug.shape, bug.dtype, bug.channels_last, DEVICE, bug.variant)
    check_op(OPS[bug.op], case, ops[bug.op].triton)
    kwargs = OPS[bug.op].example(case)
    batch, alone = outputs(ops[bug.op].triton(**kwargs)), outputs(ops[bug.op].triton(**one_sample(kwargs, 1)))
    assert all(torch.equal(a[1:2], b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.usefixtures("poisoned_empty")
def test_without_a_bug_all_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = mutant(None, tmp_path, monkeypatch)
    for bug in {(bug.op, bug.variant, bug.shape, bug.channels_last, bug.dtype): bug for bug in BUGS}.values():
        check(ops, bug)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
@pytest.mark.usefixtures("poisoned_empty")
def test_planted_bug_is_found(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = mutant(bug, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(ops, bug)
