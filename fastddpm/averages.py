"""Power-function averages of the weights, and the average of any width made from them afterwards.

After t steps the average of exponent g is the weighted mean of all weights so far with density proportional to tau^g
(Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C):

    theta_g(t) = (g + 1) / t^(g + 1) * integral_0^t tau^g theta(tau) dtau

Its profile has the same shape at all t: tau / t is Beta(g + 1, 1)-distributed, whose standard deviation is the relative
width sqrt((g + 1) / ((g + 2)^2 (g + 3))). Where theta(tau) is constant between steps, the recursion

    theta_g(t) = beta_t theta_g(t - 1) + (1 - beta_t) theta(t),   beta_t = (1 - 1/t)^(g + 1)

is that integral without any error: it gives step i the weight (i^(g + 1) - (i - 1)^(g + 1)) / t^(g + 1).

The average of another width is a weighted sum of stored snapshots (RUN/ema), the sum of whose profiles comes closest to
the profile that is wanted in the mean square. The weights of that sum are made to add up to 1, so that what the weights
of the network have in common over all of training comes out exactly, however good or bad the match is.
"""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import Config, read_config, read_facts
from .errors import CheckpointError, ConfigError
from .files import expand, replace_file, writable_folder, write_json
from .optim import update_ema
from .pipeline import write_pipeline
from .schedules import Array
from .unet import UNet

MAX_WIDTH = 12**-0.5
"""The relative width of the exponent 0: the plain mean of all steps."""
POOR_MATCH = 0.1
"""Relative error of a profile from which on the user is told that there are too few snapshots."""
# Snapshots are rounded to fp32; without this a sum of many nearly equal ones could have large weights of both signs.
# At 1e-10 of each profile's square the match is no worse in its first three digits (400 snapshots).
RIDGE = 1e-10
FOLDER = "ema"
_WITHOUT = "restore it, or delete it to do without"
_NAME = re.compile(r"step-(\d{8,})-width-(.+)\.safetensors")


def width_of(exponent: float) -> float:
    """Relative width of an exponent g > -1: the standard deviation of tau / t, sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(width: float) -> float:
    """The exponent g >= 0 of a relative width in (0, 12^-1/2]; the inverse of width_of.

    With b = g + 2 and s = width^-2 the definition is b^3 + b^2 - s b + s = 0, which has three real roots, one of them
    negative; of the others the larger has g >= 0. With b = y - 1/3 the square term goes: y^3 - p y + q = 0 with
    p = s + 1/3 and q = 4 s / 3 + 2 / 27, of which the largest root is
    y = 2 sqrt(p / 3) cos(arccos(-(q / 2) (p / 3)^(-3/2)) / 3) (Viete).

    Raises:
        ConfigError: for a width out of range.
    """
    if not 0 < width <= MAX_WIDTH:
        raise ConfigError(f"the width {width:g} of an average must be above 0 and at most {MAX_WIDTH:.4f} (12^-1/2)")
    s = 1 / width**2
    p, q = s + 1 / 3, 4 * s / 3 + 2 / 27
    y = 2 * math.sqrt(p / 3) * math.cos(math.acos(max(-1.0, -q / 2 * (p / 3) ** -1.5)) / 3)
    return max(0.0, y - 1 / 3 - 2)


def average_weight(exponent: float, step: int) -> float:
    """1 - beta of optimiser step `step` = 0, 1, ...: 1 - (1 - 1/t)^(g + 1) with t = step + 1; 1 at the first."""
    t = step + 1
    return 1.0 if t == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / t))


class PowerAverages:
    """One average of the weights per relative width, updated after every optimiser step.

    Args:
        parameters: the weights as they are before the first step, or what this process holds of them.
        widths: relative widths, each in (0, 12^-1/2].

    Raises:
        ConfigError: for a width out of range or one that is there twice.
    """

    def __init__(self, parameters: Sequence[Tensor], widths: Sequence[float]) -> None:
        if len(set(widths)) < len(widths):
            raise ConfigError(f"ema.widths is {' '.join(f'{w:g}' for w in widths)}: give different widths")
        self.widths = tuple(float(width) for width in widths)
        self.exponents = tuple(exponent_of(width) for width in self.widths)
        self.averages = [[parameter.detach().clone() for parameter in parameters] for _ in widths]
        """By width, in the order of the parameters and in their memory order."""

    def weights(self, step: int) -> list[float]:
        """By width, the weight of the parameters after optimiser step `step` = 0, 1, ...: a function of it alone."""
        return [average_weight(exponent, step) for exponent in self.exponents]

    def update(
        self, parameters: Sequence[Tensor], weights: Sequence[float | Tensor], applied: Tensor | None = None
    ) -> None:
        """Take the parameters in, after an optimiser step: one pass over them per width, without a host sync.

        Args:
            parameters: in the order and shapes of the constructor's.
            weights: what `weights` returned, or the same in float32 scalars on the device.
            applied: bool scalar on the device; where it is False (a step that is skipped) nothing changes, and the
                weight of the step goes to all before it in proportion.
        """
        for average, weight in zip(self.averages, weights, strict=True):
            update_ema(average, parameters, weight, applied)


@dataclass(frozen=True)
class Snapshot:
    """An average as it was after a step, in a file of its own."""

    path: Path
    step: int
    """Optimiser steps done."""
    width: float
    exponent: float


def write_snapshots(
    run: Path, step: int, averages: PowerAverages, parameters: Mapping[str, Tensor], *, main: bool = True
) -> None:
    """Write the averages after `step` optimiser steps into RUN/ema, a file per width; called on all processes.

    Each file is there whole or not at all, and survives a power cut. Written before the checkpoint of the same step is
    committed, a snapshot is never missing: a run that is killed in between goes on before it, and writes it again.

    Args:
        parameters: the net's own by name, in the order of the averages; of a sharded net DTensors, of which the
            averages are what this process holds.
        main: whether this process writes; of a sharded net it holds the whole of one average at a time, on the host.

    Raises:
        CheckpointError: naming the first file that cannot be written; on the process that writes, after all have met.
    """
    failure: CheckpointError | None = None
    for width, exponent, average in zip(averages.widths, averages.exponents, averages.averages, strict=True):
        tensors = {}
        for (name, like), part in zip(parameters.items(), average, strict=True):
            whole = _whole(part, like)
            if main:
                tensors[name] = whole.to("cpu").contiguous()
            del whole
        if main and failure is None:
            path = run / FOLDER / f"step-{step:08d}-width-{width!r}.safetensors"
            facts = {"step": str(step), "width": repr(width), "exponent": repr(exponent), "sha256": _digest(tensors)}
            try:
                replace_file(path, lambda place, t=tensors, f=facts: save_file(t, place, metadata=f))  # type: ignore[misc]
            except (OSError, SafetensorError) as error:
                failure = CheckpointError(f"{path} cannot be written: {error}")
    if failure is not None:
        raise failure


@torch.no_grad()
def _whole(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of which this process holds what it holds of `like`."""
    if not isinstance(like, DTensor):
        return part
    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return spread.full_tensor()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over all names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add_to_digest(digest, name, tensors[name])
    return digest.hexdigest()


def _add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def rewind_snapshots(run: Path, step: int, every: int = 1) -> None:
    """Delete snapshots beyond `step`, which a resumed run will write again, and what a kill has left half written.

    Args:
        every: those of steps that are no multiple of it go too.
    """
    for path in (run / FOLDER).glob("step-*.safetensors"):
        if (match := _NAME.fullmatch(path.name)) is not None and (int(match[1]) > step or int(match[1]) % every):
            path.unlink()
    for path in (run / FOLDER).glob(".*.step-*.safetensors"):
        path.unlink()


def read_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run by step and width; none where there is no RUN/ema. Reads their headers only.

    Raises:
        CheckpointError: naming a file that is damaged or is none of ours.
    """
    found = []
    for path in (run / FOLDER).glob("step-*.safetensors"):
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            snapshot = Snapshot(path, int(facts["step"]), float(facts["width"]), float(facts["exponent"]))
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a snapshot ({error}): {_WITHOUT}") from error
        fits = math.isclose(snapshot.width, width_of(snapshot.exponent), rel_tol=1e-9) and snapshot.step > 0
        if (snapshot.step, repr(snapshot.width)) != (int(match[1]), match[2]) or not fits:
            raise CheckpointError(f"{path} holds {facts}, which is not what its name says: {_WITHOUT}")
        found.append(snapshot)
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.width))


def profile_product(exponent_1: ArrayLike, step_1: ArrayLike, exponent_2: ArrayLike, step_2: ArrayLike) -> Array:
    """Inner product of two profiles (densities over tau that end at their step), float64, broadcast.

    With a = g + 1 of each and s <= t their steps: integral_0^s a_1 a_2 tau^(a_1 + a_2 - 2) / (s^a_1 t^a_2) dtau
    = a_1 a_2 / (a_1 + a_2 - 1) * (s / t)^a_2 / s, where a_2 belongs to the later one.
    """
    a_1, a_2 = np.asarray(exponent_1, np.float64) + 1, np.asarray(exponent_2, np.float64) + 1
    step_1, step_2 = np.asarray(step_1, np.float64), np.asarray(step_2, np.float64)
    s, t = np.minimum(step_1, step_2), np.maximum(step_1, step_2)
    later = np.where(step_1 <= step_2, a_2, a_1)
    product: Array = a_1 * a_2 / (a_1 + a_2 - 1) * (s / t) ** later / s
    return product


def fit_profile(exponents: Array, steps: Array, exponent: float, step: int) -> tuple[Array, float]:
    """Weights of stored averages whose profiles add up to nearly the profile of `exponent` at `step`.

    Least squares under the condition that the weights add up to 1: with G the inner products among the stored profiles
    and h those with the one wanted, G x + mu 1 = h and 1 x = 1.

    Args:
        exponents, steps: float64 [K] of the stored averages.

    Returns:
        weights float64 [K], and the relative error: the root of the mean square of what is left of the profile, over
        that of the profile. Of a stored average itself, exactly 1 for it, 0 for the others, and 0.
    """
    same = (exponents == exponent) & (steps == step)
    if same.any():
        return same / same.sum(), 0.0
    gram = profile_product(exponents[:, None], steps[:, None], exponents, steps)
    wanted = profile_product(exponents, steps, exponent, step)
    square = float(profile_product(exponent, step, exponent, step))
    scale = np.sqrt(np.diag(gram))
    normal = gram / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    free, slope = np.linalg.solve(normal, np.stack((wanted / scale, 1 / scale), axis=1)).T
    x = (free + slope * (1 - (free / scale).sum()) / (slope / scale).sum()) / scale
    left = square - 2 * x @ wanted + x @ gram @ x
    return x, math.sqrt(max(left, 0.0) / square)


def reconstruct(
    snapshots: Sequence[Snapshot], width: float, step: int, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], float]:
    """The average of a relative width after `step` steps, from snapshots.

    Memory stays at two copies of the network (sums in float64) and one tensor: files are read tensor by tensor.

    Args:
        snapshots: of any widths, up to the first step that is not before `step`: later ones are not needed.
        shapes: names and shapes that each of them must have.

    Returns:
        tensors in the snapshots' dtype, and the relative error of the profile (see fit_profile).

    Raises:
        ConfigError: the width is out of range.
        CheckpointError: naming a file that is damaged or of another network.
    """
    exponents = np.array([snapshot.exponent for snapshot in snapshots], np.float64)
    steps = np.array([snapshot.step for snapshot in snapshots], np.float64)
    weights, error = fit_profile(exponents, steps, exponent_of(width), step)
    sums = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in sorted(shapes.items())}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        if weight:
            dtypes = _add(sums, snapshot.path, weight)
    return {name: total.to(dtypes[name]) for name, total in sums.items()}, error


def _add(sums: dict[str, Tensor], path: Path, weight: float) -> dict[str, torch.dtype]:
    """sums += weight * the tensors of a file, whose bytes are compared with its sha256 on the way; their dtypes."""
    digest, dtypes = hashlib.sha256(), {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names ^ sums.keys())[:1]:
                which = "has no" if name in sums else "has a"
                raise CheckpointError(f"{path} is of another network: it {which} {name}; {_WITHOUT}")
            for name, total in sums.items():
                tensor = file.get_tensor(name)
                if tensor.shape != total.shape:
                    raise CheckpointError(
                        f"{path} is of another network: {name} is {list(tensor.shape)}, not {list(total.shape)}; "
                        f"{_WITHOUT}"
                    )
                _add_to_digest(digest, name, tensor)
                dtypes[name] = tensor.dtype
                total.add_(tensor.double(), alpha=weight)
            told = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_WITHOUT}") from error
    if digest.hexdigest() != told:
        raise CheckpointError(f"{path} is not what was written (another sha256): {_WITHOUT}")
    return dtypes


def run_ema(command: Any) -> int:
    """Write the pipeline of a run with the average of `command.width`; returns the exit code.

    The folder holds a copy of the run's config.json, so that sample and evaluate treat it as the run.

    Args:
        command: the options of cli.EmaCommand, which the library does not import.

    Raises:
        ConfigError: no run, no snapshots, a width or step that they do not give, or a folder that cannot be written.
        CheckpointError: naming a snapshot that is damaged.
    """
    run = expand(command.run)
    config, facts = read_config(run), read_facts(run)
    if config is None or facts is None:
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    if not 0 < command.width <= MAX_WIDTH:
        raise ConfigError(f"--width is {command.width:g}: it must be above 0 and at most {MAX_WIDTH:.4f} (12^-1/2)")
    snapshots, step = _chosen(read_snapshots(run), run, config, command.step)
    out = expand(command.out) if command.out is not None else run / FOLDER / f"width-{command.width!r}"
    if out.resolve() == run.resolve():
        raise ConfigError(f"--out is the run folder {run} itself, whose weights would be lost: give another folder")
    theirs = read_facts(out)
    if (out / "checkpoints").is_dir() or (theirs is not None and "average" not in theirs):
        raise ConfigError(f"--out {out} is another run's folder, which would be lost: give another folder")
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in UNet(config.network()).named_parameters()}
    tensors, error = reconstruct(snapshots, command.width, step, shapes)
    writable_folder(out, "output folder")
    average = {"width": command.width, "step": step, "profile_error": error, "num_snapshots": len(snapshots)}
    write_json(out / "config.json", facts | {"average": average})
    write_pipeline(out, config.network(), config.diffusion, tensors)
    stored = sorted({snapshot.width for snapshot in snapshots})
    print(f"pipeline   {out}")
    print(
        f"average    width {command.width:g} after step {step}, from {len(snapshots)} snapshots of "
        f"{'widths' if len(stored) > 1 else 'width'} {', '.join(f'{width:g}' for width in stored)}"
    )
    print(f"profile    {error:.2%} away from that of this width")
    if error > POOR_MATCH:
        print("           more snapshots (--ema.snapshot-every), or widths nearer to this one, would match it better")
    print(f"next       fastddpm sample {shlex.quote(str(out))} --out {shlex.quote(f'{out}/samples')}")
    return 0


def _chosen(found: list[Snapshot], run: Path, config: Config, step: int | None) -> tuple[list[Snapshot], int]:
    """The snapshots that an average at `step` is made of, and the step: the last one's unless it is given.

    Up to the first step that is not before it: what comes out does not change as the run goes on.
    """
    if not found:
        if config.ema.widths:
            raise ConfigError(f"{run} has no snapshots in {run / FOLDER} yet: they are written as the run goes on")
        raise ConfigError(
            f"{run} has no snapshots of averages: only a run started with --ema.widths (e.g. --ema.widths 0.05 0.1) "
            "keeps them"
        )
    first, last = found[0].step, found[-1].step
    if step is None:
        return found, last
    if not first <= step <= last:
        raise ConfigError(f"--step is {step}: the snapshots of {run} are of steps {first} to {last}")
    end = min(snapshot.step for snapshot in found if snapshot.step >= step)
    return [snapshot for snapshot in found if snapshot.step <= end], step
