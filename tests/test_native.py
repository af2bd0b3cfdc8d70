"""fastddpm_kernels/native.cpp: values and gradients against float64 autograd, invariances, and how it is compiled."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check_close
from torch import Tensor

from fastddpm_kernels import Stream, dropout, native, stream_tag
from fastddpm_kernels.dropout import dropout_threshold

REASON = native.native_available()
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16)
EPS, LAYER, SEED = 1e-5, 21, 2**62 + 5


@dataclass(frozen=True)
class Case:
    """A call: sizes and which arguments are there."""

    channels: int
    groups: int
    height: int = 5
    width: int = 7
    skip: int = 0
    add: bool = False
    residual: bool = False
    film: bool = False
    silu: bool = True
    p: float = 0.0
    num_samples: int = 2
    mean: float = 0.0
    std: float = 1.0


CASES = {
    "group of 4": Case(128, 32, 10, 9),
    "group of 6, add, dropout": Case(192, 32, add=True, p=0.3),
    "group of 12, film": Case(384, 32, 3, 5, film=True, p=0.1),
    "group of 18, skip": Case(384, 32, 3, 5, skip=192, add=True, residual=True),
    "odd channels": Case(21, 6, 9, 8, skip=9, add=True, residual=True, film=True, p=0.5),
    "odd channels, one group": Case(5, 1, 6, 11, skip=2, film=True, p=0.2),
    "many pixels": Case(40, 8, 19, 23, add=True, p=0.1),
    "no silu": Case(64, 32, silu=False),
    "no silu, dropout": Case(24, 4, silu=False, residual=True, p=0.4),
    "one pixel": Case(256, 32, 1, 1, add=True, residual=True, film=True, p=0.1),
    "one channel": Case(1, 1, 4, 4),
}


def images(case: Case, channels: int, dtype: torch.dtype) -> Tensor:
    """Normal images [N, channels, H, W], channels_last."""
    x = case.mean + case.std * torch.randn(case.num_samples, channels, case.height, case.width)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def example(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for `case` by name, dy and dtotal among them."""
    torch.manual_seed(7)
    n, c = case.num_samples, case.channels + case.skip
    return {
        "x": images(case, case.channels, dtype),
        "residual": images(case, case.channels, dtype) if case.residual else None,
        "skip": images(case, case.skip, dtype) if case.skip else None,
        "add": torch.randn(n, case.channels) if case.add else None,
        "weight": torch.randn(c),
        "bias": torch.randn(c),
        "scale": 0.5 * torch.randn(n, c) if case.film else None,
        "shift": torch.randn(n, c) if case.film else None,
        "ordinals": torch.arange(n) * 2**33 + 5,
        "dy": images(Case(1, 1, case.height, case.width, num_samples=n), c, dtype),
        "dtotal": images(Case(1, 1, case.height, case.width, num_samples=n), case.channels, dtype)
        if case.residual
        else None,
    }


def fused(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients of native.cpp, those of the parameters made of its sums."""
    options = (case.silu, dropout_threshold(case.p), stream_tag(Stream.DROPOUT, LAYER), SEED, inputs["ordinals"])
    vectors = [inputs[name] for name in ("weight", "bias", "scale", "shift")]
    y, total, mean, rstd = native.forward(
        *(inputs[name] for name in ("x", "residual", "skip", "add")), *vectors, case.groups, EPS, *options
    )
    read, add = (inputs["x"], inputs["add"]) if total is None else (total, None)
    dx, dskip, sum_dz, sum_dz_xhat, dadd = native.backward(
        inputs["dy"], inputs["dtotal"], read, add, inputs["skip"], *vectors, mean, rstd, case.groups, *options
    )
    gain = 1.0 if inputs["scale"] is None else 1.0 + inputs["scale"]
    results = {
        "y": y,
        "total": total,
        "dx": dx,
        "dskip": dskip,
        "dadd": dadd if case.add else None,
        "dweight": (gain * sum_dz_xhat).sum(0),
        "dbias": (gain * sum_dz).sum(0),
        "dscale": inputs["weight"] * sum_dz_xhat + inputs["bias"] * sum_dz if case.film else None,
        "dshift": sum_dz if case.film else None,
    }
    return {name: value for name, value in results.items() if value is not None}


def group_norm(x: Tensor, num_groups: int) -> Tensor:
    """In two passes: in float32, channels_last, mean 100 and deviation 0.1 torch's own result is off by up to 1."""
    if x.dtype == torch.float64:
        return F.group_norm(x, num_groups, eps=EPS)
    groups = x.contiguous().view(x.shape[0], num_groups, -1)
    centered = groups - groups.mean(-1, keepdim=True)
    return (centered * (centered.square().mean(-1, keepdim=True) + EPS).rsqrt()).view(x.shape)


def plain(case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula in torch and its autograd, computed in dtype. Statistics are of the rounded total, as in the op."""
    leaves = {
        name: None if value is None else value.detach().to(dtype).requires_grad_()
        for name, value in inputs.items()
        if name != "ordinals"
    }
    x, residual, add, scale = (leaves[name] for name in ("x", "residual", "add", "scale"))
    total = x if add is None else x + add[:, :, None, None]
    if residual is not None:
        rounded = inputs["x"].float() + (0.0 if add is None else inputs["add"][:, :, None, None])
        rounded = (rounded + inputs["residual"].float()).to(inputs["x"].dtype)
        total = total + residual
        total = total + (rounded.to(dtype) - total).detach()
    z = total if leaves["skip"] is None else torch.cat((total, leaves["skip"]), 1)
    z = group_norm(z, case.groups) * leaves["weight"][:, None, None] + leaves["bias"][:, None, None]
    if scale is not None:
        z = z * (1.0 + scale[:, :, None, None]) + leaves["shift"][:, :, None, None]
    if case.silu:
        z = F.silu(z)
    if case.p:
        z = dropout(z, case.p, inputs["ordinals"], layer=LAYER, seed=SEED, impl="reference")
    torch.autograd.backward([z], [leaves["dy"].detach()], retain_graph=True)
    if residual is not None:
        torch.autograd.backward([total], [leaves["dtotal"].detach()])
    gradients = {f"d{name}": None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    results = {"y": z.detach(), "total": None if residual is None else total.detach(), **gradients}
    return {name: value for name, value in results.items() if value is not None}


def check(case: Case, dtype: torch.dtype) -> None:
    inputs = example(case, dtype)
    results = fused(case, inputs)
    truth, base = (plain(case, inputs, wide) for wide in (torch.float64, torch.float32))
    for name, value in results.items():
        rounded = torch.empty_like(value).copy_(base[name])
        if name == "total":
            assert torch.equal(value, rounded)
        sums = name in ("dadd", "dweight", "dbias", "dscale", "dshift")
        check_close(f"{name} of {case}", value, rounded, truth[name], factor=4.0 if sums else 2.0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype, poisoned_empty: None):
    check(CASES[name], dtype)


@needs_library
@pytest.mark.parametrize("add", (False, True))
def test_a_large_mean_costs_no_digits(add: bool):
    case = Case(64, 16, 16, 16, add=add, mean=100.0, std=0.1)
    check(case, torch.float32)
    inputs = example(case, torch.float32)
    y, truth = fused(case, inputs)["y"], plain(case, inputs, torch.float64)["y"]
    assert (y - truth).abs().max() <= 2e-6 * truth.abs().max()  # a mean rounded to float32 costs 4e-5


@needs_library
def test_an_outlier_costs_no_digits():
    """In the first pixel, which is one of those that the sums are centred by."""
    case = Case(32, 8, 16, 16)
    inputs = example(case, torch.float32)
    inputs["x"][:, :, 0, 0] = 1e4
    truth, base = (plain(case, inputs, dtype)["y"] for dtype in (torch.float64, torch.float32))
    check_close("y", fused(case, inputs)["y"], base.contiguous(memory_format=torch.channels_last), truth)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "height"), ((125, 128), (29, 5)))
def test_the_mask_is_that_of_dropout(channels: int, height: int, dtype: torch.dtype):
    """The larger case has half-words that equal the threshold."""
    case = Case(channels, 1, height, 31, skip=3, silu=False, p=0.37, num_samples=3)
    inputs = example(case, dtype)
    inputs["bias"] = torch.full_like(inputs["bias"], 1000.0)  # nothing else is zero
    results = fused(case, inputs)
    ones = torch.ones_like(results["y"])
    kept = dropout(ones, case.p, inputs["ordinals"], layer=LAYER, seed=SEED, impl="reference") != 0
    assert torch.equal(results["y"] != 0, kept)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (Case(192, 32, 9, 9, skip=384, film=True, p=0.2), Case(150, 30, 9, 9, skip=30, p=0.2)))
def test_threads_and_batch_change_no_bit(case: Case, dtype: torch.dtype):
    """Bundles of channels are cut by both."""
    inputs = example(case, dtype)
    alone = {name: value[:1] if value is not None and value.dim() > 1 else value for name, value in inputs.items()}
    alone["ordinals"] = inputs["ordinals"][:1]
    num_threads, results = torch.get_num_threads(), []
    try:
        for threads, arguments in ((1, inputs), (2, inputs), (1, alone), (2, alone), (7, alone)):
            torch.set_num_threads(threads)
            results.append(fused(case, arguments))
    finally:
        torch.set_num_threads(num_threads)
    for name in ("y", "dx", "dskip", "dshift", "dscale"):
        if name in results[0]:
            for other in results[1:]:
                n = other[name].shape[0]
                assert torch.equal(results[0][name][:n], other[name]), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_group_and_is_seen(dtype: torch.dtype):
    case = Case(64, 8, 6, 6, num_samples=2)
    inputs = example(case, dtype)
    inputs["x"][1, 9, 2, 3] = float("nan")
    results = fused(case, inputs)
    for name in ("y", "dx"):
        bad = results[name].isnan()
        assert bad[1, 8:16].all() and bad.sum() == 8 * 36, name


@needs_library
@pytest.mark.parametrize("size", (60.0, 88.0, 89.0, 200.0, 1e30))
def test_silu_saturates(size: float):
    case = Case(32, 8, 4, 4)
    inputs = example(case, torch.float32)
    inputs["weight"] = torch.full((32,), size)
    results, truth = fused(case, inputs), plain(case, inputs, torch.float64)
    for name in ("y", "dx"):
        scale = truth[name].abs().max()
        assert (results[name] - truth[name]).abs().max() <= 3e-6 * scale, name
    inputs["weight"], inputs["bias"] = torch.zeros(32), torch.full((32,), -size)
    assert (fused(case, inputs)["y"] - F.silu(-torch.tensor(size, dtype=torch.float64))).abs().max() <= 1e-24


@needs_library
def test_bfloat16_rounds_to_nearest_even():
    """y = bias where weight is zero: every pattern of the bits that are cut off, ties among them."""
    patterns = (torch.tensor([0x3F80, 0x3F81, 0xBFFF, 0x7F00]) * 2**16)[:, None] + torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    )
    patterns[-1, -1] = 0x7FFFFFFF  # a NaN that adding would turn into a number
    bias = patterns.flatten().to(torch.int32).view(torch.float32)
    x = torch.randn(1, 24, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    y, *_ = native.forward(x, None, None, None, torch.zeros(24), bias, None, None, 4, EPS, False, 0, 0, 0, None)
    assert torch.allclose(y[0, :, 1, 1], bias.bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)


@needs_library
def test_wrong_tensors_are_named():
    case = Case(32, 8)
    inputs = example(case, torch.float32)

    def call(**changes: Any) -> None:
        fused(case, {**inputs, **changes})

    x = inputs["x"]
    for name, value, message in (
        ("x", x.double(), "takes .* in bfloat16 or float32, got torch.float64"),
        ("x", x.contiguous(), r"x is not dense: call x\.contiguous\(memory_format=torch\.channels_last\)"),
        ("residual", x[:1], "residual must be"),
        ("skip", x.bfloat16(), "skip must be"),
        ("add", torch.zeros(32), "add must be"),
        ("weight", torch.zeros(31), "weight must be"),
        ("bias", torch.zeros(32, dtype=torch.float64), "bias must be"),
        ("scale", torch.zeros(64, 2)[::2].T.contiguous().T, "scale must be"),
        ("dy", x[:, :, :2], "dy must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{name: value})
    with pytest.raises(ValueError, match="num_groups=7 does not divide the 32 channels"):
        fused(Case(32, 7), inputs)
    with pytest.raises(ValueError, match="dropout needs ordinals"):
        fused(Case(32, 8, p=0.5), {**inputs, "ordinals": None})


PLANTED = {
    "blocks of rows not joined": (" + delta * delta * (before * n / after)", "", "many pixels"),
    "mean taken of x without add": ("return to_add ? args.add", "return false ? args.add", "many pixels"),
    "kept values not scaled": ("z * task.keep_scale", "z", "no silu, dropout"),
    "mask of the next sample": ("args.ordinals[sample]", "args.ordinals[sample] + 1", "odd channels"),
    "dtotal left out": ("v.half[h] += other.half[h]", "(void)other", "group of 18, skip"),
    "gain of FiLM left out of the means": ("* (args.scale ? 1.0 + args.scale[at + k] : 1.0)", "", "group of 12, film"),
    "derivative of silu": ("d * (s + zs * (1.0f - s))", "d * s", "group of 4"),
}


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet, and the cache is tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


@needs_library
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch):
    right, wrong, name = PLANTED[bug]
    source = native.SOURCE.read_text()
    assert right in source
    path = fresh_library / "planted.cpp"
    path.write_text(source.replace(right, wrong))
    monkeypatch.setattr(native, "SOURCE", path)
    monkeypatch.setattr(native, "FLAGS", ("-O1", *(flag for flag in native.FLAGS if flag != "-O3")))
    assert native.native_available() is None
    with pytest.raises(AssertionError):
        check(CASES[name], torch.float32)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda env, path: env("CXX", "false"), r"the compiler '.*/false' fails with --version: set CXX"),
        (lambda env, path: env("CXX", "no-such-compiler"), "CXX='no-such-compiler' is not found: set CXX"),
        (lambda env, path: env("PATH", str(path)), r"no C\+\+ compiler .* is found: install one or set CXX"),
        (lambda env, path: env("XDG_CACHE_HOME", str(path / "file")), "Not a directory"),
    ],
    ids=("broken", "missing", "none", "cache"),
)
def test_reasons_are_one_line(
    prepare: Callable[..., None], reason: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CXX", raising=False)
    (fresh_library / "file").touch()
    prepare(monkeypatch.setenv, fresh_library)
    message = native.native_available()
    assert message is not None and "\n" not in message
    with pytest.raises(RuntimeError, match=f"impl='native' cannot run: .*{reason}"):
        fused(CASES["group of 4"], example(CASES["group of 4"], torch.float32))


@needs_library
def test_errors_of_the_compiler_are_told(fresh_library: Path, monkeypatch: pytest.MonkeyPatch):
    path = fresh_library / "wrong.cpp"
    path.write_text("#error wrong\n")
    monkeypatch.setattr(native, "SOURCE", path)
    assert "error wrong" in str(native.native_available()).replace("#", "")
    assert not list((fresh_library / "fastddpm" / "native").iterdir())


@needs_library
def test_a_cache_that_others_can_write_is_refused(fresh_library: Path):
    assert native.native_available() is None
    directory = fresh_library / "fastddpm" / "native"
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    native._library.cache_clear()
    assert "can be written by others: chmod 700 it" in str(native.native_available())


@needs_library
def test_two_processes_compile_at_once_and_a_third_not_at_all(fresh_library: Path):
    children = [multiprocessing.get_context("fork").Process(target=native._compile) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    (library,) = (fresh_library / "fastddpm" / "native").iterdir()
    made = library.stat().st_mtime_ns
    assert native.native_available() is None
    assert [path.stat().st_mtime_ns for path in library.parent.iterdir()] == [made]


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_are_those_of_torch():
    """One OpenMP runtime is loaded, and the library brings none. In a process where nothing else has brought one."""
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("this torch has no OpenMP")
    code = (
        "from pathlib import Path\n"
        "from fastddpm_kernels import native\n"
        "assert native._gomp_parallel()\n"
        "assert not isinstance(native._library(), str)\n"
        "names = {line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines()}\n"
        "print(*{name for name in names if Path(name).name.startswith(('libgomp', 'libiomp', 'libomp'))})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
