"""What only a GPU can show: the inline assembly's values, graph capture, one compilation for every seed, big batches.

The table of test_kernels.py runs on the GPU as well where there is one. The first tests here need none: they check the
constants of the inline assembly, which the interpreter cannot run.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, FAST_SHARE, FAST_USUAL, FAST_WORST, check_close, check_op, in_float64, outputs

import fastddpm_kernels as fk
from fastddpm_kernels import OPS, Case, Stream

if not fk.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

import triton
import triton.language as tl

from fastddpm_kernels import draws, group_norm_kernels, launch, tiles
from fastddpm_kernels._triton import interpreting
from fastddpm_kernels.group_norm_kernels import SIGMOID_ASM, _sigmoid
from fastddpm_kernels.tiles import TWO_LN_2, normal_pair, philox


@triton.jit
def _words_kernel(counters_ptr, words_ptr, seed_low, seed_high, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """words[k] = Philox of counters[k], both [4, SIZE] int64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.load(counters_ptr + offs).to(tl.uint32)
    c1 = tl.load(counters_ptr + SIZE + offs).to(tl.uint32)
    c2 = tl.load(counters_ptr + 2 * SIZE + offs).to(tl.uint32)
    c3 = tl.load(counters_ptr + 3 * SIZE + offs).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, seed_low.to(tl.uint32), seed_high.to(tl.uint32))
    tl.store(words_ptr + offs, w0.to(tl.int64))
    tl.store(words_ptr + SIZE + offs, w1.to(tl.int64))
    tl.store(words_ptr + 2 * SIZE + offs, w2.to(tl.int64))
    tl.store(words_ptr + 3 * SIZE + offs, w3.to(tl.int64))


@triton.jit
def _pairs_kernel(words_ptr, normals_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """normals [2, SIZE] of word pairs [2, SIZE] int64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word_0 = tl.load(words_ptr + offs).to(tl.uint32)
    word_1 = tl.load(words_ptr + SIZE + offs).to(tl.uint32)
    first, second = normal_pair(word_0, word_1, TWO_LN_2, FAST)
    tl.store(normals_ptr + offs, first)
    tl.store(normals_ptr + SIZE + offs, second)


@triton.jit
def _sigmoid_kernel(z_ptr, sigmoid_ptr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """The logistic function of z, fp32."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sigmoid_ptr + offs, _sigmoid(tl.load(z_ptr + offs), FAST))


def exact_pairs(words: torch.Tensor) -> torch.Tensor:
    """The defining formula in float64."""
    radius = (-2.0 * ((words[0].double() + 0.5) * 2.0**-32).log()).sqrt()
    theta = words[1].double() * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * theta.cos(), radius * theta.sin()))


def edge_words(size: int) -> torch.Tensor:
    """Pairs whose first word is near 0 or near 2^32 (u_1 near 1, where the logarithm's sign is at risk)."""
    generator = torch.Generator().manual_seed(0)
    near_0 = torch.arange(size // 2)
    return torch.stack((torch.cat((near_0, 2**32 - 1 - near_0)), torch.randint(2**32, (size,), generator=generator)))


def test_words_are_exact() -> None:
    size, block = (1 << 20, 1024) if DEVICE == "cuda" else (4096, 4096)
    counters = torch.randint(2**32, (4, size), generator=torch.Generator().manual_seed(0))
    counters[:, 0], counters[:, 1] = 0, 2**32 - 1
    for seed in (0, 2**63 - 1, 0x299F31D0A4093822):
        words = torch.zeros(4, size, dtype=torch.int64, device=DEVICE)
        low, high = (word - (word >> 31 << 32) for word in (seed & 0xFFFFFFFF, seed >> 32))
        _words_kernel[(size // block,)](counters.to(DEVICE), words, low, high, SIZE=size, BLOCK=block)
        assert torch.equal(words.cpu(), torch.stack(fk.philox_words(seed, *counters)))


def test_normals_at_the_edges() -> None:
    """Finite and within tolerance for the smallest and largest first words; nowhere NaN."""
    size, block = 8192, (1024 if DEVICE == "cuda" else 8192)
    words = edge_words(size)
    made = torch.empty(2, size, device=DEVICE)
    _pairs_kernel[(size // block,)](
        words.to(DEVICE), made, SIZE=size, BLOCK=block, FAST=launch.is_fast(torch.device(DEVICE))
    )
    assert bool(made.isfinite().all())
    assert (made.cpu().double() - exact_pairs(words)).abs().max() < FAST_WORST


def test_constants_of_the_sine_assembly() -> None:
    """The assembly's arithmetic, redone here with its own constants: the angle is that of the word to 1e-6."""
    assembly = tiles.SIN_COS_ASM.value
    turn, shift = (
        struct.unpack("<f", struct.pack("<I", int(c, 16)))[0] for c in re.findall(r"0f([0-9A-F]{8})", assembly)
    )
    high, distance = map(int, re.findall(r"shf\.r\.wrap\.b32 bits, \$2, (\d+), (\d+);", assembly)[0])
    words = torch.cat((torch.randint(2**32, (100_000,)), torch.tensor([0, 1, 2**31, 2**32 - 1])))
    bits = ((high << 32 | words) >> distance) & 0xFFFFFFFF
    fraction = bits.to(torch.int32).view(torch.float32).double()
    angle = (fraction * turn + shift).float().double()
    assert angle.abs().max() <= math.pi + 1e-6, "sin.approx is accurate within [-pi, pi]"
    error = torch.remainder(angle + math.pi - words * (2 * math.pi * 2.0**-32) + 1.0, 2 * math.pi) - 1.0
    assert error.abs().max() < 1e-6


def test_constants_of_the_byte_assembly() -> None:
    """Each selector moves its byte to bits 16-23, which reads as byte * 2^-133."""
    for k, assembly in enumerate((tiles.BYTE_0_ASM, tiles.BYTE_1_ASM, tiles.BYTE_2_ASM, tiles.BYTE_3_ASM)):
        selector = int(re.findall(r"prmt\.b32 \$0, \$1, 0, 0x([0-9a-f]{4});", assembly.value)[0], 16)
        for byte in range(256):
            source = [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0]
            source[k] = byte
            moved = bytes(source[selector >> 4 * i & 7] for i in range(4))
            assert struct.unpack("<f", moved)[0] == byte * 2.0**-133


def whole_range(size: int) -> torch.Tensor:
    """fp32 values of every sign and exponent, a fine grid where the logistic function bends, and the special ones."""
    bits = torch.linspace(0, 0x7F7FFFFF, size // 4, dtype=torch.float64).to(torch.int32).view(torch.float32)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    z = torch.cat((bits, -bits, torch.linspace(-120.0, 120.0, size - 2 * (size // 4))))
    z[: len(special)] = special
    return z


def check_sigmoid(made: torch.Tensor, z: torch.Tensor) -> None:
    """Against float64: relative by what rounding z log2 e costs the power; 0 where the result would be a denormal."""
    exact = z.double().sigmoid()
    nan, low, high = z.isnan(), z < -89.0, z > 20.0
    assert torch.equal(made.isnan(), nan)
    assert bool((made[low] < 1.2e-38).all()) and bool((made[high] == 1.0).all())
    assert bool(((made >= 0.0) & (made <= 1.0))[~nan].all())
    error = ((made.double() - exact).abs() / exact)[z.abs() <= 87.0]
    assert error.max() < 2e-5
    error = ((made.double() - exact).abs() / exact)[z.abs() <= 8.0]
    assert error.max() < 2e-6


def test_arithmetic_of_the_sigmoid_assembly() -> None:
    """The assembly's own instructions and constants, redone as the PTX ISA has them, denormals flushed."""

    def flush(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.abs() < 2.0**-126, torch.zeros_like(x).copysign(x), x)

    functions = {
        "mul.ftz.f32": lambda a, b: a * b,
        "add.ftz.f32": lambda a, b: a + b,
        "ex2.approx.ftz.f32": lambda a: a.double().exp2().float(),
        "rcp.approx.ftz.f32": lambda a: a.reciprocal(),
    }
    z = whole_range(1 << 16)
    registers = {"$1": z}
    lines = [line.strip() for line in SIGMOID_ASM.value.strip("{}\n ").splitlines()]
    assert lines.pop(0) == ".reg .f32 power;"
    for line in lines:
        name, result, *operands = line.rstrip(";").replace(",", "").split()
        values = [
            registers[each]
            if each in registers
            else torch.tensor(struct.unpack("<f", struct.pack("<I", int(each[2:], 16)))[0])
            for each in operands
        ]
        registers[result] = flush(functions[name](*map(flush, values)))
    check_sigmoid(registers["$0"], z)


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_sigmoid_over_the_whole_range(fast: bool) -> None:
    """The assembly and what stands for it elsewhere."""
    size = 1 << 20 if DEVICE == "cuda" else 1 << 14
    z = whole_range(size).to(DEVICE)
    made = torch.full_like(z, 0.5)
    block = 1024 if DEVICE == "cuda" else size
    _sigmoid_kernel[(size // block,)](z, made, BLOCK=block, FAST=fast)
    check_sigmoid(made.cpu(), z.cpu())


def test_inline_assembly_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    assert launch.is_fast(torch.device("cuda")) == (launch.INLINE_ASM and torch.version.hip is None)
    monkeypatch.setattr(launch, "INLINE_ASM", False)
    assert not launch.is_fast(torch.device("cuda"))


@pytest.mark.gpu
def test_a_norm_without_inline_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of other GPUs gives what the assembly gives, up to the last bits."""
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        op = OPS[name]
        kwargs = op.example(Case((2, 64, 16, 16), torch.float32, True, "cuda", "film-dropout"))
        fast = outputs(op.triton(**kwargs))
        monkeypatch.setattr(launch, "INLINE_ASM", False)
        slow = outputs(op.triton(**kwargs))
        monkeypatch.undo()
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_misplaced_tensors_compile_nothing_and_are_captured() -> None:
    """Tensors that start anywhere: the kernels compiled for others serve them, also within a graph's capture."""
    kwargs = OPS["group_norm_silu"].example(Case((2, 18, 7, 9), torch.bfloat16, True, "cuda", "film-residual-dropout"))

    def misplaced(x: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return buffer[1:].as_strided(x.shape, x.stride()).copy_(x)

    def run(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        leaves = {n: kwargs[n].detach().requires_grad_() for n in ("x", "weight", "residual", "scale")}
        results = outputs(fk.group_norm_silu(**{**kwargs, **leaves}))
        return (*results, *torch.autograd.grad(results, list(leaves.values()), [r.detach() for r in results]))

    def compiled() -> int:
        found = (getattr(group_norm_kernels, name) for name in vars(group_norm_kernels) if name.endswith("_kernel"))
        return sum(len(caches[0]) for kernel in found for caches in kernel.device_caches.values())

    expected, count = run(kwargs), compiled()
    moved = {name: misplaced(x) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(moved)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(moved)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected)) and compiled() == count


@pytest.mark.gpu
def test_interpreter_is_off() -> None:
    assert not interpreting()
    assert not fk.draw_normal(torch.arange(2, device="cuda"), (1, 2, 2), seed=0, stream=Stream.EPS).is_cpu


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_normals(channels_last: bool) -> None:
    ordinals = torch.arange(512)
    kwargs: dict[str, Any] = {
        "shape": (3, 64, 64),
        "seed": 2**62 + 3,
        "stream": Stream.X_T,
        "channels_last": channels_last,
    }
    made = fk.draw_normal(ordinals.cuda(), **kwargs).cpu().double()
    error = (made - fk.draw_normal_reference(ordinals, **kwargs, dtype=torch.float64)).abs()
    assert error.max() < FAST_WORST
    assert (error < FAST_USUAL).double().mean() > FAST_SHARE


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [16, 20, 7])
def test_every_byte(channels_last: bool, width: int) -> None:
    """Without noise, x_t is the normalised image to the last bits: no denormal was flushed, no pixel misplaced."""
    x_0 = (torch.arange(2 * 3 * 16 * width, device="cuda") * 7 % 256).to(torch.uint8).view(2, 3, 16, width)
    x_0 = x_0.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    one, zero = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    index, flip = torch.zeros(2, dtype=torch.int64, device="cuda"), torch.tensor([True, False], device="cuda")
    exact = x_0.double() / 127.5 - 1.0
    exact[0] = exact[0].flip(-1)
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        x_t = fk.add_noise(x_0, index, index, one, zero, seed=0, flip=flip, dtype=dtype)
        assert (x_t.double() - exact).abs().max() <= tolerance


@pytest.mark.gpu
def test_cuda_graph_draws_new_noise() -> None:
    """All ops are captured, nothing synchronises, and a replay reads ordinals, row and scale from the device."""
    calls = {
        (name, variant): op.example(Case((4, 3, 16, 16), torch.bfloat16, True, "cuda", variant))
        for name, op in OPS.items()
        for variant in (op.variants if name == "reverse_step" else op.variants[:1])
    }

    def run() -> dict[tuple[str, str], tuple[torch.Tensor, ...]]:
        with torch.no_grad():
            return {call: outputs(OPS[call[0]].public(**kwargs)) for call, kwargs in calls.items()}

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for kwargs in calls.values():
        if "ordinals" in kwargs:
            kwargs["ordinals"] += 4
        if "row" in kwargs:
            kwargs["row"] -= 1
        if "grad_scale" in kwargs:
            kwargs["grad_scale"] *= 3
    graph.replay()
    torch.cuda.synchronize()
    for name, results in run().items():
        for replayed, eager in zip(captured[name], results, strict=True):
            assert torch.equal(replayed, eager), name


@pytest.mark.gpu
def test_a_new_seed_compiles_nothing() -> None:
    ordinals = torch.arange(4, device="cuda")

    def draw(seed: int, step: int | None) -> None:
        fk.draw_normal(ordinals, (3, 24, 24), seed=seed, stream=Stream.Z, step=step)

    def compiled() -> int:
        return sum(len(caches[0]) for caches in draws._draw_normal_kernel.device_caches.values())

    draw(0, 0)
    count = compiled()
    for seed in (1, 16, 2**31, 2**32, 2**63 - 1):
        for step in (0, 1, 16, 2**32 - 1):
            draw(seed, step)
    assert compiled() == count


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
    """Offsets of later samples do not fit 32 bits; the last sample equals itself alone."""
    num_samples, shape = 2**31 // (3 * 256 * 256) + 2, (3, 256, 256)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    ordinals = torch.arange(num_samples, device="cuda")
    noise = fk.draw_normal(ordinals, shape, seed=1, stream=Stream.X_T, dtype=torch.bfloat16)
    alone = fk.draw_normal(ordinals[-1:], shape, seed=1, stream=Stream.X_T, dtype=torch.bfloat16)
    assert torch.equal(noise[-1:], alone)


@pytest.mark.gpu
def test_cpu_and_gpu_see_the_same_run() -> None:
    ordinals = torch.arange(1000) * 2**33
    for a, b in zip(
        fk.draw_timesteps(ordinals, 1000, seed=7), fk.draw_timesteps(ordinals.cuda(), 1000, seed=7), strict=True
    ):
        assert torch.equal(a, b.cpu())
    x = torch.ones(4, 6, 5, 5)
    kwargs: dict[str, Any] = {"p": 0.1, "layer": 3, "seed": 7}
    assert torch.equal(
        fk.dropout(x, ordinals=ordinals[:4], **kwargs),
        fk.dropout(x.cuda(), ordinals=ordinals[:4].cuda(), **kwargs).cpu(),
    )


@pytest.mark.multi_gpu
def test_launches_where_the_tensors_are() -> None:
    ordinals = torch.arange(2)
    kwargs: dict[str, Any] = {"shape": (3, 8, 8), "seed": 1, "stream": Stream.EPS}
    assert torch.equal(
        fk.draw_normal(ordinals.to("cuda:1"), **kwargs).cpu(), fk.draw_normal(ordinals.to("cuda:0"), **kwargs).cpu()
    )


# The norms of Ho's CIFAR-10 net and of an ADM net at 64x64: variant and the first source's shape.
NORMS = [
    ("temb-dropout", (4, 128, 32, 32)),
    ("add-residual", (4, 256, 16, 16)),
    ("add-residual-skip", (4, 256, 32, 32)),
    ("skip", (4, 512, 16, 16)),
    ("temb-dropout", (4, 256, 4, 4)),
    ("film-dropout", (2, 192, 64, 64)),
    ("film-dropout", (2, 576, 16, 16)),
    ("add-residual-skip", (2, 512, 8, 8)),
    ("norm", (2, 1152, 8, 8)),
    ("film-dropout", (2, 18, 7, 9)),
    ("", (1, 32, 256, 256)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("variant", "shape"), NORMS, ids=str)
def test_norms_at_the_nets_shapes(variant: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """By the rule of all kernels, and mean 100 with deviation 0.1 in fp32."""
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        check_op(OPS[name], Case(shape, dtype, True, "cuda", variant))
    if dtype == torch.float32:
        kwargs = OPS["group_norm_silu"].example(Case(shape, dtype, True, "cuda", variant.replace("dropout", "")))
        kwargs["x"] = kwargs["x"] * 0.1 + 100.0
        fused = outputs(fk.group_norm_silu(**kwargs, impl="triton"))
        base = outputs(fk.group_norm_silu_reference(**kwargs))
        truth = outputs(fk.group_norm_silu_reference(**in_float64(kwargs)))
        for f, b, t in zip(fused, base, truth, strict=True):
            check_close("mean 100", f, b, t)


@pytest.mark.gpu
def test_norms_forward_and_backward_in_a_cuda_graph() -> None:
    """Nothing synchronises, and a replay draws the new samples' mask in both directions."""
    for variant, shape in (("temb-dropout", (4, 128, 32, 32)), ("film-residual-dropout", (4, 192, 64, 64))):
        kwargs = OPS["group_norm_silu"].example(Case(shape, torch.bfloat16, True, "cuda", variant))
        names = [n for n in ("x", "weight", "bias", "add", "residual", "scale", "shift") if n in kwargs]
        for name in names:
            kwargs[name] = kwargs[name].detach().clone().requires_grad_()
        upstream = [torch.randn_like(r) for r in outputs(fk.group_norm_silu(**kwargs))]

        def run(
            kwargs: dict[str, Any] = kwargs, names: list[str] = names, upstream: list[torch.Tensor] = upstream
        ) -> tuple[torch.Tensor, ...]:
            results = outputs(fk.group_norm_silu(**kwargs))
            return (*results, *torch.autograd.grad(results, [kwargs[name] for name in names], upstream))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        kwargs["ordinals"] += 4
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, run()))


@pytest.mark.gpu
def test_norm_of_more_than_2_to_31_elements() -> None:
    """The last sample of a tensor beyond 32-bit offsets equals itself alone, in both ways of the kernels."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for num_channels, size in ((128, 32), (192, 64)):
        num_samples = 2**31 // (num_channels * size * size) + 2
        x = torch.empty(num_samples, num_channels, size, size, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last).normal_()
        rows = torch.ones(num_channels, device="cuda")
        alone = x[-1:].clone(memory_format=torch.channels_last)
        made = [
            torch.autograd.grad(fk.group_norm_silu(each.requires_grad_(), rows, rows, 32, 1e-5), each, each.detach())
            for each in (x, alone)
        ]
        assert torch.equal(made[0][0][-1:], made[1][0])
