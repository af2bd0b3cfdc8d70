"""Compiles the kernels of fastddpm_kernels for GPUs that are not here and counts what they execute.

Run as a program, without TRITON_INTERPRET: it prints one JSON line per configuration and target. The launchers
themselves are called on CPU tensors with Triton's launch replaced by a recorder, so what is compiled is what a GPU
would be given. tests/test_kernels_compiled.py holds the figures against tests/kernel_budgets.json; after a deliberate
change, `python tests/compile_kernels.py --write-budgets` writes that table anew, and the same with `--merge` under
the oldest supported Triton makes room for its compiler.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastddpm_kernels import OPS, Case, launch

BUDGETS = Path(__file__).with_name("kernel_budgets.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
EVEN = (2, 3, 32, 32)
ODD = (2, 3, 5, 7)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Configuration:
    """One call of an op whose kernels are compiled: for NVIDIA's targets and, if portable, for AMD's too."""

    name: str
    op: str
    variant: str
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    shape: tuple[int, int, int, int] = EVEN
    portable: bool = False
    num_groups: int | None = None  # of a norm; None: as its example has it


CONFIGURATIONS = (
    Configuration("noise uint8 to bf16, nhwc", "add_noise", "uint8"),
    Configuration("noise uint8 to bf16, nchw", "add_noise", "uint8", channels_last=False),
    Configuration("noise uint8 to bf16, flip, nhwc", "add_noise", "uint8-flip", portable=True),
    Configuration("noise uint8 to bf16, flip, nchw", "add_noise", "uint8-flip", channels_last=False),
    Configuration("noise uint8 to bf16, flip, nhwc, 4 channels", "add_noise", "uint8-flip", shape=(2, 4, 32, 32)),
    Configuration("noise uint8 to bf16, flip, 28x28 gray", "add_noise", "uint8-flip", shape=(2, 1, 28, 28)),
    Configuration("noise uint8 to fp32, flip, nhwc", "add_noise", "uint8-flip", torch.float32),
    Configuration("noise bf16 to bf16, flip, nhwc", "add_noise", "float-flip"),
    Configuration("noise uint8 to bf16, flip, odd", "add_noise", "uint8-flip", shape=ODD),
    Configuration("loss eps, nhwc", "diffusion_loss_and_grad", "eps"),
    Configuration("loss eps, nchw", "diffusion_loss_and_grad", "eps", channels_last=False),
    Configuration("loss eps, fp32, nhwc", "diffusion_loss_and_grad", "eps", torch.float32, portable=True),
    Configuration("loss eps, odd", "diffusion_loss_and_grad", "eps", shape=ODD),
    Configuration("loss eps, no gradient, nhwc, 64x64", "diffusion_loss", "eps", shape=(2, 3, 64, 64), portable=True),
    Configuration("loss v, flip, weights, nhwc", "diffusion_loss_and_grad", "v-flip-weighted"),
    Configuration("loss x_0 from float, nhwc", "diffusion_loss_and_grad", "x_0-float"),
    Configuration("loss eps, huber, nhwc", "diffusion_loss_and_grad", "eps-huber", portable=True),
    Configuration("loss eps, huber, no gradient, nhwc", "diffusion_loss", "eps-huber"),
    Configuration("reverse step, nhwc", "reverse_step", "noisy", portable=True),
    Configuration("reverse step, nchw", "reverse_step", "noisy", channels_last=False),
    Configuration("reverse step with x_0, nhwc", "reverse_step", "with_x_0"),
    Configuration("reverse step, odd", "reverse_step", "noisy", shape=ODD, portable=True),
    Configuration("reverse step, guided, nhwc", "reverse_step", "guided", portable=True),
    Configuration("reverse step, guided, nchw", "reverse_step", "guided", channels_last=False),
    Configuration("reverse step, learned range, nhwc", "reverse_step", "learned", portable=True),
    Configuration("reverse step, learned range, nchw", "reverse_step", "learned", channels_last=False),
    Configuration("reverse step, noise given, nhwc", "reverse_step", "given"),
    Configuration("reverse step, history, noiseless, nhwc", "reverse_step", "h1-noiseless", portable=True),
    Configuration("reverse step, history, noiseless, nchw", "reverse_step", "h1-noiseless", channels_last=False),
    Configuration("reverse step, two of history, noiseless, nhwc", "reverse_step", "h2-noiseless"),
    Configuration("reverse step, all, nhwc", "reverse_step", "h2-guided-learned-with_x_0", portable=True),
    Configuration("reverse step, all, nchw", "reverse_step", "h2-guided-learned-with_x_0", channels_last=False),
    Configuration("normals fp32, nhwc", "draw_normal", "x_T", torch.float32),
    Configuration("normals fp32, nchw", "draw_normal", "z", torch.float32, channels_last=False, portable=True),
    Configuration("uniforms", "draw_uniform", "", torch.float32, portable=True),
    Configuration("timesteps", "draw_timesteps", "", torch.float32, portable=True),
    Configuration("dropout mask, nhwc", "dropout", "p=0.1", shape=(2, 128, 32, 32), portable=True),
    Configuration("dropout mask, nchw", "dropout", "p=0.1", channels_last=False, shape=(2, 128, 32, 32)),
)

# The norms of Ho's CIFAR-10 net and of an ADM net at 64x64: (what, variant, shape, whether AMD's targets are compiled).
# With a skip the shape is the first source's, and the norm has half as many channels more.
NORMS = (
    ("128@32x32", "", (2, 128, 32, 32), False),
    ("128@32x32, temb, dropout", "temb-dropout", (2, 128, 32, 32), False),
    ("128@32x32, bias, residual", "add-residual", (2, 128, 32, 32), False),
    ("256@16x16, temb, dropout", "temb-dropout", (2, 256, 16, 16), False),
    ("256@16x16, no SiLU", "norm", (2, 256, 16, 16), False),
    ("512@16x16", "", (2, 512, 16, 16), False),
    ("256+128@32x32", "skip", (2, 256, 32, 32), False),
    ("256@4x4, temb, dropout", "temb-dropout", (2, 256, 4, 4), False),
    ("192@64x64", "", (2, 192, 64, 64), False),
    ("192@64x64, bias, residual", "add-residual", (2, 192, 64, 64), False),
    ("192@64x64, FiLM, dropout", "film-dropout", (2, 192, 64, 64), True),
    ("384@32x32, FiLM, dropout", "film-dropout", (2, 384, 32, 32), False),
    ("576@16x16, FiLM, dropout", "film-dropout", (2, 576, 16, 16), False),
    ("512+256@8x8, bias, residual", "add-residual-skip", (2, 512, 8, 8), False),
    ("512@16x16, FiLM, dropout", "film-dropout", (2, 512, 16, 16), True),
    ("18@7x9, FiLM, dropout", "film-dropout", (2, 18, 7, 9), False),
    ("192@4x4, temb, dropout", "temb-dropout", (2, 192, 4, 4), False),
    ("128@32x32, FiLM, dropout", "film-dropout", (2, 128, 32, 32), False),
)
# Where registers are scarcest, in other dtypes: 16 warps that leave 128 each, groups that are no powers of two in tiles
# of one warp, and one group, whose splits are merged by as many warps as there are. None: the groups of the example.
SCARCE: tuple[tuple[str, str, tuple[int, int, int, int], torch.dtype, int | None], ...] = (
    ("512@32x32, FiLM, dropout, fp32", "film-dropout", (2, 512, 32, 32), torch.float32, None),
    ("512@32x32, FiLM, dropout, fp16", "film-dropout", (2, 512, 32, 32), torch.float16, None),
    ("96@4x4, FiLM, dropout, fp32", "film-dropout", (2, 96, 4, 4), torch.float32, None),
    ("1024@64x64, temb, one group", "temb-dropout", (2, 1024, 64, 64), torch.bfloat16, 1),
)
CONFIGURATIONS += tuple(
    Configuration(f"norm {what}, {direction}", op, variant, shape=shape, portable=portable)
    for what, variant, shape, portable in NORMS
    for direction, op in (("forward", "group_norm_silu"), ("backward", "group_norm_silu_backward"))
)
CONFIGURATIONS += tuple(
    Configuration(f"norm {what}, {direction}", op, variant, dtype, shape=shape, num_groups=num_groups)
    for what, variant, shape, dtype, num_groups in SCARCE
    for direction, op in (("forward", "group_norm_silu"), ("backward", "group_norm_silu_backward"))
)


@dataclass
class Launch:
    """A recorded launch: the kernel, its arguments by name, and the options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def record(configuration: Configuration, target: GPUTarget) -> list[Launch]:
    """The launches of one call of the op's Triton implementation, as the target's launcher makes them."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
        launches.append(Launch(kernel, named, {k: v for k, v in kwargs.items() if k not in kernel.arg_names}))

    op = OPS[configuration.op]
    case = Case(configuration.shape, configuration.dtype, configuration.channels_last, variant=configuration.variant)
    kwargs = op.example(case)
    if configuration.num_groups is not None:
        kwargs["num_groups"] = configuration.num_groups
        kwargs |= {name: kwargs[name][:, : configuration.num_groups] for name in ("mean", "rstd") if name in kwargs}
    kept = triton.JITFunction.run, launch.is_fast, launch.WARP
    triton.JITFunction.run, launch.WARP = run, target.warp_size
    launch.is_fast = lambda device: target.backend == "cuda"
    try:
        op.triton(**kwargs)
    finally:
        triton.JITFunction.run, launch.is_fast, launch.WARP = kept
    return launches


def compile_launch(recorded: Launch, target: GPUTarget) -> Any:
    """Compile one recorded launch as Triton's own launcher would for the target."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                assert value.data_ptr() % 16 == 0, f"{parameter.name} would be specialised on its alignment"
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{parameter.name} would be specialised on its value"
            assert -(2**31) <= value < 2**31, f"{parameter.name} does not fit 32 bits"
            signature[parameter.name] = "i32"
    source = ASTSource(recorded.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=recorded.options)


def elements_per_thread(recorded: Launch) -> float:
    """Elements that a thread of a whole tile handles."""
    a = recorded.arguments
    if recorded.kernel.fn.__name__ in ("_sum_tiles_kernel", "_merge_statistics_kernel", "_merge_sums_kernel"):
        return 1.0
    if "VECTOR" in a:  # what is in use of a padded tile
        rows = min(a["PLANE"], a["ROWS"] * a.get("BLOCKS", 1))
        return a.get("BUNDLE", a["CHANNELS"]) * rows / (32 * recorded.options["num_warps"])
    if "GROUPS" in a:
        group = 4 if a["PIXELS"] == 1 else a["PIXELS"] * a["C"]
        return group * a["GROUPS"] * a["UNROLL"] * a["BLOCKS"] / 32
    return a["BLOCK"] * (8 if "CHANNELS_LAST" in a else 4 if "NUM" in a else 1) / 32


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """[(address, instruction)] and the resource usage, by the tools in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    instructions = [(int(address, 16), text.strip()) for address, text in INSTRUCTION.findall(sass)]
    return instructions, {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def executed(instructions: list[tuple[int, str]], trips: int) -> int:
    """The most instructions that a thread issues from entry to exit.

    Both ways of every forward branch are followed; a loop runs `trips` times. A branch forward over a loop's back
    edge leaves the loop.
    """
    index = {address: i for i, (address, _) in enumerate(instructions)}
    branches: dict[int, tuple[int, bool]] = {}
    for i, (_, text) in enumerate(instructions):
        match = re.match(r"(@\S+\s+)?(?:BRA|CALL\.REL\.NOINC)\S*\s+(!?U?P\d,)?.*?0x([0-9a-f]+)", text)
        if match:
            branches[i] = index[int(match[3], 16)], bool(match[1] or match[2])
    back_edges = [(i, target) for i, (target, _) in branches.items() if target < i]
    if not back_edges:  # one step per instruction, where following every way takes 2^branches
        ways = [0] * len(instructions) + [-len(instructions)]
        for i in reversed(range(len(instructions))):
            target, conditional = branches.get(i, (i + 1, False))
            ends = re.match(r"EXIT\b", instructions[i][1]) or target == i
            ways[i] = 1 if ends else 1 + max(ways[target], ways[i + 1] if conditional else ways[target])
        assert ways[0] > 0, "no path to an exit was found: a branch that this walk does not know"
        return ways[0]
    longest = 0
    stack: list[tuple[int, int, dict[int, int]]] = [(0, 0, {})]
    while stack:
        i, count, taken = stack.pop()
        while True:
            count += 1
            text = instructions[i][1]
            if re.match(r"EXIT\b", text) or (i in branches and branches[i][0] == i):
                longest = max(longest, count)
                break
            if i in branches:
                target, conditional = branches[i]
                if target < i:
                    if taken.get(i, 0) < trips - 1:
                        taken = {**taken, i: taken.get(i, 0) + 1}
                        i = target
                        continue
                    if not conditional:
                        break  # not reached: the loop is left by a branch over this edge
                else:
                    over = [edge for edge, start in back_edges if start <= i < edge < target]
                    leaves = [edge for edge in over if not branches[edge][1]]
                    if not conditional or (leaves and taken.get(leaves[0], 0) >= trips - 1):
                        i = target
                        continue
                    if not leaves:
                        stack.append((target, count, dict(taken)))
            i += 1
    assert longest > 0, "no path to an exit was found: a branch that this walk does not know"
    return longest


def measure(recorded: Launch, compiled: Any) -> dict[str, Any]:
    """The figures of one compiled kernel that the table holds."""
    instructions, usage = disassemble(compiled.asm["cubin"])
    texts = [re.sub(r"^@\S+\s+", "", text) for _, text in instructions]
    per_thread = elements_per_thread(recorded)
    return {
        "instructions": round(executed(instructions, recorded.arguments.get("BLOCKS", 1)) / per_thread, 2),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"] + sum(re.match(r"(LDL|STL)\b", t) is not None for t in texts),
        "shared": compiled.metadata.shared + sum(re.match(r"(LDS|STS|BAR)\b", t) is not None for t in texts),
        "shuffles": sum(t.startswith("SHFL") for t in texts),
        "narrow_multiplies": sum(t.startswith("IMAD.HI") for t in texts),
        "flushed_multiply_adds": sum(t.startswith("FFMA.FTZ") for t in texts),
        "loads": sorted({t.split()[0] for t in texts if t.startswith("LDG")}),
        "stores": sorted({t.split()[0] for t in texts if t.startswith("STG")}),
        "special": sum(t.startswith("MUFU") for t in texts),
    }


def results(configurations: Sequence[Configuration] = CONFIGURATIONS) -> Iterator[dict[str, Any]]:
    """Compile the configurations for their targets; one record per kernel launched."""
    for configuration in configurations:
        for name, target in TARGETS.items():
            if target.backend != "cuda" and not configuration.portable:
                continue
            for recorded in record(configuration, target):
                compiled = compile_launch(recorded, target)
                row = {"name": configuration.name, "kernel": recorded.kernel.fn.__name__, "target": name}
                if target.backend == "cuda":
                    row |= {"even": recorded.arguments.get("EVEN", False), **measure(recorded, compiled)}
                else:
                    # Bytes of memory too; scalars spill to the lanes of a vector register, which costs no access.
                    found = re.findall(
                        r"(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]
                    )
                    assert len(found) == 2, "the compiler's report has changed"
                    row["spills"] = sum(map(int, found))
                yield row


def write_budgets(merge: bool) -> None:
    """The checked-in table: what is measured now with 2 % of room, or, merging, at least what the table holds."""
    table: dict[str, dict[str, dict[str, float]]] = json.loads(BUDGETS.read_text()) if merge else {}
    for row in results():
        if "instructions" in row:
            budget = {"instructions": math.ceil(row["instructions"] * 10.2) / 10, "registers": row["registers"] + 8}
            held = table.setdefault(f"{row['name']}: {row['kernel']}", {}).setdefault(row["target"], {})
            held.update({name: max(value, held.get(name, 0)) for name, value in budget.items()})
    BUDGETS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-budgets", action="store_true", help=f"write {BUDGETS.name} from what is measured")
    parser.add_argument("--merge", action="store_true", help="keep a larger budget: for the other release of Triton")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth configuration from the Ith on")
    options = parser.parse_args()
    first, step = map(int, options.shard.split("/"))
    if options.write_budgets:
        write_budgets(options.merge)
    else:
        for result in results(CONFIGURATIONS[first::step]):
            print(json.dumps(result), flush=True)
